"""What a layer's input is like: channel ranges and sampled rows, collected without the layer."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qvd_jax.axes import Array
from qvd_jax.models.layers import Conv
from qvd_jax.models.norms import Normalized, value_of
from qvd_jax.quant.policy import TracedLayer


class Statistics(NamedTuple):
    """Of the input of one layer at one step.

    Attributes:
      lower: lowest value of each channel, `[C]`.
      upper: highest value of each channel, `[C]`.
      rows: what some output positions see, `[R, P, C]`; P taps of a convolution, 1 of a Dense.
      finite: whether all values are finite.
    """

    lower: Array
    upper: Array
    rows: Array
    finite: Array


def observe(
    module: nn.Module, params: Any, *arguments: Any, method: str, places: Array | None
) -> tuple[Any, dict[str, Statistics]]:
    """Applies a module and collects the statistics of its Dense and conv layers' inputs.

    Args:
      module: built of float layers.
      params: its parameters.
      *arguments: of the method.
      method: name of the method to apply.
      places: where rows are sampled in every layer's input, as `draw_places` gives them; None
        takes all rows, in order.

    Returns:
      What the method returns, and the statistics by module path.
    """
    found: dict[str, Statistics] = {}

    def collect(layer: nn.Module, x: Array | Normalized, _: Array) -> None:
        path, seen = "/".join(layer.path), _statistics(layer, value_of(x), places)
        # A layer may be called again for a reference.
        found[path] = join([found[path], seen]) if path in found else seen

    with _watching(collect):
        result = module.apply({"params": params}, *arguments, method=method)
    return result, found


def _watching(
    see: Callable[[nn.Module, Array | Normalized, Array], None],
) -> AbstractContextManager[Any]:
    """Shows `see` every Dense and conv layer that is called, with its input and result."""

    def intercept(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        result = call(*arguments, **options)
        if isinstance(context.module, nn.Dense | nn.Conv) and context.method_name == "__call__":
            see(context.module, arguments[0], result)
        return result

    return nn.intercept_methods(intercept)


def draw_places(key: Array, rows: int) -> Array:
    """Random places of a number of rows: shares in [0, 1) of an image, then of its axes, `[R, 4]`.

    All layers take the same ones: random numbers for each were most of what had to be compiled.
    """
    return jax.random.uniform(key, (rows, 4))


def _indices(shares: Array, size: int) -> Array:
    """Indices below `size` of shares of it."""
    return jnp.minimum((shares * size).astype(jnp.int32), size - 1)


def _statistics(layer: nn.Module, x: Array, places: Array | None) -> Statistics:
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    sampled = x.reshape(-1, 1, x.shape[-1])
    if places is not None and isinstance(layer, nn.Conv):
        sampled = _conv_rows(layer, x, places)
    elif places is not None:
        sampled = sampled[_indices(places[:, 0], len(sampled))]
    return Statistics(x.min(axes), x.max(axes), sampled, jnp.isfinite(x).all())


def _conv_rows(layer: nn.Conv, x: Array, places: Array) -> Array:
    """Patches of whole kernels, inside the image only: what is padded is no input."""
    rank, rows = len(layer.kernel_size), len(places)
    spatial, channels = x.shape[-rank - 1 : -1], x.shape[-1]
    images = x.reshape(-1, *spatial, channels)
    image = _indices(places[:, 0], len(images))
    grids = []
    for axis, (size, taken) in enumerate(zip(spatial, layer.kernel_size, strict=True)):
        # An image smaller than the kernel repeats its edge.
        start = _indices(places[:, axis + 1], max(size - taken, 0) + 1)
        place = jnp.minimum(start[:, None] + jnp.arange(taken)[None], size - 1)
        shape = [rows] + [1] * rank
        shape[axis + 1] = taken
        grids.append(place.reshape(shape))
    patches = images[(image.reshape([rows] + [1] * rank), *grids)]
    return patches.reshape(rows, -1, channels)


def trace_layers(
    module: nn.Module,
    *inputs: Array | jax.ShapeDtypeStruct | None,
    method: str | Callable[..., Any] = "__call__",
) -> list[TracedLayer]:
    """The Dense and conv layers a module calls, with the shapes of the first call.

    Args:
      module: built of float layers.
      *inputs: what it is called with, or the shapes of it.
      method: which of its methods is called, or a function of the module and the inputs.
    """
    found: dict[str, TracedLayer] = {}
    # By identity, and kept, so that no other gets it.
    sources: list[Array | Normalized] = []

    def note(layer: nn.Module, x: Array | Normalized, result: Array) -> None:
        path = "/".join(layer.path)
        if path in found:
            return
        taps = tuple(layer.kernel_size) if isinstance(layer, nn.Conv) else ()
        same = [number for number, source in enumerate(sources) if source is x]
        sources.append(x)
        source = same[0] if same else len(sources) - 1
        kernel = (*taps, x.shape[-1], layer.features)
        upsampled = isinstance(layer, Conv) and layer.repeats_positions(x.shape[-3:-1])
        # Of a gated layer the result is half of the outputs.
        shape = result.shape if taps else (*x.shape[:-1], layer.features)
        found[path] = TracedLayer(path, kernel, x.shape, shape, source, upsampled)

    with _watching(note):
        init = functools.partial(module.init, method=method)
        jax.eval_shape(init, jax.random.key(0), *inputs)
    return list(found.values())


def join(parts: list[Statistics]) -> Statistics:
    """The statistics of several steps as one."""
    return Statistics(
        jnp.stack([part.lower for part in parts]).min(0),
        jnp.stack([part.upper for part in parts]).max(0),
        jnp.concatenate([part.rows for part in parts]),
        jnp.stack([part.finite for part in parts]).all(),
    )
