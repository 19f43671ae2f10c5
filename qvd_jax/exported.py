"""Samples with what `qvd_jax.export` wrote; it needs jax and numpy alone.

A copy of this file lies in every artifact, for programs that have no qvd_jax:

    import sys
    sys.path.insert(0, "artifact")
    from exported import ExportedSampler

    sampler = ExportedSampler("artifact")
    frames = sampler(tokens, negative_tokens, seed=0)

    artifact/index.json                    what is there, its shapes and digests
    artifact/STAGE-PLATFORM.jaxexport      programs: of the inputs, noise, prepare, sample, decode
    artifact/weights.bin                   all arrays, one after the other
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

FORMAT_VERSION = 3
INDEX, WEIGHTS = "index.json", "weights.bin"
CONSTANTS = "constants"
DIGEST = "index_sha256"
_GUIDANCE = ("guidance_scale", "min_guidance_scale")
# All steps.
_WHOLE = {"start": 0.0, "end": 1.0}

Values = Mapping[str, np.ndarray]
"""Arrays by the names of the arguments that they are."""


class ExportedSampler:
    """A sampler of fixed shapes.

    Attributes:
      index: what `index.json` says: `videos` B, `frames` F, `height` H, `width` W, `steps` S, the
        `inputs` of a call with their shapes, its `options` with their defaults, `platforms`,
        `versions`.
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
        if self.index.get(DIGEST) != index_digest(self.index):
            raise ValueError(f"{folder}: {INDEX} is damaged, or was edited; export it anew")
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if platform not in self.index["platforms"]:
            raise ValueError(
                f"{folder} was exported for {', '.join(self.index['platforms'])}; jax runs on "
                f"{platform}: export it for that"
            )
        programs = {
            stage: _read(folder, f"{stage}-{platform}.jaxexport", self.index)
            for stage in self.index["reads"]
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
        arrays = {
            name: [_array(data, entry) for entry in entries]
            for name, entries in self.index["weights"].items()
        }
        self._constants = dict(zip(self.index[CONSTANTS], arrays.pop(CONSTANTS), strict=True))
        self._weights = jax.tree.map(jnp.asarray, arrays)

    def __call__(
        self,
        tokens: ArrayLike | Sequence[Sequence[int]] | None = None,
        negative_tokens: ArrayLike | Sequence[Sequence[int]] | None = None,
        *,
        embeds: ArrayLike | None = None,
        negative_embeds: ArrayLike | None = None,
        images: ArrayLike | None = None,
        motion_video: ArrayLike | None = None,
        conditioning_frames: ArrayLike | None = None,
        controlnet_frame_indices: ArrayLike | Sequence[int] | None = None,
        seed: int = 0,
        output_type: str = "video",
        **options: float,
    ) -> np.ndarray:
        """Samples a video for each row of tokens or embeddings, or for each image.

        A sampler takes those of the arrays that its pipeline took: `index["inputs"]` has them.

        Args:
          tokens: token ids `[B, L]`, padded as the tokenizer does; or `embeds`.
          negative_tokens: those of the negative prompts, with guidance.
          embeds: text embeddings `[B, L, C]` in the tokens' place.
          negative_embeds: of the negative prompts, with guidance.
          images: uint8 `[B, H, W, 3]`, of an image-to-video model or of one that animates.
          motion_video: uint8 `[F, H, W, 3]`, which all images follow.
          conditioning_frames: uint8 `[F, H, W, 3]` of a ControlNet, or of some frames.
          controlnet_frame_indices: of which frames those are.
          seed: of the noise.
          output_type: "video" or "latents".
          options: numbers, as the pipeline's arguments of these names; `index["options"]` has
            them, and what they are if they are not given.

        Returns:
          uint8 `[B, F, H, W, 3]`, or float32 `[B, F, h, w, C]` latents.

        Raises:
          ValueError: an argument does not fit what was exported, or values were not finite.
        """
        if output_type not in ("video", "latents"):
            raise ValueError(f"output_type = {output_type!r}: 'video' or 'latents' is needed")
        if not (hasattr(seed, "__index__") and 0 <= seed < 2**32):
            raise ValueError(f"seed = {seed}: an integer from 0 to {2**32 - 1} is needed")
        told = self._options(options)
        given = self._inputs(
            {
                "tokens": tokens,
                "negative_tokens": negative_tokens,
                "embeds": embeds,
                "negative_embeds": negative_embeds,
                "images": images,
                "motion_video": motion_video,
                "conditioning_frames": conditioning_frames,
                "controlnet_frame_indices": controlnet_frame_indices,
            }
        )
        keys, latents = self._run("noise", jnp.uint32(seed))
        found = self._conditions(given, told, seed, keys)
        for name, value in found.items():
            if not bool(jnp.isfinite(value).all()):
                raise ValueError(f"{name}: what the model is told is not finite")
        prepared = self._run("prepare", *(found[name] for name in self.index["conditions"]))
        last = told["guidance_scale"]
        first = told.get("min_guidance_scale", last)
        guidance = jnp.asarray(np.linspace(first, last, latents.shape[1], dtype=np.float32))
        latents, finite = self._run("sample", latents, keys, guidance, *prepared)
        if not np.asarray(finite).all():
            raise ValueError("a step gave latents that are not finite")
        sampled = np.asarray(latents)[:, : self.index["frames"]]
        if output_type == "latents":
            return sampled
        videos = [self._decode(video) for video in sampled]
        return np.stack(videos)

    def _options(self, given: Mapping[str, float]) -> dict[str, float]:
        """All options.

        Raises:
          ValueError: one is none of the sampler's, or does not fit.
        """
        known = self.index["options"]
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"{name}: the sampler's options are {', '.join(known)}")
            if not math.isfinite(value):
                raise ValueError(f"{name} = {value}: it must be finite")
        told: dict[str, float] = known | given
        scales = {name: told[name] for name in _GUIDANCE if name in told}
        strongest, guided = max(scales, key=scales.__getitem__), self.index["guided"]
        if (scales[strongest] > 1) != guided:
            raise ValueError(
                f"{strongest} = {scales[strongest]:g}: the sampler was exported "
                f"{'with' if guided else 'without'} guidance"
            )
        if told.get("fps", 1) < 1:
            raise ValueError(f"fps = {told['fps']:g}: at least 1 is needed")
        for name in ("motion_bucket_id", "noise_aug_strength"):
            if told.get(name, 0) < 0:
                raise ValueError(f"{name} = {told[name]:g}: it must be 0 or more")
        start, end = (told.get(f"control_guidance_{name}", of) for name, of in _WHOLE.items())
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"control_guidance_start = {start:g}, control_guidance_end = {end:g}: shares of "
                f"the steps are needed, 0 <= start < end <= 1"
            )
        return told

    def _inputs(self, arguments: Mapping[str, Any]) -> Values:
        """The arrays that are given.

        Raises:
          ValueError: they are not those of the sampler, or one does not fit.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        wanted = next((x for x in self.index["inputs"] if x.keys() == given.keys()), None)
        if wanted is None:
            raise ValueError(
                f"{', '.join(given) or 'nothing'} given: the sampler was exported for "
                f"{', or '.join(' and '.join(names) for names in self.index['inputs'])}"
            )
        found = {name: _fitting(name, given[name], wanted[name]) for name in given}
        frames, indices = self.index["frames"], found.get("controlnet_frame_indices")
        if indices is not None and (
            len(set(indices)) < len(indices) or min(indices) < 0 or max(indices) >= frames
        ):
            raise ValueError(
                f"controlnet_frame_indices = {list(indices)}: different ones of 0 to "
                f"{frames - 1} are needed"
            )
        return found

    def _conditions(
        self, given: Values, told: Mapping[str, float], seed: int, keys: Any
    ) -> dict[str, Any]:
        """What the UNet is told, computed as in the pipeline: as its programs or one by one."""
        found: dict[str, Any] = {}
        for name in ("tokens", "embeds"):
            rows = [given[key] for key in (f"negative_{name}", name) if key in given]
            if rows:
                context = jnp.concatenate(rows)
                found["context"] = (
                    self._run("encode_text", context)[0] if name == "tokens" else context
                )
        if "motion_video" in given:
            found |= self._motion(given)
        elif "images" in given:
            found |= self._images(given["images"], told, keys)
        elif "conditioning_frames" in given:
            found["control"] = self._control(given, seed)
            steps = self.index["conditions"]["control_scale"]["shape"][0]
            step = np.arange(steps)
            adds = (step / steps >= told["control_guidance_start"]) & (
                (step + 1) / steps <= told["control_guidance_end"]
            )
            scale = told["controlnet_conditioning_scale"] * adds
            found["control_scale"] = jnp.asarray(scale, jnp.float32)
        return found

    def _images(self, images: np.ndarray, told: Mapping[str, float], keys: Any) -> dict[str, Any]:
        """Of an image-to-video model."""
        strength = told["noise_aug_strength"]
        (noise,) = self._run("image_noise", keys)
        embeddings, latents = [], []
        for image, drawn in zip(images, noise, strict=True):
            pixels = _to_unit_range(image)
            embeddings += self._run("embed_image", self._seen(np.asarray(pixels)))
            latents.append(self._run("encode_images", (pixels + strength * drawn)[None])[0])
        context, image_latents = jnp.stack(embeddings)[:, None], jnp.concatenate(latents)[:, None]
        if self.index["guided"]:
            context, image_latents = (
                jnp.concatenate([jnp.zeros_like(x), x]) for x in (context, image_latents)
            )
        ids = [[told["fps"] - 1, told["motion_bucket_id"], strength]]
        return {
            "context": context,
            "image": image_latents,
            "added_ids": jnp.asarray(ids, jnp.float32),
        }

    def _seen(self, pixels: np.ndarray) -> np.ndarray:
        """What CLIP's image tower sees of pixels `[H, W, 3]`."""
        constants = self._constants
        rows, columns = constants["clip_rows"], constants["clip_columns"]
        small = np.einsum("yh,xw,hwc->yxc", rows, columns, pixels, optimize=True)
        normal = ((small + 1) / 2 - constants["clip_mean"]) / constants["clip_deviation"]
        return normal.astype(np.float32)

    def _motion(self, given: Values) -> dict[str, Any]:
        """Of a model that animates images."""
        described = self.index["conditions"]
        frames = described["control"]["shape"][1]
        # Windows are whole: the last pose is held.
        motion = given["motion_video"]
        poses = motion[np.minimum(np.arange(frames), len(motion) - 1)]
        means = [
            self._run("encode_images", _to_unit_range(image)[None])[0] for image in given["images"]
        ]
        context = jnp.asarray(self._constants["context"])
        return {
            "context": jnp.repeat(context, described["context"]["shape"][0], axis=0),
            "control": jnp.asarray(poses[None], jnp.float32) / 255,
            "reference": jnp.concatenate(means)[:, None] * self.index["scaling_factor"],
        }

    def _control(self, given: Values, seed: int) -> Any:
        """What a ControlNet is told: an image of every frame, or SparseCtrl's of some."""
        indices = given.get("controlnet_frame_indices")
        if indices is None:
            return jnp.asarray(given["conditioning_frames"][None], jnp.float32) / 255
        pixels = given["conditioning_frames"].astype(np.float32) / 255
        content = jnp.asarray(pixels)
        if "draw" in self._stages:
            posterior = self._run("encode_images", 2 * pixels - 1)
            (content,) = self._run("draw", *posterior, jnp.uint32(seed))
        content = jnp.concatenate([content, jnp.ones_like(content[..., :1])], axis=-1)
        shape = self.index["conditions"]["control"]["shape"]
        return jnp.zeros(shape).at[0, jnp.asarray(indices)].set(content)

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


def index_digest(index: Mapping[str, Any]) -> str:
    """The SHA-256 of an index, its own left out."""
    others = {key: value for key, value in index.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, name: str, index: dict[str, Any]) -> bytes:
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder}: {name} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != index["sha256"].get(name):
        raise ValueError(f"{folder}: {name} is damaged, or was edited; export it anew")
    return data


def _array(data: bytes, entry: dict[str, Any]) -> np.ndarray:
    dtype = jnp.dtype(entry["dtype"])
    count = int(np.prod(entry["shape"], dtype=np.int64))
    return np.frombuffer(data, dtype, count, entry["offset"]).reshape(entry["shape"])


def _fitting(name: str, given: Any, wanted: Mapping[str, Any]) -> np.ndarray:
    """An input in the dtype that was exported; raises `ValueError` if it has another shape."""
    found, shape = np.asarray(given), tuple(wanted["shape"])
    if found.shape != shape:
        raise ValueError(f"{name} of shape {found.shape}: the sampler was exported for {shape}")
    dtype = jnp.dtype(wanted["dtype"])
    if jnp.issubdtype(dtype, jnp.integer) and found.dtype.kind not in "iu":
        raise ValueError(f"{name} of {found.dtype}: {dtype} is needed")
    cast = found.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer) and (cast != found).any():
        raise ValueError(f"{name}: not all values are {dtype}")
    return cast


def _to_unit_range(image: np.ndarray) -> Any:
    return jnp.asarray(image, jnp.float32) / 127.5 - 1
