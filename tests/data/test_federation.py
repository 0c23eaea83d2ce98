"""Federations in memory and on demand, and what partitions do to features and labels."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from consilience.core.errors import ConfigError, DataError
from consilience.data.federation import (
    ArrayFederation,
    OnDemandFederation,
    from_arrays,
    from_client_files,
    from_file,
    from_huggingface,
    from_torch,
    save_partition,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.random((240, 1, 6, 6), dtype=np.float32)
LABELS = np.arange(240) % 4


def whole(federation: ArrayFederation, client: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A client's inputs, labels and original row ids."""
    a, _, _, d = federation.partition.bounds[client].tolist()
    return federation.rows.x[a:d], federation.rows.y[a:d], federation.partition.order[a:d]


def test_data_are_views_of_one_tensor() -> None:
    federation = from_arrays(IMAGES, LABELS, clients=4)
    data = federation.data(2)
    assert data.train.x.untyped_storage().data_ptr() == federation.rows.x.untyped_storage().data_ptr()
    assert len(data.train) == federation.size(2)
    for client in range(4):
        x, y, rows = whole(federation, client)
        assert (x.numpy() == IMAGES[rows]).all()
        assert (y.numpy() == LABELS[rows]).all()
    assert federation.test is not None
    assert len(federation.test) == 48
    assert federation.task.classes == ("0", "1", "2", "3")
    assert federation.input_shape == (1, 6, 6)


def test_the_fingerprint_tells_partitions_apart() -> None:
    prints = {from_arrays(IMAGES, LABELS, clients=4, seed=seed).fingerprint() for seed in (0, 0, 1)}
    assert len(prints) == 2


@pytest.mark.parametrize("groups", [2, 4])
def test_quarter_turns_are_exact_and_leave_the_global_test_alone(groups: int) -> None:
    plain = from_arrays(IMAGES, LABELS, clients=8)
    turned = from_arrays(IMAGES, LABELS, clients=8, partition=f"rotate:{groups}")
    assert turned.groups is not None
    assert sorted(set(turned.groups)) == list(range(groups))
    for client in range(8):
        x, y, rows = whole(turned, client)
        expected = torch.rot90(torch.from_numpy(IMAGES[rows]), turned.groups[client] * 4 // groups, (-2, -1))
        assert torch.equal(x, expected)
        assert (y.numpy() == LABELS[rows]).all()
    assert plain.test is not None
    assert turned.test is not None
    assert torch.equal(plain.test.x, turned.test.x)


def test_other_angles_turn_the_same_way() -> None:
    """Three turns by 120 degrees bring a smooth image back; one turn agrees in sense with rot90."""
    image = np.zeros((1, 1, 21, 21), dtype=np.float32)
    image[..., 8:13, 13:17] = 1.0  # right of the middle
    federation = from_arrays(np.repeat(image, 60, 0), np.arange(60) % 2, clients=3, partition="rotate:3")
    assert federation.groups is not None
    x, _, _ = whole(federation, federation.groups.index(1))
    weight = x[0, 0] / x[0, 0].sum()
    row, column = float(weight.sum(1) @ torch.arange(21.0)), float(weight.sum(0) @ torch.arange(21.0))
    quarter = torch.rot90(torch.from_numpy(image), 1, (-2, -1))[0, 0]
    assert quarter.argmax() // 21 < 10, "a quarter turn moves it up"
    radius = 14.5 - 10
    assert row - 10 == pytest.approx(-radius * np.sin(np.radians(120)), abs=0.3)
    assert column - 10 == pytest.approx(radius * np.cos(np.radians(120)), abs=0.3)


def test_labels_are_permuted_by_group() -> None:
    federation = from_arrays(IMAGES, LABELS, clients=6, partition="permute:3")
    assert federation.groups is not None
    maps: dict[int, set[tuple[int, int]]] = {}
    for client in range(6):
        x, y, rows = whole(federation, client)
        assert (x.numpy() == IMAGES[rows]).all()
        maps.setdefault(federation.groups[client], set()).update(zip(LABELS[rows].tolist(), y.tolist(), strict=True))
    assert maps[0] == {(label, label) for label in range(4)}
    assert all(len(pairs) == 4 and len({b for _, b in pairs}) == 4 for pairs in maps.values())
    assert not maps[0] & maps[1]
    assert not maps[1] & maps[2]
    assert not maps[0] & maps[2]


def test_noise_grows_with_the_client() -> None:
    federation = from_arrays(
        np.zeros((3000, 20), dtype=np.float32), np.arange(3000) % 2, clients=3, partition="noise:2"
    )
    deviations = [float(whole(federation, client)[0].std()) for client in range(3)]
    assert deviations == pytest.approx([0, 1, 2], abs=0.05)
    assert federation.test is not None
    assert not federation.test.x.any()


def test_brightness_and_blur_leave_group_zero_and_change_the_last_most() -> None:
    bright = from_arrays(np.ones_like(IMAGES), LABELS, clients=6, partition="brightness:3")
    assert bright.groups is not None
    means = {bright.groups[client]: float(whole(bright, client)[0].mean()) for client in range(6)}
    assert means == pytest.approx({0: 1.0, 1: 0.625, 2: 0.25})
    blurred = from_arrays(RNG.random((200, 1, 28, 28)), np.arange(200) % 2, clients=4, partition="blur:2")
    assert blurred.groups is not None
    spread = {blurred.groups[client]: float(whole(blurred, client)[0].std()) for client in range(4)}
    assert spread[1] < spread[0] / 3


@pytest.mark.parametrize("spec", ["rotate:2", "brightness:2", "blur:2"])
def test_image_shifts_are_refused_for_tables(spec: str) -> None:
    with pytest.raises(ConfigError, match=f"{spec[:-2]} needs images"):
        from_arrays(IMAGES.reshape(240, -1), LABELS, clients=4, partition=spec)


def test_more_label_permutations_than_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="permute:5 needs at most one group per class, 4"):
        from_arrays(IMAGES, LABELS, clients=5, partition="permute:5")


def test_public_rows_are_nobodys_and_sensitive_codes_follow_rows() -> None:
    sex = np.where(np.arange(240) % 3 == 0, "f", "m")
    federation = from_arrays(IMAGES, LABELS, clients=4, public=30, unseen=0.25, sensitive={"sex": sex})
    assert federation.public is not None
    assert federation.public.shape == (30, 1, 6, 6)
    assert len(federation.unseen) == 1
    assert federation.task.sensitive == ("sex",)
    assert federation.about["sensitive"] == {"sex": ["f", "m"]}
    for client in range(4):
        a, _, _, d = federation.partition.bounds[client].tolist()
        assert federation.rows.sensitive is not None
        rows = federation.partition.order[a:d]
        assert (federation.rows.sensitive[a:d, 0].numpy() == (sex[rows] == "m")).all()


def test_a_saved_partition_makes_the_same_federation(tmp_path: Path) -> None:
    made = from_arrays(
        IMAGES, LABELS, clients=6, partition="dirichlet:0.5+rotate:2+permute:2+noise:0.1", public=5, seed=3
    )
    save_partition(tmp_path / "partition.json", made)
    again = from_arrays(IMAGES, LABELS, partition=str(tmp_path / "partition.json"))
    assert again.fingerprint() == made.fingerprint()
    assert torch.equal(again.rows.x, made.rows.x)
    assert made.test is not None
    assert again.test is not None
    assert torch.equal(made.test.x, again.test.x)
    assert again.groups == made.groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.full((240, 2), np.nan)}, "inputs have nan at row 0, position 0"),
        ({"x": np.where(np.arange(480).reshape(240, 2) == 7, np.inf, 0.0)}, "inputs have inf at row 3, position 1"),
        ({"x": IMAGES[:9]}, "9 rows of inputs but 240 of labels"),
        ({"x": np.zeros(240)}, "array of numbers"),
        ({"x": np.full((240, 2), "a")}, "array of numbers"),
        ({"y": LABELS + 0.5}, "label 0.5 at row 0 should be a whole number from 0"),
        ({"y": LABELS - 1}, "label -1 at row 0 should be a whole number from 0"),
        ({"y": np.where(LABELS == 3, np.nan, 0.0)}, "label nan at row 3"),
        ({"classes": ("a", "b", "c")}, "label 3 at row 3 should be a whole number from 0 to 2"),
        ({"y": np.full(240, np.inf), "task": "regression"}, "target at row 0 is inf"),
        ({"task": "ranking"}, "task 'ranking'"),
        ({"test": (np.zeros((5, 2)), np.zeros(5))}, "in training and .* in test"),
        ({"test": (IMAGES[:5], LABELS[:5]), "test_fraction": 0.1}, "brings its own test set"),
        ({"columns": {"city": [1, 2]}}, "column 'city' has shape"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "there are no rows"),
        ({"sensitive": {"age": np.arange(240)}}, "sensitive column 'age' has 240 different values"),
    ],
)
def test_wrong_arrays_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        from_arrays(**{"x": IMAGES, "y": LABELS, "clients": 4, **change})
    assert "\n" not in str(caught.value)


def test_bytes_are_scaled_and_regressions_keep_their_targets() -> None:
    federation = from_arrays(np.full((60, 3), 255, dtype=np.uint8), np.linspace(0, 1, 60), clients=2, task="regression")
    assert federation.rows.x.unique().tolist() == [1.0]
    assert federation.task.kind == "regression"
    assert federation.rows.y.dtype == torch.float32


class Pairs(torch.utils.data.Dataset[Any]):
    """A map-style dataset of images with channels last, as PIL would give them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return np.full((4, 5, 3), index, dtype=np.uint8), index % 2


def test_torch_datasets() -> None:
    assert from_torch(Pairs(), clients=2).input_shape == (3, 4, 5)
    tensors = torch.utils.data.TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS))
    federation = from_torch(tensors, clients=2, test=tensors)
    assert federation.test is not None
    assert len(federation.test) == 240
    with pytest.raises(DataError, match="map-style"):
        from_torch(iter(()), clients=2)


class Columns:
    """The least that counts as a Hugging Face dataset."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


def test_hugging_face_columns() -> None:
    federation = from_huggingface(Columns(image=list(IMAGES), label=LABELS.tolist()), clients=3)
    assert federation.input_shape == (1, 6, 6)
    rows = Columns(age=list(range(60)), town=["ulm", "bonn"] * 30, site=[0, 1, 2] * 20, label=["no", "yes"] * 30)
    table = from_huggingface({"train": rows, "test": rows}, natural=["site"], partition="natural:site")
    assert table.n_clients == 3
    assert table.input_shape == (3,)
    assert table.task.classes == ("no", "yes")
    assert table.test is not None
    assert len(table.test) == 60
    with pytest.raises(DataError, match="no column 'label' among"):
        from_huggingface(Columns(image=list(IMAGES)), clients=3)
    with pytest.raises(DataError, match="column_names"):
        from_huggingface([1, 2], clients=3)


def test_hugging_face_datasets_themselves() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"x": datasets.Sequence(datasets.Value("float32")), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = datasets.Dataset.from_dict(
        {"x": [[float(n), 1.0] for n in range(50)], "label": [0, 1] * 25}, features=features
    )
    federation = from_huggingface(rows, clients=2)
    assert federation.input_shape == (2,)
    assert federation.task.classes == ("a", "b")


def frame(rows: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": rng.integers(20, 80, rows),
            "town": rng.choice(["ulm", "bonn"], rows),
            "sick": rng.choice(["no", "yes"], rows),
        }
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_becomes_a_federation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"all.{suffix}"
    frame(80, 0).to_csv(path, index=False) if suffix == "csv" else frame(80, 0).to_parquet(path)
    federation = from_file(path, clients=4)
    assert federation.task.classes == ("no", "yes")
    assert federation.input_shape == (3,)
    assert federation.about["features"] == ["age", "town=bonn", "town=ulm"]
    by_town = from_file(path, target="sick", partition="natural:town", sensitive=("town",))
    assert by_town.names == ("bonn", "ulm")
    assert by_town.input_shape == (1,)
    assert by_town.task.sensitive == ("town",)


def test_arrays_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "all.npz"
    np.savez(path, x=IMAGES, y=LABELS, x_test=IMAGES[:7], y_test=LABELS[:7], ward=LABELS % 2)
    federation = from_file(path, partition="natural:ward")
    assert federation.n_clients == 2
    assert federation.test is not None
    assert len(federation.test) == 7


def test_a_file_per_client(tmp_path: Path) -> None:
    for name, rows in (("ulm", 50), ("bonn", 30), ("jena", 3)):
        frame(rows, rows).to_csv(tmp_path / f"{name}.csv", index=False)
    federation = from_client_files(tmp_path, test_fraction=0.0)
    assert federation.names == ("bonn", "jena", "ulm")
    assert [federation.label(0), federation.size(1)] == ["bonn", 3]
    both = from_client_files([tmp_path / "ulm.csv", tmp_path / "bonn.csv"], split=(0.5, 0.25, 0.25), test_fraction=0.0)
    assert both.names == ("ulm", "bonn")
    assert [both.size(0), both.size(1)] == [24, 14]
    np.savez(tmp_path / "a.npz", x=IMAGES[:50], y=LABELS[:50])
    np.savez(tmp_path / "b.npz", x=IMAGES[50:], y=LABELS[50:])
    assert from_client_files([tmp_path / "a.npz", tmp_path / "b.npz"]).n_clients == 2


def refused(message: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_refused_in_one_line(tmp_path: Path) -> None:
    refused(r"nowhere\.csv does not exist", from_file, tmp_path / "nowhere.csv")
    refused("does not exist", from_client_files, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(r"has no \.csv", from_client_files, tmp_path / "empty")
    (tmp_path / "void.csv").write_text("")
    refused("cannot be read", from_file, tmp_path / "void.csv")
    (tmp_path / "header.csv").write_text("a,b\n")
    refused(r"header\.csv has no rows", from_file, tmp_path / "header.csv")
    (tmp_path / "a.csv").write_text("a,y\n1,0\n2,1\n3,\n")
    refused("target 'y' is missing at row 2", from_file, tmp_path / "a.csv")
    refused("no target column 'why'", from_file, tmp_path / "a.csv", target="why")
    (tmp_path / "one.csv").write_text("a,y\n1,0\n2,0\n")
    refused("every label is 0", from_file, tmp_path / "one.csv")
    (tmp_path / "text.txt").write_text("a")
    refused(r"should be one of \.csv", from_file, tmp_path / "text.txt")
    (tmp_path / "bad.parquet").write_text("a")
    refused("cannot be read", from_file, tmp_path / "bad.parquet")
    (tmp_path / "bad.npz").write_text("a")
    refused("cannot be read", from_file, tmp_path / "bad.npz")
    np.savez(tmp_path / "half.npz", x=IMAGES)
    refused("has no array 'y'; it has x", from_file, tmp_path / "half.npz")
    (tmp_path / "ok.csv").write_text("a,b,y\n1,u,0\n2,v,1\n")
    (tmp_path / "less.csv").write_text("a,y\n1,0\n2,1\n")
    refused("no column 'b'", from_client_files, [tmp_path / "ok.csv", tmp_path / "less.csv"])
    (tmp_path / "kind.csv").write_text("a,b,y\n1,2,0\n2,3,1\n")
    refused(
        "column 'b' holds numbers, in .* it holds words",
        from_client_files,
        [tmp_path / "ok.csv", tmp_path / "kind.csv"],
    )
    refused("mix npz", from_client_files, [tmp_path / "ok.csv", tmp_path / "half.npz"])
    refused(r"header\.csv has no rows", from_client_files, [tmp_path / "ok.csv", tmp_path / "header.csv"])
    refused("no client files", from_client_files, [])


def test_the_remembered_clients_are_few_and_not_pickled() -> None:
    made: list[int] = []
    plain = from_arrays(IMAGES, LABELS, clients=4)

    def make(client: int) -> Any:
        made.append(client)
        return plain.data(client % 4)

    federation = OnDemandFederation(
        name="lazy", task=plain.task, n_clients=10**6, input_shape=(1, 6, 6), make=make, sizes=lambda _: 38, keep=2
    )
    for client in (5, 5, 6, 7, 5):
        federation.data(client)
    assert made == [5, 6, 7, 5]
    assert len(federation._kept) == 2
    with pytest.raises(DataError, match="client 1000000 does not exist"):
        federation.data(10**6)
    federation.make, federation.sizes = plain.data, plain.size
    assert not pickle.loads(pickle.dumps(federation))._kept


def test_what_makes_federations_is_found_where_one_looks() -> None:
    import consilience

    for name in consilience.data.__all__:
        assert callable(getattr(consilience.data, name)), name
    assert consilience.data.from_arrays is from_arrays
    with pytest.raises(AttributeError, match="nothing"):
        _ = consilience.data.nothing
