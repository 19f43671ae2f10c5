"""Checkpoints come back as pipeline folders that diffusers loads, the same bit for bit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from random_families import (
    RGB,
    SCRIBBLE,
    make_controlnet,
    make_modelscope,
    make_sparsectrl_module,
    make_svd,
)
from refusals import Outcome, assert_one_line_error
from safetensors.torch import load_file

from convert import positions, scheduler, tensors
from convert.__main__ import main as convert
from convert.dequantize import dequantized, dequantized_notes
from convert.pipeline import Source, open_source
from convert.tensors import LazyTensor
from convert.to_diffusers import open_checkpoint
from qvd_jax import checkpoint, items
from qvd_jax.config import to_dict
from qvd_jax.diffusion import schedules
from qvd_jax.errors import InputError
from qvd_jax.pipelines.families import FAMILIES
from qvd_jax.pipelines.loading import read_configs
from qvd_jax.quant.policy import LayerSpec, Quantization
from qvd_jax.quant.record import QuantizedParams, layout, replace_layers

CONTROLNETS = {
    RGB: lambda: make_sparsectrl_module(RGB),
    SCRIBBLE: lambda: make_sparsectrl_module(SCRIBBLE),
    "controlnet": make_controlnet,
}
WRITTEN_BY = {"_name_or_path", "_diffusers_version", "_use_default_values"}
DEAD = (".attn2.to_q.", ".attn2.to_k.", ".norm2.")


def converted(source: Path, out: Path, *arguments: object) -> Path:
    assert convert([str(source), "--out", str(out), *map(str, arguments)]) == 0
    return out


def written_back(path: Path, out: Path, *arguments: str) -> Path:
    assert convert(["--to-diffusers", str(path), str(out), *arguments]) == 0
    return out


def assert_same_folder(out: Path, source: Path, left: tuple[str, ...] = ()) -> None:
    """Every file of weights has the same names, shapes, dtypes and bits; `left` may differ."""
    files = {file.relative_to(source) for file in source.rglob("*.safetensors")}
    assert {file.relative_to(out) for file in out.rglob("*.safetensors")} == files
    for file in files:
        found, expected = load_file(out / file), load_file(source / file)
        # As transformers published it for years; it writes the names without today.
        found = {name.removeprefix("text_model."): t for name, t in found.items()}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert any(part in name for part in left) or torch.equal(found[name], tensor), name


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    assert checkpoint.read_manifest(found) == checkpoint.read_manifest(expected)
    for name in (entry.name for entry in expected.iterdir() if (entry / "_METADATA").exists()):
        stored = [items.StoredItem(path, name) for path in (found, expected)]
        arrays = [item.read(item.shapes) for item in stored]
        jax.tree.map(np.testing.assert_array_equal, *arrays)


def assert_read_alike(found: Source, expected: Source) -> None:
    """The converter reads the same; of weights that are the same, it makes the same checkpoint."""
    for name in ("configs", "scheduler", "defaults", "family", "description"):
        assert getattr(found, name) == getattr(expected, name)


def assert_same_configs(found: diffusers.DiffusionPipeline, expected: Path, left: set[str]) -> None:
    """diffusers loads the same classes from both folders, with the same values in their configs."""
    index = json.loads((expected / "model_index.json").read_text())
    assert type(found).__name__ == index["_class_name"]
    left = {*WRITTEN_BY, *left}
    for name in ("unet", "vae", "scheduler", "motion_adapter"):
        if name in index:
            component = getattr(found, name)
            again = type(component).from_pretrained(expected / name)
            assert {k: v for k, v in component.config.items() if k not in left} == {
                k: v for k, v in again.config.items() if k not in left
            }


def test_animatediff_comes_back(tiny, tiny_checkpoint, tmp_path):
    folder, _ = tiny
    out = written_back(tiny_checkpoint, tmp_path / "out")
    assert_same_folder(out, folder)
    pipe = diffusers.AnimateDiffPipeline.from_pretrained(out, local_files_only=True)
    assert_same_configs(pipe, folder, set())
    assert (
        pipe.text_encoder.config.to_dict().items()
        >= {"eos_token_id": 189, "vocab_size": 190}.items()
    )
    assert pipe.tokenizer("a b").input_ids == tiny[1].tokenizer("a b").input_ids
    assert_same_checkpoint(converted(out, tmp_path / "again"), tiny_checkpoint)
    # Only a folder of its kind is replaced, and only when asked.
    written_back(tiny_checkpoint, out, "--overwrite", "--dtype", "bfloat16")
    found = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    expected = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], t.bfloat16()) for name, t in expected.items())


@pytest.mark.parametrize(
    ("make", "left"), [(make_modelscope, ()), (make_svd, DEAD)], ids=["modelscope", "svd"]
)
def test_other_families_come_back(tmp_path, make, left):
    make(tmp_path / "source")
    path = converted(tmp_path / "source", tmp_path / "checkpoint")
    out = written_back(path, tmp_path / "out")
    assert_same_folder(out, tmp_path / "source", left)
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, local_files_only=True)
    # The size of SVD's latents is not read here, nor there where height and width are given.
    assert_same_configs(pipe, tmp_path / "source", {"sample_size"} if left else set())
    assert_read_alike(open_source(out), open_source(tmp_path / "source"))


@pytest.mark.parametrize("kind", CONTROLNETS)
def test_controlnets_come_back_beside_animatediff(tiny, tmp_path, kind):
    torch.manual_seed(1)
    module = CONTROLNETS[kind]().eval()
    module.save_pretrained(tmp_path / "controlnet")
    path = converted(tiny[0], tmp_path / "checkpoint", "--controlnet", tmp_path / "controlnet")
    out = written_back(path, tmp_path / "out")
    assert_same_folder(out / "controlnet", tmp_path / "controlnet")
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert type(pipe).__name__ == (
        "AnimateDiffControlNetPipeline"
        if kind == "controlnet"
        else "AnimateDiffSparseControlNetPipeline"
    )
    # The widths of an embedding that there is not.
    ignored = WRITTEN_BY | ({"conditioning_embedding_out_channels"} if kind == RGB else set())
    found, expected = pipe.controlnet.config, module.config
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in expected.items() if k not in ignored
    }
    folders = (out, out / "controlnet"), (tiny[0], tmp_path / "controlnet")
    assert_read_alike(*(open_source(source, controlnet=net) for source, net in folders))


@pytest.mark.parametrize("solver", schedules.SOLVERS)
@pytest.mark.parametrize("family", ["animatediff", "modelscope", "svd"])
def test_schedulers_come_back_in_diffusers_too(family, solver):
    config = schedules.switch(FAMILIES[family].scheduler, solver)
    if schedules.unsupported(config):
        config = replace(config, timestep_type="discrete")
    written = json.loads(json.dumps(scheduler.to_json(config)))
    assert scheduler.read(written, "").config() == config
    theirs = getattr(diffusers, written["_class_name"]).from_config(written)
    found = schedules.complete(scheduler.read(dict(theirs.config), "").config())
    wanted = to_dict(schedules.complete(config))
    assert {key: to_dict(found)[key] for key in schedules.READS[solver]} == {
        key: wanted[key] for key in schedules.READS[solver]
    }


def test_other_norms_and_what_a_call_must_say_are_named(tiny_checkpoint, tmp_path):
    path = edited(tiny_checkpoint, tmp_path, temporal_norm_scope="frame")
    manifest = checkpoint.read_manifest(path)
    defaults = {**manifest.defaults, "steps": 7, "width": 24}
    checkpoint.write_manifest(path, replace(manifest, defaults=defaults))
    notes = open_checkpoint(path).notes
    assert notes == (
        "diffusers' class has unet.temporal_norm_scope = 'joint' built in, the checkpoint has "
        "'frame': with the same weights their videos differ",
        "a pipeline folder does not say, so pass to the pipeline's call: frames = 16, height = 16, "
        "width = 24, steps = 7, guidance_scale = 7.5, fps = 8",
    )


@pytest.fixture
def refuse(parent, capsys) -> Callable[..., Outcome]:
    """Runs the way back, which is to fail and to leave nothing."""

    def refuse(path: Path, *arguments: object, out: Path | None = None) -> Outcome:
        before = sorted(parent.rglob("*"))
        out = out or parent / "out"
        code = convert(["--to-diffusers", str(path), str(out), *map(str, arguments)])
        assert sorted(parent.rglob("*")) == before
        printed, stderr = capsys.readouterr()
        return Outcome(code, stderr[stderr.index("error: ") :].removesuffix("\n"), printed)

    return refuse


def edited(checkpoint_: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy with other values in the UNet's config, or of another family."""
    path = shutil.copytree(checkpoint_, tmp_path / "edited")
    manifest = checkpoint.read_manifest(path)
    family = changes.pop("family", manifest.family)
    components = {**manifest.components, "unet": {**manifest.components["unet"], **changes}}
    checkpoint.write_manifest(path, replace(manifest, family=family, components=components))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"family": "magicanimate"},
            "is MagicAnimate, of which diffusers has no pipeline; possible are AnimateDiff, "
            "ModelScope, Stable Video Diffusion",
        ),
        ({"motion_attentions": 1}, "motion_attentions = 1; diffusers' class has 2"),
        ({"out_eps": 1e-3}, None),
        ({"context_dim": 48}, "does not fit"),
    ],
    ids=["magicanimate", "attentions", "epsilon", "arrays"],
)
def test_what_no_class_of_diffusers_computes_is_refused(
    tiny_checkpoint, tmp_path, refuse, changes, message
):
    path = edited(tiny_checkpoint, tmp_path, **changes)
    if message is None:
        # The last norm's epsilon alone: the others are named as built in.
        assert any("unet.mid_eps = 0.001" in note for note in open_checkpoint(path).notes)
    else:
        outcome = refuse(path)
        assert outcome.code == 2
        assert message in outcome.message


def test_the_way_back_takes_no_other_options(tiny_checkpoint, parent, refuse):
    assert_one_line_error(
        refuse(tiny_checkpoint, "--lora", "x.safetensors", "--preset", "lightning"),
        "--to-diffusers writes a checkpoint as it is, without --lora, --preset",
    )
    assert_one_line_error(refuse(parent / "lost"), f"{parent}/lost does not exist")
    assert_one_line_error(
        refuse(tiny_checkpoint, "--overwrite", out=tiny_checkpoint),
        "holds other files and no model_index.json; name another folder",
    )
    with pytest.raises(SystemExit, match="2"):
        convert([])


def test_a_full_disk_leaves_nothing(tiny_checkpoint, refuse, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.to_diffusers.write_safetensors", full)
    assert_one_line_error(refuse(tiny_checkpoint), "could not be written: ")


def test_tables_of_one_block_that_differ_are_refused():
    def table(value: float) -> LazyTensor:
        return LazyTensor((1, 2, 4), lambda: np.full((1, 2, 4), value, np.float32))

    block = "down_blocks.0.motion_modules.0.transformer_blocks.0"
    weights = {f"{block}.attn{i}.to_q.weight": tensors.zeros((4, 4)) for i in (1, 2)}
    stored = {f"{block}.positions.{i}": table(1.0) for i in (0, 1)}
    given = positions.give({**weights, **stored}, 32)
    assert given.keys() == {*weights, f"{block}.pos_embed.pe"}
    np.testing.assert_array_equal(given[f"{block}.pos_embed.pe"].read(), 1.0)
    stored[f"{block}.positions.1"] = table(2.0)
    with pytest.raises(InputError, match=r"transformer_blocks\.0 have different positional tables"):
        positions.give({**weights, **stored}, 32)


def random_record(spec: LayerSpec, channels: int, features: int, *taps: int) -> QuantizedParams:
    """A record of random codes, and of numbers of their usual sizes."""
    rng = np.random.default_rng(0)
    shapes = layout(spec, channels, features, taps)
    drawn = {
        name: jnp.asarray(0.5 + rng.uniform(size=leaf.shape), leaf.dtype)
        for name, leaf in shapes._asdict().items()
        if leaf is not None
    }
    limit = 2 ** (spec.weight_bits - 1) - 1
    codes = rng.integers(-limit, limit + 1, shapes.kernel.shape)
    return shapes._replace(**drawn)._replace(kernel=jnp.asarray(codes, shapes.kernel.dtype))


SPECS = {
    "scri": LayerSpec("scri"),
    "steps": LayerSpec("scri", ranges="step"),
    "htdq": LayerSpec("htdq"),
    "int4": LayerSpec("minmax", weight_bits=4),
    "float input": LayerSpec("minmax", activation_bits=16),
}


@pytest.mark.parametrize("kind", SPECS)
def test_the_float_layer_is_the_formula_without_rounding(kind):
    record = random_record(SPECS[kind], 5, 3)
    kernel, bias = record.dequantized()
    x = np.random.default_rng(1).normal(size=(7, 5))
    # As the record's formulas say at one step, in float64.
    read = {k: np.float64(v) for k, v in record.in_float32()._asdict().items() if v is not None}
    codes = x * read["in_scale"] + read["in_offset"] if "in_scale" in read else x
    y = read["scale"] * (codes @ read["kernel"].T) + read["bias"]
    np.testing.assert_allclose(x @ kernel + bias, y, rtol=1e-5)


def test_the_float_conv_is_the_formula_where_all_taps_are_inside():
    record = random_record(LayerSpec("scri"), 5, 3, 3, 3)
    kernel, bias = record.dequantized()
    x = np.random.default_rng(1).normal(size=(1, 4, 4, 5))
    codes = np.pad(
        x * np.float64(record.in_scale) + np.float64(record.in_offset),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
    )
    zeros = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    through_taps = np.asarray(record.taps, np.float64).sum((0, 1))

    def at(padded: np.ndarray, weights: np.ndarray, i: int, j: int) -> np.ndarray:
        return np.einsum("ijc,ijco->o", padded[0, i : i + 3, j : j + 3], weights)

    by_code = np.moveaxis(np.asarray(record.kernel, np.float64), 0, -1)
    for i, j in ((1, 1), (1, 2), (2, 2)):
        y = np.float64(record.scale) * at(codes, by_code, i, j)
        y += np.float64(record.bias) + through_taps
        np.testing.assert_allclose(at(zeros, kernel, i, j) + bias, y, rtol=1e-5)


def attend(x: np.ndarray, qkv: np.ndarray, added: np.ndarray, out: np.ndarray, bias: np.ndarray):
    """Self-attention of one head, in float64."""
    q, k, v = np.split(x @ qkv + added, 3, axis=-1)
    weights = np.exp(q @ k.T / len(k) ** 0.5)
    return weights / weights.sum(-1, keepdims=True) @ v @ out + bias


def test_corrections_of_keys_and_values_go_where_they_act():
    width = 4
    specs = {"x/attn/to_qkv": LayerSpec("scri"), "x/attn/to_out": LayerSpec("scri")}
    qkv = random_record(specs["x/attn/to_qkv"], width, 3 * width)
    # What the queries' shift and bias come to is none, so that nothing is lost.
    qkv = qkv._replace(bias=qkv.bias.at[:width].add(-qkv.dequantized()[1][:width]))
    out = random_record(specs["x/attn/to_out"], width, width)
    small = {"scale": jnp.full(3 * width, 1e-3, jnp.bfloat16)}
    qkv = qkv._replace(**small)
    qkv = qkv._replace(bias=qkv.bias.at[:width].add(-qkv.dequantized()[1][:width]))
    shapes = {
        "x/attn/to_qkv/kernel": jax.ShapeDtypeStruct((width, 3 * width), jnp.float32),
        "x/attn/to_out/kernel": jax.ShapeDtypeStruct((width, width), jnp.float32),
        "x/attn/to_out/bias": jax.ShapeDtypeStruct((width,), jnp.float32),
    }
    tree = flax.traverse_util.unflatten_dict(shapes, sep="/")
    stored, _ = replace_layers(tree, {"x/attn/to_qkv": qkv, "x/attn/to_out": out})
    flat = flax.traverse_util.flatten_dict(stored, sep="/")
    read = dequantized(lambda name: np.asarray(flat[name]), Quantization("mine", specs), tree)
    x = np.random.default_rng(2).normal(size=(6, width))
    with_biases = attend(x, *qkv.dequantized(), *out.dequantized())
    folded = attend(x, read("x/attn/to_qkv/kernel"), np.float64(0), *map(read, list(shapes)[1:]))
    assert np.abs(qkv.dequantized()[1][width:]).min() > 0.1
    np.testing.assert_allclose(folded, with_biases, rtol=1e-4)


def test_every_weight_of_the_int8_model_is_within_half_a_step_of_the_float_one():
    float_unet, int8_unet = (
        items.StoredItem(checkpoint.find(name), "unet") for name in ("shapes", "shapes-w8a8")
    )
    quantization = read_configs("shapes-w8a8").quantization
    assert quantization is not None
    read = dequantized(int8_unet.value, quantization, float_unet.shapes)
    shift, error = [], []
    for path in quantization.specs:
        weights, found = (np.float64(of(f"{path}/kernel")) for of in (float_unet.value, read))
        in_scale, scale = (
            np.float64(int8_unet.value(f"{path}/{n}")) for n in ("in_scale", "scale")
        )
        step = np.broadcast_to(in_scale, weights.shape[-2])[:, None] * scale
        assert (np.abs(found - weights) <= 0.501 * step).all(), path
        if not path.endswith(("to_q", "to_qkv", "to_kv", "to_out")):
            biases = [of(f"{path}/bias") for of in (float_unet.value, read, int8_unet.value)]
            expected, ours, stored = map(np.float64, biases)
            shift.append(np.linalg.norm(stored - expected))
            error.append(np.linalg.norm(ours - expected))
    # The shift of the channels is out of the biases; what is left corrects the weights' rounding.
    assert sum(error) < 0.1 * sum(shift)
    assert list(dequantized_notes(quantization, float_unet.shapes)) == [
        "qvd-w8a8: what the codes stand for is written as float weights; the inputs of 280 layers "
        "are no longer quantized",
        "of these, 16 layers of temporal features lose their two ranges of codes (HTDQ)",
        "biases have in them what calibration corrected: each output's mean error",
        "34 convolutions have it for each tap; at borders the bias has that of the taps outside, "
        "too",
        "52 projections to queries have no bias in diffusers: what calibration corrected there is "
        "lost",
    ]


@pytest.mark.slow
@torch.inference_mode()
def test_the_int8_model_comes_back_as_nearly_the_float_one(tmp_path):
    unets = {}
    for name in ("shapes", "shapes-w8a8"):
        out = written_back(Path(name), tmp_path / name)
        unets[name] = diffusers.UNetMotionModel.from_pretrained(out / "unet").eval()
    torch.manual_seed(0)
    inputs = torch.randn(1, 8, 4, 8, 8), torch.tensor([500]), torch.randn(4, 20, 128)
    y, found = (unet(*inputs).sample.double() for unet in unets.values())
    decibels = 10 * torch.log10(y.square().sum() / (found - y).square().sum())
    # Of int8 weights alone; with int8 inputs too the model has 25 to 30.
    assert decibels > 35
