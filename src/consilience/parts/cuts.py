"""Where a model can be cut in two: what is below a cut gives representations, of which what is above makes scores."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consilience.core.errors import ConfigError
from consilience.core.model import Architecture, Factory, SplitModel
from consilience.core.streams import torch_fork


@dataclass(frozen=True)
class Cut:
    """A cut of a model. at: how many parts of its features are below. shape: of one representation."""

    at: int
    shape: tuple[int, ...]

    def below(self, model: SplitModel, x: Tensor) -> Tensor:
        """Representations ``(b, *shape)`` of inputs."""
        for part in list(model.features.children())[: self.at]:
            x = part(x)
        return x

    def above(self, model: SplitModel, r: Tensor) -> Tensor:
        """Scores ``(b, outputs)`` of representations."""
        for part in [*list(model.features.children())[self.at :], model.head]:
            r = part(r)
        return r

    def tail(self, model: Architecture, name: str) -> Architecture:
        """What is above as a network of its own, whose inputs are representations."""
        factory = functools.partial(_tail, model.factory, model.input_shape, self.at)
        return Architecture(name, factory, self.shape, model.outputs, model.dtype)


def _tail(
    factory: Factory, whole_shape: tuple[int, ...], at: int, input_shape: tuple[int, ...], outputs: int
) -> nn.Module:
    model = factory(whole_shape, outputs)
    assert isinstance(model, SplitModel)
    return nn.Sequential(*list(model.features.children())[at:], model.head)


@functools.lru_cache(maxsize=64)
def cuts(model: Architecture) -> tuple[Cut, ...]:
    """The cuts of a model, deepest first: before the head, and before each part of the features that has a linear or
    convolutional layer, except the first of these.

    Raises ConfigError for a model whose features are no Sequential, or without a layer below its head.
    """
    module = model.build()
    features = module.features if isinstance(module, SplitModel) else None
    if features is not None and not any(_layer(part) for part in features.modules()):
        raise ConfigError(f"model '{model.name}' cannot be cut between layers: there is none below its head")
    if not isinstance(features, nn.Sequential):
        raise ConfigError(f"model '{model.name}' cannot be cut between layers: its features are no Sequential")
    layers = [i for i, part in enumerate(features) if any(_layer(m) for m in part.modules())]
    module.eval()
    found = []
    with torch.no_grad(), torch_fork(0):
        for at in (len(features), *reversed(layers[1:])):
            r = features[:at](torch.zeros(1, *model.input_shape, dtype=model.dtype))
            found.append(Cut(at, tuple(r.shape[1:])))
    return tuple(found)


def _layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)
