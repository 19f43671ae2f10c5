"""Checkpoints keep what was saved, restore where and as asked, and say what is wrong with them."""

import gc
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from pytorch_sources import edit_json

import qvd_jax
from qvd_jax import checkpoint, items, memory
from qvd_jax.cli import command
from qvd_jax.config import from_dict
from qvd_jax.errors import InputError
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.loading import read_configs
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline
from qvd_jax.quant.policy import LayerSpec

COMPONENTS = {"unet", "vae", "text_encoder"}


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> TextToVideoPipeline:
    """The tiny checkpoint, float32."""
    return qvd_jax.load(tiny_checkpoint)


@pytest.fixture
def spoiled(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoiled."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def assert_bitwise_equal(found: dict, expected: dict) -> None:
    """Same names, dtypes and bits; NaN and negative zero included."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_and_loading_keeps_every_bit_and_setting(tiny_checkpoint, tmp_path, dtype):
    pipe = qvd_jax.load(tiny_checkpoint, dtype=dtype)
    bias = np.array(pipe.params["vae"]["quant_conv"]["bias"])
    bias[:4] = [-0.0, np.inf, np.nan, 1e-39]
    pipe.params["vae"]["quant_conv"]["bias"] = jnp.asarray(bias)
    qvd_jax.save(pipe, tmp_path / "saved")
    loaded = qvd_jax.load(tmp_path / "saved")
    assert loaded.params.keys() == COMPONENTS
    assert_bitwise_equal(loaded.params, pipe.params)
    chex.assert_type(jax.tree.leaves(loaded.params), jnp.dtype(dtype))
    for name in ("unet", "vae", "text_encoder", "scheduler", "defaults", "family", "description"):
        assert getattr(loaded, name) == getattr(pipe, name)
    prompts = ["a red panda", "", "Surfing!"]
    assert loaded.tokenizer(prompts)["input_ids"] == pipe.tokenizer(prompts)["input_ids"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    with pytest.raises(InputError, match=f"^{tmp_path}/saved exists already; "):
        qvd_jax.save(pipe, tmp_path / "saved")


def test_loading_casts_to_the_asked_dtype_and_no_other(reference, tiny_checkpoint, tmp_path):
    half = qvd_jax.load(tiny_checkpoint, dtype="bfloat16")
    assert half.unet.layers.dtype == half.unet.layers.param_dtype == jnp.bfloat16
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), reference.params)
    assert_bitwise_equal(half.params, rounded)
    qvd_jax.save(half, tmp_path / "half")
    widened = qvd_jax.load(tmp_path / "half", dtype=jnp.float32)
    assert widened.vae.layers.dtype == jnp.float32
    assert_bitwise_equal(
        widened.params,
        jax.tree.map(lambda x: x.astype(np.float32), rounded),
    )
    with pytest.raises(InputError, match="dtype = 'float16': it must be one of float32, bfloat16"):
        qvd_jax.load(tiny_checkpoint, dtype="float16")
    with pytest.raises(InputError, match="dtype = 'bf16': it must be one of float32, bfloat16"):
        qvd_jax.load(tiny_checkpoint, dtype="bf16")


def test_four_bits_take_little_more_than_half_a_byte_on_disk(tmp_path):
    codes = np.random.default_rng(0).integers(-7, 8, 500_000)
    for dtype in (jnp.int4, jnp.int8):
        items.save_params(tmp_path, dtype.dtype.name, {"kernel": jnp.asarray(codes, dtype)})
    assert checkpoint.disk_bytes(tmp_path / "int4") < 0.6 * len(codes)
    assert checkpoint.disk_bytes(tmp_path / "int8") >= len(codes)


def test_parameters_land_where_the_sharding_says(reference, tiny_checkpoint):
    # Not where arrays go by default.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    pipe = qvd_jax.load(tiny_checkpoint, sharding=sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(pipe.params))
    assert all(leaf.sharding != sharding for leaf in jax.tree.leaves(reference.params))
    assert_bitwise_equal(pipe.params, reference.params)


def test_a_host_whose_devices_are_not_the_first_loads_onto_its_own(tiny_checkpoint, monkeypatch):
    """The first device of all is another host's, which tells nothing and takes nothing."""
    monkeypatch.setattr(jax, "devices", lambda *_: [None])
    params = qvd_jax.load(tiny_checkpoint).params
    assert {leaf.device for leaf in jax.tree.leaves(params)} == {jax.local_devices()[0]}
    assert memory.total_bytes() > 0


def test_only_a_process_of_a_commands_own_has_its_allocator_changed(tiny_checkpoint, monkeypatch):
    libraries = []
    monkeypatch.setattr(memory.ctypes, "CDLL", libraries.append)
    qvd_jax.load(tiny_checkpoint)
    with command.restoring(["--checkpoint", "a"]):
        assert not libraries
    with command.restoring(None):
        assert libraries == [None]


def test_a_command_is_recorded_as_a_shell_reads_it(monkeypatch):
    words = ["--prompt", "a red; circle", "--out", "it's"]
    monkeypatch.setattr(sys, "argv", ["program", *words])
    for argv in (words, None):
        recorded = command.command_line("qvd_jax.evaluate", argv)
        assert shlex.split(recorded) == ["python", "-m", "qvd_jax.evaluate", *words]
    assert shlex.split(command.command_line("qvd_jax.evaluate", []))[3:] == []


def test_orbax_alone_restores_a_component(reference, tiny_checkpoint):
    for name in COMPONENTS:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tiny_checkpoint / name)
        assert_bitwise_equal(restored, reference.params[name])


def manifest(**changes: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "manifest.json", **changes)


def component(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        components = json.loads((path / "manifest.json").read_text())["components"]
        components[name] |= changes
        edit_json(path / "manifest.json", components=components)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(
            lambda path: (path / "manifest.json").unlink(),
            "checkpoint is no qvd_jax checkpoint: it has no manifest.json",
            id="none",
        ),
        pytest.param(
            lambda path: (path / "manifest.json").rename(path / "model_index.json"),
            "it has no manifest.json; convert it first: python -m qvd_jax.convert",
            id="diffusers folder",
        ),
        pytest.param(
            lambda path: (path / "manifest.json").write_text('{"family": '),
            "manifest.json is no JSON: Expecting value: line 1 column 12 (char 11)",
            id="half",
        ),
        pytest.param(
            lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"),
            "manifest.json is no JSON: ",
            id="binary",
        ),
        pytest.param(
            lambda path: (path / "manifest.json").write_text("[]"),
            "manifest.json: a mapping is needed, got []",
            id="array",
        ),
        pytest.param(
            manifest(format_version=5),
            "manifest.json has format version 5, this qvd_jax reads up to 4; install a newer "
            "qvd_jax",
            id="newer",
        ),
        pytest.param(
            manifest(schedulr={}),
            "manifest.json: unknown key 'schedulr'; did you mean 'scheduler'?",
            id="unknown key",
        ),
        pytest.param(
            manifest(scheduler={"solver": "dim"}),
            "manifest.json: scheduler.solver: unknown value 'dim'; did you mean 'ddim'?",
            id="unknown value",
        ),
        pytest.param(
            manifest(components={}),
            "manifest.json: components: key 'unet' is missing",
            id="missing key",
        ),
        pytest.param(
            manifest(defaults={"frames": "16"}),
            "manifest.json: defaults.frames: int is needed, got '16'",
            id="other type",
        ),
        pytest.param(
            manifest(defaults={"fps": 0}),
            "manifest.json: defaults: fps = 0: at least 1 is needed",
            id="no frames per second",
        ),
        pytest.param(
            component("vae", block_channels=[]),
            "manifest.json: components.vae: VAEConfig needs at least one level",
            id="no levels",
        ),
        pytest.param(
            manifest(family="sora"),
            "checkpoint: unknown family 'sora'; known: animatediff",
            id="unknown family",
        ),
        pytest.param(
            lambda path: shutil.rmtree(path / "tokenizer"),
            "tokenizer does not exist; a tokenizer folder is expected",
            id="no tokenizer",
        ),
        pytest.param(
            lambda path: [file.unlink() for file in (path / "tokenizer").iterdir()],
            "tokenizer holds no tokenizer: ",
            id="empty tokenizer",
        ),
        pytest.param(
            # transformers makes a tokenizer of three tokens of it.
            lambda path: [
                (path / "tokenizer" / name).unlink(missing_ok=True)
                for name in ("tokenizer.json", "vocab.json", "merges.txt")
            ],
            "tokenizer holds no tokenizer: ",
            id="tokenizer without vocabulary",
        ),
        pytest.param(
            lambda path: (path / "tokenizer" / "tokenizer.json").write_text('{"model": {}}'),
            "tokenizer holds no tokenizer: ",
            id="damaged tokenizer",
        ),
        pytest.param(
            lambda path: shutil.rmtree(path / "unet"),
            "the component 'unet' is missing",
            id="no UNet",
        ),
        pytest.param(
            lambda path: shutil.rmtree(path / "vae"), "the component 'vae' is missing", id="no VAE"
        ),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said_in_one_line(spoiled, edit, message):
    edit(spoiled)
    with pytest.raises(InputError) as error:
        qvd_jax.load(spoiled)
    assert message in str(error.value)
    assert str(spoiled) in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_of_a_damaged_manifest_are_not_allocated(spoiled):
    component("text_encoder", max_length=10**9)(spoiled)
    with pytest.raises(InputError, match=r"text_encoder does not fit \(1 names; "):
        qvd_jax.load(spoiled)


def test_arrays_that_do_not_fit_the_manifest_are_listed_at_once(spoiled, reference):
    file = spoiled / "manifest.json"
    components = json.loads(file.read_text())["components"]
    components["unet"] |= {
        "attention_levels": [False, True],
        "temporal_mid_block": False,
        "context_dim": 20,
    }
    edit_json(file, components=components)
    configs = from_dict(ComponentConfigs, components, "edited")
    want, have = (
        {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(t, sep="/").items()}
        for t in (configs.param_shapes("float32")["unet"], reference.params["unet"])
    )
    with pytest.raises(InputError) as error:
        qvd_jax.load(spoiled)
    head, *lines = str(error.value).splitlines()
    assert head == (
        f"{spoiled}/unet does not fit ({len(lines)} names; - missing, + extra, ! other shape):"
    )
    found = {sign: [] for sign in "-+!"}
    for line in lines:
        sign, name = line.split()[:2]
        found[sign].append(name.removesuffix(":"))
    assert found == {
        "-": sorted(want.keys() - have.keys()),
        "+": sorted(have.keys() - want.keys()),
        "!": sorted(name for name in want.keys() & have.keys() if want[name] != have[name]),
    }
    assert all(found.values())
    assert (
        "  ! mid_block/blocks_0/attention/block/attn2/to_kv/kernel: (24, 128), expected (20, 128)"
        in lines
    )


@pytest.fixture
def _quiet_garbage() -> Iterator[None]:
    """Drops the coroutines Orbax leaves behind when a restore fails."""
    yield
    gc.collect()


DAMAGES = {
    "lost": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
}


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)
@pytest.mark.usefixtures("_quiet_garbage")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_item_is_named_or_restores_whole(tmp_path, damage):
    generator = np.random.default_rng(0)
    params = {
        "dense": {"kernel": jnp.asarray(generator.normal(size=(60, 80)), jnp.float32)},
        "norm": {"scale": jnp.arange(5.0)},
    }
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    items.save_params(tmp_path, "good", params)
    files = [path for path in (tmp_path / "good").rglob("*") if path.is_file()]
    messages = []
    item = tmp_path / "bad"
    for file in files:
        shutil.copytree(tmp_path / "good", item)
        DAMAGES[damage](item / file.relative_to(tmp_path / "good"))
        try:
            restored = items.restore_params(tmp_path, "bad", expected)
        except InputError as error:
            messages.append(str(error))
        else:
            assert_bitwise_equal(restored, params)
        shutil.rmtree(item)
    assert len(messages) >= 3
    for message in messages:
        assert message.startswith(f"{item} is damaged")
        assert "\n" not in message
        # Nothing of what Orbax happened to trip over.
        assert not re.search("NoneType|bound method", message)


def test_damaged_layer_reports_are_named(tmp_path):
    arrays = {"a/b": {"lower": np.arange(3.0)}}
    checkpoint.write_layer_reports(tmp_path, [{"path": "a/b"}], arrays)
    figures, found = checkpoint.read_layer_reports(tmp_path)
    assert figures == [{"path": "a/b"}]
    chex.assert_trees_all_equal(found, arrays)
    (tmp_path / "layers.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"layers\.npz is damaged"):
        checkpoint.read_layer_reports(tmp_path)
    (tmp_path / "layers.json").write_text('[{"path":')
    with pytest.raises(InputError, match=r"layers.json is damaged: "):
        checkpoint.read_layer_reports(tmp_path)


def write_in_place(item: Path, name: str, value: np.ndarray) -> None:
    """Replaces one array of an item by another of its shape, as other tools do."""
    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}
    array = ts.open({"driver": "zarr", "kvstore": files, "path": name}, open=True).result()
    array.write(value).result()


def test_an_item_is_told_without_reading_it_while_its_files_are_those_saved(tmp_path, monkeypatch):
    params = {
        "a": {"kernel": jnp.arange(6.0).reshape(2, 3), "codes": jnp.arange(-7, 8, dtype=jnp.int4)},
        "a-b": {"scale": jnp.asarray(0.1, jnp.bfloat16)},
    }
    other = {**params, "a-b": {"scale": jnp.asarray(0.2, jnp.bfloat16)}}
    for name, saved in {"one": params, "two": other}.items():
        items.save_params(tmp_path, name, saved)
    read = {name: items.StoredItem(tmp_path, name).digest() for name in ("one", "two")}
    assert read["one"] != read["two"]
    with monkeypatch.context() as patched:
        patched.setattr(items, "StoredItem", None)
        assert items.digest(tmp_path, "one") == read["one"]
        copy = shutil.copytree(tmp_path / "one", tmp_path / "copy")
        assert items.digest(tmp_path, "copy") == read["one"]
    for damaged in ("", "{", "[]", "{}"):
        (copy / "digest.json").write_text(damaged)
        assert items.digest(tmp_path, "copy") == read["one"]
    (copy / "digest.json").unlink()
    assert items.digest(tmp_path, "copy") == read["one"]
    write_in_place(tmp_path / "one", "a-b.scale", other["a-b"]["scale"])
    assert items.digest(tmp_path, "one") == read["two"]


def test_no_file_tells_where_it_was_written(tmp_path):
    items.save_params(tmp_path, "item", {"kernel": jnp.ones((2, 3))})
    files = [path for path in (tmp_path / "item").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if str(tmp_path).encode() in path.read_bytes()]


def test_a_load_traces_the_networks_only_where_nobody_did(tiny_checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    traced = []
    shapes = ComponentConfigs.param_shapes
    monkeypatch.setattr(
        ComponentConfigs,
        "param_shapes",
        lambda *given: traced.append(given) or shapes(*given),
    )
    for dtype in ("float32", "bfloat16"):
        pipe = qvd_jax.load(folder, dtype=dtype)
        assert not traced
        want = shapes(pipe.configs, dtype)
        chex.assert_trees_all_equal_shapes_and_dtypes(pipe.params, want)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checked": None}))
    assert_bitwise_equal(
        qvd_jax.load(folder, dtype="float32").params["vae"],
        qvd_jax.load(tiny_checkpoint, dtype="float32").params["vae"],
    )
    assert len(traced) == 1


def test_parameters_that_do_not_fit_are_not_saved(tiny_checkpoint, tmp_path):
    pipe = qvd_jax.load(tiny_checkpoint)
    vae = {**pipe.params["vae"], "extra": {"kernel": jnp.ones(3)}}
    with pytest.raises(
        InputError, match=r"the pipeline does not fit \(1 names.*\n  \+ vae/extra/kernel \(3,\)"
    ):
        qvd_jax.save(replace(pipe, params={**pipe.params, "vae": vae}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("aware", "ranges"), [(True, "step"), (False, "static")])
def test_specs_before_version_4_say_step_aware(aware, ranges, tmp_path):
    shutil.copy(checkpoint.find("shapes-w8a8") / "manifest.json", tmp_path)
    told = {"method": "scri", "weight_bits": 4, "activation_bits": 8, "step_aware": aware}
    quantization = {"policy": "mine", "specs": {"a/b": told}, "timesteps": None}
    edit_json(tmp_path / "manifest.json", format_version=3, quantization=quantization)
    found = read_configs(tmp_path).quantization
    assert found.specs == {"a/b": LayerSpec("scri", 4, ranges=ranges)}
