"""SparseCtrl beside AnimateDiff, from folders and original files, to the same latents."""

from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
import torch
from diffusers import AnimateDiffSparseControlNetPipeline, SparseControlNetModel
from diffusers.pipelines.animatediff import pipeline_animatediff_sparsectrl as published
from parity import relative_error
from PIL import Image
from random_animatediff import make_adapter
from random_families import (
    RGB,
    SCRIBBLE,
    make_sparsectrl,
    make_sparsectrl_module,
    to_original,
)

import qvd_jax
from convert import animatediff as source
from convert import names, positions
from convert.__main__ import main as convert
from convert.controlnet import open_controlnet
from qvd_jax import calibrate, sample
from qvd_jax.models.configs import ControlNetConfig, animatediff
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.components import ComponentConfigs


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> Path:
    """The folders of both kinds, and an original file of each."""
    root = tmp_path_factory.mktemp("sparsectrl")
    for kind in (RGB, SCRIBBLE):
        make_sparsectrl(kind, root)
    return root


@pytest.fixture(scope="module", params=[RGB, SCRIBBLE])
def converted(request, tiny, folders, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("qvd_jax") / request.param
    controlnet = ["--controlnet", str(folders / request.param)]
    assert convert([str(tiny[0]), *controlnet, "--out", str(out)]) == 0
    return request.param, out


def picture(seed: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def test_latents_equal_diffusers_pipeline(converted, tiny, monkeypatch):
    """Two conditions of five frames, same noise, 4 steps, guidance."""
    kind, folder = converted
    pipe = qvd_jax.load(folder)
    parts = tiny[1].components
    theirs = AnimateDiffSparseControlNetPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        motion_adapter=parts["motion_adapter"],
        controlnet=make_sparsectrl_module(kind),
    )
    theirs.set_progress_bar_config(disable=True)
    key = jax.random.fold_in(jax.random.key(3), 2**32 - 1)
    noise = torch.tensor(np.asarray(jax.random.normal(key, (2, 8, 12, 4)))).permute(0, 3, 1, 2)

    def with_noise(encoded):
        return encoded.latent_dist.mean + encoded.latent_dist.std * noise

    monkeypatch.setattr(published, "retrieve_latents", with_noise)
    images, frames = [picture(0), picture(1)], [0, 3]
    latents = np.random.default_rng(0).standard_normal((1, 5, 8, 12, 4), dtype=np.float32)
    with torch.no_grad():
        expected = theirs(
            "a red circle",
            num_frames=5,
            height=16,
            width=24,
            num_inference_steps=4,
            guidance_scale=4.0,
            conditioning_frames=[Image.fromarray(image) for image in images],
            controlnet_frame_indices=frames,
            latents=torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
            output_type="latent",
        ).frames.permute(0, 2, 3, 4, 1)
    found = pipe(
        "a red circle",
        conditioning_frames=images,
        controlnet_frame_indices=frames,
        frames=5,
        height=16,
        width=24,
        steps=4,
        guidance_scale=4.0,
        seed=3,
        latents=latents,
        output_type="latents",
    )
    assert relative_error(found, expected) <= 1e-3


def test_frames_beyond_the_positions_keep_their_conditions(converted, caplog):
    """In windows, a condition is seen by those windows only that hold its frame, as is said."""
    pipe = qvd_jax.load(converted[1])
    config = replace(pipe.unet.config, max_frames=4)
    pipe = replace(pipe, unet=pipe.unet.clone(config=config))
    options = {"frames": 7, "height": 8, "width": 12, "steps": 1, "output_type": "latents"}
    first, other = (pipe("a", None, [picture(seed, 8, 12)], [0], **options) for seed in (0, 1))
    changed = np.abs(first - other).max((0, 2, 3, 4)) > 1e-6
    assert changed[:4].all()
    assert not changed[4:].any()
    assert "frames 4 to 6 are in no window with a conditioning frame" in caplog.text


@pytest.mark.parametrize("kind", [RGB, SCRIBBLE])
def test_an_original_file_is_its_folder(folders, kind):
    by_folder, config = open_controlnet(folders / kind, {})[:2]
    original, same = open_controlnet(folders / f"{kind}.ckpt", {})[:2]
    channels, widths = (5, ()) if kind == RGB else (4, (16, 32))
    # The original code normalizes every frame alone, diffusers all jointly.
    assert config == ControlNetConfig(channels, widths, 1, "joint", ignores_latents=True)
    assert same == replace(config, temporal_norm_scope="frame")
    assert original.keys() == by_folder.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(tensor.read(), by_folder[name].read())


@pytest.mark.slow
def test_calibrate_and_sample_with_a_condition(converted, tmp_path, monkeypatch, capsys):
    _, folder = converted
    imageio.imwrite(tmp_path / "first.png", picture(0, 8, 12))
    (tmp_path / "prompts.txt").write_text("a\n")
    options = ["--prompts-file", str(tmp_path / "prompts.txt"), "--frames", "2"]
    options += ["--height", "8", "--width", "12", "--steps", "2"]
    options += ["--condition", f"{tmp_path}/first.png@0"]
    policy = ["--policy", "minmax-w8a8"]
    int8 = tmp_path / "int8"
    assert calibrate.main(["--checkpoint", str(folder), "--out", str(int8), *policy, *options]) == 0
    assert "controlnet/conv_in" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "out.gif")]
    assert sample.main(["--checkpoint", str(int8), *options, *out]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has SparseCtrl; pass --condition IMAGE@FRAME"),
        (["--condition", "{tmp}/a.png"], "IMAGE@FRAME is expected"),
        (["--condition", "{tmp}/a.png@-1"], "IMAGE@FRAME is expected"),
        (["--condition", "{tmp}/none.png@0"], "none.png does not exist"),
        (["--condition", "{tmp}/a.png@2", "--frames", "2"], "there is no frame 2 of 2"),
        (["--condition", "{tmp}/a.png@0", "{tmp}/a.png@0"], "a frame of its own is needed"),
        (["--condition", "{tmp}/a.png@0", "--height", "16"], "the condition of frame 0 has 8x12"),
    ],
)
def test_bad_conditions_are_one_line(converted, tmp_path, capsys, arguments, message):
    imageio.imwrite(tmp_path / "a.png", picture(0, 8, 12))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    out = ["--prompt", "a", "--out", str(tmp_path / "out.gif")]
    assert sample.main(["--checkpoint", str(converted[1]), *arguments, *out]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.gif").exists()


def test_a_model_without_controlnet_takes_no_condition(tiny_checkpoint, tmp_path, capsys):
    options = ["--prompt", "a", "--condition", "a.png@0", "--out", str(tmp_path / "a.gif")]
    assert sample.main(["--checkpoint", str(tiny_checkpoint), *options]) == 2
    assert "follows no --condition; leave it out" in capsys.readouterr().err
    pipe = qvd_jax.load(tiny_checkpoint)
    with pytest.raises(qvd_jax.InputError, match="the model has no ControlNet"):
        pipe("a", conditioning_frames=[picture(0)], controlnet_frame_indices=[0])


def test_motion_modules_are_no_controlnet(tiny, tmp_path, capsys):
    make_adapter("v2").save_pretrained(tmp_path / "motion")
    options = ["--controlnet", str(tmp_path / "motion"), "--out", str(tmp_path / "out")]
    assert convert([str(tiny[0]), *options]) == 2
    assert (
        "is motion modules of AnimateDiff, which --motion takes: it has no controlnet_down_blocks"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", [RGB, SCRIBBLE])
def test_names_are_those_of_the_real_model(kind):
    """A bijection at full size, from the original's names and from shapes alone."""
    options = {"conditioning_channels": 4 if kind == RGB else 3}
    with torch.device("meta"):
        module = SparseControlNetModel(
            use_simplified_condition_embedding=kind == RGB, cross_attention_dim=768, **options
        )
    weights = module.state_dict()
    renamed = {source.rename_original(to_original(name)): None for name in weights}
    assert len(renamed) == len(weights)
    own = positions.without(weights).keys()
    assert positions.without(renamed).keys() == own
    config = replace(
        animatediff("v3"),
        controlnet=ControlNetConfig(
            condition_channels=1 + options["conditioning_channels"],
            embedding_channels=() if kind == RGB else (16, 32, 96, 256),
            motion_attentions=1,
            ignores_latents=True,
        ),
    )
    shapes = ComponentConfigs(config, VAEConfig()).param_shapes("float32")["unet"]["controlnet"]
    found = [
        name.removeprefix("controlnet.")
        for path, _ in jax.tree.leaves_with_path(shapes)
        for name in names.UNET("/".join(["controlnet", *(key.key for key in path)]))
    ]
    assert len(found) == len(set(found))
    assert set(found) == own
