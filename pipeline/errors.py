"""The errors that a user can mend, each with the value given, what was expected and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A bad configuration or bad input: the command line prints the message alone and exits with 2."""


def unknown(kind: str, given: object, options: Iterable[str], hint: str = "") -> InputError:
    """Build the error for a name that is not among ``options``: names it, suggests the nearest, lists all.

    Args:
        kind: What the name stands for, for example ``"method"`` or ``"key"``.
        given: The value that was given.
        options: The names that exist.
        hint: A sentence put at the end.
    """
    names = [str(option) for option in options]
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    message = f"unknown {kind} '{given}'."
    if near:
        message += f" Did you mean '{near[0]}'?"
    message += f" Options: {', '.join(names) if names else 'none'}."
    return InputError(f"{message} {hint}".rstrip())
