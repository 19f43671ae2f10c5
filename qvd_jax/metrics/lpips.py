"""LPIPS, a distance of images in a classifier's features (Zhang et al., arXiv 1801.03924)."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qvd_jax.axes import Array

Net = Literal["alex", "vgg"]

LEAST_SIZE: dict[Net, int] = {"alex": 31, "vgg": 16}
"""Height and width that leave each network something behind its last pooling."""

# What torchvision's networks subtract and divide by, for pixels in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class LPIPSConfig:
    """Which network.

    Attributes:
      net: "alex" is torchvision's AlexNet, the measure's default; "vgg" its VGG16.
    """

    net: Net = "alex"


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with a ReLU behind it.

    Attributes:
      channels: C of its output.
      kernel: height and width.
      strides: of both.
      padding: of both, on each side.
      pool: kernel of the max pooling before it, of stride 2; 0 for none.
      compared: whether its output is one of the features that are compared.
    """

    channels: int
    kernel: int = 3
    strides: int = 1
    padding: int = 1
    pool: int = 0
    compared: bool = False


CONVS: dict[Net, tuple[ConvSpec, ...]] = {
    "alex": (
        ConvSpec(64, kernel=11, strides=4, padding=2, compared=True),
        ConvSpec(192, kernel=5, padding=2, pool=3, compared=True),
        ConvSpec(384, pool=3, compared=True),
        ConvSpec(256, compared=True),
        ConvSpec(256, compared=True),
    ),
    "vgg": tuple(
        ConvSpec(width, pool=2 if first and level else 0, compared=last)
        for level, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)))
        for first, last in ((i == 0, i == count - 1) for i in range(count))
    ),
}
"""The convolutions of each network, in order."""


class LPIPS(nn.Module):
    """The distance, with the learned weights of each channel.

    Attributes:
      config: which network.
    """

    config: LPIPSConfig = LPIPSConfig()

    def setup(self) -> None:
        specs = CONVS[self.config.net]
        self.convs = [
            nn.Conv(
                spec.channels,
                2 * (spec.kernel,),
                spec.strides,
                2 * ((spec.padding, spec.padding),),
                precision=jax.lax.Precision.HIGHEST,
            )
            for spec in specs
        ]
        self.heads = [
            self.param(f"heads_{number}", nn.initializers.ones, (spec.channels,))
            for number, spec in enumerate(spec for spec in specs if spec.compared)
        ]

    def features(self, images: Array) -> list[Array]:
        """Features of `[B, H, W, 3]` in [-1, 1], each `[B, h, w, C]` of unit length over C."""
        shift, scale = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in (_SHIFT, _SCALE))
        x = (images - shift) / scale
        found = []
        for conv, spec in zip(self.convs, CONVS[self.config.net], strict=True):
            if spec.pool:
                x = nn.max_pool(x, 2 * (spec.pool,), (2, 2))
            x = nn.relu(conv(x))
            if spec.compared:
                length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
                found.append(x / (length + 1e-10))
        return found

    def __call__(self, first: Array, second: Array) -> Array:
        """Distances `[B]` of images in [-1, 1], each `[B, H, W, 3]` (equation 1)."""
        pairs = zip(self.features(first), self.features(second), self.heads, strict=True)
        # A sum of means over positions, weighted over channels.
        return sum((jnp.square(a - b).mean((1, 2)) @ head for a, b, head in pairs), jnp.zeros(()))
