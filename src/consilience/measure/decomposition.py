"""Why a federated model treats groups unequally: partial information decomposition of its disparities.

Of Hamman and Dutta, "Demystifying Local and Global Fairness Trade-offs in Federated Learning Using Partial Information
Decomposition", ICLR 2024, with the unique information of Bertschinger, Rauh, Olbrich, Jost and Ay, Entropy 2014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.core.errors import DataError
from consilience.measure.fairness import mutual_information

Array = NDArray[np.float64]
TOLERANCE = 1e-9
"""Bits by which the unique disparity may be too large."""
GROWTH = 20.0
"""How much the weight of the objective against the barrier grows from one centring to the next."""


@dataclass(frozen=True)
class Disparities:
    """In bits. Z the group, P the prediction, S the client.

    global_ = I(Z;P) = unique + redundant; local = I(Z;P|S) = unique + masked.
    unique: in the prediction whoever the client is; both a global and a local remedy reach it. redundant: also in the
    client, which stands for the group; only the global disparity has it. masked: seen only within clients, where it
    cancels over all of them; only the local disparity has it. gap: bits by which ``unique`` may be too large.
    """

    global_: float
    local: float
    unique: float
    redundant: float
    masked: float
    gap: float


def decompose(counts: Any) -> Disparities:
    """The decomposition of a law ``[z, p, s]`` (counts or probabilities, group, prediction, client).

    unique = min_Q I_Q(Z;P|S) over all laws Q with the same (z, p) and (z, s) marginals: a convex programme, solved
    by a barrier method whose duality gap is at most ``gap``. Raises DataError for negative or no counts.
    """
    p = np.asarray(counts, dtype=np.float64)
    if p.ndim != 3 or not np.isfinite(p).all() or (p < 0).any() or p.sum() <= 0:
        raise DataError("a law of groups, predictions and clients is an array [z, p, s] of counts, not all zero")
    p = p / p.sum()
    whole = mutual_information(p.sum(axis=2))
    local = conditional_information(p)
    if whole <= 1e-15 or local <= 1e-15:  # unique is at most either
        return Disparities(whole, local, 0.0, whole, local, 0.0)
    unique, gap = unique_information(p)
    unique = min(max(unique, 0.0), whole, local)
    return Disparities(whole, local, unique, whole - unique, local - unique, gap)


def conditional_information(p: Array) -> float:
    """I(Z;P|S) in bits of a law ``[z, p, s]``."""
    return float(sum(p[:, :, s].sum() * mutual_information(p[:, :, s]) for s in range(p.shape[2])))


def unique_information(p: Array, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """min_Q I_Q(Z;P|S) in bits, and by how much it may be too large.

    With q[s, z, p] = Q: minimise f = sum q log(q / sum_z q), whose value is I_Q(Z;P|S) less H(Z|S), where both
    marginals are given. A client's own marginal is kept by construction, so that only sum_s q = P(z, p) couples
    clients and a Newton step costs one small matrix a client. t f(q) - sum log q is minimised for growing t; at its
    minimum f is at most (free cells) / t above the least.
    """
    problem = _Problem(p)
    q, t = problem.start, 1.0
    best, gap = problem.value(q), np.inf
    if not problem.moves.any():  # the marginals leave a single law
        return best, 0.0
    while gap > tolerance:
        q, centred = _centre(problem, q, t)
        if not centred or problem.drift(q) > TOLERANCE:  # the last centre is what double precision gives
            break
        best, gap = problem.value(q), problem.cells / t / np.log(2)
        t *= GROWTH
    return best, float(gap)


class _Problem:
    """Coordinates x[s, v] of q[s, z, p] = base + D x, one for each (z, p) that occurs but one p a group."""

    def __init__(self, p: Array) -> None:
        self.zp, zs = p.sum(axis=2), p.sum(axis=1)
        groups, outcomes, _ = p.shape
        keep = self.zp.argmax(axis=1)
        free = [(z, y) for z, y in zip(*np.nonzero(self.zp), strict=True) if y != keep[z]]
        self.directions = np.zeros((groups, outcomes, len(free)))
        for v, (z, y) in enumerate(free):
            self.directions[z, y, v], self.directions[z, keep[z], v] = 1.0, -1.0
        self.flat = self.directions.reshape(groups * outcomes, len(free))
        self.free = (zs.T[:, :, None] > 0) & (self.zp > 0)  # [s, z, p]: cells that may be above 0
        self.moves = zs.T[:, [z for z, _ in free]] > 0  # [s, v]
        own = self.directions * self.free[:, :, :, None]  # [s, z, p, v]
        pooled = own.sum(axis=1)
        self.pairs = np.einsum("spi,spj->spij", pooled, pooled) - np.einsum("szpi,szpj->spij", own, own)
        self.cells = int(self.free.sum())
        self.start = zs.T[:, :, None] * (self.zp / np.maximum(self.zp.sum(1, keepdims=True), 1e-300))
        held, of_client = zs > 0, np.broadcast_to(zs.sum(axis=0), zs.shape)
        self.constant = -float((zs[held] * np.log(zs[held] / of_client[held])).sum())  # H(Z|S)

    def drift(self, q: Array) -> float:
        """By how much rounding has moved sum_s q away from P(z, p)."""
        return float(np.abs(q.sum(axis=0) - self.zp).max())

    def objective(self, q: Array) -> float:
        """f in nats."""
        r = np.broadcast_to(q.sum(axis=1, keepdims=True), q.shape)
        return float((q[self.free] * np.log(q[self.free] / r[self.free])).sum())

    def value(self, q: Array) -> float:
        """I_Q(Z;P|S) in bits."""
        return (self.objective(q) + self.constant) / float(np.log(2))

    def newton(self, q: Array, t: float) -> tuple[Array, Array]:
        """Gradient ``[s, v]`` and Newton step ``[s, v]`` of t f - sum log q with sum_s x fixed."""
        clients, n = self.moves.shape
        safe = np.where(self.free, q, 1.0)
        r = np.where(self.free.any(axis=1), q.sum(axis=1), 1.0)  # [s, p]
        slope = np.where(self.free, t * np.log(safe / r[:, None, :]) - 1 / safe, 0.0)
        gradient = slope.reshape(clients, -1) @ self.flat * self.moves
        # of f: diag(1 / q) - 1 1^T / r over the groups that share (s, p); the diagonal without its cancellation
        others = np.einsum("zw,swp->szp", 1 - np.eye(q.shape[1]), q)
        curve = np.where(self.free, t * others / (safe * r[:, None, :]) + 1 / safe**2, 0.0).reshape(clients, -1)
        hessian = np.einsum("ki,sk,kj->sij", self.flat, curve, self.flat)
        hessian -= np.einsum("spij,sp->sij", self.pairs, t / r)
        hessian *= self.moves[:, :, None] & self.moves[:, None, :]
        hessian += np.eye(n) * ~self.moves[:, :, None]
        inverse = _inverse(hessian) * (self.moves[:, :, None] & self.moves[:, None, :])
        total = _inverse(inverse.sum(axis=0))
        step = -np.einsum("sij,sj->si", inverse, gradient)
        for _ in range(2):  # once for the constraint, once more for what rounding left of it
            step -= np.einsum("sij,j->si", inverse, total @ step.sum(axis=0))
        return gradient, step


def _inverse(matrix: Array) -> Array:
    """The inverse of symmetric matrices whose diagonals span many orders of magnitude, by way of unit diagonals."""
    root = np.sqrt(np.einsum("...ii->...i", matrix))
    both = root[..., :, None] * root[..., None, :]
    return np.asarray(np.linalg.inv(matrix / both) / both)


def _centre(problem: _Problem, q: Array, t: float) -> tuple[Array, bool]:
    """The minimiser of t f - sum log q with the marginals of q, and whether it was reached."""

    def height(v: Array) -> float:
        return t * problem.objective(v) - float(np.log(v[problem.free]).sum())

    for _ in range(200):
        try:
            with np.errstate(all="ignore"):  # where double precision ends, the last centre stands
                gradient, step = problem.newton(q, t)
        except np.linalg.LinAlgError:
            return q, False
        slope = float((gradient * step).sum())
        if not np.isfinite(slope):
            return q, False
        if -slope <= 1e-6:
            return q, True
        change = (step @ problem.flat.T).reshape(q.shape) * problem.free
        down = change < 0
        size = min(1.0, 0.99 * float((q[down] / -change[down]).min())) if down.any() else 1.0
        here = height(q)
        for _ in range(40):
            after = q + size * change
            if (after[problem.free] > 0).all() and height(after) <= here + 0.1 * size * slope:
                break
            size *= 0.5
        else:
            return q, -slope < 0.1  # so near the minimum that only rounding is left
        q = after
    return q, False
