"""Trees: nested records, dicts, lists and tuples whose leaves are tensors, numbers, strings or None.

All state and every message is a tree. A tree can be added, scaled, hashed and counted (here), and turned into
bytes and back (:mod:`consilience.core.encode`). Records are NamedTuples registered with :func:`record`, so
that decoding never imports or runs anything that a message names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Tree = Any
"""A leaf (Tensor, bool, int, float, str, None) or a record / dict / list / tuple of trees."""

T = TypeVar("T")

RECORDS: dict[str, type] = {}
"""Registered record types by the name under which they are written."""


def record(cls: type[T]) -> type[T]:
    """Register a NamedTuple class, so that trees with it can be decoded."""
    RECORDS[record_name(cls)] = cls
    return cls


def record_name(cls: type) -> str:
    """The name under which a record type is written."""
    return f"{cls.__module__}:{cls.__qualname__}"


def is_record(tree: Tree) -> bool:
    """Whether ``tree`` is a NamedTuple."""
    return isinstance(tree, tuple) and hasattr(tree, "_fields")


def rebuild(tree: Tree, children: Sequence[Tree]) -> Tree:
    """A node like ``tree`` with other children, in the order of :func:`children_of`."""
    if isinstance(tree, dict):
        return dict(zip(tree, children, strict=True))
    if is_record(tree):
        return type(tree)(*children)
    return type(tree)(children)


def children_of(tree: Tree) -> list[Tree] | None:
    """The children of a node, or None for a leaf."""
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, (tuple, list)):
        return list(tree)
    return None


def keys_of(tree: Tree) -> list[Any]:
    """The keys of a node's children: dict keys, field names or positions."""
    if isinstance(tree, dict):
        return list(tree)
    if is_record(tree):
        return list(tree._fields)
    return list(range(len(tree)))


def leaves(tree: Tree) -> list[Tree]:
    """All leaves, left to right."""
    children = children_of(tree)
    if children is None:
        return [tree]
    return [leaf for child in children for leaf in leaves(child)]


def items(tree: Tree, path: str = "") -> Iterator[tuple[str, Tree]]:
    """All leaves with their dotted paths, left to right."""
    children = children_of(tree)
    if children is None:
        yield path, tree
        return
    for key, child in zip(keys_of(tree), children, strict=True):
        yield from items(child, f"{path}.{key}" if path else str(key))


def tensors(tree: Tree) -> list[Tensor]:
    """All tensor leaves, left to right."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def tree_map(f: Callable[..., Tree], tree: Tree, *rest: Tree) -> Tree:
    """``f`` of every leaf (and of the leaves at the same place of ``rest``)."""
    children = children_of(tree)
    if children is None:
        return f(tree, *rest)
    others = [children_of(other) for other in rest]
    alike = all(other is not None and len(other) == len(children) for other in others)
    if isinstance(tree, dict):  # the same names in the same order, or the wrong leaves would meet
        alike = alike and all(isinstance(other, dict) and list(other) == list(tree) for other in rest)
    if not alike:
        raise ValueError("trees of different structure")
    columns = zip(children, *(other or [] for other in others), strict=True)
    return rebuild(tree, [tree_map(f, *parts) for parts in columns])


def _each(f: Callable[..., Tree]) -> Callable[..., Tree]:
    """Apply to tensors and numbers; leave strings, booleans and None of the first tree as they are."""

    def on_leaf(leaf: Tree, *rest: Tree) -> Tree:
        return f(leaf, *rest) if isinstance(leaf, (Tensor, float, int)) and not isinstance(leaf, bool) else leaf

    return on_leaf


def add(a: Tree, b: Tree) -> Tree:
    """a + b, leaf by leaf."""
    return tree_map(_each(lambda x, y: x + y), a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """a - b, leaf by leaf."""
    return tree_map(_each(lambda x, y: x - y), a, b)


def scale(a: Tree, s: float) -> Tree:
    """s a, leaf by leaf."""
    return tree_map(_each(lambda x: x * s), a)


def axpy(s: float, x: Tree, y: Tree) -> Tree:
    """y + s x, leaf by leaf."""
    return tree_map(_each(lambda b, a: torch.add(b, a, alpha=s) if isinstance(b, Tensor) else b + s * a), y, x)


def zeros_like(a: Tree) -> Tree:
    """The same tree with every number 0."""
    return tree_map(_each(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else type(x)(0)), a)


def clone(a: Tree) -> Tree:
    """A deep copy: contiguous tensors that share nothing, outside any graph."""
    return tree_map(lambda x: _copied(x) if isinstance(x, Tensor) else x, a)


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def floating(leaf: Tree) -> bool:
    """Whether a leaf is a tensor of floating numbers."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def filled(a: Tree, vector: Tensor, chosen: Callable[[Tree], bool] = floating) -> Tree:
    """The tree with the numbers of ``vector`` ``(d,)`` in the place of those of its ``chosen`` tensors, left to right,
    in their shapes and dtypes; other leaves stay. Raises ValueError where they do not hold d numbers."""
    wanted = sum(leaf.numel() for leaf in leaves(a) if chosen(leaf))
    if vector.shape != (wanted,):
        raise ValueError(f"a tree of {wanted} numbers cannot hold a tensor of shape {tuple(vector.shape)}")
    at = 0

    def on(leaf: Tree) -> Tree:
        nonlocal at
        if not chosen(leaf):
            return leaf
        at += leaf.numel()
        return vector[at - leaf.numel() : at].reshape(leaf.shape).to(leaf.dtype)

    return tree_map(on, a)


def dot(a: Tree, b: Tree) -> float:
    """Inner product over all tensors, summed in float64."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return math.fsum(float(torch.dot(x.double().flatten(), y.double().flatten())) for x, y in pairs)


def norm(a: Tree) -> float:
    """Euclidean norm over all tensors, summed in float64."""
    return math.sqrt(dot(a, a))


def nbytes(a: Tree) -> int:
    """Bytes of all tensors, without any framing."""
    return sum(t.numel() * t.element_size() for t in tensors(a))


def digest(*trees: Tree) -> str:
    """SHA-256 of the values: two trees with the same names, dtypes, shapes and bits have the same digest.

    Record types do not count, only their field names, so that two methods with the same state agree.
    """
    h = hashlib.sha256()
    for tree in trees:
        _hash(h, tree)
    return h.hexdigest()


@record
class Elsewhere(NamedTuple):
    """In the place of a tree that is kept where it was made. key: names it there. sha256: its :func:`digest`; empty
    where not even that is told."""

    key: str
    sha256: str


def digest_of(children: Mapping[Any, Tree]) -> str:
    """The digest of these children by key, which are looked at one at a time. Only their own digests count, so that
    it can be made without those that are elsewhere."""
    h = hashlib.sha256()
    for key, child in children.items():
        h.update(f"{key}|{child.sha256 if isinstance(child, Elsewhere) else digest(child)}|".encode())
    return h.hexdigest()


def _hash(h: Any, tree: Tree) -> None:
    """Feed a tree to a hash so that no two trees feed the same bytes: every node says how many children follow."""
    children = children_of(tree)
    if children is not None:
        named = isinstance(tree, dict) or is_record(tree)
        h.update(f"{'{' if named else '['}{len(children)}|".encode())
        for key, child in zip(keys_of(tree), children, strict=True):
            if named:
                h.update(f"{key!r}|".encode())
            _hash(h, child)
    elif isinstance(tree, Tensor):
        flat = tree.detach().cpu().contiguous()
        if flat.numel() < 2:  # counts as contiguous with any stride, and could not be viewed as bytes
            flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
        h.update(f"{flat.dtype}|{tuple(flat.shape)}|".encode())
        h.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    else:
        h.update(f"{type(tree).__name__}|{tree!r}|".encode())
