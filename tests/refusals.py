"""Commands that fail as they should: with one message, and nothing written."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """How a command ended: its code, the message, and what it printed."""

    code: int
    message: str
    printed: str


def assert_one_line_error(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2
    assert "\n" not in outcome.message
    for part in parts:
        assert part in outcome.message
