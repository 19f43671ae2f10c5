"""Small random pipelines of all families, sampled on several devices: see `test_devices.py`."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax import meshes
from qvd_jax.axes import Array, Params
from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from qvd_jax.models.configs import ControlNetConfig, UNet3DConfig
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.animation import AnimationPipeline
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.image_to_video import ImageToVideoDefaults, ImageToVideoPipeline
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline, schedule_for
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline
from qvd_jax.quant.policy import LayerSpec, Quantization

DEVICES, STEPS, FRAMES, SIDE = 8, 2, 8, 8
SIZE = {"frames": FRAMES, "height": SIDE, "width": SIDE, "steps": STEPS}


def unet(**changes: Any) -> UNet3DConfig:
    base: dict[str, Any] = {
        "block_channels": (16,),
        "layers_per_block": 1,
        "attention_levels": (True,),
        "num_heads": (2,),
        "temporal_heads": (2,),
        "context_dim": 8,
        "norm_groups": 4,
        "down_eps": (1e-5,),
        "up_eps": (1e-5,),
        "max_frames": 16,
    }
    return UNet3DConfig(**{**base, **changes})


SVD = unet(in_channels=8, temporal_op="spatio_temporal", max_frames=None, added_ids=3)
UNETS = {
    # AnimateDiff v2, whose motion modules normalize all frames jointly.
    "animatediff": unet(temporal_mid_block=True),
    # AnimateDiff v1 as its authors run it.
    "joint_resnets": unet(resnet_norm_scope="joint", temporal_norm_scope="frame"),
    "modelscope": unet(
        temporal_op="conv_transformer", max_frames=None, input_transformer_channels=16
    ),
    "svd": SVD,
    "sparsectrl": unet(
        controlnet=ControlNetConfig(4, (4, 8), motion_attentions=1, ignores_latents=True)
    ),
    "magicanimate": unet(
        resnet_norm_scope="joint",
        temporal_norm_scope="frame",
        controlnet=ControlNetConfig(3, (4, 8)),
        appearance_encoder=True,
    ),
}


def random(shapes: Params) -> Params:
    """Parameters of any layer, those of quantized ones among them."""
    rng = np.random.default_rng(0)
    sizes = {"scale": 1.0, "in_scale": 8.0, "coarse": 4.0, "gain": 1.0}

    def draw(path: Any, leaf: Any) -> Array:
        name = path[-1].key
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(-127, 128, leaf.shape), leaf.dtype)
        size = 2e-4 if name == "scale" and leaf.dtype == jnp.bfloat16 else sizes.get(name, 0.3)
        values = rng.uniform(0.5, 1.0, leaf.shape) * size
        signs = 1 if name in sizes else rng.choice([-1.0, 1.0], leaf.shape)
        return jnp.asarray(values * signs, leaf.dtype)

    flat = flax.traverse_util.flatten_dict(jax.tree_util.tree_map_with_path(draw, shapes))
    for path, leaf in flat.items():
        if path[-1] == "sums":
            kernel = flat[(*path[:-1], "kernel")].astype(jnp.int32)
            flat[path] = kernel.reshape(len(leaf), -1).sum(1)
    return flax.traverse_util.unflatten_dict(flat)


def pipeline(family: str, kind: str) -> VideoPipeline:
    """A pipeline of a family; its kind is "float", "int8" or "step_aware"."""
    config, scheduler = UNETS[family], SchedulerConfig(solver="euler_a")
    vae = VAEConfig(
        block_channels=(8, 8), layers_per_block=1, norm_groups=4, temporal_decoder=family == "svd"
    )
    towers: dict[str, Any] = {"text_encoder": CLIPTextConfig(10, 8, 16, 1, 1, 4)}
    if family == "svd":
        towers = {"image_encoder": CLIPVisionConfig(8, 8, 8, 16, 1, 1, 8)}
    configs = ComponentConfigs(config, vae, **towers)
    quantization = None
    if kind != "float":
        paths = {
            path.removesuffix("/kernel")
            for path in flax.traverse_util.flatten_dict(
                configs.param_shapes(jnp.float32)["unet"], sep="/"
            )
            if path.endswith("/kernel") and not path.startswith("conv_")
        }
        aware = kind == "step_aware"
        specs = {
            path: LayerSpec("htdq" if "time_emb" in path else "scri")
            if "time" in path or "to_kv" in path
            else LayerSpec("scri", ranges="step" if aware else "static")
            for path in sorted(paths)
        }
        steps = schedule_for(scheduler, STEPS, None).table.timestep
        quantization = Quantization("random", specs, tuple(map(float, steps)) if aware else None)
    shared: dict[str, Any] = {
        **configs.modules(jnp.float32, quantization),
        "params": random(configs.param_shapes(jnp.float32, quantization)),
        "scheduler": scheduler,
        "family": family,
        "description": "",
        "quantization": quantization,
    }
    if family == "svd":
        return ImageToVideoPipeline(**shared, defaults=ImageToVideoDefaults(frames=FRAMES))
    shared["tokenizer"] = SimpleNamespace(model_max_length=4)
    cls = AnimationPipeline if family == "magicanimate" else TextToVideoPipeline
    return cls(**shared, defaults=VideoDefaults(frames=FRAMES))


def call(pipe: VideoPipeline, videos: int, **options: Any) -> np.ndarray:
    """Videos of so many inputs, each other than the ones before."""
    rng = np.random.default_rng(1)
    texts = rng.standard_normal((videos, 4, 8)).astype(np.float32)
    images = rng.integers(0, 256, (videos, SIDE, SIDE, 3)).astype(np.uint8)
    options = {**SIZE, "seed": 3, **options}
    match pipe.family:
        case "svd":
            return pipe(images, **options)
        case "magicanimate":
            # There is no tokenizer to make something of the empty text.
            object.__setattr__(pipe, "encode_text", lambda _: jnp.asarray(texts[:1]))
            poses = rng.integers(0, 256, (options["frames"], SIDE, SIDE, 3)).astype(np.uint8)
            return pipe(images, poses, **options)
        case "sparsectrl":
            options |= {"conditioning_frames": images[:1], "controlnet_frame_indices": [1]}
    return pipe(prompt_embeds=texts, negative_prompt_embeds=-texts[:1], **options)


def run(case: str) -> np.ndarray:
    """Latents, or pixels, of FAMILY:KIND:VIDEOS:WINDOW:MESH.

    WINDOW is how many frames the UNet sees at once, or "pixels" for decoded videos; MESH is "one"
    device, the "rule", or what `meshes.parse` reads.
    """
    family, kind, videos, window, mesh = case.split(":")
    pipe = pipeline(family, kind)
    options: dict[str, Any] = {} if window == "pixels" else {"output_type": "latents"}
    if window.isdecimal():
        config = replace(pipe.unet.config, max_frames=int(window))
        pipe = replace(pipe, unet=pipe.unet.clone(config=config))
    asked = None if mesh in ("one", "rule") else meshes.parse(mesh)
    if mesh != "one":
        devices = jax.devices()[: asked.size if asked else DEVICES]
        pipe = replace(pipe, params=jax.device_put(pipe.params, meshes.replicated(devices)))
    return np.asarray(call(pipe, int(videos), mesh=asked, **options))
