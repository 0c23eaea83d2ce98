"""Partitions: every row to exactly one client, minimum sizes, determinism, statistics, and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.core.errors import ConfigError, DataError
from consilience.core.streams import philox
from consilience.data import assign
from consilience.data.partition import Partition, make_partition, read_partition, write_partition
from consilience.data.spec import parse

ASSIGNMENTS = [
    "iid",
    "dirichlet:0.05",
    "dirichlet:1",
    "dirichlet:1e-9",
    "dirichlet:0.1:equal",
    "dirichlet:100:equal",
    "dirichlet:0.3+power:1.5",
    "iid+power:2",
    "sizes:0.2",
    "shards:3",
    "shards:2+sizes:0.5",
    "longtail:10+dirichlet:0.5",
    "iid+permute:2+noise:0.1",
]


def labels(rows: int, classes: int, seed: int) -> np.ndarray:
    """Unbalanced labels in which every class occurs."""
    rng = np.random.default_rng(seed)
    y = (rng.random(rows) ** 2 * classes).astype(np.int64)
    y[:classes] = np.arange(classes)
    return rng.permutation(y)


def check(partition: Partition, y: np.ndarray, dropped: bool = False) -> None:
    test = np.empty(0, dtype=np.int64) if partition.test is None else partition.test
    everything = np.concatenate([partition.order, test, partition.public])
    assert len(np.unique(everything)) == len(everything)
    assert dropped or len(everything) == len(y)
    assert partition.bounds[0, 0] == 0
    assert partition.bounds[-1, 3] == len(partition.order)
    assert (partition.bounds[1:, 0] == partition.bounds[:-1, 3]).all()
    assert (np.diff(partition.bounds, axis=1) >= 0).all()
    assert (partition.bounds[:, 1] > partition.bounds[:, 0]).all(), "a client without training rows"


def divide(spec: str, y: np.ndarray, **options: Any) -> Partition | str:
    """The partition, or why there is none."""
    try:
        return make_partition(spec, y, **options)
    except (ConfigError, DataError) as error:
        return str(error)


@settings(deadline=None, max_examples=120)
@given(
    spec=st.sampled_from(ASSIGNMENTS),
    clients=st.integers(2, 40),
    classes=st.integers(3, 6),
    rows=st.integers(150, 400),
    public=st.integers(0, 20),
    test=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 10_000),
)
def test_every_row_to_exactly_one_client(
    spec: str, clients: int, classes: int, rows: int, public: int, test: float, seed: int
) -> None:
    y = labels(rows, classes, seed)
    made = divide(spec, y, clients=clients, seed=seed, public=public, test_fraction=test)
    if isinstance(made, str):
        assert ("shards" in spec and "shards" in made) or ("longtail" in spec and "training rows" in made)
        return
    check(made, y, dropped="longtail" in spec)
    pool = len(made.order)
    sizes = made.bounds[:, 3] - made.bounds[:, 0]
    assert sizes.min() >= min(10, max(1, pool // (2 * clients)))
    again = make_partition(spec, y, clients=clients, seed=seed, public=public, test_fraction=test)
    assert (again.order == made.order).all()
    assert (again.bounds == made.bounds).all()
    assert again.groups == made.groups
    other = divide(spec, y, clients=clients, seed=seed + 1, public=public, test_fraction=test)
    assert isinstance(other, str) or len(other.order) != pool or (other.order != made.order).any()


@settings(deadline=None, max_examples=50)
@given(clients=st.integers(1, 30), minimum=st.integers(1, 9), seed=st.integers(0, 1000))
def test_an_explicit_minimum_is_kept_down_to_the_last_row(clients: int, minimum: int, seed: int) -> None:
    y = (
        labels(clients * minimum + seed % 3, 3, seed)
        if clients * minimum >= 3
        else np.zeros(clients * minimum, np.int64)
    )
    made = make_partition("dirichlet:0.01", y, clients=clients, min_size=minimum, seed=seed)
    assert (made.bounds[:, 3] - made.bounds[:, 0]).min() >= minimum
    with pytest.raises(DataError, match=r"cannot give each|clients but only"):
        make_partition("dirichlet:0.01", y, clients=clients, min_size=len(y) // clients + 1, seed=seed)


def share(made: Partition, y: np.ndarray, client: int) -> np.ndarray:
    rows = np.concatenate(made.client(client))
    return np.bincount(y[rows], minlength=int(y.max()) + 1) / len(rows)


@pytest.mark.parametrize("form", ["", ":equal"])
def test_dirichlet_is_skewed_for_a_small_alpha_and_even_for_a_large_one(form: str) -> None:
    y = np.repeat(np.arange(10), 600)

    def top(alpha: float) -> float:
        made = make_partition(f"dirichlet:{alpha}{form}", y, clients=20, seed=3)
        return float(np.mean([share(made, y, client).max() for client in range(20)]))

    assert top(0.05) > 0.6 > top(1) > 0.2 > top(1000) > 0.09


def test_dirichlet_proportions_have_the_mean_and_variance_of_the_law() -> None:
    draws = assign.dirichlet(philox(0, "test"), 0.5, (20_000, 4))
    assert draws.mean(0) == pytest.approx([0.25] * 4, abs=0.01)
    assert draws.var(0) == pytest.approx([0.25 * 0.75 / 3] * 4, abs=0.005)  # p (1 - p) / (4 alpha + 1)
    tiny = assign.dirichlet(philox(0, "test"), 1e-300, (50, 4))
    assert np.isfinite(tiny).all()
    assert tiny.sum(1) == pytest.approx(np.ones(50))


def test_label_dirichlet_deals_each_class_by_its_own_draw() -> None:
    y = np.repeat(np.arange(50), 1000)
    owner = assign.label_dirichlet(y, 4, 0.5, philox(0, "test"))
    table = np.stack([np.bincount(owner[y == label], minlength=4) for label in range(50)]) / 1000
    assert table.var(0).mean() == pytest.approx(0.25 * 0.75 / 3, rel=0.35)


def test_equal_dirichlet_has_equal_sizes() -> None:
    y = labels(1003, 7, 0)
    made = make_partition("dirichlet:0.1:equal", y, clients=10, seed=0)
    sizes = made.bounds[:, 3] - made.bounds[:, 0]
    assert sizes.max() - sizes.min() <= 1
    check(made, y)


def test_small_equal_clients_come_as_close_to_their_wishes_as_whole_rows_allow() -> None:
    y = np.repeat(np.arange(10), 100)
    made = make_partition("dirichlet:100000:equal", y, clients=100, seed=0)  # everybody wishes one row of each class
    counts = np.array([share(made, y, client) * 10 for client in range(100)])
    assert counts.max() <= 2.001
    assert np.abs(counts - 1).mean() < 0.5


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_shards_give_each_client_exactly_k_classes(k: int) -> None:
    y = np.repeat(np.arange(10), 200)
    made = make_partition(f"shards:{k}", y, clients=20, seed=1)
    assert all(np.count_nonzero(share(made, y, client)) == k for client in range(20))


def test_sizes_follow_the_power_law() -> None:
    y = np.zeros(10_000, dtype=np.int64)
    made = make_partition("power:1", y, clients=5, seed=0)
    sizes = np.sort(made.bounds[:, 3] - made.bounds[:, 0])[::-1]
    assert sizes / sizes[0] == pytest.approx(1 / np.arange(1, 6), abs=1e-3)


def test_a_long_tail_falls_from_the_first_class_to_the_last() -> None:
    y = np.repeat(np.arange(5), 1000)
    made = make_partition("longtail:100", y, clients=3, seed=0, split=(1, 0, 0))
    assert np.bincount(y[made.order]).tolist() == [1000, 316, 100, 31, 10]


def test_each_client_is_split_by_its_own_labels() -> None:
    y = np.repeat(np.arange(4), 500)
    made = make_partition("dirichlet:0.3:equal", y, clients=5, seed=0)
    for client in range(5):
        whole = share(made, y, client)
        train, valid, test = made.client(client)
        assert (len(train), len(valid), len(test)) == (320, 40, 40)
        for part in (train, valid, test):
            assert np.abs(np.bincount(y[part], minlength=4) - whole * len(part)).max() <= 2


def test_small_clients_hold_out_every_label_alike() -> None:
    """A client with one validation row must not always validate on its last label."""
    y = np.tile(np.arange(2), 3000)
    made = make_partition("iid", y, clients=600, seed=0)
    for part in (1, 2):
        held = np.concatenate([made.client(client)[part] for client in range(600)])
        assert 0.4 < y[held].mean() < 0.6


def test_groups_are_even_and_crossed() -> None:
    made = make_partition("rotate:2+permute:4", np.arange(600) % 4, clients=16, seed=0)
    rotate, permute = (made.group_of(part) for part in made.spec.grouped)
    assert np.bincount(rotate).tolist() == [8, 8]
    assert np.bincount(permute).tolist() == [4, 4, 4, 4]
    assert np.unique(np.stack([rotate, permute]), axis=1, return_counts=True)[1].tolist() == [2] * 8


def test_natural_keeps_everybodys_rows() -> None:
    y = np.arange(100) % 2
    owner = np.array(["ulm"] * 60 + ["bonn"] * 37 + ["trier"] * 3)
    made = make_partition("natural:city", y, clients=7, natural={"city": owner}, seed=0)
    assert made.names == ("bonn", "trier", "ulm")
    assert [set(owner[np.concatenate(made.client(client))]) for client in range(3)] == [{"bonn"}, {"trier"}, {"ulm"}]
    check(made, y)


def test_the_smallest_natural_clients_keep_a_row() -> None:
    y = np.arange(400) % 4
    owner = np.concatenate([np.arange(100), np.full(300, 100)])  # a hundred clients with one row each
    made = make_partition(
        "natural:ward+longtail:50", y, clients=1, natural={"ward": owner}, test_fraction=0.4, public=50, seed=0
    )
    check(made, y, dropped=True)
    assert made.clients == 101


@pytest.mark.parametrize("spec", ["dirichlet:0.01", "dirichlet:0.01:equal", "shards:2", "sizes:0.1"])
def test_a_hundred_thousand_rows_over_ten_thousand_clients(spec: str) -> None:
    y = np.random.default_rng(0).integers(0, 10, 100_000)
    made = make_partition(spec, y, clients=10_000, seed=0)
    check(made, y)
    assert made.clients == 10_000


def test_unseen_clients_are_a_fraction_or_a_count() -> None:
    y = np.arange(200) % 2
    assert len(make_partition("iid", y, clients=10, unseen=0.3).unseen) == 3
    assert len(make_partition("iid", y, clients=10, unseen=3).unseen) == 3
    for wrong in (10, 1.0, -1, -0.5):
        with pytest.raises(ConfigError, match="unseen"):
            make_partition("iid", y, clients=10, unseen=wrong)


def test_the_file_reads_back_what_was_written(tmp_path: Path) -> None:
    y = np.arange(300) % 5
    made = make_partition("dirichlet:0.3+permute:2", y, clients=6, seed=4, test_fraction=0.1, public=9, unseen=2)
    path = tmp_path / "partition.json"
    write_partition(path, made, data="mine")
    read = read_partition(path, y)
    assert made.test is not None
    assert read.test is not None
    for name in ("order", "bounds", "public"):
        assert (getattr(read, name) == getattr(made, name)).all(), name
    assert (read.test == made.test).all()
    assert (read.spec, read.seed, read.unseen, read.groups) == (made.spec, 4, made.unseen, made.groups)
    write_partition(tmp_path / "again.json", read, data="mine")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_minimal_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"clients": [{"train": [0, 2]}, {"train": [1], "test": [3]}]}')
    read = read_partition(path, np.zeros(4, dtype=np.int64))
    assert [part.tolist() for part in read.client(1)] == [[1], [], [3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 301}, "is for 301 rows, the data has 300: it is of another data set"),
        ({"labels_sha256": "0"}, "as many rows, other labels"),
        ({"format": 9}, "has format 9; this version reads format 1"),
        ({"clients": []}, "non-empty list 'clients'"),
        ({"clients": [{"train": []}]}, "client 0 has no 'train' rows"),
        ({"clients": [{"train": [0, 300]}]}, "client 0 train has row 300, the data has rows 0 to 299"),
        ({"clients": [{"train": [0.5]}]}, "should be a list of row numbers"),
        ({"clients": [{"train": [1]}, {"train": [2, 1]}]}, "gives row 1 more than once"),
        ({"groups": None}, "'groups' does not fit"),
        ({"groups": [0, 5]}, "'groups' should give each of 6 clients 0 to 1"),
        ({"unseen": [6]}, "'unseen' should list some of the clients 0 to 5"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    y = np.arange(300) % 5
    path = tmp_path / "partition.json"
    write_partition(path, make_partition("permute:2", y, clients=6, unseen=1))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **change, **({"public": []} if "clients" in change else {})}))
    with pytest.raises(DataError, match=message) as caught:
        read_partition(path, y)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json does not exist"):
        read_partition(tmp_path / "nowhere.json", np.zeros(3))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_partition(tmp_path / "broken.json", np.zeros(3))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dirichelt:0.5", "unknown partition 'dirichelt:0.5' .*did you mean 'dirichlet'"),
        ("dirichlet", "should be dirichlet:ALPHA"),
        ("dirichlet:0", "should be dirichlet:ALPHA"),
        ("dirichlet:-1", "ALPHA > 0"),
        ("dirichlet:nan", "ALPHA > 0"),
        ("dirichlet:1:even", "dirichlet:ALPHA:equal"),
        ("dirichlet:1:", "dirichlet:ALPHA:equal"),
        ("iid:3", "should be iid"),
        ("shards:0", "whole number K >= 1"),
        ("shards:1.5", "whole number K >= 1"),
        ("power:-1", "A >= 0"),
        ("sizes:0", "ALPHA > 0"),
        ("noise:x", "standard deviation S >= 0"),
        ("longtail:0.5", "RATIO >= 1"),
        ("natural", "natural:COLUMN"),
        ("iid+", "empty part"),
        ("iid+shards:2", "both 'iid' and 'shards'"),
        ("power:1+sizes:1", "both 'power' and 'sizes'"),
        ("rotate:2+rotate:4", "both 'rotate' and 'rotate'"),
        ("natural:city+power:1", "power cannot resize natural clients"),
        ("dirichlet:1:equal+sizes:1", "exclude each other"),
        ("dirichlet:1+mine.json", "a partition file stands alone"),
    ],
)
def test_a_wrong_specification_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("iid", {"clients": 61}, "61 clients but only 60 training rows; use at most 60 clients"),
        ("iid", {"clients": 0}, "clients 0 should be at least 1"),
        ("iid", {"clients": 7, "min_size": 10}, "use at most 6 clients or a min_size of at most 8"),
        ("iid", {"min_size": 0}, "min_size 0 should be at least 1"),
        ("iid", {"split": (0.8, 0.1)}, "three fractions"),
        ("iid", {"split": (0.8, 0.1, 0.2)}, "sum to 1"),
        ("iid", {"split": (0.0, 0.5, 0.5)}, "train above 0"),
        ("iid", {"public": 60}, "public 60 should be from 0 to below the 60"),
        ("iid", {"test_fraction": 1.0}, "test_fraction 1.0"),
        ("rotate:4", {"clients": 3}, "rotate:4 has more groups than 3 clients"),
        ("shards:7", {}, "more classes than the 6 there are"),
        ("shards:1", {"clients": 3}, "holds at most 3 of 6 classes; use shards:2"),
        ("natural:city", {}, "the data has no columns"),
        ("natural:ctiy", {"natural": {"city": [0] * 60}}, "no column 'ctiy'; did you mean 'city'"),
    ],
)
def test_what_cannot_be_divided_is_refused(spec: str, options: dict[str, object], message: str) -> None:
    arguments = {"clients": 5, **options}
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        make_partition(spec, np.arange(60) % 6, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["dirichlet:1", "shards:2", "permute:2", "longtail:10"])
def test_labels_are_not_asked_of_a_regression(spec: str) -> None:
    with pytest.raises(ConfigError, match="needs class labels and this is a regression task"):
        make_partition(spec, np.linspace(0, 1, 60, dtype=np.float32), clients=3)
