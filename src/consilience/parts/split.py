"""Parts of a split model: its head, and everything below it."""

from __future__ import annotations

import functools

from torch import nn

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
