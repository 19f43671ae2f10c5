"""What commands are given for videos to follow: motions, conditions and their weight."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvd_jax.cli.command import passed
from qvd_jax.cli.videos import wanted
from qvd_jax.data import video_io
from qvd_jax.errors import InputError
from qvd_jax.pipelines.animation import check_motion
from qvd_jax.pipelines.images import check_image
from qvd_jax.pipelines.loading import read_configs
from qvd_jax.pipelines.pipeline import VideoDefaults
from qvd_jax.pipelines.text_to_video import (
    check_control_images,
    check_control_video,
    check_scale,
)

_CONTROL_SCALE = {
    "controlnet_conditioning_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
}
"""How a ControlNet is weighed, with the defaults of the pipeline's call."""


_CONTROLS = {
    "images": "has SparseCtrl; pass --condition IMAGE@FRAME",
    "video": "has a ControlNet; pass --condition VIDEO",
    "motion": "animates images; pass --motion-video FILE",
}
"""What a checkpoint is, by what its videos follow, and how it is given that."""


def read_control(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What --condition and --motion-video say, as arguments of the pipeline's call.

    They are checked before the checkpoint is loaded, which may take a minute.

    Raises:
      InputError: the checkpoint takes none, needs some, or one cannot be read or does not fit the
        videos.
    """
    configs = read_configs(path)
    control = configs.takes.control
    if args.motion_video and control != "motion":
        raise InputError(f"{path} follows no --motion-video; leave it out")
    if args.condition and control not in ("images", "video"):
        raise InputError(f"{path} follows no --condition; leave it out")
    if control is not None and not args.motion_video and not args.condition:
        raise InputError(f"{path} {_CONTROLS[control]}")
    scale = passed(args, *_CONTROL_SCALE)
    if scale and not args.condition:
        option = next(iter(scale)).replace("_", "-")
        raise InputError(f"{path} follows no --condition; leave --{option} out")
    check_scale(*({**_CONTROL_SCALE, **scale}.values()))
    want = wanted(args, configs)
    if control == "motion":
        motion = video_io.read_video(args.motion_video)
        check_motion(list(motion), want)
        return {"motion_video": _first_frames(motion, want, str(args.motion_video))}
    if control == "video":
        shown = _first_frames(_read_control_video(args.condition), want, " ".join(args.condition))
        check_control_video(list(shown), (), want)
        return {"conditioning_frames": shown, **scale}
    if not args.condition:
        return {}
    images, indices = [], []
    for text in args.condition:
        name, _, frame = text.rpartition("@")
        if not name or not frame.isdecimal():
            raise InputError(f"--condition {text}: IMAGE@FRAME is expected, such as first.png@0")
        images.append(video_io.read_image(Path(name)))
        indices.append(int(frame))
    check_control_images(images, indices, want)
    return {"conditioning_frames": images, "controlnet_frame_indices": indices, **scale}


def _read_control_video(names: Sequence[str]) -> np.ndarray:
    """Frames `[F, H, W, 3]`: of a video, of a folder of images, or images one by one."""
    paths = [Path(name) for name in names]
    for path in paths:
        file, _, frame = path.name.rpartition("@")
        if file and frame.isdecimal() and not path.exists():
            raise InputError(
                f"--condition {path}: @FRAME is for SparseCtrl; an ordinary ControlNet follows "
                f"every frame of a video, a folder or as many images"
            )
    if len(paths) == 1:
        return video_io.read_video(paths[0])
    images = [video_io.read_image(path) for path in paths]
    height, width = images[0].shape[:2]
    for path, image in zip(paths, images, strict=True):
        check_image(image, height, width, str(path))
    return np.stack(images)


def _first_frames(video: np.ndarray, want: VideoDefaults, name: str) -> np.ndarray:
    """As many frames as are wanted; what is left out is said."""
    if len(video) > want.frames:
        print(f"note: {name} has {len(video)} frames; the first {want.frames} are used")
    return video[: want.frames]


def control_fps(args: argparse.Namespace) -> float | None:
    """Frames per second of the video that is followed; None without one."""
    shown = [args.motion_video] if args.motion_video else args.condition
    path = Path(shown[0]) if len(shown) == 1 else None
    if path is not None and path.is_fifo():
        print(f"note: {path} is a pipe and read once: its frame rate is not taken; see --fps")
    return video_io.read_fps(path) if path is not None and path.is_file() else None
