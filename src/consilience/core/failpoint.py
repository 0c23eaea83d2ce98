"""Places where a run can be made to die, so that tests can show that nothing is lost.

The environment variable CONSILIENCE_FAILPOINT is ``NAME``, ``NAME:COUNT`` (the COUNT-th time the place is reached)
or ``NAME:COUNT:raise`` (an exception instead of SIGKILL, for tests in one process).
"""

from __future__ import annotations

import os
import signal

NAMES = (
    "client-before",
    "client-after",
    "work",
    "aggregate",
    "evaluate",
    "state",
    "checkpoint-before",
    "states-sealed",
    "checkpoint-middle",
    "checkpoint-after",
)
"""Every place, in the order of a round."""

_seen: dict[str, int] = {}


class Died(BaseException):
    """Raised instead of dying, where tests ask for it."""


def reach(name: str) -> None:
    """Die here if the environment says so."""
    wanted = os.environ.get("CONSILIENCE_FAILPOINT", "")
    if not wanted.startswith(name):
        return
    where, count, how = [*wanted.split(":"), "1", ""][:3] if ":" in wanted else (wanted, "1", "")
    if where != name:
        return
    _seen[wanted] = _seen.get(wanted, 0) + 1
    if _seen[wanted] == int(count):
        if how == "raise":
            del _seen[wanted]
            raise Died(name)
        os.kill(os.getpid(), signal.SIGKILL)
