"""CLIP's text and image towers (Radford et al., arXiv 2103.00020)."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.axes import Array
from qvd_jax.models.attention import SelfAttention
from qvd_jax.models.layers import FLOAT, LayerSet


@dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of the text tower; the defaults are ViT-L/14's, as in Stable Diffusion 1.5.

    Attributes:
      vocab_size: number of token ids.
      hidden_size: C of the embedding.
      intermediate_size: hidden width of the feed-forward.
      num_layers: number of transformer layers.
      num_heads: heads of the attention.
      max_length: L of the text, padding included.
      activation: "quick_gelu" is x sigmoid(1.702 x), "gelu" the exact form.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"CLIPTextConfig.num_heads = {self.num_heads} does not divide hidden_size = "
                f"{self.hidden_size}"
            )


OPENCLIP_H = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=23, num_heads=16, activation="gelu"
)
"""ModelScope's text tower: OpenCLIP ViT-H without its last layer."""


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of the image tower; the defaults are ViT-H/14's, as in Stable Video Diffusion.

    Attributes:
      image_size: height and width of the image in pixels.
      patch_size: height and width of what becomes a token; divides `image_size`.
      hidden_size: C of the tokens.
      intermediate_size: hidden width of the feed-forward.
      num_layers: number of transformer layers.
      num_heads: heads of the attention.
      projection_size: C of the result.
      activation: as in `CLIPTextConfig`.
    """

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_layers: int = 32
    num_heads: int = 16
    projection_size: int = 1024
    activation: Literal["quick_gelu", "gelu"] = "gelu"

    def __post_init__(self) -> None:
        for name, divisor, size in (
            ("num_heads", self.num_heads, self.hidden_size),
            ("patch_size", self.patch_size, self.image_size),
        ):
            if divisor < 1 or size % divisor:
                raise ValueError(f"CLIPVisionConfig.{name} = {divisor} does not divide {size}")


class CLIPLayer(nn.Module):
    """Self-attention and feed-forward, normalized before each.

    Attributes:
      config: the tower's.
      is_causal: whether a token sees only those before it.
      layers: the layer classes.
    """

    config: CLIPTextConfig | CLIPVisionConfig
    is_causal: bool
    layers: LayerSet

    def setup(self) -> None:
        config, layers = self.config, self.layers
        self.layer_norm1 = layers.layer_norm()
        self.self_attn = SelfAttention(
            config.hidden_size,
            config.num_heads,
            layers,
            use_bias=True,
            is_causal=self.is_causal,
        )
        self.layer_norm2 = layers.layer_norm()
        self.fc1 = layers.dense(config.intermediate_size)
        self.fc2 = layers.dense(config.hidden_size)

    def __call__(self, x: Array) -> Array:
        """Maps `[B, L, C]` to `[B, L, C]`."""
        x = self.self_attn(self.layer_norm1(x), x)
        h = self.fc1(self.layer_norm2(x))
        if self.config.activation == "quick_gelu":
            h = h * nn.sigmoid(1.702 * h)
        else:
            h = nn.gelu(h, approximate=False)
        return self.fc2(h, x)


class CLIPTextEncoder(nn.Module):
    """Token ids to the last hidden state behind the final norm.

    Attributes:
      config: the tower's shape.
      layers: the layer classes and dtypes.
    """

    config: CLIPTextConfig
    layers: LayerSet = FLOAT

    def setup(self) -> None:
        config, layers = self.config, self.layers
        dtypes = {"dtype": layers.dtype, "param_dtype": layers.param_dtype}
        self.token_embedding = nn.Embed(config.vocab_size, config.hidden_size, **dtypes)
        self.position_embedding = nn.Embed(config.max_length, config.hidden_size, **dtypes)
        self.encoder = [CLIPLayer(config, True, layers) for _ in range(config.num_layers)]
        self.final_layer_norm = layers.layer_norm()

    def __call__(self, token_ids: Array) -> Array:
        """Maps `[B, L]` token ids to `[B, L, C]`; padding is not masked, as in CLIP."""
        x = self.token_embedding(token_ids)
        x = x + self.position_embedding(jnp.arange(token_ids.shape[-1]))[None]
        for layer in self.encoder:
            x = layer(x)
        return self.final_layer_norm(x).value()


class CLIPVisionEncoder(nn.Module):
    """An image to its projected embedding (transformers' `CLIPVisionModelWithProjection`).

    Attributes:
      config: the tower's shape.
      layers: the layer classes and dtypes.
    """

    config: CLIPVisionConfig
    layers: LayerSet = FLOAT

    def setup(self) -> None:
        config, layers = self.config, self.layers
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        normal = nn.initializers.normal(0.02)
        # A convolution whose stride is its size; XLA takes minutes to compile it for the CPU.
        self.patch_embedding = layers.dense(config.hidden_size, use_bias=False)
        self.class_embedding = self.param(
            "class_embedding", normal, (config.hidden_size,), layers.param_dtype
        )
        self.position_embedding = nn.Embed(
            tokens, config.hidden_size, dtype=layers.dtype, param_dtype=layers.param_dtype
        )
        self.pre_layer_norm = layers.layer_norm()
        self.encoder = [CLIPLayer(config, False, layers) for _ in range(config.num_layers)]
        self.post_layer_norm = layers.layer_norm()
        self.visual_projection = layers.dense(config.projection_size, use_bias=False)

    def __call__(self, image: Array) -> Array:
        """Maps normalized pixels `[B, H, W, 3]` of `image_size` to `[B, projection_size]`."""
        batch, height, width, channels = image.shape
        size = self.config.patch_size
        patches = image.reshape(batch, height // size, size, width // size, size, channels)
        patches = patches.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
        patches = self.patch_embedding(patches.astype(self.layers.dtype))
        first = jnp.broadcast_to(self.class_embedding, (len(image), 1, patches.shape[-1]))
        x = jnp.concatenate([first.astype(patches.dtype), patches], axis=1)
        x = x + self.position_embedding(jnp.arange(x.shape[1]))[None]
        x = self.pre_layer_norm(x).value()
        for layer in self.encoder:
            x = layer(x)
        return self.visual_projection(self.post_layer_norm(x[:, 0]))
