"""Plain convolutional nets of several depths: convolutions, ReLU and pooling, without norms or skips."""

from __future__ import annotations

from torch import nn

from consilience.models.axes import Nested
from consilience.models.small import MaxPool, cut

WIDTHS = (16, 32, 64)
"""Channels of the three stages."""


class VGG(Nested):
    """``vgg5``, ``vgg8``, ``vgg11``: three stages of 16, 32 and 64 channels with n = 1, 2 or 3 padded 3x3 convolutions
    each and 2x2 max pooling behind, then 128 units: 3 n + 2 layers with weights (after Simonyan and Zisserman, 2015).
    A shallower one has the first convolutions of each stage of a deeper one, by the same names."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, rate: float = 1.0, convolutions: int = 1) -> None:
        if len(input_shape) != 3 or min(input_shape[1:]) < 8:
            raise ValueError("vgg takes images of shape (channels, height, width) with sides of at least 8")
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for after in (cut(n, rate) for n in WIDTHS):
            stage: list[nn.Module] = []
            for _ in range(convolutions):
                stage += [nn.Conv2d(channels, after, 3, padding=1), nn.ReLU()]
                channels = after
            layers += [nn.Sequential(*stage), MaxPool()]
        units = cut(128, rate)
        layers += [nn.Flatten(), nn.Linear(channels * (height // 8) * (width // 8), units), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), nn.Linear(units, outputs), units)
