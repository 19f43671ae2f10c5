"""Networks of the metrics: I3D and LPIPS, from the files that PyTorch's implementations read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax import checkpoint, items
from qvd_jax.axes import Params
from qvd_jax.errors import InputError
from qvd_jax.evaluation import networks
from qvd_jax.metrics import i3d, lpips

from . import torchscript
from .keys import require
from .tensors import LazyTensor, Tensors, open_file

_EPSILON = 1e-5
"""Of PyTorch's batch norms, which both ports of I3D leave as it is; a TorchScript file says its."""

_HASSON = {
    "b0": "branch_0",
    "b1a": "branch_1.0",
    "b1b": "branch_1.1",
    "b2a": "branch_2.0",
    "b2b": "branch_2.1",
    "b3": "branch_3.1",
}
_PIERGIOVANNI = {name: name for name in i3d.BRANCHES} | {"b3": "b3b"}

_UNUSED = re.compile(r"(^|\.)num_batches_tracked$")


@dataclass(frozen=True)
class MetricNetwork:
    """A network of a metric, read.

    Attributes:
      component: "i3d" or "lpips".
      config: its shape.
      params: of the Flax module.
      description: where it came from.
      notes: what the user should know.
    """

    component: str
    config: Any
    params: Params
    description: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = networks.param_shapes(self.component, self.config)
        items.check_tree(self.params, shapes, self.description)

    def write(self, out: Path) -> None:
        """Writes it as a checkpoint, which `networks.load` reads."""
        params = jax.tree.map(jnp.asarray, self.params)
        checkpoint.save_component(out, self.component, self.config, params, self.description)


def open_metric_network(source: Path, heads: Path | None = None) -> MetricNetwork | None:
    """Reads I3D or LPIPS; None if a file is neither.

    Args:
      source: `i3d_torchscript.pt`, `i3d_pretrained_400.pt`, or torchvision's VGG16 or AlexNet.
      heads: of LPIPS, `vgg.pth` or `alex.pth` of the package `lpips`; torchvision's file needs it.

    Raises:
      InputError: it is one, damaged or of other shapes.
    """
    if not source.is_file():
        if heads is not None:
            raise InputError(f"{source}: --lpips-heads go with a file, torchvision's network")
        return None
    epsilon = None
    if torchscript.is_torchscript(source):
        tensors, epsilon = torchscript.load(source)
    else:
        tensors = {**open_file(source)}
    tensors = {name: tensor for name, tensor in tensors.items() if not _UNUSED.search(name)}
    if heads is not None:
        return _open_lpips(source, tensors, heads)
    for prefix in ("", "i3d."):
        for first, norm, branches, lower in (
            ("conv3d_1a_7x7", "batch3d", _HASSON, True),
            ("Conv3d_1a_7x7", "bn", _PIERGIOVANNI, False),
        ):
            if f"{prefix}{first}.conv3d.weight" in tensors:
                own = {
                    name.removeprefix(prefix): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
                return _open_i3d(source, own, norm, branches, lower, epsilon or _EPSILON)
    if _is_classifier(tensors):
        raise InputError(
            f"{source} is a network of torchvision; LPIPS needs its heads too: --lpips-heads FILE, "
            f"vgg.pth or alex.pth of the package lpips"
        )
    if epsilon is not None or torchscript.is_torchscript(source):
        raise InputError(f"{source} is a TorchScript program; the model's weights are expected")
    return None


def _open_i3d(
    source: Path,
    tensors: Tensors,
    norm: str,
    branches: Mapping[str, str],
    lower: bool,
    epsilon: float,
) -> MetricNetwork:
    def module(path: str) -> str:
        """PyTorch's name of one of our units."""
        first, _, branch = path.partition("/")
        first = first if lower else first.capitalize()
        return f"{first}.{branches[branch]}" if branch else first

    def unit(path: str) -> dict[str, np.ndarray]:
        name = module(path)
        kernel = _read(tensors, f"{name}.conv3d.weight", source)
        mean, variance, bias = (
            _read(tensors, f"{name}.{norm}.{leaf}", source)
            for leaf in ("running_mean", "running_var", "bias")
        )
        scale = tensors.pop(f"{name}.{norm}.weight", _ONE).read()
        return i3d.fold_batch_norm(_channels_last(kernel), mean, variance, bias, scale, epsilon)

    logits = "conv3d_0c_1x1" if lower else "logits"
    kernel = _read(tensors, f"{logits}.conv3d.weight", source)
    params = networks.i3d_params(unit)
    params["logits"] = {
        "kernel": kernel.reshape(kernel.shape[:2]).T,
        "bias": _read(tensors, f"{logits}.conv3d.bias", source),
    }
    _refuse_others(tensors, source)
    return MetricNetwork(networks.I3D, i3d.I3DConfig(), params, f"I3D of {source.name}")


_ONE = LazyTensor((), lambda: np.ones((), np.float32))


def _open_lpips(source: Path, tensors: Tensors, heads: Path) -> MetricNetwork:
    found = {**open_file(heads)}
    kernels = [
        name
        for name in tensors
        if re.match(r"features\.\d+\.weight$", name) and len(tensors[name].shape) == 4
    ]
    kernels.sort(key=lambda name: int(name.split(".")[1]))
    net = next((n for n, specs in lpips.CONVS.items() if len(specs) == len(kernels)), None)
    if net is None:
        raise InputError(f"{source}: LPIPS takes torchvision's AlexNet or VGG16")
    params: dict[str, Any] = {}
    for number, name in enumerate(kernels):
        params[f"convs_{number}"] = {
            "kernel": _channels_last(tensors[name].read()),
            "bias": _read(tensors, name.replace("weight", "bias"), source),
        }
    for number in range(sum(spec.compared for spec in lpips.CONVS[net])):
        name = f"lin{number}.model.1.weight"
        require(found, name, f"{heads} holds no heads of LPIPS")
        params[f"heads_{number}"] = found[name].read().reshape(-1)
    return MetricNetwork(
        networks.LPIPS, lpips.LPIPSConfig(net), params, f"LPIPS of {source.name}, {heads.name}"
    )


def _is_classifier(tensors: Tensors) -> bool:
    return "features.0.weight" in tensors and "classifier.6.weight" in tensors


def _read(tensors: Tensors, name: str, source: Path) -> np.ndarray:
    """Takes a tensor out of the table.

    Raises:
      InputError: it is missing.
    """
    if name not in tensors:
        raise InputError(f"{source}: the tensor {name} is missing")
    return tensors.pop(name).read()


def _refuse_others(tensors: Tensors, source: Path) -> None:
    """Raises `InputError` if tensors were not read."""
    if tensors:
        raise InputError(f"{source} is no I3D: it has {', '.join(sorted(tensors)[:3])} too")


def _channels_last(kernel: np.ndarray) -> np.ndarray:
    """PyTorch's `[O, C, *taps]` as flax's `[*taps, C, O]`."""
    return np.moveaxis(kernel, (0, 1), (-1, -2))
