"""Rules by which the server weighs replies: from how many labels differ, how far updates are off, who comes how often,
and what each contributes.

A rule is a small object. The server keeps a memory for it; a rule that asks clients something has a phase of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.messages import Reply, Stat
from consilience.core.method import Phase
from consilience.core.model import Params, Weights
from consilience.core.reduce import sample_weights, uniform_weights, weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.tree import Tree, record


class Given(NamedTuple):
    """What a rule weighs: replies, sorted by client, and the difference of parameters that each holds."""

    replies: Sequence[Reply]
    deltas: Sequence[Params]

    @property
    def clients(self) -> list[int]:
        """Their clients' ids."""
        return [reply.job.client for reply in self.replies]


class Rule:
    """How replies are weighed. The base asks clients nothing."""

    before: ClassVar[bool] = False
    """Whether that is before the method's phases."""
    remembers: ClassVar[bool] = False
    """Whether clients keep the model that they sent last."""
    steps: ClassVar[bool] = False
    """Whether weights need not sum to 1, so that clients must send differences."""

    answers: ClassVar[type | None] = None
    """What a client sends in the rule's phase."""

    @property
    def phase(self) -> Phase | None:
        """A phase in which clients are asked."""
        return None

    def init(self, host: Host) -> Tree:
        """The server's first memory."""
        return None

    def ask(self, memory: Tree, client: int) -> Tree:
        """What a client is told beside the model, in the rule's phase."""
        return None

    def answer(self, site: Site, model: Weights, told: Tree, last: Weights | None) -> Tree:
        """What a client sends in the rule's phase. last: the model that it sent last, if it keeps it."""
        raise NotImplementedError

    def expects(self, place: Place) -> dict[str, Expected]:
        """What the fields of answers must look like."""
        return {}

    def learn(self, memory: Tree, replies: Sequence[Reply]) -> Tree:
        """The memory after answers."""
        return memory

    def weigh(self, host: Host, memory: Tree, given: Given) -> tuple[list[float], Tree]:
        """A weight for each reply, and the memory after it."""
        raise NotImplementedError


# --- label discrepancy -----------------------------------------------------------------------------------------


@record
class Counts(NamedTuple):
    """How many training rows of each class a client has."""

    counts: Stat


@dataclass(frozen=True)
class Disco(Rule):
    """FedDisco's weights: [ p_i - a d_i + b ]_+, normalised; p_i = n_i / sum n, and d_i how far the labels of client i
    are from ``target``, over the cohort's sum."""

    before = True
    answers = Counts

    a: float = 0.5
    b: float = 0.1
    distance: Literal["kl", "l1", "l2", "cosine"] = "kl"
    target: Literal["uniform", "global"] = "uniform"

    @property
    def phase(self) -> Phase | None:
        """Before the first round; none if labels do not count."""
        return Phase("label-counts", when="start") if self.a else None

    def init(self, host: Host) -> dict[int, Tensor]:
        """No counts."""
        return {}

    def answer(self, site: Site, model: Weights, told: Tree, last: Weights | None) -> Counts:
        """The client's label counts."""
        return Counts(torch.bincount(site.train.y, minlength=site.task.outputs))

    def expects(self, place: Place) -> dict[str, Expected]:
        """A count of each class."""
        return {"counts": Shape(torch.int64, (place.task.outputs,), low=0)}

    def learn(self, memory: dict[int, Tensor], replies: Sequence[Reply]) -> dict[int, Tensor]:
        """Counts by client."""
        return dict(sorted({**memory, **{r.job.client: r.update.counts for r in replies}}.items()))

    def weigh(self, host: Host, memory: dict[int, Tensor], given: Given) -> tuple[list[float], Tree]:
        """The brackets, normalised; p_i where all are 0. A client that never told counts as the others' mean."""
        shares = sample_weights([reply.samples for reply in given.replies])
        if not self.a and not self.b:
            return shares, memory
        known = [self._distance(memory[c], memory) if c in memory else math.nan for c in given.clients]
        told = [d for d in known if d == d]
        usual = math.fsum(told) / len(told) if told else 0.0
        found = [d if d == d else usual for d in known]
        if self.distance == "kl":
            total = math.fsum(found)
            found = [d / total if total else 0.0 for d in found]
        brackets = [max(p - self.a * d + self.b, 0.0) for p, d in zip(shares, found, strict=True)]
        total = math.fsum(brackets)
        return ([w / total for w in brackets] if total else shares), memory

    def _distance(self, counts: Tensor, memory: dict[int, Tensor]) -> float:
        own = counts.double() / max(int(counts.sum()), 1)
        target = torch.full_like(own, 1 / len(own))
        if self.target == "global":
            everybody = torch.stack(list(memory.values())).double().sum(0)
            target = everybody / everybody.sum()
        if self.distance == "kl":
            return float(torch.special.xlogy(own, own / target.clamp(min=torch.finfo(own.dtype).tiny)).sum())
        if self.distance == "cosine":
            return 1 - float(own @ target / (own.norm() * target.norm()).clamp(min=1e-12))
        return float(torch.linalg.vector_norm(own - target, 1 if self.distance == "l1" else 2))


# --- distance from the mean ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IDA(Rule):
    """Weights 1 / (||mean_j y_j - y_i||_1 + eps), normalised; times n_i with ``by_size``. Parameters only. eps is 1e-8
    of the distances' mean."""

    by_size: bool = False

    def weigh(self, host: Host, memory: Tree, given: Given) -> tuple[list[float], Tree]:
        """Inverse distances, normalised."""
        mean = weighted_sum(given.deltas, uniform_weights(len(given.deltas)))
        far = [
            math.fsum(
                float((a.double() - b.double()).abs().sum())
                for a, b in zip(tr.tensors(d), tr.tensors(mean), strict=True)
            )
            for d in given.deltas
        ]
        sizes = [float(r.samples) if self.by_size else 1.0 for r in given.replies]
        usual = math.fsum(far) / len(far)
        inverse = [size / (d / usual + 1e-8) if usual else size for d, size in zip(far, sizes, strict=True)]
        total = math.fsum(inverse)
        return [w / total for w in inverse], memory


# --- participation ---------------------------------------------------------------------------------------------


@record
class Seen(NamedTuple):
    """A client's participation: mean of its intervals, how many there were, and the update that ended the last."""

    mean: float
    times: int
    last: int


@record
class Presence(NamedTuple):
    """Server updates made, and what is known of each client that has taken part."""

    updates: int
    seen: dict[int, Seen]


@dataclass(frozen=True)
class Participation(Rule):
    """FedAU's weights: the mean of a client's intervals between participations over the number of all clients (times
    n_i / n instead with ``by_size``). An interval is cut at ``cutoff`` rounds and begun anew; the weight of a round is
    the one before its interval is recorded, and 1 before there is any."""

    steps = True

    cutoff: int | None = 50
    by_size: bool = False

    def init(self, host: Host) -> Presence:
        """Nobody has been seen."""
        return Presence(0, {})

    def weigh(self, host: Host, memory: Presence, given: Given) -> tuple[list[float], Presence]:
        """Weights, then the intervals that end with this update."""
        seen, now, shares = dict(memory.seen), memory.updates + 1, []
        for reply in given.replies:
            client = reply.job.client
            before = self._cut(seen.get(client, Seen(1.0, 0, 0)), now)
            shares.append(before.mean * (reply.samples / host.rows if self.by_size else 1.0 / host.clients))
            seen[client] = recorded(before, now - before.last, now)
        return shares, Presence(now, dict(sorted(seen.items())))

    def _cut(self, seen: Seen, now: int) -> Seen:
        """Intervals that reached the cutoff before this round, which nobody has recorded yet."""
        while self.cutoff is not None and now - seen.last > self.cutoff:
            seen = recorded(seen, self.cutoff, seen.last + self.cutoff)
        return seen


def recorded(seen: Seen, interval: int, now: int) -> Seen:
    """What is known after one more interval."""
    mean = (seen.times * seen.mean + interval) / (seen.times + 1)
    return Seen(mean, seen.times + 1, now)


# --- contribution ----------------------------------------------------------------------------------------------


@record
class Part(NamedTuple):
    """A client's contribution: its weight, the mean cosine of its updates with the others', how many these were, and
    the error of the model without it (None before it has told)."""

    weight: float
    cosine: float
    times: int
    error: float | None


@record
class Parts(NamedTuple):
    """The weight that everybody begins with, and what is known of each client."""

    usual: float
    known: dict[int, Part]


@record
class Failure(NamedTuple):
    """How wrong the model without a client is on the client's validation rows, ``()``."""

    error: Stat


@dataclass(frozen=True)
class Contribution(Rule):
    """FedCE's weights: more for clients whose update points elsewhere than the others', and on whose data the model
    without them does badly."""

    remembers = True
    answers = Failure

    combine: Literal["plus", "times"] = "plus"

    @property
    def phase(self) -> Phase:
        """At the end of each round."""
        return Phase("contribution")

    def init(self, host: Host) -> Parts:
        """Equal weights."""
        return Parts(1.0 / host.clients, {})

    def ask(self, memory: Parts, client: int) -> float:
        """The client's weight."""
        return memory.known[client].weight if client in memory.known else memory.usual

    def answer(self, site: Site, model: Weights, told: float, last: Weights | None) -> Failure:
        """The error of (x - w y) / (1 - w), y being the model that the client sent last."""
        if last is None or told >= 1:
            return Failure(torch.tensor(1.0, dtype=torch.float64))
        others = tr.scale(tr.axpy(-told, last.params, model.params), 1 / (1 - told))
        score = site.evaluate(Weights(others, model.buffers), site.valid if len(site.valid) else site.train)
        error = score.loss if score.accuracy is None else 1 - score.accuracy
        return Failure(torch.tensor(error, dtype=torch.float64))

    def expects(self, place: Place) -> dict[str, Expected]:
        """A number."""
        return {"error": Shape(torch.float64, (), low=0)}

    def learn(self, memory: Parts, replies: Sequence[Reply]) -> Parts:
        """Errors by client."""
        known = dict(memory.known)
        for reply in replies:
            part = known.get(reply.job.client, Part(memory.usual, 0.0, 0, None))
            known[reply.job.client] = part._replace(error=float(reply.update.error))
        return memory._replace(known=dict(sorted(known.items())))

    def weigh(self, host: Host, memory: Parts, given: Given) -> tuple[list[float], Parts]:
        """Weights from cosines and errors, normalised over the cohort."""
        parts = [memory.known.get(c, Part(memory.usual, 0.0, 0, None)) for c in given.clients]
        mean = weighted_sum(given.deltas, [part.weight for part in parts])
        for i, (part, delta) in enumerate(zip(parts, given.deltas, strict=True)):
            others = tr.axpy(-part.weight, delta, mean)
            size = tr.norm(delta) * tr.norm(others)
            cosine = (part.times * part.cosine + (tr.dot(delta, others) / size if size else 0.0)) / (part.times + 1)
            parts[i] = part._replace(cosine=cosine, times=part.times + 1)
        apart = _normalised([max(0.0, 1 - part.cosine) for part in parts])
        errors = [part.error for part in parts]
        told = [e for e in errors if e is not None]
        usual = math.fsum(told) / len(told) if told else 1.0
        missed = _normalised([usual if e is None else e for e in errors])
        pairs = list(zip(apart, missed, strict=True))
        shares = _normalised([a + m if self.combine == "plus" else a * m for a, m in pairs])
        new = {c: part._replace(weight=w) for c, part, w in zip(given.clients, parts, shares, strict=True)}
        return shares, memory._replace(known=dict(sorted({**memory.known, **new}.items())))


def _normalised(values: Sequence[float]) -> list[float]:
    """Values of at least 1e-6 that sum to 1."""
    total = math.fsum(values)
    floored = [max(v / total, 1e-6) if total else 1.0 for v in values]
    whole = math.fsum(floored)
    return [v / whole for v in floored]


RULES: dict[str, Rule] = {"disco": Disco(), "ida": IDA(), "fedau": Participation(), "fedce": Contribution()}
"""The rules that ``--weights`` names, with the papers' settings."""
