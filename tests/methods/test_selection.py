"""Who of a round's clients train."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR, LINEAR64, NOISY, SIZES, federation, loop, reply, worker
from torch.nn import functional as F

from consilience import simulate
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.core.method import Method
from consilience.methods import IFCA, Curriculum, FedAvg, FedDisco, FedProx, FedSAM, HeteroFL, Local, Scaffold
from consilience.parts import selection
from consilience.parts.compose import composed
from consilience.parts.selection import Difficulty

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1}


def trained(method: Method, rounds: int = 3, **more: Any) -> Any:
    return loop(worker(composed(method), federation(), NOISY), rounds, **more)


def chosen_by(text: str, losses: list[float], version: int) -> list[int]:
    at = worker(FedAvg(**USUAL), federation())
    told = [reply(10 + i, Difficulty(torch.tensor(x, dtype=torch.float64))) for i, x in enumerate(losses)]
    found = selection.parse(text)
    assert found is not None
    return found.choose(at.host(version, "select"), told)


def test_pools_of_clients() -> None:
    losses = [0.5, 0.1, 0.9, 0.2, 0.7, 0.3]
    assert chosen_by("curriculum:2:step:10:0.4", losses, 0) == [11, 13]
    assert chosen_by("anti:2:step:10:0.4", losses, 0) == [12, 14]
    assert chosen_by("anti:3:step:10:0.4", losses, 0) == [10, 12, 14]  # never fewer than COUNT
    assert chosen_by("curriculum:4:linear:4:0.5", losses, 2) == [10, 11, 13, 15]  # 3 + 3 / 2 of 6
    assert chosen_by("curriculum:9", losses, 0) == [10, 11, 12, 13, 14, 15]
    drawn = {tuple(chosen_by("curriculum:2:linear:4:0.5", losses, version)) for version in range(2, 40)}
    assert {c for pair in drawn for c in pair} == set(range(10, 16))  # all, once the pool is whole
    early = {c for v in range(30) for c in chosen_by("curriculum:2:step:99:0.5", losses, v)}
    assert early == {11, 13, 15}
    assert {c for v in range(30) for c in chosen_by("random:2:step:99:0.5", losses, v)} == set(range(10, 16))


@pytest.mark.parametrize("method", [FedAvg, FedProx, FedSAM, Scaffold])
def test_who_chooses_everybody_changes_nothing_but_what_it_costs(method: Any) -> None:
    plain, picked = trained(method(**USUAL), cohort=3), trained(method(selection="curriculum:3", **USUAL), cohort=3)
    one, two = plain.snapshots[3], picked.snapshots[3]
    assert tr.digest(one.server) == tr.digest(two.server.server)
    assert tr.digest(one.states) == tr.digest(two.states)
    assert one.totals.samples == two.totals.samples
    answer = encoded_size(Difficulty(torch.zeros((), dtype=torch.float64)))
    assert two.totals.bytes_up - one.totals.bytes_up == 9 * answer
    assert two.totals.bytes_down > one.totals.bytes_down
    assert two.totals.flops > one.totals.flops
    assert [line["global"] for line in plain.lines] == [line["global"] for line in picked.lines]


def test_those_with_the_least_losses_train() -> None:
    """By hand, from the global model of each round."""
    method = composed(FedAvg(selection="curriculum:2:step:9:0.1", **USUAL))
    fed = federation(dtype=torch.float64)
    memory = loop(worker(method, fed, LINEAR64), 3)
    for version in range(3):
        start = memory.snapshots[version].server.server.model if version else LINEAR64.initial(0)
        found = []
        for client in range(len(SIZES)):
            data = fed.data(client).train
            scores = data.x @ start.params["head.weight"].T + start.params["head.bias"]
            found.append(float(F.cross_entropy(scores, data.y)))
        assert memory.snapshots[version + 1].server.memory["chosen"] == sorted(np.argsort(found)[:2].tolist())
    spent = memory.snapshots[3].totals.samples
    assert spent == sum(SIZES[c] for v in (1, 2, 3) for c in memory.snapshots[v].server.memory["chosen"])


def test_with_rules_heads_and_local_buffers_on_any_executor() -> None:
    for method in (
        FedProx(weights="fedce", then="ccvr:5", selection="anti:2", **USUAL),
        FedDisco(selection="curriculum:2", buffers="local", **USUAL),
    ):
        found = [
            simulate.run(
                method, federation(), model=NOISY, rounds=4, participation=4, executor=executor, workers=2,
                eval_clients_every=2, **more,
            )
            for executor, more in (("serial", {"schedule": "deadline:1e9", "fleet": "phones"}), ("processes", {}))
        ]  # fmt: skip
        assert tr.digest(found[0].snapshot.server) == tr.digest(found[1].snapshot.server)
        assert found[1].history[-1]["clients"]["after"]["mean"] >= 0
        assert not found[1].refused


def test_local_buffers_outlive_a_question() -> None:
    plain, picked = (
        trained(FedAvg(buffers="local", selection=how, **USUAL)).snapshots[3] for how in ("random", "anti:5")
    )
    assert tr.digest(plain.states) == tr.digest(picked.states)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("curriculum", "COUNT"),
        ("curriculum:0", "COUNT is at least 1"),
        ("anti:3:linear:0:0.4", "ROUNDS above 0"),
        ("anti:3:linear:9", "write random"),
        ("curicculum:3", "did you mean 'curriculum'"),
    ],
)
def test_other_selections_are_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        composed(FedAvg(selection=text))


def test_methods_without_one_model_and_schedules_without_rounds_are_refused() -> None:
    for method in (Local, IFCA, HeteroFL):
        with pytest.raises(ConfigError, match="selection=random"):
            composed(method(selection="curriculum:2"))
    with pytest.raises(ConfigError, match="rounds or deadline"):
        simulate.run(FedAvg(selection="anti:2"), federation(), model=NOISY, rounds=1, schedule="async")


def test_a_loop_goes_on_with_those_who_were_chosen() -> None:
    """And a run that stops between the question and the training goes on to the same bits."""
    whole = trained(FedAvg(selection="anti:2", **USUAL), 4)
    part = trained(FedAvg(selection="anti:2", **USUAL), 2)
    again = trained(FedAvg(selection="anti:2", **USUAL), 4, resume=part.snapshots[2])
    assert tr.digest(again.snapshots[4].server) == tr.digest(whole.snapshots[4].server)


def test_curriculum_is_fedavg_with_its_order() -> None:
    """Bit for bit, and without an order it is FedAvg."""
    usual = {**USUAL, "batch_size": 8}
    fed = federation((80, 96, 60, 70, 90))
    found = [
        tr.digest(loop(worker(method, fed, LINEAR), 3).snapshots[3].server)
        for method in (
            Curriculum(**usual),
            FedAvg(row_order="curriculum:global:linear:0.8:0.2", **usual),
            Curriculum(row_order="curriculum:global:linear:0.8:1", **usual),
            FedAvg(**usual),
        )
    ]
    assert found[0] == found[1]
    assert found[2] == found[3] != found[0]
