"""The error and the warning a user can cause, and other libraries' errors inside a message."""


class InputError(ValueError):
    """Something given by the user does not fit; the message says what, where, and what would."""


class InputWarning(UserWarning):
    """Part of what the user gives is not used; the message says which part, and why."""


class NotFiniteError(InputError):
    """Sampling gave, or was given, what is not finite."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
