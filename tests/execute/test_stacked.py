"""Clients in step: the numbers of the serial executor, for every method."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FEATURES, LINEAR, NOISY, NORMED, Breaks, Counting, Frozen, Twins, architecture, federation, worker

from consilience import methods
from consilience.core import stack
from consilience.core import tree as tr
from consilience.core.errors import ClientError
from consilience.core.failpoint import Died
from consilience.core.messages import Job
from consilience.core.method import Method
from consilience.core.model import Architecture
from consilience.core.worker import Call
from consilience.execute import stacked
from consilience.methods.fedavg import FedAvg
from consilience.methods.scaffold import Scaffold
from consilience.models.small import MLP
from consilience.simulate import Result, run

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.05}
WIDE, WIDE64 = architecture(MLP), architecture(MLP, dtype=torch.float64)


def result(method: Method, executor: str, model: Architecture, rounds: int = 1, **options: Any) -> Result:
    if method.schedule.startswith("buffered"):
        options = {"schedule": "buffered:2", **options}  # the default never fills with five clients
    data = federation()
    if method.needs.public_data:
        data.public = data.parts[0].train.x
    return run(method, data, model=model, rounds=rounds, executor=executor, **{"workers": 1, **options})


def distance(a: Result, b: Result) -> float:
    pairs = [
        (x, y)
        for mine, other in ((a.server, b.server), (list(a.states.values()), list(b.states.values())))
        for x, y in zip(tr.tensors(mine), tr.tensors(other), strict=True)
        if x.is_floating_point()
    ]
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients each stacked gradient was for. Only where the stack runs in this process."""
    sizes: list[int] = []
    inner = stack.Stack._compute

    def counted(self: Any, key: str, wanted: Any) -> Any:
        sizes.append(len(wanted))
        return inner(self, key, wanted)

    monkeypatch.setattr(stack.Stack, "_compute", counted)
    return sizes


def in_step(method: Method, model: Architecture = WIDE) -> list[Any]:
    """One round's work of all clients, stacked in this process."""
    at = worker(method, model=model)
    message = method.broadcast(at.program[0], method.init_server(at.host(0, "init")), None)  # type: ignore[arg-type]
    jobs = tuple(Job(c, c, 1, 0, 0, 0) for c in range(at.federation.n_clients))
    found: list[Any] = at.run(Call("stack", (jobs, (None,) * len(jobs)), message))
    return found


def alone(method: Method, model: Architecture, client: int) -> Any:
    """One round's work of a client by itself."""
    at = worker(method, model=model)
    message = method.broadcast(at.program[0], method.init_server(at.host(0, "init")), None)  # type: ignore[arg-type]
    return at.run(Call("train", (Job(client, client, 1, 0, 0, 0), None), message))[0]


OWN_STEPS = ("dadao", "localgda", "sgc")
"""Methods in which epochs do not say how many steps there are."""


def long_ones() -> list[Any]:
    """Every method; those that do not compute in step, and so cannot differ but by what surrounds it, only in long
    runs of the suite."""
    return [
        pytest.param(name, marks=pytest.mark.slow if methods.get(name).unstacked and name != "moon" else ())
        for name in methods.NAMES
    ]


@pytest.mark.parametrize("name", long_ones())
def test_every_method_is_as_serial_in_float64(name: str) -> None:
    """Over 100 local steps and more: five clients of different sizes, so that they drop out one after another."""
    method = methods.get(name)(**{**USUAL, "local_epochs": 20})
    updates = 3 if method.schedule == "rounds" else 6  # others may combine one reply at a time
    some = 5 if method.everybody or method.asks_all else 4
    rounds = [result(method, executor, WIDE64, updates, participation=some) for executor in ("serial", "stacked")]
    assert distance(*rounds) < 1e-12
    steps = [found.history[-1]["steps"] for found in rounds]
    assert steps[0] == steps[1]
    assert steps[0] > 100 or name in OWN_STEPS


@pytest.mark.parametrize("name", methods.NAMES)
def test_every_method_is_as_serial_in_one_float32_step(name: str) -> None:
    method = methods.get(name)(**{**USUAL, "local_steps": 1})
    assert distance(*[result(method, executor, WIDE) for executor in ("serial", "stacked")]) < 1e-6


@pytest.mark.parametrize("fields", [{"optimizer": "adam"}, {"clip": 0.2, "weight_decay": 0.1, "momentum": 0.9}])
@pytest.mark.parametrize("model", [WIDE64, architecture(Frozen, dtype=torch.float64)], ids=lambda m: m.name)
def test_optimisers_clipping_and_frozen_parameters(fields: dict[str, Any], model: Architecture) -> None:
    method = FedAvg(**USUAL, local_epochs=5, **fields)
    assert distance(*[result(method, executor, model, 2) for executor in ("serial", "stacked")]) < 1e-12


class Idle(Twins):
    """Its last parameter does nothing, so that its gradient is the same for everybody."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(input_shape, outputs)
        self.idle = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("factory", [Twins, Idle])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_gradients_that_share_memory_are_taken_apart(name: str, factory: Any) -> None:
    """They are changed in place by clipping, weight decay, the proximal term and the controls."""
    method = methods.get(name)(**USUAL, clip=0.2, weight_decay=0.1)
    model = architecture(factory, dtype=torch.float64)
    assert distance(*[result(method, executor, model, 2) for executor in ("serial", "stacked")]) < 1e-12


def test_batchnorm_keeps_each_clients_statistics(computed: list[int]) -> None:
    normed = architecture(type(NORMED.factory((FEATURES,), 3)), dtype=torch.float64)
    method = FedAvg(**USUAL, local_epochs=3, buffers="local")
    assert distance(*[result(method, executor, normed, 2) for executor in ("serial", "stacked")]) < 1e-12
    in_step(method, normed)
    assert max(computed) > 1


def test_gradients_are_computed_together_but_for_methods_that_say_why_not(computed: list[int]) -> None:
    for name in ("fedavg", "fedprox", "scaffold", "fedadam"):
        computed.clear()
        in_step(methods.get(name)(**USUAL))
        assert sum(computed) > len(computed) > 0, name
        assert not methods.get(name).unstacked
    computed.clear()
    in_step(methods.get("moon")(**USUAL))
    assert computed == []
    assert methods.get("moon").unstacked


def test_what_cannot_be_stacked_is_computed_alone_with_the_same_bits() -> None:
    with pytest.warns(RuntimeWarning, match="noisy' cannot be stacked"):
        together = in_step(FedAvg(**USUAL), NOISY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted = in_step(FedAvg(**USUAL), architecture(Counting))
    for model, found in ((NOISY, together), (architecture(Counting), counted)):
        for client, (work, _) in enumerate(found):
            assert tr.digest(work.update) == tr.digest(alone(FedAvg(**USUAL), model, client).update)


class Choosy(torch.nn.Linear):
    """A model that vmap refuses for batches of two rows."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__(input_shape[0], outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (0 * x.sum().item() if len(x) == 2 else 0)


def test_one_group_that_is_refused_is_no_matter_for_the_others(computed: list[int]) -> None:
    """Or it would depend on what a worker has done before who is computed together."""
    method = FedAvg(**USUAL)
    at = worker(method, federation([6, 6, 8, 8, 8]), architecture(Choosy))
    message = method.broadcast(at.program[0], method.init_server(at.host(0, "init")), None)  # type: ignore[arg-type]
    call = Call("stack", (tuple(Job(c, c, 1, 0, 0, 0) for c in range(5)), (None,) * 5), message)
    with pytest.warns(RuntimeWarning, match="choosy' cannot be stacked"):
        first = at.run(call)
    computed.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tr.digest([work.update for work, _ in at.run(call)]) == tr.digest([work.update for work, _ in first])
    assert max(computed) == 5


def test_any_number_of_workers_and_a_resume_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Scaffold(**USUAL)
    wanted = result(method, "stacked", WIDE, 4, participation=3).digest
    for workers in (2, 4):
        assert result(method, "stacked", WIDE, 4, participation=3, workers=workers).digest == wanted
    monkeypatch.setenv("CONSILIENCE_FAILPOINT", "aggregate:3:raise")
    options = {"participation": 3, "out": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Died):
        result(method, "stacked", WIDE, 4, **options)
    monkeypatch.delenv("CONSILIENCE_FAILPOINT")
    assert result(method, "stacked", WIDE, 4, resume=True, **options).digest == wanted


def test_stacks_do_not_outgrow_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "MOST", 1)
    one_by_one = result(FedAvg(**USUAL), "stacked", LINEAR, 2)
    assert one_by_one.digest == result(FedAvg(**USUAL), "serial", LINEAR, 2).digest  # nobody has company


def test_a_client_that_fails_is_named_with_its_own_traceback() -> None:
    with pytest.raises(ClientError, match=r"client 1, round 2, phase train, in client_update") as caught:
        result(Breaks(), "stacked", LINEAR, 3)
    assert "Traceback" in caught.value.trace
