"""Data sets by name or path, and the federations that the command line makes of them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import struct
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.core.errors import ConfigError, DataError, nearest
from consilience.core.federation import Federation, Task
from consilience.core.streams import philox
from consilience.data import assign
from consilience.data.federation import build
from consilience.data.partition import fractions, read_on_demand
from consilience.data.preprocess import Column, Table
from consilience.data.raw import RawData
from consilience.data.read import SUFFIXES, read_client_files, read_file
from consilience.data.spec import NAMES, is_file, parse

FASHION_VARIABLE = "CONSILIENCE_FASHION_MNIST"
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_SOURCE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
# SHA-256 of the uncompressed files, which no recompression changes
FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def load(name_or_path: str, *, seed: int = 0, clients: int = 10, **options: Any) -> RawData:
    """A data set by name, or a user's file or folder of client files.

    Names: ``digits``, ``fashion-mnist[:FOLDER]``, ``adult``, ``synthetic[:ALPHA:BETA]``, ``quadratic[:SPREAD]``,
    ``bilinear[:MU:SPREAD]`` (the last three are drawn for ``clients`` from ``seed``; the others are always the same).
    ``options`` (target, task, sensitive) are for files, see :func:`~consilience.data.read.read_file`.
    """
    name, _, rest = name_or_path.partition(":")
    if name in NAMES:
        if options:
            raise ConfigError(f"data '{name}' takes no option '{next(iter(options))}'; it is for files")
        return _by_name(name, rest, name_or_path, seed, clients)
    path = Path(name_or_path)
    if name_or_path and path.is_dir():
        return read_client_files(path, **options)
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        return read_file(path, **options)
    if os.sep in name_or_path:
        raise DataError(f"data '{name_or_path}': no such file or folder")
    raise ConfigError(f"unknown data '{name_or_path}'{nearest(name, NAMES)} (or the path of a file or folder)")


def _by_name(name: str, rest: str, text: str, seed: int, clients: int) -> RawData:
    from consilience.data import games, synthetic

    if name in ("synthetic", "quadratic", "bilinear") and clients < 1:
        raise ConfigError(f"clients {clients} should be at least 1")
    if name == "synthetic":
        alpha, beta = synthetic.numbers(name, rest, "synthetic:ALPHA:BETA, both 0 or more", (1.0, 1.0))
        return synthetic.synthetic(text, clients=clients, seed=seed, alpha=alpha, beta=beta)
    if name == "quadratic":
        (spread,) = synthetic.numbers(name, rest, "quadratic:SPREAD, 0 or more", (1.0,))
        return synthetic.quadratic(text, clients=clients, seed=seed, spread=spread)
    if name == "bilinear":
        mu, spread = synthetic.numbers(name, rest, "bilinear:MU:SPREAD, both 0 or more", (0.1, 1.0))
        return games.bilinear(text, clients=clients, seed=seed, mu=mu, spread=spread)
    if name == "synthetic-ondemand":
        raise ConfigError("data 'synthetic-ondemand' exists only as a federation; use make_federation, or synthetic")
    if name == "fashion-mnist":
        return fashion_mnist(rest or None)
    if rest:
        raise ConfigError(f"data '{text}' should be just '{name}'")
    return digits() if name == "digits" else adult()


def make_federation(
    data: str,
    *,
    clients: int = 10,
    partition: str = "iid",
    split: Sequence[float] = (0.8, 0.1, 0.1),
    public: int = 0,
    unseen: float = 0,
    sensitive: Sequence[str] = (),
    seed: int = 0,
) -> Federation:
    """The federation that ``--data``, ``--clients``, ``--partition`` and their kin describe.

    Data that comes with owners (``synthetic``, ``quadratic``, ``bilinear``, a folder of client files) keeps them when
    the partition is ``iid``; with another assignment its rows are pooled and dealt anew. The number of clients is the
    data's for a folder and for ``natural:COLUMN``, and the file's for a partition file. ``unseen`` is a fraction
    if a float, a count if an int. A partition file decides everything it holds, its split, public and unseen rows
    too. ``sensitive`` names columns to report by, the data set's own if empty. About a
    quadratic, ``federation.about["optimum"]`` holds the minimiser over the training clients' training rows.
    """
    from consilience.data import games, synthetic

    fractions(split)
    name, _, rest = data.partition(":")
    if name == "synthetic-ondemand":
        alpha, beta = synthetic.numbers(name, rest, "synthetic-ondemand:ALPHA:BETA, both 0 or more", (1.0, 1.0))
        known: frozenset[int] | None = None
        if is_file(partition):
            clients, seed, known = read_on_demand(partition, data)
        elif partition != "iid":
            raise ConfigError(f"data '{data}' makes its own clients; leave --partition out instead of '{partition}'")
        if sensitive:
            raise ConfigError(f"data '{data}' has no column '{sensitive[0]}' to be sensitive")
        made = synthetic.synthetic_on_demand(
            data, clients=clients, seed=seed, alpha=alpha, beta=beta, split=split, public=public, unseen=unseen
        )
        return made if known is None else replace(made, unseen=known)
    if not is_file(partition):
        parse(partition)  # a wrong partition is told before data is read
    federation = build(
        load(data, seed=seed, clients=clients),
        clients=clients,
        partition=partition,
        split=split,
        public=public,
        unseen=unseen,
        sensitive=sensitive,
        seed=seed,
    )
    if name == "quadratic":
        federation.about["optimum"] = synthetic.least_squares(federation)
    if name == "bilinear":
        games.solve(federation)
    return federation


def digits() -> RawData:
    """scikit-learn's 1797 digits: inputs ``(1, 8, 8)`` in 0..1, a fixed fifth of each class as the global test set."""
    # Read from where scikit-learn keeps them: importing it takes longer than a first round.
    found = importlib.util.find_spec("sklearn")
    folder = "" if found is None else found.origin or ""
    table = np.loadtxt(Path(folder).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    x, y = (table[:, :-1] / 16).astype(np.float32).reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)
    held = assign.hold_out(y, 0.2, philox(0, "data", "digits"))
    task = Task("classification", 10, tuple(map(str, range(10))))
    return RawData("digits", x[~held], y[~held].astype(np.int64), task, x[held], y[held].astype(np.int64))


def fashion_mnist(folder: str | Path | None = None) -> RawData:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 inputs ``(1, 28, 28)`` in 0..1.

    From ``folder`` (idx files, plain or gz), the folder that the variable CONSILIENCE_FASHION_MNIST names, Debian's
    package dataset-fashion-mnist, or a download that is kept in the user's cache.
    """
    folder = _fashion_folder(folder)
    arrays = {name: _read_idx(folder, name) for name in FASHION_FILES}
    pairs: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"{folder}: {part} has images {images.shape} and labels {labels.shape}, one label an image")
        if len(labels) and labels.max() > 9:
            raise DataError(f"{folder}: {part} has label {labels.max()}, Fashion-MNIST has 0 to 9")
        pairs.append((images[:, None].astype(np.float32) / np.float32(255), labels.astype(np.int64)))
    (x, y), (test_x, test_y) = pairs
    return RawData("fashion-mnist", x, y, Task("classification", 10, FASHION_CLASSES), test_x, test_y)


def _fashion_folder(folder: str | Path | None) -> Path:
    named = folder or os.environ.get(FASHION_VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise DataError(f"fashion-mnist: folder {named} does not exist")
        return Path(named)
    if FASHION_DEBIAN.is_dir():
        return FASHION_DEBIAN
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consilience" / "fashion-mnist"
    for name, digest in FASHION_FILES.items():
        if not (cache / f"{name}.gz").is_file():
            _download(f"{FASHION_SOURCE}{name}.gz", cache / f"{name}.gz", digest)
    return cache


def _download(url: str, path: Path, digest: str) -> None:
    """Fetch a gz file whose content has the SHA-256 ``digest``; the file appears only when it is whole."""
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            body: bytes = reply.read()
        found = hashlib.sha256(gzip.decompress(body)).hexdigest()
    except (OSError, EOFError) as error:
        raise DataError(
            f"fashion-mnist is not on this machine and {url} cannot be fetched ({getattr(error, 'reason', error)}); "
            f"apt install dataset-fashion-mnist, or give a folder as fashion-mnist:FOLDER"
        ) from None
    if found != digest:
        raise DataError(f"{url} is not the file that was published (SHA-256 {found[:16]}..., not {digest[:16]}...)")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(body)
    part.replace(path)


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """An idx file of bytes (magic 0, 0, 8, dimensions; big-endian sizes; data), plain or gz."""
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        if plain.is_file():
            body = plain.read_bytes()
        elif packed.is_file():
            body = gzip.decompress(packed.read_bytes())
        else:
            raise DataError(f"fashion-mnist: {plain} (or .gz) does not exist")
    except (OSError, EOFError) as error:
        raise DataError(f"fashion-mnist: {packed} cannot be read: {error}") from None
    dimensions = body[3] if len(body) >= 4 else 0
    if len(body) < 4 + 4 * dimensions or body[:3] != b"\x00\x00\x08" or not dimensions:
        raise DataError(f"fashion-mnist: {folder / name} is not an idx file of bytes")
    shape = struct.unpack(f">{dimensions}I", body[4 : 4 + 4 * dimensions])
    data = np.frombuffer(body, dtype=np.uint8, offset=4 + 4 * dimensions)
    if len(data) != int(np.prod(shape)):
        raise DataError(f"fashion-mnist: {folder / name} has {len(data)} bytes, its header says {int(np.prod(shape))}")
    return data.reshape(shape)


def adult() -> RawData:
    """UCI Adult (census income, 1994): 32,561 + 16,281 rows of 6 numbers and 8 words, income above 50K or not.

    Sex and race are sensitive by default; they are inputs too. The words of each column are public knowledge
    (the data set's code book), so the inputs have the same shape under every partition.
    """
    source = files("consilience.data") / "files" / "adult.npz"
    with source.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        stored = {key: file[key] for key in file.files}
    tables = []
    for part in ("train", "test"):
        columns = []
        for name in stored["columns"].tolist():
            values = stored[f"{part}/{name}"]
            if f"words/{name}" in stored:
                words = tuple(stored[f"words/{name}"].tolist())
                columns.append(Column(name, values.astype(np.int64), words, known=True))
            else:
                columns.append(Column(name, values.astype(np.float64)))
        tables.append(Table(tuple(columns)))
    return RawData(
        "adult",
        tables[0],
        stored["train/income"].astype(np.int64),
        Task("classification", 2, ("<=50K", ">50K")),
        tables[1],
        stored["test/income"].astype(np.int64),
        sensitive=("sex", "race"),
    )
