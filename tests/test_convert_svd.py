"""Stable Video Diffusion from a folder that diffusers saved to the same latents."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as published
from parity import relative_error
from PIL import Image
from pytorch_sources import ldm_unet, open_clip_visual, read_weights, svd_vae
from random_families import make_svd, original_svd
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import qvd_jax
from convert import companions, ldm, names, svd
from convert.__main__ import main as convert
from convert.single_file import SVD_VISION
from convert.tensors import LazyTensor
from qvd_jax import calibrate, memory, sample
from qvd_jax.diffusion import schedules
from qvd_jax.memory import tree_bytes
from qvd_jax.models.configs import STABLE_VIDEO_DIFFUSION
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.image_to_video import resize_antialiased

Tiny = tuple[Path, StableVideoDiffusionPipeline]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("svd") / "tiny"
    return folder, make_svd(folder)


@pytest.fixture(scope="module")
def converted(tiny: Tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("qvd_jax") / "svd"
    assert convert([str(tiny[0]), "--out", str(out)]) == 0
    return out


def picture(height: int = 16, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def published_latents(
    pipe: StableVideoDiffusionPipeline,
    images: list[np.ndarray],
    latents: np.ndarray,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    **options: float,
) -> np.ndarray:
    """Latents `[B, F, h, w, C]` of diffusers, from our noise on latents and images."""
    height, width, channels = images[0].shape
    base = jax.random.key(seed)
    keys = [jax.random.fold_in(jax.random.fold_in(base, i), 0) for i in range(len(images))]
    noise = [np.asarray(jax.random.normal(key, (height, width, channels))) for key in keys]
    on_images = torch.tensor(np.stack(noise)).permute(0, 3, 1, 2)
    monkeypatch.setattr(published, "randn_tensor", lambda *_, **__: on_images)
    with torch.no_grad():
        found = pipe(
            [Image.fromarray(image) for image in images],
            height=height,
            width=width,
            latents=torch.tensor(latents).permute(0, 1, 4, 2, 3),
            output_type="latent",
            **options,
        ).frames
    return found.permute(0, 1, 3, 4, 2).numpy()


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_latents_and_pixels_equal_diffusers_pipeline(tiny, converted, monkeypatch, guidance):
    """Two images, same noise on latents and images, 4 steps, guidance that grows by frame."""
    pipe = qvd_jax.load(converted)
    assert pipe.family == "svd"
    assert pipe.defaults.frames == 3
    images = [picture(seed=0), picture(seed=1)]
    latents = np.random.default_rng(0).standard_normal((2, 3, 8, 12, 4), dtype=np.float32)
    told = {"fps": 9, "motion_bucket_id": 100, "noise_aug_strength": 0.1}
    expected = published_latents(
        tiny[1],
        images,
        latents,
        5,
        monkeypatch,
        num_inference_steps=4,
        max_guidance_scale=guidance,
        **told,
    )
    options = {
        "height": 16,
        "width": 24,
        "steps": 4,
        "guidance_scale": guidance,
        "seed": 5,
        **told,
    }
    shown = [Image.fromarray(image) for image in images]
    found = pipe(shown, **options, latents=latents, output_type="latents")
    assert relative_error(found, expected) <= 1e-3
    with torch.no_grad():
        theirs = torch.from_numpy(expected).permute(0, 1, 4, 2, 3)
        pixels = tiny[1].decode_latents(theirs, 3, 3).permute(0, 2, 3, 4, 1)
    expected_video = (pixels / 2 + 0.5).clamp(0, 1).numpy() * 255
    assert np.abs(pipe.decode(found) - expected_video).max() <= 1


def test_decoding_in_chunks_equals_diffusers(tiny, converted, monkeypatch):
    """Frames do not see beyond their chunk, so it has all of them where memory allows."""
    pipe = qvd_jax.load(converted)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 12, 4), dtype=np.float32)
    # As if half of the memory held two and a half frames.
    needed = tree_bytes(pipe.params["vae"]) + memory.total_bytes() // 5
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: needed)
    with torch.no_grad():
        theirs = torch.from_numpy(latents).permute(0, 1, 4, 2, 3)
        pixels = tiny[1].decode_latents(theirs, 4, 2).permute(0, 2, 3, 4, 1)
    expected = (pixels / 2 + 0.5).clamp(0, 1).numpy() * 255
    assert np.abs(pipe.decode(latents) - expected).max() <= 1


@pytest.mark.parametrize("size", [(576, 1024), (300, 224), (40, 90)])
def test_images_are_resized_as_published(size):
    image = np.random.default_rng(0).uniform(-1, 1, (*size, 3))
    published_image = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = published._resize_with_antialiasing(published_image, (224, 224))[0]
    assert relative_error(resize_antialiased(image, 224), expected.permute(1, 2, 0)) <= 1e-6


def test_names_are_those_of_the_real_model():
    """A bijection at full size, from shapes alone, but for the weights without effect."""
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel()
        vae = AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            layers_per_block=2,
        )
    configs = ComponentConfigs(STABLE_VIDEO_DIFFUSION, VAEConfig(temporal_decoder=True))
    shapes = configs.param_shapes("float32")
    for module, params, name_of, parameters in (
        (unet, shapes["unet"], names.UNET, 1_524_623_082 - 50_389_760),
        (vae, shapes["vae"], names.VAE, 97_742_847),
    ):
        paths = ["/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(params)]
        found = [name for path in paths for name in name_of(path)]
        assert len(found) == len(set(found))
        assert set(found) == set(svd.without_dead(module.state_dict()))
        original = (
            ldm.rename_unet(ldm_unet(module.state_dict(), (True, True, True, False), 2))
            if module is unet
            else ldm.rename_vae(svd_vae(module.state_dict(), 4))
        )
        assert set(original) == set(module.state_dict())
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_names_of_the_real_image_encoder():
    """A bijection at full size, from open_clip's ViT-H to transformers' names and to ours."""
    size = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    size |= {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 1024}
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**size, hidden_act="gelu"))
    weights = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    original = {
        name: LazyTensor(tuple(tensor.shape), None)
        for name, tensor in open_clip_visual(weights).items()
    }
    assert "transformer.resblocks.31.attn.in_proj_weight" in original
    renamed = ldm.rename_clip_vision(original)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }
    config, _ = companions.vision_config(renamed, SVD_VISION, "image_encoder")
    configs = ComponentConfigs(
        STABLE_VIDEO_DIFFUSION, VAEConfig(temporal_decoder=True), image_encoder=config
    )
    shapes = configs.param_shapes("float32")["image_encoder"]
    names.check_names(shapes, names.CLIP_VISION, renamed, "image_encoder")
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 632_076_800


def test_original_file_gives_what_the_folder_gives(tiny, converted, tmp_path, capsys):
    save_file(original_svd(tiny[1]), tmp_path / "svd.safetensors")
    out = tmp_path / "out"
    assert convert([str(tmp_path / "svd.safetensors"), "--out", str(out)]) == 0
    assert "14 frames by default" in capsys.readouterr().out
    found, expected = qvd_jax.load(out), qvd_jax.load(converted)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    # The file has no scheduler: what it leaves open is what the folder's says. Euler has no types.
    schedulers = (
        replace(schedules.complete(pipe.scheduler), solver_type=None) for pipe in (found, expected)
    )
    assert len(set(schedulers)) == 1
    config = found.unet.config
    assert config.num_heads == config.temporal_heads == (1, 2)  # of 64 channels each
    # diffusers has 1e-6 in some stages, the original code nowhere.
    assert {*config.down_eps, *config.up_eps, config.mid_eps} == {1e-5}


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("first_stage_model.", "is no original file of Stable Video Diffusion"),
        (".time_stack.", "its UNet is not Stable Video Diffusion's, it mixes no frames"),
        ("visual.proj", "is no CLIP image encoder with a projection"),
        ("decoder.conv_out.time_mix_conv.bias", "- decoder.time_conv_out.bias"),
    ],
)
def test_bad_original_files_end_with_one_message(tiny, tmp_path, capsys, lost, message):
    weights = {name: t for name, t in original_svd(tiny[1]).items() if lost not in name}
    save_file(weights, tmp_path / "svd.safetensors")
    assert convert([str(tmp_path / "svd.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def rounded_to_8_bits(unet: UNetSpatioTemporalConditionModel) -> torch.nn.Module:
    """W8A8 as PyTorch has it: weights by output channel, each input over the range it has."""

    def round_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        low, high = inputs[0].amin().clamp(max=0), inputs[0].amax().clamp(min=0)
        scale = ((high - low) / 255).item()
        return torch.fake_quantize_per_tensor_affine(
            inputs[0], scale, round(-low.item() / scale), 0, 255
        )

    unet = copy.deepcopy(unet)
    for module in unet.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            weight = module.weight.data
            scales = weight.abs().flatten(1).amax(1) / 127
            zeros = torch.zeros(len(scales), dtype=torch.int32)
            module.weight.data = torch.fake_quantize_per_channel_affine(
                weight, scales, zeros, 0, -127, 127
            )
            module.register_forward_pre_hook(round_input)
    return unet


@pytest.mark.slow
def test_calibrate_and_sample_from_an_image(tiny, converted, tmp_path, monkeypatch, capsys):
    """Nearer to float than PyTorch's own rounding of every input over the range it has."""
    imageio.imwrite(tmp_path / "cat.png", picture())
    size = ["--image", str(tmp_path / "cat.png"), "--height", "16", "--width", "24", "--steps", "2"]
    int8 = tmp_path / "int8"
    assert calibrate.main(["--checkpoint", str(converted), "--out", str(int8), *size]) == 0
    table = capsys.readouterr().out
    assert "add_embedding/*" in table
    out = ["--out", str(tmp_path / "out")]
    assert sample.main(["--checkpoint", str(int8), *size, *out, "--motion-bucket-id", "9"]) == 0
    video = imageio.imread(tmp_path / "out" / "000-cat.mp4", plugin="FFMPEG")
    assert video.shape == (3, 16, 24, 3)

    pipe = qvd_jax.load(int8)
    latents = np.asarray(pipe.initial_noise(0, 1, pipe.latents_shape(3, 16, 24)))
    rounded = StableVideoDiffusionPipeline(
        **{**tiny[1].components, "unet": rounded_to_8_bits(tiny[1].unet)}
    )
    exact, theirs = (
        published_latents(p, [picture()], latents, 0, monkeypatch, num_inference_steps=2)
        for p in (tiny[1], rounded)
    )
    ours = pipe(picture(), height=16, width=24, steps=2, latents=latents, output_type="latents")
    error, allowed = (float(np.linalg.norm(latents - exact)) for latents in (ours, theirs))
    print(f"error of int8 {error:.2f}, of PyTorch's 8 bits {allowed:.2f}")
    assert error < allowed


_CAT = ["--image", "{tmp}/cat.png", "--height", "8", "--width", "12"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there are no images"),
        (["--prompt", "a"], "makes videos from images; pass --image FILE, not prompts"),
        (["--image", "{tmp}/none.png"], "none.png does not exist; an image is expected"),
        (["--image", "{tmp}/text.png"], "text.png is no image that Pillow knows"),
        (["--image", "{tmp}/deep.png"], "deep.png: 8 bits a channel are needed"),
        (["--image", "{tmp}/cat.png", "--height", "16"], "cat.png has 8x12 pixels"),
        ([*_CAT, "--motion-bucket-id", "-1"], "motion_bucket_id = -1: it must be 0 or more"),
        ([*_CAT, "--noise-aug-strength", "nan"], "noise_aug_strength = nan: it must be finite"),
        (
            [*_CAT, "--negative-prompt", "b"],
            "--negative-prompt has no meaning for a model of Stable Video Diffusion",
        ),
    ],
)
def test_bad_images_are_one_line(converted, tmp_path, capsys, arguments, message):
    (tmp_path / "text.png").write_text("no image")
    imageio.imwrite(tmp_path / "cat.png", picture(8, 12))
    imageio.imwrite(tmp_path / "deep.png", np.zeros((8, 12), np.uint16))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    out = ["--out", str(tmp_path / "out")]
    assert sample.main(["--checkpoint", str(converted), *arguments, *out]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--motion", "x.ckpt"], "is Stable Video Diffusion, which has no --motion"),
        ({}, ["--controlnet", "x.ckpt"], "is Stable Video Diffusion, which has no --controlnet"),
        ({}, ["--appearance-encoder", "x"], "which has no --appearance-encoder"),
        ({}, ["--preset", "lightning"], "is Stable Video Diffusion, which has no --preset"),
        ({"num_attention_heads": [4]}, [], "num_attention_heads: one positive integer, or 2"),
        ({"num_attention_heads": 5}, [], "num_heads = 5 does not divide the 64 channels"),
        ({"addition_time_embed_dim": 128}, [], "addition_time_embed_dim = 128"),
    ],
)
def test_bad_folders_end_with_one_message(tiny, tmp_path, capsys, change, arguments, message):
    folder = tmp_path / "source"
    (folder / "unet").mkdir(parents=True)
    for part in tiny[0].iterdir():
        if part.name != "unet":
            (folder / part.name).symlink_to(part)
    weights = "diffusion_pytorch_model.safetensors"
    (folder / "unet" / weights).symlink_to(tiny[0] / "unet" / weights)
    config = json.loads((tiny[0] / "unet" / "config.json").read_text()) | change
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    assert convert([str(folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inputs", [256, 700, 1280])
def test_relatives_that_are_told_other_numbers_are_refused(tiny, inputs):
    weights = read_weights(tiny[0] / "unet")
    tensors = {name: LazyTensor(tuple(tensor.shape), None) for name, tensor in weights.items()}
    tensors["add_embedding.linear_1.weight"] = LazyTensor((128, inputs), None)
    with pytest.raises(qvd_jax.InputError, match=f"takes {inputs} inputs; 768 are supported, of f"):
        svd.unet_config(tensors, {}, original_norms=False, where="x")
