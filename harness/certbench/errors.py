"""Failures that explain themselves.

Every error a user can cause ends in one line that says what is wrong, where, and what to do next. A traceback
therefore means a bug in certbench. The exit code belongs to the error: 1 something was found, 2 wrong usage,
3 a run failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CertbenchError(Exception):
    """Base of all explained failures; ``str(error)`` is one line for the terminal."""

    exit_code = 3


class UsageError(CertbenchError):
    """The request itself is wrong: an unknown recipe, key, value or argument."""

    exit_code = 2


class FoundError(CertbenchError):
    """A check did its work and found something, such as a derived file that differs from its rows."""

    exit_code = 1


class PluginError(UsageError):
    """A plugin breaks the contract, for instance by claiming a name that is taken."""


class DataError(CertbenchError):
    """A data set is missing, damaged or not what it claims to be."""


class RunError(CertbenchError):
    """Training or certification could not go on; what was recorded before stays."""


LISTED = 30
"""Known names that a message lists; it stays one line that can be read."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The closing words of a message about an unknown name: the nearest known one, or the list where it is short."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) > LISTED:
        return f"none of the {len(names)} that are known is like it"
    return f"known: {', '.join(names)}" if names else "none is known"
