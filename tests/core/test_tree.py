"""Arithmetic on trees against naive float64, and digests."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.core import tree as tr
from consilience.core.tree import record


@record
class Pair(NamedTuple):
    left: Any
    right: Any


@record
class Twin(NamedTuple):
    left: Any
    right: Any


@record
class Other(NamedTuple):
    left: Any
    wrong: Any


SHAPES = st.sampled_from([(), (0,), (3,), (2, 3)])
SEEDS = st.integers(0, 2**31)


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).normal(size=shape)))


def nodes(children: Any) -> Any:
    keys = st.text("abcxyz", min_size=1, max_size=3)
    return (
        st.dictionaries(keys, children, min_size=1, max_size=3)
        | st.lists(children, min_size=1, max_size=3)
        | st.lists(children, min_size=1, max_size=3).map(tuple)
        | st.builds(Pair, children, children)
    )


TREES = st.recursive(st.builds(normal, SHAPES, SEEDS) | st.floats(-9, 9), nodes, max_leaves=8)
few = settings(max_examples=60, deadline=None)


def another(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return tr.tree_map(lambda x: normal(tuple(x.shape), int(rng.integers(2**31))) if isinstance(x, torch.Tensor) else
                       float(rng.normal()), tree)  # fmt: skip


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, dtype=np.float64) for leaf in tr.leaves(tree)]


@few
@given(TREES, SEEDS, st.floats(-9, 9))
def test_arithmetic_is_leaf_by_leaf(a: Any, seed: int, s: float) -> None:
    b = another(a, seed)
    cases = {
        "add": (tr.add(a, b), [x + y for x, y in zip(arrays(a), arrays(b), strict=True)]),
        "sub": (tr.sub(a, b), [x - y for x, y in zip(arrays(a), arrays(b), strict=True)]),
        "scale": (tr.scale(a, s), [x * s for x in arrays(a)]),
        "axpy": (tr.axpy(s, a, b), [y + s * x for x, y in zip(arrays(a), arrays(b), strict=True)]),
        "zeros": (tr.zeros_like(a), [np.zeros_like(x) for x in arrays(a)]),
    }
    for name, (found, wanted) in cases.items():
        assert [p for p, _ in tr.items(found)] == [p for p, _ in tr.items(a)], name
        for x, y in zip(arrays(found), wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-13, err_msg=name)


@few
@given(TREES, SEEDS)
def test_dot_and_norm_are_over_all_tensors(a: Any, seed: int) -> None:
    b = another(a, seed)
    naive = sum(float((x.numpy() * y.numpy()).sum()) for x, y in zip(tr.tensors(a), tr.tensors(b), strict=True))
    assert tr.dot(a, b) == pytest.approx(naive, rel=1e-12, abs=1e-12)
    assert tr.norm(a) == pytest.approx(np.sqrt(sum(float((x.numpy() ** 2).sum()) for x in tr.tensors(a))), rel=1e-12)


def flat(tree: Any) -> torch.Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(t.flatten() for t in tr.tensors(tree))])


@few
@given(TREES, SEEDS)
def test_a_tree_is_filled_with_the_numbers_of_a_vector(a: Any, seed: int) -> None:
    b, numbers = another(a, seed), flat(a)
    assert tr.digest(tr.filled(a, numbers)) == tr.digest(a)
    found = tr.filled(b, numbers)
    assert torch.equal(flat(found), numbers)
    assert [x for x in tr.leaves(found) if not isinstance(x, torch.Tensor)] == [
        x for x in tr.leaves(b) if not isinstance(x, torch.Tensor)
    ]
    for wrong in (torch.cat([numbers, torch.zeros(1)]), numbers[None]):
        with pytest.raises(ValueError, match="cannot hold"):
            tr.filled(a, wrong)


def test_a_tree_is_filled_in_its_own_shapes_and_dtypes_where_it_is_to_be() -> None:
    like = {"n": torch.tensor([7, 8]), "h": torch.zeros(1, 2, dtype=torch.float16), "s": "x", "i": 3}
    assert tr.digest(tr.filled(like, torch.tensor([1.5, 2.0], dtype=torch.float64))) == tr.digest(
        {**like, "h": torch.tensor([[1.5, 2.0]], dtype=torch.float16)}
    )
    found = tr.filled(like, torch.arange(4.0), lambda leaf: isinstance(leaf, torch.Tensor))
    assert tr.digest(found) == tr.digest({**like, "n": torch.tensor([0, 1]), "h": torch.tensor([[2.0, 3.0]]).half()})


def test_norm_of_half_precision_does_not_overflow() -> None:
    assert tr.norm(torch.full((1000,), 300.0, dtype=torch.float16)) == pytest.approx(300 * 1000**0.5)


def test_strings_booleans_and_none_are_left_alone() -> None:
    tree = {"s": "x", "b": True, "n": None, "i": 3}
    assert tr.add(tree, tree) == {"s": "x", "b": True, "n": None, "i": 6}
    assert tr.zeros_like(tree) == {"s": "x", "b": True, "n": None, "i": 0}


def test_trees_of_different_structure_are_refused() -> None:
    one = torch.ones(1)
    for other in ({"a": one}, {"a": one, "b": [one, one]}, one):
        with pytest.raises(ValueError, match="structure"):
            tr.add({"a": one, "b": [one]}, other)


def test_dicts_are_matched_by_name_not_by_order() -> None:
    a = {"p": torch.tensor([1.0]), "q": torch.tensor([10.0])}
    b = {"q": torch.tensor([20.0]), "p": torch.tensor([2.0])}
    try:
        found = tr.add(a, b)
    except ValueError:
        return  # refusing is as good
    assert float(found["p"]) == 3.0
    assert float(found["q"]) == 30.0


def test_dicts_with_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="structure"):
        tr.add({"p": torch.ones(1)}, {"q": torch.ones(1)})


def test_a_clone_shares_nothing() -> None:
    tree = {"a": torch.ones(2, 3).T.requires_grad_()}
    copy = tr.clone(tree)
    copy["a"].zero_()
    assert float(tree["a"].detach().sum()) == 6
    assert copy["a"].is_contiguous()
    assert not copy["a"].requires_grad


@few
@given(TREES, st.data())
def test_a_digest_changes_with_any_bit_and_with_nothing_else(tree: Any, data: Any) -> None:
    assert tr.digest(tr.clone(tree)) == tr.digest(tree)
    found = [t for t in tr.tensors(tree) if t.numel()]
    if found:
        changed = tr.clone(tree)
        target = [t for t in tr.tensors(changed) if t.numel()][data.draw(st.integers(0, len(found) - 1))]
        raw = target.view(-1).view(torch.uint8)
        raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1
        assert tr.digest(changed) != tr.digest(tree)


def test_a_digest_knows_names_dtypes_and_shapes_but_not_record_classes_or_layout() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    base = tr.digest(Pair(x, 1.0))
    assert tr.digest(Twin(x.T.contiguous().T, 1.0)) == base
    different = [Other(x, 1.0), Pair(x.double(), 1.0), Pair(x.reshape(3, 2), 1.0), Pair(x, 1), Pair(x, None)]
    digests = {tr.digest(tree) for tree in different} | {tr.digest(Pair(1.0, x)), tr.digest(Pair(x, True))}
    assert len(digests) == 7
    assert base not in digests


def test_a_digest_takes_any_strides() -> None:
    for x in (torch.ones(()).expand(1), torch.empty(0, dtype=torch.float64).as_strided((0,), (0,)), torch.ones(3, 1).T):
        assert tr.digest(x) == tr.digest(tr.clone(x))


def test_a_digest_tells_several_trees_apart() -> None:
    assert tr.digest({"a": 1}, {"b": 2}) != tr.digest({"a": 1, "b": 2})


def test_a_digest_knows_where_one_name_ends_and_what_is_empty() -> None:
    trees: list[Any] = [
        {"a.b": 1}, {"a": {"b": 1}}, {"a": 1, "b": {}}, {"a": 1}, {"a": 1, "b": []}, {"a": 1, "b": None},
        {1: 2}, {"1": 2}, [2], [[], 2], [[2]], [2, []], {}, [], None, "", "None", {"a|int|1|b": 2}, {"a": 1, "b": 2},
    ]  # fmt: skip
    assert len({tr.digest(tree) for tree in trees}) == len(trees)
    assert tr.digest((2, [])) == tr.digest([2, ()])
