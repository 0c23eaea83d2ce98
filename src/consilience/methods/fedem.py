"""FedEM: each client's law is a mixture of components that all share (Marfoq et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from consilience.core.messages import ClientInfo, Reply
from consilience.core.method import Method, Needs, Phase, keep_buffers
from consilience.core.model import Weights
from consilience.core.predict import Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts import components
from consilience.parts.components import Components


@dataclass(frozen=True)
class FedEM(Method):
    """EM: clients find which component made each of their rows, and train every component on its share of them.

        E:  q_jm = softmax_m( log pi_im - loss(h_m(x_j), y_j) )         losses in evaluation mode, of what was received
        M:  pi_im = mean_j q_jm;    theta_im: local steps from theta_m on sum_j q_jm loss(h_m(x_j), y_j)
        theta_m <- sum_i p_i theta_im
        client i deploys  sum_m pi_im softmax(h_m(x))

    pi_i stays at the client and begins uniform; q is fixed while components train. A client that never took part joins
    by ``join_steps`` of EM on pi_i alone, the components fixed. The global model mixes equally. A client's cluster is
    its largest pi_im. Components start apart: equal ones would stay equal. With one it is FedAvg, bit for bit.

    Source: Marfoq, Neglia, Bellet, Kameni, Vidal, "Federated Multi-Task Learning under a Mixture of Distributions",
    NeurIPS 2021, algorithm 1. Deviations: the mean is over the cohort (the authors' code has absent clients count with
    the old components).
    """

    name = "fedem"
    family = "clusters"
    source = "Marfoq et al., NeurIPS"
    year = 2021
    needs = Needs(classification=True, loss=True)

    components: Annotated[int, Ge(1)] = option(3, "how many components", Search(2, 6))
    join_steps: Annotated[int, Ge(1)] = option(10, "EM steps by which a client that never took part finds its weights")

    def check(self) -> None:
        """Buffers cannot stay local."""
        components.check_buffers(self)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """A training of each component that has a share; of one at least."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type | None:
        """All components."""
        return Components

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """As many models."""
        return {"models": components.fitting(place, model, self.components)}

    @property
    def cells(self) -> int:
        """How many weights pi_i has."""
        return self.components

    def init_server(self, host: Host) -> Tree:
        """Components that differ."""
        return Components(components.draw(host, self.components))

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """All of it."""
        return server

    def scores(self, site: Site, message: Tree) -> Tensor:
        """Log-likelihood of each training row under each component, up to a constant of the row."""
        return -components.losses(site, message.models)

    def joined(self, site: Site, message: Tree, state: Tensor | None) -> Tensor:
        """pi_i; of a client without one, found now."""
        if state is not None:
            return state
        uniform = torch.full((self.cells,), 1 / self.cells, dtype=site.architecture().dtype)
        if self.cells == 1 or not len(site.train):
            return uniform
        return components.estimate(self.scores(site, message), uniform, self.join_steps)[1]

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tensor | None) -> tuple[Tree, Tree]:
        """E, then M."""
        if self.components == 1:
            pi = self.joined(site, message, state)
            return self.packed(site, (site.fit(message.models[0]).weights,), pi.expand(len(site.train), 1)), pi
        prior = torch.full((self.components,), 1 / self.components, dtype=site.architecture().dtype)
        q, pi = components.estimate(self.scores(site, message), prior if state is None else state, 1)
        trained = [site.fit(model, sample_weight=q[:, m]).weights for m, model in enumerate(message.models)]
        return self.packed(site, tuple(trained), q), pi

    def packed(self, site: Site, models: tuple[Weights, ...], q: Tensor) -> Tree:
        """The update; q: responsibilities ``(rows, components)``."""
        return Components(models)

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """The mean of each component."""
        mean = weighted_sum([reply.update.models for reply in replies], self.shares(replies))
        models = tuple(keep_buffers(new, old) for new, old in zip(mean, server.models, strict=True))
        return server._replace(models=models)

    def global_model(self, server: Tree) -> Predictor | None:
        """All components equally."""
        return components.mixture(server.models, [1 / self.components] * self.components, "")

    def personal_model(self, site: Site, message: Tree, state: Tensor | None) -> Predictor | None:
        """Components by pi_i."""
        return components.mixture(message.models, self.joined(site, message, state).tolist(), site.model)

    def cluster(self, site: Site, message: Tree, state: Tensor | None) -> int:
        """The component with the largest weight."""
        return int(self.joined(site, message, state).argmax())

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Tensor) -> Predictor | None:
        """The trained components by the new pi_i."""
        return components.mixture(update.models, state.tolist(), site.model)
