"""FedD2S: cuts of models, whose gradient goes where, what is sent, and runs against a loop written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import consilience
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.core.events import draw_cohort
from consilience.core.federation import Split
from consilience.core.messages import Job, Reply
from consilience.core.model import SplitModel
from consilience.core.streams import philox
from consilience.methods import FedD2S, Local
from consilience.methods.fedd2s import Down, Up, only_through
from consilience.models import architecture
from consilience.parts.cuts import cuts
from tests.helpers import LINEAR, NOISY, Frozen, federation, loop, reply, site, worker
from tests.helpers import architecture as of

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}
DEEP = architecture("mlp:7x6x4", (5,), 3)


def after(method: Any, rounds: int = 3, model: Any = DEEP, cohort: int = 3, **more: Any) -> Any:
    return loop(worker(method, model=model), rounds, cohort=cohort, **more).snapshots[rounds]


# --- cuts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mlp:9x8", [(8,), (9,)]),
        ("lenet", [(84,), (120,), (16 * 25,), (6, 14, 14)]),
        ("resnet8", [(64,), (32, 14, 14), (16, 28, 28), (16, 28, 28)]),
        ("vgg5", [(128,), (64 * 9,), (32, 7, 7), (16, 14, 14)]),
    ],
)
def test_what_is_below_and_what_is_above_are_the_model(name: str, shapes: list[tuple[int, ...]]) -> None:
    model = architecture(name, (1, 28, 28), 10)
    assert [cut.shape for cut in cuts(model)] == shapes
    weights, x = model.initial(0), torch.randn(3, 1, 28, 28)
    module = model.build()
    module.load_state_dict({**weights.params, **weights.buffers})
    assert isinstance(module, SplitModel)
    module.eval()
    with torch.no_grad():
        for cut in cuts(model):
            assert cut.below(module, x).shape[1:] == cut.shape
            assert torch.equal(cut.above(module, cut.below(module, x)), module(x))
            tail = cut.tail(model, "tail").spec.params
            assert [t.shape for t in tail.values()] == [p.shape for p in [*weights.params.values()][-len(tail) :]]


def test_models_that_cannot_be_cut() -> None:
    for model, words in ((LINEAR, "none below its head"), (of(Frozen), "no Sequential")):
        with pytest.raises(ConfigError, match=words):
            worker(FedD2S(), model=model)


# --- reductions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"momentum": 0.5, "weight_decay": 0.01, "clip": 0.5}], ids=["plain", "more"])
@pytest.mark.parametrize("model", [DEEP, NOISY], ids=["mlp", "noisy"])
def test_without_distillation_it_is_local_training(extra: dict[str, Any], model: Any) -> None:
    alone = after(Local(**USUAL, **extra), 4, model)
    found = after(FedD2S(beta_c=0, drop_every=2, **USUAL, **extra), 4, model)
    assert {k: tr.digest(s) for k, s in found.states.items()} == {k: tr.digest(s) for k, s in alone.states.items()}
    taught = after(FedD2S(drop_every=2, **USUAL, **extra), 4, model)
    assert {k: tr.digest(s) for k, s in taught.states.items()} != {k: tr.digest(s) for k, s in alone.states.items()}


def test_the_first_round_is_local_since_there_is_no_head_yet() -> None:
    alone, found = after(Local(**USUAL), 1), after(FedD2S(**USUAL), 1)
    assert {k: tr.digest(s) for k, s in found.states.items()} == {k: tr.digest(s) for k, s in alone.states.items()}


def test_one_client_whose_soft_labels_are_ignored_trains_a_head_on_frozen_features() -> None:
    fed = federation((15,))
    method = FedD2S(beta_c=0, beta_s=0, server_lr=0.3, server_epochs=3, **USUAL)
    at = worker(method, fed, DEEP)
    update, _ = method.client_update(at.program[0], site(at), Down(0, None, 0), None)
    host = at.host(0, "train")
    server = method.aggregate(at.program[0], host, method.init_server(host), [reply(0, update)], [0])
    again, data = at.host(0, "train"), Split(update.rows.features, update.rows.labels)
    plain = again.fit(again.initial("head0"), data=data, model="head0", epochs=3, lr=0.3, purpose="head")
    assert tr.digest(server.head) == tr.digest(plain.weights)


# --- the gradient ----------------------------------------------------------------------------------------------


def test_the_gradient_reaches_what_is_below_alone() -> None:
    torch.manual_seed(0)
    a, b, x = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    r = torch.tanh(x @ a)
    whole = (r @ b).logsumexp(1).sum()
    found = only_through(whole, r)
    assert torch.equal(found, whole)
    wanted = torch.autograd.grad((torch.tanh(x @ a) @ b).logsumexp(1).sum(), a)[0]
    below, above = torch.autograd.grad(found, [a, b], allow_unused=True)
    torch.testing.assert_close(below, wanted)
    assert above is None or not above.any()


# --- what is sent ----------------------------------------------------------------------------------------------


def test_bytes_are_those_of_representations_soft_labels_and_labels() -> None:
    for level, width in enumerate((4, 6, 7)):
        method = FedD2S(**USUAL)
        at = worker(method, model=DEEP)
        update, _ = method.client_update(at.program[0], site(at, 2), Down(0, None, level), None)
        n = len(federation().data(2).train)
        data = 4 * n * width + 4 * n * 3 + 8 * n
        assert data <= encoded_size(update) <= data + 1200
        assert update.rows.features.shape == (n, width)
        torch.testing.assert_close(update.rows.soft.sum(1), torch.ones(n))


def test_a_client_may_send_some_of_its_rows() -> None:
    method = FedD2S(upload_rows=5, **USUAL)
    at = worker(method, model=DEEP)
    first, second = (
        method.client_update(at.program[0], site(at, 2, number), Down(0, None, 0), None)[0].rows for number in (1, 2)
    )
    assert len(first.labels) == len(second.labels) == 5
    assert not torch.equal(first.labels, second.labels) or not torch.equal(first.features, second.features)


def test_the_cut_moves_up_and_a_new_head_begins() -> None:
    method = FedD2S(drop_every=2, cuts=2, **USUAL)
    snapshots = loop(worker(method, model=DEEP), 6).snapshots
    assert [snapshots[i].server.level for i in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert [len(snapshots[i].server.head.params) for i in (2, 3)] == [2, 4]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows._replace(level=9), lambda rows: rows._replace(level=1),
        lambda rows: rows._replace(labels=rows.labels + 9), lambda rows: rows._replace(soft=rows.soft[:2]),
        lambda rows: rows._replace(features=rows.features.double()), lambda rows: rows.features,
    ],
)  # fmt: skip
def test_a_wrong_message_costs_its_client(spoil: Any) -> None:
    method = FedD2S(**USUAL)
    at = worker(method, model=DEEP)
    update, _ = method.client_update(at.program[0], site(at), Down(0, None, 0), None)
    check: Any = at.check
    assert check.wrong(Job(0, 0, 1, 0, 0, 0), update) is None
    assert check.wrong(Job(0, 0, 1, 0, 0, 0), Up(spoil(update.rows))) is not None


def test_late_rows_of_another_cut_do_not_train_the_head() -> None:
    method = FedD2S(drop_every=1, **USUAL)
    at = worker(method, model=DEEP)
    update, _ = method.client_update(at.program[0], site(at), Down(0, None, 0), None)
    host, late = at.host(1, "train"), reply(0, update)
    server = method.init_server(host)._replace(round=1)
    found = method.aggregate(at.program[0], host, server, [late], [0])
    assert (found.head, found.round) == (None, 2)
    fresh, _ = method.client_update(at.program[0], site(at, 1), Down(0, None, 1), None)
    both: list[Reply] = [late, reply(1, fresh)]
    alone = method.aggregate(at.program[0], at.host(1, "train"), server, both[1:], [1])
    assert tr.digest(method.aggregate(at.program[0], at.host(1, "train"), server, both, [0, 1])) == tr.digest(alone)


def test_a_client_that_never_took_part_trains_alone() -> None:
    memory = loop(worker(method := FedD2S(**USUAL), model=DEEP), 2, cohort=2)
    at, snapshot = worker(method, model=DEEP), memory.snapshots[2]
    new = next(k for k in range(5) if k not in snapshot.states or snapshot.states[k] is None)
    message = Down(snapshot.server.level, snapshot.server.head, 0)
    found: Any = method.personal_model(site(at, new), message, None)
    assert tr.digest(found.weights) != tr.digest(DEEP.initial(0))
    plain: Any = FedD2S(join_epochs=0, **USUAL).personal_model(site(at, new), message, None)
    assert tr.digest(plain.weights) == tr.digest(DEEP.initial(0))


# --- against a loop written out --------------------------------------------------------------------------------

SEED, CLIENTS, COHORT, ROUNDS, LR, EPOCHS, T, BETA_C, BETA_S, LR_S = 5, 6, 4, 5, 0.3, 2, 1.5, 0.8, 0.6, 0.4
NAMES = ["features.1.weight", "features.1.bias", "features.3.weight", "features.3.bias", "head.weight", "head.bias"]
TAIL = {0: NAMES[4:], 1: NAMES[2:]}


def above(p: dict[str, Tensor], r: Tensor, level: int) -> Tensor:
    if level == 1:
        r = (r @ p[NAMES[2]].T + p[NAMES[3]]).relu()
    return r @ p[NAMES[4]].T + p[NAMES[5]]


def below(p: dict[str, Tensor], x: Tensor, level: int) -> Tensor:
    r = (x.flatten(1) @ p[NAMES[0]].T + p[NAMES[1]]).relu()
    return r if level == 1 else (r @ p[NAMES[2]].T + p[NAMES[3]]).relu()


def cross(z: Tensor, y: Tensor) -> Tensor:
    return (z.logsumexp(1) - z[range(len(y)), y]).mean()


def divergence(target: Tensor, z: Tensor) -> Tensor:
    return T**2 * (target * (target.log() - (z / T).log_softmax(1))).sum(1).mean()


def descend(p: dict[str, Tensor], value: Any, lr: float) -> dict[str, Tensor]:
    leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
    value(leaves).backward()
    return {n: t.detach() if t.grad is None else (t - lr * t.grad).detach() for n, t in leaves.items()}


def train(v: dict[str, Tensor], head: Any, level: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    target = None if head is None else (above(head, below(v, x, level), level) / T).softmax(1)
    for _ in range(EPOCHS):

        def value(p: dict[str, Tensor]) -> Tensor:
            found = cross(above(p, below(p, x, level), level), y)
            if target is None:
                return found
            fixed = {n: t.detach() for n, t in p.items()}
            return found + BETA_C * divergence(target, above(fixed, below(p, x, level), level))

        v = descend(v, value, LR)
    return v


def test_a_run_in_float64() -> None:
    made = FedD2S(
        lr=LR, batch_size=10_000, local_epochs=EPOCHS, temperature=T, beta_c=BETA_C, beta_s=BETA_S, server_lr=LR_S,
        drop_every=3,
    )  # fmt: skip
    data = consilience.make_federation("digits", clients=CLIENTS, partition="shards:3", seed=SEED)
    result = consilience.run(
        made, data, rounds=ROUNDS, participation=COHORT, seed=SEED, executor="serial", model="mlp:16x12"
    )
    host = result.worker.host(0, "x")
    first = {n: p.double() for n, p in host.initial().params.items()}
    heads = {lv: dict(zip(TAIL[lv], map(Tensor.double, host.initial(f"head{lv}").params.values()), strict=True))
             for lv in TAIL}  # fmt: skip
    rows = [(data.data(k).train.x.double(), data.data(k).train.y) for k in range(CLIENTS)]
    own: dict[int, Any] = {}
    head, at = None, 0
    for version in range(ROUNDS):
        level = min(version // 3, 1)
        sent = []
        for k in sorted(int(k) for k in draw_cohort(philox(SEED, "cohort", version, 0), data.seen, COHORT)):
            own[k] = train(own.get(k, first), head, at, *rows[k])
            r = below(own[k], rows[k][0], level)
            sent.append((r, (above(own[k], r, level) / T).softmax(1), rows[k][1]))
        r, soft, y = (torch.cat(part) for part in zip(*sent, strict=True))
        start = head if head is not None and at == level else heads[level]

        def value(p: Any, level: int = level, r: Tensor = r, soft: Tensor = soft, y: Tensor = y) -> Tensor:
            z = above(p, r, level)
            return cross(z, y) + BETA_S * divergence(soft, z)

        head, at = descend(start, value, LR_S), level
    tight: dict[str, Any] = {"rtol": 1e-3, "atol": 5e-5}
    assert head is not None
    torch.testing.assert_close([p.double() for p in result.server.head.params.values()], list(head.values()), **tight)
    for k, state in result.states.items():
        if k in own:
            torch.testing.assert_close({n: p.double() for n, p in state.params.items()}, own[k], **tight)
    assert np.isfinite(result.history[-1]["clients"]["mean"])
