"""InCo: averages by names, and what deep layers borrow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience
from consilience import methods
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.methods import InCo
from consilience.methods.inco import RULES, by_name, mixed, references
from consilience.models import architecture

IMAGE = (1, 8, 8), 10


def run(method: Any, **options: Any) -> consilience.Result:
    federation = consilience.make_federation("digits", clients=4, partition="dirichlet:0.5", seed=1)
    usual = {"model": "resnet8", "rounds": 2, "executor": "serial"}
    return consilience.run(method, federation, **{**usual, **options})


@pytest.mark.parametrize("base", ["fedavg", "fedprox", "scaffold", "moon"])
def test_without_mixing_and_with_one_architecture_it_is_its_base(base: str) -> None:
    options = {"local_steps": 2}
    wrapped = run(methods.make("inco", {"base": base, "mode": "off", **options}))
    plain = run(methods.make(base, {"form": "delta", "weights": "uniform", **options}))
    assert tr.digest(wrapped.server) == tr.digest(plain.server)
    assert {c: tr.digest(s) for c, s in wrapped.states.items()} == {c: tr.digest(s) for c, s in plain.states.items()}


@pytest.mark.parametrize("base", ["fedavg", "fedprox", "scaffold", "moon"])
def test_depths_are_mixed(base: str) -> None:
    deep = {"model": "resnet14", "models": "resnet14,resnet8"}
    result = run(methods.make("inco", {"base": base, "local_steps": 2}), **deep)
    assert not result.refused
    start = result.worker.host(0, "x").initial().params
    end = result.server.model.params
    assert all(not torch.equal(end[name], start[name]) for name in start if end[name].dim() > 1)
    off = run(methods.make("inco", {"base": base, "mode": "off", "local_steps": 2}), **deep)
    assert tr.digest(off.server.model) != tr.digest(result.server.model)


def test_scaffold_s_control_stays_the_mean_of_all() -> None:
    result = run(
        methods.make("inco", {"base": "scaffold", "mode": "off", "local_steps": 2}), model="resnet14",
        models="resnet14,resnet8",
    )  # fmt: skip
    for name, control in result.server.control.items():
        held = [s[name].double() for s in result.states.values() if name in s]
        assert 0 < len(held) <= 4
        torch.testing.assert_close(control.double(), sum(held) / 4, rtol=1e-4, atol=1e-6)


def test_the_base_s_options() -> None:
    made = methods.make("inco", {"base": "fedprox", "base.mu": "0.7"})
    assert made.mu == 0.7  # type: ignore[attr-defined]
    assert made.name == "inco"
    with pytest.raises(ConfigError, match="has no option 'mu'"):
        methods.make("inco", {"mu": 1})
    with pytest.raises(ConfigError, match="one of fedavg, fedprox, scaffold, moon"):
        methods.make("inco", {"base": "dpsgd"})
    with pytest.raises(ConfigError, match=r"methods\.make"):
        InCo(base="scaffold")


def test_models_that_are_no_part_of_the_server_s_are_refused() -> None:
    with pytest.raises(ConfigError, match="give the deepest one as --model"):
        run(InCo(), model="resnet8", models="resnet8,resnet14")


def test_by_name_against_a_naive_mean() -> None:
    rng = np.random.default_rng(0)
    names = [("a", "b"), ("a",), ("a", "b", "c")]
    trees = [{n: torch.from_numpy(rng.standard_normal(3)) for n in own} for own in names]
    found = by_name(trees, [0.5, 0.2, 0.3])
    torch.testing.assert_close(found["a"], 0.5 * trees[0]["a"] + 0.2 * trees[1]["a"] + 0.3 * trees[2]["a"])
    torch.testing.assert_close(found["b"], (0.5 * trees[0]["b"] + 0.3 * trees[2]["b"]) / 0.8)
    torch.testing.assert_close(found["c"], trees[2]["c"])
    assert list(found) == ["a", "b", "c"]


def test_references_are_the_first_of_their_shape_in_a_stage() -> None:
    found = references(architecture("resnet14", *IMAGE).spec.params)
    assert found["features.3.1.body.0.weight"] == "features.3.0.body.0.weight"
    assert found["features.4.1.body.3.weight"] == "features.4.0.body.3.weight"  # the first one takes fewer channels
    assert "features.4.0.body.0.weight" not in found
    assert "head.weight" not in found


@given(st.integers(0, 99))
@settings(deadline=None)
def test_the_theorem_s_rule_is_the_nearest_that_does_not_oppose(seed: int) -> None:
    rng = np.random.default_rng(seed)
    g, first = (torch.from_numpy(rng.standard_normal((3, 4))) for _ in range(2))
    new = RULES["theorem"](g, first)
    assert float((new * first).sum()) >= -1e-9
    if float((g * first).sum()) >= 0:
        assert torch.equal(new, g)
    other = g + 0.1 * torch.from_numpy(rng.standard_normal((3, 4)))
    if float((other * first).sum()) >= 0:
        assert float((new - g).norm()) <= float((other - g).norm()) + 1e-9


def test_the_other_rules_against_naive_ones() -> None:
    rng = np.random.default_rng(0)
    g, first = (torch.from_numpy(0.05 * rng.standard_normal((2, 3, 3, 3))) for _ in range(2))
    a, b = float((first * first).sum()), float((first * g).sum())
    both = (float(g.norm()) + float(first.norm())) / 2
    naive = (g / g.norm() - b / a * first / first.norm()) * both
    torch.testing.assert_close(RULES["text"](g, first), naive)
    new = RULES["repo"](g, first)
    for i in range(2):
        for j in range(3):
            u, v = g[i, j], first[i, j]
            theta = min(5.0, abs(float((u * v).sum())) / float((v * v).sum()))
            kernel = (u / u.norm() + theta * v / v.norm()) * (u.norm() + v.norm()) / 2
            torch.testing.assert_close(new[i, j], kernel.clamp(-0.1, 0.1))
    zero = torch.zeros_like(g)
    for rule in RULES.values():
        assert torch.equal(rule(g, zero), g.clamp(-0.1, 0.1) if rule is RULES["repo"] else g)
        assert torch.isfinite(rule(zero, first)).all()
    first_name, second_name = (f"features.3.{block}.body.0.weight" for block in (0, 1))
    changes = {first_name: first, second_name: g, "features.3.1.body.1.bias": g[0, 0]}
    done = mixed(changes, "text")
    assert torch.equal(done[first_name], first)
    assert not torch.equal(done[second_name], g)
    assert mixed(changes, "off") == changes
