"""What training a UNet begins with: fresh parameters, or those of a trained model."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from qvd_jax import items
from qvd_jax.axes import Array, Params

_RESNETS = ("resnet", "spatial", "temporal")


def initial_params(
    key: Array,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    start: Mapping[str, Params],
    where: str,
) -> Params:
    """Fresh parameters of a UNet and what is trained with it, or those a trained model has.

    Args:
      key: of the draw.
      modules: by name, "unet" among them.
      inputs: to initialize each with.
      start: the trained model's, by name; what is not trained does not count.
      where: it is from, for messages.

    Raises:
      InputError: a trained parameter has no place.
    """
    keys = dict(zip(modules, jax.random.split(key, len(modules)), strict=True))
    params = {
        name: module.init(keys[name], *inputs[name])["params"] for name, module in modules.items()
    }
    params["unet"] = _silence_outputs(params["unet"])
    trained = {name: start[name] for name in start if name in params}
    return _merge(params, trained, where)


def _silence_outputs(params: Params) -> Params:
    """Zeroes the last layer of each residual branch of a UNet, so that each begins as identity."""
    flat = flax.traverse_util.flatten_dict(params)
    silent = {
        path: jnp.zeros_like(leaf)
        for path, leaf in flat.items()
        if path[-2] in ("proj_out", "conv_out") or (path[-2] == "conv2" and path[-3] in _RESNETS)
    }
    return flax.traverse_util.unflatten_dict({**flat, **silent})


def _merge(fresh: Params, trained: Params, where: str) -> Params:
    """Fresh parameters replaced by trained ones; each of these must find its place.

    Raises:
      InputError: one does not.
    """
    have = flax.traverse_util.flatten_dict(fresh, sep="/")
    given = flax.traverse_util.flatten_dict(trained, sep="/")
    items.check_tree(given, {name: have[name] for name in given if name in have}, where)
    return flax.traverse_util.unflatten_dict({**have, **given}, sep="/")
