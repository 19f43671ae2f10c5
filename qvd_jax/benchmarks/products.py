"""Every formulation of every product of the UNet, by shape: what the dispatch is decided from."""

import functools
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax
from jax.typing import DTypeLike

from qvd_jax import accelerators, markdown, memory
from qvd_jax.axes import Array
from qvd_jax.benchmarks.unet import Case
from qvd_jax.errors import first_line
from qvd_jax.kernels import floating, int8
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.quant.statistics import trace_layers

DISPATCHED = "int8, ours"
"""The formulation `qvd_jax.kernels.int8` chooses."""

_REPEATS = 20
_SECONDS = 1
"""After which a formulation that is slow by orders of magnitude is not repeated any more."""

_CHECKED_ROWS = 64


@dataclass(frozen=True)
class Product:
    """A product of the UNet.

    Attributes:
      inputs: `[M, K]`, or `[N, *spatial, C]` of a convolution.
      kernel: `[O, K]`, or `[O, *taps, C]`.
      strides: of a convolution, one for each spatial axis.
      upsampled: whether the inputs are a nearest-neighbour upsampling.
    """

    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    upsampled: bool = False

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Half the kernel on each side."""
        return tuple((k // 2, k // 2) for k in self.kernel[1:-1])

    @property
    def flops(self) -> int:
        """Multiplications and additions, an upsampled input's in full."""
        spatial = zip(self.inputs[1:-1], self.strides, strict=True)
        positions = self.inputs[0] * math.prod(-(-size // stride) for size, stride in spatial)
        return 2 * math.prod(self.kernel) * positions


def products(case: Case) -> Counter[Product]:
    """The distinct products of one forward, and how often each occurs."""
    found: Counter[Product] = Counter()
    for layer in trace_layers(UNet3D(case.config), *case.shapes()):
        kernel = (layer.kernel[-1], *layer.kernel[:-1])
        rank = len(kernel) - 2
        spatial = layer.inputs[len(layer.inputs) - rank - 1 : -1]
        rows = int(np.prod(layer.inputs[:-1])) // int(np.prod(spatial))
        out = layer.outputs[len(layer.outputs) - rank - 1 : -1]
        strides = tuple(-(-a // b) for a, b in zip(spatial, out, strict=True))
        inputs = (rows, *spatial, layer.inputs[-1])
        found[Product(inputs, kernel, strides, layer.upsampled)] += 1
    return found


class Formulation(NamedTuple):
    """One way to compute a product.

    Attributes:
      run: from the inputs, the prepared weights and their sums to the result.
      dtype: of both operands.
      prepare: puts the weights `[O, *taps, K]` into the order `run` wants them in.
    """

    run: Callable[[Array, Array, Array], Array]
    dtype: DTypeLike = jnp.int8
    prepare: Callable[[np.ndarray], np.ndarray] = np.asarray


def formulations(product: Product) -> dict[str, Formulation]:
    """What could compute a product, by name."""
    if not product.strides:
        transposed = np.transpose
        return {
            "float32": Formulation(_float_dot, jnp.float32, transposed),
            "bfloat16": Formulation(_float_dot, jnp.bfloat16, transposed),
            "signed, [K, O]": Formulation(
                lambda x, w, sums: int8.dot(x, w.T, sums, "signed"), prepare=transposed
            ),
            **{
                name: Formulation(functools.partial(int8.dot, implementation=name))
                for name in int8.runnable_dots()
            },
            DISPATCHED: Formulation(int8.dot),
        }
    where: dict[str, Any] = {"strides": product.strides, "padding": product.padding}
    float_conv = functools.partial(_float_conv, product)
    outputs_last = functools.partial(np.moveaxis, source=0, destination=-1)

    def from_codes(name: str | None) -> Formulation:
        return Formulation(lambda x, w, sums: int8.upsampled_conv(x[:, ::2, ::2], w, sums, name))

    if product.upsampled:
        special = {name: from_codes(name) for name in int8.runnable_upsampled_convs()}
        dispatched = from_codes(None)
    else:
        special, dispatched = {}, Formulation(functools.partial(int8.conv, **where))
    return {
        "float32": Formulation(float_conv, jnp.float32, outputs_last),
        "bfloat16": Formulation(float_conv, jnp.bfloat16, outputs_last),
        **{
            name: Formulation(functools.partial(int8.conv, **where, implementation=name))
            for name in int8.runnable_convs()
        },
        # XLA's GPU convolutions of int8 exist only with this conversion right behind them.
        "convolution to float32": Formulation(functools.partial(_conv_to_float, product)),
        **special,
        DISPATCHED: dispatched,
    }


def check_fits(case: Case) -> None:
    """Raises `InputError` if memory cannot hold the largest."""
    accelerators.check_used()
    memory.check_fits(needed_bytes(case), "the largest product")


def needed_bytes(case: Case) -> int:
    """Estimate of what the largest product needs."""
    return max(map(_product_bytes, products(case)))


def _product_bytes(product: Product) -> int:
    inputs, kernel = math.prod(product.inputs), math.prod(product.kernel)
    gathered = inputs * math.prod(product.kernel[1:-1])
    outputs = product.flops // (2 * math.prod(product.kernel[1:]))
    # Of each code with each element of the kernel, before upsampling.
    placed = outputs * math.prod(product.kernel[1:-1]) // 4 if product.upsampled else 0
    # Codes and their padded copy or float32, weights as 64-bit integers to check with, the sums.
    return 6 * inputs + 10 * kernel + gathered + 4 * (outputs + placed)


def time_formulations(case: Case) -> list[dict[str, Any]]:
    """Times all formulations of all products.

    Returns:
      For each product its shapes, how often it occurs, the median seconds of each formulation, of
      one that cannot run the reason, and of one whose integers are wrong that.
    """
    results = []
    found = sorted(products(case).items(), key=lambda item: -item[0].flops * item[1])
    for product, count in tqdm.tqdm(found, desc="products", unit="shape"):
        x, w = _operands(product)
        sums = w.astype(np.int32).reshape(len(w), -1).sum(1)
        seconds: dict[str, float] = {}
        failures: dict[str, str] = {}
        for name, formulation in formulations(product).items():
            try:
                seconds[name] = _time(formulation, product, x, w, sums)
            except Exception as error:  # Backends refuse what they cannot in many ways.
                failures[name] = first_line(error)
                shapes = f"{product.inputs} with {product.kernel}"
                tqdm.tqdm.write(f"{name} of {shapes}: {failures[name]}", file=sys.stderr)
        results.append(
            {**asdict(product), "count": count, "seconds": seconds, "failures": failures}
        )
    return results


def speeds_table(results: Sequence[dict[str, Any]]) -> str:
    """Formulations by shape as Markdown, in billions of operations per second."""
    rows = []
    for r in results:
        flops = Product(r["inputs"], r["kernel"], r["strides"], r["upsampled"]).flops
        shapes = {name: str([*r[name]]) for name in ("inputs", "kernel")}
        speeds = {name: f"{flops / spent / 1e9:.0f}" for name, spent in r["seconds"].items()}
        rows.append({**shapes, "times": str(r["count"]), **speeds})
    return markdown.table(rows)


def _operands(product: Product) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, product.inputs, np.int8)
    # Extreme codes in some channels: sums that only integers hold.
    x[..., : max(x.shape[-1] // 4, 1)] = 127
    if product.upsampled:
        x = x[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)
    w = rng.integers(-127, 128, product.kernel, np.int8)
    w[:1] = 127
    return x, w


def _time(
    formulation: Formulation, product: Product, x: np.ndarray, w: np.ndarray, sums: np.ndarray
) -> float:
    operands = (
        jnp.asarray(x, formulation.dtype),
        jnp.asarray(formulation.prepare(w), formulation.dtype),
        jnp.asarray(sums),
    )
    run = jax.jit(formulation.run).lower(*operands).compile()
    result, first = _stopwatch(run, *operands)
    if formulation.dtype == jnp.int8:
        _check(np.asarray(result), product, x, w)
    # The first run counts only where there is no patience for another.
    spent = [first] if first > _SECONDS else []
    while len(spent) < _REPEATS and sum(spent) < _SECONDS:
        spent.append(_stopwatch(run, *operands)[1])
    return statistics.median(spent)


def _stopwatch(run: Callable[..., Array], *operands: Array) -> tuple[Array, float]:
    started = time.perf_counter()
    result = jax.block_until_ready(run(*operands))
    return result, time.perf_counter() - started


def _check(result: np.ndarray, product: Product, x: np.ndarray, w: np.ndarray) -> None:
    """Compares some output positions with 64-bit integers, rounded once if the result is float.

    Raises:
      ArithmeticError: they differ.
    """
    rng = np.random.default_rng(1)
    padded = np.pad(x, ((0, 0), *product.padding, (0, 0)))
    flat = w.reshape(len(w), -1).astype(np.int64)
    for _ in range(_CHECKED_ROWS):
        place = tuple(int(rng.integers(size)) for size in result.shape[:-1])
        window: tuple[Any, ...] = tuple(
            slice(p * s, p * s + k)
            for p, s, k in zip(place[1:], product.strides, w.shape[1:-1], strict=True)
        )
        patch = padded[place[:1] + window].astype(np.int64).reshape(-1)
        if ((flat @ patch).astype(result.dtype) != result[place]).any():
            raise ArithmeticError("the result differs from that of 64-bit integers")


def _float_dot(x: Array, w: Array, sums: Array) -> Array:
    del sums
    last = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, w, last, preferred_element_type=jnp.float32)


def _float_conv(product: Product, x: Array, w: Array, sums: Array) -> Array:
    del sums
    spatial = "DHW"[-len(product.strides) :]
    names = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return floating.conv_general_dilated(
        x, w, product.strides, product.padding, dimension_numbers=names
    )


def _conv_to_float(product: Product, x: Array, w: Array, sums: Array) -> Array:
    del sums
    return int8.xla_conv(x, w, product.strides, product.padding).astype(jnp.float32)
