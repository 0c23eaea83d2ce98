"""Small models, each in two parts (features and head) so that any method can use them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from consilience.core.model import SplitModel
from consilience.models.axes import Nested, Residual


def cut(width: int, rate: float) -> int:
    """Units of a hidden layer that a nested width keeps: ceil(width * rate). Raises ValueError where that is none."""
    if not 0 < rate <= 1:
        raise ValueError(f"a rate is above 0 and at most 1, not {rate:g}")
    return math.ceil(round(width * rate, 9))


class Pooled(SplitModel):
    """A model whose features are pooled to ``width`` of them, before a head of its own: so models of any architecture
    have features of one width (Zhang et al., "HtFLlib", 2025)."""

    def __init__(self, model: SplitModel, width: int, outputs: int) -> None:
        super().__init__(nn.Sequential(model.features, nn.AdaptiveAvgPool1d(width)), nn.Linear(width, outputs), width)


class Linear(Nested):
    """``logistic``: flattened inputs straight to the outputs."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        width = math.prod(input_shape)
        super().__init__(nn.Flatten(), nn.Linear(width, outputs), width)


class Homogeneous(SplitModel):
    """``linear``: as ``logistic``, without an intercept."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        width = math.prod(input_shape)
        super().__init__(nn.Flatten(), nn.Linear(width, outputs, bias=False), width)


class MLP(Nested):
    """``mlp``: hidden ReLU layers, by default one of 200."""

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, widths: tuple[int, ...] = (200,), rate: float = 1.0
    ) -> None:
        widths = tuple(cut(width, rate) for width in widths)
        sizes = (math.prod(input_shape), *widths)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip(sizes, widths, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), nn.Linear(sizes[-1], outputs), sizes[-1])


class MaxPool(nn.Module):
    """2x2 max pooling: the bits of ``nn.MaxPool2d(2)``. Where no gradient is wanted it takes the larger of
    neighbours twice, which is up to ten times faster on a CPU, for few channels above all."""

    def forward(self, x: Tensor) -> Tensor:
        """``(b, c, h, w)`` -> ``(b, c, h // 2, w // 2)``."""
        if torch.is_grad_enabled():
            return nn.functional.max_pool2d(x, 2)
        height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
        rows = torch.maximum(x[..., 0:height:2, :width], x[..., 1:height:2, :width])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _image(name: str, input_shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise ValueError(f"{name} takes images of shape (channels, height, width) with sides of at least {smallest}")
    channels, height, width = input_shape
    return channels, height, width


class LeNet(Nested):
    """``lenet``: 5x5 convolutions of 6 (padded) and 16 channels with 2x2 max pooling, then 120 and 84 units."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, rate: float = 1.0) -> None:
        channels, height, width = _image("lenet", input_shape, 12)
        after = [(side // 2 - 4) // 2 for side in (height, width)]
        first, second, third, last = (cut(n, rate) for n in (6, 16, 120, 84))
        features = nn.Sequential(
            nn.Conv2d(channels, first, 5, padding=2),
            MaxPool(),  # before the ReLU: the same function and gradient, on a quarter of the values
            nn.ReLU(),
            nn.Conv2d(first, second, 5),
            MaxPool(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second * after[0] * after[1], third),
            nn.ReLU(),
            nn.Linear(third, last),
            nn.ReLU(),
        )
        super().__init__(features, nn.Linear(last, outputs), last)


class CNN(Nested):
    """``cnn``: padded 5x5 convolutions of 32 and 64 channels with 2x2 max pooling, then 512 units (McMahan 2017)."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, rate: float = 1.0) -> None:
        channels, height, width = _image("cnn", input_shape, 4)
        first, second, last = (cut(n, rate) for n in (32, 64, 512))
        features = nn.Sequential(
            nn.Conv2d(channels, first, 5, padding=2),
            MaxPool(),
            nn.ReLU(),
            nn.Conv2d(first, second, 5, padding=2),
            MaxPool(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second * (height // 4) * (width // 4), last),
            nn.ReLU(),
        )
        super().__init__(features, nn.Linear(last, outputs), last)


Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """GroupNorm with 2 groups (1 where channels are odd): no statistics to carry, so nothing to average."""
    return nn.GroupNorm(2 if channels % 2 == 0 else 1, channels)


class _Block(Residual):
    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            norm(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            norm(after),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.skip(x))
        return out


def _stage(before: int, after: int, stride: int, norm: Norm, blocks: int) -> nn.Sequential:
    first = _Block(before, after, stride, norm)
    return nn.Sequential(first, *(_Block(after, after, 1, norm) for _ in range(blocks - 1)))


class ResNet(Nested):
    """``resnet8``, ``resnet14``, ``resnet20``: three stages of 16, 32 and 64 channels with n = 1, 2 or 3 residual
    blocks each (He 2016, the CIFAR form of depth 6 n + 2). A shallower one has the first blocks of each stage of a
    deeper one, by the same names."""

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, norm: Norm = group_norm, rate: float = 1.0, blocks: int = 1
    ) -> None:
        channels, _, _ = _image(f"resnet{6 * blocks + 2}", input_shape, 4)
        first, second, last = (cut(n, rate) for n in (16, 32, 64))
        features = nn.Sequential(
            nn.Conv2d(channels, first, 3, 1, 1, bias=False),
            norm(first),
            nn.ReLU(),
            _stage(first, first, 1, norm, blocks),
            _stage(first, second, 2, norm, blocks),
            _stage(second, last, 2, norm, blocks),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        super().__init__(features, nn.Linear(last, outputs), last)
