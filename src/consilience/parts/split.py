"""Parts of a model: its head and what is below it, and what clients keep to themselves and what they share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from consilience.core.errors import ConfigError
from consilience.core.model import Architecture, Factory, Params, SplitModel, Weights

HEAD = "head."
"""How the names of a head's parameters begin."""


def head_of(weights: Weights) -> Params:
    """The head's parameters, with their names in the whole model."""
    return {name: p for name, p in weights.params.items() if name.startswith(HEAD)}


def with_head(weights: Weights, head: Params) -> Weights:
    """The same model with another head."""
    return weights._replace(params={name: head.get(name, p) for name, p in weights.params.items()})


def alone(head: Params) -> Weights:
    """A head as the weights of :func:`head_network`."""
    return Weights({name.removeprefix(HEAD): p for name, p in head.items()}, {})


def rejoined(weights: Weights) -> Params:
    """The parameters of :func:`head_network`, named as in the whole model."""
    return {f"{HEAD}{name}": p for name, p in weights.params.items()}


def head_network(model: Architecture, name: str = "head") -> Architecture:
    """The head of a model as a network of its own, whose inputs are features."""
    factory = functools.partial(_head, model.factory, model.input_shape)
    return Architecture(name, factory, (model.width or 0,), model.outputs, model.dtype)


def _head(factory: Factory, whole_shape: tuple[int, ...], input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    model = factory(whole_shape, outputs)
    assert isinstance(model, SplitModel)
    return model.head


PERSONAL = "output, input, adapter, none"
"""Words for what is personal, beside patterns of names."""


@dataclass(frozen=True)
class Names:
    """A model's parameters and buffers, divided: ``own`` are a client's, all others are shared. own_trained,
    shared_trained: parameters that its maker did not freeze."""

    own: frozenset[str]
    own_trained: frozenset[str]
    shared_trained: frozenset[str]

    def own_of(self, weights: Weights) -> Weights:
        """The personal part."""
        return Weights(*({n: t for n, t in part.items() if n in self.own} for part in weights))

    def shared_of(self, weights: Weights) -> Weights:
        """The shared part."""
        return Weights(*({n: t for n, t in part.items() if n not in self.own} for part in weights))


def joined(spec: Weights, shared: Weights, own: Weights) -> Weights:
    """Both parts as one model, its names in the order of ``spec``."""
    both = ({**a, **b} for a, b in zip(shared, own, strict=True))
    return Weights(*({n: part[n] for n in names if n in part} for part, names in zip(both, spec, strict=True)))


@functools.lru_cache(maxsize=64)
def divided(model: Architecture, personal: str) -> Names:
    """The names that are personal: ``output`` (the head, or the last layer of a model that is not split), ``input``
    (the first layer), ``adapter`` (parts that are called so), ``none``, or patterns with commas between them.

    Raises ConfigError for a pattern that no name fits, and where nothing that is trained would be shared.
    """
    module = model.build()
    spec = model.spec
    names = [*spec.params, *spec.buffers]
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    own: set[str] = set()
    for pattern in _patterns(model, personal):
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ConfigError(f"personal={personal}: no parameter of model '{model.name}' fits '{pattern}'")
        own |= found
    if not trained - own:
        raise ConfigError(f"personal={personal}: nothing of model '{model.name}' is shared; use the method local")
    return Names(frozenset(own), frozenset(trained & own), frozenset(trained - own))


def _patterns(model: Architecture, personal: str) -> list[str]:
    layers = [name.rpartition(".")[0] for name in model.spec.params]
    last = HEAD.rstrip(".") if model.width is not None else layers[-1]
    words = {"none": [], "input": [f"{layers[0]}.*"], "output": [f"{last}.*"], "adapter": ["*adapter*"]}
    return words[personal] if personal in words else [part.strip() for part in personal.split(",")]
