"""FedMD: clients of any architecture agree through scores of public rows (Li and Wang, 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from consilience.core.fit import Batch, Models
from consilience.core.messages import ClientInfo, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.training import option
from consilience.core.tree import Tree
from consilience.parts import distillation
from consilience.parts.public import Scores, rows_of_round

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": distillation.absolute,
    "mse": distillation.squared,
    "kl": distillation.kl,
}


@dataclass(frozen=True)
class FedMD(Method):
    """Every round clients score public rows, learn the mean of all scores, and then train on their own rows.

        up: g_k(x) for the round's public rows, in evaluation mode;   down: g(x) = sum_k p_k g_k(x)
        digest: minimise distance(g_k(x), g(x)) on these rows;        revisit: train on the own rows

    Before the first round clients train on their own rows alone for ``warm_up`` epochs. The public rows of a round are
    drawn by a common seed. With digest_epochs = 0 and no warm-up the models are those of ``local``, bit for bit.

    Source: Li, Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", NeurIPS workshop 2019, algorithm
    1. Deviations: the public rows have no labels here, so that clients do not first train on these.
    """

    name = "fedmd"
    family = "different architectures"
    source = "Li and Wang, NeurIPS workshop"
    year = 2019
    needs = Needs(architectures="any", public_data=True, classification=True)
    takes_aggregator = True
    unstacked = "the loss looks at the scores of others"

    public_rows: Annotated[int, Ge(1)] = option(500, "public rows scored in a round")
    digest: Literal["l1", "mse", "kl"] = option("l1", "distance to the mean scores")
    digest_epochs: Annotated[int, Ge(0)] = option(1, "passes over the round's public rows")
    warm_up: Annotated[int, Ge(0)] = option(0, "epochs on the own rows before the first round")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight in the mean (uniform in the paper)")

    def program(self) -> tuple[Phase, ...]:
        """Scores, then digestion and training; perhaps a warm-up before all."""
        rounds = (Phase("scores"), Phase("train"))
        return (Phase("warm-up", when="start"), *rounds) if self.warm_up else rounds

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Scores of the round's rows."""
        own, count = place.architectures[model], 0 if place.public is None else len(place.public)
        return {"scores": Shape(own.dtype, (min(self.public_rows, count), own.outputs))}

    def init_server(self, host: Host) -> Scores:
        """No scores yet."""
        return Scores(torch.zeros(0, host.task.outputs))

    def broadcast(self, phase: Phase, server: Scores, client: ClientInfo) -> Tree:
        """The mean scores, to digest."""
        return server if phase.name == "train" else None

    def deploy(self, server: Tree, client: ClientInfo) -> Tree:
        """Nothing."""
        return None

    def init_client(self, site: Site) -> Tree:
        """The common initial model of its architecture."""
        return site.initial()

    def sends(self, phase: Phase) -> type:
        """Scores, in their phase."""
        return Scores if phase.name == "scores" else NoneType

    def client_update(self, phase: Phase, site: Site, message: Scores, state: Weights) -> tuple[Tree, Tree]:
        """Score, or digest and revisit."""
        if phase.name == "warm-up":
            return None, site.fit(state, epochs=self.warm_up).weights
        public = rows_of_round(site, self.public_rows, site.job.version)
        if phase.name == "scores":
            return Scores(site.scores(Net(state, site.model), public.x)), state
        distance = DISTANCES[self.digest]

        def loss(model: Models, batch: Batch) -> Tensor:
            return distance(model(batch.x), message.scores[batch.rows])

        if self.digest_epochs:
            state = site.fit(state, loss=loss, data=public, epochs=self.digest_epochs, purpose="digest").weights
        return None, site.fit(state).weights

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """The mean scores."""
        if phase.name != "scores":
            return server
        return weighted_sum([reply.update for reply in replies], self.shares(replies))

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Tree, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)
