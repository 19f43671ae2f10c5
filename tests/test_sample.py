"""`python -m qvd_jax.sample`: files come out, bad input ends with one line and exit code 2."""

import json
import shutil
import signal
import time

import imageio.v3 as imageio
import numpy as np
import pytest

from qvd_jax import checkpoint, sample

SMALL = ["--frames", "3", "--height", "8", "--width", "12", "--steps", "2"]


def run(checkpoint, *arguments):
    return sample.main(["--checkpoint", str(checkpoint), *SMALL, *map(str, arguments)])


def test_prompts_become_one_video_and_a_sheet(tiny_checkpoint, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    # Some editors begin a file with a mark.
    prompts.write_text("\n\n  ein blauer Kreis, süß  \n", encoding="utf-8-sig")
    out = tmp_path / "video.mp4"
    code = run(
        tiny_checkpoint, "--prompts-file", prompts, "--prompt", "a dog", "--out", out,
        "--contact-sheet", "--scheduler", "unipc", "--karras", "--timestep-spacing", "trailing",
        "--seed", "3", "--fps", "4",
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert imageio.improps(out, plugin="FFMPEG").shape[1:3] == (8, 24)
    assert imageio.imread(tmp_path / "video.png").shape == (16, 36, 3)
    assert "compilation cache: " in captured.out
    heading, row = captured.out.splitlines()[-2:]
    assert heading.split()[-4:] == ["load", "compile", "sampling", "decode"]
    assert row.startswith(str(tiny_checkpoint))
    assert "sampling, compiling" in captured.err
    assert "| done in " in captured.err


def test_a_folder_gets_one_file_for_each_prompt(tiny_checkpoint, tmp_path):
    assert run(tiny_checkpoint, "--prompt", "A Dog!", "x", "--out", tmp_path / "out") == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["000-a-dog.json", "000-a-dog.mp4", "001-x.json", "001-x.mp4"]


def test_a_run_goes_on_where_it_stopped_and_only_with_the_same_settings(
    tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    arguments = ["--prompt", "a dog", "b", "--out", out]
    assert run(tiny_checkpoint, *arguments) == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    # As a run leaves it that was killed while it wrote the second video.
    (out / "001-b.json").unlink()
    (out / ".partial-1.mp4").write_bytes(b"half")
    made = []
    write = sample.video_io.write_video

    def noted(path, *given):
        made.append(path.name)
        write(path, *given)

    monkeypatch.setattr(sample.video_io, "write_video", noted)
    assert run(tiny_checkpoint, *arguments, "--resume", "--contact-sheet") == 0
    assert made == ["001-b.mp4"]
    assert imageio.imread(out / "contact-sheet.png").shape == (16, 36, 3)
    (out / "contact-sheet.png").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    capsys.readouterr()
    for changed, message in {
        ("--steps", "3"): "000-a-dog.json: this run is not the one that --resume is to go on with: "
        "steps was 2, is 3; name another folder, or the same settings",
        ("--seed", "1"): "seed was 0, is 1",
        ("--scheduler", "euler"): 'solver was "ddim", is "euler"',
        ("--prompt", "a dog", "c"): "is of another run: it has 001-b.json, of 'b'",
    }.items():
        assert run(tiny_checkpoint, *arguments, "--resume", *changed) == 2
        assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert made == ["001-b.mp4"]
    # None is finished, and still it is this run's folder.
    for path in out.glob("*.mp4"):
        path.unlink()
    assert run(tiny_checkpoint, *arguments, "--resume") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    for path in out.glob("*.json"):
        path.unlink()
    assert run(tiny_checkpoint, *arguments, "--resume") == 2
    message = "has no record of a run to go on with; pass --overwrite instead of --resume"
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_told_by_what_it_holds(tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "description": "moved"}))
    assert checkpoint.digest(copy) == checkpoint.digest(tiny_checkpoint)
    manifest["defaults"]["guidance_scale"] = 2.0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.digest(copy) != checkpoint.digest(tiny_checkpoint)


def test_without_out_there_is_a_video_a_gif_and_a_sheet(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(tiny_checkpoint, "--prompt", "a", "b") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["video.gif", "video.mp4", "video.png"]
    assert imageio.improps("video.gif", plugin="pillow").shape == (3, 8, 24, 3)


def test_two_checkpoints_are_shown_together_from_the_same_noise(tiny_checkpoint, tmp_path, capsys):
    arguments = ["--against", tiny_checkpoint, "--prompt", "a", "b"]
    assert run(tiny_checkpoint, *arguments, "--out", tmp_path / "all.gif", "--contact-sheet") == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert all(row.startswith(str(tiny_checkpoint)) for row in rows)
    shown = imageio.imread(tmp_path / "all.gif", plugin="pillow")
    assert shown.shape == (3, 16, 24, 3)
    np.testing.assert_array_equal(shown[:, :8], shown[:, 8:])
    assert (shown[:, :, :12] != shown[:, :, 12:]).any(), "the prompts differ"
    assert imageio.imread(tmp_path / "all.png").shape == (32, 36, 3)
    assert run(tiny_checkpoint, *arguments, "--out", tmp_path / "each") == 0
    pair = imageio.imread(tmp_path / "each" / "000-a.mp4", plugin="FFMPEG")
    assert pair.shape == (3, 8, 24, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompt", "a", "--against", "{tmp}", "--out", "{tmp}/a.gif"],
            "is no qvd_jax checkpoint",
        ),
        ([], "has none of its own; pass --prompt TEXT or --prompts-file FILE"),
        (["--prompts-file", "{tmp}/none.txt"], "none.txt does not exist"),
        (
            ["--prompts-file", "{tmp}"],
            "is a folder; a text file with one prompt a line, or the name of",
        ),
        (["--prompts-file", "{tmp}/empty.txt"], "empty.txt has no prompts"),
        (["--prompts-file", "{tmp}/binary.txt"], "binary.txt is no UTF-8 text"),
        (["--prompt", "a", "--out", "{tmp}/no/a.mp4"], "no does not exist; make it first"),
        (["--prompt", "a", "--out", "{tmp}/a.avi"], "a file ends in .mp4 or .gif"),
        (["--prompt", "a", "--out", "{tmp}/old.gif"], "exists already; pass --overwrite"),
        (["--prompt", "a", "--out", "{tmp}/a.gif", "--height", "9"], "height = 9: it must be"),
        (["--prompt", "a", "--against", "{tmp}/images"], "(MagicAnimate) and"),
        (["--prompt", "a", "--out", "{tmp}/a.gif", "--resume"], "--resume goes on with a folder"),
        (["--prompt", "a", "--karras"], "ddim has no Karras noise levels; euler, dpmsolver++, "),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tiny_checkpoint, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "old.gif").write_bytes(b"old")
    manifest = json.loads((tiny_checkpoint / "manifest.json").read_text())
    manifest = {**manifest, "family": "magicanimate"}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "manifest.json").write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    assert run(tiny_checkpoint, *(a.format(tmp=tmp_path) for a in arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.gif").read_bytes() == b"old"


def test_a_checkpoint_of_diffusers_is_told_to_be_converted(tiny, tmp_path, capsys):
    assert run(tiny[0], "--prompt", "a", "--out", tmp_path / "a.gif") == 2
    assert "has no manifest.json; convert it first" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_have_32_bits(tiny_checkpoint, capsys, seed):
    with pytest.raises(SystemExit):
        run(tiny_checkpoint, "--seed", seed)
    assert f"seed = {seed}: 0 to 4294967295 is needed" in capsys.readouterr().err


def test_an_unknown_scheduler_names_the_known(tiny_checkpoint, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tiny_checkpoint, "--prompt", "a", "--scheduler", "pndm")
    assert "ddim" in capsys.readouterr().err


class Collected:
    """An object whose collection, in which exceptions are lost, is interrupted."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def collect_and_go_on():
    Collected()
    for _ in range(100):
        time.sleep(0.1)


@pytest.mark.parametrize(
    "act",
    [
        lambda: signal.raise_signal(signal.SIGINT),
        lambda: signal.raise_signal(signal.SIGTERM),
        collect_and_go_on,
    ],
    ids=["int", "term", "lost"],
)
def test_interruption_ends_with_130_and_leaves_nothing(
    tiny_checkpoint, tmp_path, capsys, monkeypatch, act
):
    def interrupt(*_args, **_options):
        # Shells have what runs in their background ignore interruptions, tests too.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            act()
        finally:
            signal.signal(signal.SIGINT, before)

    monkeypatch.setattr(sample.video_io, "write_video", interrupt)
    assert run(tiny_checkpoint, "--prompt", "a", "b", "--out", tmp_path / "a.gif") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing half-written is left"
    assert not list(tmp_path.iterdir())
