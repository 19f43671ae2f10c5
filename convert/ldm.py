"""Names of the original latent-diffusion code, ModelScope's and Stability's, as diffusers has them.

That code numbers the blocks of the UNet through all levels, so where a block belongs follows from
its number.
"""

import re
from typing import NamedTuple

import numpy as np

from . import keys
from .companions import identity
from .tensors import LazyTensor, Tensors

_OUTSIDE = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "label_emb.0.0.": "add_embedding.linear_1.",
    "label_emb.0.2.": "add_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "input_blocks.0.1.": "transformer_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
_RESNET = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
_TRANSFORMER = {
    "time_stack.0.": "temporal_transformer_blocks.0.",
    "time_pos_embed.0.": "time_pos_embed.linear_1.",
    "time_pos_embed.2.": "time_pos_embed.linear_2.",
}
_VAE_ATTENTION = {
    "norm.": "group_norm.",
    "q.": "to_q.",
    "k.": "to_k.",
    "v.": "to_v.",
    "proj_out.": "to_out.0.",
}
_CLIP_VISION = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.": "vision_model.embeddings.patch_embedding.",
    "ln_pre.": "vision_model.pre_layrnorm.",
    "ln_post.": "vision_model.post_layernorm.",
}
_CLIP_LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def is_original(tensors: Tensors) -> bool:
    """Whether a UNet carries the original code's names."""
    return "input_blocks.0.0.weight" in tensors


class Blocks(NamedTuple):
    """How that code's numbers of a UNet's blocks are to be read.

    Attributes:
      per_level: blocks of a level, its downsampling among them.
      last_middle: number of the last block in the middle.
      blended: whether resnets and transformers hold those over time, as Stability's do.
    """

    per_level: int
    last_middle: int
    blended: bool


def blocks_of(tensors: Tensors) -> Blocks:
    """The blocks that a UNet by diffusers' names would have in that code."""
    return Blocks(
        per_level=keys.count(tensors, r"down_blocks\.0\.resnets\.(\d+)\.") + 1,
        last_middle=3 if any(".temp_attentions." in name for name in tensors) else 2,
        blended=any(".temporal_res_block." in name for name in tensors),
    )


def rename_unet(tensors: Tensors) -> Tensors:
    """The UNet's tensors by diffusers' names; a name that has none there is kept."""
    # The first downsampling closes the first level; block 0 is conv_in.
    last_input = max(keys.numbers(tensors, r"input_blocks\.(\d+)\."), default=0)
    blocks = Blocks(
        min(keys.numbers(tensors, r"input_blocks\.(\d+)\.(?:0\.)?op\."), default=last_input),
        max(keys.numbers(tensors, r"middle_block\.(\d+)\."), default=0),
        any(".time_stack." in name for name in tensors),
    )
    return {rename_in_unet(name, blocks): tensor for name, tensor in tensors.items()}


def rename_in_unet(name: str, blocks: Blocks) -> str:
    """The name of a UNet's tensor as diffusers has it; one that has none there is kept."""
    outside = _replace_start(name, _OUTSIDE)
    found = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)\.(?:(\d+)\.)?(.+)", name)
    if outside != name or found is None or not blocks.per_level:
        return outside
    way, number, part, rest = found[1], int(found[2]), int(found[3] or 0), found[4]
    if way == "middle":
        is_last = number == blocks.last_middle
        stage, layer, part = "mid_block", int(is_last), 0 if is_last else number
    else:
        level, layer = divmod(number - (way == "input"), blocks.per_level)
        stage = f"{'down' if way == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{stage}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{stage}.upsamplers.0.{rest}"
    if part in (1, 2):
        kind = "attentions" if part == 1 else "temp_attentions"
        return f"{stage}.{kind}.{layer}.{_replace_start(rest, _TRANSFORMER)}"
    if rest.startswith("temopral_conv."):  # sic
        return f"{stage}.temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}"
    return f"{stage}.resnets.{layer}.{_resnet(rest, blocks.blended)}"


def rename_controlnet(tensors: Tensors) -> Tensors:
    """A ControlNet's tensors by diffusers' names; a name that has none there is kept."""
    # Numbers of the hint's convolutions; between them lie activations.
    hints = sorted(keys.numbers(tensors, r"input_hint_block\.(\d+)\."))
    places = [f"blocks.{i}" for i in range(len(hints) - 2)]
    hint = dict(zip(hints, ("conv_in", *places, "conv_out"), strict=False))

    def rename(name: str) -> str:
        if found := re.fullmatch(r"input_hint_block\.(\d+)\.(.+)", name):
            return f"controlnet_cond_embedding.{hint[int(found[1])]}.{found[2]}"
        if found := re.fullmatch(r"zero_convs\.(\d+)\.0\.(.+)", name):
            return f"controlnet_down_blocks.{found[1]}.{found[2]}"
        return _replace_start(name, {"middle_block_out.0.": "controlnet_mid_block."})

    return {rename(name): tensor for name, tensor in rename_unet(tensors).items()}


def rename_vae(tensors: Tensors) -> Tensors:
    """The VAE's tensors by diffusers' names; a name that has none there is kept.

    Stability's video autoencoder has no `quant_conv`, which then is the identity.
    """
    levels = keys.count(tensors, r"decoder\.up\.(\d+)\.")
    blended = any(".time_stack." in name for name in tensors)

    def rename(name: str) -> str:
        half, _, rest = name.partition(".")
        blended_here = blended and half == "decoder"
        if found := re.fullmatch(r"(down|up)\.(\d+)\.(block\.(\d+)|(?:down|up)sample)\.(.+)", rest):
            way, level, part, number, rest = found.groups()
            # The original counts the decoder's levels from the highest resolution, too.
            place = int(level) if way == "down" else levels - 1 - int(level)
            stage = f"{half}.{way}_blocks.{place}"
            if number is None:
                return f"{stage}.{part}rs.0.{rest}"
            return f"{stage}.resnets.{number}.{_vae_resnet(rest, blended_here)}"
        if found := re.fullmatch(r"mid\.block_([12])\.(.+)", rest):
            number = str(int(found[1]) - 1)
            return f"{half}.mid_block.resnets.{number}.{_vae_resnet(found[2], blended_here)}"
        if rest.startswith("mid.attn_1."):
            rest = rest.removeprefix("mid.attn_1.")
            return f"{half}.mid_block.attentions.0.{_replace_start(rest, _VAE_ATTENTION)}"
        outside = {"norm_out.": "conv_norm_out.", "conv_out.time_mix_conv.": "time_conv_out."}
        return f"{half}.{_replace_start(rest, outside)}"

    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    moments = renamed.get("encoder.conv_out.weight")
    if moments is not None and "quant_conv.weight" not in renamed:
        renamed |= identity("quant_conv", moments.shape[0])
    return renamed


def rename_clip_vision(tensors: Tensors) -> Tensors:
    """The tensors of open_clip's `visual` by transformers' names; what it fuses is split."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if name == "proj":
            renamed["visual_projection.weight"] = _transposed(tensor)
        elif found is None:
            renamed[_replace_start(name, _CLIP_VISION)] = tensor
        else:
            layer, rest = f"vision_model.encoder.layers.{found[1]}.", found[2]
            if rest.startswith("attn.in_proj_"):
                leaf = rest.removeprefix("attn.in_proj_")
                for i, part in enumerate("qkv"):
                    renamed[f"{layer}self_attn.{part}_proj.{leaf}"] = _third(tensor, i)
            else:
                renamed[layer + _replace_start(rest, _CLIP_LAYER)] = tensor
    return renamed


def _transposed(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape[::-1], lambda: tensor.read().T)


def _third(tensor: LazyTensor, number: int) -> LazyTensor:
    rows = tensor.shape[0] // 3

    def read() -> np.ndarray:
        return tensor.read()[number * rows : (number + 1) * rows]

    return LazyTensor((rows, *tensor.shape[1:]), read)


def _replace_start(name: str, starts: dict[str, str]) -> str:
    for old, new in starts.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _resnet(rest: str, blended: bool) -> str:
    if not blended or rest.startswith("time_mixer."):
        return _replace_start(rest, _RESNET)
    branch = "temporal" if rest.startswith("time_stack.") else "spatial"
    return f"{branch}_res_block.{_replace_start(rest.removeprefix('time_stack.'), _RESNET)}"


def _vae_resnet(rest: str, blended: bool) -> str:
    if rest == "mix_factor":
        return "time_mixer.mix_factor"
    if rest.startswith("time_stack."):
        return _resnet(rest, blended)
    rest = _replace_start(rest, {"nin_shortcut.": "conv_shortcut."})
    return f"spatial_res_block.{rest}" if blended else rest
