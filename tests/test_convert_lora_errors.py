"""LoRAs that do not fit the model, or whose headers contradict their tensors, are named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from pytorch_sources import Weights
from random_animatediff import make_text_encoder, make_unet2d
from random_families import make_svd
from safetensors.torch import save_file

from convert import lora_header
from convert.__main__ import main as convert
from convert.lora import Merged, merge_loras
from convert.pipeline import open_source
from convert.tensors import LazyTensor, Tensors
from qvd_jax.errors import InputError

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
Q, CONV = f"{ATTENTION}.to_q", "mid_block.resnets.0.conv1"
FLAT = f"lora_unet_{Q.replace('.', '_')}"


@pytest.fixture(scope="module")
def components() -> dict[str, Tensors]:
    """Names and shapes of a UNet without motion modules, and of a text encoder."""
    with torch.device("meta"):
        modules = {"unet": make_unet2d(), "text_encoder": make_text_encoder()}
    return {
        part: {
            name: LazyTensor(tuple(tensor.shape), lambda: np.zeros(()))
            for name, tensor in module.state_dict().items()
        }
        for part, module in modules.items()
    }


def pair(stem: str = f"unet.{Q}", rank: int = 4, **more: torch.Tensor) -> Weights:
    """A LoRA of one layer."""
    named = {f"{stem}.{part.replace('__', '.')}": tensor for part, tensor in more.items()}
    up, down = torch.ones(32, rank), torch.ones(rank, 32)
    return {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down, **named}


def kohya(alpha: float = 4.0) -> Weights:
    up, down = torch.ones(32, 4), torch.ones(4, 32)
    named = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
    return {f"{FLAT}.{part}": tensor for part, tensor in named.items()}


def peft(component: str = "unet", **values: Any) -> dict[str, str]:
    """The header of a file that diffusers saves."""
    entries = {"r": 4, "lora_alpha": 2, **values}
    text = json.dumps({f"{component}.{key}": value for key, value in entries.items()})
    return {"lora_adapter_metadata": text}


def merge(
    components: dict[str, Tensors], path: Path, tensors: Weights, header: dict[str, str]
) -> Merged:
    save_file(tensors, path, header)
    return merge_loras(components, [(path, 1.0)])


LORAS: list[tuple[str, Weights, dict[str, str], str]] = [
    ("rank", pair(), peft(r=8), f"lora_adapter_metadata says rank 8 of {Q}, it is 4"),
    (
        "rank of a pattern",
        pair(),
        peft(rank_pattern={"attn1.to_q": 2}),
        f"lora_adapter_metadata says rank 2 of {Q}, it is 4",
    ),
    (
        "two alphas",
        pair(alpha=torch.tensor(4.0)),
        peft(),
        f"lora_adapter_metadata says alpha 2 of {Q}, its tensor 4",
    ),
    ("dora of none", pair(), peft(use_dora=True), "says use_dora = True .* tensors lack it"),
    (
        "none of dora",
        pair(lora_magnitude_vector=torch.ones(32)),
        peft(),
        "says use_dora = False of the unet, whose tensors have it",
    ),
    ("bias of none", pair(), peft(lora_bias=True), "says lora_bias = True .* tensors lack it"),
    (
        "other layers",
        pair(),
        peft(target_modules=["to_k", "to_v"]),
        rf"says target_modules = \['to_k', 'to_v'\], the tensors also change {Q}",
    ),
    ("other expression", pair(), peft(target_modules=".*to_k"), f"the tensors also change {Q}"),
    ("no JSON", pair(), {"lora_adapter_metadata": "{"}, "lora_adapter_metadata is no JSON"),
    ("no object", pair(), {"lora_adapter_metadata": "3"}, "metadata is no JSON object"),
    ("no number", pair(), peft(r="four"), "r = 'four' is not supported; finite numbers are"),
    ("rank of zero", pair(), peft(r=0), "r = 0 is not supported; finite numbers are"),
    ("alpha of nan", pair(), peft(lora_alpha=float("nan")), "lora_alpha = nan is not supported"),
    ("no pattern", pair(), peft(alpha_pattern={"(": 1}), r"alpha_pattern has '\(', no pattern"),
    ("pissa", pair(), peft(init_lora_weights="pissa"), "it changes the base model's weights"),
    ("another type", pair(), peft(peft_type="OFT"), "peft_type = 'OFT' is not supported; LORA"),
    ("transposed", pair(), peft(fan_in_fan_out=True), "fan_in_fan_out = True is not supported"),
    ("unknown key", pair(), peft(new_thing=3), "new_thing = 3 is not supported; leave it out"),
    (
        "dimension",
        kohya(),
        {"ss_network_dim": "8", "ss_network_alpha": "4"},
        "its header says ss_network_dim = 8, its tensors have 4",
    ),
    (
        "alpha",
        kohya(),
        {"ss_network_dim": "4", "ss_network_alpha": "1.0"},
        "its header says ss_network_alpha = 1, its tensors have 4",
    ),
    ("alpha of inf", kohya(float("inf")), {}, "alpha is one finite number, not inf"),
    (
        "of another base",
        {
            f"{FLAT}.lora_down.weight": torch.ones(4, 64),
            f"{FLAT}.lora_up.weight": torch.ones(64, 4),
        },
        {"ss_base_model_version": "sd_v2"},
        rf"{Q} is \(32, 32\), which up \(64, 4\) x down \(4, 64\) does not fit; its header says "
        "ss_base_model_version = sd_v2",
    ),
    (
        "two text encoders",
        pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        {},
        r"this model lacks \(1\): lora_te2_.*; a LoRA with two text encoders is one of Stable "
        "Diffusion XL",
    ),
    (
        "motion",
        pair("unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"),
        {},
        "it is a motion LoRA, and this model has no motion modules",
    ),
    (
        "unknown parts",
        pair(oft_blocks=torch.ones(4, 8, 8)) | {"logit_scale": torch.ones(1)},
        {},
        rf"these keys are of no known kind \(2\): logit_scale, unet.{Q}.oft_blocks",
    ),
    ("twice", pair() | pair(f"base_model.model.{Q}"), {}, f"{Q} has (up|down) twice, the second"),
    (
        "half a product",
        {f"{FLAT}.hada_w1_a": torch.ones(32, 4), f"{FLAT}.hada_w1_b": torch.ones(4, 32)},
        {},
        f"{Q} has hada_w1_a, hada_w1_b, but not hada_w2_a, hada_w2_b",
    ),
    (
        "two kinds",
        pair(diff=torch.ones(32, 32)),
        {},
        f"{Q} has up, down, diff: no known adapter",
    ),
    (
        "factors",
        {f"{FLAT}.lokr_w1": torch.ones(4, 4), f"{FLAT}.lokr_w2": torch.ones(8, 4)},
        {},
        r"\(32, 32\), which lokr_w1 \(4, 4\) x lokr_w2 \(8, 4\) does not fit",
    ),
    (
        "kernels",
        pair(f"unet.{CONV}"),
        {},
        rf"{CONV} is \(64, 64, 3, 3\), which up \(32, 4\) x down \(4, 32\) does not fit",
    ),
    (
        "magnitudes",
        pair(dora_scale=torch.ones(1, 31)),
        {},
        r"\(32, 32\), which dora_scale \(1, 31\) does not fit",
    ),
    ("no bias", pair(diff_b=torch.ones(32)), {}, f"{Q} has diff_b, but the model has no bias"),
    (
        "whole weights",
        {f"{Q}.weight": torch.ones(32, 32)},
        {},
        "whole weights, such as .*, are no LoRA",
    ),
]


@pytest.mark.parametrize(
    ("tensors", "header", "message"), [pytest.param(*case[1:], id=case[0]) for case in LORAS]
)
def test_what_does_not_fit_is_named(components, tmp_path, tensors, header, message):
    with pytest.raises(InputError, match=rf"lora\.safetensors: .*{message}"):
        merge(components, tmp_path / "lora.safetensors", tensors, header)


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, LoKrConfig])
def test_every_key_of_peft_s_configs_is_read_or_known(components, tmp_path, config):
    names = {field.name for field in dataclasses.fields(config)}
    values = {key: v for key, v in config().to_dict().items() if key not in ("r", "peft_type")}
    merge(components, tmp_path / "defaults.safetensors", pair(), peft(**values))
    known = lora_header.READ | lora_header.NO_MATTER.keys()
    for key in names - known:
        with pytest.raises(InputError, match=f"{key} = 'x' is not supported"):
            merge(components, tmp_path / "lora.safetensors", pair(), peft(**{key: "x"}))
    for key in lora_header.NO_MATTER:
        merge(components, tmp_path / "lora.safetensors", pair(), peft(**{key: "x"}))


def test_headers_that_the_tensors_overrule_are_noted(components, tmp_path):
    arguments = json.dumps({"algo": "loha", "rs_lora": "True"})
    tensors = {
        f"{FLAT}.hada_w{i}_{side}": torch.ones(32, 4) if side == "a" else torch.ones(4, 32)
        for i in (1, 2)
        for side in "ab"
    }
    header = {"ss_network_args": arguments} | peft("text_encoder")
    notes = merge(components, tmp_path / "lora.safetensors", tensors, header).notes
    assert notes == (
        "merged lora.safetensors at scale 1",
        "lora.safetensors: its header's lora_adapter_metadata is also of text_encoder, of which "
        "it has no tensors",
        "lora.safetensors: its header says rs_lora; the alphas of its tensors decide, over the "
        "rank",
    )
    merged = merge(components, tmp_path / "peft.safetensors", pair(f"base_model.model.{Q}"), {})
    assert merged.notes[1:] == (
        "peft.safetensors: peft's adapter_config.json is not beside it; alpha is taken for the "
        "rank",
    )


def test_all_layers_that_the_model_lacks_are_listed_of_all_files(tiny, tmp_path, capsys):
    save_file(
        pair("unet.down_blocks.7.proj_in") | pair("unet.down_blocks.8.proj_in"),
        tmp_path / "one.safetensors",
    )
    save_file(pair("lora_te_text_model_encoder_layers_9_mlp_fc1"), tmp_path / "two.safetensors")
    save_file(pair(), tmp_path / "good.safetensors")
    loras = [f"--lora={tmp_path / name}.safetensors" for name in ("one", "good", "two")]
    assert convert([str(tiny[0]), "--out", str(tmp_path / "out"), *loras]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "safetensors" in line] == [
        f"error: {tmp_path}/one.safetensors: it adds to layers that this model lacks (2): "
        "unet.down_blocks.7.proj_in, unet.down_blocks.8.proj_in",
        f"{tmp_path}/two.safetensors: it adds to layers that this model lacks (1): "
        "lora_te_text_model_encoder_layers_9_mlp_fc1",
    ]
    assert not (tmp_path / "out").exists()


def test_svd_takes_loras_on_queries_that_change_nothing_too(tmp_path):
    """Its attention to one token is one whatever queries and keys are."""
    pipe = make_svd(tmp_path / "svd")
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    width = pipe.unet.get_submodule(block).attn2.to_q.weight.shape[0]
    up, down = torch.randn(width, 2), torch.randn(2, width)
    save_file(
        {
            f"unet.{block}.{layer}.lora_{side}.weight": tensor.clone()
            for layer in ("attn1.to_q", "attn2.to_q")
            for side, tensor in (("A", down), ("B", up))
        },
        tmp_path / "lora.safetensors",
    )
    source = open_source(tmp_path / "svd", loras=[(tmp_path / "lora.safetensors", 0.5)])
    assert "merged lora.safetensors at scale 0.5" in source.notes
    assert f"{block}.attn2.to_q.weight" not in source.tensors["unet"]
    expected = pipe.unet.get_submodule(block).attn1.to_q.weight + 0.5 * up @ down
    found = source.tensors["unet"][f"{block}.attn1.to_q.weight"].read()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-5)
