"""The controlled case: the same float function with its channels rescaled and shifted.

Wherever channels feed nothing but a linear layer, a factor on the one side and its inverse on the
other change no output. Trained models have such scattered channels by themselves; this draws them
at will.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Params = dict[str, Any]


def rescale_channels(params: Params, rng: np.random.Generator, sigma: float = 1.5) -> Params:
    """Rescales the UNet's channels by log-normal factors, and shifts them where a bias can follow.

    Args:
      params: of a `UNet3D` with motion modules.
      rng: draws factors exp(N(0, sigma^2)) and shifts.
      sigma: of the factors' logarithms.

    Returns:
      Parameters of the same float function.
    """
    flat = dict(traverse_util.flatten_dict(params, sep="/"))

    def factors(count: int) -> jnp.ndarray:
        return jnp.asarray(np.exp(rng.normal(0, sigma, count)), jnp.float32)

    def scale_rows(path: str, factor: jnp.ndarray) -> None:
        flat[f"{path}/kernel"] = flat[f"{path}/kernel"] / factor[:, None]

    for path in sorted({name.rpartition("/")[0] for name in flat}):
        block, _, layer = path.rpartition("/")
        if layer in ("norm1", "norm2", "norm3") and f"{path}/scale" in flat:
            reader = _reader(flat, block, layer)
            if reader is None:
                continue
            factor = factors(len(flat[f"{path}/scale"]))
            flat[f"{path}/scale"] = flat[f"{path}/scale"] * factor
            flat[f"{path}/bias"] = flat[f"{path}/bias"] * factor
            scale_rows(reader, factor)
            if f"{reader}/bias" in flat:
                shift = factor * jnp.asarray(rng.normal(0, 3, len(factor)), jnp.float32)
                flat[f"{path}/bias"] = flat[f"{path}/bias"] + shift
                moved = jnp.matmul(shift, flat[f"{reader}/kernel"], precision="highest")
                flat[f"{reader}/bias"] = flat[f"{reader}/bias"] - moved
        elif layer in ("to_qkv", "to_kv"):
            kernel = flat[f"{path}/kernel"]
            parts = 3 if layer == "to_qkv" else 2
            factor = factors(kernel.shape[1] // parts)
            ones = jnp.ones((parts - 1) * len(factor))
            flat[f"{path}/kernel"] = kernel * jnp.concatenate([ones, factor])[None]
            scale_rows(f"{block}/to_out", factor)
        elif layer == "proj" and block.endswith("/ff"):
            kernel, bias = flat[f"{path}/kernel"], flat[f"{path}/bias"]
            factor = factors(kernel.shape[1] // 2)
            both = jnp.concatenate([factor, jnp.ones(len(factor))])
            flat[f"{path}/kernel"], flat[f"{path}/bias"] = kernel * both[None], bias * both
            scale_rows(f"{block}/out", factor)
    return traverse_util.unflatten_dict(flat, sep="/")


def _reader(flat: Params, block: str, norm: str) -> str | None:
    """The one linear layer behind a LayerNorm; none where positions are added in between."""
    candidates = {
        "norm1": f"{block}/attn1/to_qkv",
        "norm2": f"{block}/attn2/to_q",
        "norm3": f"{block}/ff/proj",
    }
    # In a motion module's block the first two norms are followed by positions.
    if "/motion_module/" in f"{block}/" and norm in ("norm1", "norm2"):
        return None
    reader = candidates[norm]
    return reader if f"{reader}/kernel" in flat else None
