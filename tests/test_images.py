"""Images and videos of every kind enter as diffusers reads them; what is left out is named."""

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from diffusers.utils import load_image, load_video
from PIL import Image, ImageCms

from qvd_jax.data import video_io
from qvd_jax.errors import InputError

ORIENTATION = 0x0112


def picture(height: int = 24, width: int = 40) -> Image.Image:
    """Other in each corner, smooth enough for JPEG."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return Image.fromarray((np.stack([x, y, (1 - x) * y], -1) * 255).astype(np.uint8))


def as_diffusers(path) -> np.ndarray:
    return np.asarray(load_image(str(path)))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_obeyed(tmp_path, orientation, suffix):
    path = tmp_path / f"photo{suffix}"
    image = picture()
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    image.save(path, exif=exif)
    found = video_io.read_image(path)
    assert found.shape == ((24, 40, 3) if orientation <= 4 else (40, 24, 3))
    np.testing.assert_array_equal(found, as_diffusers(path))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", ".png"), ("L", ".jpg"), ("P", ".png"), ("P", ".gif"), ("CMYK", ".jpg"),
     ("CMYK", ".tiff"), ("YCbCr", ".tiff"), ("LAB", ".tiff"), ("RGB", ".bmp")],
)  # fmt: skip
def test_every_color_mode_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image{suffix}"
    image = picture()
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
        image.info.clear()
    else:
        image = image.convert(mode)
    image.save(path)
    found = video_io.read_image(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, as_diffusers(path))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_named(tmp_path, caplog, mode):
    path = tmp_path / "image.png"
    image = picture()
    if mode == "P":
        image.quantize(8).save(path, transparency=bytes(range(8)))
    else:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.convert(mode).save(path)
    found = video_io.read_image(path)
    assert "image.png has transparent pixels, whose color beneath is taken" in caplog.text
    if mode != "P":  # diffusers lets Pillow warn of its palette.
        np.testing.assert_array_equal(found, as_diffusers(path))
    # An alpha that hides nothing is not worth a word.
    caplog.clear()
    picture().convert("RGBA").save(path)
    np.testing.assert_array_equal(video_io.read_image(path), np.asarray(picture()))
    assert not caplog.text


def test_a_color_profile_is_named_unless_it_is_srgb(tmp_path, caplog):
    path = tmp_path / "image.png"
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(path, icc_profile=own)
    video_io.read_image(path)
    assert not caplog.text
    wide = own.replace(b"s\0R\0G\0B\0", b"w\0i\0d\0e\0")
    assert wide != own
    picture().save(path, icc_profile=wide)
    found = video_io.read_image(path)
    assert re.search("has the color profile 'wide.*, whose values are taken for sRGB", caplog.text)
    np.testing.assert_array_equal(found, as_diffusers(path))


@pytest.mark.parametrize(
    ("dtype", "suffix", "mode"),
    [(np.uint16, ".png", "I;16"), (np.int32, ".tiff", "I"), (np.float32, ".tiff", "F")],
)
def test_gray_of_more_than_8_bits_is_refused(tmp_path, dtype, suffix, mode):
    path = tmp_path / f"depth{suffix}"
    Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8) * 500).save(path)
    with pytest.raises(InputError, match=rf"it holds gray of more \(mode {mode}"):
        video_io.read_image(path)


def test_the_first_of_several_frames_is_an_image_and_all_are_a_video(tmp_path, caplog):
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180)]
    frames.append(frames[0].convert("L").convert("RGB"))
    for suffix in (".gif", ".webp", ".png"):
        path = tmp_path / f"moving{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
        found = video_io.read_image(path)
        assert f"moving{suffix} has 3 frames; the first is used" in caplog.text
        np.testing.assert_array_equal(found, as_diffusers(path))
        video = video_io.read_video(path)
        assert video.shape == (3, 24, 40, 3)
        assert np.abs(video - np.stack(frames).astype(float)).mean() < 12, "of 256 colours"
        assert video_io.read_fps(path) == 20
    theirs = load_video(str(tmp_path / "moving.gif"))
    expected = np.stack([np.asarray(frame.convert("RGB")) for frame in theirs])
    np.testing.assert_array_equal(video_io.read_video(tmp_path / "moving.gif"), expected)


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_a_video_is_turned_as_its_container_says(tmp_path, turned):
    frames = np.stack([np.asarray(picture())] * 3)
    video_io.write_video(tmp_path / "straight.mp4", frames, fps=30000 / 1001)
    assert video_io.read_fps(tmp_path / "straight.mp4") == pytest.approx(29.97)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-display_rotation", str(turned)]
    command += ["-i", str(tmp_path / "straight.mp4"), "-c", "copy", str(tmp_path / "turned.mov")]
    subprocess.run(command, check=True, capture_output=True)
    found = video_io.read_video(tmp_path / "turned.mov")
    expected = np.rot90(frames, turned // 90, axes=(1, 2))
    assert found.shape == expected.shape
    assert np.abs(found - expected.astype(float)).mean() < 6


def test_images_of_a_folder_are_turned_too_and_their_sizes_told_upright(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture().save(tmp_path / "0.jpg", exif=exif)
    picture(40, 24).save(tmp_path / "1.webp")
    assert video_io.read_video(tmp_path).shape == (2, 40, 24, 3)
    assert video_io.read_fps(tmp_path) is None
    picture().save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"2\.png has \[24, 40\] pixels, 0\.jpg .*\[40, 24\]"):
        video_io.read_video(tmp_path)
