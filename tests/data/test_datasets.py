"""Data sets by name, and the federations the command line asks for."""

from __future__ import annotations

import gzip
import pickle
import struct
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilience.core.errors import ConfigError, DataError
from consilience.data import datasets
from consilience.data.datasets import load, make_federation
from consilience.data.federation import ArrayFederation, OnDemandFederation, save_partition
from consilience.data.synthetic import SyntheticClients


def test_digits() -> None:
    federation = make_federation("digits", clients=10, partition="dirichlet:0.1")
    assert federation.input_shape == (1, 8, 8)
    assert federation.task.outputs == 10
    assert federation.test is not None
    assert len(federation.test) == 359
    x = federation.data(0).train.x
    assert x.dtype == torch.float32
    assert float(x.min()) == 0
    assert float(x.max()) == 1
    other = make_federation("digits", seed=5).test
    assert other is not None
    assert torch.equal(other.x, federation.test.x), "the test set does not depend on the seed"
    counts = np.bincount(federation.test.y)
    assert counts.max() - counts.min() <= 3


def test_adult_has_sensitive_attributes() -> None:
    federation = make_federation("adult", clients=10, unseen=2, public=100)
    assert isinstance(federation, ArrayFederation)
    assert federation.task.sensitive == ("sex", "race")
    assert federation.task.classes == ("<=50K", ">50K")
    assert federation.about["sensitive"]["sex"] == ["Female", "Male"]
    assert federation.test is not None
    assert federation.test.sensitive is not None
    assert len(federation.test) == 16281
    assert len(federation.rows) + 100 == 32561
    assert federation.input_shape == (105,)
    female = federation.about["features"].index("sex=Female")
    rows = federation.rows
    assert rows.sensitive is not None
    assert torch.equal(rows.x[:, female] == 1, rows.sensitive[:, 0] == 0)
    assert federation.test.y.float().mean() == pytest.approx(3846 / 16281)  # the published share above 50K
    train = torch.cat([federation.data(int(client)).train.x for client in federation.seen])
    assert float(train[:, 0].mean()) == pytest.approx(0, abs=1e-4)
    assert float(train[:, 0].std()) == pytest.approx(1, abs=1e-3)
    by_race = make_federation("adult", partition="natural:race", sensitive=("sex",))
    assert by_race.n_clients == 5
    assert by_race.task.sensitive == ("sex",)
    assert by_race.input_shape == (100,)
    with pytest.raises(DataError, match="no column 'sxe' to be sensitive; did you mean 'sex'"):
        make_federation("adult", sensitive=("sxe",))


def write_idx(folder: Path, name: str, array: np.ndarray, packed: bool = True) -> None:
    body = (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )
    (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(body) if packed else body)


def idx_folder(folder: Path) -> Path:
    folder.mkdir()
    for part, rows in (("train", 60), ("t10k", 20)):
        write_idx(folder, f"{part}-images-idx3-ubyte", np.full((rows, 28, 28), 51))
        write_idx(folder, f"{part}-labels-idx1-ubyte", np.arange(rows) % 10, packed=part == "train")
    return folder


def test_fashion_mnist_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = idx_folder(tmp_path / "idx")
    federation = make_federation(f"fashion-mnist:{folder}", clients=3)
    assert federation.input_shape == (1, 28, 28)
    assert federation.task.classes[9] == "Ankle boot"
    assert federation.test is not None
    assert len(federation.test) == 20
    assert federation.test.x.unique().tolist() == pytest.approx([0.2])
    monkeypatch.setenv(datasets.FASHION_VARIABLE, str(folder))
    assert len(load("fashion-mnist").y) == 60


def test_a_wrong_fashion_mnist_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder nowhere does not exist"):
        load("fashion-mnist:nowhere")
    folder = idx_folder(tmp_path / "idx")
    write_idx(folder, "train-labels-idx1-ubyte", np.full(60, 10))
    with pytest.raises(DataError, match="train has label 10"):
        load(f"fashion-mnist:{folder}")
    write_idx(folder, "train-labels-idx1-ubyte", np.zeros(59))
    with pytest.raises(DataError, match="one label an image"):
        load(f"fashion-mnist:{folder}")
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x09a")
    with pytest.raises(DataError, match="has 1 bytes, its header says 9"):
        load(f"fashion-mnist:{folder}")
    (folder / "train-labels-idx1-ubyte").write_bytes(b"what is this")
    with pytest.raises(DataError, match="is not an idx file"):
        load(f"fashion-mnist:{folder}")
    (folder / "train-labels-idx1-ubyte").unlink()
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte \(or \.gz\) does not exist"):
        load(f"fashion-mnist:{folder}")


@pytest.mark.skipif(not datasets.FASHION_DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(datasets.FASHION_VARIABLE, raising=False)
    raw = load("fashion-mnist")
    assert np.bincount(raw.y).tolist() == [6000] * 10
    assert raw.test_y is not None
    assert len(raw.test_y) == 10_000


def test_fashion_mnist_is_fetched_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(datasets.FASHION_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "FASHION_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fail(url: str, timeout: float) -> Any:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(DataError, match=r"cannot be fetched \(no network\); apt install") as caught:
        load("fashion-mnist")
    assert "\n" not in str(caught.value)
    folder = idx_folder(tmp_path / "idx")

    def serve(url: str, timeout: float) -> Any:
        return (folder / url.rsplit("/", 1)[1]).open("rb")

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    with pytest.raises(DataError, match="is not the file that was published"):
        load("fashion-mnist")
    assert not (tmp_path / "cache").exists()


def test_synthetic_keeps_its_clients_and_their_sizes() -> None:
    federation = make_federation("synthetic:0.5:0.5", clients=12, seed=2)
    assert isinstance(federation, ArrayFederation)
    source = SyntheticClients(2, 0.5, 0.5)
    sizes = federation.partition.bounds[:, 3] - federation.partition.bounds[:, 0]
    assert sizes.tolist() == [source.rows(client) for client in range(12)]
    x, y = source.draw(3, int(sizes[3]))
    rows = federation.partition.order[slice(*federation.partition.bounds[3, [0, 3]])] - int(sizes[:3].sum())
    data = federation.data(3)
    assert (torch.cat([data.train.x, data.valid.x, data.test.x]).numpy() == x[rows]).all()
    assert (torch.cat([data.train.y, data.valid.y, data.test.y]).numpy() == y[rows]).all()
    fewer = make_federation("synthetic:0.5:0.5", clients=2, seed=2)
    assert isinstance(fewer, ArrayFederation)
    one, same = (f.rows.x[slice(*f.partition.bounds[1, [0, 3]])] for f in (fewer, federation))
    assert torch.equal(one.sort(0)[0], same.sort(0)[0]), "a client does not depend on how many there are"
    pooled = make_federation("synthetic:0.5:0.5", clients=12, seed=2, partition="dirichlet:1:equal")
    assert max(pooled.size(c) for c in range(12)) - min(pooled.size(c) for c in range(12)) <= 1


def test_synthetic_follows_its_law() -> None:
    source = SyntheticClients(0, 1.0, 2.0)
    sizes = np.array([source.rows(client) for client in range(3000)])
    assert sizes.min() >= 50
    logs = np.log(sizes - 49.5)
    assert np.median(logs) == pytest.approx(4, abs=0.15)
    assert np.percentile(logs, 84.13) - np.median(logs) == pytest.approx(2, abs=0.2)
    x = source.draw(0, 20_000)[0]
    assert x.var(0) == pytest.approx(np.arange(1, 61) ** -1.2, rel=0.1)
    centres = np.array([source.draw(client, 200)[0].mean() for client in range(400)])
    assert centres.std() == pytest.approx(2, rel=0.15)


def test_a_million_clients_on_demand(tmp_path: Path) -> None:
    federation = make_federation("synthetic-ondemand:1:1", clients=1_000_000, unseen=0.01, public=7)
    assert isinstance(federation, OnDemandFederation)
    data = federation.data(999_999)
    assert len(data.train) == federation.size(999_999)
    assert data.train.x.shape[1:] == federation.input_shape
    assert len(federation.unseen) == 10_000
    assert federation.public is not None
    assert len(federation.public) == 7
    assert torch.equal(pickle.loads(pickle.dumps(federation)).data(999_999).train.x, data.train.x)
    save_partition(tmp_path / "partition.json", federation)
    again = make_federation("synthetic-ondemand:1:1", partition=str(tmp_path / "partition.json"))
    assert again.n_clients == 1_000_000
    assert again.unseen == federation.unseen
    with pytest.raises(DataError, match="is of another data set"):
        make_federation("synthetic-ondemand:2:1", partition=str(tmp_path / "partition.json"))


def test_the_quadratics_optimum_is_stationary() -> None:
    federation = make_federation("quadratic:2", clients=8, unseen=1, seed=1)
    optimum = federation.about["optimum"]
    model = torch.nn.Linear(10, 1).double()
    model.load_state_dict(
        {"weight": torch.tensor(optimum["weight"]).double(), "bias": torch.tensor(optimum["bias"]).double()}
    )

    def gradient(clients: list[int]) -> torch.Tensor:
        train = [federation.data(client).train for client in clients]
        model.zero_grad()
        x, y = torch.cat([t.x for t in train]).double(), torch.cat([t.y for t in train]).double()
        loss = federation.task.loss(model(x), y)
        loss.backward()
        assert len(clients) == 1 or float(loss.detach()) == pytest.approx(optimum["loss"], rel=1e-5)
        assert model.weight.grad is not None
        assert model.bias.grad is not None
        return torch.cat([model.weight.grad.flatten(), model.bias.grad])

    seen = federation.seen.tolist()
    assert float(gradient(seen).abs().max()) < 1e-5
    assert min(float(gradient([client]).abs().max()) for client in seen) > 0.1, "no client shares the optimum"


def test_a_path_is_data_too(tmp_path: Path) -> None:
    text = "age,town,sick\n" + "".join(f"{20 + n},{'ulm' if n % 3 else 'bonn'},{n % 2}\n" for n in range(60))
    (tmp_path / "all.csv").write_text(text)
    federation = make_federation(str(tmp_path / "all.csv"), clients=3, sensitive=("town",))
    assert federation.n_clients == 3
    assert federation.task.sensitive == ("town",)
    sites = tmp_path / "sites"
    sites.mkdir()
    for name in ("a", "b"):
        (sites / f"{name}.csv").write_text(text)
    assert make_federation(str(sites)).names == ("a", "b")
    assert make_federation(str(sites), clients=5, partition="dirichlet:1").n_clients == 5


def test_a_run_can_be_made_again_from_its_partition(tmp_path: Path) -> None:
    made = make_federation("adult", clients=4, partition="dirichlet:0.5", unseen=1, seed=3)
    save_partition(tmp_path / "partition.json", made)
    again = make_federation("adult", partition=str(tmp_path / "partition.json"))
    assert again.fingerprint() == made.fingerprint()
    with pytest.raises(DataError, match="it is of another data set"):
        make_federation("digits", partition=str(tmp_path / "partition.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "digit"}, "unknown data 'digit'; did you mean 'digits'"),
        ({"data": "no/such"}, "no such file or folder"),
        ({"data": "nowhere.csv"}, r"file nowhere\.csv does not exist"),
        ({"data": "digits:3"}, "should be just 'digits'"),
        ({"data": "synthetic:1"}, "should be synthetic:ALPHA:BETA"),
        ({"data": "synthetic:1:-1"}, "should be synthetic:ALPHA:BETA"),
        ({"data": "quadratic:x"}, "should be quadratic:SPREAD"),
        ({"data": "quadratic", "partition": "dirichlet:1"}, "dirichlet needs class labels"),
        ({"data": "quadratic", "clients": 0}, "clients 0 should be at least 1"),
        ({"data": "synthetic-ondemand", "partition": "shards:2"}, "makes its own clients"),
        ({"data": "digits", "clients": 2000}, "2000 clients but only 1438 training rows"),
        ({"data": "digits", "partition": "nowhere.json"}, r"nowhere\.json does not exist"),
        ({"data": "digits", "partition": "blub:2"}, "unknown partition 'blub:2'"),
        ({"data": "digits", "split": (0.5, 0.1, 0.1)}, "sum to 1"),
        ({"data": "digits", "sensitive": ("sex",)}, "the data has no named columns"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        make_federation(**options)
    assert "\n" not in str(caught.value)
