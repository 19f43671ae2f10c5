"""Positional tables stored beside motion modules are obeyed, sinusoids or not."""

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter
from pytorch_sources import Weights, original_motion
from random_animatediff import make_adapter
from random_families import RGB, make_sparsectrl_module
from safetensors.torch import save_file

from convert import animatediff, positions
from convert.controlnet import check_config, open_controlnet
from convert.tensors import Tensors, open_file
from qvd_jax.models.configs import UNet3DConfig


def opened(tmp_path, weights: Weights) -> Tensors:
    """The weights by diffusers' names, as they are read from a file."""
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in weights.items()}, tmp_path / "x.sft"
    )
    found = open_file(tmp_path / "x.sft")
    return {animatediff.rename_original(name): tensor for name, tensor in found.items()}


def edit(adapter: MotionAdapter, change: object) -> Weights:
    """The adapter's weights with changed tables, a new one each."""
    weights = adapter.state_dict()
    tables = [name for name in weights if name.endswith(".pe")]
    return weights | {name: change(weights[name].clone()) for name in tables}


def lengthened(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([table, table], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "original"])
def test_sinusoids_are_recomputed(tmp_path, dtype, original):
    weights = edit(make_adapter("v1", motion_max_seq_length=200), lambda table: table.to(dtype))
    weights = original_motion(weights) if original else weights
    tensors = opened(tmp_path, weights)
    assert positions.length(tensors) == positions.published_length(tensors) == 200
    rest, kind = positions.take(tensors)
    assert kind == "sinusoidal"
    assert rest.keys() == {name for name in tensors if not name.endswith(".pe")}


@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "original"])
def test_other_tables_are_kept_for_each_attention(tmp_path, original):
    weights = edit(make_adapter("v2"), torch.randn_like)
    if original:
        weights = original_motion(weights)
        # The original code has a table for each attention.
        for name in weights:
            if name.endswith("blocks.1.pos_encoder.pe"):
                weights[name] = 2 * weights[name]
    tensors = opened(tmp_path, weights)
    rest, kind = positions.take(tensors)
    assert kind == "stored"
    assert not any(name.endswith(".pe") for name in rest)
    blocks = {name.rpartition(".attn1")[0] for name in rest if ".attn1.to_q" in name}
    assert len(blocks) == 7
    for block in blocks:
        one, two = (rest[f"{block}.positions.{i}"].read() for i in range(2))
        np.testing.assert_array_equal(two, 2 * one if original else one)
        name = f"{block}.attn1.pos_encoder.pe" if original else f"{block}.pos_embed.pe"
        np.testing.assert_array_equal(one, tensors[name].read())


def test_a_table_that_was_made_longer_tells_the_length_it_had(tmp_path):
    weights = edit(make_adapter("v1"), lengthened)
    tensors = opened(tmp_path, weights)
    assert (positions.length(tensors), positions.published_length(tensors)) == (48, 24)
    assert animatediff.version(tensors) == "v1"
    rest, kind = positions.take(tensors)
    assert kind == "stored"
    table = next(t for name, t in rest.items() if name.endswith(".positions.0")).read()
    np.testing.assert_array_equal(table[:, 24:], table[:, :24])


def test_modules_without_a_table_have_the_sinusoid(tmp_path):
    weights = edit(make_adapter("v3"), torch.randn_like)
    name = next(name for name in weights if name.endswith(".pe"))
    reference = make_adapter("v3").state_dict()[name]
    del weights[name]
    rest, _ = positions.take(opened(tmp_path, weights))
    found = rest[name.replace("pos_embed.pe", "positions.1")].read()
    np.testing.assert_allclose(found, reference.numpy(), atol=1e-5)


def test_sparsectrl_has_tables_of_its_own(tmp_path):
    module = make_sparsectrl_module(RGB)
    for name, table in module.named_buffers():
        if name.endswith(".pe"):
            table.copy_(torch.randn_like(table))
    module.save_pretrained(tmp_path / "rgb")
    unet = UNet3DConfig(
        block_channels=(32, 64), layers_per_block=1, attention_levels=(True, False),
        num_heads=(4, 4), context_dim=24, norm_groups=8, down_eps=(1e-5,) * 2, up_eps=(1e-5,) * 2,
        temporal_heads=(4, 4),
    )  # fmt: skip
    found = open_controlnet(tmp_path / "rgb", {})
    tensors = found.tensors
    assert found.config.positions == "stored"
    assert sum(name.endswith(".positions.0") for name in tensors) == 2
    assert not any(name.endswith(".positions.1") for name in tensors)
    assert check_config(found, unet, "rgb") == ()
