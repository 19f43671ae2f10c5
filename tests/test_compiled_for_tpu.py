"""What the TPU's compiler makes of the blocks at their real size; without libtpu they say so."""

import json

import pytest

from qvd_jax import benchmark
from qvd_jax.benchmarks import chips, compilers
from qvd_jax.errors import InputError

PARTS = {
    # Products of int8 operands, copies and GB that an int8 part has at most.
    "0.self_attention": (2, 14, 0.8),
    "0.cross_attention": (2, 15, 0.6),
    "0.temporal_attention": (2, 11, 0.7),
    "0.feed_forward": (3, 9, 0.8),
    # A product for each row of two kernels.
    "1.resnet": (6, 12, 0.3),
    "1.motion": (9, 40, 0.5),
}
VIDEO = ["--batch", "2", "--frames", "16", "--height", "512", "--width", "512"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The int8 part of each name, compiled for a v5e in one run beside the float one."""
    try:
        compilers.check_installed(chips.find("v5e"))
    except InputError as missing:
        pytest.skip(str(missing))
    out = tmp_path_factory.mktemp("compiled") / "v5e.json"
    options = ["--dtype", "bfloat16", "--policy", "qvd-w8a8", "--part", *PARTS, "--out", str(out)]
    assert benchmark.main(["compiled", "--chip", "v5e", *VIDEO, *options]) == 0
    results = json.loads(out.read_text())["results"]
    return {r["part"]: r for r in results if r["mode"] == "qvd-w8a8"}


@pytest.mark.parametrize("part", PARTS)
def test_every_product_of_the_policy_is_of_int8_operands(compiled, part):
    assert compiled[part]["products"]["s8 x s8"] == PARTS[part][0]


@pytest.mark.parametrize("part", PARTS)
def test_memory_and_copies_are_bounded(compiled, part):
    _, copies, gigabytes = PARTS[part]
    assert compiled[part]["copies"] <= copies
    assert compiled[part]["peak_memory_bytes"] <= gigabytes * 1e9


@pytest.mark.parametrize("part", [part for part in PARTS if "attention" in part])
def test_logits_stay_on_the_chip(compiled, part):
    """`largest_arrays` are those outside the on-chip memory."""
    large = compiled[part]["largest_arrays"]
    assert all(a["bytes"] <= 2**26 for a in large if a["type"] == "f32")


def test_attention_over_frames_is_a_kernel(compiled):
    assert len(compiled["0.temporal_attention"]["handwritten"]) == 3
