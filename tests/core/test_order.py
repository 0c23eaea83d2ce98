"""The order in which rows are used: pools, whose losses count, and what stays as it is."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, NOISY, federation, loop, site, worker
from torch.nn import functional as F

from consilience import simulate
from consilience.core import order
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.fit import Plan, shuffled
from consilience.core.method import Method
from consilience.core.model import Weights
from consilience.core.snapshot import Snapshot
from consilience.methods import APFL, FML, Centralised, FedASMU, FedAvg, FedProx, Scaffold

SIZES = (50, 70, 41, 90, 33)
USUAL: dict[str, Any] = {"lr": 0.1, "batch_size": 8, "local_epochs": 2}


def trained(method: Method, rounds: int = 3, **more: Any) -> Snapshot:
    return loop(worker(method, federation(SIZES), NOISY), rounds, cohort=3, **more).snapshots[rounds]


def model_digest(method: Method) -> str:
    return tr.digest(trained(method).server)


# --- pools and batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pacing", order.PACINGS)
@pytest.mark.parametrize(("a", "b"), [(0.8, 0.2), (0.5, 0.9), (1.0, 0.01)])
def test_pools_grow_from_b_n_to_n_at_a_of_the_steps(pacing: str, a: float, b: float) -> None:
    n, total = 1000, 50
    size = order.parse(f"curriculum:{pacing}:{a}:{b}").pool(n, total)
    sizes = [size(step) for step in range(total + 1)]
    assert sizes == sorted(sizes)
    assert sizes[0] == max(int(b * n), 32)
    assert size(int(a * total)) == n > size(int(a * total) - 1)
    middle = int(a * total) // 2
    share = {"linear": middle / (a * total), "root": (middle / (a * total)) ** 0.5, "step": 0.0}[pacing]
    assert size(middle) == max(int(b * n + (n - b * n) * share), 32)
    assert order.parse("anti:0.5:0.1").pool(20, 10)(0) == 20


def test_a_whole_pool_gives_the_usual_batches() -> None:
    for n, batch_size in ((23, 5), (20, 5), (3, 8)):
        plain = shuffled(np.random.default_rng(3), n, batch_size)
        ranked = torch.from_numpy(np.random.default_rng(4).permutation(n))
        paced = order.paced(np.random.default_rng(3), ranked, lambda step, n=n: n, batch_size)  # type: ignore[misc]
        for one, two in islice(zip(plain, paced, strict=False), 17):
            assert torch.equal(one, two)


def test_batches_are_drawn_from_the_pool_in_passes() -> None:
    n, ranked, sizes = 23, torch.arange(22, -1, -1), []

    def pool(step: int) -> int:
        sizes.append((step, min(n, 7 + 3 * step)))
        return sizes[-1][1]

    made = list(islice(order.paced(np.random.default_rng(0), ranked, pool, 5), 14))
    assert [len(batch) for batch in made] == [5, 5, 5, 5, 3] * 2 + [5, 5, 5, 5]
    drawn, at = torch.cat(made).tolist(), 0
    for _, size in sizes:
        taken = drawn[at : at + size]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(ranked[:size].tolist())
        at += size
    assert [step for step, _ in sizes][:3] == [0, 1, 3]  # after 7 rows within the second batch, after 17 in the fourth


def test_orders_by_loss() -> None:
    losses = torch.tensor([0.5, 0.1, 0.5, 3.0, 0.0])
    assert order.parse("curriculum").sorted(losses).tolist() == [4, 1, 0, 2, 3]
    assert order.parse("anti").sorted(losses).tolist() == [3, 2, 0, 1, 4]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("curicculum", "did you mean 'curriculum'"),
        ("curriculum:0.8", "write random, or KIND"),
        ("curriculum:mine", "write random, or KIND"),
        ("anti:global:root:0:0.2", "above 0"),
        ("anti:root:0.5:1.1", "in \\(0, 1\\]"),
        ("random:global", "write random, or KIND"),
    ],
)
def test_other_orders_are_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FedAvg(row_order=text)


@pytest.mark.parametrize("method", [Centralised, FedASMU])
def test_methods_with_batches_of_their_own_say_so(method: Any) -> None:
    method(row_order="random")
    method(row_order="curriculum:1:1")
    with pytest.raises(ConfigError, match="use row_order=random"):
        method(row_order="curriculum")


# --- in training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FedAvg, FedProx, Scaffold])
def test_with_all_rows_from_the_beginning_any_order_is_plain_training(method: Any) -> None:
    plain = trained(method(**USUAL))
    for text in ("random:root:0.5:1", "curriculum:local:linear:0.8:1"):
        found = trained(method(row_order=text, **USUAL))
        assert tr.digest(found.server, found.states) == tr.digest(plain.server, plain.states)
        assert found.totals == plain.totals
    ends = {model_digest(method(row_order=text, **USUAL)) for text in ("curriculum", "anti", "random:0.8:0.2")}
    assert len(ends | {tr.digest(plain.server)}) == 4


def losses_of(weights: Weights, data: Any) -> np.ndarray:
    scores = data.x @ weights.params["head.weight"].T + weights.params["head.bias"]
    found: np.ndarray = F.cross_entropy(scores, data.y, reduction="none").numpy()
    return found


@pytest.mark.parametrize("score", order.SCORES)
@pytest.mark.parametrize("kind", ["curriculum", "anti"])
def test_rows_come_by_the_loss_that_was_asked_for(kind: str, score: str) -> None:
    """Of n = 90 rows the first pass is over the 32 with the least, or greatest, losses."""
    method = FedAvg(row_order=f"{kind}:{score}:step:0.9:0.2", **USUAL)
    at = site(worker(method, federation(SIZES, dtype=torch.float64), LINEAR64), client=3)
    start, last = at.initial(), at.initial(component=1)
    at.before = last
    seen: list[int] = []

    def step(params: Any, grad: Any, batch: Any, carry: Any) -> Any:
        seen.extend(batch.rows.tolist())
        return grad(), carry

    fit = at.fit(start, step=step)
    g, own = losses_of(start, at.train), losses_of(last, at.train)
    ranks = np.argsort({"global": g, "local": own, "both": g + own}[score])
    easy = ranks if kind == "curriculum" else ranks[::-1]
    assert sorted(seen[:32]) == sorted(easy[:32].tolist())
    assert set(seen[:128]) == set(easy[:32].tolist())
    assert (fit.steps, fit.samples) == (24, 180)
    assert np.argsort(g).tolist() != np.argsort(own).tolist()
    at.before = None  # never trained: by the model that it got
    seen.clear()
    at.fit(start, step=step)
    assert sorted(seen[:32]) == sorted((np.argsort(g * (1 if kind == "curriculum" else -1)))[:32].tolist())


def test_only_the_training_itself_is_ordered() -> None:
    at = site(worker(FedAvg(row_order="curriculum", **USUAL), federation(SIZES), NOISY), client=3)
    plain = site(worker(FedAvg(**USUAL), federation(SIZES), NOISY), client=3)
    start, other = at.initial(), at.train.rows(slice(0, 60))

    def digests(place: Any) -> list[str]:
        plans = (Plan(), Plan(purpose="side"), Plan(data=other), Plan(batches=[torch.arange(4)]))
        return [tr.digest(place.fit(start, plan).weights) for plan in plans]

    found, wanted = digests(at), digests(plain)
    assert found[0] != wanted[0]
    assert found[1:] == wanted[1:]


def test_a_client_keeps_its_last_model_where_that_is_what_scores_rows() -> None:
    method = FedAvg(row_order="curriculum:local", **USUAL)
    at = worker(method, federation(SIZES), NOISY)
    message = method.broadcast(at.program[0], method.init_server(at.host(0, "init")), None)  # type: ignore[arg-type]
    work, state = at.do_train(message, site(at, 3).job, None)
    assert tr.digest(state.trained) == tr.digest(work.update.model)
    job = site(at, 3, number=2).job
    one, _ = at.do_train(message, job, state)
    two, _ = at.do_train(message, job, state._replace(trained=message.model))
    assert tr.digest(one.update) != tr.digest(two.update)
    kept = trained(FedAvg(row_order="curriculum:global", **USUAL)).states
    assert all(state is None for state in kept.values())


def test_orders_cost_a_pass_and_no_steps_and_judging_changes_nothing() -> None:
    plain, ordered = trained(FedAvg(**USUAL)), trained(FedAvg(row_order="curriculum:both", **USUAL))
    assert ordered.totals._replace(flops=0.0) == plain.totals._replace(flops=0.0)
    assert ordered.totals.flops > plain.totals.flops
    runs = [
        simulate.run(
            FedAvg(row_order="anti:local", **USUAL), federation(SIZES), model=NOISY, rounds=4, participation=3,
            executor=executor, workers=2, eval_clients_every=every,
        )
        for executor, every in (("serial", 1), ("processes", 4))
    ]  # fmt: skip
    assert tr.digest(runs[0].snapshot.server) == tr.digest(runs[1].snapshot.server)
    assert tr.digest(runs[0].snapshot.states) == tr.digest(runs[1].snapshot.states)


@pytest.mark.parametrize("method", [FML, APFL])
def test_several_models_that_train_together_have_no_order(method: Any) -> None:
    with pytest.raises(ConfigError, match="rows cannot be ordered"):
        trained(method(row_order="curriculum", **USUAL), 1)
