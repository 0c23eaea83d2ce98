"""Clients in step: the gradients of several are computed together, as one batch of models (``torch.func.vmap``).

Each client's code runs as it always does, in a greenlet of its own, until it wants a gradient of the task's loss;
then it waits for the others. Clients with equal architecture, trainable parameters and batch size are served by one
call; whoever has done its steps drops out. Everything else (optimiser, step, carry, random streams) stays each
client's own, so a method needs no other code.
What cannot be computed so (a loss of the method's own, dropout, buffers outside the state, an architecture that vmap
refuses) is computed by the client alone, with the same result. Batches are not padded to one size: a padded row would
enter a BatchNorm's statistics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from consilience.core.errors import ConfigError
from consilience.core.federation import Task
from consilience.core.fit import Batch, Together
from consilience.core.model import Architecture, Instance, Params, Pool
from consilience.core.streams import torch_fork

T = TypeVar("T")
Client = Callable[[Pool, Together], T]
"""A client's work, given its pool of modules and whom to ask for gradients."""
Gradient = tuple[list[Tensor], float]
"""The gradient of each trainable parameter, and the loss."""


class Wanted(NamedTuple):
    """A gradient that a client waits for. names: of the parameters. weights: ``(b,)``, multiply each row's loss."""

    task: Task
    instance: Instance
    names: Sequence[str]
    batch: Batch
    weights: Tensor | None


class Rows:
    """The storage of a stack's instances of one architecture: ``(n, *shape)`` for each parameter and buffer."""

    def __init__(self, like: Instance, n: int) -> None:
        self.params = {name: p.new_empty(n, *p.shape) for name, p in like.home.items()}
        self.buffers = {name: b.new_empty(n, *b.shape) for name, b in like.buffers.items()}


class StackPool(Pool):
    """The instances of one client's place in a stack: they lie in that row of the common storage."""

    def __init__(self, rows: dict[str, Rows], place: int, n: int) -> None:
        super().__init__()
        self._rows, self._place, self._n = rows, place, n
        self._made: dict[str, int] = {}

    def make(self, architecture: Architecture) -> Instance:
        """A new instance. A client's first of an architecture lies with the others' first, and so on."""
        instance = super().make(architecture)
        number = self._made[architecture.key] = self._made.get(architecture.key, -1) + 1
        key = f"{architecture.key}|{number}"
        rows = self._rows.setdefault(key, Rows(instance, self._n))
        instance.move(
            {name: rows.params[name][self._place] for name in instance.home},
            {name: rows.buffers[name][self._place] for name in instance.buffers},
        )
        instance.row = key, self._place
        return instance


def check_greenlet() -> Any:
    """The module greenlet. Raises ConfigError where it is not installed."""
    try:
        import greenlet  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("--executor stacked needs greenlet: pip install 'consilience[stacked]'") from None
    return greenlet


class Stack:
    """Runs up to ``n`` clients in step."""

    def __init__(self, n: int) -> None:
        self._greenlet, self.size = check_greenlet(), n
        self._rows: dict[str, Rows] = {}
        self._pools = [StackPool(self._rows, place, n) for place in range(n)]
        self._unfit: set[str] = set()

    def run(self, clients: Sequence[Client[T]]) -> list[T]:
        """What each client returns. An exception of one ends all."""
        hub = self._greenlet.getcurrent()
        runners = [self._greenlet.greenlet(client, hub) for client in clients]
        results: dict[int, T] = {}
        try:
            with torch_fork(0):
                waiting: dict[int, Wanted] = {}
                for i in range(len(runners)):
                    self._go_on(runners, i, (self._pools[i], hub.switch), waiting, results)
                while waiting:
                    answers = self._serve(waiting)
                    waiting = {}
                    for i, answer in answers.items():
                        self._go_on(runners, i, (answer,), waiting, results)
        finally:
            for pool in self._pools:
                pool.release()
        return [results[i] for i in range(len(clients))]

    def _go_on(
        self, runners: Sequence[Any], i: int, arguments: tuple[Any, ...], waiting: dict[int, Wanted], results: Any
    ) -> None:
        found = runners[i].switch(*arguments)
        (results if runners[i].dead else waiting)[i] = found

    def _serve(self, waiting: dict[int, Wanted]) -> dict[int, Gradient | None]:
        """An answer for everybody who waits; None for those who have to do it alone."""
        groups: dict[Any, list[int]] = {}
        for i, want in waiting.items():
            row = None if want.instance.remembers else want.instance.row
            key = row and (row[0], id(want.task), tuple(want.names), want.batch.x.shape, want.weights is None)
            groups.setdefault(key, []).append(i)
        answers: dict[int, Gradient | None] = {}
        for key, members in groups.items():
            found: Sequence[Gradient | None] | None = None
            if key is not None and len(members) > 1 and key[0] not in self._unfit:
                found = self._compute(key[0], [waiting[i] for i in members])
            answers.update(zip(members, found or [None] * len(members), strict=True))
        return dict(sorted(answers.items()))

    def _compute(self, key: str, wanted: Sequence[Wanted]) -> Sequence[Gradient] | None:
        """The gradients of one group, or None where vmap refuses."""
        rows, first = self._rows[key], wanted[0]
        places = [want.instance.row[1] for want in wanted if want.instance.row is not None]
        adjacent = places == list(range(places[0], places[0] + len(places)))
        chosen = slice(places[0], places[0] + len(places)) if adjacent else torch.tensor(places)
        params = {name: value[chosen] for name, value in rows.params.items()}
        buffers = {name: value[chosen].clone() for name, value in rows.buffers.items()}
        x, y = (torch.stack([getattr(want.batch, part) for want in wanted]) for part in ("x", "y"))
        weights = None if first.weights is None else torch.stack([want.weights for want in wanted])  # type: ignore[misc]
        trained = {name: params.pop(name) for name in first.names}
        function = vmap(
            grad_and_value(_loss(first.instance.module, first.task)), (0, 0, 0, 0, 0, None if weights is None else 0)
        )
        try:
            gradients, values = function(trained, params, buffers, x, y, weights)
        except RuntimeError as error:
            self._unfit.add(key)
            why = str(error).strip().splitlines()[0]
            warnings.warn(
                f"model '{first.instance.architecture.name}' cannot be stacked, so that its gradients are computed one "
                f"by one: {why}", RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            return None
        for name, value in buffers.items():
            rows.buffers[name][chosen] = value
        columns = [gradients[name].unbind() for name in first.names]
        return list(zip(map(list, zip(*columns, strict=True)), values.tolist(), strict=True))


def _loss(module: nn.Module, task: Task) -> Callable[..., Tensor]:
    """The task's loss of one client as a function of its tensors."""

    def loss(trained: Params, fixed: Params, buffers: Params, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        out = functional_call(module, (trained, fixed, buffers), (x,))
        return task.loss(out, y) if weights is None else (task.losses(out, y) * weights).mean()

    return loss
