"""ModelScope from a folder that diffusers saved to the same latents."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from parity import relative_error
from pytorch_sources import ldm_unet
from random_families import make_modelscope, original_modelscope

import qvd_jax
from convert import ldm, names
from convert.__main__ import main as convert
from qvd_jax.models.clip import OPENCLIP_H
from qvd_jax.models.configs import MODELSCOPE
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.components import ComponentConfigs

Tiny = tuple[Path, TextToVideoSDPipeline]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("modelscope") / "tiny"
    return folder, make_modelscope(folder)


@pytest.fixture(scope="module")
def converted(tiny: Tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("qvd_jax") / "modelscope"
    assert convert([str(tiny[0]), "--out", str(out)]) == 0
    return out


def test_latents_equal_diffusers_pipeline(tiny: Tiny, converted: Path):
    """Same folder, same noise, 4 steps, guidance, negative prompt."""
    pipe = qvd_jax.load(converted)
    assert pipe.description == "ModelScope"
    assert pipe.family == "modelscope"
    assert pipe.defaults.guidance_scale == 9.0
    assert pipe.unet.config.num_heads == (4, 8)
    latents = np.random.default_rng(0).standard_normal((1, 3, 8, 12, 4), dtype=np.float32)
    expected = tiny[1](
        "a red circle",
        negative_prompt="bad",
        num_frames=3,
        height=16,
        width=24,
        num_inference_steps=4,
        guidance_scale=9.0,
        latents=torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
        output_type="latent",
    ).frames.permute(0, 2, 3, 4, 1)
    found = pipe(
        "a red circle", "bad", frames=3, height=16, width=24, steps=4, latents=latents,
        output_type="latents",
    )  # fmt: skip
    assert relative_error(found, expected) <= 1e-3


def test_names_are_those_of_the_real_model():
    """A bijection at full size, from shapes alone."""
    with torch.device("meta"):
        unet = UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64)
    shapes = ComponentConfigs(MODELSCOPE, VAEConfig(), OPENCLIP_H).param_shapes("float32")["unet"]
    paths = ["/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(shapes)]
    found = [name for path in paths for name in names.UNET(path)]
    assert len(found) == len(set(found))
    assert set(found) == set(unet.state_dict())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert parameters == sum(p.numel() for p in unet.parameters()) == 1_411_233_860
    original = ldm_unet(unet.state_dict(), (True, True, True, False), 2)
    assert "input_blocks.3.op.weight" in original
    assert "output_blocks.11.0.temopral_conv.conv4.3.weight" in original
    assert set(ldm.rename_unet(original)) == set(unet.state_dict())


def make_original(tiny: Tiny, folder: Path) -> Path:
    """The folder without its UNet; the UNet's original file beside it."""
    folder.mkdir()
    for part in tiny[0].iterdir():
        if part.name != "unet":
            (folder / part.name).symlink_to(part)
    torch.save(original_modelscope(tiny[1]), folder.parent / "text2video_pytorch_model.pth")
    return folder.parent / "text2video_pytorch_model.pth"


def test_original_unet_gives_what_the_folder_gives(tiny: Tiny, converted: Path, tmp_path):
    file = make_original(tiny, tmp_path / "source")
    transformers = 5  # behind conv_in, down, in the middle, and two up
    assert sum(t.ndim == 3 for t in torch.load(file).values()) == 2 * transformers
    out = tmp_path / "out"
    assert convert([str(tmp_path / "source"), "--unet", str(file), "--out", str(out)]) == 0
    expected, found = qvd_jax.load(converted), qvd_jax.load(out)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.unet.config.num_heads == (1, 2)  # of 64 channels each
    assert found.scheduler == expected.scheduler


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--motion", "x.ckpt"], "is ModelScope, which has no --motion"),
        ({"attention_head_dim": 7}, [], r"attention_head_dim = 7 does not divide"),
        ({"attention_head_dim": [8, 8]}, [], "attention_head_dim: one positive integer"),
        ({"act_fn": "gelu"}, [], "act_fn = 'gelu' is not supported"),
        ({}, ["--unet", "{tmp}/none.pth"], "none.pth does not exist"),
        ({}, ["--unet", "{tmp}/tensors.pth"], "tensors.pth holds no original UNet"),
    ],
)
def test_bad_folders_end_with_one_message(tiny: Tiny, tmp_path, capsys, change, arguments, message):
    folder = tmp_path / "source"
    folder.mkdir()
    for part in tiny[0].iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "unet").unlink()
    (folder / "unet").mkdir()
    for file in (tiny[0] / "unet").iterdir():
        (folder / "unet" / file.name).symlink_to(file)
    config = json.loads((tiny[0] / "unet" / "config.json").read_text()) | change
    (folder / "unet" / "config.json").unlink()
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "tensors.pth")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert convert([str(folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
