"""Whole runs of the methods that share class statistics, against loops written out from their equations.

Float64, whole-batch steps, partial participation, classes that clients miss, two architectures. Only the cohort and
the first weights are taken from the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import consilience
from consilience.core.events import draw_cohort
from consilience.core.messages import Job
from consilience.core.streams import philox
from consilience.methods import FedDistill, FedGH, FedProto, FedSA, FedTGP, KnFu, LGFedAvg
from consilience.methods.fedtgp import Trainable

SEED, CLIENTS, CLASSES, COHORT, ROUNDS, LR, EPOCHS = 5, 6, 10, 3, 5, 0.3, 2
USUAL: dict[str, Any] = {"lr": LR, "batch_size": 10_000, "local_epochs": EPOCHS}
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
Means = dict[int, Tensor]


class Reference:
    """The clients' data and models in float64."""

    def __init__(self, method: Any) -> None:
        federation = consilience.make_federation("digits", clients=CLIENTS, partition="shards:3", public=40, seed=SEED)
        self.result = consilience.run(
            method, federation, rounds=ROUNDS, participation=COHORT, seed=SEED, executor="serial", model="mlp:16",
            models="mlp:16*0.5,mlp:24x12*0.5", feature_dim=8,
        )  # fmt: skip
        self.data = [federation.data(k).train for k in range(CLIENTS)]
        self.rows = [(d.x.double(), d.y) for d in self.data]
        self.public = self.result.worker.place.public.double()
        self.nets = [self._net(k) for k in range(CLIENTS)]
        self.seen = federation.seen

    def _net(self, client: int) -> nn.Module:
        site = self.result.worker.site(Job(0, client, 1, 0, 0, 0))[0]
        net = site.architecture().build().double()
        net.load_state_dict({name: p.double() for name, p in site.initial().params.items()})
        return net

    def head(self) -> dict[str, Tensor]:
        """The first head of the server's model."""
        first = self.result.worker.host(0, "x").initial().params
        return {n.removeprefix("head."): p.double() for n, p in first.items() if n.startswith("head.")}

    def cohorts(self) -> Iterator[list[int]]:
        for version in range(ROUNDS):
            yield [int(k) for k in draw_cohort(philox(SEED, "cohort", version, 0), self.seen, COHORT)]

    def train(self, k: int, extra: Loss | None = None, watch: str = "features") -> Means:
        """Local training; means by class of what was watched, over the passes."""
        (x, y), seen = self.rows[k], {}
        for _ in range(EPOCHS):
            z = self.nets[k].features(x)
            scores = self.nets[k].head(z)
            passed = (z if watch == "features" else scores).detach()
            for c in y.unique().tolist():
                seen.setdefault(c, []).append(passed[y == c])
            value = ce(scores, y)
            descend(self.nets[k], value if extra is None else value + extra(self.nets[k], z, scores, y), LR)
        return {c: torch.cat(rows).mean(0) for c, rows in seen.items()}

    def after(self, k: int) -> Means:
        """Class means of the features as they are now."""
        x, y = self.rows[k]
        with torch.no_grad():
            z = self.nets[k].features(x)
        return {c: z[y == c].mean(0) for c in y.unique().tolist()}

    def same_models(self) -> None:
        for k, state in self.result.states.items():
            found = getattr(state, "model", state).params
            for name, p in self.nets[k].named_parameters():
                close(found[name], p.detach())


def ce(scores: Tensor, y: Tensor) -> Tensor:
    return (scores.logsumexp(1) - scores[range(len(y)), y]).mean()


def descend(net: nn.Module, value: Tensor, lr: float) -> None:
    ps = list(net.parameters())
    grads = torch.autograd.grad(value, ps, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(ps, grads, strict=True):
            if g is not None:
                p -= lr * g


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=2e-5)


def pulled(weight: float, means: Means) -> Loss:
    def term(net: nn.Module, z: Tensor, scores: Tensor, y: Tensor) -> Tensor:
        known = [(z[y == c] - mean).square().sum() for c, mean in means.items()]
        return weight * sum(known) / z.numel() if known else z.sum() * 0

    return term


def mean_over(sent: dict[int, Means], weight: Callable[[int, int], float] = lambda k, c: 1.0) -> Means:
    found = {}
    for c in sorted({c for means in sent.values() for c in means}):
        have = [(weight(k, c), means[c]) for k, means in sent.items() if c in means]
        found[c] = sum(w * m for w, m in have) / sum(w for w, _ in have)
    return found


def nearest_other(means: list[Tensor]) -> list[float]:
    return [min(float((a - b).norm()) for j, b in enumerate(means) if j != i) for i, a in enumerate(means)]


def with_margin(z: Tensor, y: Tensor, targets: Tensor, margin: float) -> Tensor:
    d = (z[:, None] - targets[None]).square().sum(2).sqrt()
    own = torch.arange(len(targets))[None] == y[:, None]
    return ce(-(d + margin * own), y)


def same_means(found: Any, wanted: Means) -> None:
    assert found.classes.tolist() == sorted(wanted)
    close(found.means, torch.stack([wanted[c] for c in sorted(wanted)]))


@pytest.mark.parametrize("by", ["uniform", "rows"])
def test_fedproto(by: str) -> None:
    ref = Reference(FedProto(lam=2.0, prototypes=by, **USUAL))
    means: Means = {}
    for cohort in ref.cohorts():
        towards = pulled(2.0, dict(means))
        sent = {k: ref.train(k, towards) for k in cohort}
        rows = (lambda k, c: float((ref.rows[k][1] == c).sum())) if by == "rows" else (lambda k, c: 1.0)
        means |= mean_over(sent, rows)
    same_means(ref.result.server, means)
    ref.same_models()


@pytest.mark.parametrize("exclude", [False, True])
def test_feddistill(exclude: bool) -> None:
    ref = Reference(FedDistill(lam=0.5, exclude_own=exclude, **USUAL))
    last: dict[int, dict[int, Tensor]] = {}  # by class, what each client gave to its mean
    for cohort in ref.cohorts():
        sent = {}
        for k in cohort:
            others = {c: [m for j, m in by.items() if not (exclude and j == k)] for c, by in last.items()}
            targets = {c: torch.stack(ms).mean(0).softmax(0) for c, ms in others.items() if ms}

            def distil(net: Any, z: Tensor, s: Tensor, y: Tensor, targets: Means = targets) -> Tensor:
                logs = s.log_softmax(1)
                terms = [-(target * logs[y == c]).sum() for c, target in targets.items()]
                return 0.5 * sum(terms) / len(y) if terms else s.sum() * 0

            sent[k] = ref.train(k, distil, "scores")
        for c in {c for means in sent.values() for c in means}:
            last[c] = {k: means[c] for k, means in sent.items() if c in means}
    same_means(ref.result.server.means, {c: torch.stack(list(by.values())).mean(0) for c, by in last.items()})
    ref.same_models()


def test_lgfedavg() -> None:
    ref = Reference(LGFedAvg(**USUAL))
    head = ref.head()
    for cohort in ref.cohorts():
        for k in cohort:
            ref.nets[k].head.load_state_dict(head)
            ref.train(k)
        n = {k: len(ref.rows[k][1]) for k in cohort}
        head = {
            name: sum(n[k] / sum(n.values()) * ref.nets[k].head.state_dict()[name] for k in cohort) for name in head
        }
    for name, p in head.items():
        close(ref.result.server.head[f"head.{name}"], p)
    ref.same_models()


def test_fedgh() -> None:
    ref = Reference(FedGH(server_lr=0.2, server_batch=1000, server_epochs=3, **USUAL))
    head = nn.Linear(8, CLASSES).double()
    head.load_state_dict(ref.head())
    for cohort in ref.cohorts():
        pairs = []
        for k in cohort:
            ref.nets[k].head.load_state_dict(head.state_dict())
            ref.train(k)
            pairs += list(ref.after(k).items())
        for _ in range(3):
            descend(head, ce(head(torch.stack([m for _, m in pairs])), torch.tensor([c for c, _ in pairs])), 0.2)
    for name, p in head.named_parameters():
        close(ref.result.server.head[f"head.{name}"], p.detach())
    ref.same_models()


@pytest.mark.parametrize("tau", [100.0, 0.5])
def test_fedtgp(tau: float) -> None:
    ref = Reference(FedTGP(lam=3.0, tau=tau, server_epochs=4, server_lr=0.1, server_batch=1000, **USUAL))
    network = Trainable((), CLASSES, 8).double()
    first = ref.result.worker.host(0, "x").initial("prototypes").params
    network.load_state_dict({n: p.double() for n, p in first.items()})
    means: Means = {}
    for cohort in ref.cohorts():
        sent, towards = {}, pulled(3.0, dict(means))
        for k in cohort:
            ref.train(k, towards)
            sent[k] = ref.after(k)
        margin = min(max(nearest_other(list(mean_over(sent).values()))), tau)
        x = torch.stack([m for by in sent.values() for m in by.values()])
        y = torch.tensor([c for by in sent.values() for c in by])
        for _ in range(4):
            descend(network, with_margin(x, y, network(torch.arange(CLASSES)), margin), 0.1)
        means = dict(enumerate(network(torch.arange(CLASSES)).detach()))
    same_means(ref.result.server.prototypes, means)
    ref.same_models()


def test_fedsa() -> None:
    method = FedSA(lam=0.7, mu=0.4, eta=0.3, anchor_momentum=0.6, **USUAL)
    ref = Reference(method)
    anchors = method.init_server(ref.result.worker.host(0, "init")).anchors.double()
    gap, own = None, {}
    for cohort in ref.cohorts():
        sent = {}
        for k in cohort:
            margin = max(
                [0.0 if gap is None and k not in own else -1.0, *([] if gap is None else [gap]), *own.get(k, [])]
            )

            def terms(net: Any, z: Tensor, s: Tensor, y: Tensor, a: Tensor = anchors, m: float = margin) -> Tensor:
                near = (z - a[y]).square().mean()
                return 0.7 * near + 0.4 * with_margin(z, y, a, m) + 0.3 * ce(net.head(a), torch.arange(CLASSES))

            sent[k] = ref.train(k, terms)
            if len(sent[k]) > 1:
                gaps = nearest_other(list(sent[k].values()))
                own[k] = [sum(gaps) / len(gaps)]
        anchors = anchors.clone()
        for c, m in mean_over(sent).items():
            anchors[c] = 0.6 * anchors[c] + 0.4 * m
        gap = sum(nearest_other(list(anchors))) / CLASSES
    close(ref.result.server.anchors, anchors)
    assert ref.result.server.gap == pytest.approx(gap, rel=1e-4)
    ref.same_models()


def test_knfu() -> None:
    t, beta = 2.0, 1.5
    ref = Reference(KnFu(temperature=t, beta=beta, public_rows=40, learn_epochs=2, **USUAL))
    for cohort in ref.cohorts():
        knowledge, law = {}, {}
        for k in cohort:
            ref.train(k)
            with torch.no_grad():
                knowledge[k] = (ref.nets[k](ref.public) / t).softmax(1)
                law[k] = ref.nets[k](ref.rows[k][0]).softmax(1).mean(0)
        for k in cohort:
            w = {j: float((-beta * (law[k] * (law[k] / law[j]).log()).sum()).exp()) for j in cohort}
            fused = sum(w[j] / sum(w.values()) * knowledge[j] for j in cohort)
            for _ in range(2):
                logs = (ref.nets[k](ref.public) / t).log_softmax(1)
                descend(ref.nets[k], t**2 * (fused * (fused.log() - logs)).sum(1).mean(), LR)
    ref.same_models()
