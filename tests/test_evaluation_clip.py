"""CLIP's figures against transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from random_animatediff import make_text_encoder, make_tokenizer, randomize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from convert.__main__ import main as convert
from qvd_jax import evaluate
from qvd_jax.errors import InputError
from qvd_jax.evaluation import sets
from qvd_jax.evaluation.clip import load_clip
from qvd_jax.metrics import similarity

PROMPTS = ["a red circle", "a blue square moving left and right and up and down"]
VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 52, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small CLIP as transformers saves it, and the model itself."""
    folder = tmp_path_factory.mktemp("clip") / "original"
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 12}
    text = make_text_encoder().config.to_dict() | {"projection_dim": 12}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    randomize(model)
    model.eval().save_pretrained(folder)
    tokenizer = make_tokenizer(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(folder)
    return folder, model, tokenizer, processor


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "converted"
    assert convert([str(original[0]), "--out", str(out)]) == 0
    return out


def embeddings(original):
    """Of the frames of both videos and of the prompts, by transformers, of length one."""
    _, model, tokenizer, processor = original
    with torch.no_grad():
        tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
        texts = model.text_projection(model.text_model(input_ids=tokens["input_ids"]).pooler_output)
        frames = [
            model.visual_projection(
                model.vision_model(
                    pixel_values=processor([*video], return_tensors="pt")["pixel_values"]
                ).pooler_output
            )
            for video in VIDEOS
        ]
    return texts.numpy(), np.stack([f.numpy() for f in frames])


def test_frames_and_prompts_lie_where_transformers_puts_them(original, converted):
    clip = load_clip(converted)
    texts, frames = embeddings(original)
    scale = np.abs(texts).max()
    np.testing.assert_allclose(clip.embed_texts(PROMPTS), texts, atol=1e-4 * scale)
    for video, expected in zip(VIDEOS, frames, strict=True):
        found = clip.embed_frames(video)
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    assert clip.description == "CLIP of original"


def test_scores_are_cosines(original, converted):
    texts, frames = embeddings(original)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    frames /= np.linalg.norm(frames, axis=-1, keepdims=True)
    measures = sets.Measures.load(["clip"], clip=converted)
    (found,) = sets.compare_videos({"a": VIDEOS}, measures, prompts=PROMPTS).models
    expected = 100 * np.einsum("bfc,bc->b", frames, texts).mean() / 3
    assert found.clip_score.value == pytest.approx(expected, abs=0.1)
    steady = 100 * np.mean([frames[b, f] @ frames[b, f + 1] for b in (0, 1) for f in (0, 1)])
    assert found.frame_consistency.value == pytest.approx(steady, abs=0.1)
    (plain,) = sets.compare_videos({"a": VIDEOS}, measures).models
    assert plain.clip_score is None
    assert plain.frame_consistency == found.frame_consistency
    with pytest.raises(InputError, match="a has 2 videos, for 1 prompts and 1 seeds"):
        sets.compare_videos({"a": VIDEOS}, measures, prompts=PROMPTS[:1])


def test_a_still_is_consistent_and_one_frame_is_not_enough():
    frame = np.random.default_rng(0).normal(size=(1, 8))
    assert similarity.frame_consistency(frame.repeat(3, 0)) == pytest.approx(100)
    with pytest.raises(ValueError, match="1 frames have no next; 2 are needed"):
        similarity.frame_consistency(frame)


def test_a_folder_that_is_not_converted_is_named(original, converted, tmp_path, capsys):
    def refused(*arguments):
        assert evaluate.main(["--generated", "none", *arguments, "--out", str(tmp_path / "o")]) == 2
        return capsys.readouterr().err

    assert "convert it first: python -m qvd_jax.convert" in refused("--clip", str(original[0]))
    assert "the metric clip needs a folder of CLIP (--clip DIR)" in refused("--metrics", "clip")
    assert "pass --clip DIR" in refused("--prompts-file", "shapes")


def test_other_configs_are_refused(original, tmp_path, capsys):
    folder = shutil.copytree(original[0], tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (folder / "config.json").write_text(json.dumps(config))
    assert convert([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "relu" in capsys.readouterr().err
    config["text_config"] = []
    (folder / "config.json").write_text(json.dumps(config))
    assert convert([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "text_config is no table" in capsys.readouterr().err
