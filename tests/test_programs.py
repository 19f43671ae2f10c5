"""Programs that are kept between processes: never traced twice, never taken for another."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.export import _export

import qvd_jax
from qvd_jax import programs
from qvd_jax.diffusion import sampler
from qvd_jax.kernels.attention import dot_product_attention
from qvd_jax.models.layers import FLOAT
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.programs import Program
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import LayerSpec

SMALL = {"frames": 3, "height": 8, "width": 12, "steps": 2, "output_type": "latents"}


@dataclasses.dataclass(frozen=True)
class Scale:
    by: float


def scaled(scale: Scale, state: dict, x: jax.Array) -> dict:
    traces.append(scale)
    return {"sum": state["sum"] + scale.by * x}


traces: list[Scale] = []


@contextlib.contextmanager
def nothing_kept():
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calls `scaled` as a new process would: with a `Program` that knows none yet."""
    monkeypatch.setattr(programs, "_OWN", programs._OWN | {__name__})
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    traces.clear()

    def call(by=2.0, x=(1.0, 2.0), dtype=jnp.float32, program=None):
        program = program or Program(scaled, ("scale",), ("state",))
        x = jnp.asarray(x, dtype)
        return program(Scale(by), state={"sum": jnp.ones_like(x)}, x=x)["sum"].tolist()

    yield call
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_second_process_traces_nothing(run, tmp_path):
    assert [run(), run()] == [[3.0, 5.0]] * 2
    assert traces == [Scale(2.0)]
    assert len(list((tmp_path / "programs").iterdir())) == 1


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"by": 3.0}, [4.0, 7.0]),
        ({"x": (1.0, 2.0, 3.0)}, [3.0, 5.0, 7.0]),
        ({"dtype": jnp.int32, "by": 2}, [3, 5]),
        ({"dtype": jnp.bfloat16}, [3.0, 5.0]),
    ],
)
def test_what_differs_is_traced_anew(run, other, found):
    run()
    assert run(**other) == found
    assert len(traces) == 2


def test_other_code_and_other_settings_are_traced_anew(run, monkeypatch):
    run()
    with jax.default_matmul_precision("highest"):
        run()
    assert len(traces) == 2
    monkeypatch.setattr(programs, "code_digest", lambda: "of other code")
    run()
    assert len(traces) == 3


def test_one_process_traces_anew_under_other_settings(run):
    program = Program(scaled, ("scale",), ("state",))
    run(program=program)
    for precision in ("bfloat16", "highest", "bfloat16"):
        with jax.default_matmul_precision(precision):
            run(program=program)
    run(program=program)
    assert len(traces) == len(program.known) == 3


def test_what_jax_does_not_export_is_run_as_traced(run, tmp_path):
    def told(scale, x):
        return scale.by * jax.pure_callback(np.negative, jax.typeof(x), x)

    told.__module__, told.__qualname__ = __name__, "told"
    program = Program(told, ("scale",))
    assert [program(Scale(2.0), jnp.ones(2)).tolist() for _ in range(2)] == [[-2.0, -2.0]] * 2
    assert not (tmp_path / "programs").exists()


def test_a_program_with_cudnns_attention_is_kept(tmp_path, monkeypatch):
    """It is lowered for CUDA, as where jax finds a GPU and cuDNN."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(_export, "default_export_platform", lambda: "cuda")
    operand = jnp.zeros((2, 64, 2, 40), jnp.bfloat16)
    arguments = {}, {"q": operand, "k": operand, "v": operand}
    program = Program(dot_product_attention.__wrapped__, ())
    program._find(tmp_path, {}, arguments)
    (file,) = tmp_path.glob("*.jaxexport")
    kept = jax.export.deserialize(bytearray(file.read_bytes()))
    lowered = jax.jit(kept.call).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "__cudnn$fmhaSoftmax" in lowered.as_text()


def test_a_damaged_program_is_traced_anew_and_replaced(run, tmp_path):
    run()
    (file,) = (tmp_path / "programs").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no program"):
        file.write_bytes(damaged)
        assert run() == [3.0, 5.0]
        assert len(file.read_bytes()) == len(whole)
    assert len(traces) == 4


def test_nothing_is_kept_where_jax_keeps_nothing(run, tmp_path):
    with nothing_kept():
        assert run() == run() == [3.0, 5.0]
    assert not (tmp_path / "programs").exists()


def test_a_program_may_be_part_of_another(run, tmp_path):
    program = Program(scaled, ("scale",), ("state",))
    outer = jax.jit(lambda x: program(Scale(2.0), {"sum": x}, x)["sum"])
    assert outer(jnp.ones(2)).tolist() == [3.0, 3.0]
    assert not (tmp_path / "programs").exists()


def test_a_pipeline_samples_again_without_a_trace(tiny_checkpoint, monkeypatch):
    first = qvd_jax.load(tiny_checkpoint)("one", **SMALL)
    for program in (sampler.prepare, sampler.sample_steps):
        monkeypatch.setattr(program, "known", {})
    for method in ("denoise", "context_features", "temporal_features"):
        monkeypatch.setattr(UNet3D, method, lambda *_, **__: pytest.fail("it is traced"))
    np.testing.assert_array_equal(qvd_jax.load(tiny_checkpoint)("one", **SMALL), first)


@pytest.mark.slow  # Both are compiled.
def test_a_kept_program_samples_what_a_jitted_one_does(tiny_checkpoint):
    pipe = qvd_jax.load(tiny_checkpoint)
    with nothing_kept():
        plain = pipe("one", **SMALL)
    np.testing.assert_array_equal(pipe("one", **SMALL), plain)


def test_layers_that_differ_are_told_apart():
    specs = [
        {},
        {"a": LayerSpec("scri")},
        {"b": LayerSpec("scri")},
        {"a": LayerSpec("scri", weight_bits=4)},
    ]
    sets = [FLOAT, *(layer_set(spec) for spec in specs), layer_set({}, jnp.bfloat16)]
    texts = [programs._describe(layers) for layers in sets]
    assert len(set(texts)) == len(texts)
    assert texts[1] == programs._describe(layer_set({}))


@pytest.mark.parametrize(
    "value",
    [lambda x: x, object(), Scale(1.0), {1.0, 2.0}],
    ids=["lambda", "object", "class", "set"],
)
def test_what_another_process_could_not_tell_apart_has_no_description(value):
    with pytest.raises(programs._UnknownError):
        programs._describe(value)
