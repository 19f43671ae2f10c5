"""What pipelines with a text encoder share."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.models.clip import CLIPTextEncoder
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.programs import program

_logger = logging.getLogger(__name__)

Texts = Sequence[str] | np.ndarray
"""Prompts, or text embeddings `[B, L, C]`."""


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
        """Tokens of a prompt, padding included: those the tokenizer and the encoder both have."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_length)

    @property
    def configs(self) -> ComponentConfigs:
        """Of UNet, VAE and text encoder."""
        return ComponentConfigs(
            self.unet.config, self.vae.config, text_encoder=self.text_encoder.config
        )

    def embed(self, texts: Texts, length: int | None = None) -> Array:
        """Embedding `[B, L, C]` of texts, which may be one; `length` as in `encode_text`."""
        if isinstance(texts, np.ndarray):
            return jnp.asarray(texts)
        return self.encode_text(texts, length)

    def encode_text(self, prompts: Sequence[str], length: int | None = None) -> Array:
        """Text embedding `[B, L, C]` of the prompts, padded and cut to a length.

        Args:
          prompts: at least one; the words of each that are cut are named in the log.
          length: L; None is `context_length`, the longest there is.

        Raises:
          InputError: there is no prompt.
        """
        prompts = as_prompts(prompts)
        if not prompts:
            raise InputError("there are no prompts; at least one is needed")
        ids = jnp.asarray(self.token_ids(prompts, length), jnp.int32)
        return encode_tokens(self.text_encoder, self.params["text_encoder"], ids)

    def token_ids(self, prompts: Sequence[str], length: int | None = None) -> np.ndarray:
        """Token ids `[B, L]` of the prompts; arguments as of `encode_text`."""
        length = length or self.context_length
        texts = [self.write_out(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_tensors="np",
        )
        # A prompt that is cut has further rows, behind the one that is used.
        owners, rows, pieces = np.unique(
            tokens["overflow_to_sample_mapping"], return_index=True, return_counts=True
        )
        assert len(owners) == len(texts)
        for text, row, count in zip(texts, rows, pieces, strict=True):
            if count > 1:
                cut = text[tokens["offset_mapping"][row].max() :].strip()
                _logger.warning(
                    "the prompt %r is cut, for the model reads %d tokens, those of its start and "
                    "end included; left out: %r",
                    _start(text),
                    length,
                    cut,
                )
        return tokens["input_ids"][rows]

    def write_out(self, prompt: str) -> str:
        """The prompt with all vectors of its tokens (textual inversion: 2208.01618).

        A token of several vectors is known as `<a>`, `<a>_1` and so on, and stands for all of them;
        which tokens these are is decided as in diffusers.
        """
        added = self.tokenizer.added_tokens_encoder
        cased = {name.lower(): name for name in added if f"{name}_1" in added}
        written = prompt
        for token in dict.fromkeys(self.tokenizer.tokenize(prompt, verbose=False)):
            if token in added:
                numbered = (f"{token}_{i}" for i in itertools.count(1))
                more = itertools.takewhile(added.__contains__, numbered)
                written = written.replace(token, " ".join([token, *more]))
            elif token in cased:
                _logger.warning(
                    "of the vectors of %r only the first is used, as in diffusers, which looks for "
                    "tokens in lower case; name it so: --embedding FILE:%s",
                    cased[token],
                    token,
                )
        return written

    def unknown_words(self, prompt: str) -> list[str]:
        """Words the tokenizer can only replace by its unknown token, as they are written."""
        tokenizer = self.tokenizer
        tokens = tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [
            prompt[start:end]
            for token, (start, end) in zip(
                tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
            if token == tokenizer.unk_token_id
        ]


def read_texts(
    prompts: str | Sequence[str] | None, embeds: ArrayLike | None, name: str, width: int
) -> Texts | None:
    """The prompts or the embeddings, whichever were given; None if neither were.

    Args:
      prompts: one or more.
      embeds: `[B, L, C]`, or `[L, C]` for one.
      name: of the embeddings, for messages.
      width: C of the UNet's context.

    Raises:
      InputError: both were given, prompts are no texts, or embeddings have another shape or are
        not finite.
    """
    if embeds is None:
        return None if prompts is None else as_prompts(prompts, name.replace("_embeds", "s"))
    if prompts is not None:
        raise InputError(f"{name} stand in the place of {prompts!r}; give one of the two")
    return as_embeds(embeds, name, width)


def as_prompts(prompts: Any, name: str = "prompts") -> list[str]:
    """One text or several, of any sequence, as a list.

    Raises:
      InputError: something else is among them; it is named.
    """
    try:
        found = [prompts] if isinstance(prompts, str) else list(prompts)
    except TypeError as error:
        raise InputError(f"{name} = {prompts!r}: a text, or several, are needed") from error
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise InputError(f"{name}[{number}] is no text, but of type {type(text).__name__}")
    # Arrays of numpy have strings of their own.
    return [str(text) for text in found]


def as_embeds(embeds: ArrayLike, name: str, width: int) -> np.ndarray:
    """Text embeddings as float32 `[B, L, C]`; arguments and errors as of `read_texts`."""
    found = np.asarray(embeds, np.float32)
    found = found[None] if found.ndim == len("LC") else found
    if found.ndim != len("BLC") or not found.size or found.shape[-1] != width:
        raise InputError(
            f"{name}: the shape is {np.shape(embeds)}, (videos, tokens, {width}) is needed, for "
            f"the UNet's context is {width} wide"
        )
    if not np.isfinite(found).all():
        raise InputError(f"{name}: not all values are finite")
    return found


def _start(text: str, length: int = 40) -> str:
    """The beginning of a text."""
    return text if len(text) <= length else f"{text[:length]}..."


@program(static=("encoder",))
def encode_tokens(encoder: CLIPTextEncoder, params: Params, ids: Array) -> Array:
    """Embeddings `[B, L, C]` of token ids `[B, L]`."""
    # Prompt by prompt: what one is embedded as must not depend on the others, even in rounding.
    return jax.lax.map(lambda row: encoder.apply({"params": params}, row[None])[0], ids)
