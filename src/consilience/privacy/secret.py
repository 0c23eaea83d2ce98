"""Secret sums: every update is masked, and what the method gets is unmasked as a sum alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from consilience.core import tree as tr
from consilience.core.messages import Refusal, Released, Reply
from consilience.core.method import Method
from consilience.core.tree import Tree
from consilience.privacy.numbers import HEAD, Parties, Recipe, Wanted, decode
from consilience.privacy.protocol import KEY, SEALED
from consilience.privacy.shamir import SHARE


@dataclass(frozen=True)
class Secret:
    """A core ``Release``: the x_i are the updates times their weights, as fixed-point numbers, and their sum is exact.

    The weights are those that the method gives to everybody who was asked; the sum is scaled to those that it gives to
    who is left, which differ by one factor for a field.

    Who is lost or refused has its masks taken out with the help of the others, at least ``share`` of those asked, and
    at least two; with fewer the run stops. Bytes of keys, shares and unmasking are counted, those that the server
    passes on as well; their time on simulated links is not. Two neighbouring numbers of the encoding are 2^-24 apart,
    so a sum of n is off by at most n 2^-25 in each place.

    parties: where the updates are, and their secrets.
    """

    method: Method
    share: float
    template: dict[str, Tree]
    parties: Parties
    samples: Callable[[int], int]

    def init(self) -> None:
        """No state."""

    def draw(self, version: int, clients: np.ndarray) -> None:
        """The schedule chooses."""

    def size(self, update: Any) -> int:
        """A masked number takes BITS bits, whatever it was."""
        return HEAD * sum(leaf.numel() for leaf in tr.tensors(self.template))

    def report(self, version: int, state: None) -> Mapping[str, Any]:
        """What is hidden."""
        return {"secure": self.share}

    def __call__(self, replies: Sequence[Reply], asked: Sequence[int], version: int, state: None) -> Released:
        """One secret sum."""
        if not replies:
            return Released(None, None)
        n = len(asked)
        given = self._weights(replies[0], asked)
        recipes = {r.job.client: Recipe({f: w[r.job.client] * n for f, w in given.items()}) for r in replies}
        sums, refused = self.of(recipes, replies, asked, version)
        left = sorted({reply.job.client for reply in replies} - {refusal.client for refusal in refused})
        weighed, one = self._weights(replies[0], left), left[0]
        update = self._update(sums, {f: weighed[f][one] / given[f][one] / n for f in given})
        return Released(update, None, dict.fromkeys(sorted(asked), traffic(n, len(left))), refused)

    def of(
        self, recipes: Mapping[int, Recipe], replies: Sequence[Reply], asked: Sequence[int], version: int
    ) -> tuple[np.ndarray, tuple[Refusal, ...]]:
        """The sum of these replies' numbers, and whose are not in it. Raises ConsilienceError where too few are
        left."""
        size = sum(leaf.numel() for leaf in tr.tensors(self.template)) + any(r.clip != "" for r in recipes.values())
        sums, lost = self.parties.sum(Wanted(recipes, replies, asked, size, self.share, version))
        return decode(sums), tuple(Refusal(client, "update", why) for client, why in sorted(lost.items()))

    def _weights(self, reply: Reply, clients: Sequence[int]) -> dict[str, dict[int, float]]:
        """The weight of each client in each field, among these clients."""
        asked = [reply._replace(job=reply.job._replace(client=c), samples=self.samples(c)) for c in sorted(clients)]
        found = self.method.sums(asked)
        assert found is not None
        return {name: dict(zip(sorted(clients), weights, strict=True)) for name, weights in found.items()}

    def _update(self, sums: np.ndarray, scales: Mapping[str, float]) -> Any:
        """An update with the sums, scaled by field."""
        sizes = [sum(leaf.numel() for leaf in tr.tensors(part)) for part in self.template.values()]
        each = np.repeat([scales[field] for field in self.template], sizes)
        made = self.method.sends(self.method.program()[0])
        assert isinstance(made, type)
        return made(**tr.filled(self.template, torch.from_numpy(sums * each)))


def traffic(asked: int, sent: int) -> tuple[int, int]:
    """Bytes that a client sends and gets beside its vector: keys of all, boxes of shares, who is there, shares."""
    up = 2 * KEY + asked * SEALED + asked * SHARE
    down = asked * 2 * KEY + asked * SEALED + 4 * sent
    return up, down
