"""Low-rank additions of AnimateDiff: motion LoRAs and the v3 domain adapter."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.tensors import LazyTensor, Tensors, open_file
from qvd_jax.errors import InputError

_KEY = re.compile(
    r"(?P<module>.+?)\.(?:processor\.)?(?P<layer>to_q|to_k|to_v|to_out)(?:\.0)?"
    r"[._]lora[._](?P<side>down|up|A|B)\.weight"
)


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
    """Adds `scale * up @ down` to the attention weights a LoRA file names.

    There is no division by the rank and no alpha tensor, as in AnimateDiff's own loader.

    Args:
      tensors: of the UNet, by diffusers' names.
      path: the LoRA file.
      scale: factor of the addition.
      rename: from the file's module names to diffusers'.

    Raises:
      InputError: a key is of another form, a target is missing, or shapes do not fit.
    """
    pairs: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in open_file(path).items():
        match = _KEY.fullmatch(key)
        if not match:
            raise InputError(
                f"{path}: {key} is no key of an AnimateDiff LoRA (..to_q_lora.down.weight)"
            )
        module = rename(match["module"].removeprefix("module.").removeprefix("unet."))
        layer = match["layer"] + (".0" if match["layer"] == "to_out" else "")
        side = {"A": "down", "B": "up"}.get(match["side"], match["side"])
        pairs.setdefault(f"{module}.{layer}.weight", {})[side] = tensor
    if not pairs:
        raise InputError(f"{path} holds no tensors")
    missing = sorted(name for name in pairs if name not in tensors)
    if missing:
        raise InputError(
            f"{path} adds to {len(missing)} weights that this model lacks, the first {missing[0]}; "
            f"motion LoRAs fit v2 motion modules, which have one in the mid block"
        )
    merged = dict(tensors)
    for name, pair in pairs.items():
        if set(pair) != {"down", "up"}:
            raise InputError(f"{path}: {name} has only {'/'.join(pair)} of down and up")
        down, up, base = pair["down"], pair["up"], tensors[name]
        matrices = len(up.shape) == len(down.shape) == 2 and up.shape[1] == down.shape[0]
        if not matrices or (up.shape[0], down.shape[1]) != base.shape:
            raise InputError(
                f"{path}: {name} is {base.shape}, which up {up.shape} x down {down.shape} "
                f"does not fit"
            )
        merged[name] = LazyTensor(base.shape, _sum(base, up, down, scale))
    return merged


def _sum(
    base: LazyTensor, up: LazyTensor, down: LazyTensor, scale: float
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        product = up.read().astype(np.float32) @ down.read().astype(np.float32)
        return base.read().astype(np.float32) + scale * product

    return read
