"""CELLM: only sparse pieces of low-rank adapters travel, while local training stays dense (Vavekanand, Sam, 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.messages import ClientInfo, DeltaUpdate, Reply, Stat
from consilience.core.method import Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected, Shape, Wrong
from consilience.core.site import Host, Place, Site
from consilience.core.training import option
from consilience.core.tree import record
from consilience.methods.fedopt import FedAdam, Moments
from consilience.parts.compressors import Coded, MalformedError, TopK, flatten, restore
from consilience.parts.feedback import shapes_of

_NO_DRAWS = np.random.default_rng(0)
"""TopK draws nothing, and an interface wants a generator."""


@record
class Sparse(NamedTuple):
    """Trained parameters, up or down: the largest of them and where they stand, or all, in order."""

    numbers: Stat
    packed: Stat


@record
class Tuned(NamedTuple):
    """The server: what is trained, with the server optimiser's moments; and what is not."""

    own: Moments
    base: Weights


@dataclass(frozen=True)
class CELLM(FedAdam):
    """Federated fine-tuning of a frozen model through its low-rank adapters, of which few numbers travel.

        theta:   all parameters that the model trains, in a fixed order: with ``--model transformer+lora:4`` the A and B
                 of each adapter, and the head; frozen ones are the common initial model's (a seed's, or --init FILE)
        down:    theta_0 = theta where |theta| is among its largest (share ``density_down``), 0 elsewhere; values and
                 indices are sent, or theta itself where the share is 1
        client:  theta_i <- all of theta, trained from theta_0
        up:      the largest share ``density_up`` of theta_i - theta_0
        server:  Delta = sum_i p_i (what came, 0 where nothing did);  a step of FedAdam on all of theta along Delta, or
                 (server_optimizer="sgd") theta <- theta + eta_g Delta

    What is deployed for all is theta (``global`` in the history); what clients get, and are judged by, is theta_0.
    Frozen parameters never travel and never change. With both shares 1 it is FedAdam bit for bit, and with
    server_optimizer="sgd", server_lr=1 FedAvg in delta form. The model's buffers, if any, stay as they are. B begins as
    0, so that the first mask holds numbers of A and of the head alone; B learns all the same: training is dense.
    Of few adapters nothing is sent where the head alone has more numbers than the share: its changes are larger.

    Source: Vavekanand, Sam, "CELLM: An Efficient Communication in Large Language Models Training for Federated
    Learning", 2024; its equations are those of Kuo, Raje, Rajesh, Smith, "Federated LoRA with Sparse Communication",
    2024 (FLASC): that the two agree is our reading. Deviations: the head is trained and travels too, since a model that
    is built here has none that fits; FedAdam on the server has no bias correction; no rule for groups of clients, and
    neither A nor the mask is frozen. The paper's steps (1e-3) are for large trained models.
    """

    name = "cellm"
    family = "sparse fine-tuning"
    source = "Vavekanand, Sam"
    year = 2024
    confidence = "low"
    takes_rules = False

    density_down: Annotated[float, Gt(0), Le(1)] = option(0.25, "share of the trained parameters that is sent down")
    density_up: Annotated[float, Gt(0), Le(1)] = option(0.25, "share of their change that is sent up")
    server_optimizer: Literal["adam", "sgd"] = option("adam", "of the server: FedAdam, or plain steps")
    momentum: Annotated[float, Ge(0), Le(1)] = option(0.9, "local momentum; starts anew each round")
    batch_size: Annotated[int, Ge(1)] = option(16, "rows in one local step")

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Any:
        """The initial adapters, with no moments: a :class:`Tuned`."""
        whole = super().init_server(host)
        frozen = host.borrow().frozen
        parts = [{n: p for n, p in part.items() if n not in frozen} for part in (whole.model.params, *whole[1:])]
        base = Weights({n: p for n, p in whole.model.params.items() if n in frozen}, whole.model.buffers)
        return Tuned(Moments(Weights(parts[0], {}), parts[1], parts[2]), base)

    def broadcast(self, phase: Phase, server: Tuned, client: ClientInfo) -> Sparse:
        """The largest of the adapters' numbers."""
        return _squeezed(server.own.model.params, self.density_down)

    def aggregate(self, phase: Phase, host: Host, server: Any, replies: Sequence[Reply], cohort: Sequence[int]) -> Any:
        """A step along the mean of what came."""
        params = server.own.model.params
        whole = [r._replace(update=DeltaUpdate(_spread(r.update, params, self.density_up), {})) for r in replies]
        if self.server_optimizer == "adam":
            return server._replace(own=super().aggregate(phase, host, server.own, whole, cohort))
        moved = tr.axpy(self.server_lr, self.mean_delta(whole, self.shares(whole)), params)
        return server._replace(own=server.own._replace(model=Weights(moved, {})))

    def global_model(self, server: Tuned) -> Predictor:
        """The frozen parameters with all of theta."""
        return Net(Weights({**server.base.params, **server.own.model.params}, server.base.buffers))

    def sends(self, phase: Phase) -> type:
        """Numbers and where they stand."""
        return Sparse

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """As many numbers as the share says, and ascending places for them."""
        made = place.network(model).build()
        d = sum(p.numel() for p in made.parameters() if p.requires_grad)
        if self.density_up == 1:
            return {"numbers": Shape(place.network(model).dtype, (d,)), "packed": Shape(torch.uint8, (0,))}
        taken, v = TopK(False, self.density_up), torch.ones(d)
        count = len(taken.squeeze(v, _NO_DRAWS).numbers)

        def places(found: Any) -> Wrong | None:
            if not isinstance(found, Tensor):
                return "", "is not a tensor"
            try:
                taken.swell(Coded(v[:count], found), d, _NO_DRAWS)
            except MalformedError as error:
                return "", str(error)
            return None

        return {"numbers": Shape(place.network(model).dtype, (count,)), "packed": places}

    # --- the client's half -------------------------------------------------------------------------------------

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def client_update(self, phase: Phase, site: Site, message: Sparse, state: None) -> tuple[Sparse, None]:
        """Dense training from the sparse start; the largest changes."""
        start = self._start(site, message)
        end = site.fit(start).weights
        trained = self._trained(site, start.params)
        return _squeezed({n: end.params[n] - p for n, p in trained.items()}, self.density_up), None

    def _start(self, site: Site, message: Sparse) -> Weights:
        """theta_0 in the frozen model."""
        common = site.initial()
        theta = _spread(message, self._trained(site, common.params), self.density_down)
        return Weights({n: theta.get(n, p) for n, p in common.params.items()}, common.buffers)

    def _trained(self, site: Site, params: Params) -> Params:
        frozen = site.borrow().frozen
        return {n: p for n, p in params.items() if n not in frozen}

    # --- what would be deployed --------------------------------------------------------------------------------

    def personal_model(self, site: Site, message: Sparse, state: None) -> Predictor:
        """The model with theta_0."""
        return Net(self._start(site, message), site.model)

    def trained_model(self, site: Site, message: Sparse, update: Sparse, state: None) -> Predictor:
        """What training has just ended with, all of it."""
        assert site.trained is not None
        return Net(site.trained, site.model)


def _squeezed(params: Params, share: float) -> Sparse:
    """The largest share of the numbers, or all."""
    if share == 1:
        return Sparse(flatten(params), torch.empty(0, dtype=torch.uint8))
    return Sparse(*TopK(False, share).squeeze(flatten(params), _NO_DRAWS))


def _spread(found: Sparse, like: Params, share: float) -> Params:
    """Parameters with these numbers, and 0 elsewhere."""
    flat = found.numbers if share == 1 else TopK(False, share).swell(Coded(*found), _count(like), _NO_DRAWS)
    return restore(flat, shapes_of(like))


def _count(params: Params) -> int:
    return sum(p.numel() for p in params.values())
