"""The errors a user can meet, and what each means for the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConsilienceError(Exception):
    """Base class. The message is one to three lines: what, where, and what would be right."""

    exit_code = 1


class Refused(ConsilienceError):
    """Bad usage, configuration or data, found before any work was done."""

    exit_code = 2


class ConfigError(Refused):
    """An option, hyper-parameter or combination of them that cannot be used."""


class DataError(Refused):
    """Data that cannot be read or that a federation cannot be made of."""


class NeedsError(Refused):
    """A method needs something that the federation does not offer."""


class CheckpointError(Refused):
    """A checkpoint that is missing, damaged in both generations, or of another run."""


class ClientError(ConsilienceError):
    """A client's own code failed while running. ``trace``: its own traceback, as text."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        return str(self.args[0])


class WorkerError(ConsilienceError):
    """Worker processes died again and again, so that the run could not go on."""


LISTED = 12
"""Most known words that are listed where none is close."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known word, or the list of them when none is close and they are few.

    The dashes of flags do not count: what all words share would make any two of them look close.
    """
    bare = {name.lstrip("-"): name for name in sorted(known)}
    close = difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{bare[close[0]]}'?"
    return f"; known: {', '.join(bare.values())}" if 0 < len(bare) <= LISTED else ""
