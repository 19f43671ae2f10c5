"""How many bits each layer gets: least error within a number of bytes, or the other way about.

Every layer has a few widths, each of which takes bytes and leaves an error, and the errors of
layers add up. Where a layer gives up the same error for its next byte as every other, no exchange
between two of them helps (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
quantizers", IEEE Transactions on Acoustics, Speech, and Signal Processing 36(9), 1988): widths off
the lower convex hull of a layer's points are never best, and the steps along all hulls are taken in
the order of what they are worth.
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple


class Option(NamedTuple):
    """What a layer is with weights of some width.

    Attributes:
      bytes: it takes.
      error: it leaves, in a unit in which the errors of layers add up.
    """

    bytes: int
    error: float


Options = Mapping[str, Mapping[int, Option]]
"""Of each layer, by its path and the bits of its weights."""


class _Step(NamedTuple):
    """From one width of a layer to the next along its hull.

    Attributes:
      path: of the layer.
      before: bits.
      bits: behind the step.
      bytes: it takes.
      gain: of error.
    """

    path: str
    before: int
    bits: int
    bytes: int
    gain: float


def total(options: Options, widths: Mapping[str, int]) -> Option:
    """Bytes and error of all layers together, of some widths."""
    taken = [options[path][bits] for path, bits in widths.items()]
    return Option(sum(one.bytes for one in taken), math.fsum(one.error for one in taken))


def widths_within(options: Options, most_bytes: int) -> dict[str, int]:
    """The bits of each layer with which all err least in a number of bytes.

    Where the budget ends between two steps, later ones that still fit are taken: the error is at
    most that of the optimum and of the first step that did not fit.

    Raises:
      ValueError: the fewest bits take more.
    """
    widths = {path: _hull(of_layer)[0] for path, of_layer in options.items()}
    free = most_bytes - total(options, widths).bytes
    if free < 0:
        raise ValueError(f"{most_bytes} bytes: {most_bytes - free} are the least")
    for step in _steps(options):
        if widths[step.path] == step.before and step.bytes <= free:
            widths[step.path] = step.bits
            free -= step.bytes
    return widths


def widths_reaching(options: Options, most_error: float) -> dict[str, int]:
    """The bits of each layer that take fewest bytes for an error; least bits where it allows all.

    Steps are taken until the error is reached, and of them those undone that were not needed.

    Raises:
      ValueError: all layers' least errors are more.
    """
    widths = {path: _hull(of_layer)[0] for path, of_layer in options.items()}
    taken = []
    for step in _steps(options):
        if total(options, widths).error <= most_error:
            break
        widths[step.path] = step.bits
        taken.append(step)
    if (error := total(options, widths).error) > most_error:
        raise ValueError(f"an error of {most_error}: {error} is the least")
    for step in reversed(taken):
        narrower = {**widths, step.path: step.before}
        if widths[step.path] == step.bits and total(options, narrower).error <= most_error:
            widths = narrower
    return widths


def _hull(of_layer: Mapping[int, Option]) -> list[int]:
    """The widths on the lower convex hull, from the fewest bytes to the least error."""
    hull: list[int] = []
    for bits, option in sorted(of_layer.items(), key=lambda item: item[1]):
        if hull and option.error >= of_layer[hull[-1]].error:
            continue
        while len(hull) > 1 and _worth(of_layer, *hull[-2:]) <= _worth(of_layer, hull[-1], bits):
            hull.pop()
        hull.append(bits)
    return hull


def _worth(of_layer: Mapping[int, Option], before: int, bits: int) -> float:
    """Of a step between two widths: the error it takes off for each byte."""
    here, there = of_layer[before], of_layer[bits]
    return (here.error - there.error) / (there.bytes - here.bytes)


def _steps(options: Options) -> list[_Step]:
    """Of all layers, those worth most first; those of one layer are in the order of its hull."""
    ordered = []
    for path, of_layer in options.items():
        hull = _hull(of_layer)
        for before, bits in itertools.pairwise(hull):
            here, there = of_layer[before], of_layer[bits]
            step = _Step(path, before, bits, there.bytes - here.bytes, here.error - there.error)
            ordered.append(step)
    return sorted(ordered, key=lambda step: -step.gain / step.bytes)
