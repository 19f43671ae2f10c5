"""Float parity of whole UNets and ControlNets with PyTorch, on shared random weights."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from original_norms import original_norms
from parity import (
    BATCH,
    FRAMES,
    HEIGHT,
    TOLERANCE,
    WIDTH,
    from_torch,
    relative_error,
    tensors_of,
    to_torch,
    transfer,
    transfer_call,
    video,
)
from random_animatediff import CHANNELS, randomize
from random_families import RGB, SCRIBBLE, make_controlnet, make_sparsectrl_module

from convert.animatediff import unet_config
from convert.controlnet import open_controlnet
from qvd_jax.models.configs import MODELSCOPE, STABLE_VIDEO_DIFFUSION, UNet3DConfig, animatediff
from qvd_jax.models.controlnet import ControlNet, Residuals
from qvd_jax.models.layers import FLOAT
from qvd_jax.models.unet3d import UNet3D

pytestmark = pytest.mark.usefixtures("torch_seeded")

SMALL = UNet3DConfig(
    block_channels=CHANNELS,
    layers_per_block=1,
    attention_levels=(True, False),
    num_heads=(4, 4),
    temporal_heads=(4, 4),
    context_dim=24,
    norm_groups=8,
    down_eps=(1e-5, 1e-5),
    up_eps=(1e-5, 1e-5),
    max_frames=32,
)


def make_unet(version: str) -> UNetMotionModel:
    """The four levels of a version with narrow layers; one layer a block keeps compilation short.

    The two layers of the published models run in the stages above.
    """
    unet = UNetMotionModel(
        block_out_channels=(16, 24, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=24 if version == "v1" else 32,
        use_motion_mid_block=version == "v2",
    )
    randomize(unet)
    return unet.eval()


def forward(
    unet: torch.nn.Module, latents: np.ndarray, *inputs: np.ndarray, channel_axis: int = 1
) -> np.ndarray:
    """What a network of diffusers makes of `[B, F, H, W, C]`, in the same axes."""
    seen = np.moveaxis(latents, -1, channel_axis)
    with torch.no_grad():
        found = unet(*map(torch.from_numpy, (seen, *inputs))).sample
    return np.moveaxis(found.numpy(), channel_axis, -1)


@pytest.mark.parametrize(
    ("version", "original"),
    # The original scopes of v3 are those of v2.
    [
        ("v2", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("v1", False), ("v2", False), ("v3", False), ("v1", True))
        ),
    ],
)
def test_unet_whole(version, original):
    # Of 10, 5, 3, 2 and 20, 10, 5, 3 positions, as 640x320 pixels have in the published models.
    frames, height, width = 5, 10, 20
    unet = make_unet(version)
    config, _ = unet_config(
        tensors_of(unet), unet.config, None, original_norms=original, where="unet"
    )
    published = animatediff(version, "original" if original else "diffusers")
    for field in (
        "max_frames",
        "temporal_mid_block",
        "temporal_norm_scope",
        "resnet_norm_scope",
        "attention_levels",
    ):
        assert getattr(config, field) == getattr(published, field)
    module = UNet3D(config)
    latents, timesteps = video(BATCH, frames, height, width, 4), np.float32([961, 500])
    text = video(BATCH, 7, 24, seed=1)
    variables = transfer(unet, module, latents, timesteps, text)
    if original:
        original_norms(unet, version, frames)
    expected = forward(unet, latents, timesteps, text.repeat(frames, 0))
    found = jax.jit(module.apply)(variables, latents, timesteps, text)
    assert relative_error(found, expected) <= TOLERANCE


def test_unet_of_modelscope_whole():
    """Temporal convolutions and transformers, and the transformer behind conv_in."""
    unet = UNet3DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
    ).eval()
    config = replace(
        MODELSCOPE,
        block_channels=(16, 32),
        layers_per_block=1,
        attention_levels=(True, False),
        num_heads=(4, 8),
        temporal_heads=(4, 8),
        context_dim=24,
        norm_groups=8,
        down_eps=(1e-5, 1e-5),
        up_eps=(1e-5, 1e-5),
        input_transformer_channels=32,
    )
    latents, timesteps = video(BATCH, FRAMES, HEIGHT, WIDTH, 4), np.float32([961, 500])
    text = video(BATCH, 7, 24, seed=1)
    randomize(unet)
    module = UNet3D(config)
    variables = transfer(unet, module, latents, timesteps, text)
    expected = forward(unet, latents, timesteps, text)
    found = jax.jit(module.apply)(variables, latents, timesteps, text)
    assert relative_error(found, expected) <= TOLERANCE


def test_unet_of_stable_video_diffusion_whole():
    """Blended temporal branches, added ids, one context token, epsilons that differ by block."""
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=(4, 8),
        projection_class_embeddings_input_dim=768,
    ).eval()
    config = replace(
        STABLE_VIDEO_DIFFUSION,
        block_channels=(32, 64),
        layers_per_block=1,
        attention_levels=(True, False),
        num_heads=(4, 8),
        temporal_heads=(4, 8),
        context_dim=24,
        down_eps=(1e-6, 1e-5),
        up_eps=(1e-6, 1e-6),
    )
    latents, timesteps = video(BATCH, FRAMES, HEIGHT, WIDTH, 8), np.float32([1.6, -0.5])
    text, ids = video(BATCH, 1, 24, seed=1), np.float32([[6, 127, 0.02], [7, 100, 0.1]])
    randomize(unet)
    module = UNet3D(config)
    variables = transfer(unet, module, latents, timesteps, text, ids)
    expected = forward(unet, latents, timesteps, text, ids, channel_axis=2)
    found = jax.jit(module.apply)(variables, latents, timesteps, text, ids)
    assert relative_error(found, expected) <= TOLERANCE


def run_controlnet(
    module: ControlNet, latents: Any, timesteps: Any, text: Any, control: Any
) -> Residuals:
    return module(
        latents,
        module.temporal_features(timesteps),
        module.context_features(text),
        module.control_features(control),
    )


@pytest.mark.parametrize(
    ("kind", "original"), [(RGB, False), (SCRIBBLE, False), (RGB, True), ("image", False)]
)
def test_controlnet_whole(kind, original, tmp_path):
    """SparseCtrl with either condition, and an ordinary ControlNet, frame by frame."""
    published = make_controlnet().eval() if kind == "image" else make_sparsectrl_module(kind)
    randomize(published)
    published.save_pretrained(tmp_path)
    config = open_controlnet(tmp_path, {}).config
    if original:
        config = replace(config, temporal_norm_scope="frame")
    scale = 1 if kind == RGB else 2
    latents, timesteps = video(BATCH, FRAMES, HEIGHT, WIDTH, 4), np.float32([500])
    text = video(BATCH, 7, 24, seed=1)
    control = video(BATCH, FRAMES, scale * HEIGHT, scale * WIDTH, config.condition_channels, seed=2)
    module = ControlNet(SMALL, config, FLOAT)
    inputs = latents, timesteps, text, control
    variables = transfer_call(published, run_controlnet, module, *inputs)
    if original:
        original_norms(published, "v3", FRAMES)
    told = torch.from_numpy(text).repeat_interleave(FRAMES, 0)
    with torch.no_grad():
        if kind == "image":
            down, mid = published(
                to_torch(latents), 500, told, to_torch(control), return_dict=False
            )
        else:
            sample, condition = (
                torch.from_numpy(x).permute(0, 4, 1, 2, 3) for x in (latents, control)
            )
            down, mid = published(
                sample, 500, told, condition[:, :-1], conditioning_mask=condition[:, -1:],
                return_dict=False,
            )  # fmt: skip
    found = jax.jit(nn.apply(run_controlnet, module))(variables, *inputs)
    assert len(found.down) == len(down)
    for one, expected in zip((*found.down, found.mid), (*down, mid), strict=True):
        assert relative_error(one, from_torch(expected)) <= TOLERANCE


def test_added_ids_must_match_the_config():
    module = UNet3D(SMALL)
    latents, text = jnp.zeros((1, 1, 8, 8, 4)), jnp.zeros((1, 1, 24))
    with pytest.raises(ValueError, match="takes 0 added ids, some were given"):
        jax.eval_shape(
            module.init, jax.random.key(0), latents, jnp.zeros(1), text, jnp.zeros((1, 3))
        )
