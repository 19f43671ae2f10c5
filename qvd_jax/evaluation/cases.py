"""What is sampled, and who can tell whether it shows what was asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qvd_jax.errors import InputError
from qvd_jax.pipelines.pipeline import VideoDefaults

Figures = dict[str, Any]
"""What was measured of one model, by name, as JSON has it."""


class Judge(Protocol):
    """Who knows what each case asks for, and sees it in the videos."""

    @property
    def least_cases(self) -> int:
        """How many cases its figures need."""

    def check(self, want: VideoDefaults) -> None:
        """Raises `InputError` if it cannot judge videos of this size and length."""

    def real(self, count: int, seed: int) -> np.ndarray:
        """Videos as they should be, of other draws than the cases, uint8 `[count, F, H, W, 3]`."""

    def figures(self, videos: Mapping[str, np.ndarray], seed: int) -> dict[str, Figures]:
        """What it finds.

        Args:
          videos: of each model, uint8 `[N, F, H, W, 3]`, seed by seed; the reference's first.
          seed: of whatever it draws itself.

        Returns:
          The figures of each model.
        """


@dataclass(frozen=True)
class Cases:
    """What is sampled by all models.

    Attributes:
      inputs: prompts, or images uint8 `[H, W, 3]`.
      names: what they are called where they are shown; None takes the prompts themselves.
      options: of the pipelines' calls, the same for all.
      judge: None where nobody can tell what is asked for.
    """

    inputs: Sequence[Any]
    names: Sequence[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    judge: Judge | None = None

    @property
    def kind(self) -> str:
        """What the inputs are, in a word."""
        return "prompts" if all(isinstance(one, str) for one in self.inputs) else "images"

    @property
    def titles(self) -> list[str]:
        """What the cases are called."""
        return [*map(str, self.inputs)] if self.names is None else [*self.names]

    def check(self, want: VideoDefaults) -> None:
        """Raises `InputError` if there are too few, or their judge knows no such videos.

        Args:
          want: frames and size of the videos.
        """
        # A distance needs two videos.
        needed = 2 if self.judge is None else self.judge.least_cases
        if len(self.inputs) < needed:
            raise InputError(
                f"intervals and distances need at least {needed} prompts or images, "
                f"there are {len(self.inputs)}"
            )
        if self.judge is not None:
            self.judge.check(want)
