"""What a layer's input is like: channel ranges and sampled rows, collected without the layer."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import union_filters

from qvd_jax.axes import Array
from qvd_jax.models.geometry import geometry, kernel_size
from qvd_jax.models.norms import LayerInput, Upsampled, value_of
from qvd_jax.quant.linen import channels_last, contracted, intercepting, kernel_shape
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


Traced = dict[str, TracedLayer]
"""Layers by module path."""

STATISTICS = "qvd_statistics"
"""The collection in which layers leave the statistics of their inputs while they are observed.

A collection passes flax's own transformations (`nn.remat`, `nn.jit`), and is not mutable inside
those it does not pass.
"""

See = Callable[[nn.Module, LayerInput, Array], None]
"""Called with a layer, its input and its result."""


Select = Callable[[nn.Module, LayerInput], bool]
"""Whether a layer that is called with an input is looked at."""


def observe(
    module: nn.Module,
    variables: Any,
    *arguments: Any,
    places: Array | None,
    select: Select = lambda layer, x: True,
    mutable: Any = False,
    **options: Any,
) -> tuple[Any, dict[str, Statistics]]:
    """Applies a module and collects the statistics of its Dense and conv layers' inputs.

    Args:
      module: built of float layers.
      variables: its own.
      *arguments: of its call.
      places: where rows are sampled in every layer's input, as `draw_places` gives them; None
        takes all rows, in order.
      select: which layers are observed.
      mutable: which of the module's own collections may change.
      **options: of `nn.Module.apply`, and the call's keyword arguments.

    Returns:
      What the call returns, and the statistics by module path.
    """

    def collect(layer: nn.Module, x: LayerInput, _: Array) -> None:
        if not select(layer, x):
            return
        seen = _statistics(layer, value_of(x), places)
        # A layer may be called again.
        before = layer.get_variable(STATISTICS, "input")
        seen = seen if before is None else join([before, seen])
        layer.put_variable(STATISTICS, "input", seen)

    with watching(collect):
        result, state = module.apply(
            variables, *arguments, mutable=union_filters(mutable, STATISTICS), **options
        )
    found = flax.traverse_util.flatten_dict(state.get(STATISTICS, {}))
    return result, {"/".join(path[:-1]): seen for path, seen in found.items()}


def watching(see: See) -> AbstractContextManager[Any]:
    """Shows `see` every layer of linen with weights that is called, with its input and result."""

    def handle(layer: nn.Module, x: LayerInput, call: Callable[[], Array]) -> Array:
        result = call()
        see(layer, x, result)
        return result

    return intercepting(handle)


def draw_places(key: Array, rows: int) -> Array:
    """Random places of a number of rows: shares in [0, 1) of an image, then of its axes, `[R, 4]`.

    All layers take the same ones: random numbers for each were most of what had to be compiled.
    """
    return jax.random.uniform(key, (rows, 4))


def _indices(shares: Array, size: int) -> Array:
    """Indices below `size` of shares of it."""
    return jnp.minimum((shares * size).astype(jnp.int32), size - 1)


def _statistics(layer: nn.Module, x: Array, places: Array | None) -> Statistics:
    x = channels_last(layer, x.astype(jnp.float32))
    axes = tuple(range(x.ndim - 1))
    sampled = x.reshape(-1, 1, x.shape[-1])
    if places is not None and isinstance(layer, nn.Conv):
        sampled = _conv_rows(layer, x, places)
    elif places is not None:
        sampled = sampled[_indices(places[:, 0], len(sampled))]
    return Statistics(x.min(axes), x.max(axes), sampled, jnp.isfinite(x).all())


def _conv_rows(layer: nn.Conv, x: Array, places: Array) -> Array:
    """Patches of whole kernels, inside the image only: what is padded is no input."""
    rank, rows = len(kernel_size(layer)), len(places)
    spatial, channels = x.shape[-rank - 1 : -1], x.shape[-1]
    dilation = geometry(layer, spatial).dilation
    images = x.reshape(-1, *spatial, channels)
    image = _indices(places[:, 0], len(images))
    grids = []
    sizes = zip(spatial, kernel_size(layer), dilation, strict=True)
    for axis, (size, taken, distance) in enumerate(sizes):
        # An image smaller than the kernel repeats its edge.
        start = _indices(places[:, axis + 1], max(size - (taken - 1) * distance - 1, 0) + 1)
        place = jnp.minimum(start[:, None] + jnp.arange(taken)[None] * distance, size - 1)
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
    with tracing() as found:
        init = functools.partial(module.init, method=method)
        jax.eval_shape(init, jax.random.key(0), *inputs)
    return list(found.values())


@contextlib.contextmanager
def tracing(select: Select = lambda layer, x: True) -> Iterator[Traced]:
    """Notes the layers that are called meanwhile, by path, with the shapes of the first call."""
    found: Traced = {}
    # By identity, and kept, so that no other gets it.
    sources: list[tuple[LayerInput, tuple[int, ...]]] = []

    def note(layer: nn.Module, x: LayerInput, result: Array) -> None:
        path = "/".join(layer.path)
        if not select(layer, x):
            return
        axes = contracted(layer, len(x.shape))
        same = [n for n, (given, along) in enumerate(sources) if given is x and along == axes]
        sources.append((x, axes))
        source = same[0] if same else len(sources) - 1
        if path in found:
            found[path] = replace(found[path], source=(*found[path].source, source))
            return
        kernel = kernel_shape(layer, math.prod(x.shape[axis] for axis in axes))
        upsampled = isinstance(x, Upsampled) and x.is_doubled
        if isinstance(layer, nn.Conv):
            outputs = result.shape
        else:
            # Of a gated layer the result is half of the outputs.
            kept = [size for axis, size in enumerate(x.shape) if axis not in axes]
            outputs = (*kept, kernel[-1])
        found[path] = TracedLayer(path, kernel, x.shape, outputs, (source,), upsampled)

    with watching(note):
        yield found


def thinned(found: Statistics, call: int, calls: int, rows: int) -> Statistics:
    """What was seen in one of several calls; of more calls than rows some, evenly chosen, give one.

    Args:
      found: in this call.
      call: its number.
      calls: how many there are.
      rows: wanted of all calls together.
    """
    gives_none = call * rows // calls == (call + 1) * rows // calls
    return found._replace(rows=found.rows[:0]) if gives_none else found


def join(parts: list[Statistics]) -> Statistics:
    """The statistics of several steps as one."""
    return Statistics(
        jnp.stack([part.lower for part in parts]).min(0),
        jnp.stack([part.upper for part in parts]).max(0),
        jnp.concatenate([part.rows for part in parts]),
        jnp.stack([part.finite for part in parts]).all(),
    )
