"""Samples with what `qvd_jax.export` wrote; it needs jax and numpy alone.

A copy of this file lies in every artifact, for programs that have no qvd_jax:

    import sys
    sys.path.insert(0, "artifact")
    from exported import ExportedSampler

    sampler = ExportedSampler("artifact")
    frames = sampler(tokens, negative_tokens, seed=0)

    artifact/index.json                    what is there, its shapes and digests
    artifact/STAGE-PLATFORM.jaxexport      encode, noise, prepare, sample, decode
    artifact/weights.bin                   all arrays, one after the other
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

FORMAT_VERSION = 1
INDEX, WEIGHTS = "index.json", "weights.bin"
STAGES = ("encode", "noise", "prepare", "sample", "decode")


class ExportedSampler:
    """A text-to-video sampler of fixed shapes.

    Attributes:
      index: what `index.json` says: `videos` B, `tokens` L, `frames` F, `height` H, `width` W,
        `steps` S, `guidance_scale`, `platforms`, `versions`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads an artifact.

        Raises:
          ValueError: it is none, was edited or damaged, is of another version, or has no program
            for the platform jax runs on.
        """
        folder = Path(path)
        try:
            self.index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            version = self.index["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is no exported sampler: {error}") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has format version {version}, this reads {FORMAT_VERSION}; use the "
                f"exported.py in it"
            )
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if platform not in self.index["platforms"]:
            raise ValueError(
                f"{folder} was exported for {', '.join(self.index['platforms'])}; jax runs on "
                f"{platform}: export it for that"
            )
        programs = {
            stage: _read(folder, f"{stage}-{platform}.jaxexport", self.index) for stage in STAGES
        }
        try:
            exported = {
                stage: jax.export.deserialize(bytearray(data)) for stage, data in programs.items()
            }
        except Exception as error:
            raise ValueError(
                f"{folder} was written by jax {self.index['versions']['jax']}, whose programs jax "
                f"{jax.__version__} does not read: export it anew"
            ) from error
        self._stages = {stage: jax.jit(program.call) for stage, program in exported.items()}
        data = _read(folder, WEIGHTS, self.index)
        self._weights = {
            name: [_array(data, entry) for entry in entries]
            for name, entries in self.index["weights"].items()
        }

    def __call__(
        self,
        tokens: np.ndarray | Sequence[Sequence[int]] | None = None,
        negative_tokens: np.ndarray | Sequence[Sequence[int]] | None = None,
        *,
        embeds: Any = None,
        negative_embeds: Any = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        output_type: str = "video",
    ) -> np.ndarray:
        """Samples a video for each row.

        Args:
          tokens: token ids `[B, L]`, padded as the tokenizer does; or `embeds`.
          negative_tokens: those of the negative prompts, with guidance.
          embeds: text embeddings `[B, L, C]` in the tokens' place.
          negative_embeds: of the negative prompts, with guidance.
          seed: of the noise.
          guidance_scale: of classifier-free guidance; None is the exported one.
          output_type: "video" or "latents".

        Returns:
          uint8 `[B, F, H, W, 3]`, or float32 `[B, F, h, w, C]` latents.

        Raises:
          ValueError: an argument does not fit what was exported, or the latents were not finite.
        """
        if output_type not in ("video", "latents"):
            raise ValueError(f"output_type = {output_type!r}: 'video' or 'latents' is needed")
        shape = self.index["videos"], self.index["tokens"]
        guided = self.index["guidance_scale"] > 1
        scale = self.index["guidance_scale"] if guidance_scale is None else guidance_scale
        if (scale > 1) != guided:
            raise ValueError(
                f"guidance_scale = {scale:g}: the sampler was exported "
                f"{'with' if guided else 'without'} guidance"
            )
        if (tokens is None) == (embeds is None):
            raise ValueError("tokens or embeds are needed, one of the two")
        kind = "tokens" if embeds is None else "embeds"
        given, negative = (tokens, negative_tokens) if embeds is None else (embeds, negative_embeds)
        if (negative is not None) != guided:
            raise ValueError(
                f"negative_{kind} are {'missing' if guided else 'without effect'}: the sampler was "
                f"exported {'with' if guided else 'without'} guidance"
            )
        want = shape if embeds is None else (*shape, self.index["channels"])
        rows = [_rows(kind, given, want)]
        if guided:
            rows.insert(0, _rows(f"negative_{kind}", negative, want))
        context = jnp.concatenate(rows)
        if embeds is None:
            (context,) = self._run("encode", context)
        keys, latents = self._run("noise", jnp.uint32(seed))
        prepared = self._run("prepare", context)
        guidance = jnp.full(self.index["frames"], scale, jnp.float32)
        latents, finite = self._run("sample", latents, keys, guidance, *prepared)
        if not np.asarray(finite).all():
            raise ValueError("a step gave latents that are not finite")
        sampled = np.asarray(latents)
        if output_type == "latents":
            return sampled
        videos = [self._decode(video) for video in sampled]
        return np.stack(videos)

    def _run(self, stage: str, *arguments: Any) -> list[Any]:
        weights = self._weights.get(self.index["reads"][stage], [])
        return list(self._stages[stage](*weights, *arguments))

    def _decode(self, video: np.ndarray) -> np.ndarray:
        frames, size = len(video), self.index["decoded_together"]
        parts = []
        for start in range(0, frames, size):
            # The last chunk is moved back to be as long as the others.
            first = min(start, frames - size)
            (part,) = self._run("decode", video[None, first : first + size])
            parts.append(np.asarray(part[0, start - first :]))
        return np.concatenate(parts)


def _read(folder: Path, name: str, index: dict[str, Any]) -> bytes:
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder}: {name} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != index["sha256"].get(name):
        raise ValueError(f"{folder}: {name} is damaged, or was edited; export it anew")
    return data


def _array(data: bytes, entry: dict[str, Any]) -> jax.Array:
    dtype = jnp.dtype(entry["dtype"])
    count = int(np.prod(entry["shape"], dtype=np.int64))
    values = np.frombuffer(data, dtype, count, entry["offset"])
    return jnp.asarray(values.reshape(entry["shape"]))


def _rows(name: str, given: Any, want: tuple[int, ...]) -> jax.Array:
    found = np.asarray(given)
    if found.shape != want:
        raise ValueError(f"{name} of shape {found.shape}: the sampler was exported for {want}")
    return jnp.asarray(found, jnp.int32 if len(want) == 2 else jnp.float32)
