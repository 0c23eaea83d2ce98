"""No vector is longer than its bound, whatever it holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilience.core.errors import ConfigError
from consilience.privacy.clip import Clip, clipped, parse

SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 0, 3), (4, 2)])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def vectors(draw: st.DrawFn) -> list[Tensor]:
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        shape, dtype = draw(SHAPES), draw(DTYPES)
        size = math.prod(shape)
        values = draw(st.lists(st.floats(width=64), min_size=size, max_size=size))
        parts.append(torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype))
    return parts


def length(vector: list[Tensor]) -> float:
    """Independent of the code under test: exact sum of squares."""
    return math.sqrt(math.fsum(v * v for part in vector for v in part.double().flatten().tolist()))


@settings(max_examples=300, deadline=None)
@given(vectors(), st.sampled_from(["flat", "layers", "dim", "normalise", "adaptive"]), st.floats(1e-6, 1e6))
def test_the_bound_holds(vector: list[Tensor], kind: str, norm: float) -> None:
    found, _ = clipped(vector, Clip(kind, norm))  # type: ignore[arg-type]
    assert [part.shape for part in found] == [part.shape for part in vector]
    assert all(bool(torch.isfinite(part).all()) for part in found)
    assert length(found) <= norm


def test_a_nan_anywhere_is_nothing() -> None:
    for vector in ([torch.tensor(1.0), torch.tensor(math.nan)], [torch.tensor(math.nan), torch.tensor(1.0)]):
        found, within = clipped(vector, Clip("flat", 1.0))
        assert length(found) == 0
        assert not within


def test_what_each_kind_does() -> None:
    vector = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    flat, within = clipped(vector, Clip("flat", 1.0))
    assert not within
    torch.testing.assert_close(torch.cat([p.flatten() for p in flat]), torch.tensor([0.6, 0.0, 0.8]).double())
    same, within = clipped(vector, Clip("flat", 6.0))
    assert within
    assert all(torch.equal(a, b.double()) for a, b in zip(same, vector, strict=True))
    layers, _ = clipped(vector, Clip("layers", math.sqrt(2)))
    assert [length([part]) for part in layers] == pytest.approx([1, 1])
    dim, _ = clipped(vector, Clip("dim", math.sqrt(3)))
    assert [length([part]) for part in dim] == pytest.approx([math.sqrt(2), 1])
    small = [torch.tensor([0.01]), torch.tensor([9.0]), torch.zeros(2)]
    up, _ = clipped(small, Clip("normalise", math.sqrt(3)))
    assert [length([part]) for part in up] == pytest.approx([1, 1, 0])  # the small one is scaled up
    left, _ = clipped(small, Clip("normalise", 10.0))
    assert all(torch.equal(a, b.double()) for a, b in zip(left, small, strict=True))
    one = [torch.tensor([3.0, 4.0])]
    alike = [clipped(one, parse(text))[0][0] for text in ("1", "layers:1", "dim:1", "normalise:1")]
    assert all(torch.allclose(alike[0], other) for other in alike)


def test_parsing() -> None:
    assert parse("2") == Clip("flat", 2.0)
    assert parse("dim:0.1") == Clip("dim", 0.1)
    assert parse("adaptive:0.5:3") == Clip("adaptive", 3.0, 0.5)
    for wrong in ("0", "nan", "layer:1", "layers", "dim:1:2", "adaptive:1.5", "adaptive:0.5:inf", "x"):
        with pytest.raises(ConfigError, match="--dp-clip"):
            parse(wrong)
