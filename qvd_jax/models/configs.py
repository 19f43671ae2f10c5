"""The data on which the families of video UNets differ, and the published ones."""

from dataclasses import dataclass, replace
from typing import Literal

from qvd_jax.axes import NormScope, Positions


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet (Zhang et al., arXiv 2302.05543) beside a UNet, of its encoder's shape.

    Attributes:
      condition_channels: C of the condition, the mask of SparseCtrl included.
      embedding_channels: widths of the convolutions that bring the condition's pixels to the size
        of the latents; none, and the condition has that size already.
      motion_attentions: self-attentions over time behind each layer on the way down, as in
        `UNet3DConfig`; 0 for one of images.
      temporal_norm_scope: scope of the motion modules' norms.
      ignores_latents: whether it sees zeros in the latents' place (SparseCtrl).
      positions: the motion modules' positional tables, as in `UNet3DConfig`.
    """

    condition_channels: int
    embedding_channels: tuple[int, ...] = ()
    motion_attentions: int = 0
    temporal_norm_scope: NormScope = "joint"
    ignores_latents: bool = False
    positions: Positions = "sinusoidal"


@dataclass(frozen=True)
class UNet3DConfig:
    """Every axis on which the families of video UNets differ.

    Levels count from the highest resolution down, in the up path too: entry i of a per-level
    tuple belongs to `down_blocks_i` and to `up_blocks_{n-1-i}`.

    Attributes:
      in_channels: C of the latents, conditioning channels included.
      out_channels: C of the prediction.
      block_channels: C of each level.
      layers_per_block: layers of a down stage; an up stage has one more.
      attention_levels: which levels have spatial transformers; the mid block always has.
      num_heads: heads of the spatial transformers of each level (their number, not their width).
      context_dim: C of the text embedding.
      norm_groups: groups of every GroupNorm.
      down_eps: epsilon of the resnet norms in each down stage.
      mid_eps: epsilon of the resnet norms in the mid block.
      up_eps: epsilon of the resnet norms of each level on the way up.
      out_eps: epsilon of `conv_norm_out`.
      resnet_norm_scope: scope of the resnet norms and of `conv_norm_out`.
      temporal_op: what mixes the frames. "motion_module": a temporal transformer behind each
        layer (AnimateDiff, MagicAnimate). "conv_transformer": a temporal convolution behind each
        resnet, a temporal transformer behind each spatial one (ModelScope). "spatio_temporal": a
        temporal branch inside each resnet and transformer, blended with the spatial one (SVD).
        None: nothing does, as in an image model.
      temporal_norm_scope: scope of the temporal operator's norms; SVD's are always joint.
      temporal_heads: heads of the temporal attention of each level.
      max_frames: length of the positional table of the frames; None where there is none, and
        any number of frames may run at once.
      positions: what the positional tables hold. "stored": a parameter of each attention.
      temporal_mid_block: whether the mid block has a motion module.
      input_transformer_channels: C of the tokens of a temporal transformer behind `conv_in`
        (ModelScope); None leaves it out.
      added_ids: how many numbers beside the timestep enter the time embedding (SVD: 3).
      motion_attentions: self-attentions of a motion module (AnimateDiff: 2, SparseCtrl: 1).
      controlnet: of the ControlNet whose residuals are added to the skips; None without one.
      appearance_encoder: whether the self-attentions in the middle and on the way up attend to a
        reference image, too, seen by an encoder of this UNet's shape (MagicAnimate).
    """

    in_channels: int = 4
    out_channels: int = 4
    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    norm_groups: int = 32
    down_eps: tuple[float, ...] = (1e-5, 1e-5, 1e-5, 1e-5)
    mid_eps: float = 1e-5
    up_eps: tuple[float, ...] = (1e-5, 1e-5, 1e-5, 1e-5)
    out_eps: float = 1e-5
    resnet_norm_scope: NormScope = "frame"
    temporal_op: Literal["motion_module", "conv_transformer", "spatio_temporal"] | None = (
        "motion_module"
    )
    temporal_norm_scope: NormScope = "joint"
    temporal_heads: tuple[int, ...] = (8, 8, 8, 8)
    max_frames: int | None = 32
    positions: Positions = "sinusoidal"
    temporal_mid_block: bool = False
    input_transformer_channels: int | None = None
    added_ids: int = 0
    motion_attentions: int = 2
    controlnet: ControlNetConfig | None = None
    appearance_encoder: bool = False

    def __post_init__(self) -> None:
        levels = len(self.block_channels)
        if not levels or self.layers_per_block < 1:
            raise ValueError("UNet3DConfig needs at least one level and one layer per block")
        for name in ("attention_levels", "num_heads", "down_eps", "up_eps", "temporal_heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"UNet3DConfig.{name} has {len(getattr(self, name))} entries, one for each "
                    f"of the {levels} levels of block_channels is needed"
                )
        for level, channels in enumerate(self.block_channels):
            for name, divisor in (
                ("norm_groups", self.norm_groups),
                ("num_heads", self.num_heads[level]),
                ("temporal_heads", self.temporal_heads[level]),
            ):
                if divisor < 1 or channels % divisor:
                    raise ValueError(
                        f"UNet3DConfig.{name} = {divisor} does not divide the {channels} "
                        f"channels of level {level}"
                    )

    @property
    def stride(self) -> int:
        """By how much H and W of the latents shrink on the way down."""
        return 2 ** (len(self.block_channels) - 1)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """H and W of each level, for latents of a size; halves of odd sides are rounded up."""
        levels = range(len(self.block_channels))
        return [(-(-height // 2**level), -(-width // 2**level)) for level in levels]


def animatediff(
    version: Literal["v1", "v2", "v3"], norms: Literal["diffusers", "original"] = "diffusers"
) -> UNet3DConfig:
    """AnimateDiff on Stable Diffusion 1.5.

    The published implementations normalize over different scopes with the same weights:
    diffusers joins the frames in the motion modules; the original code never does, but joins
    them in the resnets of v1.

    Args:
      version: generation of the motion module; v2 alone has one in the mid block.
      norms: whose GroupNorm scopes to follow.
    """
    return UNet3DConfig(
        max_frames=24 if version == "v1" else 32,
        temporal_mid_block=version == "v2",
        temporal_norm_scope="joint" if norms == "diffusers" else "frame",
        resnet_norm_scope="joint" if (version, norms) == ("v1", "original") else "frame",
    )


MAGIC_ANIMATE = replace(
    animatediff("v1", "original"),
    controlnet=ControlNetConfig(3, (16, 32, 96, 256)),
    appearance_encoder=True,
)
"""MagicAnimate's UNet with its appearance encoder and its ControlNet of poses."""

MODELSCOPE = UNet3DConfig(
    num_heads=(5, 10, 20, 20),
    context_dim=1024,
    temporal_op="conv_transformer",
    temporal_heads=(5, 10, 20, 20),
    max_frames=None,
    input_transformer_channels=512,
)
"""ModelScope's and ZeroScope's UNet."""

STABLE_VIDEO_DIFFUSION = UNet3DConfig(
    in_channels=8,
    num_heads=(5, 10, 20, 20),
    context_dim=1024,
    down_eps=(1e-6, 1e-6, 1e-6, 1e-5),
    up_eps=(1e-6, 1e-6, 1e-6, 1e-6),
    temporal_op="spatio_temporal",
    temporal_heads=(5, 10, 20, 20),
    max_frames=None,
    added_ids=3,
)
"""Stable Video Diffusion's UNet, with the epsilons of diffusers."""
