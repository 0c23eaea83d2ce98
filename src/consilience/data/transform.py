"""Feature and concept shift: what a partition does to the clients' own rows, never to the global test set."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from consilience.core.errors import ConfigError
from consilience.core.streams import philox
from consilience.data.partition import Partition
from consilience.data.spec import Part


def shift(x: Tensor, y: Tensor, partition: Partition, classes: int) -> None:
    """Apply the partition's feature and concept parts in place.

    x: ``(n, *shape)`` inputs and y: ``(n,)`` labels, in the order of ``partition.order``. Group 0 stays as it is.
    """
    spec = partition.spec
    for part in spec.feature:
        if part.name == "noise":
            _noise(x, partition, part.value)
            continue
        if x.ndim != 4:
            raise ConfigError(
                f"partition '{spec.text}': {part.name} needs images, inputs (channels, height, width), and these are "
                f"{tuple(x.shape[1:])}; use noise:S"
            )
        for rows, group in _rows_by_group(partition, part):
            x[rows] = _image(part, group, x[rows])
    if spec.concept is not None:
        count = spec.concept.count
        if count > classes:
            raise ConfigError(f"partition '{spec.text}': permute:{count} needs at most one group per class, {classes}")
        circle = torch.from_numpy(philox(partition.seed, "partition", "permute").permutation(classes))
        for rows, group in _rows_by_group(partition, spec.concept):
            # the labels on a circle in random order, turned by g: any two groups disagree about every label
            table = torch.empty_like(circle)
            table[circle] = circle.roll(-group)
            y[rows] = table[y[rows]]


def _rows_by_group(partition: Partition, part: Part) -> list[tuple[Tensor, int]]:
    sizes = partition.bounds[:, 3] - partition.bounds[:, 0]
    group = np.repeat(partition.group_of(part), sizes)
    return [(torch.from_numpy(np.flatnonzero(group == g)), g) for g in range(1, part.count)]


def _noise(x: Tensor, partition: Partition, deviation: float) -> None:
    """Gaussian noise that grows linearly from client 0 (none) to the last (``deviation``), as in NIID-Bench."""
    last = partition.clients - 1
    for client in range(partition.clients):
        scale = deviation * (client / last if last else 1.0)
        rows = slice(int(partition.bounds[client, 0]), int(partition.bounds[client, 3]))
        noise = philox(partition.seed, "partition", "noise", client).standard_normal(x[rows].shape, dtype=np.float32)
        x[rows] += scale * torch.from_numpy(noise)


def _image(part: Part, group: int, x: Tensor) -> Tensor:
    """Images ``(n, channels, height, width)`` of one group: the last group is changed most."""
    degree = group / max(part.count - 1, 1)
    if part.name == "brightness":
        return x * (1.0 - 0.75 * degree)
    if part.name == "blur":
        return _blur(x, degree * min(x.shape[-2:]) / 14)
    return _rotate(x, 360.0 * group / part.count)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with a standard deviation of ``sigma`` pixels; the border's pixels are repeated outwards."""
    from scipy.ndimage import gaussian_filter1d  # type: ignore[import-untyped]

    blurred = x.numpy()
    for axis in (-2, -1):
        blurred = gaussian_filter1d(blurred, sigma, axis=axis, mode="nearest")
    return torch.from_numpy(blurred)


def _rotate(x: Tensor, degrees: float) -> Tensor:
    """Rotation anticlockwise: exact for multiples of 90 degrees where the shape allows, bilinear otherwise."""
    height, width = x.shape[-2:]
    quarters = degrees / 90
    if quarters == int(quarters) and (height == width or int(quarters) % 2 == 0):
        return torch.rot90(x, int(quarters), (-2, -1))
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, -s * height / width, 0.0], [s * width / height, c, 0.0]], dtype=x.dtype)
    grid = F.affine_grid(turn.expand(1, 2, 3), [1, *x.shape[1:]], align_corners=False)
    parts = torch.split(x, 1024)
    return torch.cat([F.grid_sample(part, grid.expand(len(part), -1, -1, -1), align_corners=False) for part in parts])
