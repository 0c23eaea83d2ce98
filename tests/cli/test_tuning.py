"""Trials are judged by validation rows, all of them, and by nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import optuna
import pytest
import torch

from consilience import experiment, methods
from consilience.config import settle
from consilience.core.errors import ConfigError
from consilience.core.training import Search
from consilience.data.federation import ArrayFederation
from consilience.methods.fedavg import FedAvg
from consilience.methods.local import Local
from consilience.simulate import run
from consilience.tuning import Objective, _suggested, common, space, tune, validation_score

OPTIONS = {"clients": 4, "rounds": 2, "model": "mlp:16", "executor": "serial", "partition": "dirichlet:0.3"}


def federation() -> ArrayFederation:
    made = experiment.make_federation(settle(OPTIONS).config)
    assert isinstance(made, ArrayFederation)
    return made


@pytest.mark.parametrize("method", [FedAvg(), Local()])
def test_the_score_is_that_of_a_loop_over_validation_rows(method: FedAvg | Local) -> None:
    fed = federation()
    result = run(method, fed, model="mlp:16", rounds=2, executor="serial")
    right, rows, shares = 0, 0, []
    for client in range(4):
        valid = fed.data(client).valid
        if len(valid):
            predictor = result.worker.deployed(result.server, client, result.states.get(client))
            assert predictor is not None
            scores = result.worker.host(2, "test").scores(predictor, valid.x)
            hits = int((scores.argmax(1) == valid.y).sum())
            right, rows = right + hits, rows + len(valid)
            shares.append(hits / len(valid))
    assert validation_score(result, Objective("clients.mean", False)) == pytest.approx(sum(shares) / len(shares))
    if isinstance(method, FedAvg):
        assert validation_score(result, Objective("global", False)) == pytest.approx(right / rows)


def test_test_rows_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the labels of all test rows changed, every trial has the same value and the same one wins."""
    pytest.importorskip("optuna")
    specs = experiment.specs(settle({**OPTIONS, "seeds": 2}), ["fedavg", "fedprox"])
    made = experiment.make_federation

    def spoiled(config: object) -> ArrayFederation:
        fed = made(config)  # type: ignore[arg-type]
        y = fed.rows.y.clone()
        for client in range(fed.n_clients):
            _, _, start, stop = fed.partition.bounds[client].tolist()
            y[start:stop] = (y[start:stop] + 1) % 10
        test = None if fed.test is None else replace(fed.test, y=(fed.test.y + 1) % 10)
        changed: ArrayFederation = replace(fed, rows=replace(fed.rows, y=y), test=test)
        assert not torch.equal(changed.rows.y, fed.rows.y)
        return changed

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    told: list[str] = []
    first = tune(specs, 3, tmp_path / "a", told.append)
    monkeypatch.setattr(experiment, "make_federation", spoiled)
    second = tune(specs, 3, tmp_path / "b", lambda text: None)
    assert (tmp_path / "a" / "tuning.json").read_text() == (tmp_path / "b" / "tuning.json").read_text()
    assert [spec.options for spec in first] == [spec.options for spec in second]
    assert len(told) == 6
    assert {spec.config.seed for spec in first} == {0, 1}


def test_what_is_searched() -> None:
    plain, fixed = experiment.specs(settle(OPTIONS), ["fedprox", "fedprox:lr=0.1"])
    assert set(space(plain)) == {"lr", "mu"}
    assert set(space(fixed)) == {"mu"}


def test_all_methods_try_the_same_step_sizes(tmp_path: Path) -> None:
    """Whatever else they search, whatever they scored, tuned together or alone; other options are each method's own."""
    pytest.importorskip("optuna")
    specs = experiment.specs(settle({**OPTIONS, "rounds": 1}), ["fedavg", "fedprox", "fedprox:momentum=0.5", "local"])
    (tmp_path / "all").mkdir()
    tune(specs, 4, tmp_path / "all", lambda text: None)
    found = json.loads((tmp_path / "all" / "tuning.json").read_text())["methods"]
    tried = {label: [trial["options"]["lr"] for trial in own["trials"]] for label, own in found.items()}
    assert len(set(tried["fedavg"])) == 4
    assert all(lrs == tried["fedavg"] for lrs in tried.values())
    mus = [[t["options"]["mu"] for t in found[label]["trials"]] for label in ("fedprox", "fedprox:momentum=0.5")]
    assert mus[0][0] == mus[1][0]
    assert not set(mus[0][1:]) & set(mus[1][1:])
    (tmp_path / "alone").mkdir()
    tune(specs[1:2], 2, tmp_path / "alone", lambda text: None)
    alone = json.loads((tmp_path / "alone" / "tuning.json").read_text())["methods"]["fedprox"]["trials"]
    assert [t["options"] for t in alone] == [t["options"] for t in found["fedprox"]["trials"][:2]]


@pytest.mark.parametrize("search", [Search(1e-3, 1.0), Search(2.0, 5.0, log=False)])
def test_what_all_try_is_spread_evenly(search: Search) -> None:
    """Of every first n, no third of the range is left out by 5 or more, and the widest gap is below 2 / n for all n."""
    for seed in range(20):
        values = [common("lr", search, seed, number) for number in range(1, 65)]
        ends = (math.log(search.low), math.log(search.high)) if search.log else (search.low, search.high)
        shares = [((math.log(v) if search.log else v) - ends[0]) / (ends[1] - ends[0]) for v in values]
        assert all(0 <= share <= 1 for share in shares)
        for n in range(5, 65):
            assert {int(min(share, 0.999) * 3) for share in shares[:n]} == {0, 1, 2}
            gaps = [b - a for a, b in pairwise([0.0, *sorted(shares[:n]), 1.0])]
            assert max(gaps) < 2 / n
    assert common("lr", search, 0, 1) != common("lr", search, 1, 1)


@pytest.mark.parametrize("name", methods.NAMES)
def test_every_method_takes_what_is_proposed(name: str) -> None:
    """Options that are whole numbers are proposed as such."""
    cls = methods.get(name)
    for key, field in cls.options().items():
        search = field.metadata.get("search")
        if search is not None:
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
            for _ in range(5):
                value = _suggested(study.ask(), key, search, type(field.default))
                assert search.low <= value <= search.high
                assert type(value) is type(field.default)
                cls.make({key: value})


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'consilience\[tune\]'"):
        tune(experiment.specs(settle(OPTIONS), ["fedavg"]), 2, tmp_path, lambda text: None)
