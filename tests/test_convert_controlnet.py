"""An ordinary ControlNet beside AnimateDiff, from folders and original files."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from diffusers import AnimateDiffControlNetPipeline, ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from parity import relative_error
from PIL import Image
from pytorch_sources import Weights, ldm_unet
from random_animatediff import randomize
from random_families import make_controlnet

import qvd_jax
from convert.__main__ import main as convert
from convert.controlnet import open_controlnet
from convert.pipeline import open_source
from qvd_jax import sample
from qvd_jax.data.video_io import read_video, write_video

SIZE = {"height": 16, "width": 24}
SMALL = ["--frames", "3", "--height", "16", "--width", "24", "--steps", "2"]


def controlnet() -> ControlNetModel:
    torch.manual_seed(1)
    module = make_controlnet()
    randomize(module)
    return module.eval()


def original(weights: Weights) -> Weights:
    """The weights by the original code's names."""
    own = {name: t for name, t in weights.items() if not name.startswith("controlnet_")}
    renamed = ldm_unet(own, (True, False), 1)
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[0] == "controlnet_down_blocks":
            renamed[f"zero_convs.{parts[1]}.0.{parts[2]}"] = tensor
        elif parts[0] == "controlnet_mid_block":
            renamed[f"middle_block_out.0.{parts[1]}"] = tensor
        elif parts[0] == "controlnet_cond_embedding":
            # Every second entry is an activation.
            place = int(parts[2]) + 1 if parts[1] == "blocks" else 3 * (parts[1] == "conv_out")
            renamed[f"input_hint_block.{2 * place}.{parts[-1]}"] = tensor
    return renamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The ControlNet as diffusers saves it."""
    root = tmp_path_factory.mktemp("controlnet") / "openpose"
    controlnet().save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def converted(tiny, folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("qvd_jax") / "openpose"
    assert convert([str(tiny[0]), "--controlnet", str(folder), "--out", str(out)]) == 0
    return out


def poses(frames: int) -> np.ndarray:
    shape = (frames, *SIZE.values(), 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


@pytest.mark.parametrize(
    "weighed",
    [
        {},
        {
            "controlnet_conditioning_scale": 0.6,
            "control_guidance_start": 0.25,
            "control_guidance_end": 0.8,
        },
    ],
    ids=["whole", "weighed"],
)
def test_latents_equal_diffusers_pipeline(converted, tiny, weighed):
    parts = tiny[1].components
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "motion_adapter")
    theirs = AnimateDiffControlNetPipeline(
        **{name: parts[name] for name in names}, controlnet=controlnet()
    )
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((1, 3, 8, 12, 4), dtype=np.float32)
    options = {**SIZE, "guidance_scale": 4.0, **weighed}
    shown = [Image.fromarray(pose) for pose in poses(3)]
    with torch.no_grad():
        expected = theirs(
            "a red circle",
            num_frames=3,
            num_inference_steps=4,
            conditioning_frames=shown,
            latents=torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
            output_type="latent",
            **options,
        ).frames.permute(0, 2, 3, 4, 1)
    found = qvd_jax.load(converted)(
        "a red circle",
        conditioning_frames=shown,
        frames=3,
        steps=4,
        latents=latents,
        output_type="latents",
        **options,
    )
    assert relative_error(found, expected) <= 1e-4


def test_an_original_file_is_its_folder(folder, tmp_path):
    published = controlnet().state_dict()
    weights = original(published)
    theirs = convert_controlnet_checkpoint(dict(weights), controlnet().config)
    same = {name for name, tensor in theirs.items() if published.get(name) is tensor}
    # diffusers takes the embedding to have as many convolutions as the published one.
    last = "controlnet_cond_embedding.conv_out."
    assert published.keys() - same == {f"{last}weight", f"{last}bias"}
    prefixed = {f"control_model.{name}": t for name, t in weights.items()}
    by_folder = open_controlnet(folder, {})
    for name, content in {
        "control_v11p_sd15_openpose.pth": prefixed,
        "pruned.pth": weights,
        "control_sd15_openpose.pth": {"first_stage_model.a": torch.zeros(4), **prefixed},
    }.items():
        torch.save(content, tmp_path / name)
        found = open_controlnet(tmp_path / name, {})
        assert found.config == by_folder.config
        assert found.tensors.keys() == by_folder.tensors.keys() == published.keys()
        for key, tensor in found.tensors.items():
            np.testing.assert_array_equal(tensor.read(), published[key])
        assert bool(found.notes) == (len(content) > len(weights))


def test_what_an_original_file_lacks_is_as_before_training_and_named(tiny, tmp_path):
    """Whole, differences and the rest come together, so that each is told from the others."""
    published, unet = controlnet().state_dict(), tiny[1].unet.state_dict()
    kept = ("conv_in.", "down_blocks.", "controlnet_cond_embedding.", "controlnet_mid_block.")
    held = {name: t for name, t in published.items() if name.startswith(kept)}
    torch.save(original(held), tmp_path / "part.pth")
    differences = {n: t - unet[n] if n in unet else t for n, t in published.items()}
    torch.save(original(differences) | {"difference": torch.zeros(1)}, tmp_path / "diff.pth")
    part, whole = (open_source(tiny[0], controlnet=tmp_path / f) for f in ("part.pth", "diff.pth"))
    assert any("part.pth lacks " in note and "zeros in what it adds" in note for note in part.notes)
    assert any("diff.pth holds differences" in note for note in whole.notes)
    for name, tensor in published.items():
        found = whole.tensors["unet"][f"controlnet.{name}"].read()
        np.testing.assert_allclose(found, tensor, atol=1e-6)
        expected = tensor if name in held else unet.get(name, torch.zeros_like(tensor))
        np.testing.assert_array_equal(part.tensors["unet"][f"controlnet.{name}"].read(), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lora_controlnet": (1,), "input_blocks.0.0.weight": (1,)}, "is a Control-LoRA"),
        ({"body.0.in_conv.weight": (1,)}, "is a T2I-Adapter"),
        ({"control_model.label_emb.0.0.weight": (1,)}, "is a ControlNet of Stable Diffusion XL"),
        ({"conv_in.weight": (1,)}, "is no ControlNet: it has no controlnet_down_blocks"),
    ],
)
def test_other_additions_are_called_what_they_are(tiny, tmp_path, capsys, content, message):
    torch.save({name: torch.zeros(shape) for name, shape in content.items()}, tmp_path / "a.pth")
    arguments = ["--controlnet", str(tmp_path / "a.pth"), "--out", str(tmp_path / "out")]
    assert convert([str(tiny[0]), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning_embedding_out_channels": (4, 8, 8)}, "brings its condition to 1/4 of its"),
        ({"conditioning_channels": 4}, "takes conditions of 4 channels; images have 3"),
    ],
)
def test_a_condition_that_is_no_image_is_refused(tiny, tmp_path, capsys, options, message):
    config = {**make_controlnet().config, **options, "_use_default_values": []}
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "other")
    arguments = ["--controlnet", str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    assert convert([str(tiny[0]), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def walk(tmp_path) -> Path:
    """A video of five frames, at another rate than the model's."""
    write_video(tmp_path / "walk.mp4", poses(5), fps=24)
    return tmp_path / "walk.mp4"


def test_the_command_follows_a_video_at_its_rate(converted, walk, tmp_path, monkeypatch, capsys):
    given = {}

    def without_sampling(_pipe, request, *_):
        given.update(request.options)
        return np.zeros((1, 3, *SIZE.values(), 3), np.uint8), {}

    monkeypatch.setattr(sample, "sample", without_sampling)
    out = ["--prompt", "a", "--condition", str(walk), "--out", str(tmp_path / "out.mp4")]
    out += ["--control-guidance-end", "0.5"]
    assert sample.main(["--checkpoint", str(converted), *SMALL, *out]) == 0
    shown = capsys.readouterr().out
    assert "walk.mp4 has 5 frames; the first 3 are used" in shown
    assert "the result has the condition's 24 frames a second" in shown
    assert imageio.immeta(tmp_path / "out.mp4", plugin="FFMPEG")["fps"] == 24
    np.testing.assert_array_equal(given["conditioning_frames"], read_video(walk)[:3])
    assert given["control_guidance_end"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has a ControlNet; pass --condition VIDEO"),
        (["--condition", "{tmp}/a.png@0"], "@FRAME is for SparseCtrl"),
        (["--condition", "{tmp}/a.png", "{tmp}/a.png"], "2 conditioning frames were given for a"),
        (["--condition", "{tmp}/walk.mp4", "--width", "16"], "conditioning frame 0 has 16x24"),
        (["--condition", "{tmp}/walk.mp4", "--control-guidance-end", "0"], "0 <= start < end <= 1"),
        (["--condition", "{tmp}/walk.mp4", "--controlnet-conditioning-scale", "nan"], "be finite"),
    ],
)
def test_bad_conditions_are_one_line(converted, walk, tmp_path, capsys, arguments, message):
    imageio.imwrite(tmp_path / "a.png", poses(1)[0])
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    out = ["--prompt", "a", "--out", str(tmp_path / "out.gif")]
    assert sample.main(["--checkpoint", str(converted), *SMALL, *arguments, *out]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.gif").exists()


@pytest.mark.parametrize("name", ["control_v11e_sd15_shuffle.pth", "x_shuffle_fp16.pth"])
def test_a_controlnet_that_averages_what_it_adds_is_refused_by_its_name(tiny, tmp_path, name):
    torch.save({"input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(qvd_jax.InputError, match="global_pool_conditions = True, as of every"):
        open_source(tiny[0], controlnet=tmp_path / name)


def test_a_scale_needs_a_controlnet(tiny_checkpoint, tmp_path, capsys):
    out = ["--controlnet-conditioning-scale", "0.5", "--out", str(tmp_path / "out.gif")]
    assert sample.main(["--checkpoint", str(tiny_checkpoint), "--prompt", "a", *out]) == 2
    message = "follows no --condition; leave --controlnet-conditioning-scale out"
    assert message in capsys.readouterr().err
    pipe = qvd_jax.load(tiny_checkpoint)
    with pytest.raises(qvd_jax.InputError, match="the model has no ControlNet"):
        pipe("a", control_guidance_end=0.5)
