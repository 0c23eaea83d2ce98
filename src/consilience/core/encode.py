"""The one encoding of trees: a safetensors blob whose metadata holds the tree's structure as JSON.

Messages, client state in flight to worker processes, checkpoints and exported models are all written so. Any
safetensors reader can open them. Nothing is pickled, and decoding checks everything before it makes a tensor:
records must be registered, offsets must lie within the blob and agree with shape and dtype.

Layout: 8 bytes (little-endian length of the header), the header, then tensor data without gaps. Data begin at a
multiple of :data:`ALIGNMENT`, and tensors are ordered by the largest power of two that divides their bytes. So each
begins at a multiple of its dtype's width, and one whose bytes are a multiple of :data:`ALIGNMENT` at such a multiple.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from consilience.core.tree import RECORDS, Tree, is_record, record_name

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SCALARS = (bool, int, float, str, type(None))
ALIGNMENT = 64
"""Bytes at a multiple of which torch lets tensors begin on a CPU."""
MAX_DEPTH = 64
"""Deepest nesting that is written and read."""
MAX_DIMS = 64
"""Most dimensions of a tensor that is written and read."""


class DecodeError(ValueError):
    """Bytes that are no encoded tree; the message says which part is wrong."""


def _structure(tree: Tree, found: list[Tensor], depth: int = 0) -> Any:
    """The tree as JSON, tensors replaced by their index in ``found``."""
    if isinstance(tree, Tensor):
        if tree.dtype not in _NAMES:
            raise TypeError(f"tensors of dtype {tree.dtype} cannot be written")
        if tree.ndim > MAX_DIMS:
            raise ValueError(f"a tensor has at most {MAX_DIMS} dimensions to be written; this one has {tree.ndim}")
        found.append(tree)
        return {"t": len(found) - 1}
    if type(tree) in _SCALARS:  # exactly: a numpy number would come back as another type
        return tree
    below = depth + 1
    if below > MAX_DEPTH and isinstance(tree, (dict, tuple, list)) and tree:
        raise ValueError(f"a tree is nested at most {MAX_DEPTH} deep to be written; this one is deeper")
    if isinstance(tree, dict):
        return {"d": [[key, _structure(child, found, below)] for key, child in tree.items()]}
    if is_record(tree):
        name = record_name(type(tree))
        if name not in RECORDS:
            raise TypeError(f"{name} is not registered: decorate the NamedTuple with @record")
        return {"r": name, "v": [_structure(child, found, below) for child in tree]}
    if isinstance(tree, (tuple, list)):
        return {"l" if isinstance(tree, list) else "u": [_structure(child, found, below) for child in tree]}
    raise TypeError(f"a tree's leaves are tensors, numbers, strings or None, not {type(tree).__name__}")


def _plan(tree: Tree) -> tuple[bytes, list[tuple[Tensor, int]], int]:
    """The header, the tensors with their offsets, and the number of data bytes."""
    found: list[Tensor] = []
    structure = _structure(tree, found)
    sizes = [tensor.numel() * tensor.element_size() for tensor in found]
    order = sorted(range(len(found)), key=lambda i: -math.gcd(sizes[i], ALIGNMENT))
    header: dict[str, Any] = {"__metadata__": {"tree": json.dumps(structure, separators=(",", ":"))}}
    placed: list[tuple[Tensor, int]] = []
    end = 0
    for i in order:
        tensor = found[i]
        start, end = end, end + sizes[i]
        header[str(i)] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        placed.append((tensor, start))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, placed, end


def encoded_size(tree: Tree) -> int:
    """Exactly ``len(encode(tree))``, without encoding."""
    form = _form(tree)
    if form not in _sizes:
        if len(_sizes) >= 1024:
            _sizes.clear()
        head, _, data = _plan(tree)
        _sizes[form] = len(head) + data
    return _sizes[form]


_sizes: dict[Any, int] = {}
"""Encoded bytes of the forms seen lately: messages of one form come by the thousand."""


def _form(tree: Tree) -> Any:
    """All that the size of the encoded tree depends on."""
    if isinstance(tree, Tensor):
        return tree.dtype, tree.shape
    if isinstance(tree, dict):
        return tuple(tree), tuple(map(_form, tree.values()))
    if isinstance(tree, (tuple, list)):
        return type(tree), tuple(map(_form, tree))
    return type(tree), repr(tree)


class Encoder:
    """A tree made ready for writing: ``size`` bytes, written by :meth:`into` or given by :meth:`pieces` without
    further copies."""

    def __init__(self, tree: Tree) -> None:
        self._head, self._placed, data = _plan(tree)
        self.size = len(self._head) + data

    def into(self, buffer: memoryview | bytearray) -> None:
        """Write to the start of ``buffer`` (at least ``size`` bytes)."""
        base = len(self._head)
        buffer[:base] = self._head
        for tensor, start in self._placed:
            if tensor.numel():
                target = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=base + start)
                target.view(tensor.shape).copy_(tensor.detach())

    def pieces(self) -> Iterator[Any]:
        """The bytes piece by piece: the head, then each tensor's own memory."""
        yield self._head
        for tensor, _ in self._placed:
            if tensor.numel():
                yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def memory(size: int) -> memoryview:
    """``size`` writable bytes that begin at a multiple of :data:`ALIGNMENT`."""
    return torch.empty(size, dtype=torch.uint8).numpy().data


def encode(tree: Tree) -> bytearray:
    """The tree as bytes."""
    encoder = Encoder(tree)
    out = bytearray(encoder.size)
    encoder.into(out)
    return out


def decode(buffer: Any, *, copy: bool = True, limit: int | None = None) -> Tree:
    """The tree in ``buffer`` (bytes-like; writable if ``copy`` is False, since tensors are then views of it).

    Views that do not begin at a multiple of :data:`ALIGNMENT` are copied all the same; from a buffer that does, as
    :func:`memory` does, these are small ones. limit: most bytes that are looked at. Raises DecodeError.
    """
    view = memoryview(buffer)
    if limit is not None and len(view) > limit:
        raise DecodeError(f"{len(view)} bytes, more than the limit of {limit}")
    if len(view) < 8:
        raise DecodeError("shorter than its own length field")
    base = 8 + int.from_bytes(view[:8], "little")
    if base > len(view):
        raise DecodeError("the header is cut off")
    try:
        header = json.loads(bytes(view[8:base]))
        structure = json.loads(header.pop("__metadata__")["tree"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DecodeError("the header is damaged") from error
    data = buffer
    if copy:
        data = memory(len(view))
        data[:] = view
    found: dict[str, Tensor] = {}
    left = len(view) - base  # each byte is one tensor's, or many entries could make much of few bytes
    for name, entry in header.items():
        found[name] = tensor = _tensor(name, entry, data, base, len(view))
        left -= tensor.nbytes
        if left < 0:
            raise DecodeError(f"tensor {name}: shares bytes with another")
    return _grow(structure, found, 0)


def _tensor(name: str, entry: Any, data: Any, base: int, size: int) -> Tensor:
    try:
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        start, end = entry["data_offsets"]
        few = isinstance(shape, list) and len(shape) <= MAX_DIMS
        good = few and all(type(n) is int and n >= 0 for n in [*shape, start, end])
        count = math.prod(shape) if good else -1
    except (KeyError, TypeError, ValueError) as error:
        raise DecodeError(f"tensor {name}: a damaged description") from error
    if not good or end - start != count * dtype.itemsize or base + end > size:
        raise DecodeError(f"tensor {name}: its bytes do not match its shape")
    if not count:
        try:
            return torch.empty(shape, dtype=dtype)
        except (RuntimeError, TypeError) as error:
            raise DecodeError(f"tensor {name}: a shape that cannot be") from error
    found = torch.frombuffer(data, dtype=dtype, count=count, offset=base + start).view(shape)
    # The last bits of a matrix product depend on where its operands begin, so they begin as torch's own tensors do.
    return found.clone() if found.data_ptr() % ALIGNMENT else found


def _grow(node: Any, found: dict[str, Tensor], depth: int) -> Tree:
    if depth > MAX_DEPTH:
        raise DecodeError(f"nested deeper than {MAX_DEPTH}")
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise DecodeError("a bare list in the structure")
        return node
    try:
        if "t" in node:
            return found.pop(str(node["t"]))  # each tensor once, so that a structure holds no more than was sent
        if "d" in node:
            return {key: _grow(child, found, depth + 1) for key, child in node["d"]}
        if "r" in node:
            return RECORDS[node["r"]](*[_grow(child, found, depth + 1) for child in node["v"]])
        children = node["l"] if "l" in node else node["u"]
        grown = [_grow(child, found, depth + 1) for child in children]
        return grown if "l" in node else tuple(grown)
    except DecodeError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DecodeError(f"the structure is damaged at depth {depth}") from error
