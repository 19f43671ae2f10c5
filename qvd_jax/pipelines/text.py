"""What pipelines with a text encoder share."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.models.clip import CLIPTextEncoder
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline


@dataclass(frozen=True, kw_only=True)
class TextPipeline(VideoPipeline[VideoDefaults]):
    """A model whose UNet is told a text.

    Attributes:
      text_encoder: maps token ids to the text embedding.
      tokenizer: of transformers.
    """

    text_encoder: CLIPTextEncoder
    tokenizer: Any = field(repr=False)

    networks = ("unet", "vae", "text_encoder")

    @property
    def context_length(self) -> int:
        """Tokens of a prompt, padding included."""
        return self.text_encoder.config.max_length

    @property
    def configs(self) -> ComponentConfigs:
        """Of UNet, VAE and text encoder."""
        return ComponentConfigs(
            self.unet.config, self.vae.config, text_encoder=self.text_encoder.config
        )

    def encode_text(self, prompts: Sequence[str]) -> Array:
        """Text embedding `[B, L, C]` of the prompts, padded and cut to the tower's length.

        Raises:
          InputError: there is no prompt.
        """
        if not prompts:
            raise InputError("there are no prompts; at least one is needed")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.text_encoder.config.max_length,
            return_tensors="np",
        )
        ids = jnp.asarray(tokens["input_ids"], jnp.int32)
        return _encode_text(self.text_encoder, self.params["text_encoder"], ids)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words the tokenizer can only replace by its unknown token, as they are written."""
        tokenizer = self.tokenizer
        tokens = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        return [
            prompt[start:end]
            for token, (start, end) in zip(
                tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
            if token == tokenizer.unk_token_id
        ]


@functools.partial(jax.jit, static_argnames="encoder")
def _encode_text(encoder: CLIPTextEncoder, params: Params, ids: Array) -> Array:
    # Prompt by prompt: what one is embedded as must not depend on the others, even in rounding.
    return jax.lax.map(lambda row: encoder.apply({"params": params}, row[None])[0], ids)
