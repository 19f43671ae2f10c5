"""Progress of long work: what is done, what compiles first, and how long the rest may take."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import tqdm

DECODER_COMPILATION = 0.25
"""What a decoder compiles, where a UNet's sampling is one."""


@dataclass(frozen=True)
class Part:
    """A stretch of work in ticks that cost the same.

    Attributes:
      label: what it is, for those who wait.
      task: what is done; what others with the same took is the first guess of what it takes.
      subject: to what; parts of one task and subject are equally fast.
      size: of its arrays; the first tick of each task, subject and size compiles.
      ticks: how many there are.
      work: of a tick, in a unit that all tasks share as far as can be known beforehand.
      compilation: of the program, in another such unit.
    """

    label: str
    task: str
    subject: Hashable = None
    size: Hashable = None
    ticks: int = 1
    work: float = 1.0
    compilation: float = 1.0

    @property
    def program(self) -> Hashable:
        """What is compiled once."""
        return self.task, self.subject, self.size


class Estimate:
    """How long the rest of a plan takes, by what its ticks took so far.

    The first tick of a program compiles it. That says nothing of how fast it is; but what it took
    beyond the others' time tells how long programs that are still to come compile. A subject or
    task of which nothing is known yet counts as the average of those known.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._ticks = [part for part in parts for _ in range(part.ticks)]
        self._done = 0
        self._first: dict[Hashable, tuple[Part, float]] = {}
        self._spent: dict[tuple[Hashable, ...], _Spent] = {}

    @property
    def done(self) -> int:
        """Ticks that are done."""
        return self._done

    @property
    def rest(self) -> list[Part]:
        """The part of each tick that is not."""
        return self._ticks[self._done :]

    @property
    def compiling(self) -> bool:
        """Whether the next tick compiles first."""
        return bool(self.rest) and self.rest[0].program not in self._first

    def add(self, seconds: float) -> None:
        """Counts the next tick, which took so long."""
        part = self.rest[0]
        if self.compiling:
            self._first[part.program] = part, seconds
        else:
            for alike in _from_alike_to_any(part):
                spent = self._spent.get(alike, _Spent(0.0, 0.0))
                self._spent[alike] = _Spent(spent.seconds + seconds, spent.work + part.work)
        self._done += 1

    def seconds_left(self) -> float | None:
        """What the rest may take; None while nothing but first ticks were seen."""
        if not self._spent:
            return None
        compiled: dict[str, list[float]] = {}
        for part, seconds in self._first.values():
            rate = max(0.0, seconds - self._needed(part)) / part.compilation
            compiled.setdefault(part.task, []).append(rate)
        every = [rate for rates in compiled.values() for rate in rates]
        # The first of a task compiles what the others share: the median leaves that out.
        programs = {part.program: part for part in self.rest}
        compiling = (
            part.compilation * statistics.median(compiled.get(part.task, every))
            for program, part in programs.items()
            if program not in self._first
        )
        return math.fsum(map(self._needed, self.rest)) + math.fsum(compiling)

    def _needed(self, part: Part) -> float:
        """What a tick takes without compilation."""
        known = next(alike for alike in _from_alike_to_any(part) if alike in self._spent)
        return part.work * self._spent[known].seconds / self._spent[known].work


class _Spent(NamedTuple):
    """Seconds, and the work that was done in them."""

    seconds: float
    work: float


def _from_alike_to_any(part: Part) -> tuple[tuple[Hashable, ...], ...]:
    """What a part's speed is told by: its task and subject, else its task, else anything."""
    return (part.task, part.subject), (part.task,), ()


class Progress:
    """A bar over a plan: how much of its work is done, where it is, what the rest may take.

    Its block ends when the work does:

        with Progress([Part("shapes", "sampling", ticks=8)]) as progress:
            for step in range(8):
                ...
                progress.advance()
    """

    def __init__(
        self, parts: Sequence[Part], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Takes the plan; `clock` gives seconds."""
        self._estimate = Estimate(parts)
        self._numbers = [number for part in parts for number in range(1, part.ticks + 1)]
        self._clock = clock

    def __enter__(self) -> Self:
        self._bar = tqdm.tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")
        # A host may have no share of the work.
        self._work = math.fsum(part.work for part in self._estimate.rest) or 1.0
        self._started = self._last = self._clock()
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, done: int | None = None) -> None:
        """Says that the next tick is done, or every one of the first `done`."""
        done = self._estimate.done + 1 if done is None else done
        while self._estimate.done < done:
            now = self._clock()
            self._estimate.add(now - self._last)
            self._last = now
            self._show()

    def print(self, text: str) -> None:
        """Prints lines above the bar."""
        self._bar.write(text)

    def _show(self) -> None:
        left = math.fsum(part.work for part in self._estimate.rest)
        self._bar.set_description_str(self._text(), refresh=False)
        self._bar.update(round(100 * (1 - left / self._work)) - self._bar.n)
        if self._estimate.compiling or not self._estimate.rest:
            # What is shown stands for long.
            self._bar.refresh()

    def _text(self) -> str:
        if not self._estimate.rest:
            return f"done in {tqdm.tqdm.format_interval(self._last - self._started)}"
        part = self._estimate.rest[0]
        number = self._numbers[self._estimate.done]
        left = self._estimate.seconds_left()
        parts = [part.label]
        if self._estimate.compiling:
            parts.append("compiling")
        elif part.ticks > 1:
            parts.append(f"step {number} of {part.ticks}")
        if left is not None:
            parts.append(f"about {tqdm.tqdm.format_interval(left)} left")
        return ", ".join(parts)
