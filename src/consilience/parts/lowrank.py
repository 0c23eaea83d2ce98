"""Parameters as truncated singular value decompositions, for sending fewer numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.model import Params
from consilience.core.shapes import Wrong
from consilience.core.tree import record


@record
class Factors(NamedTuple):
    """A matrix u v of rank r: ``(rows, r)`` and ``(r, columns)``."""

    u: Tensor
    v: Tensor


Packed = dict[str, Any]
"""By name a tensor as it is, or :class:`Factors` of it as a matrix (first dimension by all others)."""


def pack(params: Params, energy: float) -> Packed:
    """Each matrix by the smallest rank whose squared singular values make up ``energy`` of their sum (at least one), if
    that is fewer numbers; vectors as they are. With energy 1 everything stays as it is."""
    return {name: p if energy >= 1 or p.dim() < 2 else _factored(p, energy) for name, p in params.items()}


def _factored(p: Tensor, energy: float) -> Tensor | Factors:
    matrix = p.reshape(len(p), -1).contiguous()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    held = s.double().square().cumsum(0)
    rank = int((held < energy * held[-1]).sum()) + 1
    if rank * sum(matrix.shape) >= matrix.numel():
        return p
    return Factors((u[:, :rank] * s[:rank]).contiguous(), v[:rank].contiguous())


def unpack(packed: Packed, like: Params) -> Params:
    """The parameters, shaped as ``like``."""
    return {
        name: (part.u @ part.v).reshape(like[name].shape) if isinstance(part, Factors) else part
        for name, part in packed.items()
    }


def misfit(packed: Any, like: Params) -> Wrong | None:
    """The first thing about packed parameters that cannot be unpacked as ``like``."""
    if not isinstance(packed, dict) or list(packed) != list(like):
        return "", "does not have the parameters of the model"
    for name, part in packed.items():
        rows, columns = (like[name].shape[0], like[name][0].numel()) if like[name].dim() > 1 else (0, 0)
        if isinstance(part, Factors):
            fits = part.u.dim() == part.v.dim() == 2 and part.u.shape[1] == part.v.shape[0] <= min(rows, columns)
            if not fits or (part.u.shape[0], part.v.shape[1]) != (rows, columns):
                return name, f"has factors {tuple(part.u.shape)} and {tuple(part.v.shape)}, not of {rows} x {columns}"
            parts = [part.u, part.v]
        elif not isinstance(part, Tensor) or part.shape != like[name].shape:
            return name, f"has shape {tuple(getattr(part, 'shape', ()))}, not {tuple(like[name].shape)}"
        else:
            parts = [part]
        if any(t.dtype != like[name].dtype for t in parts):
            return name, f"has dtype {parts[0].dtype}, not {like[name].dtype}"
    return None
