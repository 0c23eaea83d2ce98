"""Adapters: small bottlenecks between the layers of a model, which clients may keep to themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilience.core.model import Factory, SplitModel
from consilience.models.axes import Residual

NARROWER = 4
"""How many times narrower the inside of an adapter is than what it is given."""


class Adapter(nn.Module):
    """``x + up(relu(down(x)))`` over the channels or features of x; ``up`` begins as 0, so that at first nothing
    changes."""

    def __init__(self, units: int, image: bool) -> None:
        super().__init__()
        inside = max(1, units // NARROWER)
        self.down: nn.Module = nn.Conv2d(units, inside, 1) if image else nn.Linear(units, inside)
        self.up: nn.Module = nn.Conv2d(inside, units, 1) if image else nn.Linear(inside, units)
        for p in self.up.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of ``x``."""
        out: Tensor = x + self.up(torch.relu(self.down(x)))
        return out


class Adapted(SplitModel):
    """A split model with an adapter after each ReLU and each stage of residual blocks of its features. Parameters of
    adapters have ``adapter`` in their names; all others are called as in the model without.

    Raises ValueError for a model without such places.
    """

    def __init__(self, factory: Factory, input_shape: tuple[int, ...], outputs: int) -> None:
        model = factory(input_shape, outputs)
        if not isinstance(model, SplitModel) or not isinstance(model.features, nn.Sequential):
            raise ValueError("adapters stand in a split model whose features are a Sequential")
        features = nn.Sequential()
        units, image = 0, False
        for key, part in model.features.named_children():
            features.add_module(key, part)
            for layer in part.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    last = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
                    units, image = last, isinstance(layer, nn.Conv2d)
            stage = any(isinstance(layer, Residual) for layer in part.modules())
            if units and (stage or isinstance(part, nn.ReLU)):
                features.add_module(f"adapter{key}", Adapter(units, image))
        if not any(isinstance(part, Adapter) for part in features):
            raise ValueError("adapters stand after a ReLU or a stage of residual blocks, and the model has neither")
        super().__init__(features, model.head, model.width)
