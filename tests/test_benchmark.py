"""`python -m qvd_jax.benchmark` at toy size: it measures what it says and refuses bad input."""

import functools
import json
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from qvd_jax import benchmark, memory
from qvd_jax.benchmarks import growth, products, profile, rounds, sampling
from qvd_jax.benchmarks.unet import SIZES, Case
from qvd_jax.errors import InputError
from qvd_jax.models.configs import ControlNetConfig, UNet3DConfig
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines.families import FAMILIES
from qvd_jax.quant.statistics import trace_layers


@pytest.mark.slow
def test_unet_is_timed_beside_diffusers(tmp_path, capsys):
    out = tmp_path / "unet.json"
    arguments = ["unet", "--size", "tiny", "--against", "diffusers", "--frames", "2"]
    sizes = ["--height", "32", "--width", "48", "--rounds", "2", "--out", str(out)]
    sizes += ["--policy", "minmax-w8a8", "--dtype", "bfloat16"]
    assert benchmark.main([*arguments, *sizes]) == 0
    record = json.loads(out.read_text())
    assert [(r["framework"], r["mode"]) for r in record["results"]] == [
        ("qvd_jax", "float"),
        ("qvd_jax", "minmax-w8a8"),
        ("diffusers", "eager"),
        ("diffusers", "compiled"),
        ("diffusers", "compiled channels_last"),
    ]
    assert all(len(r["rounds_s"]) == 2 and r["median_s"] > 0 for r in record["results"])
    assert record["case"]["height"] == 4
    assert {"jax", "torch", "diffusers"} <= set(record["versions"])
    assert "| diffusers eager | bfloat16 |" in capsys.readouterr().out


@pytest.mark.slow
def test_every_product_of_the_unet_is_timed_and_exact(tmp_path, capsys):
    out = tmp_path / "products.json"
    sizes = ["--size", "tiny", "--frames", "2", "--height", "16", "--width", "16"]
    assert benchmark.main(["products", *sizes, "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    layers = trace_layers(UNet3D(SIZES["tiny"]()), *Case("tiny", 1, 2, 2, 2).shapes())
    assert sum(r["count"] for r in results) == len(layers)
    keys = ("inputs", "kernel", "strides")
    timed = [(products.Product(*(tuple(r[key]) for key in keys)), r["count"]) for r in results]
    upsamplings = [r for r in results if r["upsampled"]]
    assert sum(r["count"] for r in upsamplings) == sum(
        "/upsample/" in layer.path for layer in layers
    )
    assert all("signed before upsampling" in r["seconds"] for r in upsamplings)
    assert sum(p.flops * count for p, count in timed) == sum(layer.flops for layer in layers)
    assert all(products.DISPATCHED in r["seconds"] for r in results)
    assert not [r["failures"] for r in results if r["failures"]]
    assert f"| {products.DISPATCHED} |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sample", "memory"])
def test_checkpoints_are_timed_and_weighed(tiny_checkpoint, tmp_path, capsys, what):
    options = ["--frames", "2", "--height", "8", "--width", "8", "--dtype", "float32"]
    options += ["--checkpoint", str(tiny_checkpoint)]
    options += ["--rounds", "2", "--steps", "2"] if what == "sample" else []
    out = tmp_path / "out.json"
    assert benchmark.main([what, *options, "--out", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    if what == "sample":
        assert result["cold_s"] > result["warm_s"] > result["median_s"] > 0
        for start in ("cold", "warm"):
            parts = sampling.PARTS
            spent = [result[f"{start}_{part}_s"] for part in parts]
            assert min(spent) >= 0
            assert sum(spent) == pytest.approx(result[f"{start}_s"])
        # The same is compiled and traced; only once it is kept.
        assert result["cold_compile_s"] > result["warm_compile_s"]
        assert result["cold_trace_s"] > result["warm_trace_s"]
    else:
        assert 1e8 < result["load_bytes"] < result["sample_2_bytes"]
    assert "| checkpoint | dtype |" in capsys.readouterr().out


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tiny_checkpoint, tmp_path, monkeypatch):
    for name in ("FRAMES", "SIDES", "VIDEOS"):
        monkeypatch.setattr(growth, name, (1, 2))
    out, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    options = ["--checkpoint", str(tiny_checkpoint), "--dtype", "float32", "--steps", "1"]
    options += ["--frames", "2", "--height", "8", "--width", "8"]
    assert benchmark.main(["growth", *options, "--out", str(out), "--plot", str(plot)]) == 0
    record = json.loads(out.read_text())
    found = [(r["grows"], r["value"]) for r in record["results"]]
    assert found == [
        *(("frames", 1), ("frames", 2)),
        *(("pixels", 64), ("pixels", 256)),
        *(("videos", 1), ("videos", 2)),
    ]
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 1e8 for r in record["results"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert record["table"].count("\n") == 1 + len(found)


def build_sleeper(case, variant):
    return functools.partial(time.sleep, case * float(variant.mode))


def build_nothing(case, variant):
    raise SystemExit("no such thing")


def test_operations_are_told_apart_by_their_names():
    block = "jit(apply)/UNet3D/UNet3D.denoise/mid_block/blocks_0"
    attention = f"{block}/attention/attention.transform/block/attn1"
    kinds = {
        f"{block}/resnet/conv1/int8_product/cond/branch_0_fun/mixed_int8_dot": "int8 products",
        f"{attention}/attn1._project/to_qkv/int8_product/cond/branch_0_fun/xor": "quantizing",
        f"{attention}/attn1._project/to_qkv/quantizing/convert_element_type": "quantizing",
        f"{attention}/attention/cond/branch_0_fun/reduce_max": "attention",
        f"{attention}/attention/cond/branch_0_fun/dot_general": "attention",
        f"{attention}/attention/cond/branch_0_fun/while/body/lm,md->ld/dot_general": "attention",
        f"{attention}/to_out/dot_general": "float products",
        f"{block}/resnet/conv1/int8_product/conv_general_dilated": "int8 products",
        f"{block}/resnet/conv1/conv_general_dilated": "float products",
        f"{block}/resnet/conv1/int8_product/cond/branch_0_fun/slice": "gathering patches",
        f"{block}/resnet/norm2/reduce_sum": "norms",
        f"{block}/resnet/add": "all else",
        "": "all else",
    }
    assert {operation: profile.kind(operation) for operation in kinds} == kinds


@pytest.mark.slow
def test_a_profile_says_where_the_time_goes(tmp_path, capsys):
    out = tmp_path / "profile.json"
    sizes = ["--size", "tiny", "--frames", "2", "--height", "16", "--width", "16"]
    options = ["--policy", "minmax-w8a8", "--dtype", "float32", "--out", str(out)]
    assert benchmark.main(["profile", *sizes, *options]) == 0
    floating, int8 = (r["seconds"] for r in json.loads(out.read_text())["results"])
    assert floating["int8 products"] == floating["quantizing"] == 0
    assert min(int8["int8 products"], int8["quantizing"], floating["float products"]) > 0
    assert "| float float32, s | minmax-w8a8 float32, s |" in capsys.readouterr().out


def test_variants_run_in_turn_and_their_medians_are_theirs(capfd):
    variants = [rounds.Variant("a", mode, "float32") for mode in ("1", "3")]
    variants += [rounds.Variant("b", "2", "float32")]
    results = rounds.time_in_turn({"a": build_sleeper, "b": build_sleeper}, 0.02, variants, 3)
    assert [r["median_s"] >= 0.02 * float(r["mode"]) for r in results] == [True] * 3
    assert all(len(r["rounds_s"]) == 3 for r in results)
    assert "| a 1 | float32 |" in rounds.times_table(results, variants[0])
    with pytest.raises(InputError, match="b 2 ended early: its own message is above, or there was"):
        rounds.time_in_turn({"a": build_sleeper, "b": build_nothing}, 0.02, variants, 3)
    capfd.readouterr()


def test_missing_peers_are_named_with_their_install_command(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "version", {"qwix": "0.1", "torch": "2.13"}.get)
    assert benchmark.installed(["diffusers", "qwix"]) == ["qwix"]
    assert "diffusers is left out: pip install diffusers" in capsys.readouterr().err
    with pytest.raises(InputError, match="none of torchao is installed"):
        benchmark.installed(["torchao"])


@pytest.mark.parametrize("peer", ["diffusers", "torchao"])
def test_peers_that_have_another_unet_are_refused(capsys, monkeypatch, peer):
    monkeypatch.setattr(benchmark, "version", {"torch": "2.13", peer: "0.1", "diffusers": "1"}.get)
    assert benchmark.main(["unet", "--size", "svd", "--against", f"qwix,{peer}"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--size svd: {peer} is measured with AnimateDiff's UNet alone")


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("qwix,tinygrad", "'tinygrad' is no peer; diffusers, torchao, qwix are"),
        ("torchao:eager", "'eager' is no mode of torchao, but 'int8 compiled'"),
    ],
)
def test_unknown_peers_are_refused(capsys, against, message):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["unet", "--against", against])
    assert message in capsys.readouterr().err


def test_one_mode_of_a_peer_is_timed_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(
        rounds, "time_in_turn", lambda builds, case, variants, count: asked.append(variants)
    )
    monkeypatch.setattr(rounds, "times_table", lambda *_: "")
    sizes = ["--size", "tiny", "--height", "16", "--width", "16", "--dtype", "float32"]
    assert benchmark.main(["unet", *sizes, "--against", "diffusers:eager,diffusers:compiled"]) == 0
    assert [(variant.framework, variant.mode) for variant in asked[0]] == [
        ("qvd_jax", "float"),
        ("diffusers", "eager"),
        ("diffusers", "compiled"),
    ]


def test_an_unknown_policy_is_refused_before_anything_runs(capsys):
    assert benchmark.main(["unet", "--policy", "qvd-w9"]) == 2
    assert "unknown policy 'qvd-w9'" in capsys.readouterr().err


def test_sizes_that_are_no_multiples_of_the_vaes_stride_are_refused(capsys):
    assert benchmark.main(["unet", "--height", "100"]) == 2
    assert "height = 100: it must be a positive multiple of 8" in capsys.readouterr().err


def test_peak_memory_is_what_is_alive_at_once():
    wide = jax.ShapeDtypeStruct((1000, 100), jnp.float32)
    narrow = jax.ShapeDtypeStruct((100, 10), jnp.float32)

    def chain(x, w):
        y = jax.nn.relu(x) @ w  # x, relu(x) and w, then y
        return y + 1

    assert memory.peak_bytes(chain, wide, narrow) == 4 * (2 * 100_000 + 1_000 + 10_000)


@pytest.mark.parametrize(
    ("family", "controlnet", "options"),
    [
        ("animatediff", None, {}),
        ("svd", None, {}),
        ("animatediff", ControlNetConfig(4, ignores_latents=True), {"conditioning_frames": 1}),
        ("animatediff", ControlNetConfig(3, (16,)), {"conditioning_frames": 4}),
        ("magicanimate", ControlNetConfig(3, (16,)), {"motion_video": 4}),
    ],
    ids=["text", "image", "SparseCtrl", "ControlNet", "MagicAnimate"],
)
def test_every_pipeline_gets_inputs_of_its_kind_and_size(family, controlnet, options):
    takes = FAMILIES[family].takes_with(UNet3DConfig(controlnet=controlnet))
    case = sampling.SampleCase(videos=3, steps=1, frames=4, height=8, width=16)
    inputs, given = sampling.make_inputs(case, takes, ["a", "b"])
    assert given.get("controlnet_frame_indices", [0]) == [0]
    assert given.keys() - {"controlnet_frame_indices"} == options.keys()
    if takes.inputs == "images":
        assert [image.shape for image in inputs] == 3 * [(8, 16, 3)]
    else:
        assert inputs == ["a", "b", "a"]
    for name, frames in options.items():
        assert given[name].shape == (frames, 8, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unet", "--size", "tiny"], r"the UNet at 8192x8192 latents needs about \d+"),
        (["products", "--size", "tiny"], "the largest product needs about"),
        (["sample"], "sampling 16 frames of 65536x65536 with shapes needs about"),
    ],
    ids=["unet", "products", "sample"],
)
def test_what_cannot_fit_is_refused_before_anything_is_allocated(capsys, arguments, message):
    assert benchmark.main([*arguments, "--height", "65536", "--width", "65536"]) == 2
    assert re.search(message, capsys.readouterr().err)


ALONE = """
import sys
from qvd_jax import benchmark
from qvd_jax.benchmarks import rounds, sampling
from jax._src import xla_bridge

def measure(*_):
    print("initialized" if xla_bridge.backends_are_initialized() else "untouched")
    raise SystemExit

rounds.time_in_turn = sampling.measure_start = measure
if __name__ == "__main__":
    benchmark.main(sys.argv[1:])
"""


@pytest.mark.parametrize("what", [["unet", "--size", "tiny"], ["sample"]], ids=["unet", "sample"])
def test_the_process_that_starts_the_others_takes_no_device(what, tmp_path):
    """A TPU serves one process at a time."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    command = [sys.executable, str(script), *what, "--dtype", "float32"]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout == "untouched\n"
    )
