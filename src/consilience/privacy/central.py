"""Central differential privacy for any method that wants sums: clip, add up with equal weights, add noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.errors import ConsilienceError
from consilience.core.messages import Released, Reply
from consilience.core.outbox import size_of
from consilience.core.reduce import weighted_sum
from consilience.core.streams import philox
from consilience.core.tree import record
from consilience.privacy.clip import Clip, clipped
from consilience.privacy.ledger import Ledger
from consilience.privacy.mechanism import Mechanism, Tree
from consilience.privacy.numbers import Recipe, rounding
from consilience.privacy.secret import Secret, traffic

RATE = 0.2
"""Step size of the adaptive bound, in logarithms (the paper's)."""
Fields = dict[str, dict[str, Tensor]]


@record
class State(NamedTuple):
    """norm: the bound in force. nodes: of a tree, height and noise key of those that the last prefix sum is made of."""

    norm: float
    nodes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Central:
    """A core ``Release``. Each round, with w_f what a client weighs in field f of the updates, S the cohort:

        u_i <- clip(update of client i), all its fields as one vector of norm at most C
        what the method gets:  w_f (sum_{i in S} u_i + N(0, z^2 C^2))      (mechanism "tree": a tree's noise)

    The weights are 1 / m with the planned cohort m, not with how many came, and a client that did not come counts as 0.
    Sums are made in float64, where rounding is covered by a margin in C; then noise is added, then numbers take the
    model's own type. With adaptive clipping, the count of clients at most C long is released too, with its own noise
    sigma_b = m / 20, and the updates get the noise multiplier (z^-2 - (2 sigma_b)^-2)^(-1/2), so that both together
    cost what z does; sigma_b is at least z.

    Noise comes from streams of their own, keyed by a secret and by what it covers: the same sums get the same noise, so
    that a resumed run has the same bits, and other sums get other noise, so that no difference of two releases is free
    of it. secret: in simulation it is made of the run's seed, and whoever knows that can take the noise away: it
    measures what privacy costs and protects nobody. In a deployment it is the server's own.

    masked: sums are secret too. The clipped updates go through the protocol of ``Secret`` as fixed-point numbers, whose
    sum is exact, and the server adds the noise once, to that sum: it sees the sums of cohorts before noise, and no
    single update. Rounding to multiples of 2^-24 makes a vector of d numbers longer by 2^-25 d^(1/2) at most, so it is
    clipped to that much less. The count of short updates is one number more of the sum.

    Source: McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018
    (fixed denominator). Deviation: the noise is that of floating-point numbers, not of a discrete law.
    """

    made: type
    mechanism: Mechanism
    clip: Clip
    noise: float
    delta: float
    weights: Mapping[str, float]
    template: Fields
    ledger: Ledger
    secret: str
    budget: float | None = None
    masked: Secret | None = None

    def init(self) -> State:
        """The clip's first bound."""
        return State(self.clip.norm)

    def draw(self, version: int, clients: np.ndarray) -> Sequence[int]:
        """By the mechanism."""
        return self.mechanism.draw(version, clients)

    def size(self, update: Any) -> int:
        """Updates are sent as they are, or masked."""
        return size_of(update) if self.masked is None else self.masked.size(update)

    def report(self, version: int, state: State) -> Mapping[str, Any]:
        """What has been spent after ``version`` rounds, and with what."""
        return {
            "epsilon": self.epsilon(*self.ledger.spent(version - 1)), "delta": self.delta, "noise": self.noise,
            "clip": state.norm, **({} if self.masked is None else self.masked.report(version, None)),
        }  # fmt: skip

    def epsilon(self, rounds: int, again: int) -> float:
        """The cost of so many releases."""
        return self.mechanism.epsilon(self.noise, rounds, self.delta, again)

    def __call__(self, replies: Sequence[Reply], asked: Sequence[int], version: int, state: State) -> Released:
        """One private release."""
        sums, short, left = self._sums(replies, state.norm, asked, version)
        key = self._key(version, sums, short, state)
        self._spend(version, key, state.norm)
        nodes = state.nodes
        if isinstance(self.mechanism, Tree):
            at = version % self.mechanism.epoch + 1
            height = (at & -at).bit_length() - 1
            kept = () if at == 1 else tuple(node for node in nodes if node[0] > height)
            gone = () if at == 1 else nodes[len(kept) :]
            nodes = (*kept, (height, key))
            signs = [(1.0, key), *((-1.0, old) for _, old in gone)]
        else:
            signs = [(1.0, key)]
        update = {field: self._noised(field, part, state.norm, signs) for field, part in sums.items()}
        more = {} if self.masked is None else dict.fromkeys(sorted(asked), traffic(len(asked), len(left)))
        return Released(self.made(**update), State(self._next(state.norm, short, key), nodes), more, left)

    def _sums(
        self, replies: Sequence[Reply], norm: float, asked: Sequence[int], version: int
    ) -> tuple[Fields, float, Collection[int]]:
        """The weighted sum of each field; how many updates were at most ``norm`` long, less half of all; whose are in
        it."""
        if self.masked is not None:
            return self._masked(self.masked, replies, norm, asked, version)
        parts: list[Fields] = []
        short = 0.0
        for reply in replies:
            vector, within = clipped(self._vector(reply), self.clip, norm)
            short += 0.5 if within else -0.5
            parts.append(self._fields(vector))
        if not parts:
            return {name: tr.zeros_like(part) for name, part in self.template.items()}, 0.0, ()
        return (
            {
                name: weighted_sum([fields[name] for fields in parts], [self.weights[name]] * len(parts))
                for name in self.template
            },
            short,
            [reply.job.client for reply in replies],
        )

    def _masked(
        self, masked: Secret, replies: Sequence[Reply], norm: float, asked: Sequence[int], version: int
    ) -> tuple[Fields, float, Collection[int]]:
        """The same by secret sums: of the unweighted updates, since all weights are alike."""
        like = [leaf for part in self.template.values() for leaf in part.values()]
        bound = norm - rounding(sum(leaf.numel() for leaf in like))
        if bound <= 0:
            raise ConsilienceError(f"--dp-clip: a norm of {norm:g} is lost in the rounding of secret sums")
        recipe = Recipe(dict.fromkeys(self.template, 1.0), str(self.clip), bound)
        sums, left = masked.of({reply.job.client: recipe for reply in replies}, replies, asked, version)
        ends = np.cumsum([leaf.numel() for leaf in like])
        rows = [torch.from_numpy(row).reshape(leaf.shape)
                for row, leaf in zip(np.split(sums[:-1], ends[:-1]), like, strict=True)]  # fmt: skip
        fields = self._fields(rows)
        return {name: tr.scale(part, self.weights[name]) for name, part in fields.items()}, float(sums[-1]), left

    def _vector(self, reply: Reply) -> list[Tensor]:
        """An update's tensors, field by field."""
        return [leaf for name in self.template for leaf in getattr(reply.update, name).values()]

    def _fields(self, vector: Sequence[Tensor]) -> Fields:
        """The way back."""
        left = iter(vector)
        return {name: {key: next(left) for key in part} for name, part in self.template.items()}

    def _key(self, version: int, sums: Fields, short: float, state: State) -> str:
        """What names a release and keys its noise: of a secret, the round, and everything that the noise covers or is
        scaled by; so that two releases have the same noise only where they are the same."""
        said = f"{version}|{short}|{self.multiplier!r}|{state!r}|{tr.digest(sums)}"
        return hashlib.blake2b(said.encode(), key=self.secret.encode()[:64], digest_size=16).hexdigest()

    def _spend(self, version: int, key: str, norm: float) -> None:
        rounds, again = self.ledger.spent(version, key)
        if self.budget is not None and (again or rounds > self.mechanism.rounds):
            cost = self.epsilon(rounds, again)
            if cost > self.budget:
                raise ConsilienceError(
                    f"round {version + 1} would spend epsilon {cost:.4g} of {self.budget:g}: the budget is used up"
                )
        self.ledger.spend(version, key, mechanism=self.mechanism.name, noise=self.noise, clip=norm, delta=self.delta)

    @property
    def multiplier(self) -> float:
        """The noise multiplier of the updates."""
        if self.clip.kind != "adaptive" or self.noise == 0:
            return self.noise
        return 1 / math.sqrt(self.noise**-2 - (2 * self.count_noise) ** -2)

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the count of short updates, which a client moves by 1/2."""
        return max(self.mechanism.cohort / 20, self.noise)

    def _noised(self, field: str, part: dict[str, Tensor], norm: float, signs: Sequence[tuple[float, str]]) -> Any:
        scale = self.weights[field] * self.multiplier * norm if self.noise else 0.0
        noised = {}
        for name, total in part.items():
            if scale:
                total = total.double()
                for sign, key in signs:
                    drawn = philox("privacy-noise", self.secret, key, field, name).standard_normal(tuple(total.shape))
                    total = total + sign * scale * torch.as_tensor(drawn, dtype=torch.float64)
            noised[name] = total.to(self.template[field][name].dtype)
        return noised

    def _next(self, norm: float, short: float, key: str) -> float:
        """The next bound."""
        if self.clip.kind != "adaptive":
            return norm
        cohort = self.mechanism.cohort
        drawn = philox("privacy-count", self.secret, key).standard_normal() if self.noise else 0.0
        share = (short + self.count_noise * drawn) / cohort + 0.5
        return norm * math.exp(-RATE * (share - self.clip.quantile))
