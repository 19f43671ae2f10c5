"""What commands are asked for: checked before a checkpoint is loaded, from files or pipes."""

import os
import threading
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from safetensors.numpy import save_file

from qvd_jax import calibrate, evaluate, files, sample
from qvd_jax.data import prompts, video_io
from qvd_jax.errors import InputError
from qvd_jax.quant.policy import METHODS, WIDTHS, named_policy

COMMANDS = {
    "sample": (sample, ["--checkpoint", "shapes"]),
    "calibrate": (calibrate, ["--checkpoint", "shapes"]),
    "evaluate": (evaluate, ["--reference", "shapes"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "20"], "shapes: height = 20: it must be a positive multiple of"),
        (["--width", "3"], "shapes: width = 3: it must be a positive multiple of"),
        (["--steps", "1001"], "shapes: steps = 1001: "),
        (["--scheduler", "ddim", "--karras"], "shapes: ddim has no Karras noise levels"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_checkpoint_is_loaded(
    command, arguments, message, tmp_path, monkeypatch, capsys
):
    module, checkpoint = COMMANDS[command]

    def load(*_, **__):
        raise AssertionError("a checkpoint was loaded")

    monkeypatch.setattr(module, "load", load)
    out = ["--out", str(tmp_path / "out")]
    assert module.main([*checkpoint, "--prompt", "a", *out, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_names_every_policy(capsys):
    with pytest.raises(SystemExit, match="0"):
        calibrate.main(["--help"])
    # Lines break behind hyphens, too.
    text = "".join(capsys.readouterr().out.split())
    assert ",".join(METHODS) in text
    assert ",".join(WIDTHS) in text


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def write_image(path: Path) -> None:
    imageio.imwrite(path, np.full((4, 6, 3), 7, np.uint8), extension=".png")


READ = {
    "prompts": (prompts.read_prompts, lambda path: path.write_text("a\n\nb\n"), ["a", "b"]),
    "policy": (
        lambda path: calibrate.read_policy(str(path)).rules[0].pattern,
        lambda path: path.write_text("name: own\nrules: [{pattern: '*/ff/*'}]\n"),
        "*/ff/*",
    ),
    "npy": (files.read_array, write_npy, np.ones(3)),
    "safetensors": (files.read_array, lambda path: save_file({"x": np.ones(3)}, path), np.ones(3)),
    "image": (video_io.read_image, write_image, np.full((4, 6, 3), 7)),
    "video": (
        lambda path: np.abs(video_io.read_video(path).astype(int) - 7).max() <= 3,
        lambda path: video_io.write_video(path, np.full((2, 16, 16, 3), 7, np.uint8), 8),
        True,
    ),
}


@pytest.mark.parametrize("what", READ)
def test_a_file_may_be_a_pipe(what, tmp_path):
    read, write, expected = READ[what]
    file, pipe = tmp_path / "file.mp4", tmp_path / "pipe"
    write(file)
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()), daemon=True)
    writer.start()
    np.testing.assert_array_equal(read(pipe), expected)
    writer.join(10)


def test_a_policy_whose_name_a_file_has_is_the_named_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("qvd-w8a8").write_text("no policy")
    assert calibrate.read_policy("qvd-w8a8") == named_policy("qvd-w8a8")


def test_the_packages_prompts_have_a_name_which_a_file_comes_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = prompts.read_prompts(Path("shapes"))
    assert len(found) == 32
    assert "a large pink star moving down on a gray background" in found
    Path("shapes").write_text("a corgi")
    assert prompts.read_prompts(Path("shapes")) == ["a corgi"]
    with pytest.raises(
        InputError, match=r"^\.\./shapes does not .*, or the name of the package's \(shapes\)"
    ):
        prompts.read_prompts(Path("../shapes"))
