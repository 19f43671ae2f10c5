"""Attention: spatial, to the text, and over time."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from qvd_jax.axes import Array, NormScope
from qvd_jax.models.layers import (
    AlphaBlender,
    FeedForward,
    LayerSet,
    TimestepEmbedding,
    sinusoidal_embedding,
    sinusoidal_positions,
)

_LOGITS_BYTES = 2**30
"""Logits of more bytes than this are computed in parts on accelerators: at 64x64 latents with
guidance, 16 frames have 17 GB of them."""

_CPU_LOGITS_BYTES = 2**25
"""Logits of more bytes than this are computed in blocks on the CPU, unless a head's are small."""

_CPU_HEAD_BYTES = 2**19
"""A head's logits up to this gain nothing from blocks: over time, at 8192 positions of 16 frames,
and to the text, at 1024 tokens, all at once took 0.4 to 0.6 of their time."""

_CPU_BLOCK_BYTES = 2**23
"""Logits of one block: at 1024 and 2304 tokens such blocks took 0.3 of the time of all at once."""

_CPU_LEAST_BLOCK = 64
"""Where the queries divide into nothing larger, they are not divided."""


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


def dot_product_attention(q: Array, k: Array, v: Array, *, is_causal: bool = False) -> Array:
    """Softmax attention with scale D**-0.5; logits and softmax in float32.

    Args:
      q: `[B, L, heads, D]`.
      k: `[B, M, heads, D]`, M the number of keys.
      v: `[B, M, heads, D]`.
      is_causal: whether token i sees only the keys up to i.

    Returns:
      `[B, L, heads, D]` in the dtype of `q`.
    """

    def accelerator(q: Array, k: Array, v: Array) -> Array:
        def attend(some: tuple[Array, Array, Array]) -> Array:
            return jax.nn.dot_product_attention(*some, is_causal=is_causal)

        batch, length, heads, _ = q.shape
        one = 4 * heads * length * k.shape[1]
        if batch * one <= _LOGITS_BYTES:
            return attend((q, k, v))
        together = _power_of_two_in(batch, _LOGITS_BYTES / one)
        return lax.map(attend, (q, k, v), batch_size=together)

    def cpu(q: Array, k: Array, v: Array) -> Array:
        # Without the barrier XLA folds the transpositions into products that are half as fast.
        q, k, v = lax.optimization_barrier(tuple(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
        batch, heads, length, _ = q.shape
        head = 4 * length * k.shape[2]
        if is_causal or head <= _CPU_HEAD_BYTES or batch * heads * head <= _CPU_LOGITS_BYTES:
            out = _attend(q, k, v, is_causal=is_causal)
        else:
            out = _attend_in_blocks(q, k, v)
        return jnp.swapaxes(out, 1, 2).astype(q.dtype)

    return lax.platform_dependent(q, k, v, cpu=cpu, default=accelerator)


def _attend(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    """Attention of `[..., heads, L, D]`, float32, that divides after the product with v.

    The division then runs over `[L, D]` instead of `[L, M]`. With the heads before the tokens it
    took 0.5 to 0.8 of the time on two cores of a Xeon; `jax.nn.dot_product_attention` was the
    slowest of the formulations measured.
    """
    weights = _exponentials(q, k, is_causal=is_causal)
    return _weigh(weights, v) / weights.sum(-1, keepdims=True)


def _attend_in_blocks(q: Array, k: Array, v: Array) -> Array:
    """`_attend` without a mask, in blocks of heads, and of a head's queries where one is larger.

    Few heads with all their queries took 0.7 to 0.8 of the time of all heads with few queries.
    The sums of the weights are one more column of the product with v: with a single use of the
    exponentials XLA fuses everything into one pass, in 0.6 to 0.8 of the time. Results stay
    float32 for the loops: XLA's CPU writes a slice of bfloat16 by converting the whole array.
    """
    heads, length, width = q.shape[1:]
    row_bytes = 4 * k.shape[2]
    group = _power_of_two_in(heads, _CPU_BLOCK_BYTES / (row_bytes * length))
    block = _power_of_two_in(length, _CPU_BLOCK_BYTES / (row_bytes * group))
    block = block if block >= _CPU_LEAST_BLOCK else length
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)

    def attend_head(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head

        def attend(q: Array) -> Array:
            out = _weigh(_exponentials(q, k, is_causal=False), v)
            return out[..., :width] / out[..., width:]

        return lax.map(attend, q.reshape(-1, block, width)).reshape(q.shape)

    per_head = tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return lax.map(attend_head, per_head, batch_size=group).reshape(q.shape)


def _power_of_two_in(number: int, size: float) -> int:
    """The power of two next to `size`, or the largest one that divides `number`."""
    return math.gcd(number, 2 ** max(round(math.log2(size)), 0))


def _exponentials(q: Array, k: Array, *, is_causal: bool) -> Array:
    """Weights before they are divided by their sums, float32 `[..., heads, L, M]`."""
    logits = jnp.einsum("...ld,...md->...lm", q, k, preferred_element_type=jnp.float32)
    logits = logits * (1 / math.sqrt(q.shape[-1]))
    if is_causal:
        rows, columns = (
            lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim + axis) for axis in (-2, -1)
        )
        logits = jnp.where(columns <= rows, logits, jnp.finfo(jnp.float32).min)
    return jnp.exp(logits - logits.max(-1, keepdims=True))


def _weigh(weights: Array, v: Array) -> Array:
    """Float32 `[..., heads, L, D]`."""
    return jnp.einsum(
        "...lm,...md->...ld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )


def _split_heads(x: Array, heads: int) -> Array:
    """`[..., C] -> [..., heads, D]`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class SelfAttention(nn.Module):
    """Self-attention with one product for queries, keys and values.

    Attributes:
      channels: C.
      heads: number of heads; divides C.
      layers: the layer classes.
      use_bias: whether queries, keys and values have a bias; the output always has.
      is_causal: whether a token sees only the tokens before it.
    """

    channels: int
    heads: int
    layers: LayerSet
    use_bias: bool = False
    is_causal: bool = False

    def setup(self) -> None:
        self.to_qkv = self.layers.dense(3 * self.channels, use_bias=self.use_bias)
        self.to_out = self.layers.dense(self.channels)

    def __call__(self, x: Array, reference: Array | None = None) -> Array:
        """Maps `[..., L, C]` to `[..., L, C]`.

        Args:
          x: the tokens; `[B, F, L, C]` with a reference.
          reference: as in `Context`; all frames attend to one copy of it.
        """
        q, k, v = self._project(x)
        if reference is None:
            out = dot_product_attention(q, k, v, is_causal=self.is_causal)
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
        return self.to_out(out.reshape(x.shape))

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of `[..., L, C]`, `[..., L, heads, D]` with one axis before."""
        q, k, v = jnp.split(self.to_qkv(x.reshape(-1, *x.shape[-2:])), 3, axis=-1)
        return _split_heads(q, self.heads), _split_heads(k, self.heads), _split_heads(v, self.heads)


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
        self.to_q = self.layers.dense(self.channels, use_bias=False)
        self.to_kv = self.layers.dense(2 * self.channels, use_bias=False)
        self.to_out = self.layers.dense(self.channels)

    def context_features(self, context: Array) -> Context:
        """Keys and values of the context `[B, L, C]`."""
        k, v = jnp.split(self.to_kv(context), 2, axis=-1)
        return Context(_split_heads(k, self.heads), _split_heads(v, self.heads))

    def __call__(self, x: Array, context: Context) -> Array:
        """Maps `[B, F, L, C]` to `[B, F, L, C]`; all frames attend to one copy of the text."""
        q = _split_heads(self.to_q(x.reshape(x.shape[0], -1, x.shape[-1])), self.heads)
        out = dot_product_attention(q, context.keys, context.values)
        return self.to_out(out.reshape(x.shape))


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

    The tokens are the positions of a frame, or, in the temporal half of Stable Video Diffusion's
    transformer, the frames of a position.

    Attributes:
      channels: C.
      heads: number of heads.
      layers: the layer classes.
      has_input_ff: whether a feed-forward comes first too (SVD's temporal half).
      single_token_context: whether the context is one token (SVD's image embedding).
    """

    channels: int
    heads: int
    layers: LayerSet
    has_input_ff: bool = False
    single_token_context: bool = False

    def setup(self) -> None:
        if self.has_input_ff:
            self.norm_in = self.layers.layer_norm()
            self.ff_in = FeedForward(self.channels, self.layers)
        self.norm1 = self.layers.layer_norm()
        self.attn1 = SelfAttention(self.channels, self.heads, self.layers)
        if self.single_token_context:
            self.token_attn = SingleTokenAttention(self.channels, self.layers)
        else:
            self.norm2 = self.layers.layer_norm()
            self.attn2 = CrossAttention(self.channels, self.heads, self.layers)
        self.norm3 = self.layers.layer_norm()
        self.ff = FeedForward(self.channels, self.layers)

    def __call__(self, x: Array, context: Any) -> Array:
        """Maps `[B, F, L, C]` (or `[B, L, F, C]` over frames) to the same shape.

        Args:
          x: the tokens.
          context: of `context_features` of the attention to it.
        """
        if self.has_input_ff:
            x = x + self.ff_in(self.norm_in(x))
        if self.single_token_context:
            x = x + self.attn1(self.norm1(x))
            x = x + context[:, None]
        else:
            x = x + self.attn1(self.norm1(x), context.reference)
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


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
        return self.block.norm1(tokens)

    def transform(self, x: Array, tokens: Array, context: Context) -> Array:
        """Adds to `[B, F, H, W, C]` what becomes of its `tokens`."""
        return x + self.proj_out(self.block(tokens, context)).reshape(x.shape)

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
    """

    channels: int
    heads: int
    max_frames: int | None
    layers: LayerSet
    attentions: int

    def setup(self) -> None:
        self.norm1 = self.layers.layer_norm()
        self.attn1 = SelfAttention(self.channels, self.heads, self.layers)
        if self.attentions == 2:
            self.norm2 = self.layers.layer_norm()
            self.attn2 = SelfAttention(self.channels, self.heads, self.layers)
        self.norm3 = self.layers.layer_norm()
        self.ff = FeedForward(self.channels, self.layers)

    def __call__(self, x: Array) -> Array:
        """Maps `[B, L, F, C]` to `[B, L, F, C]`: the tokens of the attention are the frames."""
        positions = self._positions(x.shape[-2])
        x = x + self.attn1(self.norm1(x) + positions)
        if self.attentions == 2:
            x = x + self.attn2(self.norm2(x) + positions)
        return x + self.ff(self.norm3(x))

    def _positions(self, frames: int) -> Array:
        if self.max_frames is None:
            return jnp.zeros((1, 1, 1, 1))
        if frames > self.max_frames:
            raise ValueError(
                f"{frames} frames are more than the motion module's {self.max_frames} positions"
            )
        return sinusoidal_positions(self.max_frames, self.channels)[None, None, :frames]


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
    """

    channels: int
    inner_channels: int
    heads: int
    max_frames: int | None
    norm_groups: int
    norm_scope: NormScope
    layers: LayerSet
    attentions: int = 2

    def setup(self) -> None:
        self.norm = self.layers.group_norm(self.norm_groups, 1e-6, self.norm_scope)
        self.proj_in = self.layers.dense(self.inner_channels)
        self.block = TemporalBlock(
            self.inner_channels, self.heads, self.max_frames, self.layers, self.attentions
        )
        self.proj_out = self.layers.dense(self.channels)

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, H, W, C]`."""
        batch, frames, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch, frames, height * width, channels)
        tokens = self.block(self.proj_in(tokens.swapaxes(1, 2)))
        return x + self.proj_out(tokens).swapaxes(1, 2).reshape(x.shape)


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
        sinusoid = sinusoidal_embedding(jnp.arange(frames), channels).astype(x.dtype)
        moving = spatial + self.time_pos_embed(sinusoid)[None, :, None]
        temporal = self.temporal_block(moving.swapaxes(1, 2), temporal_context).swapaxes(1, 2)
        tokens = self.time_mixer(spatial, temporal)
        return x + self.proj_out(tokens).reshape(x.shape)
