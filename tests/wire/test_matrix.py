"""Every fault, in every kind of payload, before every aggregator: the round is that of those who sent none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import consilience
from consilience import simulate
from consilience.core import tree as tr
from consilience.core.messages import Job, ModelUpdate, Reply
from consilience.core.worker import Worker
from consilience.methods import FedAvg, FedMD, FedProto, HeteroFL, Scaffold
from consilience.parts.compose import composed
from consilience.wire.validate import Validation

ROBUST = (
    "mean",
    "median",
    "trimmed:0.25",
    "krum:0.2",
    "multikrum:0.2",
    "rfa",
    "cclip",
    "bucketing:2+krum:0.2",
    "nnm:0.2+rfa",
)
PAYLOADS: dict[str, tuple[Callable[[str], Any], dict[str, Any], tuple[str, ...]]] = {
    "weights": (lambda a: FedAvg(aggregator=a), {}, ROBUST),
    "deltas": (lambda a: FedAvg(form="delta", aggregator=a), {}, (*ROBUST, "upgrad", "mgda")),
    "logits": (lambda a: FedMD(aggregator=a), {}, ROBUST),
    "prototypes": (lambda a: FedProto(aggregator=a), {}, ROBUST),
    "sub-models": (lambda a: HeteroFL(), {"models": "mlp:8@1.0,0.5"}, ("mean",)),
    "controls": (lambda a: Scaffold(aggregator=a), {}, (*ROBUST, "upgrad", "mgda")),
}
"""A method that sends each kind, the options of its run, and what may combine it."""


@cache
def place(payload: str, aggregator: str) -> Worker:
    made, options, _ = PAYLOADS[payload]
    fed = consilience.make_federation("digits", clients=4, public=12, seed=0)
    return simulate.prepare(composed(made(aggregator)), fed, **{"model": "mlp:8", **options})


@cache
def honest(payload: str) -> tuple[Any, ...]:
    """What four clients send in the first round."""
    at = place(payload, "mean")
    server = at.method.init_server(at.host(0, "init"))
    found = []
    for client in range(4):
        info = consilience.core.messages.ClientInfo(
            client, at.federation.size(client), at.place.model_of(client), at.place.architectures
        )
        message = at.method.broadcast(at.program[0], server, info)
        work, _ = at.do_train(message, Job(client, client, 1, 0, 0, 0), None)
        at.release()
        found.append(work.update)
    return tuple(found)


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


def _poked(t: Tensor, number: float) -> Tensor:
    out = t.clone()
    out.view(-1)[-1] = number
    return out


def of_tensor(t: Tensor) -> dict[str, Any]:
    """Ways in which a tensor can be wrong."""
    found: dict[str, Any] = {
        "none": None, "number": 1.0, "text": "x", "dict": {}, "list": [1.0], "longer": torch.cat([t, t]),
        "shorter": t[:-1], "empty": t[:0], "scalar": t.flatten()[0], "deeper": t[None], "flat": t.flatten()[None, None],
        "half": t.half(), "complex": t.to(torch.complex64), "bool": t.bool(),
    }  # fmt: skip
    if t.is_floating_point():
        found |= {"nan": _poked(t, float("nan")), "inf": _poked(t, float("inf")), "-inf": _poked(t, -float("inf"))}
        found |= {"double": t.double(), "integer": t.long()}
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
    }  # fmt: skip


def faults(payload: str, client: int) -> dict[str, Any]:
    """At least 60 updates that cannot be, by where and what."""
    good = honest(payload)[client]
    found: dict[str, Any] = {
        "update is a dict": {}, "update is a number": 1.0, "update is text": "x", "update is a list": [1.0],
        "update is a tensor": torch.ones(3), "update is another": consilience.core.messages.Inbox({}, {}),
        "update is a bare tuple": tuple(good), "update is its first field": good[0],
    }  # fmt: skip
    if not isinstance(good, ModelUpdate):
        found["update is a model"] = honest("weights")[0]
    for path, node in _nodes(good):
        ways = of_tensor(node) if isinstance(node, Tensor) else of_dict(node) if isinstance(node, dict) and node else {}
        found |= {f"{'.'.join(map(str, path))} {name}": _put(good, path, bad) for name, bad in ways.items()}
    if payload == "sub-models":
        found["another client's"] = honest(payload)[next(c for c in range(4) if _sizes(c) != _sizes(client))]
    if payload == "prototypes":
        found["classes twice"] = good._replace(classes=good.classes * 0)
    for key in ("counts too large", "labels shorter", "labels empty"):  # clients may have many rows and few classes
        found.pop(key, None)
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
    assert len(ways) >= 24  # a table of scores can be wrong in fewer ways than a model: see below
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


def test_there_are_at_least_sixty_faults() -> None:
    assert len({f"{payload} {name}" for payload in PAYLOADS for name in faults(payload, 0)}) >= 60


@pytest.mark.parametrize("payload", PAYLOADS)
def test_aggregators_never_see_the_offender(payload: str) -> None:
    good = list(honest(payload))
    for aggregator in PAYLOADS[payload][2]:
        at = place(payload, aggregator)
        for offender in (0, 2, 3):
            expected, _ = round_of(at, [... if i == offender else update for i, update in enumerate(good)])
            for name, bad in list(faults(payload, offender).items())[::7]:
                assert round_of(at, [*good[:offender], bad, *good[offender + 1 :]])[0] == expected, (aggregator, name)
