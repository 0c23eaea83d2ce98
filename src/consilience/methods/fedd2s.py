"""FedD2S: distillation through heads at the server, from which deep layers are dropped first (Atapour et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from consilience.core.federation import Split
from consilience.core.fit import Batch, Models, Plan, n_steps
from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected, Shape, Wrong, misfit
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.cuts import Cut, cuts
from consilience.parts.distillation import kl_to


@record
class Server(NamedTuple):
    """level: of the cut at which ``head`` stands, from 0, the deepest. head: None before the first round. round: server
    updates made."""

    level: int
    head: Weights | None
    round: int


@record
class Down(NamedTuple):
    """The head (None before there is one), the level at which it stands, and the one whose representations are asked
    for."""

    level: Stat
    head: Stat
    asked: Stat


@record
class Rows(NamedTuple):
    """What a client says of its rows. level: of the cut. features: ``(n, *shape)`` there. soft: ``(n, classes)``,
    probabilities. labels: ``(n,)``."""

    level: int
    features: Tensor
    soft: Tensor
    labels: Tensor


@record
class Up(NamedTuple):
    """A client's message."""

    rows: Stat


@dataclass(frozen=True)
class FedD2S(Method):
    """Clients keep their models. The server trains a head on their representations at a cut, and clients learn from
    what it says of theirs; the cut moves from deep to shallow layers, so that deep ones become personal.

        client:  t_j = softmax( H(r_j) / T ),  r_j = its representations at H's cut before training
                 v_k <- v_k - eta grad [ CE(z, y) + beta_c T^2 KL( t || softmax(z / T) ) ]
                 up: (r_j, softmax(z_j / T), y_j) at cut l(t), after training, for all its rows or ``upload_rows``
        server:  H <- SGD on CE(H(r), y) + beta_s T^2 KL( s || softmax(H(r) / T) ),   s as sent
        l(t) = cut number floor(t / drop_every), the deepest first, and the last one from then on

    z: the client's scores. The gradient of the client's KL passes through the layers above the cut and changes only
    those below it. A cut stands before each layer (or block of layers) but the first, and before the head; ``cuts``
    says how many of the deepest are used. H has the form of what is above the cut in the server's model, and begins
    anew where the cut moves. With beta_c = 0 the models are those of ``local``, bit for bit. A client that never took
    part is judged with a model that it trains alone with H for ``join_epochs`` passes. There is no global model.
    Representations, soft labels and labels of training rows leave the clients: this is not private.

    Source: Atapour, Seyedmohammadi, Abouei, Mohammadi, Plataniotis, "FedD2S: Personalized Data-Free Federated Knowledge
    Distillation", 2024. Its equations could not be read: the method is built from its abstract and summaries, so what
    is sent, where the gradient stops and what dropping does may be otherwise there.
    """

    name = "fedd2s"
    family = "personal models"
    source = "Atapour et al."
    year = 2024
    confidence = "low"
    needs = Needs(split_model=True, classification=True, loss=True)
    unstacked = "the loss looks at the soft labels of a head"
    trains_on_server = True

    beta_c: Annotated[float, Ge(0)] = option(1.0, "weight of what clients learn from the head", Search(0.1, 10.0))
    beta_s: Annotated[float, Ge(0)] = option(1.0, "weight of what the head learns from soft labels")
    temperature: Annotated[float, Gt(0)] = option(2.0, "T of soft labels", Search(1.0, 4.0))
    drop_every: Annotated[int, Ge(1)] = option(10, "rounds after which the cut moves to the next shallower place")
    cuts: Annotated[int, Ge(1)] | None = option(None, "how many cuts are used, the deepest first; all if not given")
    server_epochs: Annotated[int, Ge(1)] = option(1, "passes of the server over the representations")
    server_lr: Annotated[float, Gt(0)] = option(0.05, "the server's step size", Search(1e-3, 1.0))
    upload_rows: Annotated[int, Ge(1)] | None = option(None, "rows of which a client sends representations; all if "
                                                             "not given")  # fmt: skip
    join_epochs: Annotated[int, Ge(0)] = option(5, "passes of a client that never took part for its model")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """What is above each cut. Raises ConfigError for a model that cannot be cut."""
        model = next(iter(models.values()))
        return {name: cut.tail(model, name) for name, cut in self._cuts(model).items()}

    def _cuts(self, model: Architecture) -> dict[str, Cut]:
        return {f"head{level}": cut for level, cut in enumerate(cuts(model)[: self.cuts])}

    def _cut(self, place: Place, level: int) -> Cut:
        return self._cuts(place.architectures[place.server_model])[f"head{level}"]

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Representations of one cut."""
        own = place.architectures[model]
        known = list(self._cuts(own).values())

        def fits(found: Any) -> Wrong | None:
            if not isinstance(found, Rows) or found.level not in range(len(known)):
                return "", "is not what a client says of its rows at one of the cuts"
            lengths: dict[str, int] = {}
            wanted = {
                "features": Shape(own.dtype, ("n", *known[found.level].shape)),
                "soft": Shape(own.dtype, ("n", own.outputs), low=0, high=1 + 1e-6),
                "labels": Shape(torch.int64, ("n",), low=0, high=own.outputs - 1),
            }
            for name, shape in wanted.items():
                wrong = misfit(getattr(found, name), shape, lengths)
                if wrong is not None:
                    return name, wrong[1]
            return None

        return {"rows": fits}

    def sends(self, phase: Phase) -> type:
        """Representations."""
        return Up

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Server:
        """No head yet."""
        return Server(0, None, 0)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """The head, and what is asked for."""
        return Down(server.level, server.head, self._level(server, client.architectures))

    def _level(self, server: Server, models: Mapping[str, Architecture]) -> int:
        last = len(self._cuts(next(iter(models.values())))) - 1
        return min(server.round // self.drop_every, last)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Train the head of this round's cut on representations from there."""
        level = self._level(server, host.place.architectures)
        found = [reply.update.rows for reply in replies if reply.update.rows.level == level]
        if not sum(len(rows.labels) for rows in found):  # all were asked before the cut moved, or have no rows
            return server._replace(round=server.round + 1)
        name = f"head{level}"
        start = server.head if server.head is not None and server.level == level else host.initial(name)
        soft = torch.cat([rows.soft for rows in found])
        rows = Split(torch.cat([rows.features for rows in found]), torch.cat([rows.labels for rows in found]))

        def loss(model: Models, batch: Batch) -> Tensor:
            scores = model(batch.x)
            value = host.task.loss(scores, batch.y)
            if not self.beta_s:
                return value
            return value + self.beta_s * kl_to(scores, soft[batch.rows], self.temperature)

        head = host.fit(
            start, data=rows, model=name, loss=loss, epochs=self.server_epochs, lr=self.server_lr, optimizer="sgd",
            purpose="head",
        ).weights  # fmt: skip
        return Server(level, head, server.round + 1)

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    # --- the client's half -------------------------------------------------------------------------------------

    def client_update(self, phase: Phase, site: Site, message: Down, state: Weights | None) -> tuple[Tree, Weights]:
        """Train with the head, then say what is asked for."""
        start = site.initial() if state is None else state
        own = site.fit(start, self._taught(site, message, start)).weights
        return Up(self._rows(site, own, message.asked)), own

    def _taught(self, site: Site, message: Down, start: Weights) -> Plan:
        if not self.beta_c or message.head is None or not len(site.train):
            return Plan()
        cut = self._cut(site.place, message.level)
        r = torch.cat(site.map(lambda model, rows: cut.below(model, rows.x), start))
        zeros = torch.zeros(len(r), dtype=torch.int64)
        said = site.map(lambda head, rows: head(rows.x), message.head, Split(r, zeros), f"head{message.level}")
        soft = (torch.cat(said) / self.temperature).softmax(1)

        def loss(model: Models, batch: Batch) -> Tensor:
            r = cut.below(model, batch.x)
            scores = cut.above(model, r)
            taught = self.beta_c * kl_to(scores, soft[batch.rows], self.temperature)
            return site.task.loss(scores, batch.y) + only_through(taught, r)

        return Plan(loss=loss)

    def _rows(self, site: Site, own: Weights, level: int) -> Rows:
        cut = self._cut(site.place, level)
        data = site.cast(site.train)
        if self.upload_rows is not None and self.upload_rows < len(data):
            chosen = site.rng("upload").permutation(len(data))[: self.upload_rows]
            data = data.rows(torch.from_numpy(chosen))

        def say(model: Any, rows: Split) -> tuple[Tensor, Tensor]:
            r = cut.below(model, rows.x)
            return r, (cut.above(model, r) / self.temperature).softmax(1)

        features, soft = zip(*site.map(say, own, data), strict=True)
        return Rows(level, torch.cat(features), torch.cat(soft), data.y)

    # --- what would be deployed --------------------------------------------------------------------------------

    def personal_model(self, site: Site, message: Down, state: Weights | None) -> Predictor:
        """The own model; a client without one trains it."""
        if state is not None:
            return Net(state, site.model)
        start = site.initial()
        if not self.join_epochs or not len(site.train):
            return Net(start, site.model)
        plan = self._taught(site, message, start)
        plan.steps, plan.purpose = n_steps(len(site.train), self.batch_size, self.join_epochs, None), "join"
        return Net(site.fit(start, plan).weights, site.model)

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)


def only_through(value: Tensor, r: Tensor) -> Tensor:
    """``value``, with the gradient that reaches parameters below ``r`` alone: those above it are taken as constants."""
    if not r.requires_grad:  # all that is below is frozen
        return value.detach()
    (slope,) = torch.autograd.grad(value, r, retain_graph=True)
    linear = (slope * r).sum()
    return linear + (value - linear).detach()
