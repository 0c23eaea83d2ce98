"""MHD: neighbours distil each other's embeddings and a chain of heads on public rows (Zhmoginov et al., 2023)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn

from consilience.core.fit import Batch, Loss, Models
from consilience.core.messages import ClientInfo, Inbox, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Binder, Net, Predictor, Scorer
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts import distillation
from consilience.parts.public import rows_of_round


class Heads(nn.Module):
    """Several heads on the same features: ``(b, width)`` -> ``(heads, b, classes)``."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(input_shape[0], outputs) for _ in range(count))

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([head(z) for head in self.heads])


@record
class Words(NamedTuple):
    """What a node says of the public rows of a round: features ``(rows, width)``, and probabilities by the main head
    and all but the last of the others, ``(heads, rows, classes)``."""

    features: Tensor
    levels: Tensor


@record
class Node(NamedTuple):
    """A node's model, its other heads, what it will say, and what its neighbours said of the round to come."""

    model: Weights
    heads: Weights
    says: Words | None
    heard: dict[int, Words]


@record
class Last(NamedTuple):
    """The last of the other heads on a model's features."""

    net: Net
    heads: Weights
    name: str

    def scorer(self, at: Binder) -> Scorer:
        """The function from a batch to scores."""
        module, heads = at.bind(self.net.weights, self.net.model), at.bind(self.heads, self.name)

        def score(x: Tensor) -> Tensor:
            last: Tensor = heads(module.features(x))[-1]  # type: ignore[operator]
            return last

        return score


@dataclass(frozen=True)
class MHD(Method):
    """Without a server, nodes learn on public rows what neighbours say of them, each head from the head below.

        a step with own rows (x, y), public rows u, and a neighbour j drawn at random:
        L = CE(h_0(f(x)), y) + nu_emb mean_u || n(f(u)) - n(f_j(u)) ||^2 + nu_aux sum_k mean_u CE( T_k(u), h_k(f(u)) )
        n: scaling to length 1;  T_k(u): of h_j,k-1 and the own h_k-1 the more confident (highest probability); where
        the head k itself is more confident than that, the row does not count

    Only the main head h_0 sees own labels; the last head is the one that knows most of everybody's. What neighbours say
    (features and probabilities of heads 0 .. m-1) is of their models at the last exchange. Features are compared where
    they have one width. ``--topology`` says who hears whom. A node deploys its main head, or its last (predict "last").
    With nu_emb = nu_aux = 0 the models are those of ``local``, bit for bit.

    Source: Zhmoginov, Sandler, Miller, Kristiansen, Vladymyrov, "Decentralized Learning with Multi-Headed
    Distillation", CVPR 2023, equations 2 to 5. Deviations: neighbours' words come once a round for the public
    rows of the next, not from a pool of snapshots; weights of the terms are the paper's as far as known.
    """

    name = "mhd"
    family = "decentralised"
    source = "Zhmoginov et al., CVPR"
    year = 2023
    confidence = "medium"
    needs = Needs(architectures="any", split_model=True, public_data=True, classification=True, topology=True)
    unstacked = "the loss looks at what others say"

    nu_emb: Annotated[float, Ge(0)] = option(1.0, "weight of embeddings", Search(0.1, 10.0))
    nu_aux: Annotated[float, Ge(0)] = option(3.0, "weight of the other heads", Search(0.1, 10.0))
    heads: Annotated[int, Ge(1)] = option(3, "heads beside the main one")
    public_rows: Annotated[int, Ge(1)] = option(500, "public rows of a round")
    public_batch: Annotated[int, Ge(1)] = option(32, "public rows in one step")
    predict: Literal["main", "last"] = option("main", "which head a node deploys")

    def program(self) -> tuple[Phase, ...]:
        """Train, then tell the neighbours."""
        return (Phase("train"), Phase("tell", over="neighbours"))

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The other heads, for each width of features."""
        found: dict[str, Architecture] = {}
        for model in models.values():
            name = f"heads:{model.width}"
            factory = functools.partial(Heads, count=self.heads)
            found[name] = Architecture(name, factory, (model.width or 0,), model.outputs, model.dtype)
        return found

    def init_server(self, host: Host) -> Tree:
        """There is none."""
        return None

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """Nothing."""
        return None

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps) if phase.name == "train" else 0

    def init_client(self, site: Site) -> Node:
        """The common initial model and heads; nothing heard."""
        return Node(site.initial(), site.initial(_heads(site)), None, {})

    def sends(self, phase: Phase) -> type:
        """Nothing to the server."""
        return NoneType

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Node) -> tuple[Tree, Node]:
        """Train, then score the public rows of the next round."""
        both, name = {"own": state.model, "heads": state.heads}, _heads(site)
        heard = [words for node, words in sorted(state.heard.items()) if node != site.id]
        if (self.nu_emb or self.nu_aux) and heard:
            loss = self._loss(site, heard)
            both = site.fit(both, model={"own": site.model, "heads": name}, loss=loss).weights
        else:
            both["own"] = site.fit(state.model).weights
        return None, Node(both["own"], both["heads"], self._words(site, both), {})

    def _words(self, site: Site, both: Mapping[str, Weights]) -> Words:
        rows = rows_of_round(site, self.public_rows, site.job.version + 1)
        features = torch.cat(site.map(lambda module, some: module.features(some.x), both["own"], rows))
        with torch.no_grad():
            main = site.bind(both["own"]).head(features)  # type: ignore[operator]
            others = site.bind(both["heads"], _heads(site))(features)[:-1]
        return Words(features.clone(), torch.cat([main[None], others]).softmax(-1))

    def _loss(self, site: Site, heard: Sequence[Words]) -> Loss:
        public = site.cast(rows_of_round(site, self.public_rows, site.job.version))
        rng = site.rng("public-batches")

        def loss(models: Models, batch: Batch) -> Tensor:
            own, heads = models["own"], models["heads"]
            value = site.task.loss(own(batch.x), batch.y)
            words = heard[int(rng.integers(len(heard)))]
            rows = torch.from_numpy(rng.choice(len(public), min(self.public_batch, len(public)), replace=False))
            z = own.features(public.x[rows])
            teacher = words.features[rows]
            if self.nu_emb and teacher.shape == z.shape:
                value = value + self.nu_emb * distillation.features(z, teacher)
            if self.nu_aux:
                scores = torch.cat([own.head(z)[None], heads(z)])
                value = value + self.nu_aux * chain(scores, words.levels[:, rows])
            return value

        return loss

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """Nothing."""
        return server

    def send(self, phase: Phase, state: Node) -> Tree:
        """What the node says of the next round's public rows."""
        return state.says

    def mix(self, phase: Phase, site: Site, state: Node, inbox: Inbox) -> Node:
        """Remember what neighbours said."""
        heard = {node: words for node, words in inbox.messages.items() if node != site.id and words is not None}
        return state._replace(says=None, heard=heard)

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Tree, state: Node) -> Predictor:
        """The model with its main head, or its last one."""
        net = Net(state.model, site.model)
        return net if self.predict == "main" else Last(net, state.heads, _heads(site))


def _heads(site: Site) -> str:
    return f"heads:{site.architecture().width}"


def chain(scores: Tensor, teacher: Tensor) -> Tensor:
    """sum over heads k of the mean over rows of CE(T_k, scores_k). scores: ``(1 + heads, rows, classes)``, the main
    head first; teacher: probabilities ``(heads, rows, classes)`` of a neighbour's heads 0 .. m-1."""
    own = scores.detach().softmax(-1)
    below = own[:-1]
    surer = teacher.max(-1).values > below.max(-1).values
    target = torch.where(surer[..., None], teacher, below)
    counts = own[1:].max(-1).values <= target.max(-1).values
    each = -(target * scores[1:].log_softmax(-1)).sum(-1) * counts
    return each.mean(1).sum()
