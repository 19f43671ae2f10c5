"""The error a user can cause, and other libraries' errors inside its message."""


class InputError(ValueError):
    """Something given by the user does not fit; the message says what, where, and what would."""


class NotFiniteError(InputError):
    """Sampling gave, or was given, what is not finite."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
