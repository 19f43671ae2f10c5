"""The same forward in what a user could pick instead, each at its best; with random weights."""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.benchmarks.rounds import Run, Variant
from qvd_jax.benchmarks.unet import Case, compile_forward, param_shapes, random_params
from qvd_jax.errors import InputError
from qvd_jax.models.layers import FLOAT, Conv
from qvd_jax.models.unet3d import UNet3D

REQUIRED = {
    "diffusers": ("torch", "diffusers"),
    "torchao": ("torch", "diffusers", "torchao"),
    "qwix": ("qwix",),
}
"""Packages of each peer."""

MODES = {
    "diffusers": ("eager", "compiled", "compiled channels_last"),
    "torchao": ("int8 compiled",),
    "qwix": ("int8",),
}
"""Ways in which each peer runs."""


def build_diffusers(case: Case, variant: Variant) -> Run:
    """Diffusers' `UNetMotionModel`, eager or through `torch.compile`."""
    import torch

    module = _motion_model(case, variant.dtype)
    if variant.mode.endswith("channels_last"):
        # The same weights in another order: a copy, for the other modes keep theirs.
        module = _motion_model.__wrapped__(case, variant.dtype)
        for part in module.modules():
            if isinstance(part, torch.nn.Conv2d):
                part.to(memory_format=torch.channels_last)
    compiled = variant.mode.startswith("compiled")
    return _torch_run(torch.compile(module) if compiled else module, case, variant.dtype)


def build_torchao(case: Case, variant: Variant) -> Run:
    """Diffusers' UNet with dynamic int8 Linear layers, compiled."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = _motion_model.__wrapped__(case, variant.dtype)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return _torch_run(torch.compile(module), case, variant.dtype)


def build_qwix(case: Case, variant: Variant) -> Run:
    """Our float UNet, of flax's own layers, in int8 by qwix; inputs are quantized dynamically."""
    import qwix

    dtype = jnp.dtype(variant.dtype)
    plain = replace(FLOAT, dense_cls=nn.Dense, conv_cls=Conv, dtype=dtype, param_dtype=dtype)
    module = UNet3D(case.config, plain)
    rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
    quantized = qwix.quantize_model(module, qwix.PtqProvider([rule]))
    params = qwix.quantize_params(
        random_params(module, case)["params"], param_shapes(quantized, case)["params"]
    )
    return compile_forward(quantized.apply, {"params": params}, case, variant.dtype)


BUILDS = {"diffusers": build_diffusers, "torchao": build_torchao, "qwix": build_qwix}


def check(names: Iterable[str], case: Case) -> None:
    """Raises `InputError` if one of the peers has no UNet of the case's kind."""
    for name in names:
        if "diffusers" in REQUIRED[name] and case.config.temporal_op != "motion_module":
            raise InputError(
                f"--size {case.size}: {name} is measured with AnimateDiff's UNet alone"
            )


@functools.cache
def _motion_model(case: Case, dtype: str) -> Any:
    import torch
    from diffusers import UNetMotionModel

    config = case.config
    cross = ["CrossAttn" if attention else "" for attention in config.attention_levels]
    with torch.device("meta"):
        module = UNetMotionModel(
            block_out_channels=config.block_channels,
            down_block_types=tuple(f"{name}DownBlockMotion" for name in cross),
            up_block_types=tuple(f"{name}UpBlockMotion" for name in reversed(cross)),
            norm_num_groups=config.norm_groups,
            cross_attention_dim=config.context_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            layers_per_block=config.layers_per_block,
            num_attention_heads=config.num_heads,
            motion_num_attention_heads=config.temporal_heads,
            motion_max_seq_length=config.max_frames,
            use_motion_mid_block=config.temporal_mid_block,
        ).to(getattr(torch, dtype))
    module = module.to_empty(device=_device()).eval()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.normal_(0, 0.02)
    return module


def _torch_run(module: Any, case: Case, dtype: str) -> Run:
    import torch

    device = _device()
    latents, _, text = (
        torch.from_numpy(x).to(device, getattr(torch, dtype)) for x in case.inputs()
    )
    latents = latents.permute(0, 4, 1, 2, 3).contiguous()
    text = text.repeat_interleave(case.frames, 0)

    def run() -> None:
        with torch.inference_mode():
            module(latents, 500, text)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
