"""Judging a run while it goes on: lines of history and of clients, without side effects on the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from consilience.core.executor import Executor
from consilience.core.federation import Federation, Task
from consilience.core.messages import Job, Score
from consilience.core.method import Method
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import uniform_weights, weighted_sum
from consilience.core.snapshot import Totals
from consilience.core.streams import philox
from consilience.core.tree import Elsewhere, Tree
from consilience.core.worker import Call, Kept, row_ranges


class Measures(Protocol):
    """What numbers are made of scores. Given to the loop, since it knows no concrete measure."""

    def of_global(
        self, task: Task, scores: Tensor, y: Tensor, loss: float, full: bool, sensitive: Tensor | None = None
    ) -> dict[str, Any]:
        """Measures of the global model; ``full`` asks for the costly ones as well, ``sensitive`` for groups."""
        ...

    def across(self, values: Sequence[float], *, higher_is_better: bool) -> dict[str, float]:
        """A summary over clients."""
        ...

    def between_groups(self, task: Task, counts: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
        """By sensitive attribute, what clients' counts ``(group, label, prediction)`` say; a client an item."""
        ...

    def agreement(self, found: Sequence[int], true: Sequence[int]) -> float:
        """How well clusters found agree with the true groups, 1 if they are the same but for their numbers."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """When what is evaluated.

    every, clients_every: in rounds (the last round always; 0 for clients: only the last). clients: how many
    clients are judged, None for all. chunk: rows in one chunk of the global test set. final: by key of the last line,
    what else is measured of the last global model.
    """

    every: int = 1
    clients_every: int = 10
    clients: int | None = None
    chunk: int = 500
    final: Mapping[str, Callable[[Predictor], Any]] = field(default_factory=dict)


@dataclass
class Line:
    """A line of history under way: what is known already, and tickets of what is not."""

    record: dict[str, Any]
    chunks: Sequence[int]
    triggered: Sequence[int]
    merged: Sequence[int]
    judged: Sequence[tuple[Job, int | None]]
    pairs: Mapping[int, tuple[Score, Score]]
    full: bool
    last: bool
    spent: Mapping[int, Totals]
    final: Predictor | None
    """The global model, where this is the last line."""


class Judge:
    """Begins and finishes the evaluation of rounds on an executor."""

    def __init__(
        self,
        evaluation: Evaluation,
        measures: Measures,
        federation: Federation,
        executor: Executor,
        rounds: int,
        seed: int,
    ) -> None:
        self.evaluation, self.measures, self.rounds = evaluation, measures, rounds
        self.federation, self.executor, self.place, self.seed = federation, executor, executor.worker.place, seed
        self._set: list[int] | None = None

    def wants(self, version: int) -> bool:
        """Whether the round that made ``version`` gets a line."""
        return version == self.rounds or version % self.evaluation.every == 0

    def wants_clients(self, version: int) -> bool:
        """Whether clients are judged in that round."""
        every = self.evaluation.clients_every
        return version == self.rounds or (every > 0 and version % every == 0)

    def begin(
        self,
        record: dict[str, Any],
        server: Tree,
        message: Callable[[int], Tree],
        job: Callable[[int], Job],
        pairs: Mapping[int, tuple[Score, Score]],
        spent: Mapping[int, Totals],
    ) -> Line:
        """Queue everything that a round's line needs. message, job: of a client id, as if it were asked now.
        pairs: what the round's participants measured before and after their training, by client id. spent: what each
        client has spent until now."""
        version = record["round"]
        full = self.wants_clients(version)
        predictor = self.executor.worker.method.global_model(server)
        chunks: list[int] = []
        triggered: list[int] = []
        if predictor is not None and self.federation.task.kind != "operator":
            ranges = row_ranges(self.federation, self.evaluation.chunk)
            chunks = [self.executor.begin(Call("chunk", rows, predictor, rows[1] - rows[0])) for rows in ranges]
            stamped = row_ranges(self.federation, self.evaluation.chunk, triggered=True)
            calls = [Call("chunk", (*rows, True), predictor, rows[1] - rows[0]) for rows in stamped]
            triggered = [self.executor.begin(call) for call in calls]
        merged, consensus = self._merged()
        new = newcomer(predictor, merged)
        nodes: list[int] = []
        if merged is not None:
            ranges = row_ranges(self.federation, self.evaluation.chunk)
            nodes = [self.executor.begin(Call("chunk", rows, Net(merged), rows[1] - rows[0])) for rows in ranges]
            record = {**record, "merged": {"consensus": consensus}}
        last = version == self.rounds
        judged: list[tuple[Job, int | None]] = []
        for client in self.clients() if full else []:
            asked = job(client)
            judged.append((asked, self._judged(asked, message, last, new)))
        paid = {asked.client: spent.get(asked.client, Totals()) for asked, _ in judged}
        end = predictor if last else None
        return Line(record, chunks, triggered, nodes, judged, pairs if full else {}, full, last, paid, end)

    def _judged(self, job: Job, message: Callable[[int], Tree], last: bool, new: Predictor | None) -> int | None:
        """Queue the judgement of a client; None where there is nothing to judge, or no test rows to judge it by."""
        client, unseen = job.client, job.client in self.federation.unseen
        if not len(self.federation.data(client).test):
            return None
        if unseen and self.place.topology is not None:  # no node, and nobody else who would send it a model
            return None if new is None else self.executor.begin(Call("newcomer", (job,), new))
        return self.executor.judge(job, message(client), train=last and not unseen)

    def finish(self, line: Line) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The line of history, and a line per judged client."""
        record = dict(line.record)
        if line.chunks:
            record["global"] = self._of_test(line.chunks, line.full)
        if line.merged:
            of = self._of_test(line.merged, False)
            kept = {key: of[key] for key in ("accuracy", "loss", "rmse") if key in of}
            record["merged"] = {**kept, **record["merged"]}
        wrong = self.federation.triggered
        if line.triggered and wrong is not None:
            scores = torch.cat([part.scores for part in self.executor.finish(line.triggered)])
            record["attack"] = {"success": float((scores.argmax(1) == wrong.y).double().mean())}
        if line.final is not None:
            record.update({key: measure(line.final) for key, measure in self.evaluation.final.items()})
        done = iter(self.executor.finish([ticket for _, ticket in line.judged if ticket is not None]))
        nothing = Score(0, 0.0, None), None, None
        found = [nothing if ticket is None else next(done) or nothing for _, ticket in line.judged]
        rows = [
            self._row(record["round"], job.client, *pair) for (job, _), pair in zip(line.judged, found, strict=True)
        ]
        for row in rows:
            row.update(line.spent[row["client"]]._asdict())
            if not line.last and row["client"] in line.pairs:
                row["before"], row["after"] = map(_value, line.pairs[row["client"]])
        self._summaries(record, rows, line)
        judged = [(job.client, score.groups) for (job, _), (score, *_) in zip(line.judged, found, strict=True)]
        counts = [groups for client, groups in judged if groups is not None and self._counts(client)]
        if counts:
            record["clients"]["groups"] = self.measures.between_groups(self.federation.task, counts)
        return record, rows

    def _of_test(self, chunks: Sequence[int], full: bool) -> dict[str, Any]:
        """Measures of a predictor on the global test set, from the tickets of its chunks."""
        test = self.federation.test
        assert test is not None
        parts = self.executor.finish(chunks)
        scores = torch.cat([part.scores for part in parts])
        loss = sum(part.loss for part in parts) / len(test)
        return self.measures.of_global(self.federation.task, scores, test.y, loss, full, test.sensitive)

    def _merged(self) -> tuple[Weights | None, float]:
        """As :func:`mean_model`; nothing where nobody exchanges with neighbours."""
        if self.place.topology is None or self.federation.task.kind == "operator":
            return None, 0.0
        return mean_model(self.place.method, self.executor.states())

    def _counts(self, client: int) -> bool:
        """Whether a client is among those that measures over clients are of: it may train, and is not hostile."""
        return client not in self.federation.unseen and client not in self.federation.hostile

    def clients(self) -> list[int]:
        """Ids of the clients that are judged: all, or a fixed sample of the run."""
        if self._set is None:
            n, most = self.federation.n_clients, self.evaluation.clients
            if most is None or most >= n:
                self._set = list(range(n))
            else:
                rng = philox(self.seed, "eval-clients")
                self._set = sorted(int(c) for c in rng.choice(n, most, replace=False))
        return self._set

    def _row(self, version: int, client: int, score: Score, after: Score | None, valid: Score | None) -> dict[str, Any]:
        row: dict[str, Any] = {"round": version, "client": client, "seen": client not in self.federation.unseen}
        if client in self.federation.hostile:
            row["hostile"] = True
        row.update(n=score.n, loss=score.loss, train=self.federation.size(client))
        if self.place.models is not None:
            row["model"] = self.place.model_of(client)
        if score.accuracy is not None:
            row["accuracy"] = score.accuracy
        if score.cluster is not None:
            row["cluster"] = score.cluster
        if score.groups is not None:
            names = self.federation.task.sensitive
            row["groups"] = {name: counts.tolist() for name, counts in zip(names, score.groups, strict=True)}
        if valid is not None and valid.n:
            row["valid"] = _value(valid)
        if after is not None:
            row["before"], row["after"] = _value(score), _value(after)
        return row

    def _summaries(self, record: dict[str, Any], rows: Sequence[Mapping[str, Any]], line: Line) -> None:
        rows = [row for row in rows if row["n"] and "hostile" not in row]
        seen = [row.get("accuracy", row["loss"]) for row in rows if row["seen"]]
        unseen = [row.get("accuracy", row["loss"]) for row in rows if not row["seen"]]
        valid = [row["valid"] for row in rows if row["seen"] and "valid" in row]
        if seen:
            record["clients"] = self._across(seen)
        if seen and valid:
            record["clients"]["valid"] = self._across(valid)
        if seen:
            record["clients"].update(self._by_model(rows))
        if unseen:
            record["unseen"] = self._across(unseen)
        if any("cluster" in row for row in rows):
            record["clusters"] = self._clusters([row for row in rows if "cluster" in row])
        if line.last:
            pairs = [(row["before"], row["after"]) for row in rows if "after" in row]
        else:
            pairs = [
                (_value(before), _value(after))
                for client, (before, after) in line.pairs.items()
                if before.n and client not in self.federation.hostile
            ]
        if pairs:
            clients = record.setdefault("clients", {})
            clients["before"] = self._across([before for before, _ in pairs])
            clients["after"] = self._across([after for _, after in pairs])

    def _by_model(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The same summary for the clients of each architecture, where there are several."""
        groups: dict[str, list[float]] = {}
        for row in rows:
            if row["seen"] and "model" in row:
                groups.setdefault(row["model"], []).append(row.get("accuracy", row["loss"]))
        if len(groups) < 2:
            return {}
        return {"models": {name: self._across(groups[name]) for name in sorted(groups)}}

    def _clusters(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How many clusters clients are in, the summary of each, and how well they agree with the true groups, of
        clients that train and of those that never do."""
        found: dict[str, Any] = {"count": len({row["cluster"] for row in rows})}
        for name, seen in (("rand", True), ("rand_unseen", False)):
            some = [row for row in rows if row["seen"] is seen]
            if some and self.federation.groups is not None:
                true = [self.federation.groups[row["client"]] for row in some]
                found[name] = self.measures.agreement([row["cluster"] for row in some], true)
        values: dict[int, list[float]] = {}
        for row in rows:
            values.setdefault(row["cluster"], []).append(row.get("accuracy", row["loss"]))
        found["of"] = {str(k): {"clients": len(values[k]), **self._across(values[k])} for k in sorted(values)}
        return found

    def _across(self, values: Sequence[float]) -> dict[str, Any]:
        return dict(self.measures.across(values, higher_is_better=self.federation.task.kind == "classification"))


def mean_model(method: Method, states: Mapping[int, Tree]) -> tuple[Weights | None, float]:
    """The mean of the models of nodes without a server, and the sum of their squared distances from it. states: of the
    nodes, by id. None where the method's nodes have no models to average, or where these are not here."""
    if type(method).node_model is Method.node_model:  # then states need not be read
        return None, 0.0
    own = [state for _, state in sorted(states.items())]
    if any(isinstance(state, Elsewhere) for state in own):  # in a deployment nodes' models stay with them
        return None, 0.0
    models = [method.node_model(state.state if isinstance(state, Kept) else state) for state in own]
    known = [model for model in models if model is not None]
    if not known:
        return None, 0.0
    mean: Weights = weighted_sum(known, uniform_weights(len(known)))
    return mean, sum(_apart(model.params, mean.params) for model in known)


def newcomer(made: Predictor | None, mean: Weights | None) -> Predictor | None:
    """What a client that is no node would deploy where nodes exchange among themselves: the global model that was
    ``made`` of theirs, or else the ``mean`` of theirs. None where there is neither."""
    return Net(mean) if made is None and mean is not None else made


def _value(score: Score) -> float:
    """Accuracy, or the loss where there is none."""
    return score.loss if score.accuracy is None else score.accuracy


def _apart(a: Params, b: Params) -> float:
    """The squared distance, summed in float64."""
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
