"""What is refused before it is added to anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import NORMED, federation, loop, reply, worker

from consilience.core import tree as tr
from consilience.core.messages import DeltaUpdate, Kind, ModelUpdate, Refusal, kinds
from consilience.core.model import Weights
from consilience.core.reduce import weighted_sum
from consilience.methods.fedavg import FedAvg
from consilience.methods.scaffold import Scaffold, Up
from consilience.wire.validate import Validation

GOOD = NORMED.initial(0)
NAME = "features.0.weight"
STAT = "features.1.running_mean"


def made(kind: str, params: Any = None, buffers: Any = None) -> Any:
    """An update whose first part holds ``params``, beside good ones."""
    params = GOOD.params if params is None else params
    buffers = GOOD.buffers if buffers is None else buffers
    if kind == "model":
        return ModelUpdate(Weights(params, buffers))
    if kind == "delta":
        return DeltaUpdate(params, buffers)
    if kind == "up":
        return Up(params, GOOD.params, buffers)
    return Up(GOOD.params, params, buffers)


METHODS = {"model": FedAvg(), "delta": FedAvg(form="delta"), "up": Scaffold(), "control": Scaffold()}
FIELD = {"model": "model", "delta": "delta", "up": "delta", "control": "control"}
PATH = {"model": "model.params", "delta": "delta", "up": "delta", "control": "control"}


def check(kind: str, update: Any) -> list[Refusal]:
    stage = Validation(worker(METHODS[kind], model=NORMED).place)
    good, bad = stage([reply(0, made(kind)), reply(3, update)], None)
    assert [r.job.client for r in good] == [0] if bad else [0, 3]
    assert all(refusal.client == 3 for refusal in bad)
    return bad


def changed(params: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**params, name: value}


def poked(tensor: torch.Tensor, number: float) -> torch.Tensor:
    out = tensor.clone()
    out.view(-1)[-1] = number
    return out


W = GOOD.params[NAME]
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "wrong key": ({**{k: v for k, v in GOOD.params.items() if k != NAME}, "else": W}, "", ""),
    "missing": ({k: v for k, v in GOOD.params.items() if k != NAME}, NAME, "missing"),
    "extra": (changed(GOOD.params, "else", W), "else", "not a parameter"),
    "shape": (changed(GOOD.params, NAME, W.T), NAME, "shape"),
    "broadcast": (changed(GOOD.params, NAME, W[:1]), NAME, "shape"),
    "dtype": (changed(GOOD.params, NAME, W.double()), NAME, "dtype"),
    "no tensor": (changed(GOOD.params, NAME, 1.0), NAME, "shape"),
    "nan": (changed(GOOD.params, NAME, poked(W, float("nan"))), NAME, "finite"),
    "inf": (changed(GOOD.params, NAME, poked(W, float("inf"))), NAME, "finite"),
    "-inf": (changed(GOOD.params, NAME, poked(poked(W, float("inf")).flip(0), -float("inf"))), NAME, "finite"),
}
kinds_of_update = pytest.mark.parametrize("kind", ["model", "delta", "up", "control"])


@kinds_of_update
@pytest.mark.parametrize("case", BAD)
def test_bad_parameters_are_refused_by_name(kind: str, case: str) -> None:
    params, name, reason = BAD[case]
    (refusal,) = check(kind, made(kind, params))
    where = PATH[kind] if case in ("nan", "inf", "-inf") else FIELD[kind]
    if name:
        assert refusal.field == f"{where}.{name}"
    assert reason in refusal.reason


@kinds_of_update
def test_good_updates_pass_even_where_their_sum_overflows(kind: str) -> None:
    assert check(kind, made(kind)) == []
    huge = {name: torch.full_like(p, 3e38) for name, p in GOOD.params.items()}
    assert check(kind, made(kind, huge)) == []


@kinds_of_update
@pytest.mark.parametrize(
    "buffers",
    [
        {},
        {STAT: GOOD.buffers[STAT]},
        changed(GOOD.buffers, STAT, torch.zeros(1)),
        changed(GOOD.buffers, STAT, torch.zeros(6, dtype=torch.float64)),
        changed(GOOD.buffers, STAT, torch.full((6,), float("nan"))),
        changed(GOOD.buffers, "else", torch.zeros(1)),
    ],
    ids=["none", "missing", "shape", "dtype", "nan", "extra"],
)
def test_bad_buffers_are_refused(kind: str, buffers: dict[str, Any]) -> None:
    (refusal,) = check(kind, made(kind, None, buffers))
    assert any(word in refusal.field for word in ("buffers", "features.1.", "else"))


def test_another_message_or_field_type_is_refused() -> None:
    whole = [None, {}, 3.0, "x", GOOD]
    for kind, update in (
        *((kind, update) for kind in METHODS for update in whole),
        ("model", ModelUpdate(GOOD.params)),  # type: ignore[arg-type]
        ("model", ModelUpdate(None)),  # type: ignore[arg-type]
        ("model", made("delta")),
        ("delta", made("model")),
        ("delta", DeltaUpdate(None, GOOD.buffers)),  # type: ignore[arg-type]
        ("delta", DeltaUpdate(list(GOOD.params.values()), GOOD.buffers)),  # type: ignore[arg-type]
        ("up", Up(GOOD.params, None, GOOD.buffers)),  # type: ignore[arg-type]
    ):
        assert len(check(kind, update)) == 1, (kind, type(update).__name__)


@kinds_of_update
def test_another_order_of_names_does_no_harm(kind: str) -> None:
    turned = made(kind, dict(reversed(GOOD.params.items())))
    stage = Validation(worker(METHODS[kind], model=NORMED).place)
    good, bad = stage([reply(0, made(kind)), reply(3, turned)], None)
    if bad:
        return  # refusing is as good as understanding
    mean = weighted_sum([r.update for r in good], [0.5, 0.5])
    assert tr.digest(mean) == tr.digest(weighted_sum([made(kind)] * 2, [0.5, 0.5]))


def test_kinds_of_fields() -> None:
    assert kinds(ModelUpdate) == {"model": Kind.MODEL}
    assert kinds(Up)["delta"] is Kind.DELTA
    assert kinds(Up)["control"] is Kind.CONTROL


def test_buffers_that_stay_at_clients_are_not_missed() -> None:
    for method in (FedAvg(buffers="local"), FedAvg(buffers="local", form="delta")):
        assert loop(worker(method, federation(), NORMED), 1).dropped == []
