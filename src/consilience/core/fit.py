"""The only training loop: local steps of any optimiser on any tree of models, as a suspendable generator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from consilience.core import optim, order
from consilience.core.errors import ConfigError
from consilience.core.federation import Split
from consilience.core.gradient import Asker, Batch, Grad, Gradient, Loss, Models, Modules, Sharp, apart
from consilience.core.model import Params, Weights
from consilience.core.tree import Tree

if TYPE_CHECKING:
    from consilience.core.site import Site

__all__ = [
    "Batch",
    "Fit",
    "Grad",
    "Guard",
    "Loss",
    "Models",
    "Plan",
    "Step",
    "Together",
    "apart",
    "fit_samples",
    "n_steps",
]
__all__ += ["picked", "shuffled", "training"]


Step = Callable[[Params, Grad, Batch, Tree], tuple[Params, Tree]]
"""``step(params, grad, batch, carry)`` -> (direction, carry). The direction points uphill, as a gradient does."""


class Guard(Protocol):
    """What stands between a client's rows and its training, where each row is to be hidden."""

    def batches(self) -> Iterator[Tensor]:
        """Row numbers of each step, without end."""
        ...

    def gradient(self, models: Modules, decay: float, clip: float | None, total: bool) -> Gradient:
        """The ``grad`` that steps are given."""
        ...


Together = Callable[[Any], Any]
"""Asks for a gradient (:class:`~consilience.core.stack.Wanted`) that is computed together with those of others."""


@dataclass
class Fit:
    """What training did. weights: trained, shaped as given. flops: computed, counting a model of which anything was
    trained as a whole. carry: as the last step left it. grad_sum: sum of the
    raw gradients of the loss over the steps (if asked for): before clipping and without weight decay. lr_sum: sum
    of the step sizes. loss: mean over the steps."""

    weights: Any
    carry: Tree
    grad_sum: Params
    lr_sum: float
    steps: int
    samples: int
    loss: float
    flops: float = 0.0


@dataclass
class Plan:
    """How to train; what is None follows the method's own fields.

    loss, step: see above. carry: the first state handed to ``step``. trainable: which parameters, by name.
    data: rows to train on. model: architecture name (or a dict of them, like the weights). batches: batches of
    row numbers instead of shuffled epochs. sample_weight: ``(n,)``, multiplies each row's loss. lr: a number,
    or a function of the step number. momentum, weight_decay: for an optimizer of the fit's own, which may have none.
    sum_gradients: whether grad_sum is wanted. purpose: of the batch stream; rows are ordered (``row_order``) in the
    client's training on its own rows, which is what has the default purpose.
    """

    loss: Loss | None = None
    step: Step | None = None
    carry: Tree = None
    trainable: Callable[[str], bool] | None = None
    data: Split | None = None
    model: Any = ""
    batches: Iterable[Tensor] | None = None
    sample_weight: Tensor | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | Callable[[int], float] | None = None
    optimizer: str | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    sum_gradients: bool = False
    purpose: str = "batches"


def n_steps(n: int, batch_size: int, epochs: int, steps: int | None) -> int:
    """Local steps for ``n`` rows: ``steps`` if given, else whole epochs with a partial last batch."""
    return steps if steps is not None else epochs * math.ceil(n / batch_size)


def fit_samples(n: int, batch_size: int, steps: int) -> int:
    """Rows in the first ``steps`` batches of :func:`shuffled` epochs over ``n`` rows."""
    if not n:
        return 0
    epochs, rest = divmod(steps, math.ceil(n / batch_size))
    return epochs * n + min(rest * batch_size, n)


def shuffled(rng: np.random.Generator, n: int, batch_size: int) -> Iterator[Tensor]:
    """Row numbers of batches, epoch after epoch without end; the last batch of an epoch may be smaller."""
    while True:
        yield from torch.split(torch.from_numpy(rng.permutation(n)), batch_size)


PICKED = 1 << 20
"""Bytes of rows that are picked at a time: one large pick costs less than one for each batch."""


def picked(data: Split, batches: Iterator[Tensor], total: int | None, batch_size: int) -> Iterator[Batch]:
    """At most ``total`` batches, several picked at a time, where each of them begins at a multiple of 64 bytes, as
    if it were picked alone: the last bits of a matrix product may depend on that."""
    size = data.x[0].numel() * data.x.element_size() * batch_size
    ahead = max(1, PICKED // size) if size and size % 64 == 0 else 1
    limited = itertools.islice(batches, total)
    several: list[Tensor] = []
    for index in limited:
        several.append(index)
        if len(several) >= ahead or len(index) < batch_size:
            yield from _pick(data, several)
            several = []
    if several:
        yield from _pick(data, several)


def _pick(data: Split, several: list[Tensor]) -> Iterator[Batch]:
    rows, sizes = torch.cat(several), [len(index) for index in several]
    parts = (data.x.index_select(0, rows), data.y.index_select(0, rows), rows)
    return map(Batch, *(part.split_with_sizes(sizes) for part in parts))


def training(site: Site, weights: Any, plan: Plan) -> Generator[float, None, Fit]:
    """Train; yields the loss after every step and returns a Fit. :meth:`Site.fit` runs it to its end; an
    executor may suspend it between steps instead."""
    method = site.method
    data = site.cast(plan.data if plan.data is not None else site.train)
    if not len(data):
        raise ValueError("no rows to train on")
    models = _fill(site, weights, plan)
    models.choose(plan.trainable)
    operator = site.task.operator if plan.loss is None else None
    name = plan.optimizer or method.optimizer
    decay = method.weight_decay if plan.weight_decay is None else plan.weight_decay
    momentum = method.momentum if plan.momentum is None else plan.momentum
    loss = plan.loss or _task_loss(site, plan.sample_weight)
    named = optim.parse(name)
    added = decay if named.decays else 0.0  # other optimisers take it themselves
    guard = method.guard(site, len(data))
    if guard is None:
        grad = Gradient(models, loss, operator, method.clip, added, plan.sum_gradients)
    elif plan.loss is None and operator is None and plan.sample_weight is None and plan.batches is None:
        grad = guard.gradient(models, added, method.clip, plan.sum_gradients)
    else:
        raise ConfigError(f"{method.name} has a loss or batches of its own, which row_noise does not hide")
    if guard is None and site.together is not None and plan.loss is None and operator is None and models.single:
        grad.ask = _company(site, models, plan.sample_weight)
    rate = plan.lr if plan.lr is not None else method.rate(site.job.version)
    rates = rate if callable(rate) else lambda _: rate
    optimizer = optim.make(name, models.leaves, rates(0), momentum, decay)
    batch_size = plan.batch_size or method.batch_size
    total = _length(site, plan, len(data), batch_size)
    around = Asker(grad, site.rng("probes", plan.purpose)) if named.asks else None
    asked = grad if named.sharp is None else Sharp(grad, named.sharp)
    batches: Iterator[Batch]
    given = plan.batches if guard is None else guard.batches()
    if given is not None:  # they may depend on what training has found so far, so none is taken ahead
        batches = (next(_pick(data, [index])) for index in itertools.islice(given, total))
    else:
        batches = picked(data, _rows(site, weights, plan, len(data), batch_size, total), total, batch_size)
    key = site.streams.torch_seed("dropout", plan.purpose)
    step = plan.step or _plain
    result = Fit(None, plan.carry, {}, 0.0, 0, 0, 0.0)
    for number, batch in enumerate(batches):
        grad.begin(batch, (key + number) % 2**63)
        direction, result.carry = step(grad.live, asked, batch, result.carry)
        lr = rates(number)
        optimizer.apply([direction[n] for n in models.names], lr, around)
        result.lr_sum += lr
        result.steps += 1
        result.samples = grad.rows
        result.loss += grad.value
        yield grad.value
    result.flops = result.samples * models.flops()
    result.loss = result.loss / result.steps if result.steps else math.nan
    result.grad_sum = dict(zip(models.names, grad.sums, strict=True)) if grad.sums is not None else {}
    result.weights = models.read()
    return result


def _rows(site: Site, weights: Any, plan: Plan, n: int, batch_size: int, total: int | None) -> Iterator[Tensor]:
    """Row numbers of batches: shuffled epochs, or in the order that the method asks for."""
    rng, how = site.rng(plan.purpose), order.parse(site.method.row_order)
    if how.plain or plan.data is not None or plan.purpose != Plan.purpose:
        return shuffled(rng, n, batch_size)
    assert total is not None
    if how.kind == "random":
        ranked = torch.from_numpy(site.rng("row-order").permutation(n))
    else:
        ranked = how.sorted(order.losses(site, weights, plan.model, how.score))
    return order.paced(rng, ranked, how.pool(n, total), batch_size)


def _company(
    site: Site, models: Modules, weights: Tensor | None
) -> Callable[[Batch], tuple[list[Tensor], float] | None]:
    """How a client of a stack asks for the gradient of the task's loss."""
    from consilience.core.stack import Wanted

    ask, instance = site.together, models.instances[""]
    assert ask is not None

    def wait(batch: Batch) -> tuple[list[Tensor], float] | None:
        rows = None if weights is None else weights[batch.rows]
        answer: tuple[list[Tensor], float] | None = ask(Wanted(site.task, instance, models.names, batch, rows))
        return answer

    return wait


def _plain(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
    """The default step: the gradient."""
    return grad(), carry


def _fill(site: Site, weights: Any, plan: Plan) -> Modules:
    single = isinstance(weights, Weights)
    given: Mapping[str, Weights] = {"": weights} if single else weights
    named = {"": plan.model} if single else (plan.model or dict.fromkeys(given, ""))
    models = Modules({key: site.borrow(named[key]) for key in given}, single)
    for key, value in given.items():
        models.instances[key].fill(value, train=True)
    return models


def _task_loss(site: Site, sample_weight: Tensor | None) -> Loss:
    task = site.task
    if sample_weight is None:
        return lambda model, batch: task.loss(model(batch.x), batch.y)
    return lambda model, batch: (task.losses(model(batch.x), batch.y) * sample_weight[batch.rows]).mean()


def _length(site: Site, plan: Plan, n: int, batch_size: int) -> int | None:
    if plan.batches is not None:
        return plan.steps
    steps = plan.steps if plan.steps is not None else site.job.steps
    if steps is None and plan.epochs is None:
        steps = site.method.local_steps
    return n_steps(n, batch_size, plan.epochs or site.method.local_epochs, steps)
