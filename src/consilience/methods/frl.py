"""FRL: clients vote with rankings of a random network's edges (Mozaffari et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from torch.func import functional_call

from consilience.core.errors import ConfigError
from consilience.core.fit import Batch, Models
from consilience.core.messages import Buffers, ClientInfo, Ranks, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected, Wrong
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.aggregators import Median


@record
class Server(NamedTuple):
    """theta (with what of it is not ranked, and the buffers), the scores in ascending order, and the global ranking."""

    model: Weights
    ordered: Params
    ranks: Params


@record
class Ranking(NamedTuple):
    """By ranked parameter, its edges from the least score to the greatest."""

    ranks: Ranks
    buffers: Buffers


class _Popped(torch.autograd.Function):
    """1 at the greatest ``keep`` scores, of equal ones the last, and 0 elsewhere; backward as if it were the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, keep: int) -> Tensor:
        return top(scores, keep)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def top(scores: Tensor, keep: int) -> Tensor:
    """1 at the greatest ``keep`` scores, of equal ones the last, and 0 elsewhere."""
    mask = torch.zeros(scores.numel(), dtype=scores.dtype)
    mask[scores.detach().flatten().argsort(stable=True)[scores.numel() - keep :]] = 1
    return mask.reshape(scores.shape)


def vote(rankings: Sequence[Tensor]) -> Tensor:
    """The ranking by the sums of places; of equal sums the edge with the lower number first."""
    places = sum(ranking.long().argsort() for ranking in rankings)
    assert isinstance(places, Tensor)
    return places.argsort(stable=True).to(rankings[0].dtype)


def narrow(count: int) -> torch.dtype:
    """The smallest type for the numbers 0 .. count - 1."""
    if count <= 2**8:
        return torch.uint8
    return torch.int16 if count <= 2**15 else torch.int32


@dataclass(frozen=True)
class FRL(Method):
    """Nobody trains weights: each parameter theta with two dimensions or more stays a random sign times
    (2 / fan_in)^(1/2), and clients find which of its n edges to use. An edge e has a score s_e; the network has the
    edges with the k n greatest scores, and no others.

        s[R_j] = o_j, j = 1 .. n                 R: the global ranking, o: the initial scores in ascending order
        s <- SGD on F_i( theta * top_k(s) ; batch ),   the gradient of top_k taken for that of s  (edge-popup)
        pi_i = argsort s, sent                    places_i(e): where e stands in pi_i
        R <- argsort_e sum_i places_i(e)          the vote; ties: the edge with the lower number

    A client has one vote, whatever it has trained on: all that a hostile one can send is a permutation, and that moves
    an edge's sum by n - 1 at most. o is n draws of |U(-b, b)|, b = fan_in^(-1/2), that everybody makes alike; their own
    order is the first R. Of other parameters, biases are 0 and others stay as they begin (1, in layers that normalise);
    buffers combine by coordinate-wise median. Momentum begins anew each round. What travels are whole bytes for each
    edge: 1, 2 or 4 by n, up and down.

    One client: its ranking is the next global one. Equal rankings stay as they are. A ranking and its reverse cancel.

    Source: Mozaffari, Shejwalkar, Houmansadr, "Every Vote Counts: Ranking-Based Training of Federated Learning to
    Resist Poisoning Attacks", USENIX Security 2023, and its official code; edge-popup: Ramanujan et al., CVPR 2020.
    Deviations: the official code masks by |s|, but ranks by s, whose start has both signs, so that after a vote the
    least edges of a ranking are used as well as its greatest (``mask_on=abs`` does the same); here scores begin from 0
    upwards and masks follow the ranking. The step size is constant in a round (a cosine there), weight decay as given
    (1e-4 there); the sparse form, which sends the greatest edges alone, is not part of this.
    """

    name = "frl"
    family = "hostile clients"
    source = "Mozaffari et al., USENIX Security"
    year = 2023
    confidence = "medium"
    needs = Needs(loss=True)
    unstacked: ClassVar[str] = "masks are part of its loss"

    lr: Annotated[float, Gt(0)] = option(0.4, "step size of scores", Search(0.01, 1.0))
    momentum: Annotated[float, Ge(0), Le(1)] = option(0.9, "local momentum of scores; starts anew each round")
    keep: Annotated[float, Gt(0), Lt(1)] = option(0.5, "share k of the edges that are used", Search(0.1, 0.9, False))
    mask_on: Literal["score", "abs"] = option("score", "edges are chosen by their scores, or by scores without sign")
    weights: Literal["uniform"] = option("uniform", "every client has one vote")

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """None; raises ConfigError where there is nothing to rank."""
        for model in models.values():
            if not ranked(model.spec.params):
                raise ConfigError(f"frl: model '{model.name}' has no weight of two dimensions or more to rank")
        return {}

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """Rankings."""
        return Ranking

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A permutation for each ranked parameter."""
        sizes = {name: p.numel() for name, p in ranked(place.architectures[model].spec.params).items()}

        def fits(found: Any) -> Wrong | None:
            if not isinstance(found, dict) or list(found) != list(sizes):
                return "", "is no ranking for each weight of the model"
            return next(((n, why) for n, t in found.items() if (why := _no_permutation(t, sizes[n]))), None)

        return {"ranks": fits}

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Server:
        """theta, and the first ranking."""
        drawn = self._drawn(host)
        ordered = {name: s.sort().values for name, s in drawn.items()}
        ranks = {name: s.argsort(stable=True).to(narrow(len(s))) for name, s in drawn.items()}
        return Server(_theta(host.initial()), ordered, ranks)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Ranking:
        """The global ranking."""
        return Ranking(server.ranks, server.model.buffers)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """The vote."""
        ranks = {name: vote([reply.update.ranks[name] for reply in replies]) for name in server.ranks}
        buffers = dict(server.model.buffers)
        if replies[0].update.buffers:
            even = [1 / len(replies)] * len(replies)
            buffers = Median().combine([r.update for r in replies], {"ranks": even, "buffers": even}).buffers
        return Server(Weights(server.model.params, buffers), server.ordered, ranks)

    def global_model(self, server: Server) -> Predictor:
        """The network of the greatest edges."""
        return Net(self._masked(server.model, server.ordered, server.ranks))

    # --- the client's half -------------------------------------------------------------------------------------

    def client_update(self, phase: Phase, site: Site, message: Ranking, state: Tree) -> tuple[Ranking, Tree]:
        """Train scores, and rank them."""
        theta = _theta(site.initial())
        scores = _placed(theta.params, self._ordered(site), message.ranks)

        def loss(model: Models, batch: Batch) -> Tensor:
            live = dict(model.named_parameters())
            used = {n: theta.params[n] * self._mask(live[n]) for n in scores}
            return site.task.loss(functional_call(model, used, (batch.x,)), batch.y)

        start = Weights({**theta.params, **scores}, self._buffers(site, message))
        found = site.fit(start, loss=loss, trainable=lambda name: name in scores).weights
        ranks = {n: found.params[n].flatten().argsort(stable=True).to(message.ranks[n].dtype) for n in scores}
        return Ranking(ranks, found.buffers), state

    def personal_model(self, site: Site, message: Ranking, state: Tree) -> Predictor:
        """The network of the greatest edges."""
        theta = Weights(_theta(site.initial()).params, self._buffers(site, message))
        return Net(self._masked(theta, self._ordered(site), message.ranks), site.model)

    def trained_model(self, site: Site, message: Ranking, update: Ranking, state: Tree) -> Predictor:
        """That of the client's own ranking."""
        theta = Weights(_theta(site.initial()).params, update.buffers or self._buffers(site, message))
        return Net(self._masked(theta, self._ordered(site), update.ranks), site.model)

    def _buffers(self, site: Site, message: Ranking) -> Params:
        """Those that the client kept, or those that it was sent."""
        kept: Params | None = site.buffers
        return message.buffers if kept is None else kept

    def _drawn(self, site: Site) -> Params:
        """The initial scores, flat."""
        found = {}
        for name, p in ranked(site.architecture().spec.params).items():
            b = _fan_in(p) ** -0.5
            drawn = torch.from_numpy(site.shared_rng("scores", name).uniform(-b, b, p.numel())).to(p.dtype)
            found[name] = drawn if self.mask_on == "abs" else drawn.abs()
        return found

    def _ordered(self, site: Site) -> Params:
        return {name: s.sort().values for name, s in self._drawn(site).items()}

    def _mask(self, scores: Tensor) -> Tensor:
        """1 at the edges that are used."""
        keep = scores.numel() - int((1 - self.keep) * scores.numel())
        found: Tensor = _Popped.apply(scores.abs() if self.mask_on == "abs" else scores, keep)  # type: ignore[no-untyped-call]
        return found

    def _masked(self, theta: Weights, ordered: Params, ranks: Params) -> Weights:
        scores = _placed(theta.params, ordered, ranks)
        used = {name: theta.params[name] * self._mask(s) for name, s in scores.items()}
        return Weights({**theta.params, **used}, theta.buffers)


def ranked(params: Params) -> Params:
    """The parameters whose edges are ranked: those of two dimensions or more."""
    return {name: p for name, p in params.items() if p.ndim >= 2}


def _fan_in(p: Tensor) -> int:
    return math.prod(p.shape[1:])


def _theta(initial: Weights) -> Weights:
    """Random signs of one size by layer, no biases, and what else there is as it was."""
    params = {
        name: torch.where(p < 0, -1.0, 1.0).to(p.dtype) * (2 / _fan_in(p)) ** 0.5
        if p.ndim >= 2
        else torch.zeros_like(p) if name.rpartition(".")[2] == "bias" else p
        for name, p in initial.params.items()
    }  # fmt: skip
    return Weights(params, initial.buffers)


def _placed(like: Params, ordered: Params, ranks: Params) -> Params:
    """Scores in the order of a ranking."""
    found = {}
    for name, ranking in ranks.items():
        scores = torch.empty_like(ordered[name])
        scores[ranking.long()] = ordered[name]
        found[name] = scores.reshape(like[name].shape)
    return found


def _no_permutation(found: Any, size: int) -> str | None:
    """Why this is no permutation of 0 .. size - 1 in its type."""
    if not isinstance(found, Tensor) or found.shape != (size,):
        return f"is no tensor of shape ({size})"
    if found.dtype != narrow(size):
        return f"has dtype {found.dtype}, not {narrow(size)}"
    if not torch.equal(found.long().sort().values, torch.arange(size)):
        return "is no permutation"
    return None
