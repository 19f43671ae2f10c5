"""Progress of long work: what is done, what compiles first, and how long the rest may take."""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import tqdm


@dataclass(frozen=True)
class Part:
    """A stretch of work in ticks that cost the same.

    Attributes:
      label: what it is, for those who wait.
      kind: parts of one kind are equally fast.
      ticks: how many there are.
      work: of a tick, in a unit that all kinds share as far as can be known beforehand.
      tick: what a tick is called.
      program: what a first tick compiles, once for all parts that have it; None is the kind's.
    """

    label: str
    kind: Hashable
    ticks: int = 1
    work: float = 1.0
    tick: str = "step"
    program: Hashable = None

    @property
    def compiles(self) -> Hashable:
        """The name of its program."""
        return self.kind if self.program is None else self.program


class Estimate:
    """How long the rest of a plan takes, by what its ticks took so far.

    The first tick of a program compiles it. That says nothing of how fast its kind is; but what it
    took beyond the others' time, a program still to come is expected to take as well. A kind of
    which nothing is known yet counts as the average of the others.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._ticks = [part for part in parts for _ in range(part.ticks)]
        self._done = 0
        self._spent: dict[Hashable, _Spent] = {}
        self._first: dict[Hashable, tuple[Part, float]] = {}

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
        return bool(self.rest) and self.rest[0].compiles not in self._first

    def add(self, seconds: float) -> None:
        """Counts the next tick, which took so long."""
        part = self.rest[0]
        self._done += 1
        if part.compiles not in self._first:
            self._first[part.compiles] = part, seconds
        else:
            before = self._spent.get(part.kind, _Spent(0.0, 0.0))
            self._spent[part.kind] = _Spent(before.seconds + seconds, before.work + part.work)

    def seconds_left(self) -> float | None:
        """What the rest may take; None while nothing but first ticks were seen."""
        if not self._spent:
            return None
        every = _Spent(*(math.fsum(column) for column in zip(*self._spent.values(), strict=True)))

        def needed(part: Part) -> float:
            seconds, work = self._spent.get(part.kind, every)
            return part.work * seconds / work

        compiling = [max(0.0, seconds - needed(part)) for part, seconds in self._first.values()]
        programs = {part.compiles for part in self.rest} - self._first.keys()
        mean = math.fsum(compiling) / len(compiling)
        return math.fsum(map(needed, self.rest)) + len(programs) * mean


class _Spent(NamedTuple):
    """Seconds, and the work that was done in them."""

    seconds: float
    work: float


class Progress:
    """A bar over a plan: how much of its work is done, where it is, what the rest may take.

    Its block ends when the work does:

        with Progress([Part("shapes", "shapes", ticks=8)]) as progress:
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
        total = math.fsum(part.work for part in self._estimate.rest)
        self._bar = tqdm.tqdm(total=total, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")
        self._started = self._last = self._clock()
        self._show(0.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, done: int | None = None) -> None:
        """Says that the next tick is done, or every one of the first `done`."""
        done = self._estimate.done + 1 if done is None else done
        while self._estimate.done < done:
            part, now = self._estimate.rest[0], self._clock()
            self._estimate.add(now - self._last)
            self._last = now
            self._show(part.work)

    def _show(self, work: float) -> None:
        self._bar.set_description_str(self._text(), refresh=False)
        self._bar.update(work)
        if work == 0 or self._estimate.compiling or not self._estimate.rest:
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
            parts.append(f"{part.tick} {number} of {part.ticks}")
        if left is not None:
            parts.append(f"about {tqdm.tqdm.format_interval(left)} left")
        return ", ".join(parts)
