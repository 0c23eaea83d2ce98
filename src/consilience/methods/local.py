"""Local: every client trains alone, the reference that says whether joining pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType

from consilience.core.fit import Fit
from consilience.core.messages import ClientInfo, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Host, Site
from consilience.core.tree import Tree


@dataclass(frozen=True)
class Local(Method):
    """No exchange: a client that is sampled trains its own model on and keeps it.

        y_i <- y_i - eta grad F_i(y_i; batch)   K_i times, from the common initial model

    A client's state is y_i; nothing is sent, so no byte is counted. Clients that were never sampled still hold
    the initial model. Source: the usual reference; no paper.
    """

    name = "local"
    family = "baseline"
    source = "reference"
    year = 2017
    needs = Needs(architectures="any")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def init_server(self, host: Host) -> Tree:
        """Nothing."""
        return None

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """Nothing."""
        return None

    def init_client(self, site: Site) -> Weights:
        """The common initial model."""
        return site.initial()

    def sends(self, phase: Phase) -> type:
        """Nothing to the server."""
        return NoneType

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Weights) -> tuple[Tree, Weights]:
        """Train on."""
        fit: Fit = site.fit(state)
        return None, fit.weights

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """Nothing."""
        return server

    def global_model(self, server: Tree) -> None:
        """There is none."""
        return

    def personal_model(self, site: Site, message: Tree, state: Weights) -> Predictor:
        """The client's own model."""
        return Net(state, site.model)
