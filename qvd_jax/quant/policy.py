"""Which layer is quantized how: ordered rules from module paths to layer specifications."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qvd_jax.config import did_you_mean
from qvd_jax.errors import InputError

Method = Literal["minmax", "mse", "smoothquant", "qdiffusion", "scri", "htdq"]
Rounding = Literal["nearest", "gptq"]
WIDTHS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a8": (4, 8), "w8a16": (8, 16)}

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


METHODS = tuple(_NAMED)
"""The methods of named policies."""


def policy_names() -> list[str]:
    """The names of all policies that have one."""
    return [f"{method}-{width}" for method in METHODS for width in WIDTHS]


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized.

    Attributes:
      method: how the quantizer of its input is found.
      weight_bits: 2 to 8.
      activation_bits: 2 to 8, or 16 for an input that stays as it is.
      step_aware: whether the input's quantizer has a step D of its own for each sampler step.
      weight_clipping: whether weights are clipped, each output's where its error is least; None
        clips those of 4 bits and fewer, where it is worth something.
      rounding: of weights: to the nearest code, or so that errors make up for each other on the
        inputs that calibration saw (`rounding.round_weights`).
    """

    method: Method
    weight_bits: int = 8
    activation_bits: int = 8
    step_aware: bool = False
    weight_clipping: bool | None = None
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(
                f"method = {self.method!r}: {', '.join(get_args(Method))} are possible"
            )
        if self.rounding not in get_args(Rounding):
            raise ValueError(
                f"rounding = {self.rounding!r}: {', '.join(get_args(Rounding))} are possible"
            )
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
        if self.step_aware and (self.method == "htdq" or self.activation_bits == 16):
            raise ValueError(
                f"step_aware has no meaning for method = {self.method!r} with activation_bits = "
                f"{self.activation_bits}: there is no step to choose"
            )

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
    weight_bits = ordinary.weight_bits
    return Policy(
        name,
        (
            *(Rule(pattern) for pattern in _KEPT_FLOAT),
            *(Rule(pattern, optional=True) for pattern in _KEPT_FLOAT_BESIDE),
            *(Rule(pattern, temporal, optional=True) for pattern in _TEMPORAL_FEATURES),
            Rule(_IMAGE_TOKEN, LayerSpec("minmax", weight_bits, 16), optional=True),
            Rule("*", ordinary),
        ),
    )


def module_policy(name: str) -> Policy:
    """The policy of a name for a module that is no UNet of these: one spec for all its layers.

    Raises:
      InputError: the method or the width is unknown.
    """
    ordinary, _ = _named_specs(name)
    return Policy(name, (Rule("*", ordinary),))


def _named_specs(name: str) -> tuple[LayerSpec, LayerSpec]:
    """How a policy of a name quantizes ordinary layers, and those of temporal features."""
    method, _, width = name.rpartition("-")
    if method not in _NAMED or width not in WIDTHS:
        raise InputError(f"unknown policy {name!r}{did_you_mean(name, policy_names())}")
    bits = WIDTHS[width]
    # With a float input there is nothing to be done about it.
    ordinary, temporal = _NAMED["minmax" if bits[1] == 16 else method]
    return LayerSpec(ordinary, *bits), LayerSpec(temporal, *bits)


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
      source: number of the tensor it is called with; layers that share it read the same one,
        along the same axes.
      upsampled: whether that is a nearest-neighbour upsampling.
    """

    path: str
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: int
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
      InputError: a rule decides about no layer, or none is to be quantized.
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
    deciding = {layer.path: policy.rule(layer.path) for layer in layers}
    decided = {path: policy.rules[i].spec for path, i in deciding.items() if i is not None}
    return {path: spec for path, spec in decided.items() if spec is not None}


def match_table(policy: Policy, layers: Sequence[TracedLayer]) -> str:
    """Which rule decides about how many layers, parameters and operations, as text."""
    lines = [f"{'rule':32} {'layers':>6} {'parameters':>12} {'GFLOP':>9}  how"]
    parts = [*enumerate(policy.rules), (None, Rule("(no rule)"))]
    for number, rule in parts:
        own = [layer for layer in layers if policy.rule(layer.path) == number]
        spec = rule.spec
        how = "stays float"
        if spec:
            how = f"{spec.method}, w{spec.weight_bits}a{spec.activation_bits}"
            how += ", weights clipped" if spec.clips_weights else ""
            how += f", {spec.rounding}" if spec.rounding != "nearest" else ""
        if own:
            lines.append(
                f"{rule.pattern:32} {len(own):6} {sum(x.parameters for x in own):12,} "
                f"{sum(x.flops for x in own) / 1e9:9.2f}  {how}"
            )
    return "\n".join(lines)
