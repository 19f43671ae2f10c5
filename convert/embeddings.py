"""Textual inversion (Gal et al., arXiv 2208.01618): new tokens and their vectors, from files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qvd_jax.errors import InputError
from qvd_jax.files import check_file

from . import pickles
from .tensors import PICKLES, LazyTensor, Tensors, open_file

TABLE = "embeddings.token_embedding.weight"
_IN_FOLDER = ("learned_embeds.safetensors", "learned_embeds.bin")
# Names that stand for the token, not names of tokens.
_PLACEHOLDERS = ("*", "emb_params")


class Embedding(NamedTuple):
    """A new token.

    Attributes:
      token: its name; that of the second vector is `<token>_1` and so on, as in diffusers.
      vectors: `[N, C]`.
      path: where it comes from.
    """

    token: str
    vectors: np.ndarray
    path: Path

    @property
    def tokens(self) -> list[str]:
        """The names of all vectors."""
        return [self.token, *(f"{self.token}_{i}" for i in range(1, len(self.vectors)))]


def parse_embedding(argument: str) -> tuple[Path, str | None]:
    """Splits PATH[:TOKEN]; both may have colons of their own."""
    path, token = argument, None
    parts = argument.split(":")
    for count in range(len(parts), 0, -1):
        if Path(":".join(parts[:count])).exists():
            path, token = ":".join(parts[:count]), ":".join(parts[count:]) or None
            break
    return Path(path), token


def open_embedding(path: Path, token: str | None = None) -> Embedding:
    """Opens an embedding as `load_textual_inversion` of diffusers does.

    Its forms: `{token: tensor}` of diffusers, the `string_to_param` of the original code and of
    AUTOMATIC1111's, whose training steps and checkpoint do not matter, the latter's `emb_params`,
    and a tensor alone. Where a file has no name for its token, it is the file's own.

    Args:
      path: a file, or the folder of a `learned_embeds` file.
      token: another name for the token.

    Raises:
      InputError: the file is missing, damaged, or of another form.
    """
    if path.is_dir():
        files = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        if not files:
            raise InputError(f"{path} holds no embedding; looked for {', '.join(_IN_FOLDER)}")
        path = files[0]
    check_file(path, "an embedding (textual inversion)")
    name, tensor = _find(_content(path), path)
    if isinstance(tensor, LazyTensor):
        tensor = tensor.read()
    elif hasattr(tensor, "detach"):
        tensor = tensor.detach().float().numpy()
    else:
        raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, no tensor")
    vectors = np.atleast_2d(np.asarray(tensor, np.float32))
    if vectors.ndim != len("NC") or not vectors.size:
        raise InputError(f"{path}: the embedding has the shape {tensor.shape}; (vectors, width) is")
    if not np.isfinite(vectors).all():
        raise InputError(f"{path}: the embedding is not finite")
    return Embedding(token or (path.stem if name in _PLACEHOLDERS else name), vectors, path)


def _content(path: Path) -> Any:
    """Tensors by name, or whatever a pickle of tensors holds."""
    if path.suffix == ".safetensors":
        return open_file(path)
    if path.suffix not in PICKLES:
        raise InputError(f"{path}: embeddings are read from .safetensors, {', '.join(PICKLES)}")
    return pickles.load(path)


def _find(content: Any, path: Path) -> tuple[str, Any]:
    """The token's name in a file, or a placeholder, and its tensor."""
    if hasattr(content, "detach"):
        return _PLACEHOLDERS[0], content
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, no embedding")
    if {"clip_l", "clip_g"} & content.keys():
        raise InputError(
            f"{path} is an embedding of Stable Diffusion XL, which has two text encoders"
        )
    if "string_to_param" in content:
        table = content["string_to_param"]
        if not isinstance(table, Mapping):
            raise InputError(f"{path}: string_to_param is a {type(table).__name__}, no table")
        name = content.get("name")
        found = {str(name or _PLACEHOLDERS[0]): t for t in table.values()}
        count = len(table)
    else:
        found, count = dict(content), len(content)
    if count != 1:
        names = ", ".join(map(str, content)) or "nothing"
        raise InputError(f"{path} holds {names}; one embedding is expected")
    return next(iter(found.items()))


def add_embeddings(
    tensors: Tensors, tokenizer: Any, embeddings: Sequence[Embedding]
) -> tuple[Tensors, tuple[str, ...]]:
    """Adds tokens to a tokenizer, and their vectors to the text encoder's table.

    Args:
      tensors: of the text encoder.
      tokenizer: of transformers; it is changed.
      embeddings: the new tokens.

    Returns:
      The tensors, and notes.

    Raises:
      InputError: a token is known already, or vectors have another width than the encoder's.
    """
    table = tensors[TABLE]
    rows, width = table.shape
    vectors: dict[int, np.ndarray] = {}
    notes = []
    for embedding in embeddings:
        if embedding.vectors.shape[1] != width:
            raise InputError(
                f"{embedding.path}: the embedding is {embedding.vectors.shape[1]} wide, the text "
                f"encoder's tokens are {width} wide; it was made for another model"
            )
        known = [token for token in embedding.tokens if token in tokenizer.get_vocab()]
        if known:
            raise InputError(
                f"{embedding.path}: the tokenizer has a token {known[0]!r} already; give another "
                f"name: --embedding FILE:TOKEN"
            )
        tokenizer.add_tokens(embedding.tokens)
        for token, vector in zip(embedding.tokens, embedding.vectors, strict=True):
            vectors[tokenizer.convert_tokens_to_ids(token)] = vector
        count = len(embedding.vectors)
        notes.append(
            f"{embedding.path.name} is the token {embedding.token!r} of {count} "
            f"vector{'s' * (count > 1)}"
        )
    shape = (max(rows, *(number + 1 for number in vectors)), width)

    def read() -> np.ndarray:
        extended = np.zeros(shape, np.float32)
        extended[:rows] = table.read()
        for number, vector in vectors.items():
            extended[number] = vector
        return extended

    return {**tensors, TABLE: LazyTensor(shape, read)}, tuple(notes)
