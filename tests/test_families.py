"""Every family quantized by the same policy, at tiny size with random weights."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import convert.__main__ as convert
import qvd_jax
from convert.converters import CONVERTERS
from qvd_jax import calibrate, evaluate, sample
from qvd_jax.axes import Params
from qvd_jax.calibrate import read_policy
from qvd_jax.diffusion import sampler, schedules
from qvd_jax.diffusion.solvers import make_schedule
from qvd_jax.kernels import int8
from qvd_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from qvd_jax.models.configs import ControlNetConfig, UNet3DConfig
from qvd_jax.models.stages import shortcut_splits
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines import families
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.observation import CalibrationConfig
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.pipelines.quantization import quantize, unet_layers
from qvd_jax.quant.policy import match, named_policy
from qvd_jax.shapes.tokenizer import make_tokenizer

CONFIGS = Path(__file__).parent.parent / "configs"
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


def test_every_family_has_a_converter_whose_options_there_are():
    assert CONVERTERS.keys() == families.FAMILIES.keys()
    options = {name for action in convert._parser()._actions for name in action.option_strings}
    for converter in CONVERTERS.values():
        assert set(converter.options) <= options


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


def unet_inputs(pipe: VideoPipeline, family: Family) -> list[tuple[Any, ...]]:
    """What the UNet is called with at each step of a float sampling, as in the calibration."""
    inputs, want = family.inputs(), pipe.defaults
    schedule = make_schedule(pipe.scheduler, STEPS)
    noise = pipe.initial_noise(0, 1, pipe.latents_shape(*SIZE.values()))
    before = [np.asarray(noise) * schedule.initial_scale]
    pipe(
        inputs,
        **family.options,
        latents=noise,
        output_type="latents",
        callback_on_step_end=lambda _, latents: before.append(np.array(latents)),
    )
    given = pipe.conditions(inputs, want, 0, **family.options)
    calls = []
    for row, timestep in enumerate(schedule.table.timestep):
        latents = jnp.asarray(np.concatenate([schedule.table.model_in[row] * before[row]] * 2))
        latents = sampler.add_image(latents, given.image)
        calls.append(
            (
                latents,
                jnp.asarray(timestep)[None],
                given.context,
                given.added_ids,
                given.control,
                given.reference,
            )
        )
    return calls


ALIKE = {"animatelcm": "animatediff", "lightning": "animatediff", "zeroscope": "modelscope"}


@pytest.mark.parametrize("name", [*FAMILIES, *ALIKE])
def test_configs_are_the_named_policy_and_their_commands_parse(name, monkeypatch):
    file = CONFIGS / f"{name}.yaml"
    family = FAMILIES[ALIKE.get(name, name)]
    layers = unet_layers(make(family), family.options)
    assert match(read_policy(str(file)), layers) == match(named_policy("qvd-w8a8"), layers)
    lines = [line[2:] for line in file.read_text().splitlines() if line.startswith("# python -m ")]
    modules = {"convert": convert, "qvd_jax.calibrate": calibrate, "qvd_jax.sample": sample}
    modules["qvd_jax.evaluate"] = evaluate
    assert [line.split()[2] for line in lines] == list(modules)
    for line in lines:
        module, *arguments = shlex.split(line)[2:]
        parsed = modules[module]._parser().parse_args(arguments)
        if module == "qvd_jax.calibrate":
            assert parsed.policy == f"configs/{name}.yaml"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_split_of_a_shortcut_is_of_a_layer(name):
    family = FAMILIES[name]
    paths = {layer.path for layer in unet_layers(make(family), family.options)}
    assert shortcut_splits(family.unet).keys() <= paths


def run(pipe: VideoPipeline, calls: list[tuple[Any, ...]]) -> np.ndarray:
    forward = jax.jit(pipe.unet.apply)
    return np.stack([forward({"params": pipe.params["unet"]}, *call) for call in calls])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_int8_keeps_what_the_unet_gives_and_multiplies_int8(name, monkeypatch):
    """On the distribution of the calibration; i8 operands in every product."""
    family = FAMILIES[name]
    pipe = make(family)
    config = CalibrationConfig(steps=STEPS)
    quantized, reports = quantize(pipe, "qvd-w8a8", family.inputs(), config, family.options)
    paths = [report.path for report in reports]
    for pattern in family.products:
        assert any(re.search(pattern, path) for path in paths), pattern
    calls = unet_inputs(pipe, family)
    exact, found = (run(p, calls) for p in (pipe, quantized))
    sqnr = 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum())
    print(f"{name}: {sqnr:.1f} dB over {STEPS} steps, {len(paths)} layers")
    assert sqnr >= family.sqnr

    monkeypatch.setattr(int8, "_has_vnni", lambda: True)
    params = jax.eval_shape(lambda: quantized.params["unet"])
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    assert quantized.quantization is not None
    specs = quantized.quantization.specs
    multiplied = {f"{path}/kernel" for path, spec in specs.items() if spec.activation_bits < 16}
    weights = {leaves[path].shape for path in multiplied}
    # Float products may have the shape of something that is int8.
    weights -= {leaf.shape for path, leaf in leaves.items() if path not in multiplied}
    for platform in ("cpu", "cuda", "tpu"):
        forward = jax.jit(lambda params, *call: quantized.unet.apply({"params": params}, *call))
        text = export.export(forward, platforms=[platform])(params, *calls[0]).mlir_module()
        signatures = re.findall(r"stablehlo\.(?:dot_general|convolution).* : (\(.*?\)) ->", text)
        floats = [signature for signature in signatures if "i8" not in signature]
        assert len(signatures) > len(floats)
        for signature in floats:
            shape = re.findall(r"tensor<([\dx]+)xf32>", signature)[-1]
            assert tuple(map(int, shape.split("x"))) not in weights, signature
