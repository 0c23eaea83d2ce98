"""Methods about the classifier: reductions bit for bit, loops written out in float64, closed forms."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, FEATURES, LINEAR, NOISY, NORMED, SIZES, Twins, architecture, federation, loop, site, worker
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import consilience
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError, NeedsError
from consilience.core.messages import Broadcast, Job
from consilience.core.method import Method
from consilience.core.model import Architecture, SplitModel, Weights
from consilience.core.predict import Net
from consilience.core.snapshot import Snapshot
from consilience.methods import CCVR, DPSGD, FedAvg, FedBuff, FedDisco, FedETF, FedLoGe, Scaffold
from consilience.methods.fedloge import Known, crowded, sparse
from consilience.models.small import MLP
from consilience.parts import calibration
from consilience.parts.calibration import Gaussians, drawn, gaussians, pooled
from consilience.parts.compose import composed
from consilience.parts.etf import frame, wrapped
from consilience.parts.split import head_of

LR = 0.2
WHOLE: dict[str, Any] = {"batch_size": 10_000, "local_epochs": 2, "lr": LR}
USUAL: dict[str, Any] = {"batch_size": 4, "local_epochs": 2, "lr": LR}


class Small(MLP):
    """A model with one hidden layer of 4."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(input_shape, outputs, (4,))


SMALL64 = architecture(Small, dtype=torch.float64)


def trained(
    method: Method, rounds: int = 3, model: Architecture = SMALL64, cohort: int = 99, fed: Any = None
) -> Snapshot:
    fed = fed or federation(dtype=model.dtype)
    return loop(worker(method, fed, model), rounds, cohort=cohort).snapshots[rounds]


def close(found: Weights, net: dict[str, Tensor]) -> None:
    assert found.params.keys() == net.keys()
    for name, p in net.items():
        torch.testing.assert_close(found.params[name], p, rtol=1e-10, atol=1e-12)


def descend(net: dict[str, Tensor], value: Tensor, lr: float, only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """One step of gradient descent on some of the tensors, or all."""
    names = [name for name in net if name in only or not only]
    grads = torch.autograd.grad(value, [net[name] for name in names])
    return {**net, **{n: (net[n] - lr * g).detach() for n, g in zip(names, grads, strict=True)}}


def leaves(net: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in net.items()}


def ce(scores: Tensor, y: Tensor) -> Tensor:
    return (scores.logsumexp(1) - scores[range(len(y)), y]).mean()


# --- the simplex -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "classes"), [(2, 2), (3, 3), (10, 10), (17, 5)])
def test_the_frame_is_a_simplex(width: int, classes: int) -> None:
    m = frame(width, classes)
    wanted = (torch.eye(classes, dtype=torch.float64) * classes - 1) / (classes - 1)
    torch.testing.assert_close(m.T @ m, wanted, rtol=0, atol=1e-12)
    assert torch.equal(m, frame(width, classes))


@pytest.mark.parametrize(("width", "classes"), [(3, 4), (5, 1)])
def test_a_frame_that_cannot_be_is_refused(width: int, classes: int) -> None:
    with pytest.raises(ValueError, match="frame"):
        frame(width, classes)


# --- FedETF ----------------------------------------------------------------------------------------------------


class Pointing(SplitModel):
    """A model with dropout and BatchNorm, whose classifier is the simplex, written out."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        inner = NOISY.build()
        head = nn.Module()
        super().__init__(inner.features, head, 6)
        head.projection = inner.head
        head.beta = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.head.projection(self.features(x))
        return self.head.beta * nn.functional.normalize(z, dim=1) @ frame(CLASSES, CLASSES).to(z.dtype)


@pytest.mark.parametrize("form", ["model", "delta"])
def test_without_counts_fedetf_is_fedavg_on_such_a_model(form: Any) -> None:
    usual = {**USUAL, "form": form}
    model = architecture(Pointing)
    method = FedETF(gamma=0.0, **usual)
    first = loop(worker(method, federation(), NOISY), 1, cohort=3)
    start = first.snapshots[1]
    at = worker(FedAvg(**usual), federation(), model)
    again = wrapped(NOISY.initial(0), model.spec)
    object.__setattr__(at.place, "initial", again)
    assert tr.digest(loop(at, 1, cohort=3).snapshots[1].server.model) == tr.digest(start.server.model)
    counted = trained(FedETF(**usual), 1, NOISY, cohort=3)
    assert tr.digest(counted.server.model) != tr.digest(start.server.model)


def test_the_frame_is_neither_trained_nor_sent() -> None:
    at = worker(FedETF(**USUAL), federation(), NOISY)
    net = at.place.network("etf")
    module = net.build()
    assert dict(module.named_parameters()).keys() == net.spec.params.keys()
    assert not module.head.frame.requires_grad
    torch.testing.assert_close(module.head.frame.double(), frame(CLASSES, CLASSES))
    memory = loop(at, 2, cohort=3)
    plain = loop(worker(FedAvg(**USUAL), federation(), NOISY), 2, cohort=3)
    etf, avg = memory.snapshots[2], plain.snapshots[2]
    size = encoded_size(etf.server.model) - encoded_size(avg.server.model)
    assert 0 < size < 400, "beta, its name and longer names of the head"
    assert etf.totals.bytes_up < avg.totals.bytes_up + 6 * 400, "personalising sends nothing"


def etf_scores(net: dict[str, Tensor], x: Tensor, m: Tensor) -> Tensor:
    f = torch.relu(x @ net["features.1.weight"].T + net["features.1.bias"])
    z = f @ net["head.projection.weight"].T + net["head.projection.bias"]
    return net["head.beta"] * (z / z.square().sum(1, keepdim=True).sqrt()) @ m


def test_the_clients_own_frame_has_no_momentum_and_does_not_decay() -> None:
    more = {"personal_rounds": 1, "projection_lr": 1e-12}
    usual = {**USUAL, "local_steps": 1, "lr": 1e-12}
    none, other = (trained(FedETF(**more, **usual, **o), 1) for o in ({}, {"momentum": 0.9, "weight_decay": 0.5}))
    a, b = (snapshot.states[0].params["head.frame"] for snapshot in (none, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert (a - frame(CLASSES, CLASSES)).abs().max() > 1e-3


def etf_step(net: dict[str, Tensor], x: Tensor, y: Tensor, gamma: float) -> dict[str, Tensor]:
    counts = torch.tensor([max(1, int((y == c).sum())) for c in range(CLASSES)], dtype=torch.float64)
    net = leaves(net)
    return descend(net, ce(etf_scores(net, x, frame(CLASSES, CLASSES)) + gamma * counts.log(), y), LR)


@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_fedetf_against_the_equations(gamma: float) -> None:
    fed = federation(dtype=torch.float64)
    rows = [fed.data(k).train for k in range(len(SIZES))]
    assert any(len(r.y.unique()) < CLASSES for r in rows), "somebody lacks a class"
    found = trained(FedETF(gamma=gamma, personal_rounds=2, **WHOLE), fed=fed)
    net = wrapped(SMALL64.initial(0), found.server.model).params
    net["head.beta"] = torch.ones((), dtype=torch.float64)
    for _ in range(3):
        ends = []
        for r in rows:
            end = net
            for _ in range(2):
                end = etf_step(end, r.x, r.y, gamma)
            ends.append(end)
        net = {n: sum(s * e[n] for s, e in zip(SIZES, ends, strict=True)) / sum(SIZES) for n in net}
    close(found.server.model, net)
    for k, r in enumerate(rows):
        own = net
        for _ in range(2):
            own = etf_step(own, r.x, r.y, gamma)
        own = {**own, "head.frame": frame(CLASSES, CLASSES)}
        for _ in range(2):
            for only, lr in ((("head.frame",), 0.1), (("head.projection.weight", "head.projection.bias"), 0.05)):
                for _ in range(3):
                    own = leaves(own)
                    own = descend(own, ce(etf_scores(own, r.x, own["head.frame"]), r.y), lr, only)
        close(found.states[k], {n: p.detach() for n, p in own.items()})


def test_balanced_clients_train_by_wholecross_entropy() -> None:
    x = torch.randn(12, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % CLASSES
    fed = federation((12,), dtype=torch.float64)
    fed.parts[0].train.x.copy_(x)
    fed.parts[0].train.y.copy_(y)
    a, b = (trained(FedETF(gamma=g, personal_rounds=0, **WHOLE), fed=fed).server.model for g in (0.0, 2.0))
    close(a, b.params)


def test_personalising_is_for_the_own_client_alone() -> None:
    none, some = (trained(FedETF(personal_rounds=n, **USUAL), 2, NOISY) for n in (0, 1))
    assert tr.digest(none.server) == tr.digest(some.server)
    assert all(state is None for state in none.states.values())
    assert len({tr.digest(state) for state in some.states.values()}) == len(SIZES)
    assert math.isfinite(float(some.states[0].params["head.frame"].sum()))


# --- CCVR ------------------------------------------------------------------------------------------------------


def plain(snapshot: Snapshot) -> Weights:
    """The global model, without a rule's memory."""
    found: Weights = getattr(snapshot.server, "server", snapshot.server).model
    return found


def body(weights: Weights) -> str:
    return tr.digest([{n: p for n, p in weights.params.items() if n not in head_of(weights)}, weights.buffers])


@pytest.mark.parametrize("options", [{"virtual": 0}, {"calibration_epochs": 0}])
def test_without_draws_ccvr_is_fedavg(options: Any) -> None:
    assert tr.digest(trained(CCVR(**options, **USUAL), model=NOISY, cohort=3).server.model) == tr.digest(
        trained(FedAvg(**USUAL), model=NOISY, cohort=3).server.model
    )


@pytest.mark.parametrize("buffers", ["average", "local"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(FedAvg, {}), (Scaffold, {}), (FedDisco, {}), (FedBuff, {"buffer": 2}), (FedAvg, {"weights": "fedce"}),
     (FedAvg, {"weights": "ida", "aggregator": "median"}), (FedDisco, {"aggregator": "rfa", "form": "delta"})],
)  # fmt: skip
def test_the_stage_changes_the_head_and_nothing_before_it(cls: Any, options: Any, buffers: Any) -> None:
    usual = {**USUAL, **options, "buffers": buffers}
    whole = [loop(worker(cls(then=then, **usual), federation(), NORMED), 3, cohort=3) for then in ("none", "ccvr:9")]
    before, after = (memory.snapshots for memory in whole)
    assert tr.digest(after[2].server) == tr.digest(before[2].server)
    assert tr.digest(after[2].states) == tr.digest(before[2].states)
    assert body(plain(after[3])) == body(plain(before[3]))
    assert tr.digest(plain(after[3])) != tr.digest(plain(before[3]))
    assert not any(memory.dropped for memory in whole)


def test_the_stage_alone_is_the_method_with_its_defaults() -> None:
    one, other = (trained(m, model=NOISY, cohort=3) for m in (CCVR(**USUAL), FedAvg(then="ccvr", **USUAL)))
    assert tr.digest(one.server) == tr.digest(other.server)
    assert one.totals == other.totals


def test_what_the_stage_costs() -> None:
    fed = federation()
    at = worker(FedAvg(then="ccvr", **USUAL), fed, NOISY)
    calibrated, usual = (loop(w, 3, cohort=3).snapshots[3] for w in (at, worker(FedAvg(**USUAL), fed, NOISY)))
    model = usual.server.model
    phase = at.method.program()[-1]
    answers = [at.method.client_update(phase, site(at, k), Broadcast(model), None)[0] for k in range(len(SIZES))]
    up = sum(encoded_size(a) for a in answers)
    assert calibrated.totals.bytes_up - usual.totals.bytes_up == up
    assert calibrated.totals.bytes_down - usual.totals.bytes_down == len(SIZES) * encoded_size(Broadcast(model))
    assert calibrated.totals.samples > usual.totals.samples


def test_ccvr_against_the_equations() -> None:
    fed = federation(dtype=torch.float64)
    method = CCVR(virtual=7, calibration_epochs=3, calibration_batch=10_000, calibration_lr=0.3, **WHOLE)
    found, start = trained(method, fed=fed).server.model, trained(FedAvg(**WHOLE), fed=fed).server.model
    x, y = (torch.cat([getattr(fed.data(k).train, part) for k in range(len(SIZES))]) for part in "xy")
    p = start.params
    z = torch.relu(x @ p["features.1.weight"].T + p["features.1.bias"]).numpy()
    host = worker(method, fed, SMALL64).host(3, "calibrate")
    made = []
    for c in range(CLASSES):
        own = z[y.numpy() == c]
        values, vectors = np.linalg.eigh(np.cov(own, rowvar=False))
        noise = host.rng("virtual", c).standard_normal((7, 4))
        # eigenvectors have a sign of their own: what has none are mean and covariance, which the next test looks at
        signs = torch.linalg.eigh(torch.from_numpy(np.cov(own, rowvar=False)))[1].numpy()
        vectors = vectors * np.sign((vectors * signs).sum(0))
        made.append(own.mean(0) + noise * np.sqrt(values.clip(0)) @ vectors.T)
    v, label = torch.from_numpy(np.concatenate(made)), torch.arange(CLASSES).repeat_interleave(7)
    head = {n: p[n] for n in ("head.weight", "head.bias")}
    for _ in range(3):
        head = leaves(head)
        head = descend(head, ce(v @ head["head.weight"].T + head["head.bias"], label), 0.3)
    for name, tensor in {**p, **head}.items():
        torch.testing.assert_close(found.params[name], tensor, rtol=1e-8, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 20))
def test_pooled_gaussians_do_not_depend_on_who_has_which_rows(seed: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 40)), int(rng.integers(1, 6))
    z = torch.from_numpy(rng.standard_normal((n, width)) * 10 ** rng.uniform(-2, 2) + rng.standard_normal(width) * 3)
    y = torch.from_numpy(rng.integers(0, 3, n))
    owner = torch.from_numpy(rng.integers(0, groups, n))
    parts = [gaussians(z[owner == k], y[owner == k]) for k in range(groups) if (owner == k).any()]
    for c in range(3):
        own, found = z[y == c], pooled(parts, c)
        if not len(own):
            assert found is None
            continue
        assert found is not None
        assert found[0] == len(own)
        torch.testing.assert_close(found[1], own.mean(0), rtol=1e-10, atol=1e-10)
        wanted = torch.cov(own.T).reshape(width, width) if len(own) > 1 else torch.zeros(width, width).double()
        torch.testing.assert_close(found[2], wanted, rtol=1e-9, atol=1e-10 * float(1 + z.abs().max()) ** 2)


def test_draws_have_the_mean_and_covariance_that_were_asked_for() -> None:
    rng = np.random.default_rng(0)
    root = torch.from_numpy(rng.standard_normal((5, 3)))
    mu, s = torch.arange(5.0).double(), root @ root.T  # of rank 3
    z = drawn(torch.from_numpy(rng.standard_normal((200_000, 5))), mu, s)
    torch.testing.assert_close(z.mean(0), mu, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(z.T), s, rtol=0.03, atol=0.05)
    assert torch.equal(drawn(torch.zeros(2, 5).double(), mu, s), mu.expand(2, 5))


@pytest.mark.parametrize("text", ["ccvr:", "ccvr:0", "ccvr:-1", "ccvr:x", "none:3", "later", ""])
def test_a_stage_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="none, ccvr"):
        composed(FedAvg(then=text))


def test_methods_and_models_without_a_global_head_are_refused() -> None:
    for method in (FedETF(then="ccvr"), DPSGD(then="ccvr")):
        with pytest.raises(ConfigError, match="no global model of its own head"):
            composed(method)
    with pytest.raises(NeedsError, match="split"):
        worker(FedAvg(then="ccvr"), federation(), architecture(Twins))
    with pytest.raises(NeedsError, match="classification"):
        worker(FedAvg(then="ccvr"), federation(regression=True), architecture(outputs=1))
    assert worker(FedAvg(then="ccvr"), federation(), LINEAR).program[-1].name == "calibrate"


def test_statistics_that_cannot_be_are_refused() -> None:
    at = worker(FedAvg(then="ccvr"), federation(), LINEAR)
    good = gaussians(torch.randn(6, FEATURES), torch.tensor([0, 0, 0, 2, 2, 2]))
    check = at.check
    assert check is not None
    assert check.wrong(Job(0, 0, 1, 0, 0, 1), good) is None
    wrong = {
        "feature_classes": torch.tensor([0, 3]),
        "feature_counts": torch.tensor([3, 0]),
        "feature_means": good.feature_means[:1],
        "feature_covariances": good.feature_covariances[:, 1:],
    }
    for field, value in wrong.items():
        found = check.wrong(Job(0, 0, 1, 0, 0, 1), good._replace(**{field: value}))
        assert found is not None
        assert found[0] == field


def test_a_composed_stage_is_pickled_and_runs_beside() -> None:
    method = composed(FedAvg(then="ccvr", weights="disco"))
    assert pickle.loads(pickle.dumps(method)) == method
    fed = consilience.make_federation("digits", clients=4, seed=1)
    runs = [
        consilience.run(method, fed, rounds=2, model="mlp:8", executor=e, workers=2) for e in ("serial", "processes")
    ]
    assert runs[0].digest == runs[1].digest


def test_a_stage_by_name_and_a_class_of_one_row() -> None:
    assert calibration.parse("none") is None
    assert calibration.parse("ccvr:12") == calibration.Calibration(virtual=12)
    one = Gaussians(*gaussians(torch.ones(1, 2), torch.tensor([1])))
    assert one.feature_covariances.tolist() == [[0.0, 0.0, 0.0]]
    assert one.feature_counts.tolist() == [1]


# --- FedLoGe ---------------------------------------------------------------------------------------------------

LOGE: dict[str, Any] = {"frame_steps": 30}


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(0, 10), st.floats(0, 0.95))
def test_the_sparse_simplex_has_the_zeros_it_should(seed: int, classes: int, more: int, share: float) -> None:
    v = sparse(classes + more, classes, share, np.random.default_rng(seed))
    whole = frame(classes + more, classes)
    assert ((v == 0) | (v == whole)).all()
    assert (v == 0).sum(0).tolist() == [math.floor(share * (classes + more))] * classes


def test_moving_classes_apart_lowers_the_loss_and_keeps_zeros() -> None:
    fed, frames = federation(dtype=torch.float64), []
    for steps in (0, 1, 400):
        found = worker(FedLoGe(frame_steps=steps, frame_norm=0.1), fed, architecture(Small, dtype=torch.float64))
        frames.append(found.method.init_server(found.host(0, "init")).frame)
    first, once, last = frames
    assert torch.equal(first == 0, last == 0)
    assert int((first == 0).sum()) == 2 * CLASSES
    assert crowded(last, 0.1) < crowded(once, 0.1) < crowded(first, 0.1)
    lengths = last.square().sum(0).sqrt()
    assert (lengths - 0.1).abs().max() < (first.square().sum(0).sqrt() - 0.1).abs().max()
    v = first.clone().requires_grad_()
    (slope,) = torch.autograd.grad(crowded(v, 0.1), v)
    wanted = torch.where(first == 0, first, first - 1e-3 * slope.sign())  # Adam's first step
    torch.testing.assert_close(once, wanted, rtol=1e-6, atol=1e-9)


def test_crowded_is_the_formula() -> None:
    v = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 3)))
    cols = [v[:, c] for c in range(3)]
    angle = [min(math.acos(float(a @ b / (a.norm() * b.norm()))) for b in cols if b is not a) for a in cols]
    wanted = sum((float(a.norm()) - 0.3) ** 2 for a in cols) - sum(angle) / 3
    assert float(crowded(v, 0.3)) == pytest.approx(wanted)


def under(v: Tensor) -> Architecture:
    """Small noisy models whose classifier is ``v``, which does not learn."""

    class Under(SplitModel):
        def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
            super().__init__(NOISY.build().features, nn.Identity(), 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x) @ v

    return architecture(Under)


@pytest.mark.parametrize("form", ["model", "delta"])
def test_the_body_learns_as_if_there_were_no_other_head(form: Any) -> None:
    usual = {**USUAL, "form": form}
    found = trained(FedLoGe(**LOGE, **usual), 3, NOISY, cohort=3).server
    at = worker(FedAvg(**usual), federation(), under(found.frame))
    start = NOISY.initial(0)
    inner = {n: p for n, p in start.params.items() if n not in head_of(start)}
    object.__setattr__(at.place, "initial", Weights(inner, start.buffers))
    other = loop(at, 3, cohort=3).snapshots[3].server.model
    assert {n: tr.digest(found.model.params[n]) for n in inner} == {n: tr.digest(p) for n, p in other.params.items()}
    assert tr.digest(found.model.buffers) == tr.digest(other.buffers)


def test_fedloge_against_the_equations() -> None:
    fed = federation(dtype=torch.float64)
    rows = [fed.data(k).train for k in range(len(SIZES))]
    method = FedLoGe(**LOGE, **WHOLE)
    at = worker(method, fed, SMALL64)
    found = loop(at, 3).snapshots[3]
    v = at.method.init_server(at.host(0, "init")).frame
    assert torch.equal(found.server.frame, v)
    net = dict(SMALL64.initial(0).params)
    own = [{n: net[n] for n in ("head.weight", "head.bias")} for _ in rows]

    def hidden(net: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.relu(x @ net["features.1.weight"].T + net["features.1.bias"])

    def linear(head: dict[str, Tensor], h: Tensor) -> Tensor:
        return h @ head["head.weight"].T + head["head.bias"]

    for _ in range(3):
        ends = []
        for k, r in enumerate(rows):
            end = net
            for _ in range(2):
                end, own[k] = leaves(end), leaves(own[k])
                h = hidden(end, r.x)
                still = h.detach()
                body = descend(end, ce(h @ v, r.y), LR, ("features.1.weight", "features.1.bias"))
                head = descend(end, ce(linear(end, still), r.y), LR, ("head.weight", "head.bias"))
                own[k] = descend(own[k], ce(linear(own[k], still), r.y), LR)
                end = {n: (head if n.startswith("head") else body)[n].detach() for n in end}
            ends.append(end)
        net = {n: sum(s * e[n] for s, e in zip(SIZES, ends, strict=True)) / sum(SIZES) for n in net}
    close(found.server.model, net)
    x = fed.test.x
    with torch.no_grad():
        h = hidden(net, x)
        lengths = net["head.weight"].norm(dim=1)
        wanted = 1.7 * h @ (net["head.weight"] / lengths[:, None]).T + net["head.bias"]
        predictor = at.method.global_model(found.server)
        torch.testing.assert_close(at.host(3, "x").scores(predictor, x), wanted)
        rows_of = predictor.weights.params["head.weight"].norm(dim=1)
        torch.testing.assert_close(rows_of, torch.full_like(rows_of, 1.7))
        for k, r in enumerate(rows):
            g = {**net, "head.weight": net["head.weight"] * own[k]["head.weight"].norm(dim=1)[:, None]}
            wanted = linear(g, h) + linear(own[k], h)
            state = found.states[k]
            torch.testing.assert_close(state.params["weight"], own[k]["head.weight"])
            scores = at.host(3, "x").scores(at.method.personal_model(site(at, k), found.server, state), x)
            here = r.y.unique()
            torch.testing.assert_close(scores[:, here], wanted[:, here])
            away = [c for c in range(CLASSES) if c not in here]
            if away:
                worst = wanted[:, here].min(1).values - 50
                torch.testing.assert_close(scores[:, away], worst[:, None].expand(-1, len(away)))
    assert any(len(r.y.unique()) < CLASSES for r in rows), "somebody lacks a class"


def test_absent_classes_are_never_predicted_and_losses_stay_finite() -> None:
    at = worker(FedLoGe(**LOGE), federation(), LINEAR)
    start = LINEAR.initial(0)
    bias = torch.tensor([0.0, 1e4, 0.0])
    known = Known(Net(Weights({**start.params, "head.bias": bias}, {})), torch.tensor([1]))
    scores = at.host(0, "x").scores(known, torch.randn(20, FEATURES))
    assert (scores.argmax(1) != 1).all()
    assert scores.isfinite().all()


def test_models_without_room_for_the_simplex_are_refused() -> None:
    class Narrow(MLP):
        def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
            super().__init__(input_shape, outputs, (2,))

    class Deep(SplitModel):
        def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
            head = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, outputs))
            super().__init__(nn.Flatten(), head, 5)

    for factory, why in ((Narrow, "at least as many features"), (Deep, "one linear layer")):
        with pytest.raises(NeedsError, match=why):
            worker(FedLoGe(), federation(), architecture(factory))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_momentum_of_the_clients_is_not_the_simplexs(optimizer: str) -> None:
    more: dict[str, Any] = {"momentum": 0.5} if optimizer == "sgd" else {}
    found = trained(FedLoGe(optimizer=optimizer, weight_decay=0.1, **more, **LOGE, **USUAL), 1, NOISY)
    usual = trained(FedLoGe(**LOGE, **USUAL), 1, NOISY)
    assert torch.equal(found.server.frame, usual.server.frame)
    assert tr.digest(found.server.model) != tr.digest(usual.server.model)
