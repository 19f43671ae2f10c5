"""LoRA (Hu et al., arXiv 2106.09685): low-rank additions to layers of a base left as it is.

A layer y = W x becomes y = W x + s B A x, s = alpha / rank (section 4.1). The base may be float or
int8: what is added is float, beside the product, and gradients reach it through the int8 layers
straight through their rounding.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from qvd_jax.axes import Array, Params
from qvd_jax.config import check_finite, check_integer, check_seed, did_you_mean, from_dict
from qvd_jax.errors import InputError, naming
from qvd_jax.files import read_arrays, replace_when_whole
from qvd_jax.kernels import floating
from qvd_jax.models.geometry import geometry, kernel_size
from qvd_jax.models.norms import value_of
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.quant.interception import Int8Module, Intercepting
from qvd_jax.quant.linen import channels_last, features, why_float
from qvd_jax.quant.statistics import Traced, tracing

_DOWN, _UP = "lora_a", "lora_b"
_DESCRIPTION = "description"

Pipeline = TypeVar("Pipeline", bound=VideoPipeline[Any])


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an addition, and of what size.

    Attributes:
      rank: of the additions.
      alpha: the additions are multiplied by alpha / rank; None is the rank.
      targets: patterns of the layers' paths, with * for any part; a layer that matches one has an
        addition. Gated layers (the first of a feed-forward) and those with groups cannot.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        if self.alpha is not None:
            check_finite("alpha", self.alpha)

    @property
    def scale(self) -> float:
        """What the additions are multiplied by, s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """Additions to a base.

    Attributes:
      config: of what kind.
      base: tells the model they are for, float or quantized, from others.
      kernels: tells its float kernels that they are added to from others; None where they were
        made for an int8 base, whose codes do not tell them.
      params: A `[*taps, C, rank]` and B `[rank, O]` of each layer, at its place in the tree of the
        base's parameters.
    """

    config: LoRAConfig
    base: int
    kernels: int | None
    params: Params


class LoRAModule(Intercepting):
    """A module whose layers add what `lora_a` and `lora_b` beside their parameters say.

    Attributes:
      scale: s.
    """

    scale: float

    @property
    def config(self) -> Any:
        """The module's, where it has one."""
        return self.module.config

    @nn.nowrap
    def handle(self, depth: int, layer: nn.Module, x: Any, call: Any) -> Any:
        """Adds to what a layer returns."""
        y = call()
        if not layer.has_variable("params", _DOWN):
            return y
        down, up = (layer.get_variable("params", name) for name in (_DOWN, _UP))
        return y + (self.scale * _product(layer, value_of(x), down, up)).astype(y.dtype)


def _product(layer: nn.Module, x: Array, down: Array, up: Array) -> Array:
    """B A x, laid out as the layer's result is."""
    x = channels_last(layer, x).astype(down.dtype)
    if not isinstance(layer, nn.Conv):
        return (x @ down @ up).reshape(*x.shape[:-1], *features(layer))
    rank = len(kernel_size(layer))
    batch, image = x.shape[: -rank - 1], x.shape[-rank - 1 :]
    strides, padding, dilation = geometry(layer, image[:-1])
    spatial = "DHW"[-rank:]
    low = floating.conv_general_dilated(
        x.reshape(-1, *image),
        down,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )
    return (low @ up).reshape(*batch, *low.shape[1:-1], up.shape[-1])


def create(pipe: VideoPipeline[Any], config: LoRAConfig = LoRAConfig(), seed: int = 0) -> Adapter:
    """A fresh adapter for a pipeline's UNet, which adds nothing yet.

    Args:
      pipe: float or quantized.
      config: of what kind.
      seed: of A; B is zero.

    Raises:
      InputError: a pattern matches no layer that can have an addition.
    """
    stride = pipe.unet.config.stride
    inputs = pipe.configs.unet_shapes(1, stride, stride, 1)
    layers = _layers(UNet3D(pipe.unet.config), inputs, {}, {})
    return _create(layers, pipe.params["unet"], config, seed)


def create_for_module(
    module: nn.Module,
    variables: Mapping[str, Any],
    *arguments: Any,
    config: LoRAConfig = LoRAConfig(),
    seed: int = 0,
    rngs: Mapping[str, Array] | None = None,
    **options: Any,
) -> Adapter:
    """A fresh adapter for a linen module, or an int8 one of `qvd_jax.quantize_module`.

    Args:
      module: float or int8.
      variables: its collections.
      *arguments: of a call.
      config: of what kind.
      seed: of A; B is zero.
      rngs: of a call.
      **options: keyword arguments of a call, or its `method`.

    Raises:
      InputError: a pattern matches no layer that can have an addition.
    """
    written = module.module if isinstance(module, Int8Module) else module
    return _create(
        _layers(written, arguments, options, rngs or {}), variables["params"], config, seed
    )


def attach(pipe: Pipeline, adapter: Adapter) -> Pipeline:
    """The pipeline with additions to its UNet, float or int8; sampled as any other.

    Raises:
      InputError: the adapter is for another base, or for none, or the pipeline has one.
    """
    params = _with(pipe.params["unet"], adapter)
    unet: Any = LoRAModule(pipe.unet, adapter.config.scale)
    return replace(pipe, unet=unet, params={**pipe.params, "unet": params})


def attach_to_module(
    module: nn.Module, variables: Mapping[str, Any], adapter: Adapter
) -> tuple[nn.Module, dict[str, Any]]:
    """A module with additions to its layers, float or int8, and its variables.

    Raises:
      InputError: the adapter is for another base, or for none, or the module has one.
    """
    attached = LoRAModule(module, adapter.config.scale)
    return attached, {**variables, "params": _with(variables["params"], adapter)}


def split(params: Params) -> tuple[Params, Params]:
    """Parameters with additions as those of the base, and the additions, which are trained."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(params))
    base = {place: leaf for place, leaf in flat.items() if place[-1] not in (_DOWN, _UP)}
    added = {place: leaf for place, leaf in flat.items() if place not in base}
    unflatten = flax.traverse_util.unflatten_dict
    return unflatten(base), unflatten(added)


def join(base: Params, added: Params) -> Params:
    """What `split` has split."""
    flatten = flax.traverse_util.flatten_dict
    flat = flatten(flax.core.unfreeze(base)) | flatten(added)
    return flax.traverse_util.unflatten_dict(flat)


def merge(pipe: Pipeline, adapter: Adapter) -> Pipeline:
    """The float pipeline with the additions in its weights: W + s A B.

    Of a pipeline that has an adapter attached it is the base into which they are merged.

    Raises:
      InputError: the adapter is for another base or for none, another one is attached that adds
        something, or the base is int8. Codes cannot take them:
        they are one step apart, more than most additions. An adapter trained on an int8 base is
        for the float one, too: merged there, that is calibrated anew.
    """
    unet: Any = pipe.unet
    params = pipe.params["unet"]
    if isinstance(unet, LoRAModule):
        params, attached = split(params)
        _check_attached(unet.scale, attached, adapter)
        unet = unet.module
    merged = merge_params(params, adapter)
    return replace(pipe, unet=unet, params={**pipe.params, "unet": merged})


def merge_params(params: Params, adapter: Adapter) -> Params:
    """As `merge`, of a module's parameters.

    Raises:
      InputError: as `merge`.
    """
    _check_base(params, adapter)
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(params))
    for layer, down, up in _additions(adapter):
        boxed = flat[*layer, "kernel"]
        kernel = meta.unbox(boxed)
        if _is_codes(kernel):
            raise InputError(
                f"{'/'.join(layer)}: its weights are codes, which cannot take the additions; merge "
                f"into the float checkpoint it was quantized from, and calibrate that"
            )
        added = adapter.config.scale * jnp.matmul(down, up, precision="highest")
        merged = (kernel + added.reshape(kernel.shape)).astype(kernel.dtype)
        flat[*layer, "kernel"] = meta.replace_boxed(boxed, merged)
    return flax.traverse_util.unflatten_dict(flat)


def save(adapter: Adapter, file: str | Path) -> None:
    """Writes an adapter as one .npz file.

    Raises:
      InputError: it cannot be written.
    """
    file = _npz(file)
    description = json.dumps(
        {"config": asdict(adapter.config), "base": adapter.base, "kernels": adapter.kernels}
    )
    flat = flax.traverse_util.flatten_dict(adapter.params, sep="/")
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
    arrays[_DESCRIPTION] = np.asarray(description)
    replace_when_whole(file, lambda partial: np.savez(partial, allow_pickle=False, **arrays))


def load(file: str | Path) -> Adapter:
    """Reads what `save` wrote.

    Raises:
      InputError: it is missing, damaged or something else.
    """
    file = _npz(file)
    arrays = read_arrays(file)
    try:
        description = json.loads(str(arrays.pop(_DESCRIPTION)))
        config, base = description["config"], int(description["base"])
        kernels = description["kernels"]
        kernels = None if kernels is None else int(kernels)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no adapter of qvd_jax.lora") from error
    params = flax.traverse_util.unflatten_dict(
        {name: jnp.asarray(array) for name, array in arrays.items()}, sep="/"
    )
    adapter = Adapter(from_dict(LoRAConfig, config, str(file)), base, kernels, params)
    with naming(str(file)):
        _additions(adapter)
    return adapter


def _npz(file: str | Path) -> Path:
    if Path(file).suffix != ".npz":
        raise InputError(f"{file}: an adapter is an .npz file")
    return Path(file)


def _layers(
    module: nn.Module,
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    rngs: Mapping[str, Array],
) -> Traced:
    """The layers of a float module that can have additions, by path."""

    def select(layer: nn.Module, x: Any) -> bool:
        return why_float(layer, x.shape) is None and not getattr(layer, "gated", False)

    def init(*arguments: Any) -> Any:
        return module.init({"params": jax.random.key(0), **rngs}, *arguments, **options)

    with tracing(select) as found:
        jax.eval_shape(init, *arguments)
    return found


def _create(layers: Traced, params: Params, config: LoRAConfig, seed: int) -> Adapter:
    for pattern in config.targets:
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise InputError(
                f"targets: {pattern!r} matches no layer that can have an addition"
                f"{did_you_mean(pattern, list(layers))}"
            )
    chosen = [
        layer
        for path, layer in layers.items()
        if any(fnmatchcase(path, pattern) for pattern in config.targets)
    ]
    keys = jax.random.split(jax.random.key(check_seed(seed)), len(chosen))
    added = {}
    for key, layer in zip(keys, chosen, strict=True):
        *taps, channels, outputs = layer.kernel
        place = tuple(layer.path.split("/")) if layer.path else ()
        shape = (*taps, channels, config.rank)
        added[*place, _DOWN] = nn.initializers.lecun_normal()(key, shape)
        added[*place, _UP] = jnp.zeros((config.rank, outputs))
    places = [place[:-1] for place in added if place[-1] == _DOWN]
    additions = flax.traverse_util.unflatten_dict(added)
    return Adapter(config, _fingerprint(params), _of_kernels(params, places), additions)


def _additions(adapter: Adapter) -> list[tuple[tuple[str, ...], Array, Array]]:
    """Place, A and B of each layer.

    Raises:
      InputError: there are none, one of the two is missing, or they are not of the config's rank.
    """
    flat = flax.traverse_util.flatten_dict(adapter.params)
    rank, found = adapter.config.rank, []
    for layer in dict.fromkeys(place[:-1] for place in flat):
        down, up = (flat.get((*layer, name)) for name in (_DOWN, _UP))
        if down is None or up is None:
            missing = _DOWN if down is None else _UP
            raise InputError(f"the adapter is damaged: {'/'.join(layer)} has no {missing}")
        if down.ndim < 2 or up.ndim != 2 or down.shape[-1] != rank or len(up) != rank:
            raise InputError(
                f"the adapter is damaged: {'/'.join(layer)} has {_DOWN} {down.shape} and {_UP} "
                f"{up.shape}; (..., {rank}) and ({rank}, outputs) are of its rank"
            )
        found.append((layer, down, up))
    if not found:
        raise InputError("the adapter is damaged: it adds to no layer")
    return found


def _with(params: Params, adapter: Adapter) -> Params:
    _check_base(params, adapter)
    return join(params, adapter.params)


def _check_base(params: Params, adapter: Adapter) -> None:
    """Raises `InputError` if an adapter is for another model, or parameters have one already."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(params))
    if attached := [place for place in flat if place[-1] in (_DOWN, _UP)]:
        raise InputError(
            f"there is an adapter already ({'/'.join(attached[0])}); take the base alone, whose "
            f"parameters are the first of lora.split's"
        )
    additions = _additions(adapter)
    missing = [place for place, *_ in additions if (*place, "kernel") not in flat]
    if missing:
        raise InputError(
            f"the adapter is for another base: this one has no {'/'.join(missing[0])}, and "
            f"{len(missing)} of the adapter's layers are missing"
        )
    if _fingerprint(params) != adapter.base:
        raise InputError(
            "the adapter is for another base: the layers have the same names, but other weights"
        )
    kernels = _of_kernels(params, [place for place, *_ in additions])
    if None not in (kernels, adapter.kernels) and kernels != adapter.kernels:
        raise InputError(
            "the adapter is for another base: the kernels that it adds to are others; it may be "
            "merged into them already"
        )
    for place, down, up in additions:
        shape = meta.unbox(flat[*place, "kernel"]).shape
        if math.prod(down.shape[:-1]) * up.shape[-1] != math.prod(shape):
            raise InputError(
                f"the adapter is damaged: {'/'.join(place)} has {_DOWN} {down.shape} and {_UP} "
                f"{up.shape}, which are none of a kernel {shape}"
            )


def _check_attached(scale: float, attached: Params, adapter: Adapter) -> None:
    """Raises `InputError` if merging an adapter would lose what another, attached one adds."""
    own, given = (flax.traverse_util.flatten_dict(p) for p in (attached, adapter.params))
    adds = any(bool(jnp.any(leaf)) for place, leaf in own.items() if place[-1] == _UP)
    same = scale == adapter.config.scale and own.keys() == given.keys()
    if adds and not (same and all(np.array_equal(own[place], given[place]) for place in own)):
        raise InputError(
            "the pipeline has another adapter attached, whose additions would be lost; merge into "
            "the base, to which it was attached"
        )


def _is_codes(kernel: Array) -> bool:
    return bool(jnp.issubdtype(kernel.dtype, jnp.integer))


def _of_kernels(params: Params, layers: Sequence[tuple[str, ...]]) -> int | None:
    """A number that tells the float kernels of some layers from others; None where one is int8."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(params))
    kernels = {layer: meta.unbox(flat[*layer, "kernel"]) for layer in layers}
    if any(map(_is_codes, kernels.values())):
        return None
    return _checksum(kernels)


def _fingerprint(params: Params) -> int:
    """A number that a model and what is quantized of it share: of what quantization leaves.

    These are norms and embeddings. A model of nothing but layers has none of them, and is known
    by all its parameters.
    """
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(split(params)[0]))
    layers = {place[:-1] for place in flat if place[-1] == "kernel"}
    kept = {place: leaf for place, leaf in flat.items() if place[:-1] not in layers}
    return _checksum(kept or flat)


def _checksum(leaves: Mapping[tuple[str, ...], Any]) -> int:
    """Of arrays by place, rounded as the smallest dtype of parameters rounds them."""
    value = 0
    for place, leaf in sorted(leaves.items(), key=lambda item: item[0]):
        rounded = np.asarray(jnp.asarray(meta.unbox(leaf)).astype(jnp.bfloat16))
        value = zlib.crc32("/".join(place).encode() + rounded.tobytes(), value)
    return value
