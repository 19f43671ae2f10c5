"""What a file is: weights of which format and of what, or something else saved in their place."""

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from qvd_jax.errors import InputError

UNET = "a UNet"
SD15 = "Stable Diffusion 1.5 as one file"
SD2 = "Stable Diffusion 2"
SVD = "Stable Video Diffusion"
VAE = "a VAE"
MOTION = "motion modules of AnimateDiff, which --motion takes"

_STARTS = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file it points to; run git lfs pull",
    ),
    (b"GGUF", "is a GGUF file of quantized weights; the model's .safetensors is expected"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it"),
    (b"Rar!", "is a RAR archive; unpack it"),
    (b"\x89HDF", "is an HDF5 file of Keras; weights of PyTorch are expected"),
    (b"\x89PNG", "is an image"),
    (b"\xff\xd8\xff", "is an image"),
)
_TAR = 257, b"ustar"
_WEB_PAGE = re.compile(rb"\s*(<!doctype|<html|<\?xml|<head|<!--)", re.IGNORECASE)
_SHOWN = 80


def weights_format(path: Path) -> Literal["safetensors", "pickle"] | None:
    """In which format a file holds weights, by its first bytes; None where they do not tell.

    Raises:
      InputError: it is something else, which is named.
    """
    with path.open("rb") as file:
        head = file.read(512)
    for start, what in _STARTS:
        if head.startswith(start):
            raise InputError(f"{path} {what}")
    if head[_TAR[0] :].startswith(_TAR[1]):
        raise InputError(f"{path} is a tar archive; unpack it")
    if _WEB_PAGE.match(head):
        raise InputError(f"{path} is a web page, not weights; download the file itself")
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path)
        return "pickle"
    # Before the header stands its length.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if head.startswith(b"\x80") and len(head) > 1 and head[1] <= 5:
        return "pickle"
    if len(head) > 8 and _is_text(head):
        text = " ".join(head.decode().split())[:_SHOWN]
        raise InputError(f"{path} is a text, not weights: {text!r}")
    return None


def describe(names: Iterable[str]) -> str | None:
    """What tensors belong to, by the marks that their names bear; None for no known mark."""
    names = list(names)
    for pattern, what in _MARKS:
        if any(pattern.search(name) for name in names):
            return what
    return None


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # Truncated: PyTorch says how.
    if "constants.pkl" in members:
        raise InputError(f"{path} is a TorchScript program; the model's weights are expected")
    if "data.pkl" not in members:
        raise InputError(f"{path} is a zip archive without a pickle of PyTorch; unpack it")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


_MARKS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (
            r"^lora_(unet|te)|\blora[._](A|B|down|up)\b|_lora\.(down|up)\.|\.(hada|lokr)_w|"
            r"\.oft_|\.dora_scale$|\.lora_magnitude",
            "a LoRA, which --lora takes",
        ),
        (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
        (r"^(string_to_param|emb_params$|clip_[lg]$|<.*>$)", "an embedding of textual inversion"),
        (r"controlnet_cond_embedding|^control_model\.|^input_hint_block\.",
         "a ControlNet or SparseCtrl"),
        (r"temporal_res_block|time_stack|^conditioner\.embedders\.0\.open_clip", SVD),
        (r"temp_convs|temopral_conv|^transformer_in", "ModelScope or ZeroScope"),
        (r"(^|\.)(joint|double|single)_blocks\.\d|joint_transformer_blocks|single_transformer_blocks|"
         r"context_embedder|\.add_q_proj|txt_attn",
         "a diffusion transformer (Stable Diffusion 3, Flux or like them), no UNet"),
        (r"adaLN|adaln|(^|model\.diffusion_model\.)(blocks|layers|transformer_blocks)\.\d+\.(attn|"
         r"attn1|self_attn|cross_attn|norm1|attention)|patch_embed\.|^patch_embedding\.|x_embedder",
         "a diffusion transformer (DiT), no UNet"),
        (r"^conditioner\.embedders\.1\.model\.|add_embedding|^down_blocks\.2\.attentions\.\d\."
         r"transformer_blocks\.9\.|label_emb",
         "Stable Diffusion XL"),
        (r"^conditioner\.embedders\.0\.model\.", "the refiner of Stable Diffusion XL"),
        (r"^cond_stage_model\.model\.", SD2),
        (r"^model\.diffusion_model\.", SD15),
        (r"\.motion_modules\.", MOTION),
        (r"^(diffusion_model\.)?(input_blocks|down_blocks)\.\d", UNET),
        (r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid)", VAE),
        (r"^(text_model\.)?(encoder\.layers|embeddings\.token)|cond_stage_model|^shared\.weight$",
         "a text encoder"),
        (r"^vision_model\.", "an image encoder"),
    )
)  # fmt: skip
"""Marks in tensors' names, the more telling first, and what bears them."""
