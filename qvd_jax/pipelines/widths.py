"""Chooses the bits of each layer's weights by what they cost the final latents."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from qvd_jax.errors import InputError
from qvd_jax.memory import tree_bytes
from qvd_jax.meshes import MeshConfig
from qvd_jax.pipelines.components import GAINS
from qvd_jax.pipelines.observation import CalibrationConfig, Observed, Progress, unseen
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.pipelines.quantization import Plan
from qvd_jax.pipelines.sensitivity import Sensitivities, measure, with_widths
from qvd_jax.quant.allocation import Option, total, widths_reaching, widths_within
from qvd_jax.quant.policy import LayerSpec, Quantization
from qvd_jax.quant.record import layout
from qvd_jax.quant.solve import LARGEST_SQNR, sqnr


@dataclass(frozen=True)
class Target:
    """What the weights' bits are chosen for: one of the two.

    Attributes:
      budget: share of the float32 UNet's bytes that the quantized one may hold, of all it holds:
        weights, scales, biases and the layers that stay float.
      keep: SQNR of the final latents, in decibels, that is to be left.
    """

    budget: float | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.keep is None):
            raise InputError("budget and keep: one of them is needed, the other is its result")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise InputError(
                f"budget = {self.budget:g}: a share of the float32 UNet's bytes is needed, above 0 "
                f"and up to 1"
            )
        if self.keep is not None and not 0 < self.keep <= LARGEST_SQNR:
            raise InputError(
                f"keep = {self.keep:g}: a number of decibels above 0 and up to {LARGEST_SQNR:g} is "
                f"needed"
            )

    def __str__(self) -> str:
        return f"keep-{self.keep:g}" if self.budget is None else f"budget-{self.budget:g}"


class Sizes(NamedTuple):
    """What a UNet holds, in bytes.

    Attributes:
      layers: each layer's record, by module path and bits of its weights, of the widths to choose
        from: those of different bytes.
      others: all else.
      float32: the UNet in float32.
    """

    layers: dict[str, dict[int, int]]
    others: int
    float32: int

    @property
    def widths(self) -> list[int]:
        """All bits that some layer can have, fewest first."""
        return sorted({bits for of in self.layers.values() for bits in of})

    @property
    def least(self) -> float:
        """The share of the fewest bits."""
        return (self.others + sum(min(of.values()) for of in self.layers.values())) / self.float32

    @property
    def most(self) -> float:
        """The share of the most bits."""
        return (self.others + sum(max(of.values()) for of in self.layers.values())) / self.float32


_BITS = range(2, 9)
_DEFAULT = CalibrationConfig()


def choices(spec: LayerSpec) -> list[int]:
    """The bits of weights that are stored unlike others, fewest first; of equals the most."""
    stored = {layout(replace(spec, weight_bits=bits), 1, 1).kernel.dtype: bits for bits in _BITS}
    return sorted(stored.values())


def held_bytes(params: Mapping[str, Any]) -> int:
    """Bytes that a UNet holds, of the parameters (or shapes) of a pipeline."""
    return tree_bytes((params["unet"], params.get(GAINS)))


def unet_sizes(pipe: VideoPipeline, plan: Plan, config: CalibrationConfig = _DEFAULT) -> Sizes:
    """What the UNet of a float pipeline will hold when it is quantized by a plan."""

    def record_bytes(path: str, spec: LayerSpec) -> int:
        *taps, channels, features = plan.layers[path].kernel
        return tree_bytes(layout(spec, channels, features, taps).params())

    timesteps = (0.0,) * (config.steps or pipe.defaults.steps)
    shapes = pipe.configs.param_shapes(
        pipe.vae.layers.dtype, Quantization(plan.policy, plan.specs, timesteps)
    )
    records = sum(record_bytes(path, spec) for path, spec in plan.specs.items())
    layers = {
        path: {bits: record_bytes(path, replace(spec, weight_bits=bits)) for bits in choices(spec)}
        for path, spec in plan.specs.items()
    }
    float32 = 4 * sum(leaf.size for leaf in jax.tree.leaves(pipe.params["unet"]))
    return Sizes(layers, held_bytes(shapes) - records, float32)


def check_budget(target: Target, plan: Plan, sizes: Sizes) -> None:
    """Raises `InputError` if a budget is one that no widths are within, or that all are."""
    if target.budget is None:
        return
    where = f"of weights in every layer that {plan.policy} quantizes"
    if target.budget < sizes.least:
        raise InputError(
            f"budget = {target.budget:g}: the UNet holds at least {_up(sizes.least)} of float32's "
            f"bytes, by {sizes.widths[0]} bits {where}"
        )
    if target.budget > sizes.most:
        raise InputError(
            f"budget = {target.budget:g}: there is nothing to choose, for the UNet holds no more "
            f"than {_up(sizes.most)} of float32's bytes, by {sizes.widths[-1]} bits {where}; "
            f"name a smaller budget or none"
        )


def _up(share: float) -> float:
    """Rounded so that it can be a budget."""
    return math.ceil(share * 1e4) / 1e4


def choose_widths(
    pipe: VideoPipeline,
    plan: Plan,
    observed: Observed,
    target: Target,
    inputs: Sequence[Any],
    config: CalibrationConfig = _DEFAULT,
    options: Mapping[str, Any] | None = None,
    progress: Progress = unseen,
    mesh: MeshConfig | None = None,
) -> tuple[Plan, str]:
    """Measures what each layer's weights cost the final latents, and chooses their bits by it.

    Args:
      pipe: the float pipeline.
      plan: of its layers, whose methods and activation bits stay.
      observed: what calibration saw of their inputs.
      target: what to choose for.
      inputs: of the calibration.
      config: likewise.
      options: likewise.
      progress: told how far it is, as of `sensitivity.measure`.
      mesh: of the pipeline's call.

    Returns:
      The plan with the bits chosen, and a table of all layers.

    Raises:
      InputError: no choice meets the target.
    """
    # What no data reached stays float.
    seen = {path: spec for path, spec in plan.specs.items() if path in observed.joined}
    plan = replace(plan, policy=f"{plan.policy}-{target}", specs=seen)
    sizes = unet_sizes(pipe, plan, config)
    check_budget(target, plan, sizes)
    found = measure(pipe, plan, sizes.widths, observed, inputs, config, options, progress, mesh)
    chosen = choose(found, sizes, target)
    plan = with_widths(plan, chosen)
    return plan, widths_table(plan, found, sizes)


def choose(found: Sensitivities, sizes: Sizes, target: Target) -> dict[str, int]:
    """The bits of each layer's weights.

    Raises:
      InputError: the most bits keep less than is asked for.
    """
    options = _options(found, sizes)
    if target.budget is not None:
        return widths_within(options, math.floor(target.budget * sizes.float32) - sizes.others)
    assert target.keep is not None
    allowed = found.signal / 10 ** (target.keep / 10)
    if found.noise > allowed:
        raise InputError(
            f"keep = {target.keep:g}: with the most bits in every layer the final latents keep "
            f"{sqnr(found.signal, found.noise):.1f} dB; ask for less, or for inputs of more bits"
        )
    widest = {path: max(of) for path, of in options.items()}
    return widths_reaching(options, allowed - found.noise + total(options, widest).error)


def _options(found: Sensitivities, sizes: Sizes) -> dict[str, dict[int, Option]]:
    return {
        path: {bits: Option(size, found.errors[path][bits]) for bits, size in of.items()}
        for path, of in sizes.layers.items()
    }


def widths_table(plan: Plan, found: Sensitivities, sizes: Sizes) -> str:
    """The bits of each layer and what its weights cost, as text."""
    options = _options(found, sizes)
    widths = {path: spec.weight_bits for path, spec in plan.specs.items()}
    every = sizes.widths
    head = " ".join(f"{f'{bits} bits':>8}" for bits in every)
    lines = [f"{'latents, dB, if the weights of one layer alone have':>67} {head}  chosen"]
    for path, of in options.items():
        size = of[widths[path]].bytes
        lost = " ".join(
            f"{sqnr(found.signal, of[bits].error):8.1f}" if bits in of else 8 * " "
            for bits in every
        )
        lines.append(f"{path:57} {size / 1e3:6.0f} kB {lost}  {widths[path]} bits")
    least = total(options, {path: max(of) for path, of in options.items()}).error
    share = (sizes.others + total(options, widths).bytes) / sizes.float32
    noise = found.noise - least + total(options, widths).error
    lines.append(
        f"{plan.policy}: {share:.4f} of the float32 UNet's bytes; the final latents are to keep "
        f"{sqnr(found.signal, noise):.1f} dB, of {sqnr(found.signal, found.noise):.1f} with "
        f"{max(every)} bits everywhere"
    )
    return "\n".join(lines)
