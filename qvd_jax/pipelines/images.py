"""Images as pipelines take them: arrays, or Pillow's, which diffusers' pipelines are given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from qvd_jax.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Images: TypeAlias = "np.ndarray | Image.Image | Sequence[np.ndarray | Image.Image]"

_AXES = 3  # of one image: H, W, C


def to_arrays(images: Images, name: str) -> list[np.ndarray]:
    """Images as arrays; those of Pillow become RGB as images of files do.

    Args:
      images: one or more.
      name: of the argument, for messages.

    Raises:
      InputError: one is no image, or has more than 8 bits and no white.
    """
    is_one = not hasattr(images, "__len__") or getattr(images, "ndim", None) == _AXES
    listed: Sequence[Any] = [images] if is_one else images  # type: ignore[assignment]
    return [_to_array(image, f"{name}[{number}]") for number, image in enumerate(listed)]


def check_image(image: np.ndarray, height: int, width: int, where: str) -> None:
    """Raises `InputError` if an image is not uint8 `[height, width, 3]`."""
    if image.ndim != _AXES or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise InputError(
            f"{where}: RGB of 8 bits, uint8 [H, W, 3], is needed, got {image.dtype} "
            f"{list(image.shape)}"
        )
    if image.shape[:2] != (height, width):
        raise InputError(
            f"{where} has {image.shape[0]}x{image.shape[1]} pixels (height x width), the video "
            f"{height}x{width}: resize or crop the image, or ask for its size"
        )


def check_images(images: Images, height: int, width: int) -> list[np.ndarray]:
    """One or more images as a list of arrays.

    Raises:
      InputError: there is none, or one is not uint8 `[height, width, 3]`.
    """
    found = to_arrays(images, "images")
    if not found:
        raise InputError("there are no images; at least one is needed")
    for number, image in enumerate(found):
        check_image(image, height, width, f"image {number + 1}")
    return found


def _to_array(image: Any, where: str) -> np.ndarray:
    if hasattr(image, "__array__"):
        return np.asarray(image)
    # Not above: whoever gives arrays need not wait for Pillow's import.
    from PIL import Image

    from qvd_jax.data.video_io import to_rgb

    if not isinstance(image, Image.Image):
        raise InputError(
            f"{where}: an array or an image of Pillow is needed, got {type(image).__name__}"
        )
    return to_rgb(image, where)
