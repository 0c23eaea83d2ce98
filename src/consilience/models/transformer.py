"""A small transformer for images, built without a download, and low-rank adapters (LoRA) in any split model."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from consilience.core.errors import ConfigError
from consilience.core.model import Factory, SplitModel

TOKENS = 4
"""Patches along the shorter side of an image, about."""


class Attention(nn.Module):
    """Multi-head self-attention, its matrix products written out, so that every executor can take it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, tokens, width)`` -> the same."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention and two linear layers, each behind a LayerNorm and added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(b, tokens, width)`` -> the same."""
        x = x + self.attention(self.before(x))
        out: Tensor = x + self.mlp(self.between(x))
        return out


class _Features(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], width: int, heads: int, layers: int) -> None:
        super().__init__()
        channels, height, width_ = input_shape
        self.side = max(1, min(height, width_) // TOKENS)
        tokens = (height // self.side) * (width_ // self.side)
        self.embed = nn.Linear(channels * self.side**2, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (n // self.side for n in x.shape[-2:])
        x = x[..., : rows * self.side, : columns * self.side]
        patches = x.reshape(*x.shape[:2], rows, self.side, columns, self.side)
        tokens = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        out: Tensor = self.norm(self.layers(self.embed(tokens) + self.place)).mean(1)
        return out


class Transformer(SplitModel):
    """``transformer``: images as 4x4 patches or a few more, 2 layers of width 32 with 4 heads, the mean of the tokens
    (the form of Dosovitskiy et al., 2021, far smaller). No dropout."""

    adapted: ClassVar[tuple[str, ...]] = ("query", "value")
    """The layers that LoRA adapts (Hu et al., 2022)."""

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, width: int = 32, heads: int = 4, layers: int = 2
    ) -> None:
        if len(input_shape) != 3:
            raise ValueError("transformer takes images of shape (channels, height, width)")
        super().__init__(_Features(input_shape, width, heads, layers), nn.Linear(width, outputs), width)


def with_lora(factory: Factory, rank: int, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """A split model with peft's low-rank adapters in its features, alpha = rank: W x + B A x, with B = 0 at first. All
    but these and the head is frozen. They stand in the layers that the model names in ``adapted``, or in all linear
    ones.

    Raises ConfigError without peft, ValueError for a model without linear layers in its features.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("models with +lora need peft: pip install 'consilience[lora]'") from None
    model = factory(input_shape, outputs)
    if not isinstance(model, SplitModel):
        raise ValueError("LoRA stands in the features of a split model (features and head)")
    named = getattr(model, "adapted", ())
    layers = [
        name
        for name, part in model.features.named_modules()
        if isinstance(part, nn.Linear) and (not named or name.rpartition(".")[2] in named)
    ]
    if not layers:
        raise ValueError("LoRA stands in linear layers, and the model's features have none")
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=layers)
    inject_adapter_in_model(config, model.features)
    return model
