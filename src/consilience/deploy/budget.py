"""What a site's rows have spent of their privacy: every training with ``row_noise`` stands in its ledger with its cost.

The noise comes from the site's own secret and from all that it was asked for, so that the same question gets the same
answer, which costs nothing, and any other gets other noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from consilience.core.method import Method
from consilience.deploy import ledger
from consilience.deploy.keys import secret_of
from consilience.deploy.policy import Policy, PolicyError
from consilience.folder import read_lines
from consilience.privacy.mechanism import Poisson
from consilience.privacy.rows import parse

KEY = "noise.key"


class Cost(NamedTuple):
    """Of one training. id: names what was asked for. noise: the multiplier. rows: of the site. batch: expected rows of
    a step. steps: of local training."""

    id: str
    noise: float
    rows: int
    batch: int
    steps: int


def seed(folder: Path, blobs: Sequence[bytes]) -> int:
    """The seed of draws and noise where a training is asked for with these blobs."""
    return int.from_bytes(_hash(secret_of(folder / KEY), blobs), "little")


def cost(method: Method, rows: int, steps: int | None, blobs: Sequence[bytes]) -> Cost | None:
    """What a training on so many rows costs, with a job's own number of steps if it has one; None without noise."""
    noise = parse(method.row_noise)
    if noise is None or not rows:
        return None
    return Cost(
        _hash(b"", blobs).hex(), noise.multiplier, rows, min(method.batch_size, rows), method.steps_of(rows, steps)
    )


def spent(costs: Iterable[Cost], delta: float) -> float:
    """Epsilon of these trainings at ``delta``; one that stands there twice counts once. Trainings that were alike are
    one composition; the epsilons of different ones are added up, each at this delta."""
    alike: dict[tuple[float, int, int], int] = {}
    for one in {one.id: one for one in costs}.values():
        kind = (one.noise, one.rows, one.batch)
        alike[kind] = alike.get(kind, 0) + one.steps
    return sum(Poisson(n, batch, 1).epsilon(z, steps, delta) for (z, n, batch), steps in alike.items())


def costs(lines: Iterable[Mapping[str, Any]]) -> list[Cost]:
    """Those in a ledger's lines."""
    return [Cost(**line["rows"]) for line in lines if "rows" in line]


def check(policy: Policy, folder: Path, more: Cost | None) -> None:
    """Refuse a training that would spend more than the policy of the site in this folder allows. Raises PolicyError."""
    if policy.epsilon is None or more is None:
        return
    until = costs(read_lines(folder / ledger.FILE))
    before, after = (spent(some, policy.delta) for some in (until, [*until, more]))
    if after > policy.epsilon:
        raise PolicyError(
            f"the policy's epsilon of {policy.epsilon:g} for a row is used up: {before:.3g} is spent, and this would "
            f"make it {after:.3g}"
        )


def _hash(key: bytes, blobs: Sequence[bytes]) -> bytes:
    asked = b"".join(hashlib.sha256(blob).digest() for blob in blobs)
    return hashlib.blake2b(asked, key=key, digest_size=16).digest()
