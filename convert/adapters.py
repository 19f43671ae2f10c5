"""What a LoRA, or one of its relatives, makes of a layer's weight and bias.

LoRA (arXiv 2106.09685), LoHa (FedPara, arXiv 2108.06098), LoKr (arXiv 2212.10650), DoRA (arXiv
2402.09353) and IA3 (arXiv 2205.05638), with the parts and in the layouts of LyCORIS (arXiv
2309.14859) and peft. All in float32.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .tensors import LazyTensor

_EPSILON = np.finfo(np.float32).eps


class Adapter(NamedTuple):
    """What one file does to one layer.

    Attributes:
      parts: tensors by part: the keys of `_FORMS` and `_BIASES`, `dora_scale` or `magnitude`.
      scaling: of the product, alpha / rank.
      strength: of the whole, the user's.
    """

    parts: Mapping[str, LazyTensor]
    scaling: float
    strength: float


def rank(parts: Mapping[str, LazyTensor]) -> int | None:
    """The rank that alpha is divided by; None where nothing is a product."""
    for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in parts and parts[part].shape:
            return parts[part].shape[0]
    return None


def problem(parts: Mapping[str, LazyTensor], layer: Mapping[str, LazyTensor]) -> str | None:
    """Why the parts do not fit the layer, if they do not.

    Args:
      parts: as in `Adapter`.
      layer: its `weight` and `bias`, as far as it has them.
    """
    form, magnitudes, biases = _split(parts)
    said = " x ".join(f"{part} {parts[part].shape}" for part in sorted(form, key=_order))
    if (form and form not in _FORMS) or (not form and not biases):
        whole = min((known for known in _FORMS if form and known > form), key=len, default=form)
        lacking = ", ".join(sorted(whole - form, key=_order))
        said = ", ".join(sorted(parts, key=_order))
        return f"has {said}, but not {lacking}" if lacking else f"has {said}: no known adapter"
    if len(magnitudes) > 1 or len(biases) > 1 or (magnitudes and "weight" not in layer):
        return f"has {' and '.join(sorted({*magnitudes, *biases}))}, of which one can be"
    if biases:
        if "bias" not in layer:
            return f"has {biases[0]}, but the model has no bias there"
        if math.prod(parts[biases[0]].shape) != math.prod(layer["bias"].shape):
            return f"has a bias of {layer['bias'].shape}, {biases[0]} is {parts[biases[0]].shape}"
    if not form:
        return None
    if "weight" not in layer:
        return "is no layer with a weight"
    base = layer["weight"].shape
    shapes = tuple((part, parts[part].shape) for part in sorted(form))
    made = _made_shape(form, (("base", base), *shapes))
    if made is None or not _folds(made, base):
        return f"is {base}, which {said} does not fit"
    if magnitudes and _magnitude_axis(magnitudes[0], parts[magnitudes[0]].shape, base) is None:
        return f"is {base}, which {magnitudes[0]} {parts[magnitudes[0]].shape} does not fit"
    return None


def merge(layer: Mapping[str, LazyTensor], adapter: Adapter) -> dict[str, LazyTensor]:
    """The layer's weight and bias with an adapter that fits; read when they are needed."""
    form, _, biases = _split(adapter.parts)
    merged = {}
    if form:
        weight = layer["weight"]
        merged["weight"] = LazyTensor(weight.shape, lambda: _weight(weight, adapter))
    if biases:
        bias = layer["bias"]
        merged["bias"] = LazyTensor(bias.shape, lambda: _bias(bias, adapter))
    return merged


def _weight(weight: LazyTensor, adapter: Adapter) -> np.ndarray:
    """`W + strength * dW`; with DoRA's magnitudes m, as those who read the format have it.

    peft: `m V / |V|`, `V = W + strength * dW`. LyCORIS's files: `W + strength * (m V / |V| - W)`,
    `V = W + dW`. At strength 1 they are the same.
    """
    form, magnitudes, _ = _split(adapter.parts)
    base = _read(weight)
    arrays = {part: _read(adapter.parts[part]) for part in form} | {"base": base}
    delta = adapter.scaling * _FORMS[form](np, arrays).reshape(base.shape)
    if not magnitudes:
        return base + adapter.strength * delta
    magnitude = _read(adapter.parts[magnitudes[0]])
    axis = _magnitude_axis(magnitudes[0], magnitude.shape, base.shape)
    others = tuple(i for i in range(base.ndim) if i != axis)

    def directed(moved: np.ndarray) -> np.ndarray:
        norm = np.sqrt(np.sum(np.square(moved), axis=others, keepdims=True)) + _EPSILON
        return moved * (magnitude.reshape(norm.shape) / norm)

    if magnitudes[0] == "magnitude":
        return directed(base + adapter.strength * delta)
    return base + adapter.strength * (directed(base + delta) - base)


def _bias(bias: LazyTensor, adapter: Adapter) -> np.ndarray:
    base = _read(bias)
    (part,) = _split(adapter.parts)[2]
    delta = _read(adapter.parts[part]).reshape(base.shape)
    return base + adapter.strength * _BIASES[part](delta, base, adapter.scaling)


@functools.cache
def _made_shape(
    form: frozenset[str], shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[int, ...] | None:
    """The shape of what the parts make; None if they do not fit each other."""
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}
    try:
        return jax.eval_shape(lambda arrays: _FORMS[form](jnp, arrays), arrays).shape
    except (TypeError, ValueError, IndexError):
        return None


def _read(tensor: LazyTensor) -> np.ndarray:
    return tensor.read().astype(np.float32)


def _split(
    parts: Mapping[str, LazyTensor],
) -> tuple[frozenset[str], tuple[str, ...], tuple[str, ...]]:
    """The parts of the weight's addition, of its magnitudes, and of the bias's addition."""
    magnitudes = tuple(part for part in parts if part in _MAGNITUDES)
    biases = tuple(part for part in parts if part in _BIASES)
    return frozenset(parts) - {"alpha", *magnitudes, *biases}, magnitudes, biases


def _order(part: str) -> tuple[int, str]:
    """Up before down, as they are multiplied."""
    order = ("up", "mid", "down")
    return (order.index(part) if part in order else len(order), part)


def _folds(made: tuple[int, ...], base: tuple[int, ...]) -> bool:
    """Whether an array is a kernel `[O, I, *taps]`, its inputs and taps perhaps as one axis."""
    if len(made) == 2 <= len(base) and made == (base[0], math.prod(base[1:])):
        return True
    # A convolution of one tap and a matrix are the same map.
    return made[:1] == base[:1] and [n for n in made[1:] if n != 1] == [
        n for n in base[1:] if n != 1
    ]


_MAGNITUDES = ("dora_scale", "magnitude")


def _magnitude_axis(part: str, shape: tuple[int, ...], base: tuple[int, ...]) -> int | None:
    """Which axis of the weight the magnitudes belong to: peft's, the outputs; LyCORIS's, either."""
    size = math.prod(shape)
    if size == base[0] and (part == "magnitude" or shape[:1] == base[:1]):
        return 0
    return 1 if part == "dora_scale" and len(base) > 1 and size == base[1] else None


def _rebuilt(xp: Any, left: Any, right: Any, core: Any = None) -> Any:
    """`[O, R] x [R, I, *taps]`, or with a Tucker core `[R, R, *taps]` between `[R, I]` and it."""
    left = left.reshape(len(left), -1)
    flat = right.reshape(len(right), -1)
    if core is None:
        return (left @ flat).reshape(len(left), *right.shape[1:])
    return xp.einsum("ij...,oi,jk->ok...", core, left, flat, optimize=True)


def _lora(xp: Any, a: Mapping[str, Any]) -> Any:
    return _rebuilt(xp, a["up"], a["down"], a.get("mid"))


def _factor(xp: Any, a: Mapping[str, Any], name: str, core: str) -> Any:
    """A factor that is stored as it is, or as a product; LyCORIS's Tucker form has `[R, O]`."""
    if name in a:
        return a[name]
    left, right = a[f"{name}_a"], a[f"{name}_b"]
    return _rebuilt(xp, left.T if core in a else left, right, a.get(core))


def _loha(xp: Any, a: Mapping[str, Any]) -> Any:
    return _factor(xp, a, "hada_w1", "hada_t1") * _factor(xp, a, "hada_w2", "hada_t2")


def _lokr(xp: Any, a: Mapping[str, Any]) -> Any:
    """The Kronecker product of `[O1, I1]` and `[O2, I2, *taps]`."""
    small, large = _factor(xp, a, "lokr_w1", ""), _factor(xp, a, "lokr_w2", "lokr_t2")
    product = xp.einsum("ab,cd...->acbd...", small, large)
    outputs, inputs = len(small) * len(large), small.shape[1] * large.shape[1]
    return product.reshape(outputs, inputs, *large.shape[2:])


def _along(axis: int) -> Callable[[Any, Mapping[str, Any]], Any]:
    """IA3: the weight times one plus a factor for each output (0) or input (1)."""

    def scaled(xp: Any, a: Mapping[str, Any]) -> Any:
        base, part = a["base"], a["ia3_input" if axis else "ia3_output"]
        shape = [1] * base.ndim
        shape[axis] = base.shape[axis]
        return base * part.reshape(shape)

    return scaled


Form = Callable[[Any, Mapping[str, Any]], Any]

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_FORMS: dict[frozenset[str], Form] = {
    frozenset({"up", "down"}): _lora,
    frozenset({"up", "down", "mid"}): _lora,
    frozenset(_HADA): _loha,
    frozenset({*_HADA, "hada_t1", "hada_t2"}): _loha,
    **{
        frozenset({*small, *large}): _lokr
        for small in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for large in (
            ("lokr_w2",),
            ("lokr_w2_a", "lokr_w2_b"),
            ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
    frozenset({"diff"}): lambda xp, a: a["diff"],
    frozenset({"w_norm"}): lambda xp, a: a["w_norm"],
    frozenset({"weight"}): lambda xp, a: a["weight"].reshape(a["base"].shape) - a["base"],
    frozenset({"ia3_output"}): _along(0),
    frozenset({"ia3_input"}): _along(1),
}
"""What is added to `base`, from the parts a layer has; `xp` is NumPy, or its like for shapes."""

_BIASES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "diff_b": lambda part, base, scaling: part,
    "b_norm": lambda part, base, scaling: part,
    "up_bias": lambda part, base, scaling: scaling * part,
    "bias": lambda part, base, scaling: part - base,
}
"""What is added to a bias, from the part that says so."""

WHOLE = frozenset({"weight", "bias"})
"""Parts that replace what the model has, as peft's `bias` and `modules_to_save` do."""
