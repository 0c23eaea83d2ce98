"""DProxSGT: gradient tracking for composite problems, with whole or compressed messages (Yan et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Gt, Le

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Inbox
from consilience.core.method import Phase
from consilience.core.model import Params, Weights
from consilience.core.reduce import weighted_sum
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.methods.tracking import Node, Tracking, settled
from consilience.parts import compressors, proximal
from consilience.parts.compressed import Squeezed
from consilience.parts.compressors import Compressor
from consilience.parts.directions import means
from consilience.parts.feedback import shapes_of


@record
class Public(NamedTuple):
    """What all know of a vector v_i: the own copy v^_i, the weighted mean sum_j W_ij v^_j of neighbours', and where
    the compressor begins."""

    own: Params
    mean: Params
    basis: Params | None = None


@record
class Told(NamedTuple):
    """A node whose messages are compressed: as :class:`~consilience.methods.tracking.Node`, with the public copies of
    x_i and y_i and, in the middle of a round, what it says next."""

    model: Weights
    control: Params
    x: Public
    y: Public
    end: Weights | None = None
    direction: Params | None = None
    length: float = 0.0
    says: Squeezed | None = None


@record
class Increment(NamedTuple):
    """To neighbours: by what a public copy changes, compressed, and a model's buffers beside it."""

    change: Squeezed
    buffers: Params


@dataclass(frozen=True)
class DProxSGT(Tracking):
    """Nodes minimise (1/n) sum_i F_i(x) + r(x) together, with a step along the tracked gradient and then the proximal
    operator of r.

        y_i <- sum_j W_ij (y_j + g_j - g_j old)          g_i: gradient at x_i over the rows of the round's batches;
        x_i <- sum_j W_ij prox_{eta r}(x_j - eta y_j)    y_i and g_i old start at 0

    Compressed (``compress``, a compressor without feedback), with public copies x^, y^ that start at 0:

        h_i = y_i + g_i - g_i old;         y^_i <- y^_i + C(h_i - y^_i);  y_i <- h_i + gamma sum_j W_ij (y^_j - y^_i)
        h_i = prox_{eta r}(x_i - eta y_i); x^_i <- x^_i + C(h_i - x^_i);  x_i <- h_i + gamma sum_j W_ij (x^_j - x^_i)

    Only what C gives travels; each node keeps sum_j W_ij x^_j up to date from it, so every node has to take part in
    every round and W has to stay the same. W as in tracking. Invariant, compressed or not: the mean of y_i is that of
    g_i. A round is one step: ``local_steps`` and ``local_epochs`` say of how many batches a gradient is (1 step in the
    paper). ``weights`` and ``form`` have no meaning.

    With regularizer=none and one local step it is tracking in order "atc", bit for bit. With everything sent
    (topk:1.0) and gamma = 1 the compressed form is the plain one to rounding.

    Source: Yan, Chen, Chen, Xu, "Compressed Decentralized Proximal Stochastic Gradient Method for Nonconvex Composite
    Problems with Heterogeneous Data", ICML 2023 (DProxSGT, CDProxSGT). Deviations: none; like the compressed form, the
    plain one takes its step along the mixed y_i (the published code there takes the one before mixing).
    """

    name = "dproxsgt"
    source = "Yan et al., ICML"
    year = 2023
    compresses = "both"

    order: Literal["atc"] = option("atc", "directions are mixed first, then models")
    regularizer: str = option("l1:1e-4", "r: none, l1:LAM, l2:LAM or box:A:B")
    gamma: Annotated[float, Gt(0), Le(1)] = option(
        0.5, "consensus step size of the compressed form", Search(0.1, 1.0, False)
    )

    def check(self) -> None:
        """The regulariser and the compressor are ones, and messages to a server are none."""
        super().check()
        proximal.parse(self.regularizer, f"{self.name} regularizer")
        self.compressor()
        if self.compress_down != "identity":
            raise ConfigError(f"{self.name} has no server; use compress-down=identity")

    def compressor(self) -> Compressor | None:
        """C in its contractive form; None for identity."""
        if self.compress == "identity":
            return None
        return compressors.parse(self.compress, False, f"{self.name} compress {self.compress}")

    @property
    def everybody(self) -> bool:
        """Where messages are increments, none may be missed."""
        return self.compress != "identity"

    def init_client(self, site: Site) -> Node | Told:
        """The common initial model, y_i = 0, and public copies of 0."""
        node: Node = super().init_client(site)
        if self.compressor() is None:
            return node
        frozen = site.borrow().frozen
        zero = {name: c for name, c in node.control.items() if name not in frozen}
        return Told(node.model, node.control, Public(zero, zero), Public(zero, zero))

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Any) -> tuple[Tree, Any]:
        """The gradient, and y_i before it is mixed."""
        found = means(site, state.model)
        direction = {name: g + state.control[name] for name, g in found.at[0].items()}
        lr = self.rate(site.job.version)
        state = state._replace(end=found.fit.weights, direction=direction, length=lr)
        return None, self._say(site, state, "y", direction)

    def send(self, phase: Phase, state: Any) -> Tree:
        """As tracking does, or the increment of a public copy."""
        if isinstance(state, Told):
            assert state.says is not None
            assert state.end is not None
            return Increment(state.says, {} if phase.name == "track" else self.shared(state))
        return super().send(phase, state)

    def mix(self, phase: Phase, site: Site, state: Any, inbox: Inbox) -> Any:
        """As tracking does, or through public copies."""
        if not isinstance(state, Told):
            return super().mix(phase, site, state, inbox)
        assert site.place.topology is not None
        missing = set(site.place.topology.at(site.job.version)[site.id]) - set(inbox.messages)
        if missing:
            raise ConfigError(
                f"{self.name}: client {site.id} has nothing from client {min(missing)} in round {site.job.round}; "
                "with compress each client takes part in every round"
            )
        if phase.name == "track":
            assert state.direction is not None
            y, public = self._mixed(site, inbox, "y", state.direction, state.y)
            return self.tracked(site, state._replace(y=public), y)
        assert state.end is not None
        x, public = self._mixed(site, inbox, "x", state.end.params, state.x)
        buffers = weighted_sum([m.buffers for m in inbox.messages.values()], list(inbox.weights.values()))
        return settled(state._replace(x=public, says=None), x, buffers)

    def tracked(self, site: Site, state: Any, y: Params) -> Any:
        """The step along y_i, and prox."""
        state = super().tracked(site, state, y)
        r = proximal.parse(self.regularizer, self.name)
        near = r.prox({name: state.end.params[name] for name in y}, state.length)
        end = state.end._replace(params={**state.end.params, **near})
        return self._say(site, state._replace(end=end), "x", end.params)

    def _say(self, site: Site, state: Any, field: str, v: Params) -> Any:
        """The node with what it is to say of v: q_i, and what the compressor begins with next time."""
        how = self.compressor()
        if how is None:
            return state
        public: Public = getattr(state, field)
        v = {name: v[name] for name in public.own}
        coded, basis = how.encode(tr.sub(v, public.own), _stream(site, field, site.id), public.basis)
        return state._replace(**{"says": Squeezed(coded, shapes_of(v)), field: public._replace(basis=basis)})

    def _mixed(self, site: Site, inbox: Inbox, field: str, v: Params, public: Public) -> tuple[Params, Public]:
        """v + gamma (sum_j W_ij v^_j - v^_i), and both sums after everybody's increment. What has no public copy,
        as parameters that the model froze, stays."""
        how = self.compressor()
        assert how is not None
        read = {
            node: how.decode(told.change.coded, told.change.shapes, _stream(site, field, node))
            for node, told in inbox.messages.items()
        }
        change = weighted_sum(list(read.values()), list(inbox.weights.values()))
        public = public._replace(own=tr.add(public.own, read[site.id]), mean=tr.add(public.mean, change))
        apart = tr.sub(public.mean, public.own)
        return {name: p + self.gamma * apart[name] if name in apart else p for name, p in v.items()}, public


def _stream(site: Site, field: str, node: int) -> np.random.Generator:
    """What is drawn alike where a node's increment is made and where it is read."""
    return site.shared_rng("dproxsgt", field, node, site.job.version)
