"""The error a user can cause, and other libraries' errors inside its message."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Something given by the user does not fit; the message says what, where, and what would."""


class NotFiniteError(InputError):
    """Sampling gave, or was given, what is not finite."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says of input errors which of several models they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
