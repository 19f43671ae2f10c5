"""Sizes of the blocks in which something is computed."""


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`, or 1."""
    return next((size for size in range(min(number, most), 1, -1) if number % size == 0), 1)
