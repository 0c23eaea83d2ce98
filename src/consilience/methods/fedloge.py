"""FedLoGe: one body under a sparse simplex, and global and local heads realigned by norms (Xiao et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from consilience.core.errors import NeedsError
from consilience.core.federation import Split
from consilience.core.fit import Batch, Grad, Models
from consilience.core.messages import ClientInfo, Model, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Params, Weights
from consilience.core.predict import Binder, Net, Predictor, Scorer
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.etf import frame
from consilience.parts.prototypes import UNKNOWN
from consilience.parts.split import HEAD, alone, head_network, head_of, with_head

CLOSEST = 0.99999
"""Largest cosine of which the angle is taken."""


class Columns(nn.Module):
    """The vectors of ``outputs`` classes as columns, and scores by them."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.frame = nn.Parameter(torch.zeros(input_shape[0], outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(b, width)`` -> ``(b, outputs)``."""
        return x @ self.frame


@record
class Server(NamedTuple):
    """The body with the global head g; V, ``(width, classes)``."""

    model: Model
    frame: Stat


@record
class Known(NamedTuple):
    """A network's scores, where classes that a client does not have (``absent``, ``(m,)``) score :data:`UNKNOWN` below
    the worst of those that it has."""

    net: Net
    absent: Tensor

    def scorer(self, at: Binder) -> Scorer:
        """The function from a batch to scores."""
        module, absent = at.bind(self.net.weights, self.net.model), self.absent

        def score(x: Tensor) -> Tensor:
            scores: Tensor = module(x)
            worst = scores.index_fill(1, absent, math.inf).min(1, keepdim=True).values
            return scores.index_copy(1, absent, (worst - UNKNOWN).expand(-1, len(absent)))

        return score


def sparse(width: int, classes: int, share: float, rng: np.random.Generator) -> Tensor:
    """A simplex of which ``share`` of each class's numbers (rounded down) are 0, ``(width, classes)`` in float64."""
    found = frame(width, classes)
    for column in range(classes):
        found[torch.from_numpy(rng.choice(width, math.floor(share * width), replace=False)), column] = 0
    return found


def crowded(v: Tensor, norm: float) -> Tensor:
    """sum_c (|v_c| - norm)^2 - mean_c (angle from v_c to the nearest other one)."""
    norms = v.square().sum(0).sqrt()
    cosines = (v / norms).T @ (v / norms)
    nearest = cosines.masked_fill(torch.eye(v.shape[1], dtype=torch.bool), -1).max(1).values
    return (norms - norm).square().sum() - torch.acos(nearest.clamp(-CLOSEST, CLOSEST)).mean()


def norms(head: Params) -> Tensor:
    """|w_c| of each class's row of a head, ``(classes, 1)``."""
    return head[f"{HEAD}weight"].square().sum(1, keepdim=True).sqrt()


@dataclass(frozen=True)
class FedLoGe(Method):
    """For labels with a long tail: a body that learns under a classifier nobody trains, and heads beside it that do.

        V: a simplex (as in fedetf, of the features' width), ``sparsity`` of each v_c set to 0 for good, and then moved
           to lower  sum_c (|v_c| - s)^2 - mean_c angle(v_c, the nearest v_d)
        loss = CE(V^T h) + CE(g(sg h)) + CE(l_k(sg h)),   h = f(x);   sg: without gradient
        f and g are averaged as FedAvg averages models; client k keeps l_k
        global model:    g with rows  g_c <- s_g g_c / |g_c|
        client k's:      h -> g'(h) + l_k(h),   g'_c = g_c |l_k,c|;   classes that it has no training rows of come last

    g and l_k begin as the model's own head, whose rows' lengths are what the two realignments change; biases stay.
    f learns nothing from g and l_k: it is FedAvg's on a model whose head is V, bit for bit.

    Source: Xiao, Chen, Liu, Feng, Wu, Liu, Zhou, Yang, Liu, "FedLoGe: Joint Local and Generic Federated Learning under
    Long-tailed Data", ICLR 2024, and its official code, from which s_g = 1.7 comes. s = 1 is the text's; the code has
    0.1, with which the body learned much more slowly in short runs here. Deviations: zeros are dealt out evenly, so
    that no class loses all of its numbers; V is moved by ``frame_steps`` steps of Adam of 1e-3 (1,000, for the code's
    10,000 of 1e-4), and travels in every round instead of once, so that clients that could not be reached at first have
    it; realignment happens whenever a model is asked for, not once at the end; classes are hidden by the client's
    training rows (by its test rows in the code, which a client cannot know), and by a low score, where the code sets
    weights to -1e10.
    """

    name = "fedloge"
    family = "skewed data"
    source = "Xiao et al., ICLR"
    year = 2024
    needs = Needs(split_model=True, classification=True)
    takes_rules = True
    sums = Method.means
    unstacked = "the loss has three heads"

    sparsity: Annotated[float, Ge(0), Lt(1)] = option(0.6, "share of each class's vector that is 0", Search(0.2, 0.9))
    frame_norm: Annotated[float, Gt(0)] = option(1.0, "s, the length that class vectors are drawn to", Search(0.1, 3.0))
    frame_steps: Annotated[int, Ge(0)] = option(1000, "steps by which they are moved apart, once")
    global_norm: Annotated[float, Gt(0)] = option(1.7, "s_g, the length of the global head's rows in use")

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """A head alone, and the simplex. Raises NeedsError for a head that is not one linear layer."""
        model = next(iter(models.values()))
        head = {name: tuple(p.shape) for name, p in head_of(model.spec).items()}
        bias = {f"{HEAD}bias": (model.outputs,)}
        if head | bias != {f"{HEAD}weight": (model.outputs, model.width), **bias}:
            raise NeedsError(f"fedloge needs a model whose head is one linear layer; that of '{model.name}' is not")
        if not 2 <= model.outputs <= (model.width or 0):
            raise NeedsError(
                f"fedloge needs at least as many features as classes, and 2 classes; '{model.name}' has {model.width} "
                f"and {model.outputs}"
            )
        columns = Architecture("simplex", Columns, (model.width or 0,), model.outputs, model.dtype)
        return {"head": head_network(model), "simplex": columns}

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """Models or differences, as FedAvg."""
        return self.packs

    def init_server(self, host: Host) -> Server:
        """The first model, and V."""
        model = host.architecture()
        v = sparse(model.width or 0, model.outputs, self.sparsity, host.rng("zeros")).to(model.dtype)
        return Server(host.initial(), self._apart(host, v) if self.frame_steps else v)

    def _apart(self, host: Host, v: Tensor) -> Tensor:
        """V with its classes moved apart; zeros stay."""
        kept = (v != 0).to(v.dtype)

        def loss(module: Models, batch: Batch) -> Tensor:
            return crowded(module.frame, self.frame_norm)

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            return {"frame": grad()["frame"] * kept}, carry

        rows = Split(v.new_zeros(1, len(v)), torch.zeros(1, dtype=torch.int64))  # the loss wants none
        fit = host.fit(
            Weights({"frame": v}, {}), loss=loss, step=step, data=rows, model="simplex", steps=self.frame_steps,
            optimizer="adam", momentum=0.0, weight_decay=0.0, lr=1e-3, purpose="simplex",
        )  # fmt: skip
        found: Tensor = fit.weights.params["frame"]
        return found

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """All of it."""
        return server

    def init_client(self, site: Site) -> Weights:
        """l_k."""
        return alone(head_of(site.initial()))

    def client_update(self, phase: Phase, site: Site, message: Server, state: Weights) -> tuple[Tree, Tree]:
        """Train the body under V, and both heads on what it gives."""

        def loss(models: Models, batch: Batch) -> Tensor:
            h = models["model"].features(batch.x)
            still = h.detach()
            heads = [h @ message.frame, models["model"].head(still), models["local"](still)]
            fixed, common, own = (F.cross_entropy(scores, batch.y) for scores in heads)
            return fixed + common + own

        start = {"model": message.model, "local": state}
        ends = site.fit(start, loss=loss, model={"model": "", "local": "head"}).weights
        return self.pack(message.model, ends["model"]), ends["local"]

    def global_model(self, server: Server) -> Predictor:
        """The realigned global head."""
        head = head_of(server.model)
        tiny = torch.finfo(norms(head).dtype).tiny
        weight = self.global_norm * head[f"{HEAD}weight"] / norms(head).clamp_min(tiny)
        return Net(with_head(server.model, {**head, f"{HEAD}weight": weight}))

    def personal_model(self, site: Site, message: Server, state: Weights) -> Predictor:
        """The realigned global head and the own one, added up: both are linear."""
        return self._personal(site, message.model, state)

    def trained_model(self, site: Site, message: Server, update: Tree, state: Weights) -> Predictor:
        """The same of what was just trained."""
        trained = super().trained_model(site, message, update, state)
        assert isinstance(trained, Net)
        return self._personal(site, trained.weights, state)

    def _personal(self, site: Site, model: Weights, state: Weights) -> Known:
        head, own = head_of(model), {f"{HEAD}{name}": p for name, p in state.params.items()}
        realigned = {**head, f"{HEAD}weight": head[f"{HEAD}weight"] * norms(own)}
        both = {name: p + own[name] for name, p in realigned.items()}
        counts = torch.bincount(site.train.y, minlength=site.task.outputs)
        absent = (counts == 0).nonzero().flatten() if len(site.train) else counts.new_zeros(0)
        return Known(Net(with_head(model, both), site.model), absent)
