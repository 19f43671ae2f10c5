"""Files of weights: harmless extras do not block them, and a file is called what it is."""

import argparse
import builtins
import collections
import contextlib
import datetime
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_sources import rewrite, weights_file
from refusals import assert_one_line_error
from safetensors.torch import save_file

from convert.kinds import describe
from convert.tensors import open_file, open_folder
from qvd_jax.errors import InputError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(3).half()}


def filled() -> collections.defaultdict:
    table = collections.defaultdict(list)
    table["a"].append(1)
    return table


HARMLESS: dict[str, Any] = {
    "numpy scalar": np.float64(0.3),
    "numpy array": np.arange(3),
    "numpy dtype": np.dtype("float32"),
    "Namespace": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("/x")),
    "path": pathlib.PosixPath("/x"),
    "Windows path": pathlib.PureWindowsPath("c:/x"),
    "OrderedDict": collections.OrderedDict(a=1),
    "filled defaultdict": filled(),
    "Counter": collections.Counter("abc"),
    "deque": collections.deque([1, 2]),
    "set": {1, 2},
    "bytes": b"abc",
    "date": datetime.datetime(2024, 1, 1),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "class": int,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_extras_do_not_block_the_weights_and_are_named(tmp_path, kind, zipped):
    content = {"state_dict": WEIGHTS, "epoch": 3, "extra": HARMLESS[kind]}
    torch.save(content, tmp_path / "mm.ckpt", _use_new_zipfile_serialization=zipped)
    opened = open_file(tmp_path / "mm.ckpt")
    assert opened.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        np.testing.assert_array_equal(opened[name].read(), tensor.numpy())
        assert opened[name].read().dtype == tensor.numpy().dtype
    (note,) = opened.notes
    assert note.endswith("mm.ckpt: beside the weights it holds extra, which are not read")


@pytest.mark.parametrize(
    "name", ["pytorch_lightning.utilities.parsing.AttributeDict", "omegaconf.dictconfig.DictConfig"]
)
def test_settings_of_packages_that_are_not_there_do_not_block_the_weights(
    tmp_path, monkeypatch, name
):
    module, _, attribute = name.rpartition(".")
    cls = type(attribute, (dict,), {"__module__": module})
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        package = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    setattr(sys.modules[module], attribute, cls)
    settings = cls(a=1)
    settings.more = 2
    torch.save({**WEIGHTS, "hyper_parameters": settings, "callbacks": {cls: 1}}, tmp_path / "x.pt")
    monkeypatch.undo()
    opened = open_file(tmp_path / "x.pt")
    assert opened.keys() == WEIGHTS.keys()
    assert opened.notes == ()


class Call:
    """Calls something on unpickling."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(builtins.eval, "1"), "builtins.eval"),
        (Call(builtins.getattr, int, "real"), "builtins.getattr"),
        (Call(subprocess.Popen, "true"), "subprocess.Popen"),
        (Call(pathlib.Path.cwd), "builtins.getattr"),
        (Call(torch.load, "x"), "torch.serialization.load"),
        (Call(np.load, "x"), "numpy.*load"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_beside_the_weights_refuses_the_file_and_is_named(tmp_path, call, name, zipped):
    torch.save(
        {"state_dict": WEIGHTS, "extra": call},
        tmp_path / "mm.ckpt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match=rf"mm\.ckpt is refused: .*\({name}\)"):
        open_file(tmp_path / "mm.ckpt")


def test_a_pickle_cannot_change_pytorch(tmp_path):
    """State set on a function or a class that a pickle names stays without effect."""
    build = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n"
    build += pickle.NONE + b"}" + b"X\x0c\x00\x00\x00__defaults__" + b"(K\x01t" + pickle.SETITEM
    build += pickle.TUPLE2 + pickle.BUILD + pickle.STOP
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.PROTO + b"\x02" + build)
        archive.writestr("x/version", "3\n")
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(InputError, match="holds a function, not named tensors"):
        open_file(tmp_path / "x.pt")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t},
        lambda t: {"model": {"state_dict": t}, "optimizer": {"state": {}}},
        lambda t: {"anything": t},
        lambda t: {name: torch.nn.Parameter(tensor) for name, tensor in t.items()},
    ],
)
def test_weights_are_found_in_any_wrapper(tmp_path, wrap):
    torch.save(wrap(WEIGHTS), tmp_path / "x.ckpt")
    assert open_file(tmp_path / "x.ckpt").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_small_floats_are_read_as_pytorch_reads_them(tmp_path, dtype):
    tensor = torch.linspace(-3, 3, 12).reshape(3, 4).to(dtype)
    save_file({"w": tensor}, tmp_path / "x.safetensors")
    torch.save({"w": tensor}, tmp_path / "x.pt")
    for file in ("x.safetensors", "x.pt"):
        found = open_file(tmp_path / file)["w"].read().astype(np.float32)
        np.testing.assert_array_equal(found, tensor.float().numpy())


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


WHOLE = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
OTHERS = {
    "web page": (b"<!DOCTYPE html><html><body>404", "is a web page, not weights"),
    "web page behind blanks": (b"\n\n <html lang='en'>", "is a web page, not weights"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 167335342\n",
        "is a Git LFS pointer, not the file it points to; run git lfs pull",
    ),
    "text": (b"Invalid username or password.", "is a text, not weights: 'Invalid username"),
    "JSON": (b'{"error":"Repository not found"}', "is a text, not weights: .*not found"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(32), "is a GGUF file of quantized weights"),
    "gzip": (b"\x1f\x8b\x08" + bytes(32), "is compressed by gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(32), "is a 7z archive"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(32), "is an image"),
    "longer shape": (header(a={**WHOLE, "shape": [4, 5]}), "is truncated or no safetensors file"),
    "wrong offsets": (header(a={**WHOLE, "data_offsets": [0, 128]}), "is truncated or no safet"),
    "overlap": (header(a=WHOLE, b=WHOLE), "is truncated or no safetensors file"),
    "odd dtype": (header(a={**WHOLE, "dtype": "Q9"}), "is truncated or no safetensors file"),
    "no JSON": (struct.pack("<Q", 9) + b"{nonsense" + bytes(9), "is truncated or no safetensors"),
    "of flax": (
        header(a=WHOLE, __metadata__={"format": "flax"}),
        "its header says format = 'flax'; weights of PyTorch",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_was_saved_in_the_place_of_weights_is_named(tmp_path, kind, suffix):
    content, message = OTHERS[kind]
    file = tmp_path / f"model{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_file(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_archives_without_weights_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"is a zip archive without a pickle of PyTorch; unpack"):
        open_file(tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", "")
        archive.writestr("x/constants.pkl", "")
    with pytest.raises(InputError, match="is a TorchScript program"):
        open_file(tmp_path / "x.ckpt")


def test_the_content_counts_not_the_suffix(tmp_path):
    save_file(WEIGHTS, tmp_path / "renamed.ckpt")
    torch.save(WEIGHTS, tmp_path / "renamed.safetensors")
    for file in tmp_path.iterdir():
        assert open_file(file).keys() == WEIGHTS.keys()


def test_a_header_is_kept_and_its_unknown_keys_are_named(tmp_path):
    said = {"format": "pt", "ss_network_dim": "4", "modelspec.title": "x", "frames": "24"}
    save_file(WEIGHTS, tmp_path / "x.safetensors", metadata=said)
    opened = open_file(tmp_path / "x.safetensors")
    assert opened.header == said
    (note,) = opened.notes
    assert note.endswith("x.safetensors: its header says frames = '24', which is not read")


@pytest.mark.parametrize(
    ("files", "read", "noted"),
    [
        (["", ".fp16", ".non_ema"], "", ()),
        ([".fp16", ".non_ema"], ".fp16", ()),
        ([".bf16"], ".bf16", ()),
        ([".non_ema", ".ema"], ".ema", ("model.non_ema.safetensors",)),
    ],
)
def test_any_variant_in_a_files_name_is_read(tmp_path, files, read, noted):
    for i, variant in enumerate(files):
        save_file({"w": torch.full((1,), float(i))}, tmp_path / f"model{variant}.safetensors")
    (tmp_path / "model.safetensors.index.json.bak").touch()
    opened = open_folder(tmp_path, "model", "pytorch_model")
    assert opened["w"].read() == files.index(read)
    assert len(opened.notes) == len(noted)
    assert all(name in note for name, note in zip(noted, opened.notes, strict=True))


def test_shards_of_any_variant_are_read(tmp_path):
    for i in (1, 2):
        save_file({f"w{i}": torch.ones(1)}, tmp_path / f"x.bf16-0000{i}-of-00002.safetensors")
    names = {f"w{i}": f"x.bf16-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (tmp_path / "x.safetensors.index.bf16.json").write_text(json.dumps({"weight_map": names}))
    assert open_folder(tmp_path, "x", "x").keys() == {"w1", "w2"}


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["conditioner.embedders.1.model.ln_final.weight", "model.diffusion_model.out.2.bias"],
         "Stable Diffusion XL"),
        (["cond_stage_model.model.ln_final.weight", "model.diffusion_model.out.2.bias"],
         "Stable Diffusion 2"),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.bias"], "Stable Diffusion 3, Flux"),
        (["double_blocks.0.img_attn.qkv.weight"], "Stable Diffusion 3, Flux"),
        (["transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.bias"], r"\(DiT\)"),
        (["blocks.0.cross_attn.q.weight", "patch_embedding.weight"], r"\(DiT\)"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
        (["lora_unet_x.hada_w1_a"], "a LoRA"),
        (["first_stage_model.encoder.down.0.block.0.conv1.weight"], "a VAE"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "a VAE"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a UNet"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet"),
        (["emb_params"], "an embedding of textual inversion"),
        (["text_model.encoder.layers.0.mlp.fc1.bias"], "a text encoder"),
    ],
)  # fmt: skip
def test_tensors_tell_what_they_belong_to(names, what):
    found = describe(names)
    assert found is not None
    assert re.search(what, found)
    assert describe(["nothing.weight"]) is None


@pytest.fixture(params=["safetensors", "bin", "old bin"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small file of weights."""
    (tmp_path / "unet").mkdir()
    save_file({"w": torch.ones(2, 3)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    if "bin" in request.param:
        rewrite(tmp_path / "unet", request.param)
    (file,) = (tmp_path / "unet").iterdir()
    assert open_file(file)["w"].shape == (2, 3)
    return file


def test_a_file_cut_anywhere_is_refused_on_opening(weights):
    data = weights.read_bytes()
    for length in range(len(data)):
        weights.write_bytes(data[:length])
        with pytest.raises(InputError, match=f"^{re.escape(str(weights))} is (truncated|refused)"):
            open_file(weights)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_with_one_changed_byte_is_read_or_refused(weights):
    data = weights.read_bytes()
    for i, byte in enumerate(data):
        weights.write_bytes(data[:i] + bytes([byte ^ 1]) + data[i + 1 :])
        with contextlib.suppress(InputError):
            for tensor in open_file(weights).values():
                tensor.read()


def test_full_precision_is_preferred_to_fp16_and_safetensors_to_pickles(tmp_path):
    stem = "diffusion_pytorch_model"
    (tmp_path / f"{stem}.fp16.bin").touch()
    # From the least wanted to the most: each is taken as soon as it is there.
    for i, name in enumerate((f"{stem}.bin", f"{stem}.fp16.safetensors", f"{stem}.safetensors")):
        tensors = {"w": torch.full((2,), i / 3)}
        (torch.save if name.endswith("bin") else save_file)(tensors, tmp_path / name)
        found = open_folder(tmp_path, stem, stem)["w"].read()
        np.testing.assert_array_equal(found, tensors["w"].numpy(), err_msg=name)


def test_pickled_parameters_and_bfloat16_tensors_are_read_like_float32(tmp_path):
    tensor = torch.randn(3, 5).bfloat16().float()
    pickled = {"parameter": torch.nn.Parameter(tensor), "half": tensor.bfloat16(), "epoch": 3}
    torch.save(pickled, tmp_path / "weights.ckpt")
    save_file({"stored": tensor.bfloat16()}, tmp_path / "weights.safetensors")
    tensors = open_file(tmp_path / "weights.ckpt") | open_file(tmp_path / "weights.safetensors")
    assert tensors.keys() == {"parameter", "half", "stored"}
    for found in tensors.values():
        np.testing.assert_array_equal(found.read().astype(np.float32), tensor.numpy())


class Evil:
    """Makes a folder on unpickling."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickle_does_not_run_and_is_named(source, tmp_path, run):
    marker = tmp_path / "marker"
    torch.save({"conv_in.weight": Evil(marker)}, weights_file(source / "unet").with_suffix(".bin"))
    weights_file(source / "unet").unlink()
    outcome = run(source)
    assert not marker.exists()
    assert_one_line_error(outcome, "diffusion_pytorch_model.bin is refused: ", "posix.mkdir")
    # PyTorch's own message says how to load it all the same.
    assert "weights_only" not in outcome.message
