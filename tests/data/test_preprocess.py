"""Federated preprocessing equals the same computation on pooled rows."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.core.errors import DataError
from consilience.data.preprocess import Column, Numbers, Table, apply, client_statistics, merge, table_from_frame


def table(rows: int, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    age = rng.normal(1e6, 3.0, rows)  # a large mean, where sums of squares would cancel
    age[rng.random(rows) < 0.2] = np.nan
    return Table((Column("age", age), Column("town", rng.integers(-1, 4, rows), ("ulm", "bonn", "jena", "trier"))))


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(2, 80), cuts=st.lists(st.integers(0, 80), max_size=6), seed=st.integers(0, 1000))
def test_merged_statistics_are_those_of_the_pooled_rows(rows: int, cuts: list[int], seed: int) -> None:
    whole = table(rows, seed)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    parts = [client_statistics(whole.rows(slice(a, b))) for a, b in itertools.pairwise(edges)]
    merged, pooled = merge(parts), client_statistics(whole)
    age, town = merged.columns["age"], merged.columns["town"]
    assert isinstance(age, Numbers)
    assert not isinstance(town, Numbers)
    present = whole.columns[0].values[~np.isnan(whole.columns[0].values)]
    assert age.count == len(present)
    if len(present):
        assert age.mean == pytest.approx(present.mean(), rel=1e-14)
        assert age.std == pytest.approx(present.std() or 1.0, rel=1e-6)
    assert town == pooled.columns["town"]
    assert merged.features() == pooled.features()
    np.testing.assert_allclose(apply(whole, merged), apply(whole, pooled), atol=1e-5)
    twice = merge([merge(parts[:1]), merge(parts[1:])]) if len(parts) > 1 else merged
    assert twice.columns["town"] == town


def test_inputs_are_scaled_filled_and_one_hot() -> None:
    rows = table_from_frame(
        pd.DataFrame({"n": [1.0, 3.0, None], "c": [7, 7, 7], "w": ["b", "a", None], "t": [True, False, True]}), "here"
    )
    merged = merge([client_statistics(rows.rows([0])), client_statistics(rows.rows([1, 2]))])
    assert merged.features() == ("n", "c", "w=a", "w=b", "t=False", "t=True")
    expected = [[-1, 0, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 1]]  # a tie of words goes to the first
    assert apply(rows, merged).tolist() == expected
    assert apply(rows, merged).dtype == np.float32


def test_a_word_that_nobody_reported_is_all_zeros() -> None:
    seen = Table((Column("w", np.array([0, 0, 1]), ("a", "b")),))
    new = Table((Column("w", np.array([0, 1, -1]), ("new", "b")),))
    assert apply(new, merge([client_statistics(seen)])).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_known_words_are_inputs_wherever_they_occur() -> None:
    column = Column("w", np.array([1, 1]), ("a", "b"), known=True)
    assert client_statistics(Table((column,))).columns["w"] == {"a": 0, "b": 2}


def test_columns_that_differ_are_refused() -> None:
    number, word = Column("a", np.zeros(2)), Column("a", np.zeros(2, dtype=np.int64), ("x",))
    with pytest.raises(DataError, match="statistics of client 1 have columns b"):
        merge([client_statistics(Table((number,))), client_statistics(Table((Column("b", np.zeros(2)),)))])
    with pytest.raises(DataError, match="numbers at one client and words at another"):
        merge([client_statistics(Table((number,))), client_statistics(Table((word,)))])
    with pytest.raises(DataError, match="column 'a' is not what the statistics were made of"):
        apply(Table((word,)), merge([client_statistics(Table((number,)))]))
    with pytest.raises(DataError, match="no statistics to merge"):
        merge([])


def test_frames_that_make_no_table_are_refused() -> None:
    with pytest.raises(DataError, match="column 'a' is infinite at row 1"):
        table_from_frame(pd.DataFrame({"a": [0.0, np.inf]}), "here")
    with pytest.raises(DataError, match="column 'id' has 1001 different words"):
        table_from_frame(pd.DataFrame({"id": [f"p{n}" for n in range(1001)]}), "here")
