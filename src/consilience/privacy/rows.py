"""Example-level differential privacy: a client's training hides each of its rows, from the server too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from consilience.core import optim, order
from consilience.core.errors import ConfigError
from consilience.core.gradient import Batch, Gradient, Modules
from consilience.core.method import Method, Phase
from consilience.core.model import Architecture, Params
from consilience.core.site import Site
from consilience.core.snapshot import Totals
from consilience.core.streams import SERVER
from consilience.privacy.mechanism import Poisson


class RowNoise(NamedTuple):
    """The noise multiplier z, and the norm C that a row's gradient has at most."""

    multiplier: float
    norm: float


def parse(text: str) -> RowNoise | None:
    """``none``, or ``NOISE[:CLIP]``. Raises ConfigError."""
    if text == "none":
        return None
    try:
        multiplier, *rest = map(float, text.split(":"))
        norm = rest[0] if rest else 1.0
        good = 0 <= multiplier < math.inf and 0 < norm < math.inf and len(rest) <= 1
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"row_noise '{text}': none, or NOISE[:CLIP], a noise multiplier and a norm, as 1.0:0.5")
    return RowNoise(multiplier, norm)


class RowGuard:
    """What stands between a client's rows and its training. mechanism: draws a step's rows, each with probability
    q = batch / rows by itself, and is what the steps are accounted by."""

    def __init__(self, site: Site, rows: int, noise: RowNoise) -> None:
        own = site.place.noise
        streams = site.streams if own is None else replace(site.streams, seed=own)
        self.mechanism = mechanism(site.method, rows, streams.torch_seed("row-sample"))
        self._rows, self._noise, self._site = rows, noise, site
        self._rng = streams.rng("row-noise")

    def batches(self) -> Iterator[Tensor]:
        """Row numbers of each step; perhaps none."""
        step, everybody = 0, np.arange(self._rows)
        while True:
            yield torch.tensor(self.mechanism.draw(step, everybody), dtype=torch.int64)
            step += 1

    def gradient(self, models: Modules, decay: float, clip: float | None, total: bool) -> Gradient:
        """The ``grad`` that steps are given."""
        return _RowGradient(self, models, decay, clip, total)

    def release(self, models: Modules, batch: Batch) -> list[Tensor]:
        """(sum_rows clip(gradient of the row) + N(0, z^2 C^2)) / expected rows, for each trainable parameter."""
        instance, task = models.instances[""], self._site.task
        fixed = {n: p.data for n, p in instance.parameters.items() if n not in models.names}

        def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
            out = functional_call(instance.module, {**fixed, **params}, (x[None],))
            return task.losses(out, y[None])[0]

        live, z, c = models.live(), *self._noise
        sums = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in live.items()}
        if len(batch.x):
            try:
                each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(live, batch.x, batch.y)
            except RuntimeError as error:
                raise ConfigError(
                    f"model '{instance.architecture.name}' has no gradient by row, which row_noise needs: {error}"
                ) from error
            sums = clipped_sums(each, c)
        for total in sums.values() if z else ():
            total += z * c * torch.from_numpy(self._rng.standard_normal(tuple(total.shape)))
        return [(sums[n] / self.mechanism.cohort).to(live[n].dtype) for n in models.names]


def clipped_sums(each: Params, norm: float) -> Params:
    """Sums over rows of gradients ``(rows, ...)`` made at most ``norm`` long, all parameters of a row as one vector, in
    float64. A row whose gradient is not finite counts as 0."""
    flat = [g.double().flatten(1) for g in each.values()]
    lengths = torch.stack([g.square().sum(1) for g in flat]).sum(0).sqrt()
    good = torch.isfinite(lengths)
    scale = torch.where(good, norm / lengths.clamp(min=norm), 0.0)
    rows = zip(each.items(), flat, strict=True)
    return {n: (torch.where(good[:, None], f, 0.0) * scale[:, None]).sum(0).reshape(g.shape[1:]) for (n, g), f in rows}


class _RowGradient(Gradient):
    """One private gradient a step, at the live parameters."""

    def __init__(self, guard: RowGuard, models: Modules, decay: float, clip: float | None, total: bool) -> None:
        super().__init__(models, lambda *_: torch.zeros(()), None, clip, decay, total)
        self._guard = guard

    def _backward(self, batch: Batch, elsewhere: bool) -> list[Tensor]:
        if elsewhere or self.calls or batch is not self.batch:
            raise ConfigError("row_noise accounts for one gradient a step; this method or optimiser wants more")
        torch.default_generator.manual_seed(self.seed)
        self.value = math.nan  # a loss is of rows, and nothing here hides it
        return self._guard.release(self.models, batch)


def mechanism(method: Method, rows: int, seed: int = 0) -> Poisson:
    """The sampler of a client with so many rows, which is its accountant as well."""
    return Poisson(rows, min(method.batch_size, rows), 1, seed)


def spent(result: Any, delta: float) -> Mapping[int, float]:
    """Epsilon of each client's rows, by client, at the end of a run (a ``Result``): what its updates may tell of any
    one row that is there or not. Every job that the client was given counts with all its steps, or those that a
    schedule gave it where they are more, whether it came back or not; and so does the training by which it is judged at
    the end. Raises ConfigError where there is no noise."""
    method, federation, noise = result.method, result.worker.federation, parse(result.method.row_noise)
    if noise is None:
        raise ConfigError(f"{method.name} was run without row_noise; its updates hide nothing")
    found = {}
    for client in map(int, federation.seen):
        rows, jobs = federation.size(client), result.snapshot.numbers.get(client, 0)
        usual = method.steps_of(rows)
        steps = max(jobs * usual, result.snapshot.spent.get(client, Totals()).steps) + usual
        found[client] = mechanism(method, rows).epsilon(noise.multiplier, steps, delta)
    return found


class Guarded(Method):
    """Mixin: training takes steps along private gradients (DP-SGD):

        B: each of the n rows with probability q = min(batch_size, n) / n, by itself
        g = ( sum_{r in B} grad l_r min(1, C / ||grad l_r||) + N(0, z^2 C^2 I) ) / (q n)

    so all that a client sends, and every model made of it, hides each of its rows. As many steps as without; all else
    that the method does with a gradient stays what it is. How many rows a client has is public. In a simulation noise
    comes from the run's seed, so that a run has the same bits: it measures what privacy costs and protects nobody. At a
    real site it comes from the site's own secret.

    Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016. Gradients by row are torch.func's;
    those of Opacus differ from autograd's for convolutions that are laid out with channels last, as they are here.
    """

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The method's. Raises ConfigError for a model with buffers, which hold what no noise hides."""
        for model in models.values():
            if model.spec.buffers:
                raise ConfigError(
                    f"model '{model.name}' has buffers ('{next(iter(model.spec.buffers))}') that mix rows, and "
                    "row_noise cannot hide that; take a model without BatchNorm"
                )
        return super().networks(models)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """How many rows are drawn is a matter of chance."""
        return 0

    def guard(self, site: Site, rows: int) -> RowGuard | None:
        """Of a client's training; the server has no rows of anybody's."""
        noise = parse(self.row_noise)
        return None if noise is None or site.id == SERVER else RowGuard(site, rows, noise)


OWN = ("client_update", "train", "init_client", "personal_model", "trained_model")
"""What a method must not do in a way of its own, since it may look at rows."""


def check(method: Method) -> None:
    """Raise ConfigError where a client's rows would be seen by more than its private gradients."""
    own = next((name for name in OWN if getattr(type(method), name) is not getattr(Method, name)), None)
    if own is not None or len(method.program()) > 1:
        raise ConfigError(f"{method.name} uses rows in a way of its own, which row_noise does not hide; fedavg, fedprox"
                          " and methods that only combine otherwise can have it")  # fmt: skip
    named = optim.parse(method.optimizer)
    if named.asks or named.sharp is not None:
        raise ConfigError(f"{method.name}: optimizer={method.optimizer} asks for more than a gradient; row_noise hides "
                          "one a step")  # fmt: skip
    odd = {
        "weights": method.weights not in ("samples", "uniform"), "selection": method.selection != "random",
        "then": method.then != "none", "row_order": not order.parse(method.row_order).plain,
    }  # fmt: skip
    for name, wrong in odd.items():
        if wrong:
            raise ConfigError(f"{method.name}: {name}={getattr(method, name)} asks about rows, which row_noise does "
                              "not hide; leave it out")  # fmt: skip
