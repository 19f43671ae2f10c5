"""Written videos read back as what was written; failures leave nothing."""

import warnings

import imageio.v3 as imageio
import jax
import numpy as np
import pytest

from qvd_jax import files
from qvd_jax.data import video_io
from qvd_jax.errors import InputError


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    f, h, w = np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij")
    return np.stack([f * 10, h * 4, w * 4], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_videos_read_back(tmp_path, suffix, size):
    video = gradient(6, *size)
    path = tmp_path / f"video{suffix}"
    video_io.write_video(path, video, fps=8)
    found = imageio.imread(path, plugin="FFMPEG" if suffix == ".mp4" else "pillow")
    assert found.shape[0] == 6
    assert list(tmp_path.iterdir()) == [path]
    # H.264 halves the chroma and needs even sides; GIF has 256 colours.
    error = np.abs(found[:, : size[0], : size[1], :3].astype(int) - video)
    assert error.mean() < 6


def test_contact_sheet_shows_a_row_for_each_video(tmp_path):
    videos = np.stack([gradient(16, 8, 12), 255 - gradient(16, 8, 12)])
    path = tmp_path / "sheet.png"
    video_io.write_contact_sheet(path, videos, columns=4)
    found = imageio.imread(path)
    assert found.shape == (16, 48, 3)
    np.testing.assert_array_equal(found[:8, 12:24], videos[0, 5])
    np.testing.assert_array_equal(found[8:, 36:], videos[1, 15])


def test_tile_places_videos_row_by_row():
    videos = np.broadcast_to(np.uint8([1, 2, 3]).reshape(3, 1, 1, 1, 1), (3, 2, 4, 6, 3))
    grid = video_io.tile(videos)
    assert grid.shape == (2, 8, 12, 3)
    assert [grid[0, y, x, 0] for y in (0, 4) for x in (0, 6)] == [1, 2, 3, 0]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")

    def full(target, *_args, **_options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_io.imageio, "imwrite", full)
    with pytest.raises(InputError, match=r"video\.mp4 could not be written: .*No space left"):
        video_io.write_video(path, gradient(2, 8, 8), fps=8)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_a_truncated_video_is_not_kept(tmp_path, monkeypatch):
    """On a full disk ffmpeg stops writing and reports success."""
    path, whole = tmp_path / "video.mp4", video_io.imageio.imwrite

    def cut(target, *args, **options):
        whole(target, *args, **options)
        target.write_bytes(target.read_bytes()[:-200])

    monkeypatch.setattr(video_io.imageio, "imwrite", cut)
    with pytest.raises(InputError, match=r"video\.mp4 could not be written: .*is the disk full"):
        video_io.write_video(path, gradient(6, 32, 32), fps=8)
    assert not list(tmp_path.iterdir())


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "there.mp4").write_bytes(b"")
    for path, message in (
        (tmp_path / "missing" / "a.mp4", "folder .*missing does not exist"),
        (tmp_path / "there.mp4", "exists already; pass --overwrite"),
        (tmp_path, "is a folder; name a file"),
    ):
        with pytest.raises(InputError, match=message):
            files.check_writable(path, overwrite=False)
    files.check_writable(tmp_path / "there.mp4", overwrite=True)


def test_reading_a_video_does_not_warn_of_threads(tmp_path):
    jax.devices()
    video_io.write_video(tmp_path / "a.mp4", gradient(2, 16, 16), 8)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", RuntimeWarning)
        assert video_io.read_video(tmp_path / "a.mp4").shape == (2, 16, 16, 3)
    assert not given


def test_images_of_a_folder_are_read_in_the_order_of_their_numbers(tmp_path, caplog):
    for number in range(12):
        imageio.imwrite(tmp_path / f"pose{number}.png", np.full((4, 6, 3), number, np.uint8))
    assert video_io.read_video(tmp_path)[:, 0, 0, 0].tolist() == list(range(12))
    assert not caplog.records
    video_io.write_video(tmp_path / "preview.gif", gradient(3, 8, 8), 8)
    (tmp_path / "z.txt").write_text("no image")
    assert video_io.read_video(tmp_path)[:, 0, 0, 0].tolist() == list(range(12))
    assert "of 14 files the 12 still images are the frames" in caplog.text
    assert "left out are others, such as preview.gif" in caplog.text
