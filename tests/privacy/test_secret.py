"""Secret sums: exact at every number of lost clients, refused beyond, and nothing but sums."""

from __future__ import annotations

import itertools
import random
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from consilience.core import tree as tr
from consilience.core.errors import ConfigError, ConsilienceError, NeedsError
from consilience.methods import make
from consilience.privacy.options import Privacy
from consilience.privacy.protocol import Client, Unmask, stream, total
from consilience.privacy.secret import BITS, Secret, decode, encode
from consilience.privacy.shamir import join, split
from consilience.simulate import Result, run


def test_any_threshold_of_shares_is_enough_and_fewer_are_not() -> None:
    secret = bytes(range(32))
    shares = split(secret, 3, [1, 2, 5, 9, 11])
    for some in itertools.combinations(shares, 3):
        assert join({i: shares[i] for i in some}) == secret
    assert join(shares) == secret
    with pytest.raises(ValueError, match="too few"):
        join({i: shares[i] for i in (1, 5)})
    with pytest.raises(ValueError, match="distinct holders"):
        split(secret, 6, [1, 2, 3, 4, 5])


def protocol(n: int, threshold: int, lost: set[int], size: int = 7) -> tuple[np.ndarray, dict[int, np.ndarray], Any]:
    """(unmasked sum, plain vectors, masked vectors)."""
    rng = np.random.default_rng(n)
    vectors = {i: rng.integers(2**BITS, size=size, dtype=np.uint64) for i in range(1, n + 1)}
    clients = {i: Client(i, threshold) for i in vectors}
    keys = {i: client.keys() for i, client in clients.items()}
    sealed = {i: client.shares(keys) for i, client in clients.items()}
    masked = {
        i: clients[i].masked(vectors[i], {j: boxes[i] for j, boxes in sealed.items()}, BITS)
        for i in vectors
        if i not in lost
    }
    answers = {i: clients[i].unmask(list(masked)) for i in masked}
    return total(masked, answers, keys, threshold, BITS), vectors, masked


@pytest.mark.parametrize("lost", range(6))
def test_sums_are_exact_whoever_is_lost_and_refused_beyond(lost: int) -> None:
    n, threshold = 8, 5
    gone = set(random.Random(lost).sample(range(1, n + 1), lost))
    if n - lost < threshold:
        with pytest.raises(ConsilienceError, match="threshold 5"):
            protocol(n, threshold, gone)
        return
    found, vectors, masked = protocol(n, threshold, gone)
    plain = sum(int(v[0]) for i, v in vectors.items() if i not in gone) % 2**BITS
    assert int(found[0]) == plain
    whole = np.sum([v for i, v in vectors.items() if i not in gone], axis=0, dtype=np.uint64) & np.uint64(2**BITS - 1)
    assert np.array_equal(found, whole)
    assert all(not np.array_equal(masked[i], vectors[i]) for i in masked)


def test_a_server_alone_can_unmask_nobody() -> None:
    """With fewer answers than the threshold nothing comes out, and no client answers twice."""
    clients = {i: Client(i, 2) for i in (1, 2, 3)}
    keys = {i: client.keys() for i, client in clients.items()}
    sealed = {i: client.shares(keys) for i, client in clients.items()}
    masked = {
        i: c.masked(np.zeros(2, dtype=np.uint64), {j: b[i] for j, b in sealed.items()}, BITS)
        for i, c in clients.items()
    }
    answer = clients[1].unmask([1, 2, 3])
    assert isinstance(answer, Unmask)
    assert not answer.keys  # of who has sent, never the masking key
    with pytest.raises(ConsilienceError):
        clients[1].unmask([1, 2])
    with pytest.raises(ConsilienceError):
        clients[2].unmask([2])
    with pytest.raises(ConsilienceError, match="2 are needed"):
        total(masked, {1: answer}, keys, 2, BITS)


def test_masks_look_uniform() -> None:
    drawn = stream(bytes(range(32)), 100_000, BITS)
    assert drawn.max() < 2**BITS
    assert float(drawn.mean()) / 2**BITS == pytest.approx(0.5, abs=0.005)
    assert not np.array_equal(drawn[:100], stream(bytes(32), 100, BITS))


def test_fixed_point() -> None:
    values = np.array([0.0, 1.5, -1.5, 2.0**-24, -(2.0**-24), 1000.25, -1000.25])
    assert np.array_equal(decode(encode(values, 4)), values)
    both = (encode(values, 4) + encode(-2 * values, 4)) & np.uint64(2**BITS - 1)
    assert np.array_equal(decode(both), -values)
    for wrong in (np.inf, np.nan, 2.0**22):
        with pytest.raises(ConsilienceError, match="or larger"):
            encode(np.array([wrong]), 4)


def result(name: str, secure: float | None = 0.6, **more: Any) -> Result:
    options = {"local_steps": 2, **more.pop("options", {})}
    privacy = Privacy(secure=secure)
    kept = {"rounds": 3, "model": "mlp:8", "executor": "serial", "eval_clients_every": 0, **more}
    return run(make(name, options), helpers.federation(), privacy=privacy, **kept)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "scaffold", "fedrep"])
def test_a_method_gets_its_weighted_sums(name: str) -> None:
    plain, secret = result(name, None), result(name)
    for a, b in zip(tr.tensors(plain.server), tr.tensors(secret.server), strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)
    assert "train_loss" not in secret.history[-1]


def test_lost_clients_are_made_up_for_and_bytes_are_counted() -> None:
    drops = {"drops": 0.25, "rounds": 2, "seed": 3, "participation": 5}
    plain, secret = result("fedavg", None, **drops), result("fedavg", **drops)
    for a, b in zip(tr.tensors(plain.server), tr.tensors(secret.server), strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)
    with pytest.raises(ConsilienceError, match="are needed"):
        result("fedavg", 1.0, **drops)
    whole = result("fedavg", rounds=1)
    numbers = 5 * 8 + 8 + 8 * 3 + 3
    assert whole.history[-1]["bytes_up"] == 5 * (6 * numbers + 2 * 32 + 5 * 148 + 5 * 66)


def test_what_cannot_be_summed_is_refused() -> None:
    for name, more, why in (
        ("fednova", {}, "not only their sum"), ("fedavg", {"schedule": "buffered:2"}, "--schedule rounds"),
        ("fedavg", {"participation": 1}, "hides nothing"),
    ):  # fmt: skip
        with pytest.raises((NeedsError, ConfigError), match=why):
            result(name, **more)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--secure"):
        Privacy(secure=0.5)
    with pytest.raises(ConsilienceError, match="are needed"):
        Secret(make("fedavg", {}), 1.0, {}, 0, lambda client: 1).sum({1: np.zeros(1, dtype=np.uint64)}, [1, 2], 2, 0)
