"""HeteroFL: clients train the first units of each layer (Diao, Ding, Tarokh, 2021)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import UnionType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from consilience.core.fit import Batch, Models, Plan
from consilience.core.messages import Broadcast, ClientInfo, Model, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.training import option
from consilience.core.tree import Tree, record
from consilience.parts import submodel
from consilience.parts.norms import statistics
from consilience.parts.submodel import Piece, Slices


@record
class Server(NamedTuple):
    """The whole model, server updates made, a seed for random slices, and by architecture BatchNorm statistics (after
    the last round). covered: the fewest clients that any parameter had in one round so far; noise: the largest share of
    the squared parameters that a sub-model lacked."""

    model: Weights
    round: int
    seed: int
    statistics: dict[str, Params]
    covered: int | None
    noise: float


@record
class Up(NamedTuple):
    """A trained sub-model, and the classes that the client has, ``(m,)`` (None where they do not matter)."""

    model: Model
    labels: Stat


@dataclass(frozen=True)
class HeteroFL(Method):
    """A client of rate r trains the first ceil(r n) units of every hidden layer of n units.

        x_i <- mean of y_k,i over the clients k of the round whose sub-model has number i; the old x_i if none has it

    A client's rate is that of its model (``--models cnn@1.0,0.5,0.25``); the server has ``--model``. What the paper
    adds can be switched off:
    scaler: in training, what each hidden layer gives is divided by r.
    masked_loss: scores of classes that the client does not have are set to 0 in the loss.
    label_rows: a row of the output layer is averaged over the clients that have its class.
    static_bn: BatchNorm's statistics are computed anew after the last round, for each width, from the data of the
    clients that have it: the mean over their batches in training mode.

    Every round reports ``min_coverage``, the fewest clients that any number has had in a round so far, and
    ``reduction_noise``, the largest ||x - x m||^2 / ||x||^2 (Zhou et al., "Every Parameter Matters", NeurIPS 2023).
    With all rates 1 and these four off, it is uniform FedAvg bit for bit.

    Source: Diao, Ding, Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
    Clients", ICLR 2021, algorithm 1. Deviations: rates are fixed for a client; until the last round models are judged
    with the averaged running statistics, which training does not use.
    """

    name = "heterofl"
    family = "different architectures"
    source = "Diao et al., ICLR"
    year = 2021
    needs = Needs(architectures="widths", split_model=True, classification=True)
    unstacked = "the loss scales and masks"

    scaler: bool = option(True, "divide what hidden layers give by the rate, in training")
    masked_loss: bool = option(True, "leave scores of classes that a client does not have out of its loss")
    label_rows: bool = option(True, "average a class's row of the output layer over those who have it")
    static_bn: bool = option(True, "compute BatchNorm's statistics anew after the last round")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight (uniform in the paper)")
    form: Literal["model"] = option("model", "clients send sub-models")

    def program(self) -> tuple[Phase, ...]:
        """Training, and statistics in the end."""
        return (Phase("train"), Phase("statistics", when="end")) if self.static_bn else (Phase("train"),)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps) if phase.name == "train" else 0

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """None; but models that cannot be cut are refused here."""
        for model in models.values():
            submodel.sizes(model)
        return {}

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Classes that there are."""
        classes = Shape(torch.int64, ("m",), low=0, high=place.task.outputs - 1, distinct=True)
        return {"labels": classes} if self.label_rows else {}

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Server:
        """The initial model."""
        return Server(host.initial(), 0, int(host.rng("slices").integers(2**62)), {}, None, 0.0)

    def units(
        self, whole: Mapping[str, int], kept: Mapping[str, int], server: Server, version: int, client: int
    ) -> dict[str, Tensor]:
        """The units of each layer that a client has in the round after ``version`` updates."""
        return submodel.prefix(whole, kept)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """The client's part of the model; nothing where there are no statistics to ask for."""
        if phase.name == "statistics" and not server.model.buffers:
            return None
        return Broadcast(self._part(server, client, server.round))

    def deploy(self, server: Server, client: ClientInfo) -> Broadcast:
        """The same, with its width's statistics once there are any."""
        part = self._part(server, client, server.round)
        return Broadcast(part._replace(buffers={**part.buffers, **server.statistics.get(client.model, {})}))

    def _part(self, server: Server, client: ClientInfo, version: int) -> Weights:
        whole = next(iter(client.architectures.values()))
        kept = submodel.sizes(client.architectures[client.model])
        slices = _slices(whole)
        return slices.cut(server.model, self.units(slices.sizes, kept, server, version, client.id))

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Average where sub-models overlap; in the end, statistics by width."""
        if phase.name == "statistics":
            return server._replace(statistics=self._statistics(host, server, replies))
        slices, pieces = _slices(host.architecture()), []
        for reply, share in zip(replies, self.shares(replies), strict=True):
            kept = submodel.sizes(host.place.architectures[host.place.model_of(reply.job.client)])
            units = self.units(slices.sizes, kept, server, reply.job.version, reply.job.client)
            pieces.append(Piece(reply.update.model, units, share, reply.update.labels))
        model, least = submodel.average(slices, server.model, pieces)
        noise = max(slices.noise(server.model, piece.units) for piece in pieces)
        least = least if server.covered is None else min(least, server.covered)
        return Server(model, server.round + 1, server.seed, {}, least, max(noise, server.noise))

    def _statistics(self, host: Host, server: Server, replies: Sequence[Reply]) -> dict[str, Params]:
        """By architecture, the mean over the batches of all its clients."""
        groups: dict[str, list[Reply]] = {}
        for reply in replies:
            if reply.update is not None:
                groups.setdefault(host.place.model_of(reply.job.client), []).append(reply)
        found = {}
        for name, group in groups.items():
            batches = [-(-reply.samples // self.batch_size) for reply in group]
            shares = [n / sum(batches) for n in batches]
            found[name] = weighted_sum([reply.update.model.buffers for reply in group], shares)
        return found

    def report(self, server: Server) -> dict[str, float]:
        """Coverage and noise."""
        return {"min_coverage": float(server.covered or 0), "reduction_noise": server.noise}

    # --- the client's half -------------------------------------------------------------------------------------

    def sends(self, phase: Phase) -> type | UnionType:
        """Sub-models; at the end statistics, from clients that were asked for them."""
        return Up if phase.name == "train" else Up | None

    def client_update(self, phase: Phase, site: Site, message: Broadcast, state: Tree) -> tuple[Tree, Tree]:
        """Train the part, or pass the own rows for statistics."""
        labels = torch.unique(site.train.y) if self.label_rows else None
        if phase.name == "statistics":
            return (None if message is None else Up(statistics(site, message.model), labels)), state
        return Up(self.train(site, message, state).weights, labels), state

    def plan(self, site: Site, message: Broadcast, state: Tree) -> Plan:
        """Cross-entropy with scaler and mask."""
        rate = site.architecture().rate
        scales, masks = self.scaler and rate < 1, self.masked_loss
        if not scales and not masks:
            return Plan()
        absent = torch.ones(site.task.outputs, dtype=torch.bool)
        absent[site.train.y] = False

        def loss(model: Models, batch: Batch) -> Tensor:
            with _scaled(model, rate) if scales else contextlib.nullcontext():
                scores = model(batch.x)
            return site.task.loss(scores.masked_fill(absent, 0.0) if masks else scores, batch.y)

        return Plan(loss=loss)

    # --- what would be deployed --------------------------------------------------------------------------------

    def global_model(self, server: Server) -> Predictor:
        """The whole model, with the statistics of clients that have all of it, if there are any."""
        model = server.model
        whole = next((b for b in server.statistics.values() if _alike(b, model.buffers)), {})
        return Net(model._replace(buffers={**model.buffers, **whole}))

    def trained_model(self, site: Site, message: Tree, update: Up, state: Tree) -> Predictor:
        """The trained part."""
        return Net(update.model, site.model)


@lru_cache(maxsize=8)
def _slices(whole: Architecture) -> Slices:
    return Slices(whole)


def _alike(a: Params, b: Params) -> bool:
    return {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}


@contextlib.contextmanager
def _scaled(model: nn.Module, rate: float) -> Iterator[None]:
    """Inside, hidden layers give 1 / rate times as much (the paper's Scaler)."""
    hidden = [m for m in model.features.modules() if isinstance(m, nn.Conv2d | nn.Linear)]  # type: ignore[union-attr]
    hooks = [m.register_forward_hook(lambda module, inputs, out: out / rate) for m in hidden]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
