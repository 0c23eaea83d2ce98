"""Inputs as the profile's classifiers see them: principal components, energies beyond them, and neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilience.measure.information import Ints

Floats32 = NDArray[np.float32]

COMPONENTS = 32
"""Principal components that are kept one by one."""
_BLOCK = 1024


def principal(x: NDArray[np.floating], fit: NDArray[np.int64] | None = None) -> tuple[NDArray[np.float64], Floats32]:
    """Variances (descending) and principal components ``(n, r)`` of ``x`` ``(n, d)``; those without variance go.

    fit: rows from which the axes come (all).
    """
    rows = np.asarray(x if fit is None else x[fit], dtype=np.float64)
    centre = rows.mean(axis=0)
    covariance = (rows - centre).T @ (rows - centre) / len(rows)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    keep = int((values > 1e-9 * max(values[0], 1e-12)).sum())
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(len(values))])  # one sign on every machine
    projected = (np.asarray(x, dtype=np.float64) - centre) @ vectors[:, :keep]
    return values[:keep], projected.astype(np.float32)


def embed(x: NDArray[np.floating]) -> tuple[Floats32, Floats32]:
    """Inputs ``(n, d)`` for classifiers, and for distances between rows.

    The first ``COMPONENTS`` principal components, and the log energies in four bands of the others: noise and blur
    show in these. For classifiers everything has unit variance; for distances a component keeps the square root of
    its standard deviation, half-way between raw and whitened components.
    """
    values, projected = principal(x)
    if not len(values):  # constant inputs
        nothing = np.zeros((len(x), 1), np.float32)
        return nothing, nothing
    first = min(COMPONENTS, len(values))
    spread = np.sqrt(values[:first]).astype(np.float32)
    head = projected[:, :first] / spread
    bands, start = [], first
    for end in (2 * first, 4 * first, 8 * first, len(values)):
        end = min(end, len(values))
        if end > start:
            energy = np.log(np.square(projected[:, start:end]).mean(axis=1, keepdims=True) + 1e-6)
            bands.append((energy - energy.mean()) / (energy.std() + 1e-9))
            start = end
    return np.concatenate([head, *bands], axis=1), np.concatenate([head * np.sqrt(spread / spread[0]), *bands], axis=1)


def neighbours(z: Floats32, count: int) -> Ints:
    """The ``count`` nearest other rows of each row of ``z`` ``(n, d)``, nearest first: ``(n, min(count, n - 1))``."""
    n = len(z)
    count = min(count, n - 1)
    squares = np.square(z).sum(axis=1)
    found = np.empty((n, max(count, 0)), dtype=np.int64)
    if count < 1:
        return found
    for start in range(0, n, _BLOCK):
        part = z[start : start + _BLOCK]
        distance = squares - 2 * (part @ z.T)
        distance[np.arange(len(part)), np.arange(start, start + len(part))] = np.inf
        near = np.argpartition(distance, count - 1, axis=1)[:, :count]
        order = np.argsort(np.take_along_axis(distance, near, axis=1), axis=1, kind="stable")
        found[start : start + _BLOCK] = np.take_along_axis(near, order, axis=1)
    return found


def neighbours_within(z: Floats32, label: Ints, count: int) -> Ints:
    """As :func:`neighbours`, among the rows of the same label only; -1 where there are not so many."""
    found = np.full((len(z), count), -1, dtype=np.int64)
    for value in np.unique(label):
        rows = np.flatnonzero(label == value)
        near = neighbours(z[rows], count)
        found[rows[:, None], np.arange(near.shape[1])] = rows[near]
    return found


def shares(near: Ints, code: Ints, codes: int) -> Floats32:
    """Of each row's neighbours ``(n, k)``, the share with each code: ``(n, codes)``; zeros without neighbours."""
    n = len(near)
    there = near >= 0
    cell = (np.arange(n)[:, None] * codes + code[near])[there]
    counts = np.bincount(cell, minlength=n * codes).reshape(n, codes)
    return np.asarray(counts / np.maximum(there.sum(axis=1, keepdims=True), 1), dtype=np.float32)
