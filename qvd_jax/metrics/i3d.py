"""The inflated Inception network of videos (Carreira and Zisserman, arXiv 1705.07750).

Trained on Kinetics-400 its logits are the features of FVD. It is used and not trained: the batch
norms are folded into the convolutions before them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array

LEAST_FRAMES = 9
"""Fewer leave one frame before the last pooling, which takes two."""

SIZE = 224
"""Height and width it was trained on; the last pooling takes all of what is left of them."""

_FEW_CHANNELS = 16
"""Up to here the frames that a convolution reaches are concatenated before it."""

MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of the convolutions of each Inception block, in the order of `BRANCHES`."""

BRANCHES = ("b0", "b1a", "b1b", "b2a", "b2b", "b3")

_POOLED_BEFORE = {"mixed_3b": ((1, 3, 3), (1, 2, 2)), "mixed_4b": ((3, 3, 3), (2, 2, 2))} | {
    "mixed_5b": ((2, 2, 2), (2, 2, 2))
}


@dataclass(frozen=True)
class I3DConfig:
    """Shape of the network.

    Attributes:
      classes: C of the logits.
    """

    classes: int = 400


class Unit(nn.Module):
    """A convolution with the batch norm folded into it, and a ReLU.

    Attributes:
      channels: C of its output.
      kernel: of frames, height and width.
      strides: of the same.
    """

    channels: int
    kernel: tuple[int, int, int] = (1, 1, 1)
    strides: tuple[int, int, int] = (1, 1, 1)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to the same with other C, sizes divided by the strides."""
        conv = nn.Conv(
            self.channels,
            self.kernel,
            self.strides,
            conv_general_dilated=_conv if self.kernel[0] > 1 else None,
            # TPUs, and GPUs with TF32, would round what is compared between machines.
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )
        return nn.relu(conv(x))


class Mixed(nn.Module):
    """An Inception block: four branches side by side.

    Attributes:
      channels: of `BRANCHES`.
    """

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to the same with other C."""
        units = {
            name: Unit(width, (3, 3, 3) if name in ("b1b", "b2b") else (1, 1, 1), name=name)
            for name, width in zip(BRANCHES, self.channels, strict=True)
        }
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        branches = [
            units["b0"](x),
            units["b1b"](units["b1a"](x)),
            units["b2b"](units["b2a"](x)),
            units["b3"](pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class I3D(nn.Module):
    """The network up to its logits, as in TF-Hub's `i3d-kinetics-400`.

    Attributes:
      config: its shape.
    """

    config: I3DConfig = I3DConfig()

    @nn.compact
    def __call__(self, videos: Array) -> Array:
        """Maps videos in [-1, 1] `[B, F, 224, 224, 3]` to logits `[B, classes]`."""
        x = Unit(64, (7, 7, 7), (2, 2, 2), name="conv3d_1a_7x7")(videos)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = Unit(64, name="conv3d_2b_1x1")(x)
        x = Unit(192, (3, 3, 3), name="conv3d_2c_3x3")(x)
        for name, channels in MIXED.items():
            if name in _POOLED_BEFORE:
                x = _max_pool(x, *_POOLED_BEFORE[name])
            x = Mixed(channels, name=name)(x)
        # Kernel 2x7x7, stride 1, and then the mean over time: what is left is linear.
        window = (2, *x.shape[2:4])
        x = nn.avg_pool(x, window).mean((1, 2, 3))
        logits = nn.Dense(self.config.classes, precision=jax.lax.Precision.HIGHEST, name="logits")
        return logits(x)


def _conv(x: Array, kernel: Array, strides: Sequence[int], padding: str, **options: Any) -> Array:
    """A convolution over frames and positions, made of those of two dimensions.

    XLA's own of three takes up to five times as long on a CPU. What few channels have is
    concatenated, because a product of many terms is the faster one; more are multiplied frame by
    frame, because a copy of all would take as long as it saves.
    """
    taps, (stride, *spatial) = kernel.shape[0], strides
    (around,) = jax.lax.padtype_to_pads(x.shape[1:2], (taps,), (stride,), padding)
    x = jnp.pad(x, [(0, 0), around, (0, 0), (0, 0), (0, 0)])
    reach = x.shape[1] - taps + 1
    reached = [x[:, tap : tap + reach : stride] for tap in range(taps)]
    kernels = list(kernel)
    if x.shape[-1] <= _FEW_CHANNELS:
        reached = [jnp.concatenate(reached, axis=-1)]
        kernels = [jnp.concatenate(kernels, axis=-2)]
    products = [
        jax.lax.conv_general_dilated(
            frames.reshape(-1, *frames.shape[2:]),
            taken,
            spatial,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=options["precision"],
        )
        for frames, taken in zip(reached, kernels, strict=True)
    ]
    y = functools.reduce(jnp.add, products)
    return y.reshape(*reached[0].shape[:2], *y.shape[1:])


def _max_pool(x: Array, window: tuple[int, int, int], strides: tuple[int, int, int]) -> Array:
    """Axis by axis, which gives the same maxima of fewer comparisons."""
    for axis, (size, stride) in enumerate(zip(window, strides, strict=True)):
        along = [(size, stride) if other == axis else (1, 1) for other in range(3)]
        x = nn.max_pool(x, *zip(*along, strict=True), padding="SAME")
    return x


def fold_batch_norm(
    kernel: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    bias: np.ndarray,
    scale: np.ndarray | float,
    epsilon: float,
) -> dict[str, np.ndarray]:
    """Kernel and bias of a convolution that does what one without bias and a batch norm do.

    Args:
      kernel: `[..., C, O]`.
      mean: running mean of the norm, `[O]`.
      variance: running variance, `[O]`.
      bias: of the norm, `[O]`.
      scale: of the norm, `[O]`.
      epsilon: of the norm.
    """
    factor = scale / np.sqrt(variance.astype(np.float64) + epsilon)
    return {
        "kernel": (kernel * factor).astype(np.float32),
        "bias": (bias - mean * factor).astype(np.float32),
    }
