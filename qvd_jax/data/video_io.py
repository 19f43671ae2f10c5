"""Reading images and videos, writing videos and sheets; nothing half-written is left behind."""

import contextlib
import functools
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError

from qvd_jax.errors import InputError, first_line
from qvd_jax.files import check_readable, replace_when_whole

_logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".gif")

STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of images that may be frames of the video that their folder is."""

ANIMATED = (".gif", ".apng")
"""Suffixes of images that are videos themselves."""

_SECOND = 1000  # in milliseconds


def read_image(path: Path, *, is_logged: bool = True) -> np.ndarray:
    """Pixels uint8 `[H, W, 3]` of an image file, as `diffusers.utils.load_image` gives them.

    The image is turned upright as its EXIF orientation says, and becomes RGB whatever its color
    mode.

    Args:
      path: of the file.
      is_logged: whether what that leaves out (transparency, a color profile, all frames but the
        first) is named in the log.

    Raises:
      InputError: the file is missing, no image, or has more than 8 bits and no white.
    """
    check_readable(path, "an image")
    with open_image(path) as image:
        if is_logged and (frames := getattr(image, "n_frames", 1)) > 1:
            _logger.warning("%s has %d frames; the first is used", path, frames)
        return to_rgb(image, path, is_logged=is_logged)


def read_video(path: Path, *, is_logged: bool = True) -> np.ndarray:
    """Pixels uint8 `[F, H, W, 3]` of a video file, or of a folder's images in the names' order.

    Numbers in names count as numbers: 2.png comes before 10.png. Videos are turned as their
    container says, and give every stored frame once; animated images give their frames.

    Args:
      path: of the file or folder.
      is_logged: as of `read_image`.

    Raises:
      InputError: it is missing, no video, or the folder's images do not fit together.
    """
    if path.is_dir():
        files = frame_files(path)
        if is_logged and (others := sorted({*path.iterdir()} - {*files}, key=counted)):
            _logger.warning(
                "%s: of %d files the %d still images are the frames; left out are others, such as "
                "%s",
                path,
                len(files) + len(others),
                len(files),
                others[0].name,
            )
        images = [read_image(file, is_logged=is_logged) for file in files]
        for file, image in zip(files, images, strict=True):
            if image.shape != images[0].shape:
                raise InputError(
                    f"{file} has {list(image.shape[:2])} pixels, {files[0].name} beside it "
                    f"{list(images[0].shape[:2])}; the images of a video have one size"
                )
        return np.stack(images)
    check_readable(path, "a video, or a folder of images,")
    if is_image(path):
        with open_image(path) as animated:
            frames = ImageSequence.Iterator(animated)
            return np.stack([to_rgb(frame, path, is_logged=is_logged) for frame in frames])
    with _open_video(path) as (_, shown):
        return np.stack(list(shown))


def is_image(path: Path) -> bool:
    """Whether the suffix is an image's, which Pillow reads, and not ffmpeg."""
    return path.suffix.lower() in (*STILLS, *ANIMATED)


def frame_files(folder: Path) -> list[Path]:
    """The still images of a folder in the order of their names, numbers in them as numbers.

    Raises:
      InputError: it holds none.
    """
    files = [file for file in folder.iterdir() if file.suffix.lower() in STILLS]
    if not files:
        raise InputError(f"{folder} holds no still images ({', '.join(STILLS)})")
    return sorted(files, key=counted)


def read_fps(path: Path) -> float | None:
    """Frames per second of a video file; None of a folder of images, or where nobody says.

    Raises:
      InputError: the file is no video.
    """
    if path.is_dir():
        return None
    if is_image(path):
        with open_image(path) as image:
            shown = [milliseconds(frame) for frame in ImageSequence.Iterator(image)]
        return len(shown) / sum(shown) * _SECOND if sum(shown) else None
    with _open_video(path) as (meta, _):
        return meta["fps"] or None


def milliseconds(frame: Image.Image) -> float:
    """How long a frame is shown; 0 where its file does not say."""
    # WebP's is known once its pixels are.
    frame.load()
    return frame.info.get("duration", 0)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file, whose failures become `InputError` whenever its pixels are read."""
    try:
        # From memory: a pipe can be read once, and not from its middle.
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            yield image
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no image that Pillow knows") from error
    except Exception as error:  # Pillow has many, and damaged files raise yet others.
        raise InputError(f"{path} cannot be read as an image: {first_line(error)}") from error


def to_rgb(image: Image.Image, where: Path | str, *, is_logged: bool = True) -> np.ndarray:
    """Pixels uint8 `[H, W, 3]` of an image, upright.

    Args:
      image: in any color mode.
      where: it is from, for messages.
      is_logged: whether what is left out is named in the log.

    Raises:
      InputError: it has more than 8 bits and no white.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise InputError(
            f"{where}: 8 bits a channel are needed, it holds gray of more (mode {image.mode}), "
            f"which diffusers would clip to white; scale it to 8 bits first"
        )
    for what in _left_out(image) if is_logged else ():
        _logger.warning("%s has %s, as in diffusers", where, what)
    with warnings.catch_warnings():
        # Pillow would have palettes with transparency become RGBA.
        warnings.filterwarnings("ignore", "Palette images", UserWarning)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel is."""
    opaque = 255
    return image.has_transparency_data and bool(
        (np.asarray(image.convert("RGBA"))[..., 3] < opaque).any()
    )


def _left_out(image: Image.Image) -> Iterator[str]:
    """What an image says beyond its RGB values, in words."""
    if is_transparent(image):
        yield "transparent pixels, whose color beneath is taken"
    if profile := image.info.get("icc_profile"):
        try:
            name = ImageCms.getProfileDescription(io.BytesIO(profile)).strip()
        except ImageCms.PyCMSError:
            name = "damaged"
        if "srgb" not in name.lower():
            yield f"the color profile {name!r}, whose values are taken for sRGB"


@contextlib.contextmanager
def _open_video(path: Path) -> Iterator[tuple[dict[str, Any], Iterator[np.ndarray]]]:
    """What ffmpeg says of a video file, and its frames uint8 `[H, W, 3]`, turned upright."""
    logger = logging.getLogger("imageio_ffmpeg")
    level = logger.level
    # It warns of frames that are turned.
    logger.setLevel(logging.ERROR)
    try:
        with (
            _seekable(path) as place,
            contextlib.closing(
                # Every stored frame once; by itself ffmpeg fills up to a constant rate.
                imageio_ffmpeg.read_frames(str(place), output_params=["-fps_mode", "passthrough"])
            ) as reader,
        ):
            with _ffmpeg():
                meta = next(reader)
            width, height = meta["size"]
            yield meta, (np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader)
    except Exception as error:  # ffmpeg's failures come in many kinds.
        raise InputError(f"{path} cannot be read as a video: {first_line(error)}") from error
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[Path]:
    """The path; of a pipe that of a file of what it gives, for ffmpeg reads in any order."""
    if not path.is_fifo():
        yield path
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(path.read_bytes())
        file.flush()
        yield Path(file.name)


@contextlib.contextmanager
def _ffmpeg() -> Iterator[None]:
    """Where imageio starts ffmpeg; between fork and exec no thread of JAX's is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        yield


def counted(path: Path) -> list[str | int]:
    """The path as a key to sort by, numbers in it as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def write_video(path: Path, video: np.ndarray, fps: float) -> None:
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
        _write_pillow(path, video, duration=_SECOND / fps, loop=0)


def write_contact_sheet(path: Path, videos: np.ndarray, columns: int = 8) -> None:
    """Writes a PNG with one row for each video and evenly chosen frames as columns.

    Args:
      path: of the PNG.
      videos: uint8 `[B, F, H, W, 3]`.
      columns: how many frames to show at most.

    Raises:
      InputError: the file could not be written.
    """
    rows = np.concatenate(np.moveaxis(shown_frames(videos, columns), 1, 0), axis=2)
    _write_pillow(path, np.concatenate(rows))


def shown_frames(videos: np.ndarray, columns: int = 8) -> np.ndarray:
    """The frames that a contact sheet shows, of videos `[B, F, H, W, 3]`."""
    frames = videos.shape[1]
    chosen = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    return videos[:, chosen]


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


def _encode_mp4(path: Path, video: np.ndarray, fps: float) -> None:
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
