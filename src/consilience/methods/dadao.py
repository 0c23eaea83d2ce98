"""DADAO: accelerated and asynchronous, gradients and exchanges at the ticks of Poisson clocks (Nabli and Oyallon)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Gt
from scipy.linalg import expm  # type: ignore[import-untyped]

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Inbox, Reply
from consilience.core.method import Needs, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Host, Place, Site
from consilience.core.streams import Streams
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.directions import means
from consilience.parts.serverless import Serverless

Edges = tuple[tuple[int, int], ...]


@record
class Clock(NamedTuple):
    """Who could tick, which is no secret, and what has: seed, nodes, edges; time, gradients, exchanges until now."""

    seed: int
    nodes: tuple[int, ...]
    edges: Edges
    time: float = 0.0
    gradients: int = 0
    exchanges: int = 0


@record
class Node(NamedTuple):
    """Three pairs of vectors, and buffers; touched: the last tick that it was moved on to, -1 at time 0."""

    x: Params
    x_far: Params
    y: Params
    y_far: Params
    z: Params
    z_far: Params
    buffers: Params
    touched: int = -1


class Tick(NamedTuple):
    """One or two nodes, a gradient's or an edge's, and the time since the tick before."""

    nodes: tuple[int, ...]
    wait: float


@dataclass(frozen=True)
class DADAO(Serverless):
    """Nodes take gradients and exchange with one neighbour at a time, each at ticks of a Poisson clock of its own.

    Six vectors a node (x~ is written x_far in the code), x = x~ = the common initial model, the others 0. Between ticks

        dx = eta (x~ - x),       dy = alpha (y~ - y),                dz = alpha (z~ - z)
        dx~ = eta (x - x~),      dy~ = - theta (y + z + nu x~),      dz~ = eta (z - z~)         exactly, when touched
        gradient at node i:      g = grad F_i(x_i) - nu x_i - y~_i
                                 x_i -= gamma g,  x~_i -= gamma~ g,  y~_i += (delta + 1) g
        exchange on edge (i,j):  m = (y_i + z_i) - (y_j + z_j)
                                 z_i -= m / 2,  z~_i -= beta~ m,  and j the opposite
        nu = mu / 2,  r = sqrt(nu / L),  alpha = delta = r / 4,  eta = r / 8,  theta = 1 / (2 r),  gamma = 1 / (4 L),
        gamma~ = 1 / (4 sqrt(nu L)),  beta~ = 2 chi_1 / (lambda r)

    Gradients come at rate 1 at each node, exchanges at rate lambda = sqrt(2 chi_1 chi_2) over all edges, uniformly;
    chi_1 = 1 / the least positive eigenvalue of the Laplacian over the number of edges, chi_2 = the largest resistance
    of an edge under it, halved. For mu-strongly convex and L-smooth F_i (``convexity``, ``smoothness``; weight decay
    adds to both) precision eps takes O(n sqrt(L/mu) log(1/eps)) gradients and O(n sqrt(chi_1 chi_2) sqrt(L/mu)
    log(1/eps)) exchanges. Invariant: sum_i z_i = sum_i z~_i = 0 at equal times.

    A round is one tick, of which only its nodes know; all draw the ticks alike. The time of the clocks, and how many
    ticks there were, are in the history under ``method``; ``virtual_s`` has one tick after the other. Gradients are
    over the rows of a round's batches: ``local_steps`` and ``local_epochs`` say how many. Only ``topology`` counts, not
    its weights. ``lr``, ``weights``, ``form`` and ``participation`` have no meaning.

    Source: Nabli and Oyallon, "DADAO: Decoupled Accelerated Decentralized Asynchronous Optimization", ICML 2023.
    Deviations: a static graph.
    """

    name = "dadao"
    family = "decentralised"
    source = "Nabli and Oyallon, ICML"
    year = 2023
    needs = Needs(topology=True)

    smoothness: Annotated[float, Gt(0)] = option(10.0, "L, of each F_i", Search(0.5, 50.0))
    convexity: Annotated[float, Gt(0)] = option(0.1, "mu, of each F_i", Search(0.01, 1.0))

    def check(self) -> None:
        """L is above mu."""
        if self.smoothness <= self.convexity:
            raise ConfigError(f"dadao: smoothness {self.smoothness:g} should be above convexity {self.convexity:g}")

    @property
    def everybody(self) -> bool:
        """Whose clock ticks has to be there, and the graph is to stay."""
        return True

    def program(self) -> tuple[Phase, ...]:
        """Move on to the tick, and take the gradient if it is one; exchange."""
        return (Phase("tick"), Phase("exchange", over="neighbours"))

    def init_server(self, host: Host) -> Clock:
        """Who is connected. Raises ConfigError for edges in one direction, and for a graph in parts."""
        assert host.place.topology is not None
        rows = host.place.topology.at(0)
        one_way = [(i, j) for i in sorted(rows) for j in sorted(rows[i]) if i not in rows[j]]
        if one_way:
            i, j = one_way[0]
            raise ConfigError(f"dadao: node {i} hears node {j} and not the other way; give edges in both directions")
        nodes, edges = _graph(host.place)
        spread(nodes, edges)
        return Clock(host.place.seed, nodes, edges)

    def select(self, server: Clock, view: Any) -> Sequence[int]:
        """Whose clock ticks."""
        return _tick(server.seed, server.nodes, server.edges, view.version).nodes

    def aggregate(
        self, phase: Phase, host: Host, server: Clock, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Clock:
        """The tick is counted."""
        tick = _tick(server.seed, server.nodes, server.edges, host.version)
        lone = len(tick.nodes) == 1
        return server._replace(
            time=server.time + tick.wait,
            gradients=server.gradients + lone,
            exchanges=server.exchanges + (not lone),
        )

    def report(self, server: Clock) -> Mapping[str, float]:
        """Time and ticks."""
        return {"time": server.time, "gradients": server.gradients, "exchanges": server.exchanges}

    # --- a node ------------------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Node:
        """x = x~ = the common initial model."""
        start = site.initial()
        zero: Params = tr.zeros_like(start.params)
        return Node(start.params, start.params, zero, zero, zero, zero, start.buffers)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Node) -> tuple[None, Node]:
        """Move on to the tick; take the gradient if it is one."""
        now, graph = site.job.version, _graph(site.place)
        ticks = [_tick(site.place.seed, *graph, k) for k in range(state.touched + 1, now + 1)]
        state = self.moved(state, sum(tick.wait for tick in ticks))._replace(touched=now)
        if not ticks or ticks[-1].nodes != (site.id,):
            return None, state
        found = means(site, Weights(state.x, state.buffers))
        nu, smooth = self.convexity / 2, self.smoothness
        zero: Params = tr.zeros_like(state.x)
        g = {n: found.at[0].get(n, zero[n]) - nu * x - state.y_far[n] for n, x in state.x.items()}
        g = {n: p if n in found.at[0] else zero[n] for n, p in g.items()}  # what the model froze stays
        return None, state._replace(
            x=tr.axpy(-1 / (4 * smooth), g, state.x),
            x_far=tr.axpy(-1 / (4 * (nu * smooth) ** 0.5), g, state.x_far),
            y_far=tr.axpy((nu / smooth) ** 0.5 / 4 + 1, g, state.y_far),
            buffers=found.fit.weights.buffers,
        )

    def moved(self, state: Node, time: float) -> Node:
        """The node after ``time`` without a tick: the linear equation's exact solution."""
        nu = self.convexity / 2
        r = (nu / self.smoothness) ** 0.5
        alpha, eta, theta = r / 4, r / 8, 1 / (2 * r)
        flow = np.zeros((6, 6))  # on x, x~, y, y~, z, z~
        flow[0, :2], flow[1, :2] = (-eta, eta), (eta, -eta)
        flow[2, 2:4], flow[3, [1, 2, 4]] = (-alpha, alpha), (-theta * nu, -theta, -theta)
        flow[4, 4:], flow[5, 4:] = (-alpha, alpha), (eta, -eta)
        share = expm(flow * time)
        share[:2, 2:] = share[4:, :4] = 0  # these do not depend on the others, to the last bit
        old = (state.x, state.x_far, state.y, state.y_far, state.z, state.z_far)
        new = [_combined(row, old) for row in share.tolist()]
        x, x_far, y, y_far, z, z_far = new
        return Node(x, x_far, y, y_far, z, z_far, state.buffers, state.touched)

    def send(self, phase: Phase, state: Node) -> Params:
        """y_i + z_i."""
        both: Params = tr.add(state.y, state.z)
        return both

    def mix(self, phase: Phase, site: Site, state: Node, inbox: Inbox) -> Node:
        """A step towards the other, if there is one."""
        others = [message for node, message in inbox.messages.items() if node != site.id]
        if not others:
            return state
        m = tr.sub(inbox.messages[site.id], others[0])
        chi1, _, rate = spread(*_graph(site.place))
        far = 2 * chi1 / rate * (2 * self.smoothness / self.convexity) ** 0.5
        return state._replace(z=tr.axpy(-0.5, m, state.z), z_far=tr.axpy(-far, m, state.z_far))

    def node_model(self, state: Node) -> Weights:
        """x_i."""
        return Weights(state.x, state.buffers)

    def personal_model(self, site: Site, message: Tree, state: Node) -> Predictor:
        """x_i."""
        return Net(Weights(state.x, state.buffers), site.model)


def _combined(shares: Sequence[float], parts: Sequence[Params]) -> Params:
    """The sum of parts by these shares, without those of share 0."""
    some = [(share, part) for share, part in zip(shares, parts, strict=True) if share]
    total: Params = tr.scale(some[0][1], some[0][0])
    for share, part in some[1:]:
        total = tr.axpy(share, part, total)
    return total


def _graph(place: Place) -> tuple[tuple[int, ...], Edges]:
    """Nodes, and edges between them."""
    assert place.topology is not None
    rows = place.topology.at(0)
    return tuple(sorted(rows)), tuple((i, j) for i in sorted(rows) for j in sorted(rows[i]) if i < j)


@functools.lru_cache(maxsize=8)
def spread(nodes: tuple[int, ...], edges: Edges) -> tuple[float, float, float]:
    """chi_1, chi_2, and the rate lambda of exchanges; zeros for a lone node. Raises ConfigError for a graph in
    parts."""
    if len(nodes) == 1:
        return 0.0, 0.0, 0.0
    place = {node: i for i, node in enumerate(nodes)}
    laplacian = np.zeros((len(nodes), len(nodes)))
    for i, j in edges:
        a, b = place[i], place[j]
        laplacian[[a, b], [a, b]] += 1 / len(edges)
        laplacian[[a, b], [b, a]] -= 1 / len(edges)
    least = float(np.linalg.eigvalsh(laplacian)[1])
    if least < 1e-12:
        raise ConfigError("dadao: the topology is in parts that cannot reach each other; give a connected one")
    inverse = np.linalg.pinv(laplacian)
    apart = [(place[i], place[j]) for i, j in edges]
    chi2 = max(inverse[a, a] + inverse[b, b] - 2 * inverse[a, b] for a, b in apart) / 2
    return 1 / least, float(chi2), float(np.sqrt(2 * chi2 / least))


def _tick(seed: int, nodes: tuple[int, ...], edges: Edges, version: int) -> Tick:
    """The tick of that number."""
    rate = spread(nodes, edges)[2]
    rng = Streams(seed).rng("dadao", version)
    wait = float(rng.exponential(1 / (len(nodes) + rate)))
    if rng.random() * (len(nodes) + rate) < len(nodes):
        return Tick((nodes[int(rng.integers(len(nodes)))],), wait)
    return Tick(edges[int(rng.integers(len(edges)))], wait)
