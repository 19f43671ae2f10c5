"""Float parity of every block and stage with PyTorch, on shared random weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalConvLayer
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import (
    TransformerSpatioTemporalModel,
    TransformerTemporalModel,
)
from diffusers.models.unets.unet_motion_model import (
    AnimateDiffTransformer3D,
    CrossAttnDownBlockMotion,
    CrossAttnUpBlockMotion,
    DownBlockMotion,
    UNetMidBlockCrossAttnMotion,
    UpBlockMotion,
)
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
from random_animatediff import randomize

from convert import names
from qvd_jax.models.attention import (
    SpatialTransformer,
    SpatioTemporalTransformer,
    TemporalTransformer,
)
from qvd_jax.models.blocks import ResnetBlock, SpatioTemporalResnet, TemporalConv
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.layers import FLOAT
from qvd_jax.models.stages import Stage

pytestmark = pytest.mark.usefixtures("torch_seeded")


@pytest.mark.parametrize("channels", [(64, 64), (96, 64)])
def test_resnet(channels):
    inside, outside = channels
    block = ResnetBlock2D(in_channels=inside, out_channels=outside, temb_channels=40, groups=32)
    block.eps = 1e-5
    randomize(block)
    for norm in (block.norm1, block.norm2):
        norm.eps = 1e-5
    module = ResnetBlock(inside, outside, 32, 1e-5, "frame", FLOAT)
    x, embedding = video(BATCH, FRAMES, HEIGHT, WIDTH, inside), video(BATCH, 40, seed=1)
    expected = block(to_torch(x), torch.from_numpy(embedding).repeat_interleave(FRAMES, 0))

    def run(module: ResnetBlock, x: Any, embedding: Any) -> Any:
        return module(x, module.temporal_features(nn.silu(embedding)))

    bound = nn.apply(run, module)
    shapes_from = nn.init(run, module)
    shapes = jax.eval_shape(shapes_from, jax.random.key(0), x, embedding)["params"]
    tensors = tensors_of(block)
    params = names.build_params(shapes, names.UNET, tensors, jnp.float32, lambda count: None)
    found = jax.jit(bound)({"params": params}, x, embedding)
    assert relative_error(found, from_torch(expected)) <= TOLERANCE


def run_transformer(module: SpatialTransformer, x: Any, text: Any) -> Any:
    return module(x, module.context_features(text))


def test_spatial_transformer():
    block = Transformer2DModel(8, 8, 64, cross_attention_dim=24, norm_num_groups=32)
    randomize(block)
    module = SpatialTransformer(64, 8, 32, FLOAT)
    x, text = video(BATCH, FRAMES, HEIGHT, WIDTH, 64), video(BATCH, 7, 24, seed=1)
    expected = block(to_torch(x), torch.from_numpy(text).repeat_interleave(FRAMES, 0)).sample
    call = nn.apply(run_transformer, module)
    variables = transfer_call(block, run_transformer, module, x, text)
    assert relative_error(jax.jit(call)(variables, x, text), from_torch(expected)) <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 5, 24])
def test_motion_module(frames):
    block = AnimateDiffTransformer3D(
        8,
        8,
        in_channels=64,
        norm_num_groups=32,
        activation_fn="geglu",
        double_self_attention=True,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=24,
    )
    randomize(block)
    module = TemporalTransformer(64, 64, 8, 24, 32, "joint", FLOAT)
    x = video(BATCH, frames, HEIGHT, WIDTH, 64)
    expected = from_torch(block(to_torch(x), num_frames=frames), frames)
    found = jax.jit(module.apply)(transfer(block, module, x), x)
    assert relative_error(found, expected) <= TOLERANCE


def test_temporal_conv_of_modelscope():
    block = TemporalConvLayer(64, norm_num_groups=32).eval()
    randomize(block)
    module = TemporalConv(64, 32, "joint", FLOAT)
    x = video(BATCH, FRAMES, HEIGHT, WIDTH, 64)
    expected = from_torch(block(to_torch(x), num_frames=FRAMES))
    found = jax.jit(module.apply)(transfer(block, module, x), x)
    assert relative_error(found, expected) <= TOLERANCE


def test_temporal_transformer_of_modelscope():
    block = TransformerTemporalModel(8, 8, in_channels=64, norm_num_groups=32).eval()
    randomize(block)
    module = TemporalTransformer(64, 64, 8, None, 32, "joint", FLOAT)
    x = video(BATCH, FRAMES, HEIGHT, WIDTH, 64)
    expected = from_torch(block(to_torch(x), num_frames=FRAMES).sample)
    found = jax.jit(module.apply)(transfer(block, module, x), x)
    assert relative_error(found, expected) <= TOLERANCE


def run_resnet(module: SpatioTemporalResnet, x: Any, embedding: Any) -> Any:
    return module(x, module.temporal_features(nn.silu(embedding)))


@pytest.mark.parametrize("channels", [(64, 64), (96, 64)])
def test_blended_resnet_of_stable_video_diffusion(channels):
    block = SpatioTemporalResBlock(*channels, temb_channels=40, eps=1e-5, temporal_eps=1e-6).eval()
    randomize(block)
    module = SpatioTemporalResnet(*channels, 32, 1e-5, "frame", FLOAT, temporal_epsilon=1e-6)
    x, embedding = video(BATCH, FRAMES, HEIGHT, WIDTH, channels[0]), video(BATCH, 40, seed=1)
    each = torch.from_numpy(embedding).repeat_interleave(FRAMES, 0)
    expected = from_torch(block(to_torch(x), each, torch.zeros(BATCH, FRAMES)))
    variables = transfer_call(block, run_resnet, module, x, embedding)
    found = jax.jit(nn.apply(run_resnet, module))(variables, x, embedding)
    assert relative_error(found, expected) <= TOLERANCE


def test_blended_transformer_of_stable_video_diffusion():
    block = TransformerSpatioTemporalModel(8, 8, 64, cross_attention_dim=24).eval()
    randomize(block)
    module = SpatioTemporalTransformer(64, 8, 32, FLOAT)
    x, text = video(BATCH, FRAMES, HEIGHT, WIDTH, 64), video(BATCH, 1, 24, seed=1)
    each = torch.from_numpy(text).repeat_interleave(FRAMES, 0)
    expected = block(to_torch(x), each, torch.zeros(BATCH, FRAMES)).sample
    variables = transfer_call(block, run_transformer, module, x, text)
    found = jax.jit(nn.apply(run_transformer, module))(variables, x, text)
    assert relative_error(found, from_torch(expected)) <= TOLERANCE


def test_motion_module_refuses_more_frames_than_positions():
    module = TemporalTransformer(64, 64, 8, 24, 32, "joint", FLOAT)
    x = jnp.zeros((1, 25, 1, 1, 64))
    with pytest.raises(ValueError, match="25 frames are more than the motion module's 24"):
        module.init(jax.random.key(0), x)


STAGE = {
    "temb_channels": 40,
    "resnet_eps": 1e-5,
    "resnet_groups": 8,
    "temporal_num_attention_heads": 4,
}
CONFIG = UNet3DConfig(
    block_channels=(32, 64),
    attention_levels=(True, False),
    num_heads=(4, 4),
    temporal_heads=(4, 4),
    context_dim=24,
    norm_groups=8,
    down_eps=(1e-5, 1e-5),
    up_eps=(1e-5, 1e-5),
)
CROSS = {"cross_attention_dim": 24, "num_attention_heads": 4}


@pytest.mark.parametrize("attention", [True, False])
def test_down_stage(attention):
    make = CrossAttnDownBlockMotion if attention else DownBlockMotion
    block = make(
        in_channels=16, out_channels=32, num_layers=2, **STAGE, **(CROSS if attention else {})
    )
    module = Stage(CONFIG, 0, (16, 32), 1e-5, (attention,) * 2, (True,) * 2, "down", FLOAT)
    check_stage(block, module, skips=[], attention=attention)


@pytest.mark.parametrize("attention", [True, False])
def test_up_stage(attention):
    make = CrossAttnUpBlockMotion if attention else UpBlockMotion
    block = make(
        in_channels=16,
        prev_output_channel=64,
        out_channels=32,
        num_layers=3,
        **STAGE,
        **(CROSS if attention else {}),
    )
    inputs = (64 + 32, 32 + 32, 32 + 16)
    module = Stage(CONFIG, 0, inputs, 1e-5, (attention,) * 3, (True,) * 3, "up", FLOAT)
    check_stage(block, module, skips=[16, 32, 32], attention=attention)


def test_mid_stage():
    block = UNetMidBlockCrossAttnMotion(in_channels=64, **STAGE, **CROSS)
    module = Stage(CONFIG, 1, (64, 64), 1e-5, (True, False), (True, False), None, FLOAT)
    check_stage(block, module, skips=[], attention=True)


def check_stage(block: Any, module: Stage, skips: list[int], attention: bool) -> None:
    randomize(block)
    width = module.in_channels[0] - (skips[-1] if skips else 0)
    x, embedding = video(BATCH, FRAMES, HEIGHT, WIDTH, width), video(BATCH, 40, seed=1)
    text = video(BATCH, 7, 24, seed=2)
    skip_videos = [video(BATCH, FRAMES, HEIGHT, WIDTH, c, seed=3 + i) for i, c in enumerate(skips)]

    def call(module: Stage, x: Any, embedding: Any, text: Any, skip_videos: Any) -> Any:
        temporal = module.temporal_features(nn.silu(embedding))
        context = module.context_features(text)
        return module(x, temporal, context, list(skip_videos) if skips else None)

    inputs = (x, embedding, text, skip_videos)
    variables = transfer_call(block, call, module, *inputs)
    found, results = jax.jit(nn.apply(call, module))(variables, *inputs)

    arguments: dict[str, Any] = {
        "hidden_states": to_torch(x),
        "temb": torch.from_numpy(embedding).repeat_interleave(FRAMES, 0),
        "num_frames": FRAMES,
    }
    if attention:
        arguments["encoder_hidden_states"] = torch.from_numpy(text).repeat_interleave(FRAMES, 0)
    if skips:
        arguments["res_hidden_states_tuple"] = tuple(to_torch(s) for s in skip_videos)
    expected = block(**arguments)
    if isinstance(expected, tuple):
        expected, states = expected
        for result, state in zip(results, states, strict=True):
            assert relative_error(result, from_torch(state)) <= TOLERANCE
    assert relative_error(found, from_torch(expected)) <= TOLERANCE
