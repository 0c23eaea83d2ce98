"""FlexiFed: of different architectures, the layers that they have in common are averaged (Wang et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from consilience.core.messages import Broadcast, ClientInfo, ModelUpdate, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.training import option
from consilience.core.tree import Tree, record

Groups = dict[tuple[str, ...], list[str]]
"""By the architectures that average them together, the names of parameters and buffers."""


@record
class Server(NamedTuple):
    """By architecture, its averaged layers."""

    models: dict[str, Weights]


@dataclass(frozen=True)
class FlexiFed(Method):
    """Layer l of two architectures is common where it and all layers before it have the same names and shapes.

        basic:      layers common to all architectures are averaged over all clients of the round; others stay at home
        clustered:  and the others are averaged over the clients of the same architecture
        max:        every layer is averaged over the clients of all architectures that have it in common

    A client gets and sends the averaged layers of its model; only with "basic" does it keep a state, its own model.
    With one architecture all three are FedAvg bit for bit (with equal ``weights``); with nothing in common, "basic" is
    Local. A layer that no client of a round has stays as it was. The server's ``--model`` counts if a client has it.

    Source: Wang, He, Chen, Chen, Huang, Jin, Yang, "FlexiFed: Personalized Federated Learning for Edge Clients with
    Heterogeneous Model Architectures", WWW 2023, by its abstract and a public re-implementation, which also tells
    common layers by name and shape. Deviations: that code trains on a tenth of the local rows each round in turn; here
    a round is ``local_epochs`` over all of them. Averaged layers start from one initial value for all.
    """

    name = "flexifed"
    family = "different architectures"
    source = "Wang et al., WWW"
    year = 2023
    confidence = "medium"
    needs = Needs(architectures="family")

    strategy: Literal["basic", "clustered", "max"] = option("max", "which layers are averaged, and among whom")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight (uniform in the paper)")
    form: Literal["model"] = option("model", "clients send layers")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """Models, of which there may be only some layers."""
        return ModelUpdate

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The averaged layers of the client's model."""
        shared = [name for archs, names in self._groups(place).items() if model in archs for name in names]
        return {"model": _part(place.architectures[model].spec, shared)}

    def _groups(self, place: Place) -> Groups:
        used = set(place.models or (place.server_model,))
        return _grouped(tuple(a for name, a in place.architectures.items() if name in used), self.strategy)

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Server:
        """Of each averaged layer the initial value in the first of its architectures."""
        models = {name: Weights({}, {}) for name in host.place.architectures}
        for archs, names in self._groups(host.place).items():
            common = _part(host.initial(archs[0]), names)
            models.update({name: _joined(models[name], common) for name in archs})
        for name, architecture in host.place.architectures.items():
            own = models[name]  # in the order of the model
            models[name] = _part(_joined(architecture.spec, own), [*own.params, *own.buffers])
        return Server(models)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Broadcast:
        """The averaged layers of its model."""
        return Broadcast(server.models[client.model])

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """The mean of each layer over those who have it in common."""
        models = dict(server.models)
        for archs, names in self._groups(host.place).items():
            group = [reply for reply in replies if host.place.model_of(reply.job.client) in archs]
            if group:
                mean = weighted_sum([_part(reply.update.model, names) for reply in group], self.shares(group))
                models.update({name: _joined(models[name], mean) for name in archs})
        return Server(models)

    # --- the client's half -------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Tree:
        """Its own model, where layers stay at home."""
        return site.initial() if self.strategy == "basic" else None

    def client_update(self, phase: Phase, site: Site, message: Broadcast, state: Tree) -> tuple[Tree, Tree]:
        """Train the whole model, send the averaged layers."""
        trained = site.fit(_whole(message.model, state)).weights
        sent = _part(trained, [*message.model.params, *message.model.buffers])
        return ModelUpdate(sent), trained if self.strategy == "basic" else state

    # --- what would be deployed --------------------------------------------------------------------------------

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Broadcast, state: Tree) -> Predictor:
        """The averaged layers in the client's own model."""
        return Net(_whole(message.model, state), site.model)

    def trained_model(self, site: Site, message: Tree, update: ModelUpdate, state: Tree) -> Predictor:
        """The client's model as it has trained it."""
        return Net(_whole(update.model, state), site.model)


def _whole(layers: Weights, own: Weights | None) -> Weights:
    return layers if own is None else _joined(own, layers)


def _joined(own: Weights, layers: Weights) -> Weights:
    """A model with some layers replaced; names that it lacks are added."""
    return Weights({**own.params, **layers.params}, {**own.buffers, **layers.buffers})


def _part(weights: Weights, names: Sequence[str]) -> Weights:
    """What there is of these names, in the model's order."""
    wanted = set(names)
    return Weights(*({name: t for name, t in part.items() if name in wanted} for part in weights))


@lru_cache(maxsize=32)
def _grouped(architectures: tuple[Architecture, ...], strategy: str) -> Groups:
    """What is averaged among whom."""
    layers = {a.name: _layers(a.spec) for a in architectures}
    found: Groups = {}
    for name, own in layers.items():
        for i, layer in enumerate(own):
            common = tuple(other for other in layers if layers[other][: i + 1] == own[: i + 1])
            everybody = len(common) == len(layers)
            if not everybody and strategy != "max":
                if strategy == "basic":
                    continue
                common = (name,)
            if common[0] == name:  # once for each group
                found.setdefault(common, []).extend(part for part, _ in layer)
    return found


def _layers(spec: Weights) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
    """The layers in order, each by names and shapes of what it holds."""
    both: Params = {**spec.params, **spec.buffers}
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in both.items():
        found.setdefault(name.rpartition(".")[0], []).append((name, tuple(tensor.shape)))
    return [tuple(layer) for layer in found.values()]
