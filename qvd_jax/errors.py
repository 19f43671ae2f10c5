"""The error a user can cause."""


class InputError(ValueError):
    """Something given by the user does not fit; the message says what, where, and what would."""
