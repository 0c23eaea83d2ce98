"""Every fault, in every kind of payload, before every aggregator: the round is that of those who sent none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from payloads import PAYLOADS, honest, place
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.messages import Inbox, Job, ModelUpdate, Reply
from consilience.core.model import Weights
from consilience.core.worker import Worker
from consilience.wire.validate import Validation


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield path, tree
    for key, child in zip(tr.keys_of(tree), tr.children_of(tree) or (), strict=False) if tr.children_of(tree) else ():
        yield from _nodes(child, (*path, key))


def _put(tree: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    children = [
        _put(child, path[1:], new) if key == path[0] else child
        for key, child in zip(tr.keys_of(tree), tr.children_of(tree) or (), strict=True)
    ]
    return tr.rebuild(tree, children)


def _poked(t: Tensor, number: float, at: int = -1) -> Tensor:
    out = t.clone()
    out.view(-1)[at] = number
    return out


OTHER = (
    torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex128,
    torch.bool,
)  # fmt: skip
"""Dtypes that no field has."""


def anything() -> dict[str, Any]:
    """What stands in the place of a tensor, or of a whole update, and is neither."""
    return {
        "none": None, "true": True, "integer": 7, "huge integer": 10**400, "number": 1.0, "nan alone": float("nan"),
        "complex number": 1j, "text": "x", "bytes": b"\x00" * 8, "byte array": bytearray(8), "dict": {},
        "dict of itself": {"x": {"x": {}}}, "list": [1.0], "nothing in a list": [], "set": {1.0}, "pair": (1.0, 2.0),
        "array": np.ones(3), "numpy number": np.float64(1), "slice": slice(0, 1), "type": int, "function": len,
        "model": Weights({}, {}), "message": Inbox({}, {}),
    }  # fmt: skip


def of_tensor(t: Tensor) -> dict[str, Any]:
    """Ways in which a tensor can be wrong."""
    found: dict[str, Any] = {
        **anything(), "longer": torch.cat([t, t]), "shorter": t[:-1], "empty": t[:0], "scalar": t.flatten()[0],
        "deeper": t[None], "deeper inside": t[..., None], "flat": t.flatten()[None, None],
        "one row": t[:1] if len(t) > 1 else t[None], "listed": t.tolist(), "by row": dict(enumerate(t)),
        "rows": tuple(t), "array of it": t.numpy(), "in a list": [t], "in a dict": {"x": t}, "as text": str(t.tolist()),
        "as bytes": t.numpy().tobytes(), "in a model": Weights({"x": t}, {}),
    }  # fmt: skip
    found |= {str(dtype): t.to(dtype) for dtype in OTHER if dtype != t.dtype}
    if t.is_floating_point():
        for name, number in (("nan", float("nan")), ("inf", float("inf")), ("-inf", -float("inf"))):
            found |= {f"{name} {where}": _poked(t, number, at) for where, at in (("first", 0), ("last", -1))}
            found[f"all {name}"] = torch.full_like(t, number)
        both = _poked(_poked(t, float("inf")), -float("inf"), 0)
        found |= {"double": t.double(), "int64": t.long(), "int32": t.int(), "infinities that cancel": both}
        if t.ndim == 2 and t.shape[0] != t.shape[1]:
            found["turned"] = t.T
        if t.ndim == 2:
            found |= {"a column more": torch.cat([t, t[:, :1]], 1), "a column less": t[:, 1:], "no columns": t[:, :0]}
            found["a row more"] = torch.cat([t, t[:1]])
    else:
        found |= {"float": t.float(), "negative": -t - 1, "too large": t + 10**9, "int32": t.int()}
    return found


def of_dict(d: dict[str, Any]) -> dict[str, Any]:
    """Ways in which names can be wrong."""
    first, *_ = d
    return {
        "missing": {k: v for k, v in d.items() if k != first}, "extra": {**d, "else": d[first]},
        "renamed": {f"{k}_": v for k, v in d.items()}, "other order": dict(reversed(d.items())), "nobody": {},
        "numbered": dict(enumerate(d.values())), "as list": list(d.values()), "as none": None,
        "a name twice over": {**d, first.upper(): d[first]}, "pairs": tuple(d.items()), "one in another": {"x": d},
        "bytes for names": {k.encode(): v for k, v in d.items()}, "as text": str(list(d)),
    }  # fmt: skip


def faults(payload: str, client: int) -> dict[str, Any]:
    """At least 60 updates that cannot be, by where and what."""
    good = honest(payload)[client]
    found: dict[str, Any] = {f"update is {name}": bad for name, bad in anything().items() if bad is not None}
    found |= {
        "update is a tensor": torch.ones(3), "update is a bare tuple": tuple(good), "update is its type": type(good),
        "update is its first field": good[0], "update in a list": [good], "update twice": (good, good),
        "update by name": good._asdict(),
    }  # fmt: skip
    if not isinstance(good, ModelUpdate):
        found["update is another's"] = honest("weights")[0]
    for path, node in _nodes(good):
        ways = of_tensor(node) if isinstance(node, Tensor) else of_dict(node) if isinstance(node, dict) and node else {}
        found |= {f"{'.'.join(map(str, path))} {name}": _put(good, path, bad) for name, bad in ways.items()}
    if payload == "sub-models":
        found["another client's"] = honest(payload)[next(c for c in range(4) if _sizes(c) != _sizes(client))]
    if payload == "prototypes":
        found["classes twice"] = good._replace(classes=good.classes * 0)
    for key in ("counts too large", "labels shorter", "labels empty", "labels one row"):
        found.pop(key, None)  # clients may have many rows and few classes
    return found


def _sizes(client: int) -> list[torch.Size]:
    return [t.shape for t in tr.tensors(honest("sub-models")[client])]


def round_of(at: Worker, updates: list[Any]) -> tuple[str, list[Any]]:
    server = at.method.init_server(at.host(0, "init"))
    replies = [
        Reply(Job(i, i, 1, 0, 0, 0), update, at.federation.size(i), 1, 1, 0, 0.0, 0.0)
        for i, update in enumerate(updates)
        if update is not ...
    ]
    good, bad = Validation(at.place)(replies, server)
    new, *_ = at.do_aggregate(None, 0, 0, server, good, [0, 1, 2, 3])
    return tr.digest(new), bad


@pytest.mark.parametrize("offender", [0, 2, 3], ids=["first", "middle", "last"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_fault_costs_its_client_and_nobody_else(payload: str, offender: int) -> None:
    """Whatever an aggregator is given is what it is given without the offender, so each is run with one fault that is
    refused late and one that is refused early, and all faults with the mean."""
    ways = faults(payload, offender)
    assert len(ways) >= 60
    good = list(honest(payload))
    without = [... if i == offender else update for i, update in enumerate(good)]
    expected, none = round_of(place(payload, "mean"), without)
    assert none == []
    for name, bad in ways.items():
        found, refused = round_of(place(payload, "mean"), [*good[:offender], bad, *good[offender + 1 :]])
        assert [r.client for r in refused] == [offender], name
        assert refused[0].field, name
        assert refused[0].reason, name
        assert found == expected, name


@pytest.mark.parametrize("payload", PAYLOADS)
def test_aggregators_never_see_the_offender(payload: str) -> None:
    good = list(honest(payload))
    for aggregator in PAYLOADS[payload][2]:
        at = place(payload, aggregator)
        for offender in (0, 2, 3):
            expected, _ = round_of(at, [... if i == offender else update for i, update in enumerate(good)])
            for name, bad in list(faults(payload, offender).items())[::29]:
                assert round_of(at, [*good[:offender], bad, *good[offender + 1 :]])[0] == expected, (aggregator, name)
