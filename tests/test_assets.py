"""The models in the package: small, whole, and what the first command samples."""

import jax
import pytest

import qvd_jax
from qvd_jax import checkpoint, sample
from qvd_jax.data import moving_shapes
from qvd_jax.memory import tree_bytes
from qvd_jax.metrics.prompt_accuracy import prompt_hits


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
    assert tree_bytes(int8.params["unet"]) < 0.55 * tree_bytes(shapes.params["unet"])
    assert int8.defaults == shapes.defaults


def test_its_example_prompts_are_four_held_out_scenes(shapes):
    prompts = shapes.defaults.prompts
    assert len(set(prompts)) == 4
    plain = [moving_shapes.prompt(scene) for scene in moving_shapes.scenes("held_out")]
    assert set(prompts) <= set(plain)
    assert not [word for prompt in prompts for word in shapes.unknown_words(prompt)]


def test_without_arguments_it_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    assert sample.main(["--steps", "1", "--frames", "2"]) == 0
    assert {"video.mp4", "video.gif", "video.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "moving shapes" in capsys.readouterr().out


@pytest.mark.slow
def test_it_shows_what_held_out_prompts_ask_for(shapes):
    scenes = moving_shapes.scenes("held_out")[::16]
    videos = shapes([moving_shapes.prompt(scene) for scene in scenes])
    hits = prompt_hits(videos, [moving_shapes.describe_scene(scene) for scene in scenes])
    color, shape, motion, background, _ = hits.mean(0)
    assert min(color, background) >= 0.9, hits
    assert shape >= 0.8, hits
    assert motion >= 0.9, hits
