"""Aggregators of TorchJD."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, SIZES, federation, loop, site, worker
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Broadcast, DeltaUpdate
from consilience.methods import FedAvg
from consilience.parts import aggregators
from consilience.parts.compose import composed
from consilience.parts.jacobian import NAMES


def together(name: str, rows: Any, shares: Any = None, seed: int = 0) -> np.ndarray:
    """What an aggregator makes of differences, each in two tensors."""
    how = aggregators.parse(f"torchjd:{name}")
    assert how is not None
    updates = [
        DeltaUpdate(
            {"a": torch.tensor(row[:1], dtype=torch.float64), "b": torch.tensor(row[1:], dtype=torch.float64)},
            {"n": torch.tensor(i)},
        )
        for i, row in enumerate(np.asarray(rows, dtype=float).tolist())
    ]
    shares = [1 / len(rows)] * len(rows) if shares is None else list(shares)
    made = how.combine(updates, {"delta": shares, "buffers": shares}, np.random.default_rng(seed))
    return np.array(made.delta["a"].tolist() + made.delta["b"].tolist())


def pcgrad(rows: np.ndarray) -> np.ndarray:
    """Two rows: each without what it has against the other (Yu et al., 2020), and their mean."""
    g, h = rows
    dot = min(float(g @ h), 0.0)
    return ((g - dot / (h @ h) * h) + (h - dot / (g @ g) * g)) / 2


def test_known_values() -> None:
    rows = np.array([[-4.0, 1, 1], [6, 1, 1]])
    np.testing.assert_allclose(together("pcgrad", rows), [0.2924, 1.9006, 1.9006], atol=1e-4)
    np.testing.assert_allclose(together("imtlg", rows), [0.0767, 1, 1], atol=1e-4)
    np.testing.assert_allclose(
        together("alignedmtl", rows)[1:] / together("alignedmtl", rows)[0], [4.535] * 2, atol=1e-2
    )


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_pcgrad_of_two_is_a_naive_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2, 5))
    np.testing.assert_allclose(together("pcgrad", rows), pcgrad(rows), atol=1e-9)
    p = rng.dirichlet([2.0, 2.0])
    np.testing.assert_allclose(together("pcgrad", rows, p), pcgrad(2 * p[:, None] * rows), atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_clients_who_agree_get_what_they_agree_on(name: str) -> None:
    row = [0.5, -2.0, 1.0]
    np.testing.assert_allclose(together(name, [row] * 4), row, rtol=1e-3)
    np.testing.assert_allclose(2 * together(name, [row] * 4), together(name, [[2 * x for x in row]] * 4), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_comes_from_the_round_alone(name: str) -> None:
    rows = np.random.default_rng(1).normal(size=(6, 3))
    before = torch.get_rng_state()
    one = together(name, rows, seed=3)
    torch.rand(7)
    assert together(name, rows, seed=3).tobytes() == one.tobytes()
    torch.set_rng_state(before)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = {together(name, rows, seed=seed).tobytes() for seed in range(8)}
    assert (len(drawn) > 1) == (name in ("graddrop", "gradvac", "pcgrad"))


def test_a_run_with_one_is_that_of_the_rule_by_hand() -> None:
    method = FedAvg(aggregator="torchjd:pcgrad", weights="uniform", batch_size=4, lr=0.1)
    found = loop(worker(composed(method), federation(SIZES[:2], dtype=torch.float64), LINEAR64), 1).snapshots[1].server
    start = LINEAR64.initial(0)
    alone = worker(FedAvg(batch_size=4, lr=0.1, form="delta"), federation(SIZES[:2], dtype=torch.float64), LINEAR64)
    moved = []
    for client in range(2):
        update, _ = alone.method.client_update(alone.program[0], site(alone, client), Broadcast(start), None)
        moved.append(torch.cat([t.flatten() for t in tr.tensors(update.delta)]).numpy())
    own = torch.cat([t.flatten() for t in tr.tensors(tr.sub(found.model.params, start.params))]).numpy()
    np.testing.assert_allclose(own, pcgrad(np.stack(moved)), atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchjd", "NAME one of alignedmtl"),
        ("torchjd:pcgrd", "did you mean 'pcgrad'"),
        ("torchjd:pcgrad:3", "NAME one of"),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aggregators.parse(text)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ConfigError, match=r"pip install 'consilience\[jacobian\]'"):
        aggregators.parse("torchjd:pcgrad")
