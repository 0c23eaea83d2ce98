"""Partial personalisation: FedPer, FedRep, FedSim, FedAlt, and the names that are divided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.events import draw_cohort
from consilience.core.streams import philox
from consilience.methods import FedAlt, FedAvg, FedPer, FedRep, FedSim
from consilience.models import architecture
from consilience.parts.split import divided, joined
from tests.helpers import LINEAR, NOISY, NORMED, Frozen, loop, worker
from tests.helpers import architecture as of

FAMILY = (FedPer, FedRep, FedSim, FedAlt)
USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def after(method: Any, rounds: int = 3, model: Any = NOISY, cohort: int = 3) -> Any:
    return loop(worker(method, model=model), rounds, cohort=cohort).snapshots[rounds]


def ends(snapshot: Any) -> str:
    return tr.digest(snapshot.server, dict(snapshot.states))


# --- reductions, bit for bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["average", "local"])
@pytest.mark.parametrize("form", ["model", "delta"])
@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("method", FAMILY)
def test_without_personal_parameters_a_method_is_fedavg(method: Any, weights: Any, form: Any, buffers: Any) -> None:
    same: dict[str, Any] = {"form": form, "weights": weights, "buffers": buffers, **USUAL}
    plain, neutral = after(FedAvg(**same)), after(method(personal="none", **same))
    assert tr.digest(plain.server) == tr.digest(neutral.server)
    assert plain.totals == neutral.totals


@pytest.mark.parametrize("method", FAMILY)
def test_with_them_it_is_not(method: Any) -> None:
    plain, found = after(FedAvg(**USUAL)), after(method(**USUAL))
    shared = found.server.model.params
    assert tr.digest(shared) != tr.digest({name: plain.server.model.params[name] for name in shared})
    assert not any(name.startswith("head.") for name in shared)


def test_one_step_size_for_both_parts_is_fedper() -> None:
    assert ends(after(FedPer(**USUAL))) == ends(after(FedSim(personal_lr=0.1, **USUAL)))
    assert ends(after(FedPer(**USUAL))) != ends(after(FedSim(personal_lr=0.2, **USUAL)))


def test_fedalt_with_a_personal_head_is_fedrep() -> None:
    rep, alt = FedRep(head_epochs=2, **USUAL), FedAlt(personal_epochs=2, **USUAL)
    assert ends(after(rep)) == ends(after(alt))
    assert ends(after(rep)) == ends(after(FedAlt(personal_epochs=2, personal_lr=0.1, **USUAL)))
    assert ends(after(rep)) != ends(after(FedAlt(personal_epochs=2, personal_lr=0.05, **USUAL)))
    assert ends(after(rep)) != ends(after(FedRep(head_epochs=1, **USUAL)))


def test_a_personal_step_size_decays_with_the_other() -> None:
    slow = FedAlt(lr_decay=0.5, personal_lr=0.1, **USUAL)
    assert ends(after(slow)) == ends(after(FedAlt(lr_decay=0.5, **USUAL)))


# --- who moves what --------------------------------------------------------------------------------------------


def test_the_server_never_sees_a_personal_part() -> None:
    found = after(FedPer(personal="input", **USUAL), model=NORMED)
    own = {"features.0.weight", "features.0.bias"}
    assert set(found.server.model.params) == set(NORMED.spec.params) - own
    assert all(set(state.params) == own for state in found.states.values())
    less = tr.nbytes({name: NORMED.spec.params[name] for name in own})
    plain = after(FedAvg(**USUAL), model=NORMED)
    assert plain.totals.bytes_up - found.totals.bytes_up >= 3 * 3 * less


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_buffers_go_with_their_layer(buffers: Any) -> None:
    found = after(FedPer(personal="features.1.*", buffers=buffers, **USUAL), model=NORMED)
    assert not found.server.model.buffers
    states = [state.state if buffers == "local" else state for state in found.states.values()]
    assert all("features.1.running_mean" in state.buffers for state in states)
    assert len({tr.digest(state.buffers) for state in states}) == len(states) > 1


def test_a_phase_moves_its_own_part_alone() -> None:
    first = after(FedAlt(personal="head.bias", personal_epochs=0, **USUAL), 1, LINEAR)
    initial = LINEAR.initial(0).params
    assert all(torch.equal(state.params["head.bias"], initial["head.bias"]) for state in first.states.values())
    assert not torch.equal(first.server.model.params["head.weight"], initial["head.weight"])


def test_idle_clients_keep_their_part_and_new_ones_begin_with_the_first() -> None:
    memory = loop(worker(FedPer(**USUAL), model=NORMED), 4, cohort=2)
    for version in (2, 3, 4):
        before, now = memory.snapshots[version - 1].states, memory.snapshots[version].states
        asked = {int(k) for k in draw_cohort(philox(0, "cohort", version - 1, 0), np.arange(5), 2)}
        for client in set(before) - asked:
            assert tr.digest(before[client]) == tr.digest(now[client])


def test_frozen_parameters_stay() -> None:
    model = of(Frozen)
    initial = model.initial(0).params
    same: dict[str, Any] = {"form": "delta", **USUAL}  # a mean of equal models may differ from them in the last bits
    for method in (FedRep(personal="head.bias", **same), FedAlt(personal="features.bias", **same)):
        found = after(method, model=model)
        moved = {**found.server.model.params, **next(iter(found.states.values())).params}
        assert [n for n, p in moved.items() if torch.equal(p, initial[n])] == [
            n for n in moved if n.startswith("features.")
        ]


# --- names -----------------------------------------------------------------------------------------------------


def test_words_and_patterns() -> None:
    lenet = architecture("lenet", (1, 28, 28), 10)
    assert divided(lenet, "none").own == frozenset()
    assert divided(lenet, "output").own == {"head.weight", "head.bias"}
    assert divided(lenet, "input").own == {"features.0.weight", "features.0.bias"}
    assert divided(lenet, "features.?.bias, head.*").own == {
        "features.0.bias", "features.3.bias", "features.7.bias", "features.9.bias", "head.weight", "head.bias"
    }  # fmt: skip


class Plain(nn.Sequential):
    """A model that is not split."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(nn.Linear(input_shape[0], 4), nn.ReLU(), nn.Linear(4, outputs))


def test_the_output_of_a_model_that_is_not_split() -> None:
    assert divided(of(Plain), "output").own == {"2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("personal", "words"),
    [
        ("heads.*", "no parameter of model 'normed' fits 'heads"),
        ("*", "nothing of model 'normed' is shared"),
        ("adapter", "no parameter"),
        ("", "no parameter"),
    ],
)
def test_divisions_that_cannot_be(personal: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        worker(FedPer(personal=personal), model=NORMED)


def test_everything_frozen_that_is_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing"):
        worker(FedPer(), model=of(Frozen))


def test_two_step_sizes_want_sgd() -> None:
    with pytest.raises(ConfigError, match="optimizer=sgd"):
        FedSim(personal_lr=0.1, optimizer="adam")
    FedSim(personal_lr=0.1, momentum=0.5)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.sampled_from([*NORMED.spec.params, *NORMED.spec.buffers])))
def test_parts_join_to_what_they_were(chosen: set[str]) -> None:
    weights = NORMED.initial(1)
    shared, own = (
        type(weights)(*({n: t for n, t in part.items() if (n in chosen) is mine} for part in weights))
        for mine in (False, True)
    )
    assert tr.digest(joined(NORMED.spec, shared, own)) == tr.digest(weights)


# --- against loops written out ---------------------------------------------------------------------------------

SEED, CLIENTS, COHORT, ROUNDS, LR = 5, 6, 3, 4, 0.3


def ce(scores: Tensor, y: Tensor) -> Tensor:
    return (scores.logsumexp(1) - scores[range(len(y)), y]).mean()


def forward(p: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = (x.flatten(1) @ p["features.1.weight"].T + p["features.1.bias"]).relu()
    return hidden @ p["head.weight"].T + p["head.bias"]


def descend(p: dict[str, Tensor], x: Tensor, y: Tensor, rates: dict[str, float]) -> None:
    leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
    ce(forward(leaves, x), y).backward()
    for n, rate in rates.items():
        grad = leaves[n].grad
        assert grad is not None
        p[n] = p[n] - rate * grad


@pytest.mark.parametrize("personal", ["output", "input", "*.bias"])
@pytest.mark.parametrize("name", ["fedper", "fedrep", "fedsim", "fedalt"])
def test_runs_in_float64(name: str, personal: str) -> None:
    extra = {
        "fedrep": {"head_epochs": 3},
        "fedsim": {"personal_lr": 0.1},
        "fedalt": {"personal_lr": 0.1, "personal_epochs": 2},
    }
    options = {"lr": LR, "batch_size": 10_000, "local_epochs": 2, "personal": personal, **extra.get(name, {})}
    data = consilience.make_federation("digits", clients=CLIENTS, partition="shards:3", seed=SEED)
    result = consilience.run(
        consilience.methods.make(name, options), data, rounds=ROUNDS, participation=COHORT, seed=SEED,
        executor="serial", model="mlp:16",
    )  # fmt: skip
    first = {n: p.double() for n, p in result.worker.host(0, "x").initial().params.items()}
    own = {"output": ["head.weight", "head.bias"], "input": ["features.1.weight", "features.1.bias"],
           "*.bias": ["features.1.bias", "head.bias"]}[personal]  # fmt: skip
    shared = {n: p for n, p in first.items() if n not in own}
    mine = {k: {n: first[n] for n in own} for k in range(CLIENTS)}
    rows = [(data.data(k).train.x.double(), data.data(k).train.y) for k in range(CLIENTS)]
    seen: set[int] = set()
    for version in range(ROUNDS):
        cohort = [int(k) for k in draw_cohort(philox(SEED, "cohort", version, 0), data.seen, COHORT)]
        seen |= set(cohort)
        sent = {}
        for k in cohort:
            p = {**shared, **mine[k]}
            on_own = 0.1 if name in ("fedsim", "fedalt") else LR
            alone, rest = dict.fromkeys(own, on_own), dict.fromkeys(shared, LR)
            together = {**alone, **rest}
            passes = {
                "fedper": [together] * 2, "fedsim": [together] * 2,
                "fedrep": [alone] * 3 + [rest] * 2, "fedalt": [alone] * 2 + [rest] * 2,
            }[name]  # fmt: skip
            for rates in passes:
                descend(p, *rows[k], rates)
            sent[k], mine[k] = {n: p[n] for n in shared}, {n: p[n] for n in own}
        total = sum(len(rows[k][1]) for k in cohort)
        shared = {n: sum((len(rows[k][1]) / total * sent[k][n] for k in cohort), torch.zeros(())) for n in shared}
    assert set(result.states) == seen
    for n, p in shared.items():
        torch.testing.assert_close(result.server.model.params[n].double(), p, rtol=1e-4, atol=2e-5)
    for k in seen:
        for n in own:
            torch.testing.assert_close(result.states[k].params[n].double(), mine[k][n], rtol=1e-4, atol=2e-5)


# --- joining ---------------------------------------------------------------------------------------------------


def test_a_new_client_learns_its_part_under_the_shared_one() -> None:
    data = consilience.make_federation("digits", clients=6, partition="shards:3", unseen=2, seed=1)
    options: dict[str, Any] = {"rounds": 5, "model": "mlp:16", "executor": "serial", "seed": 0}
    alone, joining = (consilience.run(FedPer(join_epochs=n, **USUAL), data, **options) for n in (0, 5))
    assert alone.digest.splitlines()[:2] == joining.digest.splitlines()[:2]
    assert joining.history[-1]["unseen"]["mean"] > alone.history[-1]["unseen"]["mean"] + 0.2
    assert joining.history[-1]["samples"] == alone.history[-1]["samples"]


# --- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp:12x8", "lenet", "cnn", "resnet8", "resnet14:batchnorm", "vgg5"])
def test_adapters_begin_as_nothing(name: str) -> None:
    model, bare = architecture(f"{name}+adapter", (1, 16, 16), 4), architecture(name, (1, 16, 16), 4)
    weights = model.initial(0)
    own = divided(model, "adapter").own
    assert own
    assert set(bare.spec.params) == set(weights.params) - own
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, without = model.build().eval(), bare.build().eval()
    whole.load_state_dict({**weights.params, **weights.buffers})
    without.load_state_dict({n: t for part in weights for n, t in part.items() if n not in own})
    assert torch.equal(whole(x), without(x))


def test_models_that_cannot_have_adapters() -> None:
    for name, words in (("logistic+adapter", "Sequential"), ("mlp+adapter@0.5", "nested"), ("mpl+adapter", "mlp")):
        with pytest.raises(ConfigError, match=words):
            architecture(name, (1, 8, 8), 4).build()


def test_clients_keep_their_adapters() -> None:
    data = consilience.make_federation("digits", clients=4, partition="shards:3", seed=1)
    result = consilience.run(
        FedAlt(personal="adapter", **USUAL), data, rounds=2, model="mlp:16+adapter", executor="serial", seed=0
    )
    assert not any("adapter" in name for name in result.server.model.params)
    states = list(result.states.values())
    assert all(name.startswith("features.adapter2.") for state in states for name in state.params)
    assert all(bool(state.params["features.adapter2.up.weight"].any()) for state in states)
