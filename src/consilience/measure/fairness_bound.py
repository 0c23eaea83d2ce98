"""How accurate a federated method could be at best if it had to be fair: an upper bound, and the price of fairness.

The accuracy and global-local fairness optimality problem (AGLFOP) of Hamman and Dutta, ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from consilience.core.errors import DataError
from consilience.measure.fairness import global_disparity, local_disparity

Array = NDArray[np.float64]
TOLERANCE = 1e-5
"""By how much the bound may lie above what is attained, unless another tolerance is given."""
ROUNDS = 200
FLOOR = 1e-9
"""A conditional probability of a group in a cut is at least so much of the group's share."""


@dataclass(frozen=True)
class Bound:
    """The most accuracy under budgets of disparity, in bits (None: no budget).

    accuracy: no predictor of the kind asked for can be above it. attained, global_, local: of one that was found, so
    that the true optimum lies between ``attained`` and ``accuracy``.
    """

    budget_global: float | None
    budget_local: float | None
    accuracy: float
    attained: float
    global_: float
    local: float


class _Rows:
    """Rows of a sparse matrix under way, with their right sides."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.right: list[float] = []
        self._parts: list[tuple[NDArray[np.int64], Array]] = []

    def add(self, columns: NDArray[np.int64], values: Array, right: float) -> None:
        """One row."""
        self._parts.append((columns, values))
        self.right.append(right)

    def matrix(self) -> Any:
        """The rows as a sparse matrix; None without any."""
        from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

        if not self._parts:
            return None
        ends = np.cumsum([0, *(len(columns) for columns, _ in self._parts)])
        columns, values = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return csr_matrix((values, columns, ends), shape=(len(self.right), self.width))


class Frontier:
    """Bounds for one federation, whose clients' test rows are ``counts[s, z, y, p]``: client, group, label, prediction.

    of="oracle": any predictor, even one that knows client, group and label, which no method does: an upper bound for
    all. of="model": any (randomised) relabelling of these predictions by someone who knows client and group; for two
    classes the (FPR, TPR) of each group in each client then lies in the parallelogram of (0, 0), the model's point,
    (1, 1) and its mirror image.

    tolerance: how far the bound may lie above what is attained.

    A predictor is K[s, z, a, c], the chance of c where the signal a (label or prediction) is seen. Accuracy and the
    masses m = P(s, z, c) are linear in it. Both disparities are sums of terms m_c KL(P(z | c) || P(z)), each the
    largest of the linear functions sum_z m_zc log(R(z | c) / P(z)) over all R (Gibbs): so a linear programme with
    some of them bounds the accuracy from above, and more of them are added where its solution breaks them. A mixture
    of the solution with a perfectly fair one that keeps the budgets bounds it from below.
    """

    def __init__(self, counts: Any, of: Literal["oracle", "model"] = "oracle", tolerance: float = TOLERANCE) -> None:
        table = np.asarray(counts, dtype=np.float64)
        if table.ndim != 4 or table.shape[2] != table.shape[3] or (table < 0).any() or table.sum() <= 0:
            raise DataError("counts of clients are an array [client, group, label, prediction], not all zero")
        self.tolerance = tolerance
        p = table / table.sum()
        if of == "oracle":
            labels = p.sum(axis=3)
            p = np.einsum("szy,ya->szya", labels, np.eye(p.shape[2]))
        self.law = p  # [s, z, y, a]
        self.signal = p.sum(axis=2)  # [s, z, a]
        self.cells = np.argwhere(self.signal > 0)
        self.classes = p.shape[2]
        self.group_client = self.signal.sum(axis=2)  # [s, z]
        self._global_cuts: list[tuple[int, NDArray[np.int64], Array]] = []
        self._local_cuts: list[tuple[int, int, NDArray[np.int64], Array]] = []
        self._fairest: dict[tuple[bool, bool], Array] = {}

    def at(self, budget_global: float | None, budget_local: float | None) -> Bound:
        """The bound under these budgets."""
        if any(b is not None and b < 0 for b in (budget_global, budget_local)):
            raise DataError("a budget of disparity is 0 bits or more")
        best, top = None, 1.0
        fair = self._fair(budget_global is not None, budget_local is not None)
        for _ in range(ROUNDS):
            found, terms, top = self._solve(budget_global, budget_local)
            mixed = self._mix(found, fair, budget_global, budget_local)
            if best is None or self._accuracy(mixed) > self._accuracy(best):
                best = mixed
            if top - self._accuracy(best) <= self.tolerance or not self._cut(found, terms, budget_global, budget_local):
                break
        assert best is not None
        joint = self._joint(best)
        return Bound(
            budget_global, budget_local, top, self._accuracy(best), global_disparity(joint), local_disparity(joint)
        )

    def curve(self, along: Literal["global", "local", "both"], points: int = 13) -> list[Bound]:
        """Bounds from no disparity to as much as the most accurate predictor has, closer together near 0."""
        free = self.at(None, None)
        most = {"global": free.global_, "local": free.local, "both": max(free.global_, free.local)}[along]
        budgets = [most * (i / (points - 1)) ** 2 for i in range(points)] if most > 0 else [0.0]
        return [self.at(None if along == "local" else e, None if along == "global" else e) for e in budgets]

    # --- the linear programme ----------------------------------------------------------------------------------

    def _solve(self, budget_global: float | None, budget_local: float | None) -> tuple[Array, Array, float]:
        """A predictor, the terms of its disparities as far as the cuts know them, and its accuracy, the most under
        the cuts so far; a budget of 0 is parity itself."""
        from scipy.optimize import linprog  # type: ignore[import-untyped]

        s, z, a = self.cells.T
        n, c, clients = len(self.cells), self.classes, self.law.shape[0]
        slack = n * c  # columns of the terms: global by c, then local by (s, c)
        local_at = slack + (c if budget_global else 0)
        width = local_at + (clients * c if budget_local else 0)
        rows = _Rows(width)
        if budget_global:
            rows.add(np.arange(slack, slack + c), np.ones(c), budget_global)
            for k, columns, values in self._global_cuts:
                rows.add(np.append(columns, slack + k), np.append(values, -1.0), 0.0)
        if budget_local:
            rows.add(np.arange(local_at, width), np.ones(clients * c), budget_local)
            for client, k, columns, values in self._local_cuts:
                rows.add(np.append(columns, local_at + client * c + k), np.append(values, -1.0), 0.0)
        equal = self._equalities(budget_global == 0, budget_local == 0, width)
        objective = np.concatenate([-self.law[s, z, :, a].ravel(), np.zeros(width - slack)])
        done = linprog(objective, rows.matrix(), rows.right or None, equal.matrix(), equal.right, (0, None), "highs")
        if done.status != 0:
            raise DataError(f"the linear programme of the fairness bound was not solved: {done.message}")
        return np.asarray(done.x[:slack]).reshape(n, c), np.asarray(done.x[slack:]), float(-done.fun)

    def _equalities(self, parity_global: bool, parity_local: bool, width: int) -> _Rows:
        """Rows of K sum to 1; and parity, if asked for: m[., z, c] = P(z) m[., c]."""
        s, z, a = self.cells.T
        n, c = len(self.cells), self.classes
        rows = _Rows(width)
        for i in range(n):
            rows.add(np.arange(i * c, (i + 1) * c), np.ones(c), 1.0)
        mass = self.signal[s, z, a]
        blocks: list[tuple[NDArray[np.int64], Array]] = []  # cells of the block, shares of the groups in it
        if parity_global:
            blocks.append((np.arange(n), self.group_client.sum(axis=0)))
        if parity_local:
            blocks += [(np.flatnonzero(s == client), self.group_client[client]) for client in np.unique(s)]
        for cells, groups in blocks:
            shares = groups / groups.sum()
            for group in np.flatnonzero(groups)[1:]:
                values = mass[cells] * ((z[cells] == group) - shares[group])
                for k in range(c - 1):
                    rows.add(cells * c + k, values, 0.0)
        return rows

    def _cut(self, k: Array, terms: Array, budget_global: float | None, budget_local: float | None) -> bool:
        """Add the cuts that a predictor breaks; False if it breaks none."""
        m, c = self._joint(k).sum(axis=2), self.classes  # [s, z, c]
        broken: list[tuple[float, tuple[int, ...], Array]] = []
        if budget_global:
            whole, groups = m.sum(axis=0), self.group_client.sum(axis=0)
            for j in np.flatnonzero(whole.sum(axis=0) > 1e-12):
                slope = _slope(whole[:, j], groups)
                broken.append((float(slope @ whole[:, j] - terms[j]), (int(j),), slope))
        if budget_local:
            first = c if budget_global else 0
            for client, j in np.argwhere(m.sum(axis=1) > 1e-12):
                slope = _slope(m[client, :, j], self.group_client[client])
                gap = float(slope @ m[client, :, j] - terms[first + client * c + j])
                broken.append((gap, (int(client), int(j)), slope))
        s, z, a = self.cells.T
        mass = self.signal[s, z, a]
        broken = [b for b in broken if b[0] > 1e-10]
        for _, where, slope in broken:
            at = np.arange(len(s)) if len(where) == 1 else np.flatnonzero(s == where[0])
            columns, values = at * c + where[-1], mass[at] * slope[z[at]]
            if len(where) == 1:
                self._global_cuts.append((where[0], columns, values))
            else:
                self._local_cuts.append((where[0], where[1], columns, values))
        return bool(broken)

    # --- from bounds to predictors ----------------------------------------------------------------------------

    def _joint(self, k: Array) -> Array:
        """P(s, z, y, c) of a predictor ``[cell, c]``."""
        s, z, a = self.cells.T
        out = np.zeros_like(self.law)
        np.add.at(out, (s, z), self.law[s, z, :, a][:, :, None] * np.maximum(k, 0)[:, None, :])
        return np.asarray(out)

    def _accuracy(self, k: Array) -> float:
        s, z, a = self.cells.T
        return float((self.law[s, z, :, a] * k).sum())

    def _fair(self, in_global: bool, in_local: bool) -> Array:
        """The most accurate predictor without the disparities that have a budget."""
        key = in_global, in_local
        if key not in self._fairest:
            self._fairest[key] = self._solve(0.0 if in_global else None, 0.0 if in_local else None)[0]
        return self._fairest[key]

    def _mix(self, k: Array, fair: Array, budget_global: float | None, budget_local: float | None) -> Array:
        """As much of ``k`` as keeps the budgets, the rest fair; disparities are convex, so bisection finds it."""

        def keeps(share: float) -> bool:
            joint = self._joint(share * k + (1 - share) * fair)
            return (budget_global is None or global_disparity(joint) <= budget_global + 1e-12) and (
                budget_local is None or local_disparity(joint) <= budget_local + 1e-12
            )

        if keeps(1.0):
            return k
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return np.asarray(low * k + (1 - low) * fair)


def _slope(masses: Array, groups: Array) -> Array:
    """log2(R(z) / P(z)) with R the groups' shares among ``masses``, kept off 0."""
    share = groups / groups.sum()
    r = (1 - FLOOR) * masses / masses.sum() + FLOOR * share
    out = np.zeros_like(r)
    held = share > 0
    out[held] = np.log2(r[held] / share[held])
    return np.asarray(out)


def points(bounds: Sequence[Bound], along: Literal["global", "local"]) -> list[tuple[float, float]]:
    """A curve as (budget in bits, accuracy)."""
    return [((b.budget_global if along == "global" else b.budget_local) or 0.0, b.accuracy) for b in bounds]
