"""What training a UNet begins with: fresh parameters, or those of a trained model."""

import flax
import jax.numpy as jnp

from qvd_jax import items
from qvd_jax.axes import Params

_RESNETS = ("resnet", "spatial", "temporal")


def silence_outputs(params: Params) -> Params:
    """Zeroes the last layer of each residual branch of a UNet, so that each begins as identity."""
    flat = flax.traverse_util.flatten_dict(params)
    silent = {
        path: jnp.zeros_like(leaf)
        for path, leaf in flat.items()
        if path[-2] in ("proj_out", "conv_out") or (path[-2] == "conv2" and path[-3] in _RESNETS)
    }
    return flax.traverse_util.unflatten_dict({**flat, **silent})


def merge(fresh: Params, trained: Params, where: str) -> Params:
    """Fresh parameters replaced by trained ones; each of these must find its place.

    Raises:
      InputError: one does not.
    """
    have = flax.traverse_util.flatten_dict(fresh, sep="/")
    given = flax.traverse_util.flatten_dict(trained, sep="/")
    items.check_tree(given, {name: have[name] for name in given if name in have}, where)
    return flax.traverse_util.unflatten_dict({**have, **given}, sep="/")
