"""Runs with central privacy: reductions, noise, the ledger, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from consilience.core import tree as tr
from consilience.core.errors import CheckpointError, ConfigError, ConsilienceError, NeedsError
from consilience.core.messages import DeltaUpdate, Job, Reply
from consilience.methods import make
from consilience.privacy.central import Central, State
from consilience.privacy.clip import Clip, parse
from consilience.privacy.ledger import Ledger
from consilience.privacy.mechanism import Fixed, Mechanism, Poisson, Tree
from consilience.privacy.options import Privacy
from consilience.simulate import Result, run

OFF = Privacy(noise=0.0, clip="inf", mechanism="fixed")


def result(name: str, privacy: Privacy | None = None, **more: Any) -> Result:
    options = more.pop("options", {})
    kept = {"rounds": 3, "model": "mlp:8", "executor": "serial", "eval_clients_every": 0, **more}
    if privacy is not None:
        kept["privacy"] = privacy
    return run(make(name, {"local_steps": 2, **options}), helpers.federation(), **kept)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedprox", "scaffold", "fedadam", "fedrep", "fedmoswa"])
def test_without_noise_and_clipping_it_is_the_uniform_method(name: str) -> None:
    plain = result(name, options={"weights": "uniform", "form": "delta"})
    private = result(name, OFF)
    assert private.digest.split("\n")[:2] == plain.digest.split("\n")[:2]


@pytest.mark.parametrize("mechanism", ["poisson", "fixed", "tree"])
def test_same_bits_on_any_executor(mechanism: str) -> None:
    asked = Privacy(noise=1.0, mechanism=mechanism, clip="layers:0.5")
    one = result("fedavg", asked, participation=2)
    two = result("fedavg", asked, participation=2, executor="processes", workers=2)
    assert one.digest == two.digest


def test_an_empty_cohort_is_a_round() -> None:
    """With 1 of 5 clients a round, nobody comes in a third of the rounds; noise is released all the same."""
    asked = Privacy(noise=1.0)
    done = result("fedavg", asked, participation=1, rounds=12)
    assert [line["round"] for line in done.history] == list(range(1, 13))
    idle = [b["samples"] == a["samples"] for a, b in zip(done.history, done.history[1:], strict=False)]
    assert any(idle)
    spent = [line["privacy"]["epsilon"] for line in done.history]
    assert spent == sorted(spent)
    assert len(set(spent)) == 12
    assert all("train_loss" not in line for line in done.history)


def test_epsilon_is_kept() -> None:
    done = result("fedavg", Privacy(epsilon=3.0, delta=1e-5), participation=2, rounds=4)
    last = done.history[-1]["privacy"]
    assert 2.95 < last["epsilon"] <= 3.0
    assert last["delta"] == 1e-5


# --- one release ----------------------------------------------------------------------------------------------------


def central(
    mechanism: Mechanism, *, noise: float, clip: str = "1.0", ledger: Ledger | None = None, size: int = 4
) -> Central:
    rule = parse(clip)
    shape = {"delta": {"w": torch.zeros(size), "b": torch.zeros(())}, "buffers": {}}
    share = 1 / mechanism.cohort
    return Central(
        DeltaUpdate, mechanism, rule, noise, 1e-5, {"delta": share, "buffers": share}, shape, ledger or Ledger(), "s"
    )


def replies(*values: float, size: int = 4) -> list[Reply]:
    nothing = (9, 0, 0, 0, 0.0, 0.5)
    return [
        Reply(Job(i, i, 1, 0, 0, 0), DeltaUpdate({"w": torch.full((size,), v), "b": torch.tensor(v)}, {}), *nothing)
        for i, v in enumerate(values)
    ]


def flat(update: Any) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tr.tensors(update.delta)])


@pytest.mark.parametrize("clip", ["1.0", "layers:1.0", "dim:1.0", "normalise:1.0"])
def test_nobody_moves_the_sum_further_than_the_bound(clip: str) -> None:
    release = central(Poisson(20, 4, 1), noise=0.0, clip=clip)
    others = replies(0.1, -3.0, 1e30)
    base = flat(release(others, [], 0, release.init()).update)
    for value in (5.0, -1e38, float("inf"), float("nan"), 0.0):
        moved = flat(release([*others, replies(value)[0]], [], 0, release.init()).update) - base
        assert float(moved.norm()) <= 0.25 * (1 + 1e-5)  # C / m


def test_noise_has_the_variance_that_is_accounted() -> None:
    release = central(Poisson(100, 8, 1), noise=1.5, clip="0.7", size=200_000)
    drawn = flat(release([], [], 0, release.init()).update)
    assert float(drawn.std()) == pytest.approx(1.5 * 0.7 / 8, rel=0.01)
    again = flat(release([], [], 1, release.init()).update)
    assert abs(float(torch.corrcoef(torch.stack([drawn, again]))[0, 1])) < 0.02


def test_noise_is_never_used_twice() -> None:
    """The same sums get the same noise, which tells nothing new; other sums, bounds or rounds get other noise."""
    release = central(Poisson(20, 4, 1), noise=1.0)
    first = release(replies(0.1), [], 0, State(1.0))
    assert torch.equal(flat(first.update), flat(release(replies(0.1), [], 0, State(1.0)).update))
    quiet = central(Poisson(20, 4, 1), noise=0.0)

    def noise(values: tuple[float, ...], version: int, norm: float) -> torch.Tensor:
        noised = flat(release(replies(*values), [], version, State(norm)).update)
        return (noised - flat(quiet(replies(*values), [], version, State(norm)).update)) / norm

    seen = [
        noise(*case)
        for case in (((0.1,), 0, 1.0), ((0.1000001,), 0, 1.0), ((0.1,), 1, 1.0), ((0.1,), 0, 2.0), ((), 0, 1.0))
    ]
    for i, drawn in enumerate(seen):
        assert not any(torch.allclose(drawn, other, atol=1e-3) for other in seen[:i])


def test_a_tree_gives_prefix_sums_with_few_nodes() -> None:
    """Prefix sums of eight rounds: the noise in prefix t has as many nodes' variance as t has bits set."""
    size = 50_000
    release = central(Tree(80, 10, 8), noise=1.0, size=size)
    state, total = release.init(), torch.zeros(size + 1)
    for t in range(1, 9):
        update, state, *_ = release([], [], t - 1, state)
        total = total + flat(update)
        assert float(total.std()) == pytest.approx(0.1 * t.bit_count() ** 0.5, rel=0.03), t
        assert len(state.nodes) == t.bit_count()
    again = release([], [], 8, state)  # another epoch, another tree
    assert len(again.state.nodes) == 1
    assert float(flat(again.update).std()) == pytest.approx(0.1, rel=0.03)


def test_the_adaptive_bound_finds_the_quantile() -> None:
    release = central(Poisson(200, 100, 1), noise=0.5, clip="adaptive:0.5:0.01")
    assert release.multiplier**-2 + (2 * release.count_noise) ** -2 == pytest.approx(0.5**-2)
    state = release.init()
    values = np.linspace(0.1, 2.0, 100) / 5**0.5  # of five numbers
    for version in range(80):
        state = release(replies(*values), [], version, state).state
    assert state.norm == pytest.approx(1.05, rel=0.2)


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_the_ledger_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    release = central(Poisson(20, 4, 5), noise=1.0, ledger=Ledger(path))
    release(replies(0.1), [], 0, State(1.0))
    release(replies(0.1), [], 1, State(1.0))
    with path.open("a") as file:
        file.write('{"round": 3, "rel')  # killed while writing
    found = Ledger(path)
    assert found.spent(9) == (2, 0)
    resumed = central(Poisson(20, 4, 5), noise=1.0, ledger=found)
    resumed(replies(0.1), [], 1, State(1.0))  # made again, the same
    assert found.spent(9) == (2, 0)
    resumed(replies(0.2), [], 1, State(1.0))  # made again, and other
    assert found.spent(9) == (2, 1)
    assert resumed.report(2, State(1.0))["epsilon"] > release.mechanism.epsilon(1.0, 3, 1e-5)
    assert len(path.read_text().splitlines()) == 3
    path.write_text('{"round": 1}\n')
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        Ledger(path)


def test_a_budget_is_never_passed() -> None:
    release = dataclasses.replace(central(Poisson(20, 4, 1), noise=1.0), budget=Poisson(20, 4, 1).epsilon(1.0, 1, 1e-5))
    release(replies(0.1), [], 0, State(1.0))
    with pytest.raises(ConsilienceError, match="budget is used up"):
        release(replies(0.2), [], 0, State(1.0))


def _killed(folder: str) -> None:
    def stop(line: dict[str, Any]) -> None:
        if line["round"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    result("scaffold", Privacy(noise=1.0, clip="adaptive:0.5"), participation=3, rounds=6, checkpoint_every=3,
           out=folder, on_line=stop)  # fmt: skip


def test_a_killed_run_goes_on_with_what_it_spent(tmp_path: Path) -> None:
    asked = Privacy(noise=1.0, clip="adaptive:0.5")
    more: dict[str, Any] = {"participation": 3, "rounds": 6, "checkpoint_every": 3}
    whole = result("scaffold", asked, out=tmp_path / "whole", **more)
    child = multiprocessing.get_context("spawn").Process(target=_killed, args=(str(tmp_path / "cut"),))
    child.start()
    child.join(500)
    assert child.exitcode == -signal.SIGKILL
    ledger = tmp_path / "cut" / "privacy.jsonl"
    before = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len(before) >= 4  # more than the checkpoint knows
    resumed = result("scaffold", asked, out=tmp_path / "cut", resume=True, **more)
    assert resumed.digest == whole.digest
    assert ledger.read_text() == (tmp_path / "whole" / "privacy.jsonl").read_text()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("fednova", {}, "not only their sum"),
        ("fedavg", {"options": {"aggregator": "median"}}, "not only their sum"),
        ("fedavg", {"options": {"weights": "fedau"}}, "weights=fedau"),
        ("fml", {}, "whole models"),
        ("lgfedavg", {"model": "mlp"}, "no difference"),
        ("fedavg", {"schedule": "buffered:2"}, "--schedule rounds"),
        ("fedavg", {"availability": "bernoulli:0.5"}, "--availability always"),
    ],
)
def test_what_privacy_does_not_cover_is_refused(name: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises((NeedsError, ConfigError), match=why):
        result(name, Privacy(noise=1.0), **more)


def test_buffers_are_refused_or_stay_at_home() -> None:
    with pytest.raises(NeedsError, match="--buffers local"):
        result("fedavg", Privacy(noise=1.0), model=batch)
    done = result("fedavg", Privacy(noise=1.0), model=batch, options={"buffers": "local"})
    assert torch.equal(done.server.model.buffers["1.running_mean"], torch.zeros(4))


def batch(shape: tuple[int, ...], outputs: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(shape[0], 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, outputs))


def test_options_that_make_no_sense() -> None:
    for options, why in (
        ({"epsilon": 1.0, "noise": 1.0}, "one of them"), ({"epsilon": -1.0}, "--epsilon"), ({"delta": 1.0}, "--delta"),
        ({"noise": -1.0}, "--noise"), ({"epsilon": 1.0, "clip": "inf"}, "clips nothing"),
        ({"mechanism": "shuffle"}, "--dp-mechanism"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            Privacy(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weights=samples"):
        Privacy(epsilon=1.0).check({"weights": "samples"})
    with pytest.raises(ConfigError, match="within a tree"):
        result("fedavg", Privacy(noise=1.0, clip="adaptive:0.5", mechanism="tree"))
    assert Clip() == parse("1.0")
    assert Fixed(10, 2, 1).epsilon(1.0, 1, 1e-5) > Poisson(10, 2, 1).epsilon(1.0, 1, 1e-5)


def test_a_budget_for_other_rounds_is_not_gone_on_with(tmp_path: Path) -> None:
    """The noise was found for as many rounds as were planned."""
    asked = Privacy(epsilon=3.0, delta=1e-5, mechanism="fixed")
    result("fedavg", asked, rounds=2, out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="began with another"):
        result("fedavg", asked, rounds=8, out=tmp_path / "run", resume=True)
