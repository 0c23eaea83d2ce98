"""Random streams, one per purpose, so that nothing that draws can shift what another draws.

A stream is keyed by ``(seed, purpose, client, job number, phase)``. The key is hashed to the 128 bits that a
Philox generator takes, so two different keys give unrelated streams and the same key gives the same stream
in any process, on any executor and after any resume. (torch's own CPU generator keeps only 32 bits of a seed,
so it serves dropout alone: see :func:`torch_fork`.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

SERVER = -1
"""The client id of the server's own streams."""


def philox(*key: int | str) -> np.random.Generator:
    """A generator for ``key``: 128-bit Philox, keyed by BLAKE2b of the key's parts.

    >>> bool((philox(0, "a").random(3) == philox(0, "a").random(3)).all())
    True
    >>> bool((philox(0, "a").random(3) == philox(0, "b").random(3)).any())
    False
    """
    return np.random.Generator(np.random.Philox(key=_hashed(*key)))


def seed_of(secret: str) -> int:
    """A seed of 128 bits that tells nothing of the secret that it is made of."""
    return _hashed("secret", secret)


def _hashed(*key: int | str) -> int:
    """128 bits of a key."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


@dataclass(frozen=True)
class Streams:
    """The streams of one place (a client's job, or the server at one version)."""

    seed: int
    client: int = SERVER
    number: int = 0
    phase: str = ""

    def rng(self, purpose: str, *more: int | str) -> np.random.Generator:
        """A fresh generator for ``purpose`` here; asking again gives the same stream from its start."""
        return philox(self.seed, purpose, self.client, self.number, self.phase, *more)

    def torch_seed(self, purpose: str, *more: int | str) -> int:
        """A 63-bit seed for torch's own generator, of ``purpose``."""
        return _hashed("torch", self.seed, purpose, self.client, self.number, self.phase, *more) >> 65


@contextmanager
def torch_fork(seed: int) -> Iterator[None]:
    """torch's global generators seeded with ``seed`` inside, and exactly as they were after.

    Only the CPU's generator is touched: clients draw everything else from :class:`Streams`.
    """
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
