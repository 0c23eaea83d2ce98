"""Methods that share class statistics, heads and anchors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import consilience
from consilience.core import tree as tr
from consilience.core.errors import NeedsError
from consilience.core.messages import ClientInfo, Job
from consilience.core.method import Phase
from consilience.methods import FedAvg, FedDistill, FedGH, FedProto, FedSA, FedTGP, LGFedAvg, Local
from consilience.methods.fedsa import mean_gap
from consilience.parts import prototypes as proto
from consilience.parts.prototypes import Prototypes
from consilience.parts.split import head_of
from tests.helpers import reply, site, worker

MIXED = {"models": "mlp:16*0.4,mlp:24x12*0.4,logistic*0.2", "feature_dim": 8}


def run(method: Any, **options: Any) -> consilience.Result:
    federation = consilience.make_federation("digits", clients=5, partition="shards:3", seed=2)
    usual = {"rounds": 3, "participation": 3, "executor": "serial", "model": "mlp:16"}
    return consilience.run(method, federation, **{**usual, **options})


def models(result: consilience.Result) -> dict[int, str]:
    return {client: tr.digest(getattr(state, "model", state)) for client, state in result.states.items()}


@pytest.mark.parametrize(
    "method",
    [FedProto(lam=0), FedDistill(lam=0), FedTGP(lam=0, server_epochs=1), FedSA(lam=0, mu=0, eta=0)],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("options", [{}, MIXED], ids=["one", "mixed"])
def test_without_its_terms_a_method_is_local_training(method: Any, options: dict[str, Any]) -> None:
    assert models(run(method, **options)) == models(run(Local(), **options))


@pytest.mark.parametrize("method", [FedProto(), FedDistill(), FedTGP(server_epochs=1), FedSA()], ids=lambda m: m.name)
def test_with_its_terms_it_is_not(method: Any) -> None:
    assert models(run(method)) != models(run(Local()))


def test_lgfedavg_of_a_head_alone_is_fedavg() -> None:
    shared, plain = run(LGFedAvg(), model="logistic"), run(FedAvg(), model="logistic")
    assert tr.digest(shared.server.head) == tr.digest(plain.server.model.params)


def test_lgfedavg_shares_heads_between_architectures() -> None:
    result = run(LGFedAvg(), participation=1.0, rounds=1, **MIXED)
    heads = [head_of(result.states[c]) for c in range(5)]
    sizes = [result.worker.federation.size(c) for c in range(5)]
    for name, value in result.server.head.items():
        expected = sum(n / sum(sizes) * h[name].double() for n, h in zip(sizes, heads, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_fedgh_trains_the_head_on_the_means() -> None:
    still, moved = run(FedGH(server_epochs=0)), run(FedGH(server_epochs=2))
    start = head_of(still.worker.host(0, "x").initial())
    assert tr.digest(still.server.head) == tr.digest(start)
    assert tr.digest(moved.server.head) != tr.digest(start)


def test_fedgh_one_step_by_hand() -> None:
    """One batch of all means: h - lr grad CE."""
    method = FedGH(server_lr=0.3, server_batch=1000)
    at = worker(method)
    host = at.host(0, "train")
    server = method.init_server(host)
    rng = np.random.default_rng(0)
    width = host.architecture().width or 0
    sent = [
        Prototypes(
            torch.tensor([0, 2]), torch.from_numpy(rng.standard_normal((2, width))).float(), torch.tensor([3, 1])
        ),
        Prototypes(torch.tensor([1]), torch.from_numpy(rng.standard_normal((1, width))).float(), torch.tensor([5])),
    ]
    new = method.aggregate(Phase("train"), host, server, [reply(i, p) for i, p in enumerate(sent)], [0, 1])
    w = server.head["head.weight"].double().requires_grad_()
    b = server.head["head.bias"].double().requires_grad_()
    x, y = torch.cat([p.means for p in sent]).double(), torch.cat([p.classes for p in sent])
    F.cross_entropy(x @ w.T + b, y).backward()
    torch.testing.assert_close(new.head["head.weight"].double(), (w - 0.3 * w.grad).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new.head["head.bias"].double(), (b - 0.3 * b.grad).detach(), rtol=1e-5, atol=1e-6)


# --- class statistics ------------------------------------------------------------------------------------------


def test_class_means_of_a_site() -> None:
    here = site(worker(FedProto()))
    weights = here.initial()
    found = proto.of_site(here, weights)
    z = torch.cat(here.map(lambda module, rows: module.features(rows.x), weights)).double()
    for c, mean, count in zip(found.classes, found.means, found.counts, strict=True):
        mask = here.train.y == c
        assert count == mask.sum() > 0
        torch.testing.assert_close(mean.double(), z[mask].mean(0), rtol=1e-6, atol=1e-6)


@st.composite
def several(draw: Any) -> list[Prototypes]:
    found = []
    for _ in range(draw(st.integers(1, 5))):
        classes = sorted(draw(st.sets(st.integers(0, 5))))
        counts = [draw(st.integers(1, 9)) for _ in classes]
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        means = torch.from_numpy(rng.standard_normal((len(classes), 3)))
        found.append(
            Prototypes(torch.tensor(classes, dtype=torch.int64), means, torch.tensor(counts, dtype=torch.int64))
        )
    return found


@given(several(), st.booleans())
@settings(deadline=None)
def test_average_against_a_naive_one(found: list[Prototypes], by_rows: bool) -> None:
    mean = proto.average(found, 6, by_rows=by_rows)
    naive: dict[int, Any] = {}
    for c in range(6):
        have = [
            (p.means[list(p.classes).index(c)], int(p.counts[list(p.classes).index(c)]))
            for p in found
            if c in p.classes
        ]
        if have:
            weights = [n if by_rows else 1 for _, n in have]
            naive[c] = sum(w * m for w, (m, _) in zip(weights, have, strict=True)) / sum(weights), len(have)
    assert mean.classes.tolist() == sorted(naive)
    for c, m, n in zip(mean.classes.tolist(), mean.means, mean.counts.tolist(), strict=True):
        torch.testing.assert_close(m, naive[c][0])
        assert n == naive[c][1]
    back = proto.average(found[::-1], 6, by_rows=by_rows)
    torch.testing.assert_close(back.means, mean.means)


@given(several())
@settings(deadline=None)
def test_the_average_of_one_is_that_one(found: list[Prototypes]) -> None:
    for by_rows in (False, True):
        mean = proto.average(found[:1], 6, by_rows=by_rows)
        assert torch.equal(mean.means, found[0].means)
        assert torch.equal(mean.classes, found[0].classes)


def test_a_class_that_nobody_sends_keeps_its_prototype() -> None:
    old = Prototypes(torch.tensor([0, 2]), torch.tensor([[1.0], [2.0]]), torch.tensor([1, 1]))
    fresh = Prototypes(torch.tensor([1, 2]), torch.tensor([[5.0], [6.0]]), torch.tensor([2, 2]))
    new = proto.renewed(old, fresh)
    assert new.classes.tolist() == [0, 1, 2]
    assert new.means.flatten().tolist() == [1.0, 5.0, 6.0]


def test_distances_have_a_gradient_at_zero() -> None:
    z = torch.zeros(2, 3, requires_grad=True)
    proto.margin_contrast(z, torch.zeros(4, 3), torch.tensor([0, 1]), 1.0).backward()
    assert torch.isfinite(z.grad).all()


def test_margin_contrast_without_margin_is_softmax_of_distances() -> None:
    rng = np.random.default_rng(0)
    z, means = (torch.from_numpy(rng.standard_normal((n, 3))) for n in (5, 4))
    y = torch.tensor([0, 3, 1, 2, 2])
    d = torch.cdist(z, means)
    naive = (d[range(5), y] + (-d).exp().sum(1).log()).mean()
    torch.testing.assert_close(proto.margin_contrast(z, means, y, 0.0), naive)
    own = (-(d[range(5), y] + 2.0)).exp()
    others = (-d).exp().sum(1) - (-d[range(5), y]).exp()
    torch.testing.assert_close(proto.margin_contrast(z, means, y, 2.0), -(own / (own + others)).log().mean())


def test_pull_counts_rows_of_unknown_classes_as_nothing() -> None:
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    means, there = torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.tensor([True, False])
    value = proto.pull(z, means, there, torch.tensor([0, 1]))
    assert value.item() == pytest.approx((1 + 4) / 4)
    value.backward()
    assert z.grad[1].abs().sum() == 0


def test_nearest_prototype_predicts_and_its_loss_is_finite() -> None:
    result = run(FedProto(), rounds=4, **MIXED)
    row = next(r for r in result.clients if r["round"] == 4)
    assert np.isfinite(row["loss"])
    at, client = result.worker, 0
    predictor = at.deployed(result.server, client, result.states.get(client))
    here = at.site(Job(-1, client, 1, 0, 0, 0))[0]
    scores = here.scores(predictor, here.test.x)
    z = torch.cat(here.map(lambda m, rows: m.features(rows.x), predictor.net.weights, here.test)).double()
    naive = torch.cdist(z, predictor.prototypes.means.double()).argmin(1)
    assert torch.equal(scores.argmax(1), predictor.prototypes.classes[naive])
    head = run(FedProto(predict="head"), rounds=4, **MIXED)
    assert head.digest.splitlines()[:2] == result.digest.splitlines()[:2]
    assert head.digest != result.digest


# --- the methods' own rules ------------------------------------------------------------------------------------


def test_feddistill_leaves_its_own_out() -> None:
    """Class 0 is of two clients, 1 of client 0 alone, and what client 0 gave to class 2 is no longer in its mean."""
    method = FedDistill(exclude_own=True)
    at = worker(method)
    host = at.host(0, "train")
    ones = torch.ones(1, 3)

    def sent(**values: float) -> Prototypes:
        classes = [int(c[1]) for c in values]
        rows = torch.cat([v * ones for v in values.values()])
        return Prototypes(torch.tensor(classes), rows, torch.ones(len(classes), dtype=torch.int64))

    def combine(server: Any, *updates: tuple[int, Prototypes]) -> Any:
        return method.aggregate(Phase("train"), host, server, [reply(k, p) for k, p in updates], [])

    server = combine(method.init_server(host), (0, sent(c0=4.0, c1=7.0, c2=1.0)), (1, sent(c0=2.0)))
    server = combine(server, (1, sent(c2=5.0)), (2, sent(c2=9.0)))
    got = [
        method.broadcast(Phase("train"), server, ClientInfo(k, 1, "linear", at.place.architectures)) for k in range(4)
    ]
    assert [p.classes.tolist() for p in got] == [[0, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert [p.means[:, 0].tolist() for p in got] == [[2.0, 7.0], [4.0, 7.0, 9.0], [3.0, 7.0, 5.0], [3.0, 7.0, 7.0]]
    again = combine(server, (0, sent(c0=1.0)), (0, sent(c0=3.0)), (1, sent(c0=8.0)))  # a client may reply twice
    mine, other = (
        method.broadcast(Phase("train"), again, ClientInfo(k, 1, "linear", at.place.architectures)) for k in (0, 1)
    )
    assert mine.means[0, 0].item() == 8.0
    assert other.means[0, 0].item() == 2.0


def test_fedtgp_margin() -> None:
    method = FedTGP(tau=4.0)
    means = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 9.0]])
    sent = Prototypes(torch.arange(3), means, torch.ones(3, dtype=torch.int64))
    assert method.margin([sent], 5) == 4.0  # the third's next one is 9 away
    assert FedTGP(tau=100.0).margin([sent], 5) == pytest.approx(9.0)
    alone = Prototypes(torch.tensor([1]), means[:1], torch.tensor([1]))
    assert method.margin([alone], 5) == 4.0
    far = Prototypes(torch.tensor([2]), torch.tensor([[0.0, 29.0]]), torch.tensor([3]))
    assert FedTGP(tau=100.0).margin([sent, far], 5) == pytest.approx((9 + 29) / 2)
    assert FedTGP(tau=100.0, prototypes="rows").margin([sent, far], 5) == pytest.approx((9 + 3 * 29) / 4)


def test_fedsa_anchors_drift() -> None:
    still, moved = run(FedSA(anchor_momentum=1.0)), run(FedSA(anchor_momentum=0.5))
    first = FedSA().init_server(still.worker.host(0, "init"))
    assert torch.equal(still.server.anchors, first.anchors)
    assert not torch.equal(moved.server.anchors, first.anchors)
    assert still.server.gap == pytest.approx(mean_gap(first.anchors))
    assert mean_gap(torch.zeros(1, 3)) is None
    assert mean_gap(torch.tensor([[0.0], [1.0], [4.0]])) == pytest.approx((1 + 1 + 3) / 3)


def test_only_classes_that_a_client_has_are_sent() -> None:
    result = run(FedProto(), rounds=1, participation=1.0)
    classes = {int(c) for c in result.server.classes}
    held = {int(c) for k in range(5) for c in result.worker.federation.data(k).train.y.unique()}
    assert classes == held


@pytest.mark.parametrize(
    ("change", "field", "why"),
    [
        ({"classes": torch.tensor([0, 0])}, "classes", "twice"),
        ({"classes": torch.tensor([0, 9])}, "classes", "above 2"),
        ({"classes": torch.tensor([0])}, "means", "shape"),
        ({"means": torch.zeros(2, 4)}, "means", "shape"),
        ({"means": torch.full((2, 5), float("nan"))}, "means", "finite"),
        ({"counts": torch.tensor([0, 1])}, "counts", "below 1"),
        ({"counts": torch.tensor([1.0, 1.0])}, "counts", "dtype"),
    ],
)
def test_prototypes_that_cannot_be_right_are_refused(change: dict[str, Any], field: str, why: str) -> None:
    at = worker(FedProto())
    right = Prototypes(torch.tensor([0, 2]), torch.zeros(2, 5), torch.tensor([1, 2]))
    assert at.check.wrong(Job(0, 0, 1, 0, 0, 0), right) is None
    found = at.check.wrong(Job(0, 0, 1, 0, 0, 0), right._replace(**change))
    assert found is not None
    assert found[0] == field
    assert why in found[1]


def test_different_widths_are_refused() -> None:
    with pytest.raises(NeedsError, match="--feature-dim"):
        run(FedProto(), models="mlp:16*0.5,mlp:24*0.5")
