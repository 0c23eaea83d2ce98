"""FedETF: a classifier that nobody trains, so that all clients learn features that agree (Li et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from consilience.core.federation import Split
from consilience.core.fit import Batch, Models, Plan
from consilience.core.messages import Reply
from consilience.core.method import Method, Needs, Phase, ServerState
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.etf import fixed, wrapped
from consilience.parts.split import alone, head_network, head_of, rejoined, with_head

NET, OWN, HEAD = "etf", "etf-own", "etf-head"
"""The model with a fixed frame, the same with a frame of the client's own, and the head of that alone."""


@dataclass(frozen=True)
class FedETF(Method):
    """Classes are the corners of a simplex, fixed for everybody; clients learn features that point to their corner.

        scores = beta M^T z / |z|,   z = W f(x) + b in R^C
        M = sqrt(C / (C - 1)) U (I - 1 1^T / C),   U^T U = I:   |m_c| = 1,  <m_c, m_d> = -1 / (C - 1)
        client loss:  CE(scores + gamma log n_k, y),   n_k,c: its rows of class c, or 1 where it has none
        f, W, b and beta are averaged as FedAvg averages models; M is the same in every run and never travels

    W and b are the model's own head, beta is a number that begins as 1. The global model has no log n_k. After the last
    round each client personalises: one more local training, and then ``personal_rounds`` times 3 epochs of its own M
    alone and 3 of W and b alone, with plain cross-entropy, on features that stay as they are. 0: nobody does.

    With gamma = 0, or as many rows of each class, the loss is plain cross-entropy; then this is FedAvg on a model with
    this head (bit for bit with gamma = 0).

    Source: Li, Shang, He, Lin, Wu, "No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with
    Synthetic and Fixed Classifier", ICCV 2023, and its official code, which also has C numbers in z. Deviation: in
    personalising, features are computed once, in evaluation mode.
    """

    name = "fedetf"
    family = "skewed data"
    source = "Li et al., ICCV"
    year = 2023
    needs = Needs(split_model=True, classification=True)
    unstacked = "the loss knows how many rows of each class a client has"

    gamma: Annotated[float, Ge(0)] = option(1.0, "weight of log n_k,c in the scores", Search(0.1, 2.0))
    personal_rounds: Annotated[int, Ge(0)] = option(20, "times that M and W are personalised after the last round")
    frame_lr: Annotated[float, Gt(0)] = option(0.1, "step size of the client's own M")
    projection_lr: Annotated[float, Gt(0)] = option(0.05, "step size of W and b in personalising")

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The model with the simplex as its classifier."""
        model = next(iter(models.values()))
        own = fixed(model, OWN, learned=True)
        return {NET: fixed(model, NET), OWN: own, HEAD: head_network(own, HEAD)}

    def program(self) -> tuple[Phase, ...]:
        """Rounds, then personalising."""
        return (Phase("train"), *((Phase("personalise", when="end"),) if self.personal_rounds else ()))

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training, at least."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """What FedAvg's clients send, and nothing after personalising."""
        if phase.name == "personalise":
            return NoneType
        return self.packs

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The model with its simplex."""
        spec = place.network(NET).spec
        return {"model": spec, "delta": spec.params, "buffers": spec.buffers}

    def init_server(self, host: Host) -> ServerState:
        """The usual first model, with beta = 1."""
        return ServerState(wrapped(host.initial(), host.architecture(NET).spec))

    def plan(self, site: Site, message: Tree, state: Tree) -> Plan:
        """Cross-entropy of balanced scores."""
        if not self.gamma:
            return Plan(model=NET)
        counts = torch.bincount(site.train.y, minlength=site.task.outputs).clamp_min(1)
        shift = self.gamma * counts.to(site.architecture().dtype).log()

        def loss(model: Models, batch: Batch) -> Tensor:
            return F.cross_entropy(model(batch.x) + shift, batch.y)

        return Plan(loss=loss, model=NET)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Train, or personalise."""
        weights: Weights = self.train(site, message, state).weights
        if phase.name == "personalise":
            return None, self._personal(site, weights)
        return self.pack(message.model, weights), state

    def _personal(self, site: Site, weights: Weights) -> Weights:
        """The model with a frame and a projection of its own."""
        first = site.architecture(OWN).spec.params  # what it has besides is the frame
        own = weights._replace(params={name: weights.params.get(name, p) for name, p in first.items()})
        z = torch.cat(site.map(lambda module, rows: module.features(rows.x), weights, name=NET))
        seen, head = Split(z, site.train.y), alone(head_of(own))
        for i in range(self.personal_rounds):
            for part, lr in (("frame", self.frame_lr), ("projection.", self.projection_lr)):
                plain = 0.0 if part == "frame" else None  # M has no momentum and does not decay
                fit = site.fit(
                    head, data=seen, model=HEAD, trainable=lambda name, part=part: name.startswith(part), epochs=3,
                    lr=lr, optimizer="sgd", momentum=plain, weight_decay=plain, purpose=f"{part}{i}",
                )  # fmt: skip
                head = fit.weights
        return with_head(own, rejoined(head))

    def aggregate(
        self, phase: Phase, host: Host, server: ServerState, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> ServerState:
        """FedAvg's; what is personal stays at the clients."""
        return server if phase.name == "personalise" else server._replace(model=self.combine(server.model, replies))

    def global_model(self, server: ServerState) -> Predictor:
        """The mean model."""
        return Net(server.model, NET)

    def personal_model(self, site: Site, message: Tree, state: Weights | None) -> Predictor:
        """The own model once there is one, else the mean."""
        return Net(message.model, NET) if state is None else Net(state, OWN)

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Weights | None) -> Predictor | None:
        """The trained model."""
        found = super().trained_model(site, message, update, state)
        assert isinstance(found, Net)
        return found._replace(model=NET)
