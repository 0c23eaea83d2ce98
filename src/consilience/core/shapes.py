"""What a field of a message must look like, for validation before arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.model import Params, Weights


class Shape(NamedTuple):
    """A tensor. dims: lengths; a letter stands for any length, the same wherever it is used in one message.

    low, high: bounds of the values. distinct: no value twice (of class numbers).
    """

    dtype: torch.dtype
    dims: tuple[int | str, ...]
    low: float | None = None
    high: float | None = None
    distinct: bool = False


Wrong = tuple[str, str]
"""(what, why)."""
Expected = Weights | Params | Shape | Callable[[Any], Wrong | None]
"""A whole model, parameters by name, one tensor, or a function that says what is wrong with a field."""


def misfit(found: Any, expected: Expected, lengths: dict[str, int]) -> Wrong | None:
    """The first thing about ``found`` that is not as expected; ``lengths`` collects what letters stand for."""
    if isinstance(expected, Shape):
        why = _tensor(found, expected, lengths)
        return None if why is None else ("", why)
    if callable(expected):
        return expected(found)
    if isinstance(expected, Weights):
        if not isinstance(found, Weights):
            return "", f"is {type(found).__name__}, not a model"
        return compare(found.params, expected.params) or compare(found.buffers, expected.buffers)
    return compare(found, expected)


def _tensor(found: Any, expected: Shape, lengths: dict[str, int]) -> str | None:
    if not isinstance(found, Tensor):
        return f"is {type(found).__name__}, not a tensor"
    if found.dtype != expected.dtype:
        return f"has dtype {found.dtype}, not {expected.dtype}"
    fits = len(found.shape) == len(expected.dims) and all(
        length == (lengths.setdefault(dim, length) if isinstance(dim, str) else dim)
        for length, dim in zip(found.shape, expected.dims, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(lengths.get(dim, dim)) if isinstance(dim, str) else str(dim) for dim in expected.dims)
        return f"has shape {tuple(found.shape)}, not ({wanted})"
    if found.numel() and expected.low is not None and found.min() < expected.low:
        return f"holds {found.min().item():g}, below {expected.low:g}"
    if found.numel() and expected.high is not None and found.max() > expected.high:
        return f"holds {found.max().item():g}, above {expected.high:g}"
    if expected.distinct and len(set(found.flatten().tolist())) < found.numel():
        return "holds a value twice"
    return None


def compare(found: Any, spec: Mapping[str, Tensor]) -> Wrong | None:
    """The first thing about parameters ``found`` that is not as in ``spec``: (name, reason)."""
    if not isinstance(found, dict):
        return "", f"is {type(found).__name__}, not parameters by name"
    for name in [*found, *spec]:
        if name not in found:
            return name, "is missing"
        if name not in spec:
            return name, "is not a parameter of this client's model"
        a, b = found[name], spec[name]
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return name, f"has shape {tuple(getattr(a, 'shape', ()))}, not {tuple(b.shape)}"
        if a.dtype != b.dtype:
            return name, f"has dtype {a.dtype}, not {b.dtype}"
    return None if list(found) == list(spec) else (next(iter(found)), "stands in another order")
