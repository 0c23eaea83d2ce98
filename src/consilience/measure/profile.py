"""The profile of a federation: what kind of heterogeneity it has, and how much of it, in bits.

See :mod:`consilience.measure.information` and :mod:`consilience.measure.discriminative` for the estimators and their
limits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from consilience.core.errors import DataError
from consilience.core.federation import Federation
from consilience.core.streams import philox
from consilience.measure import discriminative
from consilience.measure.distances import jensen_shannon, plane, sliced_wasserstein
from consilience.measure.information import Bits, Floats, Ints, entropy, label_information, quantity_skew
from consilience.measure.nearest import suggest
from consilience.measure.represent import principal

ROWS = 16_000
"""At most so many rows enter the terms that involve inputs."""
CLIENTS = 300
"""At most so many clients are looked at."""
MATRIX = 100
"""Distances between all pairs are given for at most so many clients."""
BINS = 10
"""Targets of a regression are cut into so many bins of equal size."""
FEW = 30
"""With fewer rows a client, what is found depends more on the rows than on the clients."""
CLEAR = 0.6
"""Clusters are reported from this mean silhouette on."""


class Sample(NamedTuple):
    """The clients that are looked at, and the rows that are.

    ids: clients, ascending. names: of them. sizes: training rows of each. counts: rows by client and label
    ``(clients, labels)``. classes: the labels' names. x: inputs ``(n, d)`` of the rows drawn. y, c: their labels and
    clients (places in ``ids``), codes from 0. binned: labels are bins of a regression's targets.
    """

    ids: Ints
    names: list[str]
    sizes: Ints
    counts: Ints
    classes: list[str]
    x: NDArray[np.float32]
    y: Ints
    c: Ints
    binned: bool


def draw(federation: Federation, seed: int) -> Sample:
    """Training rows of the clients that train: all, or a random part with the same share of every client."""
    seen = federation.seen
    if len(seen) > CLIENTS:
        seen = np.sort(philox(seed, "profile", "clients").choice(seen, CLIENTS, replace=False))
    ids = [int(client) for client in seen]
    targets = [federation.data(client).train.y.numpy() for client in ids]
    labels, classes, binned = _labels(federation, targets)
    sizes = np.array([len(y) for y in labels])
    counts = np.stack([np.bincount(y, minlength=len(classes)) for y in labels])
    share = min(1.0, ROWS / max(int(sizes.sum()), 1))
    xs, ys = [], []
    for client, y in zip(ids, labels, strict=True):
        take = min(len(y), max(2, round(share * len(y))))
        rows = np.sort(philox(seed, "profile", "rows", client).permutation(len(y))[:take])
        x = federation.data(client).train.x.numpy()[rows]
        xs.append(np.asarray(x, dtype=np.float32).reshape(take, -1))
        ys.append(y[rows])
    return Sample(
        np.array(ids),
        [federation.label(client) for client in ids],
        sizes,
        counts,
        classes,
        np.concatenate(xs),
        np.concatenate(ys),
        np.repeat(np.arange(len(ids)), [len(y) for y in ys]),
        binned,
    )


def _labels(federation: Federation, targets: list[NDArray[Any]]) -> tuple[list[Ints], list[str], bool]:
    """Every client's labels, their names, and whether they are bins of targets."""
    task = federation.task
    if task.kind == "classification":
        names = list(task.classes) or [str(k) for k in range(task.outputs)]
        return [y.astype(np.int64) for y in targets], names, False
    if not task.minimises:
        raise DataError(f"{federation.name}: a game or variational inequality has no labels or targets to profile")
    value = np.concatenate(targets).astype(np.float64)
    line = value if value.ndim == 1 else principal(value)[1][:, 0].astype(np.float64)
    edges = np.unique(np.quantile(line, np.arange(1, BINS) / BINS))
    codes = np.searchsorted(edges, line, side="right")
    ends = np.cumsum([len(y) for y in targets])[:-1]
    first = [f"below {edges[0]:.3g}", *(f"from {edge:.3g}" for edge in edges)]
    return [part.astype(np.int64) for part in np.split(codes, ends)], first, True


def profile(federation: Federation, seed: int = 0) -> dict[str, Any]:
    """Measure a federation's heterogeneity: the object that ``consilience profile --json`` prints.

    ``bits`` holds, each as ``{value, low, high, max}`` in bits with 95 % intervals, ``label_skew`` I(C; Y),
    ``feature_skew`` I(C; X | Y), ``input_skew`` I(C; X), ``concept_shift`` I(C; Y | X), ``total`` I(C; X, Y) and
    ``quantity_skew``, where C is the client of a training row, Y its label and X its input. Where a term is estimated
    by classifiers, ``half`` is what half of the rows give: if it is much lower, so is the estimate. ``by_label_skew``
    is the concept shift that label skew alone gives where classes overlap. ``limits`` says in words what the numbers
    cannot show. Raises DataError for a task without labels or targets.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # many small products: one thread is faster, and gives the same bits every time
        sample = draw(federation, seed)
        bits, terms = _bits(sample, seed)
        distance = _between(sample, terms)
        clusters = _clusters(distance)
        found: dict[str, Any] = {
            "name": federation.name,
            "partition": str(federation.about.get("partition", "")),
            "seed": seed,
            "federation": {
                "clients": federation.n_seen,
                "profiled": len(sample.ids),
                "rows": int(sample.sizes.sum()),
                "rows_used": len(sample.y),
                "inputs": list(federation.input_shape),
                "labels": "bins of the target" if sample.binned else "classes",
            },
            "bits": {name: _record(value, terms, name) for name, value in bits.items()},
            "identities": _identities(terms),
            "clients": _clients(sample, clusters, plane(distance)),
            "classes": sample.classes,
            "counts": sample.counts.tolist(),
            "coverage": _coverage(sample),
            "distances": _distances(sample, seed),
            "clusters": _members(sample, clusters, distance),
            "fleet": None,
        }
    found["limits"] = _limits(sample, found, terms)
    return {**found, **suggest(found)}


def _bits(sample: Sample, seed: int) -> tuple[dict[str, Bits], discriminative.Terms | None]:
    """All six amounts; the terms with inputs are None where there is one client, and nothing to tell."""
    label = label_information(sample.counts, philox(seed, "profile", "label"))
    clients, classes = float(entropy(sample.sizes)), float(entropy(sample.counts.sum(axis=0)))
    most = {
        "total": clients,
        "feature_skew": clients - label.value,
        "input_skew": clients,
        "concept_shift": min(clients, classes),
    }
    terms = None
    if len(sample.ids) > 1:
        held, y = np.unique(sample.y, return_inverse=True)
        table = sample.counts[:, held].T.astype(np.float64)
        terms = discriminative.information(sample.x, y, sample.c, table, label, most, seed)
    nothing = Bits(0.0, 0.0, 0.0, 0.0)
    names = ("label_skew", "feature_skew", "input_skew", "concept_shift", "total")
    with_inputs = {} if terms is None else terms.bits
    found = {name: label if name == "label_skew" else with_inputs.get(name, nothing) for name in names}
    return {**found, "quantity_skew": quantity_skew(sample.sizes)}, terms


def _record(value: Bits, terms: discriminative.Terms | None, name: str) -> dict[str, float]:
    found = {key: round(number, 4) for key, number in value._asdict().items()}
    if terms is not None and name in terms.half:
        found["half"] = round(terms.half[name], 4)
    if terms is not None and name == "concept_shift":
        found["by_label_skew"] = round(terms.explained, 4)
    return found


def _identities(terms: discriminative.Terms | None) -> list[dict[str, Any]]:
    """Whether the parts add up to the total, within the interval of the difference (and a hundredth of a bit)."""
    return [
        {"sum": name, "gap": round(gap, 4), "interval": round(half, 4), "holds": abs(gap) <= max(half, 0.01)}
        for name, (gap, half) in ({} if terms is None else terms.gaps).items()
    ]


def _between(sample: Sample, terms: discriminative.Terms | None) -> Floats:
    """How different any two clients are, in labels, inputs or what these mean: ``(clients, clients)``, 0 to 1.

    For every client, the mean over its rows of q(c | x, y): which clients its rows could be from. Two clients are as
    far apart as these means are (square root of their Jensen-Shannon divergence).
    """
    n = len(sample.ids)
    if terms is None:
        return np.zeros((n, n))
    mean = np.stack([terms.real.by_both[sample.c == k].mean(axis=0, dtype=np.float64) for k in range(n)])
    return np.sqrt(jensen_shannon((mean + mean.T) / 2))


def _clusters(distance: Floats) -> tuple[Ints, float]:
    """Each client's cluster, and the mean silhouette of the best division; one cluster unless that is clear.

    Average linkage; 2 to 10 clusters, those of the largest mean silhouette (Rousseeuw 1987).
    """
    from sklearn.cluster import AgglomerativeClustering  # type: ignore[import-untyped]
    from sklearn.metrics import silhouette_score  # type: ignore[import-untyped]

    n = len(distance)
    one = np.zeros(n, dtype=np.int64)
    best, found = 0.0, one
    for k in range(2, min(10, n - 1) + 1):
        codes = AgglomerativeClustering(k, metric="precomputed", linkage="average").fit_predict(distance)
        score = float(silhouette_score(distance, codes, metric="precomputed"))
        if score > best:
            best, found = score, codes
    if best < CLEAR or distance.max() < 0.05:
        return one, best
    order = list(dict.fromkeys(found.tolist()))  # clusters are numbered as their first clients come
    return np.array([order.index(code) for code in found.tolist()]), best


def _clients(sample: Sample, clusters: tuple[Ints, float], position: Floats) -> list[dict[str, Any]]:
    own = entropy(sample.counts)
    pooled = jensen_shannon(np.vstack([sample.counts, sample.counts.sum(axis=0)]))[-1]
    return [
        {
            "client": int(client),
            "name": sample.names[i],
            "rows": int(sample.sizes[i]),
            "classes": int((sample.counts[i] > 0).sum()),
            "label_entropy": round(float(own[i]), 4),
            "label_js_to_pooled": round(float(pooled[i]), 4),
            "cluster": int(clusters[0][i]),
            "position": [round(float(v), 4) for v in position[i]],
        }
        for i, client in enumerate(sample.ids)
    ]


def _coverage(sample: Sample) -> dict[str, Any]:
    """Who holds which classes: classes by client, and clients by class."""
    held = sample.counts > 0
    per_client, per_class = held.sum(axis=1), held.sum(axis=0)
    name = sample.classes
    return {
        "classes_per_client": [int(per_client.min()), float(np.median(per_client)), int(per_client.max())],
        "clients_per_class": per_class.tolist(),
        "missing": [name[k] for k in np.flatnonzero(per_class == 0)],
        "held_by_one": [name[k] for k in np.flatnonzero(per_class == 1)] if len(sample.ids) > 1 else [],
    }


def _distances(sample: Sample, seed: int) -> dict[str, Any]:
    """Label and input distances between clients, beside those that the same clients have if rows are exchanged."""
    n, rng = len(sample.ids), philox(seed, "profile", "distances")
    c = np.repeat(np.arange(n), sample.sizes)
    y = np.concatenate([np.repeat(np.arange(sample.counts.shape[1]), row) for row in sample.counts])
    mixed = np.zeros_like(sample.counts)
    np.add.at(mixed, (c, rng.permutation(y)), 1)
    values, projected = principal(sample.x)
    z = projected[:, :32] / math.sqrt(float(values.sum())) if len(values) else np.zeros((len(sample.y), 1), np.float32)
    pair: dict[str, tuple[Floats, Floats, str]] = {
        "label_js": (jensen_shannon(sample.counts), jensen_shannon(mixed), "bits, 0 to 1"),
        "sliced_wasserstein": (
            sliced_wasserstein(z, sample.c, n, philox(seed, "profile", "directions")),
            sliced_wasserstein(z, rng.permutation(sample.c), n, philox(seed, "profile", "directions")),
            "root mean square distance of all inputs from their mean",
        ),
    }
    off = ~np.eye(n, dtype=bool)
    return {
        name: {
            "unit": unit,
            "mean": round(float(real[off].mean()), 4) if n > 1 else 0.0,
            "largest": round(float(real.max()), 4),
            "by_chance": round(float(null[off].mean()), 4) if n > 1 else 0.0,
            "matrix": np.round(real, 4).tolist() if n <= MATRIX else None,
        }
        for name, (real, null, unit) in pair.items()
    }


def _members(sample: Sample, clusters: tuple[Ints, float], distance: Floats) -> dict[str, Any]:
    codes, score = clusters
    groups = [[int(client) for client in sample.ids[codes == k]] for k in range(int(codes.max()) + 1)]
    return {
        "count": len(groups),
        "silhouette": round(score, 3),
        "members": groups,
        "largest": round(float(distance.max()), 4),
    }


def _limits(sample: Sample, found: dict[str, Any], terms: discriminative.Terms | None) -> list[str]:
    """What the numbers cannot show, as sentences; those that apply here."""
    of = found["federation"]
    said = []
    if terms is None:
        return ["One client: there is nobody to differ from."]
    if of["profiled"] < of["clients"]:
        said.append(f"A random {of['profiled']} of {of['clients']} clients were looked at.")
    if of["rows_used"] < of["rows"]:
        said.append(f"Terms with inputs come from a random {of['rows_used']:,} of {of['rows']:,} training rows.")
    if sample.binned:
        said.append(f"Targets were cut into {len(sample.classes)} bins of equal size; within a bin all are the same.")
    rows = len(sample.y) / len(sample.ids)
    if rows < FEW:
        said.append(f"{rows:.0f} rows a client are few: terms with inputs may miss most of what there is.")
    rising = [
        f"{name.replace('_', ' ')} (half of the rows give {terms.half[name]:.2f})"
        for name, value in terms.bits.items()
        if name in ("feature_skew", "concept_shift") and value.value > 0.05 and terms.half[name] < 0.9 * value.value
    ]
    if rising:
        said.append(f"Still rising with more rows, so larger than it reads: {' and '.join(rising)}.")
    overlap, alone = min(terms.overlap, found["bits"]["concept_shift"]["max"]), terms.explained
    more = f"; label skew alone gives {alone:.2f} bits of it here, since classes overlap" if alone >= 0.005 else ""
    said.append(
        f"Inputs leave {overlap:.2f} bits of the label open to the classifier: concept shift cannot exceed that{more}."
    )
    broken = [row for row in found["identities"] if not row["holds"]]
    said += [
        f"{row['sum'].replace('_', ' ').replace('+', 'and').capitalize()} miss the total by {abs(row['gap']):.2f} "
        f"bits, more than their interval of {row['interval']:.2f}: trust them no further than that."
        for row in broken
    ]
    said.append("Classifiers miss a part of what inputs tell: read feature and input skew as at least so much.")
    return said
