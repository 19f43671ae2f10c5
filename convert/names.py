"""From the paths of our parameters to PyTorch's names, and the tensors between them.

The map runs from our side: every parameter of a Flax module names the PyTorch tensors it is made
of, so a checkpoint fits exactly if these names are its names.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import flax
import jax
import numpy as np
from jax.typing import DTypeLike

from qvd_jax.axes import Params
from qvd_jax.errors import InputError

from .tensors import LazyTensor, Tensors

Names = Callable[[str], tuple[str, ...]]
"""Our path, slash-separated, to the PyTorch tensors that are concatenated for it."""

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
"""Patterns in our paths and what PyTorch has instead, applied in order."""

Folded = tuple[tuple[str, tuple[int, ...]], ...]
"""Patterns in PyTorch's modules, and the kernels of those convolutions that are a Dense here.

Their stride is their size. A parameter does not tell them from a linear layer.
"""

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mix_factor": "mix_factor",
    "class_embedding": "class_embedding",
    "positions_0": "positions.0",
    "positions_1": "positions.1",
}

_UNET: Rules = (
    (r"/blocks_(\d+)/resnet/", r"/resnets_\1/"),
    (r"/blocks_(\d+)/attention/", r"/attentions_\1/"),
    (r"/blocks_(\d+)/motion_module/", r"/motion_modules_\1/"),
    (r"/blocks_(\d+)/temporal_attention/", r"/temp_attentions_\1/"),
    (r"/blocks_(\d+)/temporal_conv/", r"/temp_convs_\1/"),
    (r"/norms_(\d+)/", lambda match: f"/conv{int(match[1]) + 1}_0/"),
    (r"/convs_0/", "/conv1_2/"),
    (r"/convs_(\d+)/", lambda match: f"/conv{int(match[1]) + 1}_3/"),
    (r"/(spatial|temporal)/", r"/\1_res_block/"),
    (r"/block/", "/transformer_blocks_0/"),
    (r"/temporal_block/", "/temporal_transformer_blocks_0/"),
    (r"/token_attn/", "/attn2/"),
    (r"/to_out/", "/to_out_0/"),
    (r"/(ff|ff_in)/proj/", r"/\1/net_0/proj/"),
    (r"/(ff|ff_in)/out/", r"/\1/net_2/"),
    (r"/(down|up)sample/", r"/\1samplers_0/"),
)
_VAE: Rules = (
    (r"/(spatial|temporal)/", r"/\1_res_block/"),
    (r"/mid_block/attention/(?:attn/)?", "/mid_block/attentions_0/"),
    (r"/to_out/", "/to_out_0/"),
    (r"/(down|up)sample/", r"/\1samplers_0/"),
)
_CLIP_LAYER: Rules = (
    (r"/fc([12])/", r"/mlp/fc\1/"),
    (r"/to_(qkv|out)/", r"/\1_proj/"),
)
_CLIP_TEXT: Rules = (
    (r"^(token|position)_embedding/", r"embeddings/\1_embedding/"),
    (r"^encoder_(\d+)/", r"encoder/layers_\1/"),
    *_CLIP_LAYER,
)
_CLIP_VISION: Rules = (
    (r"^(patch|position)_embedding/", r"embeddings/\1_embedding/"),
    (r"^class_embedding$", "embeddings/class_embedding"),
    (r"^encoder_(\d+)/", r"encoder/layers_\1/"),
    (r"^pre_layer_norm/", "pre_layrnorm/"),
    (r"^post_layer_norm/", "post_layernorm/"),
    (r"^(?!visual_projection/)", "vision_model/"),
    *_CLIP_LAYER,
)


def _names(rules: Rules, fused: Mapping[str, tuple[str, ...]]) -> Names:
    def names(path: str) -> tuple[str, ...]:
        for pattern, replacement in rules:
            path = re.sub(pattern, replacement, path)
        module, _, leaf = path.rpartition("/")
        parent, _, last = module.rpartition("/")
        modules = [f"{parent}/{part}" for part in fused[last]] if last in fused else [module]
        # Flax numbers the entries of a list with an underscore; linear_1 is a plain name.
        return tuple(
            re.sub(r"(?<!linear)_(\d+)(?=/|$)", r".\1", part).replace("/", ".")
            + f".{_LEAVES[leaf]}"
            for part in modules
        )

    return names


_ATTENTION = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}

UNET: Names = _names(_UNET, _ATTENTION)
VAE: Names = _names(_VAE, _ATTENTION)
_CLIP_ATTENTION = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
CLIP_TEXT: Names = _names(_CLIP_TEXT, _CLIP_ATTENTION)
CLIP_VISION: Names = _names(_CLIP_VISION, _CLIP_ATTENTION)


def build_params(
    expected: Params,
    names: Names,
    tensors: Tensors,
    dtype: DTypeLike,
    on_bytes: Callable[[int], None],
) -> Params:
    """Reads a module's parameters, tensor by tensor.

    Args:
      expected: tree of shapes, from `jax.eval_shape` of the module's `init`.
      names: which tensors make up each parameter.
      tensors: the checkpoint; must have passed `check_names`.
      dtype: of the result.
      on_bytes: called after each parameter with its bytes, for a progress bar.

    Returns:
      The tree with `jax.Array` leaves.
    """
    shapes = flax.traverse_util.flatten_dict(expected, sep="/")
    params = {}
    for path, leaf in shapes.items():
        parts = [
            np.transpose(array, _axes(path, array.ndim))
            for array in (tensors[name].read() for name in names(path))
        ]
        array = np.concatenate(parts, axis=-1).reshape(leaf.shape).astype(dtype)
        params[path] = jax.block_until_ready(jax.device_put(array))
        on_bytes(array.nbytes)
    return flax.traverse_util.unflatten_dict(params, sep="/")


def split_params(
    shapes: Params, names: Names, value: Callable[[str], np.ndarray], folded: Folded
) -> Tensors:
    """The PyTorch tensors that parameters are made of: the way back of `build_params`.

    Args:
      shapes: tree of the parameters' shapes.
      names: which tensors make up each parameter.
      value: gives a parameter by its path.
      folded: the convolutions that are a Dense here.
    """
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    tensors = {}
    for path, leaf in flat.items():
        parts = names(path)
        for number, name in enumerate(parts):
            part = _Part(path, number, len(parts), _kernel_size(name, folded))
            tensors[name] = LazyTensor(part.shape(leaf.shape), functools.partial(part.read, value))
    return tensors


@dataclass(frozen=True)
class _Part:
    """A PyTorch tensor within a parameter.

    Attributes:
      path: of the parameter.
      number: which of its tensors it is.
      count: how many tensors are concatenated for it.
      kernel_size: of a convolution that is a Dense here; empty for all others.
    """

    path: str
    number: int
    count: int
    kernel_size: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's, of the parameter's."""
        shape = (*shape[:-1], shape[-1] // self.count) if shape else shape
        if not self.path.endswith("kernel"):
            return shape
        *taps, channels, features = shape
        size = (*taps, *self.kernel_size)
        return features, channels // math.prod(self.kernel_size), *size

    def read(self, value: Callable[[str], np.ndarray]) -> np.ndarray:
        """The tensor, out of the parameter."""
        whole = value(self.path)
        array = np.split(whole, self.count, axis=-1)[self.number] if self.count > 1 else whole
        if not self.path.endswith("kernel"):
            return array
        features, channels, *size = self.shape(whole.shape)
        return np.moveaxis(array.reshape(*size, channels, features), (-1, -2), (0, 1))


def _kernel_size(name: str, folded: Folded) -> tuple[int, ...]:
    module = name.rpartition(".")[0]
    return next((size for pattern, size in folded if re.search(pattern, module)), ())


def _axes(path: str, ndim: int) -> tuple[int, ...]:
    """Axes that bring a PyTorch weight `[O, K, *kernel]` to flax's `[*kernel, K, O]`."""
    if path.endswith("kernel"):
        return (*range(2, ndim), 1, 0)
    return tuple(range(ndim))


def check_names(params: Params, names: Names, tensors: Tensors, where: str) -> None:
    """Checks that the tensors are exactly those the parameters are made of.

    Args:
      params: tree of shapes, as in `build_params`.
      names: which tensors make up each parameter.
      tensors: the checkpoint.
      where: how messages name the checkpoint.

    Raises:
      InputError: listing every missing (-), extra (+) and misshapen (!) tensor at once.
    """
    shapes = flax.traverse_util.flatten_dict(params, sep="/")
    expected: dict[str, tuple[int, ...]] = {}
    lines = []
    for path, leaf in shapes.items():
        parts = names(path)
        for name in parts:
            want = (*leaf.shape[:-1], leaf.shape[-1] // len(parts))
            expected[name] = want
            if name not in tensors:
                lines.append(f"- {name}")
                continue
            shape = tensors[name].shape
            if len(shape) < len(want):
                lines.append(f"! {name} {shape}: does not fit {path} {leaf.shape}")
                continue
            have = tuple(shape[axis] for axis in _axes(path, len(shape)))
            # A convolution whose stride is its size, such as 1x1, is a Dense here.
            folded = len(have) - len(want) + 1
            if (math.prod(have[:folded]), *have[folded:]) != want:
                lines.append(f"! {name} {shape}: does not fit {path} {leaf.shape}")
    lines += [f"+ {name} {tensors[name].shape}" for name in tensors if name not in expected]
    if lines:
        raise InputError(
            f"{where} does not fit ({len(lines)} tensors; - missing, + extra, ! other shape):\n  "
            + "\n  ".join(sorted(lines))
        )
