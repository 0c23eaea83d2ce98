"""Methods about the classifier: reductions bit for bit, loops written out in float64, closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import CLASSES, FEATURES, NOISY, SIZES, architecture, federation, loop, worker
from torch import Tensor, nn

from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.method import Method
from consilience.core.model import Architecture, SplitModel, Weights
from consilience.core.snapshot import Snapshot
from consilience.methods import FedAvg, FedETF
from consilience.models.small import MLP
from consilience.parts.etf import frame, wrapped

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


def test_balanced_clients_train_by_plain_cross_entropy() -> None:
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
