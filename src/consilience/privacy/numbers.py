"""What is added up in secret: the numbers of an update as whole ones, and where those are who hide them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from consilience.core import tree as tr
from consilience.core.errors import ConsilienceError
from consilience.core.messages import Reply
from consilience.core.streams import philox
from consilience.core.tree import Tree, record
from consilience.privacy.clip import clipped, parse
from consilience.privacy.protocol import Client, total

BITS = 48
"""Numbers are counted modulo 2^BITS."""
FRACTION = 24
"""Bits behind the point: numbers are rounded to multiples of 2^-FRACTION."""
HEAD = 6
"""Bytes of a number as it is sent."""


@record
class Recipe(NamedTuple):
    """How a client makes the numbers that are added up of its update. scales: what each field, in this order, is
    multiplied by. clip: as ``--dp-clip`` takes it; the update is made at most ``norm`` long first, and one number more
    says whether it was (1/2; else -1/2). Empty: no clipping, no such number."""

    scales: dict[str, float]
    clip: str = ""
    norm: float = 0.0


def numbers(update: Tree, recipe: Recipe) -> np.ndarray:
    """The numbers of an update, in float64."""
    fields = {name: tr.tensors(getattr(update, name)) for name in recipe.scales}
    vector, more = [leaf for leaves in fields.values() for leaf in leaves], []
    if recipe.clip:
        vector, within = clipped(vector, parse(recipe.clip), recipe.norm)
        more = [[0.5 if within else -0.5]]
    scales = [scale for name, scale in recipe.scales.items() for _ in fields[name]]
    parts = [leaf.double().flatten().numpy() * scale for leaf, scale in zip(vector, scales, strict=True)]
    return np.concatenate([*parts, *more])


def encode(vector: np.ndarray, clients: int) -> np.ndarray:
    """Fixed-point numbers modulo 2^BITS. Raises ConsilienceError where the sum of so many could overflow."""
    most = 2.0 ** (BITS - 1 - FRACTION) / clients
    if not np.all(np.abs(vector) < most - 1):
        raise ConsilienceError(f"has a number of {most:.4g} or more, or not finite: it has no secret sum")
    return np.asarray(np.rint(vector * 2.0**FRACTION).astype("<i8").astype("<u8") & np.uint64(2**BITS - 1))


def decode(sums: np.ndarray) -> np.ndarray:
    """The numbers that a sum stands for: those from 2^(BITS-1) on are negative."""
    signed = sums.astype("<i8")
    return np.asarray(np.where(signed >= 2 ** (BITS - 1), signed - 2**BITS, signed) / 2.0**FRACTION)


def rounding(count: int) -> float:
    """By how much a vector of so many numbers may be longer than before it was encoded."""
    return math.sqrt(count) * 2.0 ** -(FRACTION + 1)


def threshold(share: float, asked: int) -> int:
    """How many of those who were asked have to be left."""
    return max(2, math.ceil(share * asked - 1e-9))


def numbered(asked: Sequence[int]) -> dict[int, int]:
    """The protocol's number, from 1, of each client that was asked."""
    return {client: i for i, client in enumerate(sorted(asked), 1)}


class Wanted(NamedTuple):
    """A sum that is wanted. recipes: of each client that has replied. replies: with the updates that are in it. asked:
    everybody who was asked in this round, of whom ``share`` must be left. size: numbers of each update."""

    recipes: Mapping[int, Recipe]
    replies: Sequence[Reply]
    asked: Sequence[int]
    size: int
    share: float
    version: int

    @property
    def least(self) -> int:
        """How many have to be left."""
        return threshold(self.share, len(self.asked))

    def enough(self, left: int) -> None:
        """Raise ConsilienceError where too few are left."""
        if left < self.least:
            raise ConsilienceError(
                f"round {self.version + 1}: secure aggregation has {left} of {len(self.asked)} clients left, "
                f"{self.least} are needed"
            )


class Parties(Protocol):
    """The clients of the protocol, wherever they are."""

    def sum(self, wanted: Wanted) -> tuple[np.ndarray, dict[int, str]]:
        """The sum modulo 2^BITS of the encoded numbers of the updates, and whose are not in it, with reasons. Raises
        ConsilienceError where too few are left."""
        ...


@dataclass(frozen=True)
class Simulated:
    """All parties in this process. Everybody who was asked exchanges keys and shares; who has not replied is lost after
    that, and so is who cannot encode its update. Keys come from the seed, for the same bits: it hides nothing from who
    has the seed."""

    seed: int

    def sum(self, wanted: Wanted) -> tuple[np.ndarray, dict[int, str]]:
        """The whole protocol."""
        ids, least, version = numbered(wanted.asked), wanted.least, wanted.version
        clients = {i: Client(i, least, self._random(version, i)) for i in ids.values()}
        keys = {i: client.keys() for i, client in clients.items()}
        sealed = {i: client.shares(keys) for i, client in clients.items()}
        masked, lost = {}, {}
        for client, reply in ((reply.job.client, reply) for reply in wanted.replies):
            try:
                whole, i = encode(numbers(reply.update, wanted.recipes[client]), len(ids)), ids[client]
                masked[i] = clients[i].masked(whole, {j: boxes[i] for j, boxes in sealed.items()}, BITS)
            except ConsilienceError as error:
                lost[client] = str(error)
        wanted.enough(len(masked))
        answers = {i: clients[i].unmask(list(masked)) for i in masked}
        return total(masked, answers, keys, least, BITS), lost

    def _random(self, version: int, client: int) -> Callable[[int], bytes]:
        """Bytes for one client in one round."""
        rng = philox(self.seed, "secure", version, client)
        return lambda n: hashlib.shake_256(rng.bytes(32)).digest(n)
