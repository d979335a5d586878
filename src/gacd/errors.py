"""Errors that are the user's to mend: one line that says what was wrong and what would be right."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command line prints its message as one line and exits with code 2."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, suggesting the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UserError(f"unknown {kind} '{name}': {hint}known: {', '.join(names)}")


def first_line(error: Exception) -> str:
    """What somebody else's error says, at its shortest."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def defined_again(old: object, new: object) -> bool:
    """Whether both have one name in one module, as where a notebook's cell has run twice."""
    before, after = (
        (getattr(x, "__module__", ""), getattr(x, "__qualname__", "<lambda>")) for x in (old, new)
    )
    return before == after and "<" not in after[1]  # no lambda, and nothing that a function made
