"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares give the secret, fewer tell nothing (Shamir, 1979)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

PRIME = 2**521 - 1
"""A Mersenne prime above every secret."""
SHARE = 66
"""Bytes of a share."""


def split(
    secret: bytes, threshold: int, holders: list[int], random: Callable[[int], bytes] = os.urandom
) -> dict[int, int]:
    """A share for each holder (numbers from 1): a random polynomial of degree threshold - 1 with the secret at 0.
    Raises ValueError where there are too few holders or a number is no place for a share."""
    if not 1 <= threshold <= len(holders) or len(set(holders)) < len(holders) or min(holders) < 1 or len(secret) > 64:
        raise ValueError("needs distinct holders from 1 on, at least as many as the threshold, and at most 64 bytes")
    line = [int.from_bytes(secret, "big"), *(int.from_bytes(random(80), "big") % PRIME for _ in range(threshold - 1))]
    return {holder: _at(line, holder) for holder in holders}


def _at(line: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(line):
        value = (value * x + coefficient) % PRIME
    return value


def join(shares: Mapping[int, int], length: int = 32) -> bytes:
    """The secret, by Lagrange's interpolation at 0. Raises ValueError where the shares are of no such secret, which too
    few of them are but for a chance of 2^-265."""
    total = 0
    for x, y in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != x:
                above, below = above * -other % PRIME, below * (x - other) % PRIME
        total += y * above * pow(below, -1, PRIME)
    secret = total % PRIME
    if secret >= 256**length:
        raise ValueError("too few shares, or shares of different secrets")
    return secret.to_bytes(length, "big")
