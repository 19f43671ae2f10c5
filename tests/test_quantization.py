"""From a float pipeline to an int8 checkpoint that samples."""

import json
import math
import re
from dataclasses import replace

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from parity import relative_error
from rescaling import rescale_channels

import qvd_jax
from qvd_jax import calibrate, checkpoint, items
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.sampler import Conditions
from qvd_jax.errors import InputError
from qvd_jax.kernels import int8
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines import observation
from qvd_jax.pipelines.loading import save
from qvd_jax.pipelines.observation import CalibrationConfig, collect
from qvd_jax.pipelines.quantization import make_plan, quantize, solve_plan, unet_layers
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import LayerSpec, Policy, Rule, named_policy

PROMPTS = ["a red circle", "a blue square"]
SIZE = {"frames": 3, "height": 8, "width": 12}
CONFIG = CalibrationConfig(steps=2, rows=64)
SAMPLE = {**SIZE, "steps": 2, "output_type": "latents"}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return qvd_jax.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def quantized(pipe):
    return quantize(pipe, "qvd-w8a8", PROMPTS, CONFIG, SIZE)


def test_int8_latents_are_near_the_float_ones(pipe, quantized):
    exact, found = (p(PROMPTS, **SAMPLE) for p in (pipe, quantized[0]))
    noise = np.square(found - exact).sum() / np.square(exact).sum()
    assert 0 < noise < 10 ** (-20 / 10)  # guidance multiplies it


def test_reports_name_every_layer(pipe, quantized):
    paths = {layer.path for layer in unet_layers(pipe, SIZE)} - {"conv_in", "conv_out"}
    assert {report.path for report in quantized[1]} == paths
    for report in quantized[1]:
        assert report.sqnr > 20, report
        if report.method == "htdq":
            assert report.td_score_after >= report.td_score_before
        else:
            assert report.coverage_after >= report.coverage_before - 0.01


def test_layers_that_read_one_tensor_share_its_quantizer(pipe, quantized):
    """The text is one tensor, which every cross-attention reads."""
    sources = {layer.path: layer.source for layer in unet_layers(pipe, SIZE)}
    texts = [path for path in sources if path.endswith("attention/block/attn2/to_kv")]
    assert len(texts) > 2
    assert len({sources[path] for path in texts}) == 1
    unet = flax.traverse_util.flatten_dict(quantized[0].params["unet"], sep="/")
    for name in ("in_scale", "in_offset"):
        first, *others = (unet[f"{path}/{name}"] for path in texts)
        for other in others:
            np.testing.assert_array_equal(first, other)
    qkv = [sources[path] for path in sources if path.endswith("to_qkv")]
    assert len(set(qkv)) == len(qkv)


def test_calibration_repeats(pipe, quantized):
    again, _ = quantize(pipe, "qvd-w8a8", PROMPTS, CONFIG, SIZE)
    chex.assert_trees_all_equal(again.params, quantized[0].params)


def test_a_saved_int8_checkpoint_samples_the_same(quantized, tmp_path):
    save(quantized[0], tmp_path / "int8")
    restored = qvd_jax.load(tmp_path / "int8")
    assert restored.quantization == quantized[0].quantization
    assert {leaf.dtype.name for leaf in jax.tree.leaves(restored.params["unet"])} == {
        "int8",
        "int32",
        "float32",
        "bfloat16",
    }
    np.testing.assert_array_equal(restored(PROMPTS, **SAMPLE), quantized[0](PROMPTS, **SAMPLE))


def traces(work):
    """How often `work` goes through the UNet in Python, as it does to compile and not to run."""
    calls = []

    def intercept(call, arguments, options, context):
        if isinstance(context.module, UNet3D):
            calls.append(context.method_name)
        return call(*arguments, **options)

    with nn.intercept_methods(intercept):
        work()
    return len(calls)


@pytest.mark.parametrize("kind", ["float", "observing", "int8"])
def test_a_checkpoint_loaded_again_is_not_traced_again(kind, tiny_checkpoint, quantized, tmp_path):
    folder = tiny_checkpoint
    if kind == "int8":
        folder = tmp_path / "int8"
        save(quantized[0], folder)

    def use():
        pipe = qvd_jax.load(folder)
        params = pipe.params["unet"]
        # Of a length that no other test has.
        context = jnp.zeros((1, 5, pipe.unet.config.context_dim))
        if kind == "observing":
            given = pipe.unet, params, (context,), None
            return lambda: observation._observe.trace(*given, method="context_features")
        given = pipe.unet, params, jnp.arange(3.0), Conditions(context)
        return lambda: sampler.prepare.jitted.trace(*given)

    first, second = (traces(use()) for _ in range(2))
    assert first > 0
    assert second == 0


def test_int8_checkpoints_that_are_not_finite_are_refused(quantized, tmp_path):
    """Codes of NaN are zeros: the latents would not tell."""
    params = jax.tree.map(lambda leaf: leaf, quantized[0].params)
    norm = params["unet"]["mid_block"]["blocks_0"]["resnet"]["norm1"]
    norm["scale"] = norm["scale"].at[3].set(jnp.nan)
    save(replace(quantized[0], params=params), tmp_path / "int8")
    with pytest.raises(InputError, match=r"int8: unet/mid_block/.*/norm1/scale is not finite"):
        qvd_jax.load(tmp_path / "int8")


@pytest.mark.slow
def test_four_bit_weights_are_stored_as_int4(pipe, tmp_path):
    four, _ = quantize(pipe, "minmax-w4a8", PROMPTS[:1], CONFIG, SIZE)
    save(four, tmp_path / "w4")
    restored = qvd_jax.load(tmp_path / "w4")
    chex.assert_trees_all_equal(restored.params["unet"], four.params["unet"])
    assert (
        restored.params["unet"]["mid_block"]["blocks_0"]["resnet"]["conv1"]["kernel"].dtype
        == jnp.int4
    )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_every_product_the_policy_names_has_int8_operands(quantized, platform, monkeypatch):
    monkeypatch.setattr(int8, "_has_vnni", lambda: True)
    pipe = quantized[0]
    unet, params = pipe.unet, jax.eval_shape(lambda: pipe.params["unet"])
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, 3, 4, 6, 4), (1,), (1, 77, unet.config.context_dim))
    ]
    forward = jax.jit(lambda params, *inputs: unet.apply({"params": params}, *inputs))
    text = export.export(forward, platforms=[platform])(params, *inputs).mlir_module()
    # Of functions that several layers share there is one text and several calls.
    signatures = re.findall(r"stablehlo\.(?:dot_general|convolution).* : (\(.*?\)) ->", text)
    kinds = [re.findall(r"x(ui8|i8|f32|bf16)>", signature) for signature in signatures]
    integer = [kind for kind in kinds if "i8" in kind]
    assert integer
    assert all(kind == ["ui8" if platform == "cpu" else "i8", "i8"] for kind in integer)
    # What is left in float: conv_in, conv_out, and attention's two products (or one custom call).
    kernels = set()
    for leaf in jax.tree.leaves(params):
        if leaf.dtype == jnp.int8 and leaf.ndim > 1:
            outputs, *taps, channels = leaf.shape
            # As stored, as flax has them, and as products of patches.
            kernels |= {leaf.shape, (*taps, channels, outputs)}
            kernels.add((math.prod(taps) * channels, outputs))
    for signature in signatures:
        if "i8" not in signature:
            weights = re.findall(r"tensor<([\dx]+)xf32>", signature)[-1]
            assert tuple(map(int, weights.split("x"))) not in kernels


def test_the_unet_of_a_quantized_pipeline_keeps_its_seed_rule(quantized):
    together = quantized[0](PROMPTS, seed=3, **SAMPLE)
    alone = quantized[0](PROMPTS[:1], seed=3, **SAMPLE)
    np.testing.assert_array_equal(together[:1], alone)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mse-w8a8", "smoothquant-w6a6", "qdiffusion-w8a8", "qvd-w8a16"])
def test_other_policies_sample(pipe, policy):
    other, reports = quantize(pipe, policy, PROMPTS[:1], replace(CONFIG, rows=16), SIZE)
    assert other.quantization.policy == policy
    assert np.isfinite(other(PROMPTS[:1], **SAMPLE)).all()
    assert min(report.sqnr for report in reports) > 5


def test_rescaled_channels_change_no_output_but_every_range(pipe):
    """The controlled case's transformation is one of the same function."""
    rng = np.random.default_rng(0)
    params = pipe.params["unet"]
    scattered = rescale_channels(params, rng)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, scattered)
    assert sum(jax.tree.leaves(changed)) > 50
    latents = rng.standard_normal((1, 3, 4, 6, 4), np.float32)
    text = rng.standard_normal((1, 77, pipe.unet.config.context_dim), np.float32)
    forward = jax.jit(lambda p: pipe.unet.apply({"params": p}, latents, jnp.ones(1), text))
    assert relative_error(forward(scattered), forward(params)) < 1e-3


@pytest.mark.slow
def test_rescaled_channels_of_the_shapes_model_change_no_output():
    model = qvd_jax.load("shapes", dtype="float32")
    scattered = rescale_channels(model.params["unet"], np.random.default_rng(0))
    latents = jnp.asarray(model.initial_noise(0, 1, model.latents_shape(16, 64, 64)))
    text = model.encode_text(["a small red circle moving left on a white background"])
    forward = jax.jit(lambda p: model.unet.apply({"params": p}, latents, jnp.full(1, 500.0), text))
    assert relative_error(forward(scattered), forward(model.params["unet"])) < 1e-3


def test_step_aware_scales_belong_to_their_steps(pipe, tmp_path):
    config = replace(CONFIG, step_aware=True)
    # Of a few layers: what belongs to one belongs to all.
    policy = Policy("own", (Rule("*/ff/*", LayerSpec("minmax")),))
    aware, _ = quantize(pipe, policy, PROMPTS, config, SIZE)
    assert jax.tree.leaves(aware.params["unet_gains"])
    for gain in jax.tree.leaves(aware.params["unet_gains"]):
        assert gain.shape == (2,)
        assert float(gain.min()) > 0
        # The step with the widest range needs the layer's own D.
        assert float(gain.max()) == pytest.approx(1, rel=0.02)
    exact, found = (p(PROMPTS, **SAMPLE) for p in (pipe, aware))
    assert np.square(found - exact).sum() < 0.02 * np.square(exact).sum()
    save(aware, tmp_path / "aware")
    restored = qvd_jax.load(tmp_path / "aware")
    np.testing.assert_array_equal(restored(PROMPTS, **SAMPLE), found)
    with pytest.raises(InputError, match=r"3 steps of ddim: .* one for each of 2 other steps"):
        restored(PROMPTS, **{**SAMPLE, "steps": 3})
    scheduler = replace(restored.scheduler, timestep_spacing="trailing")
    with pytest.raises(InputError, match=r"2 steps of ddim: .* one for each of 2 other steps"):
        replace(restored, scheduler=scheduler)(PROMPTS, **SAMPLE)


def test_ranges_of_tokens_and_of_steps_are_refused_together(pipe):
    message = "conv1|linear|proj.*: its policy has ranges of tokens, .* a range for each step"
    with pytest.raises(InputError, match=message):
        quantize(pipe, "qvd-plus-w8a8", PROMPTS, replace(CONFIG, step_aware=True), SIZE)


def test_steps_are_refused_where_no_layer_has_a_range_for_them(pipe):
    with pytest.raises(InputError, match="step_aware has no meaning for the policy qvd-w8a16"):
        quantize(pipe, "qvd-w8a16", PROMPTS, replace(CONFIG, step_aware=True), SIZE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"steps": 3}}, "options: steps is a field of CalibrationConfig"),
        ({"options": {"negative_prompts": "blurry"}}, "'negative_prompts' has no meaning for a"),
        ({"options": {"num_frames": 3}}, "'num_frames' has no meaning for a calibration; .*frames"),
        ({"prompts": ["a", 3]}, r"prompts\[1\] is no text, but of type int"),
        ({"prompts": 3}, "prompts = 3: a text, or several"),
    ],
)
def test_what_a_calibration_is_not_given_is_named_before_it_samples(pipe, given, message):
    broken = replace(pipe, params={"unet": pipe.params["unet"]})
    with pytest.raises(InputError, match=message):
        quantize(broken, **{"prompts": PROMPTS, "config": CONFIG, **given})


def test_what_plus_makes_of_layers_is_saved_and_restored(pipe, tmp_path):
    """Learned factors, GPTQ and ranges of tokens at 4 bits, of a few layers."""
    plus = make_plan(pipe, named_policy("qvd-plus-w4a8"), CONFIG, SIZE).specs
    path = next(path for path in plus if "/ff/" in path)
    assert str(plus[path]) == (
        "learned, w4a8, weights clipped, gptq, a range for each token where a kernel has one tap"
    )
    policy = Policy("own", (Rule("down_blocks_0/*/ff/*", plus[path]),))
    int8, reports = quantize(pipe, policy, PROMPTS, CONFIG, SIZE)
    assert min(report.sqnr for report in reports) > 15
    exact, found = (p(PROMPTS, **SAMPLE) for p in (pipe, int8))
    assert np.square(found - exact).sum() < 0.02 * np.square(exact).sum()
    save(int8, tmp_path / "plus")
    np.testing.assert_array_equal(qvd_jax.load(tmp_path / "plus")(PROMPTS, **SAMPLE), found)


@pytest.mark.slow
@pytest.mark.parametrize("ranges", ["step", "token"])
def test_a_layer_that_propagates_is_solved_on_what_it_sees_behind_quantized_ones(pipe, ranges):
    """Its bias keeps the mean of its output there; other layers are those of the first solution."""
    layers = make_plan(pipe, Policy("all", (Rule("*", LayerSpec("minmax")),)), CONFIG, SIZE).layers
    path = next(path for path in layers if path.endswith("conv_shortcut"))
    spec = LayerSpec("minmax", 2, 3, ranges=ranges)
    before = ("*/resnet/conv1", "*/proj_out")
    once, again = (
        quantize(
            pipe,
            Policy(
                "mine",
                (
                    Rule(path, replace(spec, propagate=propagate)),
                    *(Rule(pattern, spec) for pattern in before),
                ),
            ),
            PROMPTS,
            CONFIG,
            SIZE,
        )[0]
        for propagate in (False, True)
    )
    rows = collect(once, layers, PROMPTS, CONFIG, SIZE).joined[path].rows[:, 0]
    flat = flax.traverse_util.flatten_dict(pipe.params["unet"], sep="/")
    exact = np.float64(rows) @ np.float64(flat[f"{path}/kernel"].reshape(layers[path].kernel))
    exact = exact.mean(0) + np.asarray(flat[f"{path}/bias"])
    errors, others = [], []
    for model in (once, again):
        found = flax.traverse_util.flatten_dict(model.params["unet"], sep="/")
        own = {name.split("/")[-1]: x for name, x in found.items() if name.startswith(f"{path}/")}
        module = layer_set({"": spec}).dense(layers[path].kernel[-1])
        gain = {"quant": {"gain": jnp.ones(())}} if ranges == "step" else {}
        y = module.apply({"params": own, **gain}, rows)
        errors.append(np.abs(np.asarray(y).mean(0) - exact).max())
        others.append({name: x for name, x in found.items() if not name.startswith(path)})
    chex.assert_trees_all_equal(*others)
    assert errors[1] < 1e-4 < 1e-3 < errors[0]


def test_what_is_not_finite_is_named_with_its_layer_and_step(pipe):
    params = jax.tree.map(lambda leaf: leaf, pipe.params)
    resnet = params["unet"]["mid_block"]["blocks_0"]["resnet"]
    resnet["conv1"] = {**resnet["conv1"], "bias": resnet["conv1"]["bias"] * jnp.nan}
    where = r"mid_block/blocks_0/resnet/conv2: its input is not finite at step 1 of 2, input 1"
    with pytest.raises(InputError, match=where):
        quantize(replace(pipe, params=params), "minmax-w8a8", PROMPTS[:1], CONFIG, SIZE)


@pytest.mark.parametrize(
    ("pattern", "spec", "message"),
    [
        ("*/conv1", LayerSpec("htdq"), "conv1: htdq is for layers that read the time embedding"),
        ("*/to_qkv", LayerSpec("htdq"), "to_qkv: htdq is for layers that read the time embedding"),
        ("time_embedding/*", LayerSpec("scri", ranges="step"), "linear_1: it runs once before"),
    ],
)
def test_methods_are_refused_where_they_have_no_meaning(pipe, pattern, spec, message):
    policy = Policy("own", (Rule(pattern, spec),))
    with pytest.raises(InputError, match=message):
        quantize(pipe, policy, PROMPTS, CONFIG, SIZE)


def test_a_layer_no_data_reached_stays_float(pipe):
    policy = Policy("own", (Rule("*/time_emb_proj", LayerSpec("minmax")),))
    paths = [layer.path for layer in unet_layers(pipe, SIZE)]
    observed = collect(pipe, paths, PROMPTS[:1], CONFIG, SIZE)
    unseen = "mid_block/blocks_0/resnet/time_emb_proj"
    del observed.joined[unseen]
    quantized, reports = solve_plan(pipe, make_plan(pipe, policy, CONFIG, SIZE), observed, CONFIG)
    assert quantized.quantization.specs.keys() == {report.path for report in reports}
    assert unseen not in quantized.quantization.specs
    found, exact = (
        p.params["unet"]["mid_block"]["blocks_0"]["resnet"]["time_emb_proj"]
        for p in (quantized, pipe)
    )
    chex.assert_trees_all_equal(found, exact)
    assert np.isfinite(quantized(PROMPTS[:1], **SAMPLE)).all()


def test_layers_of_long_videos_are_those_of_their_windows(pipe):
    longer = pipe.unet.config.max_frames + 1
    layers = unet_layers(pipe, {**SIZE, "frames": longer})
    assert {layer.path for layer in layers} == {layer.path for layer in unet_layers(pipe, SIZE)}


def test_quantized_pipelines_are_not_quantized_again(quantized):
    with pytest.raises(InputError, match=r"quantized already \(qvd-w8a8\)"):
        quantize(quantized[0], "minmax-w8a8", PROMPTS, CONFIG, SIZE)


@pytest.mark.slow
def test_an_interrupted_calibration_leaves_nothing_and_a_rerun_starts_clean(
    tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    (tmp_path / "own.yaml").write_text(
        "name: own\nrules:\n- {pattern: '*/time_emb_proj', spec: {method: htdq}}\n"
    )
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    arguments = [
        "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "int8"),
        "--prompts-file", str(tmp_path / "prompts.txt"), "--policy", str(tmp_path / "own.yaml"),
        "--steps", "1", "--frames", "2", "--height", "8", "--width", "8",
        "--report", str(tmp_path / "report"),
    ]  # fmt: skip
    before = {path.name for path in tmp_path.iterdir()}
    write = items.save_params

    def interrupt(folder, name, params):
        write(folder, name, params)
        raise KeyboardInterrupt

    monkeypatch.setattr(items, "save_params", interrupt)
    assert calibrate.main(arguments) == 130
    assert "interrupted; nothing half-written is left" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == before
    monkeypatch.setattr(items, "save_params", write)
    assert calibrate.main(arguments) == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html"}


def test_calibrate_command(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "own.yaml").write_text(
        "name: own\nrules:\n- {pattern: '*/ff/*', spec: {method: scri}}\n"
        "- {pattern: '*/time_emb_proj', spec: {method: htdq}}\n"
    )
    arguments = [
        "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "int8"),
        "--prompt", "a red circle", "--policy", str(tmp_path / "own.yaml"),
        # Of the shapes that are compiled already: those of a step of `quantized`.
        "--steps", "1", "--frames", "3", "--height", "8", "--width", "12", "--samples", "16",
        "--report", str(tmp_path / "report"), "--scheduler", "euler", "--karras",
    ]  # fmt: skip
    assert calibrate.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "*/ff/*" in printed
    assert "stays float" in printed
    layers = json.loads((tmp_path / "int8" / "layers.json").read_text())
    assert all("/ff/" in layer["path"] or layer["method"] == "htdq" for layer in layers)
    # With one step there are none to be told apart.
    assert all(layer["td_score_after"] is None for layer in layers)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "ranges.png"}
    page = (tmp_path / "report" / "report.html").read_text().replace("<wbr>", "")
    assert all(layer["path"] in page for layer in layers)
    float_line, int8_line = re.findall("UNet, .*: .* MB on disk, .* of float32's", printed)
    assert float_line.startswith("UNet, float: ")
    assert float_line.endswith(" 1.000 of float32's")
    assert float(int8_line.split()[-3]) < 1
    manifest = checkpoint.read_manifest(tmp_path / "int8")
    assert manifest.quantization["policy"] == "own"
    assert (manifest.scheduler["solver"], manifest.scheduler["use_karras_sigmas"]) == (
        "euler",
        True,
    )

    assert (
        calibrate.main([*arguments[:1], str(tmp_path / "int8"), "--out", str(tmp_path / "x")]) == 2
    )
    assert "is quantized already" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "qvd-w8a9"], "unknown policy 'qvd-w8a9'; did you mean 'qvd-w8a8'"),
        (["--policy", "{tmp}/none.yaml"], "none.yaml does not exist"),
        (["--policy", "{tmp}/bad.yaml"], "weight_bits = 1: 2 to 8 are possible"),
        (["--policy", "{tmp}/idle.yaml"], "no layer has such a path"),
        (["--prompts-file", "{tmp}/empty.txt"], "has no prompts"),
        ([], "has none of its own; pass --prompt TEXT or --prompts-file FILE"),
        (["--checkpoint", "{tmp}/nothing"], "nothing does not exist; the folder of a checkpoint"),
        (["--checkpoint", "shape"], "is expected; did you mean 'shapes'?"),
        (["--report", "{tmp}/int8"], "int8: name folders apart"),
        (["--report", "{tmp}/one.txt", "--overwrite"], "one.txt is a file; name a folder"),
        (["--budget", "0.02"], "of float32's bytes, by 2 bits of weights in every layer"),
        (["--budget", "0.2", "--keep", "20"], "budget and keep: one of them is needed"),
        (["--out", "{tiny}", "--overwrite"], "tiny would replace "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tiny_checkpoint, tmp_path, capsys, arguments, message
):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("a\n")
    (tmp_path / "bad.yaml").write_text(
        "name: bad\nrules: [{pattern: '*', spec: {method: scri, weight_bits: 1}}]\n"
    )
    (tmp_path / "idle.yaml").write_text("name: idle\nrules: [{pattern: nowhere}]\n")
    given = [argument.format(tmp=tmp_path, tiny=tiny_checkpoint) for argument in arguments]
    if given and "--prompts-file" not in given:
        given += ["--prompts-file", str(tmp_path / "one.txt")]
    before = sorted(tmp_path.iterdir())
    options = ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "int8"), *given]
    assert calibrate.main(options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before
