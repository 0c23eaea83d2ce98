"""Secret sums: exact at every number of lost clients, refused beyond, and nothing but sums."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from consilience.core import tree as tr
from consilience.core.errors import ConfigError, ConsilienceError, NeedsError
from consilience.core.messages import DeltaUpdate
from consilience.methods import make
from consilience.privacy.central import Central, State
from consilience.privacy.clip import Clip, clipped
from consilience.privacy.ledger import Ledger
from consilience.privacy.mechanism import Fixed
from consilience.privacy.numbers import BITS, Simulated, Wanted, decode, encode, rounding, threshold
from consilience.privacy.options import Privacy
from consilience.privacy.protocol import Client, Unmask, stream, total
from consilience.privacy.secret import Secret
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
        with pytest.raises(ConsilienceError, match="it has no secret sum"):
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


def test_a_number_that_is_too_large_costs_its_client(tmp_path: Path) -> None:
    """Not the round, and not its state: it is as if it had not answered."""
    found = run(
        make("scaffold", {"local_steps": 2, "weights": "uniform"}), helpers.federation(), model="mlp:8", rounds=2,
        executor="serial", eval_clients_every=0, privacy=Privacy(secure=0.6), attack="gaussian:0.2:1e9",
        out=tmp_path / "run",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "refused.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert len({line["client"] for line in lines}) == 1
    assert "it has no secret sum" in lines[0]["reason"]
    assert all(torch.isfinite(leaf).all() for leaf in tr.tensors(found.server))
    assert lines[0]["client"] not in found.snapshot.states


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
        Simulated(0).sum(Wanted({}, [], [1, 2], 1, 1.0, 0))


# --- with differential privacy ---------------------------------------------------------------------------------


def both(noise: float | None = 0.0, **more: Any) -> Result:
    """Four of six clients a round, secret sums with noise."""
    private = Privacy(**{"noise": noise, "clip": "0.5", "mechanism": "fixed", "secure": 0.6, **more.pop("privacy", {})})
    options: dict[str, Any] = {"participation": 4, "rounds": 2, "executor": "serial", "eval_clients_every": 0, **more}
    return run(make("fedavg", {}), helpers.federation([8] * 6), model=helpers.LINEAR, privacy=private, **options)


def params(result: Result) -> torch.Tensor:
    return torch.cat([p.double().flatten() for p in result.server.model.params.values()])


def test_private_sums_may_be_secret_as_well() -> None:
    """Without noise the sums are those of the clipped updates, but for rounding; with it the cost is the same."""
    secret, seen = both(), both(privacy={"secure": None})
    assert 0 < float((params(secret) - params(seen)).abs().max()) < 1e-6
    last = both(noise=None, privacy={"epsilon": 5.0, "delta": 1e-3}).history[-1]["privacy"]
    alone = both(noise=None, privacy={"epsilon": 5.0, "delta": 1e-3, "secure": None}).history[-1]["privacy"]
    assert last.pop("secure") == 0.6
    assert last == alone


@pytest.mark.parametrize("clip", ["adaptive:0.5:0.1", "layers:0.2", "0.1"])
def test_such_a_run_has_the_same_bits_anywhere(clip: str) -> None:
    once = both(noise=0.7, privacy={"clip": clip})
    assert both(noise=0.7, privacy={"clip": clip}, executor="processes", workers=2).digest == once.digest
    seen = both(noise=0.7, privacy={"clip": clip, "secure": None})
    assert once.history[-1]["bytes_up"] != seen.history[-1]["bytes_up"]


def test_the_noise_of_a_secret_sum_is_added_once() -> None:
    """One round: what noise adds to the sum has standard deviation z C / m, whoever was lost."""
    method = make("fedavg", {"form": "delta", "weights": "uniform"})
    template = {"delta": {"p": torch.zeros(4000)}, "buffers": {}}
    masked = Secret(method, 0.5, template, Simulated(0), lambda client: 1)
    made = {
        noise: Central(
            DeltaUpdate, Fixed(6, 4, 3), Clip("flat", 0.5), noise, 1e-5, {"delta": 0.25, "buffers": 0.25}, template,
            Ledger(), "secret", None, masked,
        )
        for noise in (0.0, 2.0)
    }  # fmt: skip
    rng = np.random.default_rng(0)
    sent = [
        helpers.reply(i, DeltaUpdate({"p": torch.from_numpy(rng.standard_normal(4000)).float()}, {})) for i in range(4)
    ]
    for left in (sent, sent[:3], sent[1:3]):
        plain, noised = (c(left, [0, 1, 2, 3], 0, c.init()).update.delta["p"] for c in made.values())
        naive = sum(r.update.delta["p"].double() / float(r.update.delta["p"].double().norm()) for r in left) * 0.5 / 4
        torch.testing.assert_close(plain.double(), naive, rtol=0, atol=1e-7)
        assert float((noised - plain).std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.05)
    with pytest.raises(ConsilienceError, match="1 of 4 clients left, 2 are needed"):
        made[2.0](sent[:1], [0, 1, 2, 3], 0, State(0.5))


def test_rounding_makes_nobody_longer_than_the_bound() -> None:
    rng = np.random.default_rng(1)
    for size, norm in ((1, 1e-3), (1000, 1e-2), (5000, 1.0)):
        u = torch.from_numpy(rng.standard_normal(size)) * 100
        (short,), _ = clipped([u], Clip("flat", norm), norm - rounding(size))
        coded = decode(encode(short.numpy(), 5))
        assert float(np.linalg.norm(coded)) <= norm
        assert float(np.linalg.norm(coded - short.numpy())) <= rounding(size)


def test_a_bound_below_rounding_and_cohorts_of_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="give fixed or tree"):
        Privacy(noise=1.0, secure=0.7)
    with pytest.raises(ConsilienceError, match="lost in the rounding"):
        both(noise=1.0, privacy={"clip": "1e-9"})
    with pytest.raises(ConfigError, match="one client's update hides nothing"):
        both(noise=1.0, participation=1)


@pytest.mark.parametrize(("share", "asked", "needed"), [(0.56, 25, 14), (0.55, 100, 55), (0.6, 5, 3), (0.51, 3, 2)])
def test_the_share_is_taken_as_it_reads(share: float, asked: int, needed: int) -> None:
    assert threshold(share, asked) == needed
