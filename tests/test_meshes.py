"""How work is divided: the words of `--mesh`, what fits, and what is chosen if nothing is asked."""

import re

import jax
import numpy as np
import pytest

import qvd_jax
from qvd_jax import meshes, train
from qvd_jax.calibrate import main as calibrate
from qvd_jax.errors import InputError
from qvd_jax.evaluate import main as evaluate
from qvd_jax.meshes import MeshConfig
from qvd_jax.models.configs import MAGIC_ANIMATE, STABLE_VIDEO_DIFFUSION, animatediff
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.sample import main as sample


def test_a_mesh_is_read_as_it_is_written():
    config = meshes.parse("guidance=2, data=4")
    assert config == MeshConfig(data=4, guidance=2, frame=1)
    assert config.size == 8
    assert meshes.parse(str(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=2", "unknown axis 'tensor'; known are data, guidance, frame"),
        ("", "unknown axis ''"),
        ("data=2,data=4", "data stands there twice"),
        ("data", "data=N is needed, N a number"),
        ("frame=-1", "frame=N is needed"),
        ("frame=0", "frame=0: at least 1 is needed"),
        ("guidance=4", "guidance=4: guidance has 2 halves"),
    ],
)
def test_what_is_no_mesh_is_refused(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        meshes.parse(text)


def work(unet, videos, frames, height, width, guided=True):
    return ComponentConfigs(unet, VAEConfig()).work(videos, frames, height, width, guided=guided)


ANIMATEDIFF = animatediff("v2"), 1, 16, 512, 512
SVD = STABLE_VIDEO_DIFFUSION, 1, 14, 576, 1024


@pytest.mark.parametrize(
    ("given", "mesh", "message"),
    [
        (work(*ANIMATEDIFF), "data=4", "multiply to 4, there are 8 devices"),
        (
            work(*SVD),
            "guidance=2,frame=4",
            "14 frames do not divide into 4 parts; frame may be 1, 2",
        ),
        (
            work(animatediff("v2"), 1, 16, 64, 320),
            "frame=8",
            "the 20 positions of level 2 do not divide into 8 parts; frame may be 1",
        ),
        (
            work(*ANIMATEDIFF, guided=False),
            "data=4,guidance=2",
            "guidance must be 1, for there is no guidance",
        ),
        (
            work(MAGIC_ANIMATE, 1, 16, 512, 512),
            "guidance=2,frame=4",
            "guidance must be 1, for the negatives see no reference image",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_what_does(given, mesh, message):
    with pytest.raises(InputError, match=re.escape(message)):
        given.resolve(meshes.parse(mesh), 8)


@pytest.mark.parametrize(
    ("given", "devices", "chosen"),
    [
        (work(*ANIMATEDIFF), 1, ""),
        (work(*ANIMATEDIFF), 8, "guidance=2,frame=4"),
        (work(animatediff("v2"), 8, 16, 512, 512), 8, "data=8"),
        (work(animatediff("v2"), 4, 16, 512, 512), 8, "data=4,guidance=2"),
        # Sixteen halves of eight videos, three of them padding, take longer than ten in fours.
        (work(animatediff("v2"), 5, 16, 512, 512), 8, "guidance=2,frame=4"),
        # One of eight videos that is padding costs less than the exchange of frames.
        (work(animatediff("v2"), 7, 16, 512, 512), 8, "data=8"),
        # Fourteen frames divide into two parts, not into four.
        (work(*SVD), 8, "data=2,guidance=2,frame=2"),
        (work(*SVD[:2], 25, *SVD[3:]), 8, "data=4,guidance=2"),
        (work(MAGIC_ANIMATE, 1, 16, 512, 512), 8, "frame=8"),
    ],
)
def test_what_is_chosen_leaves_no_device_idle_and_divides(given, devices, chosen):
    config = meshes.parse(chosen) if chosen else MeshConfig()
    assert given.choose(devices) == config
    given.check(config, devices)


def test_the_last_video_stands_in_for_those_that_are_missing():
    videos = np.arange(10).reshape(2, 5)
    assert meshes.padded(videos, 4, axis=1).tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4],
        [5, 6, 7, 8, 9, 9, 9, 9],
    ]
    assert meshes.padded(videos, 5, axis=1) is videos


@pytest.mark.parametrize("command", [sample, evaluate, calibrate, train.main])
@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("video=2", "unknown axis 'video'; known are data, guidance, frame"),
        (f"data={2 * jax.device_count()}", "the axes multiply to 2, there is 1 device"),
    ],
)
def test_commands_refuse_a_mesh_before_they_load(
    command, mesh, message, tmp_path, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise AssertionError("something was loaded")

    for module in ("sample", "evaluate", "calibrate"):
        monkeypatch.setattr(f"qvd_jax.{module}.load", refuse)
    arguments = {
        sample: ["--out", str(tmp_path / "a.mp4")],
        evaluate: ["--reference", "shapes", "--out", str(tmp_path / "out")],
        calibrate: ["--out", str(tmp_path / "out")],
        train.main: ["configs/shapes_vae.yaml", "--out", str(tmp_path / "out")],
    }[command]
    assert command([*arguments, "--mesh", mesh]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not [*tmp_path.iterdir()]


def test_training_divides_nothing_but_its_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 4)
    arguments = ["configs/shapes_vae.yaml", "--out", str(tmp_path / "out")]
    assert train.main([*arguments, "--mesh", "data=2,frame=2"]) == 2
    assert "frame must be 1, for training divides its batch alone" in capsys.readouterr().err


def test_a_call_refuses_a_mesh_before_any_work():
    pipe = qvd_jax.load("shapes")
    with pytest.raises(InputError, match="the axes multiply to 2, there is 1 device"):
        pipe("a red circle", mesh=MeshConfig(data=2))
