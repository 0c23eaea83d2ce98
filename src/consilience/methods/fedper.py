"""Partial personalisation: FedPer (Arivazhagan et al., 2019), FedRep (Collins et al., 2021), and FedSim and FedAlt
(Pillutla et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from consilience.core.fit import Batch, Grad, Plan, n_steps
from consilience.core.messages import Broadcast
from consilience.core.method import Method, Phase, ServerState
from consilience.core.model import Architecture, Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.local_steps import plain_sgd
from consilience.parts.split import PERSONAL, Names, divided, joined


@dataclass(frozen=True)
class FedPer(Method):
    """The first layers are shared and averaged; each client keeps last layers of its own.

        (u_k, v_k) <- local training of both from (u, v_k);      u <- sum_k p_k u_k

    u: shared parameters, v_k: personal ones, which a client keeps between its rounds and never sends. ``personal`` says
    which these are: ``output`` (the head), ``input`` (the first layer), ``adapter`` (parts called so), ``none``, or
    patterns of names as ``features.3.*,head.*``. Buffers (BatchNorm statistics) go with their layer. In training a new
    client begins with the common initial v; one that is judged before deploys that v after ``join_epochs`` passes over
    its own rows with u fixed. There is no global model.

    With personal = none it is FedAvg bit for bit. Something must be shared; where nothing is, use ``local``.

    Source: Arivazhagan, Aggarwal, Singh, Choudhary, "Federated Learning with Personalization Layers", 2019, algorithms
    1 and 2. Deviations: all clients begin with the same v, where the paper draws one each; the cohort may be a part of
    the clients.
    """

    name = "fedper"
    family = "personal models"
    source = "Arivazhagan et al."
    year = 2019
    sums = Method.means

    personal: str = option("output", f"what clients keep: {PERSONAL}, or patterns of names")

    join_epochs: Annotated[int, Ge(0)] = option(5, "passes of a client that never took part for its personal part")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training with the shared part in it."""
        return self.one_fit(rows, steps)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """None; a model that cannot be divided so is refused here. Raises ConfigError."""
        for model in models.values():
            divided(model, self.personal)
        return {}

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The shared part."""
        shared = self._names(place).shared_of(place.architectures[model].spec)
        buffers = {} if self.buffers == "local" else shared.buffers
        return {"model": shared, "delta": shared.params, "buffers": buffers}

    def sends(self, phase: Phase) -> type:
        """Models or differences, of the shared part."""
        return self.packs

    def _names(self, place: Place) -> Names:
        return divided(place.architectures[place.server_model], self.personal)

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> ServerState:
        """The shared part of the initial model."""
        return ServerState(self._names(host.place).shared_of(host.initial()))

    def global_model(self, server: ServerState) -> Predictor | None:
        """There is one only if nothing is personal."""
        return Net(server.model) if self.personal == "none" else None

    # --- the client's half -------------------------------------------------------------------------------------

    def client_update(
        self, phase: Phase, site: Site, message: Broadcast, state: Weights | None
    ) -> tuple[Tree, Weights]:
        """Train both parts, send one and keep the other."""
        names = self._names(site.place)
        own = names.own_of(site.initial()) if state is None else state
        trained = self.train_parts(site, self._whole(site, message.model, own), names)
        return self.pack(message.model, names.shared_of(trained)), names.own_of(trained)

    def train_parts(self, site: Site, start: Weights, names: Names) -> Weights:
        """Both parts in each step."""
        trained: Weights = site.fit(start).weights
        return trained

    def _whole(self, site: Site, shared: Weights, own: Weights) -> Weights:
        return joined(site.architecture().spec, shared, own)

    # --- what would be deployed --------------------------------------------------------------------------------

    def personal_model(self, site: Site, message: Broadcast, state: Weights | None) -> Predictor:
        """The server's shared part with the own personal one; a client without one learns it."""
        if state is not None:
            return Net(self._whole(site, message.model, state), site.model)
        names = self._names(site.place)
        start = self._whole(site, message.model, names.own_of(site.initial()))
        if not (self.join_epochs and names.own_trained and len(site.train)):
            return Net(start, site.model)
        steps = n_steps(len(site.train), self.batch_size, self.join_epochs, None)
        fit = site.fit(start, steps=steps, trainable=names.own_trained.__contains__, purpose="join")
        return Net(self._whole(site, message.model, names.own_of(fit.weights)), site.model)

    def trained_model(self, site: Site, message: Broadcast, update: Tree, state: Weights) -> Predictor:
        """Both parts as the client has trained them."""
        found = super().trained_model(site, message, update, state)
        assert isinstance(found, Net)
        return Net(self._whole(site, found.weights, state), site.model)


@dataclass(frozen=True)
class FedRep(FedPer):
    """Each client learns a head of its own on the shared features, then the features under that head.

        v_k <- local training of v_k alone, u fixed       ``head_epochs`` passes
        u_k <- local training of u alone, v_k fixed       ``local_epochs`` passes (or ``local_steps``)
        u   <- sum_k p_k u_k

    u: shared parameters, v_k: the client's own, by default the head; as in ``fedper``. The local optimiser starts anew
    in between. BatchNorm statistics move in both. With head_epochs = 0 the first heads are never learned. With
    personal = none it is FedAvg bit for bit.

    Source: Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized Federated
    Learning", ICML 2021, algorithm 1, and its official code. Deviations: the paper's linear case averages uniformly
    and orthogonalises u; here it is the general algorithm. What is deployed is v_k with the server's u, without the
    code's last passes over the head; ``after`` in a run's history is with them.
    """

    name = "fedrep"
    source = "Collins et al., ICML"
    year = 2021

    head_epochs: Annotated[int, Ge(0)] = option(10, "passes over the local data for the personal part", Search(1, 20))

    def train_parts(self, site: Site, start: Weights, names: Names) -> Weights:
        """One part, then the other."""
        return in_turn(site, start, names, self.head_epochs, None)


@dataclass(frozen=True)
class FedSim(FedPer):
    """Any part of the model is personal; both parts step at once, each with its own step size.

        u_k <- u_k - eta grad_u F_k(u_k, v_k; batch);   v_k <- v_k - eta_v grad_v F_k(u_k, v_k; batch)     at once
        u   <- sum_k p_k u_k

    u: shared parameters, v_k: the client's own. ``personal`` and what is deployed are as in ``fedper``, which it is bit
    for bit with eta_v = eta. With personal = none it is FedAvg bit for bit.

    Source: Pillutla, Malik, Mohamed, Rabbat, Sanjabi, Xiao, "Federated Learning with Partial Model Personalization",
    ICML 2022, algorithm 3, and its official code. Deviations: that code begins from a model that FedAvg has trained,
    has a server optimiser, weighs clients by their batches, and may decay v; here u is averaged as in FedAvg.
    """

    name = "fedsim"
    source = "Pillutla et al., ICML"
    year = 2022

    personal_lr: Annotated[float, Gt(0)] | None = option(None, "step size of the personal part; as lr if not given")

    def check(self) -> None:
        """Two step sizes are for SGD."""
        if self.personal_lr is not None:
            plain_sgd(self, momentum=True)
        super().check()

    def train_parts(self, site: Site, start: Weights, names: Names) -> Weights:
        """Both parts in each step."""
        if self.personal_lr is None or self.personal_lr == self.lr:
            return super().train_parts(site, start, names)
        ratio = self.personal_lr / self.lr

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            gradient = grad()
            return {name: g * ratio if name in names.own else g for name, g in gradient.items()}, carry

        trained: Weights = site.fit(start, step=step).weights
        return trained


@dataclass(frozen=True)
class FedAlt(FedPer):
    """Any part of the model is personal; clients train it first, then the shared part with the new personal one.

        v_k <- v_k - eta_v grad_v F_k(u, v_k; batch)      ``personal_epochs`` passes
        u_k <- u_k - eta grad_u F_k(u_k, v_k; batch)      ``local_epochs`` passes (or ``local_steps``)
        u   <- sum_k p_k u_k

    u: shared parameters, v_k: the client's own. ``personal`` and what is deployed are as in ``fedper``. With personal =
    none it is FedAvg, with personal = output and eta_v = eta it is FedRep, both bit for bit.

    Source: Pillutla, Malik, Mohamed, Rabbat, Sanjabi, Xiao, "Federated Learning with Partial Model Personalization",
    ICML 2022, algorithm 2, and its official code. Deviations: those of ``fedsim``, and no limit of 1000 steps on the
    personal part.
    """

    name = "fedalt"
    source = "Pillutla et al., ICML"
    year = 2022

    personal_epochs: Annotated[int, Ge(0)] = option(1, "passes over the local data for the personal part")
    personal_lr: Annotated[float, Gt(0)] | None = option(None, "step size of the personal part; as lr if not given")

    def train_parts(self, site: Site, start: Weights, names: Names) -> Weights:
        """One part, then the other."""
        return in_turn(site, start, names, self.personal_epochs, self.personal_lr)


def in_turn(site: Site, start: Weights, names: Names, epochs: int, lr: float | None) -> Weights:
    """Training of the personal part alone for ``epochs`` with step size ``lr`` (None: the method's), then of the shared
    part alone for the method's own epochs or steps. A part without anything to train is passed over."""
    method, weights = site.method, start
    if epochs and names.own_trained:
        steps = n_steps(len(site.train), method.batch_size, epochs, None)
        own = Plan(steps=steps, trainable=names.own_trained.__contains__, purpose="personal")
        own.lr = None if lr is None else lr * method.lr_decay**site.job.version
        weights = site.fit(weights, own).weights
    trained: Weights = site.fit(weights, trainable=names.shared_trained.__contains__).weights
    return trained
