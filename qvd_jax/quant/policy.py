"""Which layer is quantized how: ordered rules from module paths to layer specifications."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from qvd_jax.config import did_you_mean, from_dict, read_yaml
from qvd_jax.errors import InputError

Method = Literal["minmax", "mse", "smoothquant", "qdiffusion", "scri", "learned", "htdq"]
Rounding = Literal["nearest", "gptq"]
Ranges = Literal["static", "step", "token"]
_RANGES = {
    "step": "a range for each step",
    "token": "a range for each token where a kernel has one tap",
}
WIDTHS = {
    "w8a8": (8, 8),
    "w6a6": (6, 6),
    "w4a8": (4, 8),
    "w4a6": (4, 6),
    "w4a4": (4, 4),
    "w3a8": (3, 8),
    "w8a16": (8, 16),
}

# A few hundredths of a percent of the operations, at the model's border to the outside.
_KEPT_FLOAT = ("conv_in", "conv_out")
# Inputs of these layers are functions of the step alone. Few families have added ids.
_TEMPORAL_FEATURES = (
    "*/time_emb_proj",
    "time_embedding/*",
    "add_embedding/*",
    "controlnet/time_embedding/*",
    "appearance_encoder/time_embedding/*",
)
# Where a family has them: the same of the networks beside the UNet, and what no video changes.
_KEPT_FLOAT_BESIDE = (
    "controlnet/conv_in",
    "controlnet/controlnet_cond_embedding*",
    "appearance_encoder/conv_in",
    # Of the frames' numbers, which are the same for every video.
    "*/time_pos_embed/*",
)
# Once per video, of the one token of its image: the few images of a calibration cannot tell the
# range of the next one's, so the input stays float.
_IMAGE_TOKEN = "*/token_attn/*"

# The kinds of ordinary layers and of temporal features.
_NAMED: dict[str, tuple[Method, Method]] = {
    "qvd": ("scri", "htdq"),
    "qvd-scri": ("scri", "minmax"),
    "qvd-htdq": ("minmax", "htdq"),
    "minmax": ("minmax", "minmax"),
    "mse": ("mse", "mse"),
    "smoothquant": ("smoothquant", "smoothquant"),
    "qdiffusion": ("qdiffusion", "minmax"),
}


_PLUS = "-plus"
# What each of these methods can have, and was best together on the small model.
_OPTIONS_OF_PLUS: dict[str, Any] = {"ranges": "token", "rounding": "gptq"}

_NAMED |= {
    "qvd-plus": ("learned", "htdq"),
    **{name + _PLUS: _NAMED[name] for name in ("minmax", "mse", "smoothquant", "qdiffusion")},
}

METHODS = tuple(_NAMED)
"""The methods of named policies."""


def policy_names() -> list[str]:
    """The names of all policies that have one."""
    return [f"{method}-{width}" for method in METHODS for width in WIDTHS]


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized.

    Attributes:
      method: how the quantizer of its input is found; learned begins with scri's (`learned.learn`).
      weight_bits: 2 to 8.
      activation_bits: 2 to 8, or 16 for an input that stays as it is.
      ranges: of the input: one step D for all (static), one of its own for each sampler step, or
        one for each token (position), found while sampling, of which no method clips anything. A
        convolution whose kernel has several taps sums over positions, so policies give it one step
        for all in the place of tokens'.
      weight_clipping: whether weights are clipped, each output's where its error is least; None
        clips those of 4 bits and fewer, where it is worth something.
      rounding: of weights: to the nearest code, or so that errors make up for each other on the
        inputs that calibration saw (`rounding.round_weights`).
      rotation: channels that a Hadamard transform mixes before the input becomes codes
        (`codec.rotate`), a power of two that divides the layer's; 1 mixes none. Not of learned,
        whose factors are those of channels apart.
      low_rank: rank of a float branch beside the product, which makes up for some of what the
        rounding of weights left (`low_rank.factors`); 0 is none.
      propagate: whether it is solved on the rows that it sees in the model that a first solution
        makes, where the layers before it are quantized; ranges are those of the float model.
    """

    method: Method
    weight_bits: int = 8
    activation_bits: int = 8
    ranges: Ranges = "static"
    weight_clipping: bool | None = None
    rounding: Rounding = "nearest"
    rotation: int = 1
    low_rank: int = 0
    propagate: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("rounding", Rounding), ("ranges", Ranges)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} = {value!r}: {', '.join(get_args(kind))} are possible")
        if self.activation_bits == 16 and self.method != "minmax":
            raise ValueError(
                f"method = {self.method!r} is about the input, which activation_bits = 16 leaves "
                f"float; minmax is needed"
            )
        if not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits = {self.weight_bits}: 2 to 8 are possible")
        if not 2 <= self.activation_bits <= 8 and self.activation_bits != 16:
            raise ValueError(
                f"activation_bits = {self.activation_bits}: 2 to 8, or 16 for a float input"
            )
        if self.ranges != "static" and (self.method == "htdq" or self.activation_bits == 16):
            raise ValueError(
                f"ranges = {self.ranges!r} has no meaning for method = {self.method!r} with "
                f"activation_bits = {self.activation_bits}: there is no step to choose"
            )
        if self.rotation < 1 or self.rotation.bit_count() != 1:
            raise ValueError(f"rotation = {self.rotation}: a power of two is needed, or 1 for none")
        if self.rotation > 1 and self.method == "learned":
            raise ValueError(
                f"rotation = {self.rotation} mixes channels, whose factors method = 'learned' "
                f"finds apart; scri goes with it"
            )
        if self.low_rank < 0:
            raise ValueError(f"low_rank = {self.low_rank}: 0 or more is needed")

    def __str__(self) -> str:
        parts = [f"{self.method}, w{self.weight_bits}a{self.activation_bits}"]
        parts += ["weights clipped"] if self.clips_weights else []
        parts += [self.rounding] if self.rounding != "nearest" else []
        parts += [_RANGES[self.ranges]] if self.ranges != "static" else []
        parts += [f"rotated by {self.rotation}"] if self.rotation > 1 else []
        parts += [f"rank {self.low_rank} beside it"] if self.low_rank else []
        parts += ["propagated"] if self.propagate else []
        return ", ".join(parts)

    @property
    def plain(self) -> bool:
        """Whether an input has one range for all positions, and codes alone are multiplied."""
        return self.fused and self.ranges != "token"

    @property
    def fused(self) -> bool:
        """Whether the kernels that make codes, multiply them and scale the product know it."""
        return self.method != "htdq" and self.rotation == 1 and self.low_rank == 0

    @property
    def clips_weights(self) -> bool:
        """What `weight_clipping` comes to."""
        return self.weight_bits <= 4 if self.weight_clipping is None else self.weight_clipping


@dataclass(frozen=True)
class Rule:
    """What happens to the layers whose path matches.

    Attributes:
      pattern: a path from the UNet down, with * for any part: "down_blocks_*/*/to_qkv".
      spec: how they are quantized; None keeps them float.
      optional: whether it is right that no layer matches.
    """

    pattern: str
    spec: LayerSpec | None = None
    optional: bool = False


@dataclass(frozen=True)
class Policy:
    """Ordered rules; the first that matches a layer decides, a layer without one stays float.

    Attributes:
      name: for people and the manifest.
      rules: in order.
    """

    name: str
    rules: tuple[Rule, ...]

    def rule(self, path: str) -> int | None:
        """The number of the rule that decides about the layer at `path`."""
        for i, rule in enumerate(self.rules):
            if fnmatch.fnmatchcase(path, rule.pattern):
                return i
        return None


def named_policy(name: str) -> Policy:
    """The policy of a name such as "qvd-w8a8".

    Raises:
      InputError: the method or the width is unknown.
    """
    ordinary, temporal = _named_specs(name)
    return Policy(
        name,
        (
            *(Rule(pattern) for pattern in _KEPT_FLOAT),
            *(Rule(pattern, optional=True) for pattern in _KEPT_FLOAT_BESIDE),
            *(Rule(pattern, temporal, optional=True) for pattern in _TEMPORAL_FEATURES),
            Rule(
                _IMAGE_TOKEN,
                LayerSpec("minmax", ordinary.weight_bits, 16, rounding=ordinary.rounding),
                optional=True,
            ),
            Rule("*", ordinary),
        ),
    )


def module_policy(name: str) -> Policy:
    """The policy of a name for a module that is no UNet of these: one spec for all its layers.

    They do not propagate, for a module is observed once.

    Raises:
      InputError: the method or the width is unknown.
    """
    ordinary, _ = _named_specs(name)
    return Policy(name, (Rule("*", replace(ordinary, propagate=False)),))


def read_policy(name: str) -> Policy:
    """A policy by its name, or from a YAML file.

    Raises:
      InputError: the name is unknown, or the file no policy.
    """
    path = Path(name)
    is_file = path.exists() and not path.is_dir()
    if path.suffix in (".yaml", ".yml") or (is_file and name not in policy_names()):
        return from_dict(Policy, read_yaml(path), name)
    return named_policy(name)


def _named_specs(name: str) -> tuple[LayerSpec, LayerSpec]:
    """How a policy of a name quantizes ordinary layers, and those of temporal features."""
    method, _, width = name.rpartition("-")
    if method not in METHODS or width not in WIDTHS:
        raise InputError(f"unknown policy {name!r}{did_you_mean(name, policy_names())}")
    bits = WIDTHS[width]
    # With a float input there is nothing to be done about it.
    kinds = _NAMED["minmax" if bits[1] == 16 else method]
    options = _OPTIONS_OF_PLUS if method.endswith(_PLUS) else {}
    ordinary, temporal = (
        LayerSpec(kind, *bits, **_that_apply(options, kind, bits[1])) for kind in kinds
    )
    return ordinary, temporal


def _that_apply(options: dict[str, Any], method: Method, activation_bits: int) -> dict[str, Any]:
    """The options that a method with so many bits can have: HTDQ and float inputs have no range."""
    has_range = method != "htdq" and activation_bits < 16
    return {name: value for name, value in options.items() if name != "ranges" or has_range}


@dataclass(frozen=True)
class Quantization:
    """How a quantized model is quantized.

    Attributes:
      policy: name of the policy it came from.
      specs: of the quantized layers, by module path; all others are float.
      timesteps: of the sampling that step-aware scales are for; None where there are none.
    """

    policy: str
    specs: dict[str, LayerSpec]
    timesteps: tuple[float, ...] | None = None

    def rules(self) -> Policy:
        """The policy that quantizes so: a rule for each layer."""
        return Policy(self.policy, tuple(Rule(path, spec) for path, spec in self.specs.items()))


@dataclass(frozen=True)
class TracedLayer:
    """A layer a policy decides about.

    Attributes:
      path: module path, parts joined by "/".
      kernel: shape of the kernel as one matrix for each tap, `[*taps, C, O]`.
      inputs: shape of what it is called with in one forward, `[..., C]`.
      outputs: shape of what it returns, `[..., O]`.
      source: numbers of the tensors it is called with, one for each call; layers that have the
        same read the same ones, along the same axes.
      upsampled: whether that is a nearest-neighbour upsampling.
    """

    path: str
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: tuple[int, ...]
    upsampled: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers the kernel has."""
        return math.prod(self.kernel)

    @property
    def flops(self) -> int:
        """Multiplications and additions of one forward."""
        return 2 * self.parameters * math.prod(self.outputs[:-1])


def match(policy: Policy, layers: Sequence[TracedLayer]) -> dict[str, LayerSpec]:
    """The specifications of the layers that are to be quantized, by path.

    Raises:
      InputError: a rule decides about no layer, none is to be quantized, or a rotation or a low
        rank does not fit a layer.
    """
    deciding = {layer.path: policy.rule(layer.path) for layer in layers}
    for i, rule in enumerate(policy.rules):
        if i in deciding.values() or rule.optional:
            continue
        taken = any(fnmatch.fnmatchcase(path, rule.pattern) for path in deciding)
        cause = (
            "the rules before it decide about all it matches"
            if taken
            else f"no layer has such a path{did_you_mean(rule.pattern, list(deciding))}"
        )
        raise InputError(f"policy {policy.name!r}: rule {i + 1} ({rule.pattern!r}): {cause}")
    specs = decide(policy, layers)
    if not specs:
        raise InputError(f"policy {policy.name!r} quantizes no layer; a rule with a spec is needed")
    return specs


def decide(policy: Policy, layers: Sequence[TracedLayer]) -> dict[str, LayerSpec]:
    """As `match`, of layers that need not be all the policy is about."""
    decided = {}
    for layer in layers:
        number = policy.rule(layer.path)
        spec = None if number is None else policy.rules[number].spec
        if spec is None:
            continue
        if layer.kernel and (reason := _why_unfit(spec, layer.kernel)):
            raise InputError(f"policy {policy.name!r}: {layer.path}: {reason}")
        if spec.ranges == "token" and math.prod(layer.kernel[:-2]) > 1:
            spec = replace(spec, ranges="static")
        decided[layer.path] = spec
    return decided


def _why_unfit(spec: LayerSpec, kernel: Sequence[int]) -> str | None:
    """Why a layer with a kernel `[*taps, C, O]` cannot have a spec; None where it can."""
    *_, channels, outputs = kernel
    if channels % spec.rotation:
        return f"rotation = {spec.rotation} does not divide its {channels} channels"
    rank = min(math.prod(kernel[:-1]), outputs)
    if spec.low_rank > rank:
        return f"low_rank = {spec.low_rank} is more than its weights' own rank, at most {rank}"
    return None


def match_table(policy: Policy, layers: Sequence[TracedLayer]) -> str:
    """Which rule decides about how many layers, parameters and operations, as text."""
    lines = [f"{'rule':32} {'layers':>6} {'parameters':>12} {'GFLOP':>9}  how"]
    parts = [*enumerate(policy.rules), (None, Rule("(no rule)"))]
    for number, rule in parts:
        own = [layer for layer in layers if policy.rule(layer.path) == number]
        spec = rule.spec
        how = "stays float" if spec is None else str(spec)
        if own:
            lines.append(
                f"{rule.pattern:32} {len(own):6} {sum(x.parameters for x in own):12,} "
                f"{sum(x.flops for x in own) / 1e9:9.2f}  {how}"
            )
    return "\n".join(lines)
