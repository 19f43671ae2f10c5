"""Reading images and videos, writing videos and sheets; nothing half-written is left behind."""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np

from qvd_jax.errors import InputError, first_line
from qvd_jax.files import check_file, replace_when_whole

VIDEO_SUFFIXES = (".mp4", ".gif")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_image(path: Path) -> np.ndarray:
    """Pixels uint8 `[H, W, 3]` of an image file.

    Raises:
      InputError: the file is missing, no image, or not RGB with 8 bits.
    """
    check_file(path, "an image")
    try:
        pixels = imageio.imread(path, plugin="pillow")
    except Exception as error:  # Pillow has many, and damaged files raise yet others.
        raise InputError(f"{path} cannot be read as an image: {first_line(error)}") from error
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise InputError(
            f"{path}: one RGB image with 8 bits is needed, it holds {pixels.dtype} "
            f"{list(pixels.shape)}; convert it first"
        )
    return pixels


def read_video(path: Path) -> np.ndarray:
    """Pixels uint8 `[F, H, W, 3]` of a video file, or of a folder's images in the names' order.

    Numbers in names count as numbers: 2.png comes before 10.png.

    Raises:
      InputError: it is missing, no video, or the folder's images do not fit together.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES]
        files.sort(key=_counted)
        if not files:
            raise InputError(f"{path} holds no images ({', '.join(_IMAGE_SUFFIXES)})")
        images = [read_image(file) for file in files]
        for file, image in zip(files, images, strict=True):
            if image.shape != images[0].shape:
                raise InputError(
                    f"{file} has {list(image.shape[:2])} pixels, {files[0].name} beside it "
                    f"{list(images[0].shape[:2])}; the images of a video have one size"
                )
        return np.stack(images)
    if not path.is_file():
        raise InputError(f"{path} does not exist; a video, or a folder of images, is expected")
    try:
        with _ffmpeg():
            return np.asarray(imageio.imread(path, plugin="FFMPEG"))
    except Exception as error:  # ffmpeg's failures come in many kinds.
        raise InputError(f"{path} cannot be read as a video: {first_line(error)}") from error


@contextlib.contextmanager
def _ffmpeg() -> Iterator[None]:
    """Where imageio starts ffmpeg; between fork and exec no thread of JAX's is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        yield


def _counted(path: Path) -> list[str | int]:
    """The name, numbers in it as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def write_video(path: Path, video: np.ndarray, fps: int) -> None:
    """Writes a video as .mp4 (H.264) or as an endlessly looping .gif.

    Args:
      path: its suffix decides the format.
      video: uint8 `[F, H, W, 3]`.
      fps: frames per second.

    Raises:
      InputError: the file could not be written, for want of space for instance.
    """
    if path.suffix == ".mp4":
        replace_when_whole(path, functools.partial(_encode_mp4, video=_even(video), fps=fps))
    else:
        _write_pillow(path, video, duration=1000 / fps, loop=0)


def write_contact_sheet(path: Path, videos: np.ndarray, columns: int = 8) -> None:
    """Writes a PNG with one row for each video and evenly chosen frames as columns.

    Args:
      path: of the PNG.
      videos: uint8 `[B, F, H, W, 3]`.
      columns: how many frames to show at most.

    Raises:
      InputError: the file could not be written.
    """
    frames = videos.shape[1]
    chosen = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    rows = np.concatenate(np.moveaxis(videos[:, chosen], 1, 0), axis=2)
    _write_pillow(path, np.concatenate(rows))


def tile(videos: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Videos side by side in one; places left over are black.

    Args:
      videos: `[B, F, H, W, 3]`.
      columns: how many in a row; None makes the grid as square as it can be.

    Returns:
      `[F, rows H, columns W, 3]`.
    """
    count, frames, height, width, channels = videos.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = int(np.ceil(count / columns))
    grid = np.zeros((rows * columns, frames, height, width, channels), videos.dtype)
    grid[:count] = videos
    grid = grid.reshape(rows, columns, frames, height, width, channels)
    return grid.transpose(2, 0, 3, 1, 4, 5).reshape(
        frames, rows * height, columns * width, channels
    )


def _even(video: np.ndarray) -> np.ndarray:
    height, width = video.shape[1:3]
    return np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode_mp4(path: Path, video: np.ndarray, fps: int) -> None:
    with _ffmpeg():
        # macro_block_size: halved chroma needs even sides, imageio would round them up to 16.
        imageio.imwrite(
            path,
            video,
            plugin="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=8,
            macro_block_size=2,
        )
        # Read back, for ffmpeg tells nobody when the disk is full.
        try:
            frames, _ = imageio_ffmpeg.count_frames_and_secs(path)
        except (RuntimeError, ValueError) as error:
            raise OSError("the written file cannot be read; is the disk full?") from error
    if frames != len(video):
        raise OSError(f"only {frames} of {len(video)} frames were written; is the disk full?")


def _write_pillow(path: Path, pixels: np.ndarray, **options: Any) -> None:
    # Encoded in memory: on a full disk imageio would try again when it is collected.
    data = imageio.imwrite("<bytes>", pixels, plugin="pillow", extension=path.suffix, **options)
    replace_when_whole(path, lambda partial: partial.write_bytes(data))
