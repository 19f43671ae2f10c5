"""Blocks of PyTorch and ours with the same random weights, and how far apart what they give is."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

from convert import names, positions, svd
from convert.tensors import LazyTensor, Tensors

TOLERANCE = 1e-4
BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 5, 6
"""One side is odd: halves are rounded up on the way down, and doubled and cut on the way up."""


def relative_error(found: object, expected: object) -> float:
    """Largest difference relative to the expected array's largest magnitude."""
    found, expected = (
        x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        for x in (found, expected)
    )
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tensors_of(module: torch.nn.Module) -> Tensors:
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.numpy)
        for name, tensor in module.state_dict().items()
    }


def transfer(torch_module: torch.nn.Module, module: nn.Module, *inputs: Any) -> Any:
    """The Flax variables of `module` with the weights of the PyTorch block."""

    # The name rules expect a parent in front of a block.
    def block_names(path: str) -> tuple[str, ...]:
        return tuple(name.removeprefix("x.") for name in names.UNET(f"x/{path}"))

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    tensors = positions.without(tensors_of(torch_module))
    if svd.is_svd(tensors) or isinstance(torch_module, TransformerSpatioTemporalModel):
        tensors = svd.without_dead(tensors)
    names.check_names(shapes, block_names, tensors, "block")
    params = names.build_params(shapes, block_names, tensors, jnp.float32, lambda count: None)
    return {"params": params}


def video(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    """`[B, F, H, W, C] -> [B * F, C, H, W]`."""
    return torch.from_numpy(x.reshape(-1, *x.shape[2:])).permute(0, 3, 1, 2).contiguous()


def from_torch(x: torch.Tensor, frames: int = FRAMES) -> np.ndarray:
    """`[B * F, C, H, W] -> [B, F, H, W, C]`."""
    return x.detach().permute(0, 2, 3, 1).unflatten(0, (-1, frames)).numpy()


def transfer_call(torch_module: torch.nn.Module, call: Any, module: nn.Module, *inputs: Any) -> Any:
    class Called(nn.Module):
        def init(self, *args: Any) -> Any:
            return nn.init(call, module)(*args)

    return transfer(torch_module, Called(), *inputs)


def params_of(
    rule: Callable[[str], tuple[str, ...]], tensors: Tensors, module: nn.Module, *inputs: Any
) -> Any:
    """The Flax variables of a whole network, whose tensors have the names of a rule."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    names.check_names(shapes, rule, tensors, "network")
    params = names.build_params(shapes, rule, tensors, jnp.float32, lambda count: None)
    return {"params": params}
