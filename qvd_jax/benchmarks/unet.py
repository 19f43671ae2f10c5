"""One forward of our UNet."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax import accelerators, memory
from qvd_jax.axes import Array, Params
from qvd_jax.benchmarks.rounds import Variant
from qvd_jax.memory import tree_bytes
from qvd_jax.models.configs import STABLE_VIDEO_DIFFUSION, UNet3DConfig, animatediff
from qvd_jax.models.layers import FLOAT, LayerSet
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines.loading import read_configs
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import match, read_policy
from qvd_jax.quant.statistics import trace_layers


def _shapes() -> UNet3DConfig:
    return read_configs("shapes").components.unet


def _tiny() -> UNet3DConfig:
    return UNet3DConfig(
        block_channels=(32, 64),
        attention_levels=(True, False),
        num_heads=(4, 4),
        temporal_heads=(4, 4),
        context_dim=32,
        norm_groups=8,
        down_eps=(1e-5, 1e-5),
        up_eps=(1e-5, 1e-5),
        temporal_mid_block=True,
    )


SIZES: dict[str, Callable[[], UNet3DConfig]] = {
    "sd15": functools.partial(animatediff, "v2"),
    "svd": lambda: STABLE_VIDEO_DIFFUSION,
    "shapes": _shapes,
    "tiny": _tiny,
}
OURS = "qvd_jax"
FLOAT_MODE = "float"

_TEXT_LENGTH = 77


@dataclass(frozen=True)
class Case:
    """One forward of a UNet.

    Attributes:
      size: name of an entry of `SIZES`.
      batch: B, guidance halves included.
      frames: F.
      height: H of the latents.
      width: W of the latents.
    """

    size: str
    batch: int
    frames: int
    height: int
    width: int

    @property
    def config(self) -> UNet3DConfig:
        """The UNet's config."""
        return SIZES[self.size]()

    @property
    def positions(self) -> tuple[int, ...]:
        """H W of each level."""
        return tuple(h * w for h, w in self.config.sizes(self.height, self.width))

    @property
    def context_length(self) -> int:
        """L of the context: of a text, or the one token of SVD's image."""
        return 1 if self.config.temporal_op == "spatio_temporal" else _TEXT_LENGTH

    def inputs(self) -> tuple[np.ndarray, ...]:
        """What `shapes` says, the same for every variant."""
        rng = np.random.default_rng(0)
        latents, timestep, *others = self.shapes()
        return (
            rng.standard_normal(latents.shape, dtype=np.float32),
            np.full(timestep.shape, 500, np.float32),
            *(rng.standard_normal(other.shape, dtype=np.float32) for other in others),
        )

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What the UNet is called with: latents, timestep, context, and added ids if it has any."""
        config = self.config
        latents = (self.batch, self.frames, self.height, self.width, config.in_channels)
        context = (self.batch, self.context_length, config.context_dim)
        ids = ((1, config.added_ids),) if config.added_ids else ()
        return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in (latents, (1,), context, *ids))


@dataclass(frozen=True)
class Forward:
    """One forward of a compiled UNet, to its end.

    Attributes:
      compiled: the program.
      arguments: what it is called with.
    """

    compiled: jax.stages.Compiled
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        jax.block_until_ready(self.compiled(*self.arguments))


def build(case: Case, variant: Variant) -> Forward:
    """Our UNet with random weights; temporal and context features are included."""
    module = UNet3D(case.config, layers(case, variant))
    return compile_forward(module.apply, random_params(module, case), case, variant.dtype)


def layers(case: Case, variant: Variant) -> LayerSet:
    """Float layers, or those of the policy that is the variant's mode."""
    dtype = jnp.dtype(variant.dtype)
    if variant.mode == FLOAT_MODE:
        return replace(FLOAT, dtype=dtype, param_dtype=dtype)
    found = trace_layers(UNet3D(case.config), *case.shapes())
    return layer_set(match(read_policy(variant.mode), found), dtype)


def check_fits(case: Case, variants: Sequence[Variant]) -> None:
    """Raises `InputError` if memory cannot hold them."""
    accelerators.check_used()
    what = f"the UNet at {case.height}x{case.width} latents"
    memory.check_fits(needed_bytes(case, variants), what)


def needed_bytes(case: Case, variants: Sequence[Variant]) -> int:
    """Estimate of what variants need that are held at once and run in turn.

    Those of other frameworks are taken for our float UNet of their dtype.
    """
    weights, working = 0, 0
    alike = (v if v.framework == OURS else Variant(OURS, FLOAT_MODE, v.dtype) for v in variants)
    for variant, count in Counter(alike).items():
        module = UNet3D(case.config, layers(case, variant))
        shapes = param_shapes(module, case)
        weights += count * tree_bytes(shapes)
        peak = memory.peak_bytes(module.apply, shapes, *case.shapes())
        working = max(working, peak - tree_bytes(shapes))
    return weights + working


def random_params(module: UNet3D, case: Case) -> Params:
    """Random parameters of a UNet's shapes and dtypes."""
    rng = np.random.default_rng(1)

    def random(leaf: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            # What four bits hold; speed does not depend on the values.
            return jnp.asarray(rng.integers(-7, 8, leaf.shape, np.int8)).astype(leaf.dtype)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree.map(random, param_shapes(module, case))


def param_shapes(module: UNet3D, case: Case) -> Params:
    """The tree of `jax.ShapeDtypeStruct` of a UNet's variables."""
    return jax.eval_shape(module.init, jax.random.key(0), *case.shapes())


def compile_forward(apply: Callable[..., Array], params: Params, case: Case, dtype: str) -> Forward:
    """Compiles one forward of a UNet with the case's inputs."""
    latents, timestep, context, *ids = map(jnp.asarray, case.inputs())
    arguments = params, latents.astype(dtype), timestep, context.astype(dtype), *ids
    return Forward(jax.jit(apply).lower(*arguments).compile(), arguments)
