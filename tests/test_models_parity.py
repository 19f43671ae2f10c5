"""Float parity of every block and every network with PyTorch, on shared random weights."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderKL as TorchVAE
from diffusers import (
    AutoencoderKLTemporalDecoder,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
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
from original_norms import original_norms
from random_animatediff import CHANNELS, randomize
from random_families import RGB, SCRIBBLE, make_controlnet, make_sparsectrl_module
from transformers import CLIPTextConfig as TorchCLIPConfig
from transformers import CLIPTextModel, CLIPVisionModelWithProjection
from transformers import CLIPVisionConfig as TorchCLIPVisionConfig

from convert import names, positions, svd
from convert.animatediff import unet_config
from convert.companions import rename_text, text_config, vae_config, vision_config
from convert.controlnet import open_controlnet
from convert.tensors import LazyTensor, Tensors
from qvd_jax.models.attention import (
    SpatialTransformer,
    SpatioTemporalTransformer,
    TemporalTransformer,
)
from qvd_jax.models.blocks import ResnetBlock, SpatioTemporalResnet, TemporalConv
from qvd_jax.models.clip import OPENCLIP_H, CLIPTextConfig, CLIPTextEncoder, CLIPVisionEncoder
from qvd_jax.models.configs import MODELSCOPE, STABLE_VIDEO_DIFFUSION, UNet3DConfig, animatediff
from qvd_jax.models.controlnet import ControlNet, Residuals
from qvd_jax.models.layers import FLOAT
from qvd_jax.models.stages import Stage
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.models.vae import AutoencoderKL

TOLERANCE = 1e-4
BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 5, 6
"""One side is odd: halves are rounded up on the way down, and doubled and cut on the way up."""


def tensors_of(module: torch.nn.Module) -> Tensors:
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.numpy)
        for name, tensor in module.state_dict().items()
    }


def transfer(torch_module: torch.nn.Module, module: nn.Module, *inputs: Any) -> Any:
    """The Flax variables of `module` with the weights of the PyTorch block."""

    # The name rules expect a parent in front of a block.
    def block_names(path: str) -> tuple[str, ...]:
        return tuple(name.removeprefix("x.") for name in names.UNET(f"x/{path}"))

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    tensors = positions.without(tensors_of(torch_module))
    if svd.is_svd(tensors) or isinstance(torch_module, TransformerSpatioTemporalModel):
        tensors = svd.without_dead(tensors)
    names.check_names(shapes, block_names, tensors, "block")
    params = names.build_params(shapes, block_names, tensors, jnp.float32, lambda count: None)
    return {"params": params}


def video(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    """`[B, F, H, W, C] -> [B * F, C, H, W]`."""
    return torch.from_numpy(x.reshape(-1, *x.shape[2:])).permute(0, 3, 1, 2).contiguous()


def from_torch(x: torch.Tensor, frames: int = FRAMES) -> np.ndarray:
    """`[B * F, C, H, W] -> [B, F, H, W, C]`."""
    return x.detach().permute(0, 2, 3, 1).unflatten(0, (-1, frames)).numpy()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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


def transfer_call(torch_module: torch.nn.Module, call: Any, module: nn.Module, *inputs: Any) -> Any:
    class Called(nn.Module):
        def init(self, *args: Any) -> Any:
            return nn.init(call, module)(*args)

    return transfer(torch_module, Called(), *inputs)


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


@pytest.mark.parametrize(
    ("version", "original"),
    # The original scopes of v3 are those of v2.
    [
        ("v3", False),
        ("v2", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("v1", False), ("v2", False), ("v1", True))
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
    with torch.no_grad():
        expected = unet(
            torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
            torch.from_numpy(timesteps),
            torch.from_numpy(text).repeat_interleave(frames, 0),
        ).sample.permute(0, 2, 3, 4, 1)
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
    with torch.no_grad():
        expected = unet(
            torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
            torch.from_numpy(timesteps),
            torch.from_numpy(text),
        ).sample.permute(0, 2, 3, 4, 1)
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
    with torch.no_grad():
        expected = unet(
            torch.from_numpy(latents).permute(0, 1, 4, 2, 3),
            torch.from_numpy(timesteps),
            torch.from_numpy(text),
            torch.from_numpy(ids),
        ).sample.permute(0, 1, 3, 4, 2)
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
    unet = UNet3DConfig(
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
    scale = 1 if kind == RGB else 2
    latents, timesteps = video(BATCH, FRAMES, HEIGHT, WIDTH, 4), np.float32([500])
    text = video(BATCH, 7, 24, seed=1)
    control = video(BATCH, FRAMES, scale * HEIGHT, scale * WIDTH, config.condition_channels, seed=2)
    module = ControlNet(unet, config, FLOAT)
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
    module = UNet3D(CONFIG)
    latents, text = jnp.zeros((1, 1, 8, 8, 4)), jnp.zeros((1, 1, 24))
    with pytest.raises(ValueError, match="takes 0 added ids, some were given"):
        jax.eval_shape(
            module.init, jax.random.key(0), latents, jnp.zeros(1), text, jnp.zeros((1, 3))
        )


@pytest.mark.parametrize("size", [(16, 24), (8, 40)])
def test_vae_encodes_and_decodes(size):
    vae = TorchVAE(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=8,
    )
    randomize(vae)
    tensors = tensors_of(vae)
    module = AutoencoderKL(vae_config(tensors, vae.config, "vae")[0])
    pixels = video(BATCH, FRAMES, *size, 3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    names.check_names(shapes, names.VAE, tensors, "vae")
    params = names.build_params(shapes, names.VAE, tensors, jnp.float32, lambda count: None)
    variables = {"params": params}
    posterior = vae.encode(to_torch(pixels)).latent_dist
    mean, log_variance = jax.jit(lambda v, x: module.apply(v, x, method="encode"))(
        variables, pixels
    )
    assert relative_error(mean, from_torch(posterior.mean)) <= TOLERANCE
    assert relative_error(log_variance, from_torch(posterior.logvar)) <= TOLERANCE
    latents = video(BATCH, FRAMES, size[0] // 4, size[1] // 4, 4)
    decoded = jax.jit(lambda v, x: module.apply(v, x, method="decode"))(variables, latents)
    assert relative_error(decoded, from_torch(vae.decode(to_torch(latents)).sample)) <= TOLERANCE


def test_temporal_vae_decodes():
    """SVD's decoder: blended resnets, other epsilons, a convolution over the frames at the end."""
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=2,
    ).eval()
    randomize(vae)
    tensors = tensors_of(vae)
    module = AutoencoderKL(vae_config(tensors, vae.config, "vae")[0])
    pixels, latents = video(1, 1, 8, 12, 3), video(BATCH, FRAMES, 4, 6, 4)
    shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    names.check_names(shapes, names.VAE, tensors, "vae")
    params = names.build_params(shapes, names.VAE, tensors, jnp.float32, lambda count: None)
    mean, _ = module.apply({"params": params}, pixels, method="encode")
    posterior = vae.encode(to_torch(pixels)).latent_dist
    assert relative_error(mean, from_torch(posterior.mode(), 1)) <= TOLERANCE
    decoded = jax.jit(lambda v, x: module.apply(v, x, method="decode"))({"params": params}, latents)
    expected = vae.decode(to_torch(latents), num_frames=FRAMES).sample
    assert relative_error(decoded, from_torch(expected)) <= TOLERANCE


def test_clip_vision():
    tower = CLIPVisionModelWithProjection(
        TorchCLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=16,
            image_size=28,
            patch_size=14,
            projection_dim=24,
            hidden_act="gelu",
        )
    ).eval()
    randomize(tower)
    tensors = tensors_of(tower)
    module = CLIPVisionEncoder(vision_config(tensors, tower.config.to_dict(), "tower")[0])
    pixels = video(BATCH, 28, 28, 3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    names.check_names(shapes, names.CLIP_VISION, tensors, "tower")
    params = names.build_params(shapes, names.CLIP_VISION, tensors, jnp.float32, lambda count: None)
    expected = tower(torch.from_numpy(pixels).permute(0, 3, 1, 2)).image_embeds
    assert relative_error(module.apply({"params": params}, pixels), expected) <= TOLERANCE


@pytest.mark.parametrize("published", [CLIPTextConfig(), OPENCLIP_H], ids=["vit-l", "openclip-h"])
def test_clip_text(published):
    """At the published activation, depth and number of heads, with narrow layers."""
    text = CLIPTextModel(
        TorchCLIPConfig(
            vocab_size=100,
            hidden_size=4 * published.num_heads,
            intermediate_size=96,
            num_hidden_layers=published.num_layers,
            num_attention_heads=published.num_heads,
            max_position_embeddings=77,
            hidden_act=published.activation,
            eos_token_id=99,
            bos_token_id=98,
        )
    ).eval()
    randomize(text)
    tensors = rename_text(tensors_of(text))
    config, _ = text_config(tensors, text.config.to_dict(), "text_encoder")
    assert (config.num_layers, config.activation) == (published.num_layers, published.activation)
    module = CLIPTextEncoder(config)
    ids = np.random.default_rng(0).integers(0, 100, (3, 77))
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    params = names.build_params(shapes, names.CLIP_TEXT, tensors, jnp.float32, lambda count: None)
    expected = text(torch.from_numpy(ids)).last_hidden_state
    found = jax.jit(module.apply)({"params": params}, ids)
    assert relative_error(found, expected) <= TOLERANCE
