"""Folders of videos: what is found, and what is refused before anything is computed."""

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from qvd_jax.data import folders, video_io
from qvd_jax.errors import InputError


def encode(path, *options, rate=8):
    """Two seconds that move, by ffmpeg."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i"]
    command += [f"testsrc2=size=32x48:rate={rate}:duration=2", *options, str(path)]
    subprocess.run(command, check=True)


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
    for part in ("b.mp4 is empty", "c.mp4 cannot be read as a video: ", "d.gif is no image"):
        assert part in text
    assert "e has frames of several sizes: 8x8, 16x24" in text
    assert "1.png is no image that Pillow knows" in text


CONTAINERS = [
    ("a.mp4", "-c:v", "libx264", "-movflags", "faststart"),
    ("a.mkv", "-c:v", "libx264"),
    ("a.avi", "-c:v", "mpeg4"),
    ("a.flv", "-c:v", "flv1"),
    ("a.asf", "-c:v", "msmpeg4v3"),
    ("a.mpg", "-c:v", "mpeg2video", "-r", "25"),
    ("a.vob", "-c:v", "mpeg2video", "-r", "25"),
]


def test_whole_videos_of_all_containers_are_read(tmp_path):
    for name, *options in [*CONTAINERS, ("a.m2ts",), ("a.mxf", "-r", "25")]:
        encode(tmp_path / name, *options)
    found = folders.find_videos([tmp_path])
    assert len(found.probes) == 9
    for probe in found.probes:
        of_25 = probe.path.suffix in (".mpg", ".vob", ".mxf")
        assert probe[1:] == (50 if of_25 else 16, 48, 32, False, False)
        assert folders.read(probe).shape[:3] == probe[1:4]


def test_videos_cut_or_damaged_in_their_middle_are_found_before_they_are_read(tmp_path):
    for name, *options in CONTAINERS:
        encode(tmp_path / name, *options)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    encode(tmp_path / "damaged.mp4", "-c:v", "libx264", "-movflags", "faststart")
    data = bytearray((tmp_path / "damaged.mp4").read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 400)
    data[middle] = bytes(255 - byte for byte in data[middle])
    (tmp_path / "damaged.mp4").write_bytes(data)
    encode(tmp_path / "half.gif")
    data = (tmp_path / "half.gif").read_bytes()
    (tmp_path / "half.gif").write_bytes(data[: len(data) // 2])
    encode(tmp_path / "whole.mp4", "-c:v", "libx264")
    write_frames(tmp_path / "half", video(3, 32, 32))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "half" / "1.png")
    data = (tmp_path / "half" / "1.png").read_bytes()
    (tmp_path / "half" / "1.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "deep" / "0.png")
    with pytest.raises(InputError, match=r"^11 of 12 videos cannot be read; .* and 6 more$"):
        folders.find_videos([tmp_path])
    for name, message in {
        **{name: "cannot be read as a video: " for name, *_ in CONTAINERS},
        "damaged.mp4": "cannot be read as a video: Invalid NAL unit size",
        "half.gif": "cannot be read as an image: image file is truncated",
        "half": r"1\.png cannot be read as an image: .*truncated",
        "deep": r"0\.png: 8 bits a channel are needed",
    }.items():
        with pytest.raises(InputError, match=f"1 of 1 videos cannot be read; .*{message}"):
            folders.find_videos([tmp_path / name])


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


@pytest.mark.parametrize("other", [video(3), video(4, 24, 16)])
def test_a_video_that_changed_since_it_was_looked_at_is_refused(tmp_path, other):
    video_io.write_video(tmp_path / "a.mp4", video(4), 8)
    (probe,) = folders.find_videos([tmp_path]).probes
    video_io.write_video(tmp_path / "a.mp4", other, 8)
    shape = ", ".join(map(str, other.shape[:3]))
    with pytest.raises(InputError, match=rf"width \({shape}\), and had \(4, 16, 24\) when it"):
        folders.read(probe)


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


def test_the_documents_name_all_suffixes_of_videos():
    text = (Path(__file__).parents[1] / "docs" / "how-to" / "evaluate.md").read_text()
    (sentence,) = re.findall(r"^- each file that ends in (.*?);$", text, re.MULTILINE | re.DOTALL)
    assert tuple(re.findall(r"`([^`]+)`", sentence)) == folders.VIDEOS


def test_images_beside_videos_are_no_frames_and_said(tmp_path):
    """What `sample --contact-sheet` leaves, previews of frames, GIFs with a sheet."""
    for place in ("sampled", "gifs", "frames"):
        (tmp_path / place).mkdir()
        video_io.write_video(tmp_path / place / "0.gif", video(), 8)
    video_io.write_video(tmp_path / "sampled" / "1.mp4", video(), 8)
    video_io.write_contact_sheet(tmp_path / "sampled" / "contact-sheet.png", video()[None])
    Image.fromarray(video()[0]).save(tmp_path / "gifs" / "sheet.jpg")
    for number, frame in enumerate(video(3)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    write_frames(tmp_path / "gifs" / "below", video())
    (tmp_path / "gifs" / "below" / "list.txt").write_text("x")
    found = folders.find_videos([tmp_path])
    places = [str(probe.path.relative_to(tmp_path)) for probe in found.probes]
    assert places == ["frames/0.gif", "gifs/0.gif", "gifs/below", "sampled/0.gif", "sampled/1.mp4"]
    assert found.notes == (
        "images beside videos are left out: 1 .jpg, 4 .png",
        "files that are no videos are left out: 1 .txt",
    )
    # One image is no video, and names no folder.
    with pytest.raises(InputError, match=r"1\.png holds no videos"):
        folders.find_videos([tmp_path / "frames" / "1.png"])


@pytest.mark.parametrize("suffix", [".webp", ".png", ".apng", ".tiff"])
def test_images_of_several_frames_are_videos(tmp_path, suffix):
    frames = [*map(Image.fromarray, video(4))]
    (tmp_path / "a").mkdir()
    for number in range(3):
        frames[0].save(
            tmp_path / "a" / f"{number}{suffix}",
            format="png" if suffix == ".apng" else None,
            save_all=True,
            append_images=frames[1:],
            lossless=True,
        )
    write_frames(tmp_path / "b", video(3))
    probes = folders.find_videos([tmp_path]).probes
    assert [probe.frames for probe in probes] == [4, 4, 4, 3]
    np.testing.assert_array_equal(folders.read(probes[1]), video(4))


def test_links_are_followed_and_end(tmp_path):
    write_frames(tmp_path / "elsewhere" / "v1", video())
    (tmp_path / "set" / "inner").mkdir(parents=True)
    (tmp_path / "set" / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "inner" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere" / "v1" / "self").symlink_to(tmp_path / "elsewhere" / "v1")
    (probe,) = folders.find_videos([tmp_path / "set"]).probes
    assert probe.path == tmp_path / "set" / "class" / "v1"
    (tmp_path / "set" / "gone.mp4").symlink_to(tmp_path / "none")
    with pytest.raises(InputError, match=r"1 of 2 .*gone\.mp4 cannot be read: No such file"):
        folders.find_videos([tmp_path / "set"])


@pytest.mark.parametrize("turned", [90, 180])
def test_turned_videos_and_frames_have_their_upright_size(tmp_path, turned):
    encode(tmp_path / "straight.mp4", "-c:v", "libx264")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", str(turned)]
    command += ["-i", str(tmp_path / "straight.mp4"), "-c", "copy", str(tmp_path / "turned.mov")]
    subprocess.run(command, check=True)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned == 90 else 3
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (32, 48)).save(tmp_path / "frames" / "0.jpg", exif=exif)
    frames, straight, upright = folders.find_videos([tmp_path]).probes
    assert straight[1:4] == (16, 48, 32)
    for probe, count in ((upright, 16), (frames, 1)):
        assert probe[1:4] == ((count, 32, 48) if turned == 90 else (count, 48, 32))
        assert folders.read(probe).shape[:3] == probe[1:4]


def test_of_several_streams_the_one_is_read_that_was_looked_at(tmp_path):
    small = ["-f", "lavfi", "-i", "testsrc2=size=16x16:rate=8:duration=1"]
    shown = ["-disposition:v:0", "0", "-disposition:v:1", "default"]
    encode(tmp_path / "a.mkv", *small, "-map", "1", "-map", "0", "-c:v", "mpeg4", *shown)
    (probe,) = folders.find_videos([tmp_path]).probes
    assert folders.read(probe).shape[:3] == probe[1:4] == (16, 48, 32)


def test_transparent_and_uneven_videos_are_named(tmp_path):
    encode(tmp_path / "opaque.mov", "-c:v", "prores_ks", "-pix_fmt", "yuv422p10le")
    encode(tmp_path / "prores.mov", "-c:v", "prores_ks", "-pix_fmt", "yuva444p10le")
    encode(tmp_path / "qtrle.mov", "-c:v", "qtrle", "-pix_fmt", "argb")
    encode(tmp_path / "vp9.webm", "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p")
    frames = [*map(Image.fromarray, video(4))]
    frames[0].save(
        tmp_path / "uneven.gif", save_all=True, append_images=frames[1:], duration=[50, 300, 50, 50]
    )
    # The last frame is held before a GIF begins anew.
    frames[0].save(
        tmp_path / "held.gif", save_all=True, append_images=frames[1:], duration=[50, 50, 50, 900]
    )
    holes = [frame.convert("RGBA") for frame in frames]
    for number, frame in enumerate(holes):
        frame.putpixel((number, 0), (0, 0, 0, 0))
    holes[0].save(
        tmp_path / "holes.gif", save_all=True, append_images=holes[1:], disposal=2, duration=50
    )
    probes = {probe.path.name: probe for probe in folders.find_videos([tmp_path]).probes}
    transparent = {name for name, probe in probes.items() if probe.has_alpha}
    assert transparent == {"prores.mov", "qtrle.mov", "vp9.webm", "holes.gif"}
    assert {name for name, probe in probes.items() if probe.is_variable} == {"uneven.gif"}
