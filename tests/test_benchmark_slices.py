"""`python -m qvd_jax.benchmark compiled --chip v5e:2x4`: what several chips do together."""

from collections import Counter
from dataclasses import replace

import divided
import jax
import jax.numpy as jnp
import pytest

from qvd_jax import benchmark
from qvd_jax.benchmarks import chips, compiled, compilers, hlo
from qvd_jax.benchmarks.rounds import in_fresh_process
from qvd_jax.diffusion import sampler
from qvd_jax.errors import InputError
from qvd_jax.meshes import MeshConfig

OF_SEVERAL = """
ENTRY %main (x: bf16[8,128], y: f32[4]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %y = f32[4]{0:S(1)} parameter(1)
  %turned = bf16[8,128]{1,0:S(1)} all-to-all(%x), channel_id=1, \
    replica_groups={{0,1,2,3},{7,6,5,4}}, dimensions={1}
  %summed = f32[4]{0} all-reduce(%y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %started = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) collective-permute-start(%turned), \
    source_target_pairs={{0,1},{1,0}}
  ROOT %done = bf16[8,128]{1,0} collective-permute-done(%started)
}
"""


def test_collectives_are_known_by_their_chips_and_by_what_each_sends():
    found = [operation.collective for operation in hlo.operations(OF_SEVERAL)]
    whole = 2 * 8 * 128
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found == [
        hlo.Collective("all-to-all", whole * 3 // 4, ((0, 1, 2, 3), (7, 6, 5, 4))),
        hlo.Collective("all-reduce", 4 * 4, pairs),
        hlo.Collective("collective-permute", whole, ((0, 1), (1, 0))),
    ]
    assert compiled.kind(hlo.operations(OF_SEVERAL)[0]) == "collectives"


@pytest.mark.parametrize(
    ("name", "count", "links"),
    [("v5e", 1, 0), ("v5e:2x2", 4, 2), ("v5e:2x4", 8, 2.5), ("v5p:2x2x2", 8, 3)],
)
def test_chips_of_a_grid_are_connected_to_their_neighbors(name, count, links):
    chip = chips.find(name)
    assert (chip.count, chip.links, chip.name) == (count, links, name)
    assert chip.one == chips.find(name.partition(":")[0])


@pytest.mark.parametrize(
    ("frames", "chip", "mesh", "message"),
    [
        # Frames and positions of the lowest resolution have no divisor in common.
        (
            [],
            "v5e:2x4",
            "guidance=2,frame=4",
            "25 frames do not divide into 4 parts; frame may be 1",
        ),
        (
            [],
            "v5p:1x1x5",
            "frame=5",
            "the 9216 positions of level 0 do not divide into 5 parts; frame may be 1",
        ),
        (
            ["--frames", "14"],
            "v5e:2x4",
            "guidance=2,frame=4",
            "14 frames do not divide into 4 parts; frame may be 1, 2",
        ),
    ],
)
def test_frames_of_stable_video_diffusion_divide_with_its_positions(
    capsys, frames, chip, mesh, message
):
    asked = ["compiled", "--size", "svd", *frames, "--chip", chip, "--mesh", mesh]
    assert benchmark.main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(message)


SLICE, DIVIDED = "v5e:2x4", MeshConfig(guidance=2, frame=4)
LATENTS = (divided.FRAMES, 4, 4, 4)


def collectives_of_a_step() -> Counter:
    """What the chips of a slice do together in a step of an int8 model, with what each sends."""
    pipe = divided.pipeline("animatediff", "int8")
    want = replace(pipe.defaults, frames=divided.FRAMES)
    table = pipe.schedule(divided.STEPS).table
    latents, text = jnp.zeros((1, *LATENTS)), jnp.zeros((2, 4, pipe.unet.config.context_dim))
    mesh = compilers.mesh(chips.find(SLICE), DIVIDED)
    config = pipe.sampler_config(want, pipe.schedule(divided.STEPS), on_cpu=False)

    def arguments(params):
        conditions = sampler.Conditions(text)
        return (
            params,
            sampler.initial_state(latents, table),
            table,
            sampler.prepare.jitted(pipe.unet, params, table.timestep, conditions),
            jnp.asarray(pipe.guidance(want)),
            sampler.video_keys(0, 1),
            jnp.int32(0),
        )

    shapes = jax.eval_shape(arguments, pipe.params["unet"])
    told = replace(config, count=1, mesh=mesh)
    program = sampler.sample_steps.jitted.lower(pipe.unet, *shapes, told).compile()
    found: Counter = Counter()
    for operation in hlo.operations(program.as_text()):
        if (one := operation.collective) is not None:
            found[one.kind, len(one.groups[0]), one.bytes] += operation.runs
    return found


def test_chips_exchange_nothing_but_temporal_tokens_moments_and_the_prediction():
    try:
        compilers.check_installed(chips.find(SLICE))
    except InputError as missing:
        pytest.skip(str(missing))
    with compilers.settings(chips.find(SLICE)):
        found = in_fresh_process("the sampler", collectives_of_a_step)
    # On the way down, in the middle, and twice on the way up: there and back, and two moments.
    modules, parts = 1 + 1 + 2, DIVIDED.frame
    frames, height, width, channels = LATENTS
    (width_of_tokens,) = divided.UNETS["animatediff"].block_channels
    groups = divided.UNETS["animatediff"].norm_groups
    tokens = 4 * frames // parts * height * width * width_of_tokens
    predictions = 2 * 4 * frames * height * width * channels
    assert found == {
        ("all-to-all", parts, tokens * 3 // 4): 2 * modules,
        ("all-reduce", parts, 2 * 4 * groups * 3 // 4): 2 * modules,
        ("all-reduce", DIVIDED.size, 2 * predictions * 7 // 8): 1,
    }
