"""Every family as the smallest pipeline that has all its kinds of layers, with random weights."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qvd_jax
from qvd_jax.axes import Params
from qvd_jax.diffusion import schedules
from qvd_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from qvd_jax.models.configs import ControlNetConfig, UNet3DConfig
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.shapes.tokenizer import make_tokenizer

ANIMATEDIFF = UNet3DConfig(
    block_channels=(32, 64),
    layers_per_block=1,
    attention_levels=(True, False),
    num_heads=(4, 4),
    context_dim=24,
    norm_groups=8,
    down_eps=(1e-5, 1e-5),
    up_eps=(1e-5, 1e-5),
    temporal_heads=(4, 4),
    temporal_mid_block=True,
)
VAE = VAEConfig(block_channels=(16, 16), layers_per_block=1, norm_groups=8)
TEXT = CLIPTextConfig(59, 24, 48, 1, 4, 20)
IMAGE = CLIPVisionConfig(28, 14, 32, 64, 1, 4, 24)
SIZE = {"frames": 3, "height": 8, "width": 12}
STEPS = 3


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(*shape, 8, 12, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Family:
    """A tiny model of a family, and what it is called with.

    `products` are patterns in the paths of layers that only this family has, `sqnr` is what int8
    keeps at the least, in dB.
    """

    unet: UNet3DConfig
    products: tuple[str, ...]
    pipeline: type[VideoPipeline] = qvd_jax.TextToVideoPipeline
    inputs: Callable[[], Any] = lambda: ["a red circle moving left on a black background"]
    options: dict[str, Any] = field(default_factory=dict)
    scheduler: schedules.SchedulerConfig = schedules.ANIMATEDIFF
    sqnr: float = 35


FAMILIES = {
    "animatediff": Family(ANIMATEDIFF, ("motion_module/block/attn1/to_qkv",)),
    "sparsectrl": Family(
        replace(
            ANIMATEDIFF,
            temporal_mid_block=False,
            controlnet=ControlNetConfig(5, motion_attentions=1, ignores_latents=True),
        ),
        ("controlnet/down_blocks_0/.*/motion_module", "controlnet/controlnet_mid_block"),
        options={"conditioning_frames": pictures(1), "controlnet_frame_indices": [0]},
    ),
    "modelscope": Family(
        replace(
            ANIMATEDIFF,
            temporal_op="conv_transformer",
            temporal_mid_block=False,
            max_frames=None,
            input_transformer_channels=32,
        ),
        ("temporal_conv/convs_0", "transformer_in/block/attn2/to_qkv", "temporal_attention/"),
        scheduler=schedules.MODELSCOPE,
        # 35 is the aim. Four more convolutions in a row behind each resnet add their errors.
        sqnr=33.5,
    ),
    "svd": Family(
        replace(
            ANIMATEDIFF,
            in_channels=8,
            temporal_op="spatio_temporal",
            temporal_mid_block=False,
            max_frames=None,
            added_ids=3,
        ),
        (
            "resnet/temporal/conv1",
            "resnet/temporal/time_emb_proj",
            "add_embedding/linear_1",
            "temporal_block/token_attn/to_out",
        ),
        pipeline=qvd_jax.ImageToVideoPipeline,
        inputs=lambda: list(pictures(1)),
        scheduler=schedules.STABLE_VIDEO_DIFFUSION,
    ),
    "magicanimate": Family(
        replace(
            ANIMATEDIFF,
            temporal_mid_block=False,
            resnet_norm_scope="joint",
            temporal_norm_scope="frame",
            controlnet=ControlNetConfig(3, (4, 8)),
            appearance_encoder=True,
        ),
        (
            "appearance_encoder/mid_block",
            "appearance_encoder/time_embedding",
            "controlnet/mid_block",
        ),
        pipeline=qvd_jax.AnimationPipeline,
        inputs=lambda: list(pictures(1)),
        options={"motion_video": pictures(3)},
    ),
}


def random_params(shapes: Params) -> Params:
    """Kernels as PyTorch's layers draw them; norms and biases not at one and zero."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim > 1:
            bound = np.prod(leaf.shape[:-1]) ** -0.5
            values = rng.uniform(-bound, bound, leaf.shape)
        else:
            values = 0.1 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map_with_path(draw, shapes)


def make(family: Family) -> VideoPipeline:
    from_images = family.pipeline is qvd_jax.ImageToVideoPipeline
    vae = replace(VAE, temporal_decoder=from_images)
    encoder = {"image_encoder": IMAGE} if from_images else {"text_encoder": TEXT}
    configs = ComponentConfigs(family.unet, vae, **encoder)
    defaults = qvd_jax.ImageToVideoDefaults if from_images else qvd_jax.VideoDefaults
    return family.pipeline(
        **configs.modules(jnp.float32),
        **({} if from_images else {"tokenizer": make_tokenizer()}),
        params={name: random_params(p) for name, p in configs.param_shapes(jnp.float32).items()},
        scheduler=family.scheduler,
        defaults=defaults(**SIZE, steps=STEPS, guidance_scale=3.0),
        family="tiny",
        description="random",
    )
