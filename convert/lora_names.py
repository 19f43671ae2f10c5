"""Which layer a tensor of a LoRA file is about, and which part of the addition it is.

Keys are written in many ways: kohya's (`lora_unet_..to_q.lora_down.weight`), diffusers' old
(`..processor.to_q_lora.down.weight`) and newer ones (`unet...to_q.lora.down.weight`), peft's
(`base_model.model...to_q.lora_A.weight`). With underscores for dots all are the names of the
model's own layers but for a prefix, or those of the original AnimateDiff or latent-diffusion code.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from . import animatediff, ldm
from .tensors import Tensors


class Place(NamedTuple):
    """A layer of the model: a component, and the module's name in it."""

    component: str
    module: str


class Layers(NamedTuple):
    """The layers that a LoRA can be about.

    Attributes:
      modules: by component, the modules' names with underscores for dots, and as they are.
      blocks: how the original latent-diffusion code numbers the UNet's.
    """

    modules: Mapping[str, Mapping[str, str]]
    blocks: ldm.Blocks


_PRODUCT = re.compile(
    r"(?P<layer>.+?)(?:\.lora_linear_layer|[._]lora)[._](?P<side>down|up|mid|A|B)"
    r"(?:\.(?!weight|bias)\w+)?(?:\.(?P<leaf>weight|bias))?"
)
_FACTOR = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_magnitude_vector|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t2))(?:\.(?!weight)\w+)?(?:\.weight)?"
)
_PLAIN = re.compile(
    r"(?P<layer>.+?)(?:[._]lora)?"
    r"\.(?P<part>alpha|dora_scale|diff|diff_b|w_norm|b_norm|on_input|weight|bias)"
)
_SIDES = {"A": "down", "B": "up"}

_WRAPPERS = ("module.", "base_model.model.", "model.", "lycoris_")
_COMPONENTS = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "diffusion_model.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
}
_RENAMES = (
    (r"_processor_", "_"),
    (r"_base_layer_$", "_"),
    *(
        (pattern.replace(r"\.", "_"), replacement.replace(".", "_"))
        for pattern, replacement in animatediff.ORIGINAL_MOTION
    ),
    (r"^text_model_", ""),
    (r"_self_attn_to_(q|k|v|out)_$", r"_self_attn_\1_proj_"),
    (r"_to_out_$", "_to_out_0_"),
)


def split_key(key: str) -> tuple[str, str] | None:
    """The layer, as the file names it, and the part; None for a key of no known form."""
    if match := _PRODUCT.fullmatch(key):
        side = _SIDES.get(match["side"], match["side"])
        if match["leaf"] != "bias":
            return match["layer"], side
        return (match["layer"], "up_bias") if side == "up" else None
    if match := _FACTOR.fullmatch(key) or _PLAIN.fullmatch(key):
        part = "magnitude" if match["part"] == "lora_magnitude_vector" else match["part"]
        return match["layer"], part
    return None


def layers_of(components: Mapping[str, Tensors]) -> Layers:
    """The layers of components whose tensors have today's diffusers' names."""
    modules = {
        component: {_flat(name.rpartition(".")[0]): name.rpartition(".")[0] for name in tensors}
        for component, tensors in components.items()
    }
    return Layers(modules, ldm.blocks_of(components["unet"]))


def component_of(layer: str) -> tuple[str | None, str]:
    """The component that a layer's name begins with, if it does, and the rest."""
    layer = _unwrapped(layer)
    for prefix, component in _COMPONENTS.items():
        if layer.startswith(prefix):
            return component, _unwrapped(layer.removeprefix(prefix))
    return None, layer


def find_layer(layer: str, layers: Layers) -> Place | None:
    """The model's layer of a file's name for it; None if there is none."""
    named, rest = component_of(layer)
    flat = _flat(rest)
    for component in layers.modules if named is None else (named,):
        modules = layers.modules.get(component, {})
        for name in (flat, _renamed(flat), _renamed_ldm(flat, layers.blocks)):
            if name in modules:
                return Place(component, modules[name])
    return None


def _unwrapped(layer: str) -> str:
    for wrapper in _WRAPPERS:
        layer = layer.removeprefix(wrapper)
    return layer


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _renamed_ldm(flat: str, blocks: ldm.Blocks) -> str:
    """A layer of the original latent-diffusion code; its dots are around numbers."""
    dotted = re.sub(r"_(?=\d+(?:_|$))|(?<=_\d)_|(?<=_\d\d)_", ".", f"{flat}_")
    for mark in ("time_stack", "temopral_conv"):
        dotted = dotted.replace(f"{mark}_", f"{mark}.")
    return _flat(ldm.rename_in_unet(f"{dotted.rstrip('._')}.", blocks)).rstrip("_")


def _renamed(flat: str) -> str:
    flat = f"{flat}_"
    for pattern, replacement in _RENAMES:
        flat = re.sub(pattern, replacement, flat)
    return flat.removesuffix("_")
