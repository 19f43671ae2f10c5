"""Batches that were sampled, kept until all are: an interrupted evaluation goes on with them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvd_jax import files


@dataclass(frozen=True)
class Batches:
    """What became of batches, by number.

    Attributes:
      folder: where they lie; None keeps none.
    """

    folder: Path | None = None

    def of(self, part: str) -> "Batches":
        """Those of a part of a run."""
        return self if self.folder is None else Batches(self.folder / part)

    def get(self, number: int) -> list[np.ndarray] | None:
        """The arrays of a batch; None if it was not sampled.

        Raises:
          InputError: its file is damaged.
        """
        if self.folder is None or not self._file(number).is_file():
            return None
        stored = files.read_arrays(self._file(number))
        return [stored[str(place)] for place in range(len(stored))]

    def put(self, number: int, arrays: Sequence[np.ndarray]) -> None:
        """Keeps the arrays of a batch.

        Raises:
          InputError: they cannot be written.
        """
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            named: dict[str, Any] = {str(place): array for place, array in enumerate(arrays)}
            files.replace_when_whole(
                self._file(number), functools.partial(np.savez_compressed, **named)
            )

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:05d}.npz"


NONE_KEPT = Batches()
