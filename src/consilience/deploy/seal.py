"""The seal on every message: who says what to whom, in which run, round and job, once.

A message is a head (JSON), the blobs it names by their SHA-256, and a signature over the head. Flower's TLS guards
the line; the seal also holds against whoever can put messages into the server's queue.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConsilienceError
from consilience.deploy.keys import sign, signed

HEAD_BYTES = 1 << 20
"""Most bytes of a head."""
REMEMBERED = 512
"""Numbers of messages that a party remembers; older ones are stale."""
ANY = "*"
"""To whom a server says hello, before it knows which node is which site."""
SKEW = 5.0
"""Seconds that two parties' clocks may differ, as Flower has it."""


class Sealed(NamedTuple):
    """A message as it travels."""

    head: bytes
    signature: bytes
    blobs: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.head) + len(self.signature) + sum(map(len, self.blobs))


class SealError(ConsilienceError):
    """A message that must not be believed: unauthenticated, malformed, stale or replayed."""


def seal(key: Any, head: dict[str, Any], blobs: Sequence[bytes | bytearray] = ()) -> Sealed:
    """Sign a head and its blobs."""
    whole = {**head, "blobs": [hashlib.sha256(blob).hexdigest() for blob in blobs]}
    text = json.dumps(whole, sort_keys=True).encode()
    return Sealed(text, sign(key, text), tuple(bytes(blob) for blob in blobs))


def open_sealed(key: Any, message: Sealed, expected: dict[str, Any], limit: int) -> dict[str, Any]:
    """The head, if the message is from whom it says, whole, meant so, and in time. expected: what its head must say.
    limit: most bytes. Raises SealError."""
    if message.size > limit or len(message.head) > HEAD_BYTES:
        raise SealError(f"malformed: {message.size} bytes, more than the limit of {limit}")
    if not signed(key, message.head, message.signature):
        raise SealError("unauthenticated: the signature is wrong")
    try:
        head: dict[str, Any] = json.loads(message.head)
        found = [hashlib.sha256(blob).hexdigest() for blob in message.blobs]
        whole = isinstance(head, dict) and head["blobs"] == found
    except (ValueError, KeyError) as error:
        raise SealError(f"malformed: {error}") from None
    if not whole:
        raise SealError("malformed: its body is not the one that was signed")
    for key_, value in expected.items():
        if head.get(key_) != value:
            raise SealError(f"stale: of another {key_} ({head.get(key_)!r}, not {value!r})")
    return head


@dataclass
class Window:
    """The numbers of the messages that were taken already; kept in a file, since every message may be handled by
    another process. now: seconds since 1970."""

    path: Path
    now: Callable[[], float] = time.time

    def take(self, number: int, expires: float) -> None:
        """Take a message with this number once. Raises SealError if it was taken, or is too old."""
        if expires < self.now() - SKEW:
            raise SealError("stale: it has expired")
        taken: list[int] = json.loads(self.path.read_text()) if self.path.exists() else []
        if number in taken:
            raise SealError("replayed: it was taken before")
        if len(taken) == REMEMBERED and number < taken[0]:
            raise SealError("stale: newer ones were taken long ago")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(sorted([*taken, number])[-REMEMBERED:]))
