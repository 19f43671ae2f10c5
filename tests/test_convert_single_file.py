"""Stable Diffusion 1.5 as one file, and VAEs as one file, in the forms people have them in."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pytorch_sources import Weights, edit_json, ldm_unet, ldm_vae, make_sd15, read_weights
from safetensors.torch import save_file

from convert import names, single_file
from convert.__main__ import main as convert
from convert.pipeline import Source, open_source
from qvd_jax.errors import InputError

EMA = "model_ema.diffusion_modelinput_blocks00weight"


@pytest.fixture(scope="module")
def sd15(tiny, tmp_path_factory) -> Path:
    """Stable Diffusion 1.5 as a folder, with the motion modules in `../adapter`."""
    return make_sd15(tiny[0], tmp_path_factory.mktemp("folder") / "sd15")


@pytest.fixture(scope="module")
def whole(tiny, sd15: Path) -> Weights:
    """The same model as the original code has it in one file."""
    unet, vae = (read_weights(folder) for folder in (sd15 / "unet", tiny[0] / "vae"))
    text = read_weights(sd15 / "text_encoder")
    prefix = "cond_stage_model.transformer.text_model."
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return {
        **{f"model.diffusion_model.{n}": t for n, t in ldm_unet(unet, (True, False), 1).items()},
        **{f"first_stage_model.{n}": t for n, t in ldm_vae(vae, 2).items()},
        **{prefix + n.removeprefix("text_model."): t for n, t in text.items()},
        f"{prefix}embeddings.position_ids": torch.arange(16)[None],
        "betas": betas,
        "alphas_cumprod": torch.cumprod(1 - betas, 0),
        "sqrt_alphas_cumprod": torch.cumprod(1 - betas, 0).sqrt(),
    }


@pytest.fixture
def place(sd15: Path, tmp_path: Path) -> Path:
    """A folder with the configs of the model beside the file that is to be put there."""
    shutil.copytree(sd15, tmp_path / "models" / "sd15")
    shutil.copytree(sd15.parent / "adapter", tmp_path / "adapter")
    return tmp_path / "models"


def opened(file: Path, place: Path, **options: Any) -> Source:
    return open_source(file, place.parent / "adapter", **options)


def arrays(source: Source) -> dict[str, np.ndarray]:
    """All that is read, by our paths."""
    shapes = source.configs.param_shapes("float32")
    maps = {"unet": names.UNET, "vae": names.VAE, "text_encoder": names.CLIP_TEXT}
    found = {}
    for part, tensors in source.tensors.items():
        names.check_names(shapes[part], maps[part], tensors, part)
        params = names.build_params(shapes[part], maps[part], tensors, "float32", lambda n: None)
        leaves = jax.tree.leaves_with_path(params)
        found |= {f"{part}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    return found


@pytest.fixture(scope="module")
def reference(sd15: Path) -> Source:
    return open_source(sd15, sd15.parent / "adapter")


@pytest.fixture(scope="module")
def values(reference: Source) -> dict[str, np.ndarray]:
    return arrays(reference)


def without_text_model(weights: Weights) -> Weights:
    return {
        name.replace("transformer.text_model.", "transformer."): t for name, t in weights.items()
    }


def half(weights: Weights) -> Weights:
    return {n: t.half() if t.is_floating_point() else t for n, t in weights.items()}


def with_extras(weights: Weights) -> Weights:
    """As unpruned files and files that have been merged have it."""
    more = [EMA, "model_ema.decay", "first_stage_model.loss.logvar", "cond_stage_model.logit_scale"]
    more += ["first_stage_model.model_ema.decay", "logvar", "lvlb_weights"]
    more += ["cond_stage_model.transformer.text_projection.weight", "posterior_variance"]
    return {**weights, **{name: torch.zeros(2) for name in more}}


FORMS: dict[str, tuple[str, Callable[[Weights], Any]]] = {
    "safetensors": ("model.safetensors", dict),
    "fp16": ("model.fp16.safetensors", half),
    "ckpt": ("v1-5-pruned.ckpt", lambda w: {"state_dict": w, "global_step": 1, "callbacks": {}}),
    "bare ckpt": ("model.ckpt", dict),
    "extras": ("v1-5.ckpt", lambda w: {"state_dict": with_extras(w)}),
    "no text_model": ("old.safetensors", without_text_model),
}


def write(weights: Any, file: Path, **header: str) -> Path:
    if file.suffix == ".safetensors":
        kept = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
        save_file(kept, file, metadata={"format": "pt", **header})
    else:
        torch.save(weights, file)
    return file


@pytest.mark.parametrize("form", FORMS)
def test_one_file_is_its_folder(form, whole, place, reference, values):
    name, change = FORMS[form]
    source = opened(write(change(whole), place / name), place)
    assert source.configs == reference.configs
    assert source.scheduler == reference.scheduler
    assert source.defaults == reference.defaults
    assert source.tokenizer.name_or_path == str(place / "sd15" / "tokenizer")
    found = arrays(source)
    assert found.keys() == values.keys()
    for key, value in values.items():
        of_file = "fp16" in form and "motion_module" not in key
        np.testing.assert_array_equal(found[key], np.float16(value) if of_file else value)
    notes = [note for note in source.notes if note not in reference.notes]
    assert notes == [f"configs and tokenizer are those of {place / 'sd15'}"]


def test_the_files_are_as_diffusers_reads_them(tiny, whole, place):
    file = write(whole, place / "model.safetensors")
    for module, folder in ((UNet2DConditionModel, place / "sd15"), (AutoencoderKL, tiny[0])):
        part = "unet" if module is UNet2DConditionModel else "vae"
        found = module.from_single_file(str(file), config=str(place / "sd15"), subfolder=part)
        expected = read_weights(folder / part)
        assert found.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[n]) for n, tensor in found.state_dict().items())


def test_configs_are_named_by_an_option_or_refused(whole, place):
    file = write(whole, place / "model.safetensors")
    shutil.move(place / "sd15", place.parent / "elsewhere")
    with pytest.raises(
        InputError, match=r"its UNet has \[32, 64\] channels, .* --config DIR names"
    ):
        opened(file, place)
    source = opened(file, place, config=place.parent / "elsewhere")
    assert source.tokenizer.name_or_path == str(place.parent / "elsewhere" / "tokenizer")
    # Two folders fit and differ.
    for name in ("a", "b"):
        shutil.copytree(place.parent / "elsewhere", place / name)
    assert opened(file, place).tokenizer.name_or_path == str(place / "a" / "tokenizer")
    edit_json(place / "b" / "unet" / "config.json", norm_num_groups=4)
    with pytest.raises(InputError, match=r"--config DIR names .*, one of .*/a, .*/b$"):
        opened(file, place)
    with pytest.raises(InputError, match="has configs of its own; --config is for one file"):
        opened(place / "a", place, config=place / "b")


def test_the_published_size_needs_no_configs(tmp_path):
    """At full size, from shapes alone."""
    known = single_file.SD15
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768).state_dict()
    shapes = {
        "unet": {name: single_file.LazyTensor(tuple(t.shape), None) for name, t in unet.items()},
        "text_encoder": {
            "embeddings.token_embedding.weight": single_file.LazyTensor((49408, 768), None)
        },
    }
    configs, tokenizer, notes = single_file._configs(tmp_path / "x.ckpt", shapes, None)
    assert configs == known
    assert notes == ()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert tokenizer.pad_token_id == 49407


@pytest.mark.parametrize(
    ("header", "field", "value"),
    [
        ({"modelspec.prediction_type": "v"}, "prediction_type", "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "prediction_type", "epsilon"),
        ({"modelspec.resolution": "128x128"}, "sample_size", 16),
        ({"modelspec.resolution": "128x64"}, "sample_size", [8, 16]),
    ],
)
def test_the_header_is_obeyed(whole, place, header, field, value):
    file = write(whole, place / "model.safetensors", **header)
    configs = single_file.open_model_file(file, None, needs_vae=True).configs
    part = "unet" if field == "sample_size" else "scheduler"
    assert configs[part][field] == value


def test_what_a_header_says_and_is_not_obeyed_is_named(whole, place):
    header = {
        "modelspec.resolution": "100",
        "modelspec.encoder_layer": "2",
        "modelspec.title": "x",
        "modelspec.unknown": "y",
    }
    file = write(whole, place / "model.safetensors", **header)
    notes = "\n".join(single_file.open_model_file(file, None, needs_vae=True).notes)
    assert "modelspec.resolution = '100', which is not read; WIDTHxHEIGHT" in notes
    assert "modelspec.encoder_layer = '2', that it was trained with another than the last" in notes
    assert "modelspec.unknown" in notes
    assert "modelspec.title" not in notes


def test_markers_of_v_prediction_without_signal_at_the_end_are_obeyed(whole, place):
    marked = {**whole, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = write(marked, place / "model.safetensors")
    found = single_file.open_model_file(file, None, needs_vae=True)
    scheduler = found.configs["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    assert not any("belong to no component" in note for note in found.notes)


def test_a_config_with_fewer_layers_cuts_the_text_encoder_as_of_a_folder(whole, place):
    file = write(whole, place / "model.safetensors")
    config = place / "sd15" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    found = single_file.open_model_file(file, None, needs_vae=True)
    layers = {name.split(".")[2] for name in found.tensors["text_encoder"] if ".layers." in name}
    assert layers == {"0"}
    assert not any("num_hidden_layers" in note for note in found.notes)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
            "its header says modelspec.architecture = 'stable-diffusion-xl-v1-base', but its tens",
        ),
        (
            {"modelspec.prediction_type": "flow"},
            "its header says modelspec.prediction_type = 'flow', which is not supported",
        ),
    ],
)
def test_a_header_that_contradicts_the_tensors_is_refused(whole, place, header, message):
    file = write(whole, place / "model.safetensors", **header)
    with pytest.raises(InputError, match=message):
        opened(file, place)


def test_damaged_tables_and_tensors_of_no_component_are_named(whole, place):
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    spoilt = {**whole, ids: whole[ids].float() - 0.01, "odd.weight": torch.zeros(1)}
    spoilt["betas"] = whole["betas"] * 2
    notes = "\n".join(opened(write(spoilt, place / "model.safetensors"), place).notes)
    assert "its table of position ids is damaged; positions are counted anew" in notes
    assert "odd.weight belong to no component and are not read" in notes
    assert "its tables betas are not those of its scheduler's config, which decides" in notes


OTHER_MODELS = [
    (["conditioner.embedders.1.model.ln_final.weight"], "is Stable Diffusion XL; one file may be"),
    (["cond_stage_model.model.ln_final.weight"], "is Stable Diffusion 2; one file may be"),
    (["model.diffusion_model.joint_blocks.0.x.weight"], "is a diffusion transformer .*, no UNet"),
    (["double_blocks.0.img_attn.qkv.weight"], "is a diffusion transformer .*, no UNet"),
    (["lora_unet_x.lora_down.weight"], "is a LoRA, which --lora takes; one file may be"),
    (["encoder.down_blocks.0.resnets.0.conv1.weight"], "is a VAE; one file may be"),
    (["x.weight"], "is no model that is known; one file may be"),
]


@pytest.mark.parametrize(("extra", "message"), OTHER_MODELS)
def test_other_models_are_called_by_name_and_nothing_is_written(extra, message, tmp_path, capsys):
    weights = {name: torch.zeros(2, 2) for name in extra}
    file = write(weights, tmp_path / "model.safetensors")
    assert convert([str(file), "--out", str(tmp_path / "out"), "--motion", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_of_inpainting_and_parts_that_are_missing_are_named(whole, place):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    wide = {**whole, name: torch.zeros(32, 9, 3, 3)}
    with pytest.raises(InputError, match=r"is a model of inpainting .* takes 9 channels, 4"):
        opened(write(wide, place / "model.safetensors"), place)
    no_text = {name: t for name, t in whole.items() if not name.startswith("cond_stage")}
    with pytest.raises(InputError, match=r"lacks cond_stage_model\.transformer\. of Stable"):
        opened(write(no_text, place / "model.safetensors"), place)
    no_vae = {name: t for name, t in whole.items() if not name.startswith("first_stage")}
    file = write(no_vae, place / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks first_stage_model\. .*--vae gives a VAE apart"):
        opened(file, place)
    assert opened(file, place, vae=place / "sd15" / "vae").tensors["vae"]


VAES: dict[str, tuple[str, Callable[[Weights], Any]]] = {
    "ft-mse": ("vae-ft-mse-840000-ema-pruned.safetensors", lambda w: ldm_vae(w, 2)),
    "vae.pt": (
        "anything.vae.pt",
        lambda w: {"state_dict": {**ldm_vae(w, 2), "loss.logvar": torch.zeros(1)}, "step": 1},
    ),
    "in a model": (
        "x.ckpt",
        lambda w: (
            {f"first_stage_model.{n}": t for n, t in ldm_vae(w, 2).items()}
            | {"model.diffusion_model.out.2.bias": torch.zeros(4)}
        ),
    ),
    "diffusers": ("diffusion_pytorch_model.fp16.safetensors", dict),
    "ema": ("kl-f8.ckpt", lambda w: {**ldm_vae(w, 2), "model_ema.decay": torch.zeros(1)}),
}


@pytest.mark.parametrize("form", VAES)
def test_a_vae_that_is_one_file_is_its_folder(form, tiny, tmp_path):
    torch.manual_seed(7)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(tiny[0] / "vae")).eval()
    vae.save_pretrained(tmp_path / "vae")
    name, change = VAES[form]
    file = write(change(vae.state_dict()), tmp_path / name)
    expected, found = (open_source(tiny[0], vae=path) for path in (tmp_path / "vae", file))
    assert found.configs == expected.configs
    expected, found = (
        arrays(dataclasses.replace(source, tensors={"vae": source.tensors["vae"]}))
        for source in (expected, found)
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


def test_what_is_no_vae_is_named(tiny, tmp_path):
    unet = write(read_weights(tiny[0] / "unet"), tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match=r"is no AutoencoderKL: .*; it is motion modules"):
        open_source(tiny[0], vae=unet)
    (tmp_path / "page.safetensors").write_text("<!doctype html><title>404</title>")
    with pytest.raises(InputError, match=r"page.safetensors is a web page, not weights"):
        open_source(tiny[0], vae=tmp_path / "page.safetensors")
    xl = {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}
    file = write(ldm_vae(read_weights(tiny[0] / "vae"), 2), tmp_path / "xl.safetensors", **xl)
    with pytest.raises(InputError, match=r"a VAE of Stable Diffusion 1.5 is expected"):
        open_source(tiny[0], vae=file)
    of_xl = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    of_xl |= {"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1)}
    file = write(of_xl, tmp_path / "sdxl.safetensors")
    with pytest.raises(InputError, match=r"is Stable Diffusion XL; a VAE of Stable Diffusion 1\.5"):
        open_source(tiny[0], vae=file)
    shutil.copytree(tiny[0], tmp_path / "source")
    shutil.copyfile(
        tiny[0] / "vae" / "diffusion_pytorch_model.safetensors",
        tmp_path / "source" / "unet" / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(InputError, match=r"unet is a VAE; an AnimateDiff or Stable Diffusion 1.5"):
        open_source(tmp_path / "source")


def test_a_folder_around_one_file_says_so(tmp_path):
    write({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"holds model.safetensors: a model that is one file is"):
        open_source(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match=r"its model_index.json is of FluxPipeline"):
        open_source(tmp_path)


def test_a_vae_of_its_own_needs_none_in_the_source(tiny, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for part in tiny[0].iterdir():
        if part.name != "vae":
            (folder / part.name).symlink_to(part)
    with pytest.raises(InputError, match="source lacks the folders vae of a diffusers"):
        open_source(folder)
    opened = open_source(folder, vae=tiny[0] / "vae")
    assert opened.tensors["vae"].keys() == open_source(tiny[0]).tensors["vae"].keys()
