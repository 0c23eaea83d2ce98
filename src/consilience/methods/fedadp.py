"""FedADP: models of one family are expanded to one architecture, averaged, and shrunk again (Wang, Lv, Liu, 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from consilience.core.messages import Broadcast, ClientInfo, Reply
from consilience.core.method import Method, Needs, Phase, keep_buffers
from consilience.core.model import Architecture, Weights
from consilience.core.reduce import weighted_sum
from consilience.core.site import Host
from consilience.core.training import option
from consilience.core.tree import Tree, record
from consilience.parts.netchange import Change


@record
class Server(NamedTuple):
    """The model of full depth and width, and a seed for which units are copied."""

    model: Weights
    seed: int


@dataclass(frozen=True)
class FedADP(Method):
    """Clients have models of one family (``vgg5``, ``vgg8``, ...; ``mlp:32``, ``mlp:64x64``; nested widths) and the
    server has one that is nowhere smaller, ``--model``.

        down: w_k <- NetChange(x -> architecture of k);   client k trains w_k
        up:   x <- sum_k p_k NetChange(w_k -> architecture of x)

    NetChange has four operators. To-Wider copies units and divides the weights of those who take them by the number of
    copies; To-Deeper puts in layers that pass on what they are given; neither changes what the model computes.
    To-Narrower gives merged units their copies' mean and adds up the weights of those who take them; To-Shallower drops
    layers. Down after up gives the same weights back, to the last bits. Where all have the server's architecture, this
    is FedAvg bit for bit.

    Source: Wang, Lv, Liu, "FedADP: Unified Model Aggregation for Federated Learning with Heterogeneous Model
    Architectures", 2025; the expanding operators are those of Chen, Goodfellow, Shlens, "Net2Net", ICLR 2016. Only the
    paper's abstract and general idea were at hand and there is no official code, so this is a reconstruction and no
    reproduction: To-Narrower and To-Shallower are taken to be the inverses; which units are copied is drawn once for a
    run, since units that were copied otherwise in the round before would be merged with strangers; in a new residual
    block the last norm is 0. Models for which To-Wider and To-Deeper are not exact are refused.
    """

    name = "fedadp"
    family = "different architectures"
    source = "Wang et al."
    year = 2025
    confidence = "low"
    needs = Needs(architectures="family")

    form: Literal["model"] = option("model", "clients send models")

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """None; but models that cannot be converted are refused here. Raises ConfigError."""
        server, *others = models.values()
        for model in others:
            _change(model, server, 0).check()
        return {}

    def init_server(self, host: Host) -> Server:
        """The initial model."""
        return Server(host.initial(), int(host.rng("netchange").integers(2**62)))

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Broadcast:
        """The model, shrunk to the client's architecture."""
        whole, own = next(iter(client.architectures.values())), client.architectures[client.model]
        return Broadcast(server.model if own is whole else _change(own, whole, server.seed).down(server.model))

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """The mean of what clients sent, expanded."""
        whole, expanded = host.architecture(), []
        for reply in replies:
            own, sent = host.architecture(host.place.model_of(reply.job.client)), reply.update.model
            expanded.append(sent if own is whole else _change(own, whole, server.seed).up(sent))
        model = weighted_sum(expanded, self.shares(replies))
        return server._replace(model=keep_buffers(model, server.model))


@lru_cache(maxsize=32)
def _change(small: Architecture, big: Architecture, seed: int) -> Change:
    return Change(small, big, seed)
