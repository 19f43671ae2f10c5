"""Attention: spatial, to the text, and over time."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.axes import Array, NormScope, Positions, exportable
from qvd_jax.kernels.attention import (
    attention_over_frames,
    attention_over_positions,
    dot_product_attention,
    split_heads,
)
from qvd_jax.meshes import to_frames, to_positions
from qvd_jax.models.layers import (
    AlphaBlender,
    FeedForward,
    LayerSet,
    TimestepEmbedding,
    sinusoidal_embedding,
    sinusoidal_positions,
)
from qvd_jax.models.norms import Normalized


@exportable
class Context(NamedTuple):
    """What a spatial transformer is told beside its own input.

    Attributes:
      keys: of the text, `[B, L, heads, D]`.
      values: of the text, `[B, L, heads, D]`.
      reference: tokens of a reference image, `[N, 1, M, C]`, to which the self-attention of the
        last N videos attends as to its own (MagicAnimate: Xu et al., arXiv 2311.16498, section
        3.2; the videos before them are the negatives of guidance); None without one.
    """

    keys: Array
    values: Array
    reference: Array | None = None


class SelfAttention(nn.Module):
    """Self-attention with one product for queries, keys and values.

    Attributes:
      channels: C.
      heads: number of heads; divides C.
      layers: the layer classes.
      use_bias: whether queries, keys and values have a bias; the output always has.
      is_causal: whether a token sees only the tokens before it.
      over_frames: whether the frames of each position attend to each other, not the positions of
        each frame.
    """

    channels: int
    heads: int
    layers: LayerSet
    use_bias: bool = False
    is_causal: bool = False
    over_frames: bool = False

    def setup(self) -> None:
        self.to_qkv = self.layers.dense(
            3 * self.channels, use_bias=self.use_bias, transposes="output"
        )
        self.to_out = self.layers.dense(self.channels, transposes="input")

    def __call__(
        self, x: Array | Normalized, residual: Array, reference: Array | None = None
    ) -> Array:
        """Maps `[..., L, C]` to `[..., L, C]` and adds the residual.

        Args:
          x: the tokens; `[B, F, L, C]` over frames or with a reference.
          residual: `[..., L, C]`.
          reference: as in `Context`; all frames attend to one copy of it.
        """
        if self.over_frames:
            return self.to_out(attention_over_frames(self.to_qkv(x), self.heads), residual)
        if reference is None and not self.is_causal:
            qkv = self.to_qkv(x)
            out = attention_over_positions(qkv.reshape(-1, *qkv.shape[-2:]), self.heads)
            return self.to_out(out.reshape(x.shape), residual)
        q, k, v = self._project(x)
        if reference is None:
            out = dot_product_attention(q, k, v, is_causal=True)
        else:
            frames, alone = x.shape[1], (x.shape[0] - reference.shape[0]) * x.shape[1]
            _, *more = (jnp.repeat(t, frames, axis=0) for t in self._project(reference))
            joined = (
                jnp.concatenate([own[alone:], other], axis=1)
                for own, other in zip((k, v), more, strict=True)
            )
            out = dot_product_attention(q[alone:], *joined)
            if alone:
                negatives = dot_product_attention(q[:alone], k[:alone], v[:alone])
                out = jnp.concatenate([negatives, out])
        return self.to_out(out.reshape(x.shape), residual)

    def _project(self, x: Array | Normalized) -> tuple[Array, ...]:
        """Queries, keys and values of `[..., L, C]`, `[..., L, heads, D]` with one axis before."""
        qkv = self.to_qkv(x)
        return split_heads(qkv.reshape(-1, *qkv.shape[-2:]), 3, self.heads)


class CrossAttention(nn.Module):
    """Attention to a context; its keys and values are computed apart, once per prompt.

    Attributes:
      channels: C.
      heads: number of heads; divides C.
      layers: the layer classes.
    """

    channels: int
    heads: int
    layers: LayerSet

    def setup(self) -> None:
        self.to_q = self.layers.dense(self.channels, use_bias=False, transposes="output")
        self.to_kv = self.layers.dense(2 * self.channels, use_bias=False)
        self.to_out = self.layers.dense(self.channels, transposes="input")

    def context_features(self, context: Array) -> Context:
        """Keys and values of the context `[B, L, C]`."""
        return Context(*split_heads(self.to_kv(context), 2, self.heads))

    def __call__(self, x: Array | Normalized, residual: Array, context: Context) -> Array:
        """Maps `[B, F, L, C]` to `[B, F, L, C]` and adds the residual.

        All frames attend to one copy of the text.
        """
        (q,) = split_heads(self.to_q(x), 1, self.heads)
        out = dot_product_attention(q, context.keys, context.values)
        return self.to_out(out.reshape(x.shape), residual)


class SingleTokenAttention(nn.Module):
    """Attention to a context of one token, which all queries take whole.

    Its weight is one whatever queries and keys are, so neither is computed: what is left is the
    same for all tokens, and nothing but the context decides it.

    Attributes:
      channels: C.
      layers: the layer classes.
    """

    channels: int
    layers: LayerSet

    def setup(self) -> None:
        self.to_v = self.layers.dense(self.channels, use_bias=False)
        self.to_out = self.layers.dense(self.channels)

    def context_features(self, context: Array) -> Array:
        """The result `[B, 1, C]` for a context `[B, 1, C]`."""
        if context.shape[-2] != 1:
            raise ValueError(f"a context of one token is needed, got {context.shape[-2]}")
        return self.to_out(self.to_v(context))


class TransformerBlock(nn.Module):
    """Self-attention, attention to a context, feed-forward.

    The tokens are the positions of a frame; in the temporal half of Stable Video Diffusion's
    transformer the frames of each position attend to each other.

    Attributes:
      channels: C.
      heads: number of heads.
      layers: the layer classes.
      has_input_ff: whether a feed-forward comes first too (SVD's temporal half).
      single_token_context: whether the context is one token (SVD's image embedding).
      over_frames: of the `SelfAttention`.
    """

    channels: int
    heads: int
    layers: LayerSet
    has_input_ff: bool = False
    single_token_context: bool = False
    over_frames: bool = False

    def setup(self) -> None:
        if self.has_input_ff:
            self.norm_in = self.layers.layer_norm()
            self.ff_in = FeedForward(self.channels, self.layers)
        self.norm1 = self.layers.layer_norm()
        self.attn1 = SelfAttention(
            self.channels, self.heads, self.layers, over_frames=self.over_frames
        )
        if self.single_token_context:
            self.token_attn = SingleTokenAttention(self.channels, self.layers)
        else:
            self.norm2 = self.layers.layer_norm()
            self.attn2 = CrossAttention(self.channels, self.heads, self.layers)
        self.norm3 = self.layers.layer_norm()
        self.ff = FeedForward(self.channels, self.layers)

    def __call__(self, x: Array, context: Any) -> Array:
        """Maps `[B, F, L, C]` to `[B, F, L, C]`.

        Args:
          x: the tokens.
          context: of `context_features` of the attention to it.
        """
        if self.has_input_ff:
            x = self.ff_in(self.norm_in(x), x)
        if self.single_token_context:
            x = self.attn1(self.norm1(x), x)
            x = x + context[:, None]
        else:
            x = self.attn1(self.norm1(x), x, context.reference)
            x = self.attn2(self.norm2(x), x, context)
        return self.ff(self.norm3(x), x)


class SpatialTransformer(nn.Module):
    """Transformer over the positions of each frame (diffusers' `Transformer2DModel`).

    Attributes:
      channels: C.
      heads: number of heads.
      norm_groups: groups of the norm, whose epsilon is 1e-6 in every family.
      layers: the layer classes.
    """

    channels: int
    heads: int
    norm_groups: int
    layers: LayerSet

    def setup(self) -> None:
        self.norm = self.layers.group_norm(self.norm_groups, 1e-6)
        self.proj_in = self.layers.dense(self.channels)
        self.block = TransformerBlock(self.channels, self.heads, self.layers)
        self.proj_out = self.layers.dense(self.channels)

    def context_features(self, context: Array) -> Any:
        """Keys and values of the text `[B, L, C]`."""
        return self.block.attn2.context_features(context)

    def tokens(self, x: Array) -> Array:
        """What enters the block, `[B, F, H * W, C]`."""
        batch, frames, height, width, channels = x.shape
        return self.proj_in(self.norm(x)).reshape(batch, frames, height * width, channels)

    def reference_tokens(self, tokens: Array) -> Array:
        """What another network's block attends to: of `tokens`, what the self-attention sees."""
        return self.block.norm1(tokens).value()

    def transform(self, x: Array, tokens: Array, context: Context) -> Array:
        """Adds to `[B, F, H, W, C]` what becomes of its `tokens`."""
        return self.proj_out(self.block(tokens, context).reshape(x.shape), x)

    def __call__(self, x: Array, context: Context) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, H, W, C]`."""
        return self.transform(x, self.tokens(x), context)


class TemporalBlock(nn.Module):
    """Self-attentions over time and a feed-forward; positions enter behind each norm.

    Attributes:
      channels: C.
      heads: number of heads.
      max_frames: length of the positional table; None leaves positions out.
      layers: the layer classes.
      attentions: how many self-attentions, 1 (SparseCtrl) or 2.
      positions: what the positional tables hold, as in `UNet3DConfig`.
    """

    channels: int
    heads: int
    max_frames: int | None
    layers: LayerSet
    attentions: int
    positions: Positions

    def setup(self) -> None:
        self.norm1 = self.layers.layer_norm()
        self.attn1 = SelfAttention(self.channels, self.heads, self.layers, over_frames=True)
        if self.attentions == 2:
            self.norm2 = self.layers.layer_norm()
            self.attn2 = SelfAttention(self.channels, self.heads, self.layers, over_frames=True)
        self.norm3 = self.layers.layer_norm()
        self.ff = FeedForward(self.channels, self.layers)
        if self.positions == "stored":
            shape = (self.max_frames, self.channels)
            self.tables = [
                self.param(f"positions_{i}", nn.initializers.zeros, shape, self.layers.param_dtype)
                for i in range(self.attentions)
            ]

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, L, C]` to `[B, F, L, C]`."""
        frames = x.shape[1]
        x = self.attn1(self.norm1(x).plus(self._positions(0, frames)), x)
        if self.attentions == 2:
            x = self.attn2(self.norm2(x).plus(self._positions(1, frames)), x)
        return self.ff(self.norm3(x), x)

    def _positions(self, attention: int, frames: int) -> Array:
        """What an attention adds to `[B, F, L, C]`."""
        if self.max_frames is None:
            return jnp.zeros((1, 1, 1, 1))
        if frames > self.max_frames:
            raise ValueError(
                f"{frames} frames are more than the motion module's {self.max_frames} positions"
            )
        if self.positions == "stored":
            table = self.tables[attention].astype(jnp.float32)
        else:
            table = sinusoidal_positions(self.max_frames, self.channels)
        return table[None, :frames, None]


class TemporalTransformer(nn.Module):
    """Transformer over the frames of each position.

    With a positional table it is AnimateDiff's motion module (Guo et al., arXiv 2307.04725),
    without one ModelScope's temporal transformer (Wang et al., arXiv 2308.06571).

    Attributes:
      channels: C of input and output.
      inner_channels: C of the tokens.
      heads: number of heads.
      max_frames: length of the positional table; None leaves positions out.
      norm_groups: groups of the norm, whose epsilon is 1e-6.
      norm_scope: scope of the norm.
      layers: the layer classes.
      attentions: how many self-attentions, 1 (SparseCtrl) or 2.
      positions: what the positional tables hold, as in `UNet3DConfig`.
    """

    channels: int
    inner_channels: int
    heads: int
    max_frames: int | None
    norm_groups: int
    norm_scope: NormScope
    layers: LayerSet
    attentions: int = 2
    positions: Positions = "sinusoidal"

    def setup(self) -> None:
        self.norm = self.layers.group_norm(self.norm_groups, 1e-6, self.norm_scope)
        self.proj_in = self.layers.dense(self.inner_channels)
        self.block = TemporalBlock(
            self.inner_channels,
            self.heads,
            self.max_frames,
            self.layers,
            self.attentions,
            self.positions,
        )
        self.proj_out = self.layers.dense(self.channels)

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, H, W, C]`."""
        batch, frames, height, width, _ = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(batch, frames, height * width, -1)
        moved = self.block(to_positions(tokens, self.layers.frame_axis))
        tokens = to_frames(moved, self.layers.frame_axis, tokens.shape)
        return self.proj_out(tokens.reshape(batch, frames, height, width, -1), x)


class SpatioTemporalTransformer(nn.Module):
    """A spatial and a temporal block, blended (Blattmann et al., arXiv 2311.15127).

    Attributes:
      channels: C.
      heads: number of heads.
      norm_groups: groups of the norm, whose epsilon is 1e-6.
      layers: the layer classes.
    """

    channels: int
    heads: int
    norm_groups: int
    layers: LayerSet

    def setup(self) -> None:
        self.norm = self.layers.group_norm(self.norm_groups, 1e-6)
        self.proj_in = self.layers.dense(self.channels)
        self.block = TransformerBlock(
            self.channels, self.heads, self.layers, single_token_context=True
        )
        self.time_pos_embed = TimestepEmbedding(4 * self.channels, self.channels, self.layers)
        self.temporal_block = TransformerBlock(
            self.channels,
            self.heads,
            self.layers,
            has_input_ff=True,
            single_token_context=True,
            over_frames=True,
        )
        self.time_mixer = AlphaBlender(self.layers)
        self.proj_out = self.layers.dense(self.channels)

    def context_features(self, context: Array) -> tuple[Any, Any]:
        """What the context `[B, 1, C]` adds in the spatial and in the temporal block."""
        return (
            self.block.token_attn.context_features(context),
            self.temporal_block.token_attn.context_features(context),
        )

    def __call__(self, x: Array, context: tuple[Array, Array]) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, H, W, C]`."""
        batch, frames, height, width, channels = x.shape
        spatial_context, temporal_context = context
        tokens = self.proj_in(self.norm(x)).reshape(batch, frames, height * width, channels)
        spatial = self.block(tokens, spatial_context)
        moving = to_positions(spatial, self.layers.frame_axis)
        sinusoid = sinusoidal_embedding(jnp.arange(moving.shape[1]), channels).astype(x.dtype)
        moving = moving + self.time_pos_embed(sinusoid)[None, :, None]
        temporal = self.temporal_block(moving, temporal_context)
        temporal = to_frames(temporal, self.layers.frame_axis, spatial.shape)
        tokens = self.time_mixer(spatial, temporal)
        return self.proj_out(tokens.reshape(x.shape), x)
