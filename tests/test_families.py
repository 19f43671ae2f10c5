"""Every family quantized by the same policy, at tiny size with random weights."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from tiny_families import FAMILIES, SIZE, STEPS, Family, make

import convert.__main__ as convert
from convert.converters import CONVERTERS
from qvd_jax import calibrate, evaluate, sample
from qvd_jax.calibrate import read_policy
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.solvers import make_schedule
from qvd_jax.kernels import int8
from qvd_jax.models.stages import shortcut_splits
from qvd_jax.pipelines import families
from qvd_jax.pipelines.observation import CalibrationConfig
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.pipelines.quantization import quantize, unet_layers
from qvd_jax.quant.policy import TracedLayer, match, named_policy

CONFIGS = Path(__file__).parent.parent / "configs"


def test_every_family_has_a_converter_whose_options_there_are():
    assert CONVERTERS.keys() == families.FAMILIES.keys()
    options = {name for action in convert._parser()._actions for name in action.option_strings}
    for converter in CONVERTERS.values():
        assert set(converter.options) <= options


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


@functools.cache
def layers_of(name: str) -> list[TracedLayer]:
    """Of a family's UNet."""
    family = FAMILIES[name]
    return unet_layers(make(family), family.options)


ALIKE = {"animatelcm": "animatediff", "lightning": "animatediff", "zeroscope": "modelscope"}


@pytest.mark.parametrize("name", [*FAMILIES, *ALIKE])
def test_configs_are_the_named_policy_and_their_commands_parse(name, monkeypatch):
    file = CONFIGS / f"{name}.yaml"
    layers = layers_of(ALIKE.get(name, name))
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
    paths = {layer.path for layer in layers_of(name)}
    assert shortcut_splits(FAMILIES[name].unet).keys() <= paths


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
