"""A small feature extractor that comes trained, and stays as it is."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from consilience.core.model import SplitModel
from consilience.models.small import MaxPool

FILE = Path(__file__).parent / "files" / "frozen.safetensors"
"""Its weights, which ``benchmarks/extractor.py`` made."""
WIDTH = 64
"""Features that it gives."""


def layers() -> nn.Sequential:
    """The extractor, untrained: three 3x3 convolutions of 16, 32 and 64 channels with 2x2 max pooling behind the first
    two, for images of one channel with sides of at least 8; then the mean over the image."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        MaxPool(),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        MaxPool(),
        nn.ReLU(),
        nn.Conv2d(32, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, WIDTH),
        nn.ReLU(),
    )


class Frozen(SplitModel):
    """``frozen``: features that were learned on the first five classes of Fashion-MNIST and are never trained further,
    and a new linear head. For images of one channel with sides of at least 8."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        if len(input_shape) != 3 or input_shape[0] != 1 or min(input_shape[1:]) < 8:
            raise ValueError("frozen takes images of shape (1, height, width) with sides of at least 8")
        features = layers()
        features.load_state_dict(load_file(FILE))
        super().__init__(features.requires_grad_(False), nn.Linear(WIDTH, outputs), WIDTH)
