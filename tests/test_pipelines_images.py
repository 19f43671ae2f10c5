"""Images given to pipelines in Python: arrays, or Pillow's as diffusers' pipelines are given."""

import numpy as np
import pytest
import torch
from PIL import Image

from qvd_jax.data import video_io
from qvd_jax.errors import InputError
from qvd_jax.pipelines.images import check_images, to_arrays

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_images_of_pillow_are_read_as_their_files(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / "image.tiff")
    stored = video_io.read_image(tmp_path / "image.tiff")
    for given in (image, [image], [stored]):
        (found,) = check_images(given, 8, 12)
        np.testing.assert_array_equal(found, stored)


@pytest.mark.parametrize("given", [PIXELS, PIXELS[None], [PIXELS], torch.from_numpy(PIXELS)[None]])
def test_one_image_is_a_list_of_one(given):
    (found,) = to_arrays(given, "images")
    np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no images"),
        ([PIXELS, "cat.png"], r"images\[1\]: an array or an image of Pillow is needed, got str"),
        ([Image.fromarray(PIXELS[..., 0].astype(np.uint16))], r"images\[0\]: 8 bits a channel"),
        ([PIXELS, PIXELS / 255], r"image 2: RGB of 8 bits, uint8 \[H, W, 3\], .* got float64"),
        (Image.fromarray(PIXELS).resize((8, 8)), "image 1 has 8x8 pixels .* the video 8x12"),
    ],
)
def test_what_is_no_image_is_named(given, message):
    with pytest.raises(InputError, match=message):
        check_images(given, 8, 12)
