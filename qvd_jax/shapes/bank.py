"""A bank of encoded videos, made once and drawn from by training."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import NamedSharding, PartitionSpec

from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.files import read_arrays, replace_when_whole
from qvd_jax.meshes import DATA, MeshConfig
from qvd_jax.models.vae import AutoencoderKL, VAEConfig, to_unit_range

Draw = Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]
"""From rows of the bank `[N]`: their videos, uint8 `[N, F, H, W, 3]`, and what is kept of them."""

_ENCODE_VIDEOS = 8


def load_bank(
    file: Path, config: VAEConfig, params: Params, count: int, draw: Draw
) -> dict[str, np.ndarray]:
    """Reads a bank, after making it where there is none.

    Args:
      file: of the bank.
      config: of the VAE.
      params: likewise.
      count: N, how many videos it holds.
      draw: renders them.

    Returns:
      What `draw` keeps, `[N, ...]` each, and the scaled "latents" `[N, F, h, w, C]`.

    Raises:
      InputError: the file is damaged.
    """
    if not file.is_file():
        _encode_bank(file, config, params, count, draw)
    try:
        return read_arrays(file)
    except InputError as error:
        raise InputError(f"{error}; without it it is made anew") from error


def _encode_bank(file: Path, config: VAEConfig, params: Params, count: int, draw: Draw) -> None:
    @jax.jit
    def encode(video: Array) -> Array:
        mean, _ = AutoencoderKL(config).apply(
            {"params": params}, to_unit_range(video), method="encode"
        )
        return (mean * config.scaling_factor).astype(jnp.float16)

    mesh = MeshConfig(data=jax.local_device_count()).over(jax.local_devices())
    over_videos = NamedSharding(mesh, PartitionSpec(DATA))
    group = _ENCODE_VIDEOS * mesh.size
    parts = []
    for start in tqdm.trange(0, count, group, desc="encoding", unit="batch"):
        # As many each time, so that it compiles once.
        videos, kept = draw(np.arange(start, start + group) % count)
        latents = np.asarray(encode(jax.device_put(videos, over_videos)))
        parts.append({**kept, "latents": latents})
    bank = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
    replace_when_whole(file, lambda partial: np.savez(partial, allow_pickle=False, **bank))
