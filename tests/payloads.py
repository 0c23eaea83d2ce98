"""What clients send, one method for each kind of payload. For tests of what may be wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import consilience
from consilience import simulate
from consilience.core.messages import ClientInfo, Job
from consilience.core.worker import Worker
from consilience.methods import FedAvg, FedMD, FedProto, HeteroFL, Scaffold
from consilience.parts.compose import composed

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
        info = ClientInfo(client, at.federation.size(client), at.place.model_of(client), at.place.architectures)
        message = at.method.broadcast(at.program[0], server, info)
        work, _ = at.do_train(message, Job(client, client, 1, 0, 0, 0), None)
        at.release()
        found.append(work.update)
    return tuple(found)
