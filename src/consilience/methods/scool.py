"""SCooL: nodes infer from losses whom to learn from, under a prior on the graph (Li et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.messages import Inbox
from consilience.core.method import Needs, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts import components, cooperation
from consilience.parts.serverless import Serverless


@record
class Adam(NamedTuple):
    """The attention's weights of layers ``(layers,)``, both moments of AdamW, and its steps."""

    mix: Tensor
    first: Tensor
    second: Tensor
    steps: int


@record
class Node(NamedTuple):
    """A node: the model its round began with and, after training, the trained one; its block's probabilities and
    Dirichlet parameters; the attention; by node, the loss of their models on the own rows and how alike in each layer
    the changes since the start of the run are; whom it has settled on."""

    model: Weights
    end: Weights | None
    phi: Tensor
    gamma: Tensor
    attention: Adam
    losses: dict[int, float]
    likeness: dict[int, Tensor]
    kept: tuple[int, ...] | None


@record
class Words(NamedTuple):
    """To all neighbours: what training changed, buffers, what the node knows of its block and of attention, and the
    loss of each neighbour's model on its rows."""

    delta: Params
    buffers: Params
    phi: Tensor
    mix: Tensor
    losses: dict[int, float]


@dataclass(frozen=True)
class SCooL(Serverless):
    """Without a server, each node weighs what its neighbours learned by how much it seems to help.

        D_i = y_i - theta_i, local steps from theta_i;      L_ij: mean loss of y_i on the training rows of j
        theta_i <- theta_i + sum_j w_ij D_j                 rows of w sum to 1, the node itself included
        prior "dirac":      w is the topology's: decentralised SGD
        prior "sbm":        w_ij ~ sigmoid( [ sum_gh phi_ig phi_jh log(B_gh / (1 - B_gh)) - L_ij ] / scale )
            phi_ig ~ exp( sum_{j != i, h} phi_jh [ e_ij log B_gh + e_ji log B_hg + (1 - e_ij) log(1 - B_gh)
                          + (1 - e_ji) log(1 - B_hg) ] + psi(gamma_ig) ),    gamma = 1 + phi
            e: the sigmoids; B: ``inside`` on the diagonal, ``outside`` off it; ``blocks`` blocks; ``sweeps`` a round
        prior "attention":  w_ij ~ a_ij exp(- L_ij / scale),    a_i = softmax_j( sum_l v_l cos(u_i^l, u_j^l) )
            u: change since the start of the run, l: parameters by name; v: one AdamW step a round on the cross entropy
            of a_i against softmax_j(- L_ij / scale), after the mean of neighbours' v

    After ``settle`` rounds each node keeps its ``keep`` strongest nodes, and w is of these alone. A round has two
    exchanges: trained models, for the losses (not with dirac), and changes with what is known. phi begins at random. A
    node's cluster, with the sbm prior, is its likeliest block. A client that never takes part deploys the
    initial model. ``weights`` and ``form`` have no meaning. Of a node that does not hear it (``--topology onepeer``), a
    node does not know L_ij and, but for prior "dirac", takes nothing.

    With prior "dirac" on a complete graph it is FedAvg with uniform weights in delta form, bit for bit; with the sbm
    prior the same to rounding as scale goes to infinity.

    Source: Li, Zhou, Tian, Tao, "Learning To Collaborate in Decentralized Learning of Personalized Models", CVPR 2022,
    and its official code. Deviations: a node updates its phi from its neighbours' last ones and keeps it from round to
    round (the code draws anew and infers centrally); changes of all neighbours travel even when only some are
    used; v, in place of the code's several attention networks, is a reconstruction.
    """

    name = "scool"
    family = "decentralised"
    source = "Li et al., CVPR"
    year = 2022
    confidence = "medium"
    needs = Needs(topology=True, loss=True)

    prior: Literal["dirac", "sbm", "attention"] = option("sbm", "prior on the graph of cooperation")
    scale: Annotated[float, Gt(0)] = option(2.0, "what losses are divided by", Search(0.1, 10.0))
    blocks: Annotated[int, Ge(1)] = option(2, "blocks of the sbm prior")
    inside: Annotated[float, Gt(0), Lt(1)] = option(0.8, "probability of an edge in a block")
    outside: Annotated[float, Gt(0), Lt(1)] = option(0.2, "probability of an edge between blocks")
    sweeps: Annotated[int, Ge(1)] = option(2, "mean-field steps a round")
    settle: Annotated[int, Ge(0)] = option(10, "rounds after which nodes keep their strongest")
    keep: Annotated[float, Gt(0), Le(1)] = option(0.2, "share of nodes that are kept", Search(0.05, 1.0, False))
    attention_lr: Annotated[float, Gt(0)] = option(0.2, "step size of the attention")

    def program(self) -> tuple[Phase, ...]:
        """Train, show what was trained, and cooperate."""
        shown = () if self.prior == "dirac" else (Phase("show", over="neighbours"),)
        return (Phase("train"), *shown, Phase("cooperate", over="neighbours"))

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps) if phase.name == "train" else 0

    # --- a node ------------------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Node:
        """The common initial model; a block at random."""
        start = site.initial()
        flat = torch.ones(self.blocks, dtype=torch.float64)
        phi = torch.from_numpy(site.rng("block").dirichlet(flat.numpy()))
        mix = torch.ones(len(start.params), dtype=torch.float64)
        blank = Adam(mix, torch.zeros_like(mix), torch.zeros_like(mix), 0)
        return Node(start, None, phi, 2 * flat / self.blocks, blank, {}, {}, None)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Node) -> tuple[Tree, Node]:
        """Train."""
        return None, state._replace(end=site.fit(state.model).weights)

    def send(self, phase: Phase, state: Node) -> Tree:
        """The trained model; or what it changed, and what the node knows."""
        assert state.end is not None
        if phase.name == "show":
            return state.end
        delta = tr.sub(state.end.params, state.model.params)
        return Words(delta, state.end.buffers, state.phi, state.attention.mix, state.losses)

    def mix(self, phase: Phase, site: Site, state: Node, inbox: Inbox) -> Node:
        """Try neighbours' models; or weigh their changes and take them."""
        assert state.end is not None
        if phase.name == "show":
            losses = {node: _loss(site, model) for node, model in inbox.messages.items()}
            if self.prior != "attention":
                return state._replace(losses=losses)
            start = site.initial().params
            likeness = {node: _alike(start, state.end.params, m.params) for node, m in inbox.messages.items()}
            return state._replace(losses=losses, likeness=likeness)
        nodes, end = list(inbox.messages), state.end
        state, weights = self._weigh(site, state, inbox)
        if self.prior != "dirac" and state.kept is None and site.job.round >= max(1, self.settle):
            count = max(1, math.floor(self.keep * len(nodes)))
            chosen = cooperation.strongest(torch.tensor(weights), count).tolist()
            state = state._replace(kept=tuple(n for n, yes in zip(nodes, chosen, strict=True) if yes))
        delta = weighted_sum([m.delta for m in inbox.messages.values()], weights)
        mean = weighted_sum([m.buffers for m in inbox.messages.values()], weights)
        buffers = {name: b if b.is_floating_point() else end.buffers[name] for name, b in mean.items()}
        moved = Weights(tr.add(state.model.params, delta), buffers)
        return state._replace(model=moved, end=None, losses={}, likeness={})

    def _weigh(self, site: Site, state: Node, inbox: Inbox) -> tuple[Node, list[float]]:
        """w_i by node of the inbox, and what was learned of it."""
        if self.prior == "dirac":
            return state, list(inbox.weights.values())
        words = list(inbox.messages.values())
        there = torch.tensor([m.losses.get(site.id, math.inf) for m in words], dtype=torch.float64)  # L_ij
        nodes = list(inbox.messages)
        if self.prior == "sbm":
            here = torch.tensor([state.losses[node] for node in nodes], dtype=torch.float64)  # L_ji
            found, raw = self._blocks(state, nodes.index(site.id), torch.stack([m.phi for m in words]), there, here)
        else:
            mixes = weighted_sum([m.mix for m in words], list(inbox.weights.values()))
            likeness = torch.stack([state.likeness[node] for node in nodes])
            found, raw = self._attend(state, mixes, likeness, there)
        if found.kept is not None:
            raw = raw * torch.tensor([node in found.kept for node in nodes], dtype=raw.dtype)
        total = float(raw.sum())
        if not total > 0:  # nobody it has settled on is there
            return found, [float(node == site.id) for node in nodes]
        return found, (raw / total).tolist()

    def _blocks(self, state: Node, at: int, phi: Tensor, there: Tensor, here: Tensor) -> tuple[Node, Tensor]:
        """Mean-field steps of the node's block, and the edges from it. at: its place among the nodes."""
        block = torch.full((self.blocks, self.blocks), self.outside, dtype=torch.float64)
        block.fill_diagonal_(self.inside)
        apart = torch.ones(len(phi), dtype=torch.float64)
        apart[at] = 0
        own, gamma = state.phi, state.gamma
        for _ in range(self.sweeps):
            out = cooperation.sbm_logits(own, phi, there, block, self.scale).sigmoid()
            back = cooperation.sbm_logits(own, phi, here, block.T, self.scale).sigmoid()
            own, gamma = cooperation.sbm_membership(gamma, phi, out, back, block, apart)
            phi = phi.index_copy(0, torch.tensor([at]), own[None])
        return state._replace(phi=own, gamma=gamma), out

    def _attend(self, state: Node, mix: Tensor, likeness: Tensor, there: Tensor) -> tuple[Node, Tensor]:
        """A step of the attention, and attention times exp(- loss / scale)."""
        target = (-there / self.scale).softmax(0)
        old = state.attention
        gradient = cooperation.attention_gradient(mix, likeness, target)
        steps, (b1, b2) = old.steps + 1, (0.9, 0.99)
        first, second = b1 * old.first + (1 - b1) * gradient, b2 * old.second + (1 - b2) * gradient.square()
        size = (second / (1 - b2**steps)).sqrt() + 1e-8
        new = mix * (1 - self.attention_lr * 0.01) - self.attention_lr * (first / (1 - b1**steps)) / size
        weights = cooperation.attention(mix, likeness) * target
        return state._replace(attention=Adam(new, first, second, steps)), weights

    def node_model(self, state: Node) -> Weights:
        """The node's model."""
        return state.model

    # --- what would be deployed --------------------------------------------------------------------------------

    def personal_model(self, site: Site, message: Tree, state: Node) -> Predictor:
        """The node's model."""
        return Net(state.model, site.model)

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Node) -> Predictor:
        """The trained one."""
        assert state.end is not None
        return Net(state.end, site.model)

    def cluster(self, site: Site, message: Tree, state: Node) -> int | None:
        """The likeliest block, where there are blocks."""
        return int(state.phi.argmax()) if self.prior == "sbm" else None


def _loss(site: Site, model: Weights) -> float:
    """Mean loss on the training rows, in evaluation mode; 0 without rows."""
    return float(components.losses(site, (model,)).double().mean()) if len(site.train) else 0.0


def _alike(start: Params, own: Params, other: Params) -> Tensor:
    """Cosines of both changes since ``start``, for each parameter; 0 where one has not changed."""
    found = []
    for name, s in start.items():
        a, b = (own[name] - s).double().flatten(), (other[name] - s).double().flatten()
        found.append(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return torch.stack(found)
