"""InCo: layers that only deep models have borrow from the first layers of their stage (Chan et al., 2024)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from consilience.core.errors import ConfigError
from consilience.core.messages import ClientInfo, Kind, Reply, kinds
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Params, Weights
from consilience.core.reduce import weighted_sum
from consilience.core.site import Host
from consilience.core.training import option
from consilience.core.tree import Tree

MODES = ("off", "theorem", "text", "repo")
BASES = ("fedavg", "fedprox", "scaffold", "moon")


@dataclass(frozen=True)
class InCo(Method):
    """Models of different depth are averaged by the names of their layers, and deep layers' updates are mixed with
    those of the first layer of the same shape in their stage, which every model has.

        client k: any base method on its own model, whose layers are some of the server's by name and shape
        g_l = mean of the changes of layer l over the clients that have it
        layer l with a reference 0:   a = <g_0, g_0>,  b = <g_0, g_l>
        theorem:  g_l - min(0, b / a) g_0                                (the nearest g with <g, g_0> >= 0)
        text:     ( g_l / |g_l| - (b / a) g_0 / |g_0| ) (|g_l| + |g_0|) / 2
        repo:     ( g_l / |g_l| + clip(|b| / a, 0, 5) g_0 / |g_0| ) (|g_l| + |g_0|) / 2,  then clipped to +- 0.1,
                  each kernel of a convolution (a matrix in the other modes' place) by itself
        off:      g_l: averaging by names alone (HeteroAvg)

    Only kernels and matrices are mixed. The reference is the first of the same shape in the same stage (the models'
    first two levels of names). ``base`` is fedavg, fedprox, scaffold or moon, with its options as ``base.mu=1`` or
    plainly. The server's ``--model`` must have all layers of the others, as ``resnet20`` has of ``resnet8``. With mode
    "off" and one architecture it is the base method in delta form, bit for bit.

    Source: Chan, Zhou, Zhang, Xing, et al., "Internal Cross-layer Gradients for Extending Homogeneity to Heterogeneity
    in Federated Learning", ICLR 2024, theorem 3.1, and its official code, whose sign of the mixed term differs from the
    text's; the default is the code's, which made the paper's table. Deviations: BatchNorm statistics are averaged by
    names over the clients that have them.
    """

    name = "inco"
    family = "different architectures"
    source = "Chan et al., ICLR"
    year = 2024
    needs = Needs(architectures="family")

    base: str = option("fedavg", f"the method that clients follow: {', '.join(BASES)}")
    mode: Literal["off", "theorem", "text", "repo"] = option("repo", "how deep layers are mixed with their reference")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight (uniform in the paper)")
    form: Literal["delta"] = option("delta", "clients send differences")

    @classmethod
    def over(cls, values: Mapping[str, Any]) -> type[Method]:
        """This method over the base that ``values`` names. Raises ConfigError for one that it cannot be over."""
        base = values.get("base", "fedavg")
        if base not in BASES:
            raise ConfigError(f"inco: base={base}: one of {', '.join(BASES)}")
        return cls if base == "fedavg" else _over(base)

    def check(self) -> None:
        """Refuse another base than that of the class."""
        if type(self).over({"base": self.base}) is not type(self):
            raise ConfigError(f"inco: base={self.base} is made by consilience.methods.make('inco', {{'base': ...}})")
        super().check()

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The base's; models that have what the server's lacks are refused here. Raises ConfigError."""
        server, *others = models.values()
        for model in others:
            for name, p in model.spec.params.items():
                if name not in server.spec.params or server.spec.params[name].shape != p.shape:
                    raise ConfigError(
                        f"inco: '{name}' of model '{model.name}' is not part of the server's '{server.name}'; "
                        "give the deepest one as --model"
                    )
        return super().networks(models)

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The base's message, of it what the client's model has."""
        return _restricted(super().broadcast(phase, server, client), client.architectures[client.model].spec)

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """The base's; a control of layers that a client does not have is 0."""
        zeros = {name: torch.zeros_like(p) for name, p in host.architecture().spec.params.items()}
        filled = [reply._replace(update=_filled(reply.update, zeros)) for reply in replies]
        return super().aggregate(phase, host, server, filled, cohort)

    def mean_delta(self, replies: Sequence[Reply], shares: Sequence[float]) -> Params:
        """The mean of each layer over those who have it, mixed."""
        return mixed(by_name([reply.update.delta for reply in replies], shares), self.mode)

    def mean_buffers(self, replies: Sequence[Reply], shares: Sequence[float]) -> Params:
        """The mean of each over those who have it."""
        return by_name([reply.update.buffers for reply in replies], shares)


@functools.cache
def _over(base: str) -> type[Method]:
    from consilience import methods

    parent = methods.get(base)
    space: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": InCo.__doc__,
        "__annotations__": {"base": str},
        "base": option(base, "the method that clients follow"),
        "sums": Method.sums,  # every update is wanted
        "needs": dataclasses.replace(parent.needs, architectures="family"),
    }
    made = type(f"InCo{parent.__name__}", (InCo, parent), space)
    globals()[made.__name__] = dataclass(frozen=True)(made)  # where pickle looks for it
    return cast(type[Method], made)


def _restricted(message: Tree, spec: Weights) -> Tree:
    """A message whose models, differences and controls have the names of ``spec`` alone."""
    if message is None:
        return None

    def part(value: Params, names: Params) -> Params:
        return {name: value[name] for name in names if name in value}

    changed: dict[str, Any] = {}
    for field, kind in kinds(type(message)).items():
        value = getattr(message, field)
        if kind is Kind.MODEL:
            changed[field] = Weights(part(value.params, spec.params), part(value.buffers, spec.buffers))
        elif kind in (Kind.DELTA, Kind.CONTROL, Kind.BUFFERS):
            changed[field] = part(value, spec.buffers if kind is Kind.BUFFERS else spec.params)
    return message._replace(**changed)


def _filled(update: Tree, zeros: Params) -> Tree:
    """An update whose controls have all names."""
    controls = [field for field, kind in kinds(type(update)).items() if kind is Kind.CONTROL]
    return update._replace(**{f: {n: getattr(update, f).get(n, z) for n, z in zeros.items()} for f in controls})


def by_name(trees: Sequence[Params], shares: Sequence[float]) -> Params:
    """The weighted mean of each name over the trees that have it, its shares made to sum to 1 where some lack it."""
    names = dict.fromkeys(name for tree in sorted(trees, key=len, reverse=True) for name in tree)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(i for i, tree in enumerate(trees) if name in tree), []).append(name)
    found: Params = {}
    for owners, own in groups.items():
        held = [shares[i] for i in owners]
        total = 1.0 if len(owners) == len(trees) else sum(held)
        parts = [{name: trees[i][name] for name in own} for i in owners]
        found.update(weighted_sum(parts, [share / total for share in held]))
    return {name: found[name] for name in names}


def references(params: Params) -> dict[str, str]:
    """For each kernel or matrix that is not the first of its shape in its stage, which one is."""
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, p in params.items():
        if p.dim() > 1:
            key = tuple(name.split(".")[:2]) if name.count(".") > 2 else name.split(".")[0], p.shape
            if key in first:
                found[name] = first[key]
            first.setdefault(key, name)
    return found


def mixed(changes: Params, mode: str) -> Params:
    """The changes with those of deep layers mixed with their reference's."""
    rule = RULES.get(mode)
    of = {} if rule is None else references(changes)
    return {name: rule(g, changes[of[name]]) if rule and name in of else g for name, g in changes.items()}


def _theorem(g: Tensor, first: Tensor) -> Tensor:
    a, b = (first * first).sum(), (first * g).sum()
    return g - (b / a) * first if a > 0 and b < 0 else g


def _text(g: Tensor, first: Tensor) -> Tensor:
    a, b = (first * first).sum(), (first * g).sum()
    size, base = g.norm(), first.norm()
    if not (a > 0 and size > 0):
        return g
    found: Tensor = (g / size - b / a * first / base) * (size + base) / 2
    return found


def _repo(g: Tensor, first: Tensor) -> Tensor:
    within = tuple(range(2, g.dim())) or (0, 1)
    a, b = ((first * other).sum(within, keepdim=True) for other in (first, g))
    size, base = (t.square().sum(within, keepdim=True).sqrt() for t in (g, first))
    tiny = torch.finfo(g.dtype).tiny
    theta = (b.abs() / a.clamp_min(tiny)).clamp(0, 5)
    new = (g / size.clamp_min(tiny) + theta * first / base.clamp_min(tiny)) * (size + base) / 2
    found: Tensor = torch.where((a > 0) & (size > 0), new, g).clamp(-0.1, 0.1)
    return found


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"theorem": _theorem, "text": _text, "repo": _repo}
