"""What the TPU's compiler makes of the blocks at their real size; without libtpu they say so."""

import pytest

from qvd_jax.benchmarks import chips, compiled, compilers, unet
from qvd_jax.benchmarks.rounds import Variant
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
# Two videos of 16 frames and 512x512 pixels.
CASE = unet.Case("sd15", 2, 16, 64, 64)
INT8 = Variant(unet.OURS, "qvd-w8a8", "bfloat16")


@pytest.fixture(scope="module")
def parts():
    """The int8 part of each name, compiled for a v5e."""
    target = compiled.Target(chips.find("v5e"))
    try:
        compilers.check_installed(target.chip)
    except InputError as missing:
        pytest.skip(str(missing))
    results = compiled.compile_programs(CASE, target, [*PARTS], [INT8])
    return {result["part"]: result for result in results}


@pytest.mark.parametrize("part", PARTS)
def test_every_product_of_the_policy_is_of_int8_operands(parts, part):
    assert parts[part]["products"]["s8 x s8"] == PARTS[part][0]


@pytest.mark.parametrize("part", PARTS)
def test_memory_and_copies_are_bounded(parts, part):
    _, copies, gigabytes = PARTS[part]
    assert parts[part]["copies"] <= copies
    assert parts[part]["peak_memory_bytes"] <= gigabytes * 1e9


@pytest.mark.parametrize("part", [part for part in PARTS if "attention" in part])
def test_logits_stay_on_the_chip(parts, part):
    """`largest_arrays` are those outside the on-chip memory."""
    large = parts[part]["largest_arrays"]
    assert all(a["bytes"] <= 2**26 for a in large if a["type"] == "f32")


def test_attention_over_frames_is_a_kernel(parts):
    assert len(parts["0.temporal_attention"]["handwritten"]) == 3
