"""Secret sums in simulation: every update is masked, and what the method gets is unmasked as a sum alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.errors import ConsilienceError
from consilience.core.messages import Released, Reply
from consilience.core.method import Method
from consilience.core.streams import philox
from consilience.core.tree import Tree
from consilience.privacy.protocol import KEY, SEALED, Client, total
from consilience.privacy.shamir import SHARE

BITS = 48
"""Numbers are counted modulo 2^BITS."""
FRACTION = 24
"""Bits behind the point: numbers are rounded to multiples of 2^-FRACTION."""
HEAD = 6
"""Bytes of a number as it is sent."""


def encode(vector: np.ndarray, clients: int) -> np.ndarray:
    """Fixed-point numbers modulo 2^BITS. Raises ConsilienceError where the sum of so many could overflow."""
    most = 2.0 ** (BITS - 1 - FRACTION) / clients
    if not np.all(np.abs(vector) < most - 1):
        raise ConsilienceError(f"secure aggregation: a number in an update is {most:.4g} or larger, or not finite")
    return np.asarray(np.rint(vector * 2.0**FRACTION).astype("<i8").astype("<u8") & np.uint64(2**BITS - 1))


def decode(sums: np.ndarray) -> np.ndarray:
    """The numbers that a sum stands for: those from 2^(BITS-1) on are negative."""
    signed = sums.astype("<i8")
    return np.asarray(np.where(signed >= 2 ** (BITS - 1), signed - 2**BITS, signed) / 2.0**FRACTION)


def rounding(numbers: int) -> float:
    """By how much a vector of so many numbers may be longer than before it was encoded."""
    return math.sqrt(numbers) * 2.0 ** -(FRACTION + 1)


def threshold(share: float, asked: int) -> int:
    """How many of those who were asked have to be left."""
    return max(2, math.ceil(share * asked - 1e-9))


@dataclass(frozen=True)
class Secret:
    """A core ``Release``: the x_i are the updates times their weights, as fixed-point numbers, and their sum is exact.

    The weights are those that the method gives to everybody who was asked; the sum is scaled to those that it gives to
    who is left, which differ by one factor for a field.

    Everybody who was asked exchanges keys and shares. Who is lost or refused after that has its masks taken out with
    the help of the others, at least ``share`` of those asked, and at least two; with fewer the run stops. Bytes of
    keys, shares and unmasking are counted, those that the server passes on as well; their time on the links is not.
    Two neighbouring numbers of the encoding are 2^-24 apart, so a sum of n is off by at most n 2^-25 in each place.

    Keys come from the seed, for the same bits: it shows costs and exactness, and hides nothing from who has the seed.
    """

    method: Method
    share: float
    template: dict[str, Tree]
    seed: int
    samples: Callable[[int], int]

    def init(self) -> None:
        """No state."""

    def draw(self, version: int, clients: np.ndarray) -> None:
        """The schedule chooses."""

    def size(self, update: Any) -> int:
        """A masked number takes BITS bits, whatever it was."""
        return HEAD * sum(leaf.numel() for leaf in tr.tensors(update))

    def report(self, version: int, state: None) -> Mapping[str, Any]:
        """What is hidden."""
        return {"secure": self.share}

    def __call__(self, replies: Sequence[Reply], asked: Sequence[int], version: int, state: None) -> Released:
        """One secret sum."""
        if not replies:
            return Released(None, None)
        n, one = len(asked), replies[0].job.client
        given = self._weights(replies[0], {client: self.samples(client) for client in asked})
        left = self._weights(replies[0], {reply.job.client: reply.samples for reply in replies})
        vectors = {
            r.job.client: self._flat(r.update, {f: w[r.job.client] * n for f, w in given.items()}) for r in replies
        }
        sums = self.of(vectors, asked, version)
        update = self._update(sums, {f: left[f][one] / given[f][one] / n for f in given})
        return Released(update, None, dict.fromkeys(sorted(asked), traffic(n, len(vectors))))

    def of(self, vectors: Mapping[int, np.ndarray], asked: Sequence[int], version: int) -> np.ndarray:
        """The sum of clients' vectors of numbers, of those of ``asked`` who are left. Raises ConsilienceError."""
        ids = {client: i for i, client in enumerate(sorted(asked), 1)}
        coded = {ids[client]: encode(vector, len(ids)) for client, vector in vectors.items()}
        return decode(self.sum(coded, sorted(ids.values()), threshold(self.share, len(ids)), version))

    def sum(
        self, vectors: Mapping[int, np.ndarray], everybody: Sequence[int], threshold: int, version: int
    ) -> np.ndarray:
        """The whole protocol, among clients numbered from 1, of whom those in ``vectors`` send."""
        if len(vectors) < threshold:
            raise ConsilienceError(
                f"round {version + 1}: secure aggregation has {len(vectors)} of {len(everybody)} clients left, "
                f"{threshold} are needed"
            )
        clients = {i: Client(i, threshold, self._random(version, i)) for i in everybody}
        keys = {i: client.keys() for i, client in clients.items()}
        sealed = {i: client.shares(keys) for i, client in clients.items()}
        masked = {
            i: clients[i].masked(vector, {j: boxes[i] for j, boxes in sealed.items()}, BITS)
            for i, vector in vectors.items()
        }
        answers = {i: clients[i].unmask(list(masked)) for i in masked}
        return total(masked, answers, keys, threshold, BITS)

    def _random(self, version: int, client: int) -> Callable[[int], bytes]:
        """Bytes for one client in one round."""
        rng = philox(self.seed, "secure", version, client)
        return lambda n: hashlib.shake_256(rng.bytes(32)).digest(n)

    def _weights(self, reply: Reply, samples: Mapping[int, int]) -> dict[str, dict[int, float]]:
        """The weight of each client in each field, among these clients with so many samples."""
        asked = [reply._replace(job=reply.job._replace(client=c), samples=n) for c, n in sorted(samples.items())]
        found = self.method.sums(asked)
        assert found is not None
        return {name: dict(zip(sorted(samples), weights, strict=True)) for name, weights in found.items()}

    def _flat(self, update: Any, weights: Mapping[str, float]) -> np.ndarray:
        parts = [
            leaf.double().flatten() * weights[name]
            for name in self.template
            for leaf in tr.tensors(getattr(update, name))
        ]
        return np.asarray(torch.cat(parts).numpy())

    def _update(self, sums: np.ndarray, scales: Mapping[str, float]) -> Any:
        """An update with the sums, scaled by field."""
        at = 0

        def taken(like: Tensor, scale: float) -> Tensor:
            nonlocal at
            values = torch.from_numpy(sums[at : at + like.numel()] * scale)
            at += like.numel()
            return values.reshape(like.shape).to(like.dtype)

        made = self.method.sends(self.method.program()[0])
        assert isinstance(made, type)
        return made(**{f: tr.tree_map(partial(taken, scale=scales[f]), part) for f, part in self.template.items()})


def traffic(asked: int, sent: int) -> tuple[int, int]:
    """Bytes that a client sends and gets beside its vector: keys of all, boxes of shares, who is there, shares."""
    up = 2 * KEY + asked * SEALED + asked * SHARE
    down = asked * 2 * KEY + asked * SEALED + 4 * sent
    return up, down
