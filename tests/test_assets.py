"""The models in the package: small, whole, and what the first command samples."""

import json
from pathlib import Path

import jax
import pytest

import qvd_jax
from qvd_jax import checkpoint, sample
from qvd_jax.cli.inputs import note_unknown_words
from qvd_jax.memory import tree_bytes
from qvd_jax.shapes.judge import prompt_hits
from qvd_jax.shapes.prompts import prompt_of
from qvd_jax.shapes.scenes import description_of, scenes_of

RESULTS = Path(__file__).parent.parent / "docs" / "results"


@pytest.fixture(scope="module")
def shapes():
    return qvd_jax.load("shapes")


def test_the_float_model_is_small_and_in_bfloat16(shapes):
    assert checkpoint.disk_bytes(checkpoint.find("shapes")) <= 40e6
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes.params)} == {"bfloat16"}


def test_the_quantized_model_is_smaller_and_int8(shapes):
    int8 = qvd_jax.load("shapes-w8a8")
    assert int8.quantization.policy == "qvd-w8a8"
    assert int8.params["unet"]["mid_block"]["blocks_0"]["resnet"]["conv1"]["kernel"].dtype == "int8"
    floats = sum(leaf.size for leaf in jax.tree.leaves(shapes.params["unet"]))
    assert tree_bytes(int8.params["unet"]) <= 0.27 * 4 * floats
    assert int8.defaults == shapes.defaults


def test_its_example_prompts_are_four_held_out_scenes(shapes):
    prompts = shapes.defaults.prompts
    assert len(set(prompts)) == 4
    plain = [prompt_of(scene) for scene in scenes_of("held_out")]
    assert set(prompts) <= set(plain)
    assert not [word for prompt in prompts for word in shapes.unknown_words(prompt)]


def test_unknown_words_are_named(shapes, capsys):
    note_unknown_words(shapes, ["a red hippo over a zebra", "a red circle moving left"])
    assert capsys.readouterr().out == (
        "note: the model does not know 'hippo', 'zebra' in 'a red hippo over a zebra'\n"
    )


def test_what_was_measured_reaches_the_aims():
    float_model, int8 = json.loads((RESULTS / "shapes.json").read_text())["models"]
    reached = {name: found["value"] for name, found in float_model["accuracy"].items()}
    aims = {"color": 0.97, "background": 0.97, "shape": 0.9, "motion": 0.9, "all four": 0.8}
    assert {name: reached[name] >= aim for name, aim in aims.items()} == dict.fromkeys(aims, True)
    assert float_model["frechet"] <= 3 * float_model["frechet_real"]
    assert int8["frechet_ratio"]["value"] <= 1.05


def test_without_arguments_it_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--steps", "1", "--frames", "2"]) == 0
    assert {"video.mp4", "video.gif", "video.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "moving shapes" in capsys.readouterr().out


@pytest.mark.slow
def test_it_shows_what_held_out_prompts_ask_for(shapes):
    scenes = scenes_of("held_out")[::16]
    videos = shapes([prompt_of(scene) for scene in scenes])
    hits = prompt_hits(videos, [description_of(scene) for scene in scenes])
    color, shape, motion, background, _ = hits.mean(0)
    assert min(color, background) >= 0.9, hits
    assert shape >= 0.8, hits
    assert motion >= 0.9, hits
