"""Folders of videos: what is found, and what is refused before anything is computed."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from qvd_jax.data import folders, video_io
from qvd_jax.errors import InputError


def video(frames=4, height=16, width=24, seed=0):
    """Smooth enough for H.264 to keep."""
    rng = np.random.default_rng(seed)
    plain = rng.integers(0, 256, (frames, 1, 1, 3)).astype(np.uint8)
    return np.broadcast_to(plain, (frames, height, width, 3)).copy()


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}.png")


def test_videos_and_folders_of_frames_are_found_at_any_depth(tmp_path):
    (tmp_path / "class").mkdir()
    video_io.write_video(tmp_path / "class" / "v10.mp4", video(), 8)
    video_io.write_video(tmp_path / "class" / "v9.gif", video(3), 8)
    write_frames(tmp_path / "class" / "v2" / "images", video(11))
    (tmp_path / "list.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    found = folders.find_videos([tmp_path])
    places = [str(p.path.relative_to(tmp_path)) for p in found.probes]
    assert places == ["class/v2/images", "class/v9.gif", "class/v10.mp4"]
    assert [p[1:4] for p in found.probes] == [(11, 16, 24), (3, 16, 24), (4, 16, 24)]
    assert found.notes == (
        "files that are no videos are left out: 1 .txt, 1 without a suffix",
        "3 videos have 3 lengths: 1 of 11 frames, 1 of 3 frames, 1 of 4 frames",
    )
    first = folders.read(found.probes[0])
    np.testing.assert_array_equal(first, video(11))
    # What a shell makes of `*/images`.
    (one,) = folders.find_videos([tmp_path / "class" / "v2" / "images"]).probes
    assert one == found.probes[0]


def test_unreadable_videos_among_many_are_counted_and_named(tmp_path):
    video_io.write_video(tmp_path / "a.mp4", video(), 8)
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "c.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    (tmp_path / "d.gif").write_bytes(b"GIF89a")
    write_frames(tmp_path / "e", [*video(2), *video(1, 8, 8)])
    write_frames(tmp_path / "f", video(2))
    (tmp_path / "f" / "1.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"5 of 6 videos cannot be read") as caught:
        folders.find_videos([tmp_path])
    text = str(caught.value)
    for part in ("b.mp4 is empty", "c.mp4 cannot be read as a video: ", "d.gif cannot be read as"):
        assert part in text
    assert "e has frames of several sizes: 8x8, 16x24" in text
    assert "1.png is no image" in text


def test_what_is_no_folder_of_videos_is_named(tmp_path):
    with pytest.raises(InputError, match="none does not exist; a folder of videos is expected"):
        folders.find_videos([tmp_path / "none"])
    with pytest.raises(InputError, match=r"holds no videos .* and no frames"):
        folders.find_videos([tmp_path])


def test_short_videos_are_counted(tmp_path):
    probes = [folders.Probe(tmp_path / f"{n}.mp4", n, 8, 8) for n in (3, 20, 4)]
    with pytest.raises(InputError, match=r"X needs 16 frames, 2 of 3 videos have fewer: .*3.mp4"):
        folders.check_frames(probes, 16, "X")
    folders.check_frames(probes, 3, "X")


def test_a_variable_frame_rate_is_named_and_each_stored_frame_read_once(tmp_path):
    video_io.write_video(tmp_path / "even.mp4", video(8), 8)
    uneven = ["-vf", "setpts='if(lt(N,4),N,4*N)/8/TB'", "-fps_mode", "vfr"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "even.mp4")]
    subprocess.run([*command, *uneven, str(tmp_path / "uneven.mkv")], check=True)
    found = folders.find_videos([tmp_path])
    assert [p.is_variable for p in found.probes] == [False, True]
    (note,) = found.notes
    assert "1 of 2 videos have a variable frame rate, each stored frame is taken once" in note
    assert len(folders.read(found.probes[1])) == 8


def test_a_gif_gives_the_frames_it_stores(tmp_path):
    """A player at a constant rate would show a long frame many times."""
    frames = [*map(Image.fromarray, video(4))]
    frames[0].save(
        tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[10, 990, 40, 500]
    )
    (probe,) = folders.find_videos([tmp_path]).probes
    assert probe.frames == len(folders.read(probe)) == 4


def test_a_container_that_says_more_frames_than_it_has_is_refused(tmp_path, monkeypatch):
    video_io.write_video(tmp_path / "a.mp4", video(4), 8)
    (probe,) = folders.find_videos([tmp_path]).probes
    with pytest.raises(InputError, match="holds 9 frames, of which 4 can be decoded"):
        folders.read(probe._replace(frames=9))


def test_transparent_and_gray_frames_become_rgb_and_are_counted(tmp_path, caplog):
    gray = np.arange(16, dtype=np.uint8).reshape(4, 4)
    (tmp_path / "a").mkdir()
    Image.fromarray(gray).save(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    rgba = np.stack([gray, gray, gray, gray * 0], -1)
    Image.fromarray(rgba).save(tmp_path / "b" / "0.png")
    found = folders.find_videos([tmp_path])
    for probe in found.probes:
        np.testing.assert_array_equal(folders.read(probe)[0], gray[..., None].repeat(3, -1))
    assert "1 of 2 videos may be transparent, the color beneath is taken" in found.notes[0]
    assert not caplog.records
