"""Low-rank additions: AnimateDiff's motion LoRAs and v3 domain adapter, and AnimateLCM's LoRA."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from convert.animatediff import version
from convert.tensors import LazyTensor, Tensors, open_file
from qvd_jax.errors import InputError

_ATTENTION = re.compile(
    r"(?P<module>.+?)\.(?:processor\.)?(?P<layer>to_q|to_k|to_v|to_out)(?:\.0)?"
    r"[._]lora[._](?P<side>down|up|A|B)\.weight"
)
# As kohya-ss/sd-scripts write them: any layer, dots of its name as underscores.
_KOHYA = re.compile(r"lora_unet_(?P<layer>\w+)\.(?P<side>lora_down\.weight|lora_up\.weight|alpha)")
_SIDES = {"A": "down", "B": "up", "lora_down.weight": "down", "lora_up.weight": "up"}


def parse_lora(argument: str) -> tuple[Path, float]:
    """Splits PATH[:SCALE]; the scale defaults to 1.

    Raises:
      InputError: the scale is not finite.
    """
    path, colon, text = argument.rpartition(":")
    try:
        scale = float(text) if colon else None
    except ValueError:
        scale = None
    if scale is None:
        return Path(argument), 1.0
    if not math.isfinite(scale):
        raise InputError(f"--lora {argument}: the scale must be a finite number")
    return Path(path), scale


def merge_lora(tensors: Tensors, path: Path, scale: float, rename: Callable[[str], str]) -> Tensors:
    """Adds `scale * up @ down` to the weights a LoRA file names.

    AnimateDiff's have neither an alpha nor a division by the rank, as its own loader has none. With
    an alpha, as kohya's files have, the addition is `scale * alpha / rank * up @ down`.

    Args:
      tensors: of the UNet, by diffusers' names.
      path: the LoRA file.
      scale: factor of the addition.
      rename: from the file's module names to diffusers'.

    Raises:
      InputError: a key is of another form, a target is missing, or shapes do not fit.
    """
    kohya = {name.removesuffix(".weight").replace(".", "_"): name for name in tensors}
    additions: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in open_file(path).items():
        name, side = _target(key, path, rename, kohya)
        additions.setdefault(name, {})[_SIDES.get(side, side)] = tensor
    if not additions:
        raise InputError(f"{path} holds no tensors")
    missing = sorted(name for name in additions if name not in tensors)
    if missing:
        raise InputError(
            f"{path} adds to {len(missing)} weights that this model lacks, the first {missing[0]}; "
            f"motion LoRAs fit v2 motion modules, which have one in the mid block"
        )
    if any(".motion_modules." in name for name in additions) and version(tensors) != "v2":
        raise InputError(
            f"{path} is a motion LoRA; motion LoRAs fit v2 motion modules, which have one in the "
            f"mid block"
        )
    merged = dict(tensors)
    for name, parts in additions.items():
        if not {"down", "up"} <= parts.keys():
            raise InputError(f"{path}: {name} has only {'/'.join(parts)} of down and up")
        base = tensors[name]
        if not _fits(base.shape, parts["up"].shape, parts["down"].shape):
            raise InputError(
                f"{path}: {name} is {base.shape}, which up {parts['up'].shape} x down "
                f"{parts['down'].shape} does not fit"
            )
        merged[name] = LazyTensor(base.shape, _sum(base, parts, scale))
    return merged


def _target(
    key: str, path: Path, rename: Callable[[str], str], kohya: Mapping[str, str]
) -> tuple[str, str]:
    """The weight that a LoRA's key is about, and the part the tensor has in the addition."""
    if match := _KOHYA.fullmatch(key):
        return kohya.get(match["layer"], match["layer"]), match["side"]
    match = _ATTENTION.fullmatch(key)
    if not match:
        raise InputError(
            f"{path}: {key} is no key of a LoRA of the UNet (..to_q_lora.down.weight, "
            f"lora_unet_...lora_down.weight)"
        )
    module = rename(match["module"].removeprefix("module.").removeprefix("unet."))
    layer = match["layer"] + (".0" if match["layer"] == "to_out" else "")
    return f"{module}.{layer}.weight", match["side"]


def _fits(base: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether up `[O, R]` times down `[R, I, *taps]`, up with taps of one, is like the base."""
    return (
        len(up) == len(down) == len(base)
        and up[:1] == base[:1]
        and up[1] == down[0]
        and set(up[2:]) <= {1}
        and down[1:] == base[1:]
    )


def _sum(
    base: LazyTensor, parts: Mapping[str, LazyTensor], scale: float
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        up, down = (parts[side].read().astype(np.float32) for side in ("up", "down"))
        factor = scale
        if "alpha" in parts:
            factor *= float(parts["alpha"].read()) / len(down)
        product = up.reshape(up.shape[:2]) @ down.reshape(len(down), -1)
        return base.read().astype(np.float32) + factor * product.reshape(base.shape)

    return read
