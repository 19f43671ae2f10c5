"""The float UNet that a quantized one stands for."""

import functools
from collections.abc import Callable, Iterator

import flax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Params
from qvd_jax.quant.policy import Quantization
from qvd_jax.quant.record import QuantizedParams, layouts

_VALUES = ("to_qkv", "to_kv", "to_v")
"""The layers that make an attention's values, which come last in them."""

_QUERIES = ("to_qkv", "to_q")


def dequantized(
    value: Callable[[str], np.ndarray], quantization: Quantization, shapes: Params
) -> Callable[[str], np.ndarray]:
    """The parameters of the float UNet, by their paths.

    A projection without a bias has none to take what calibration added to its output. Of values it
    goes through the attention, whose weights sum to 1, and the layer behind into that one's bias.
    Of keys it adds the same to all logits of a query, which changes nothing. Of queries it is lost.

    Args:
      value: gives the parameters of the quantized UNet.
      quantization: of the UNet.
      shapes: tree of the float UNet's.
    """
    names = flax.traverse_util.flatten_dict(shapes, sep="/").keys()
    records = layouts(shapes, quantization.specs)

    # An attention's two layers, so that each is read once for all its tensors.
    @functools.lru_cache(2)
    def layer(path: str) -> tuple[np.ndarray, np.ndarray]:
        if path not in records:
            return value(f"{path}/kernel"), value(f"{path}/bias")
        stored = {name: jnp.asarray(value(f"{path}/{name}")) for name in records[path].params()}
        return QuantizedParams(**stored).dequantized(quantization.specs[path].rotation)

    def through_attention(path: str) -> np.ndarray | float:
        attention, _, last = path.rpartition("/")
        before = [f"{attention}/{name}" for name in _VALUES]
        found = [p for p in before if p in records and f"{p}/bias" not in names]
        if last != "to_out" or not found:
            return 0.0
        kernel = np.asarray(layer(path)[0], np.float64)
        return np.asarray(layer(found[0])[1][-len(kernel) :] @ kernel)

    def read(name: str) -> np.ndarray:
        path, _, leaf = name.rpartition("/")
        if leaf == "bias" and path.endswith("/to_out"):
            return np.asarray(layer(path)[1] + through_attention(path), np.float32)
        return layer(path)[leaf == "bias"] if path in records else value(name)

    return read


def dequantized_notes(quantization: Quantization, shapes: Params) -> Iterator[str]:
    """What the float UNet has not of the quantized one."""
    names = flax.traverse_util.flatten_dict(shapes, sep="/").keys()
    records = layouts(shapes, quantization.specs)
    coded = {path: record for path, record in records.items() if record.in_scale is not None}
    yield (
        f"{quantization.policy}: what the codes stand for is written as float weights; the "
        f"inputs of {len(coded)} layers are no longer quantized"
    )
    htdq = sum(record.coarse is not None for record in records.values())
    if htdq:
        yield f"of these, {htdq} layers of temporal features lose their two ranges of codes (HTDQ)"
    if coded:
        yield "biases have in them what calibration corrected: each output's mean error"
    taps = sum(record.taps is not None for record in coded.values())
    if taps:
        yield (
            f"{taps} convolutions have it for each tap; at borders the bias has that of the taps "
            f"outside, too"
        )
    queries = [
        path
        for path in coded
        if path.rpartition("/")[2] in _QUERIES and f"{path}/bias" not in names
    ]
    if queries:
        yield (
            f"{len(queries)} projections to queries have no bias in diffusers: what calibration "
            f"corrected there is lost"
        )
