"""FAL and what it is judged by: the worst inputs nearby, found by gradients and by questions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NORMED, federation, site, worker

import consilience
from consilience.core.errors import ConfigError
from consilience.core.federation import Split
from consilience.measure import adversarial
from consilience.measure.adversarial import Nearby, parse, robustness, share_of_square, square_inputs
from consilience.methods import FAL, FedAvg
from consilience.parts.adversarial import Bounds, parse_bounds, worst

DIGITS: dict[str, Any] = {"model": "mlp:32", "executor": "serial", "eval_clients_every": 0}


def test_without_an_adversary_it_is_fedavg() -> None:
    fed = consilience.make_federation("digits", clients=3, seed=0)
    plain = consilience.run(FedAvg(weights="uniform"), fed, rounds=2, **DIGITS)
    for method in (FAL(eps=0.0), FAL(attack_steps=0)):
        found = consilience.run(method, fed, rounds=2, **DIGITS)
        assert found.digest == plain.digest
    assert consilience.run(FAL(attack_steps=1), fed, rounds=2, **DIGITS).digest != plain.digest


def test_its_gradients_are_counted() -> None:
    fed = consilience.make_federation("digits", clients=3, seed=0)
    plain = consilience.run(FedAvg(), fed, rounds=1, **DIGITS).history[-1]
    found = consilience.run(FAL(attack_steps=3), fed, rounds=1, **DIGITS).history[-1]
    assert found["samples"] == 4 * plain["samples"]
    assert found["flops"] == pytest.approx(4 * plain["flops"])


def test_of_a_linear_model_the_worst_input_is_found_in_a_step() -> None:
    rng = np.random.default_rng(0)
    w, x = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((6,), (9, 6)))
    y = torch.from_numpy(rng.integers(0, 2, 9) * 2.0 - 1)
    start = torch.from_numpy(rng.uniform(-0.3, 0.3, (9, 6)))
    found = worst(
        lambda u: torch.nn.functional.softplus(-y * (u @ w)), x, start, eps=0.3, size=0.6, steps=1, bounds=Bounds()
    )
    torch.testing.assert_close(found, x - 0.3 * y[:, None] * w.sign())


def test_steps_are_those_of_the_definition_and_stay_in_the_box() -> None:
    rng = np.random.default_rng(1)
    x, start = (torch.from_numpy(rng.uniform(0, 1, (5, 4))) for _ in range(2))
    start, bounds = 0.2 * (2 * start - 1), Bounds(0.0, 1.0)

    def losses(u: torch.Tensor) -> torch.Tensor:
        return (u**3 - u).sin().sum(1)

    naive = np.clip(np.clip(x.numpy() + start.numpy(), x.numpy() - 0.2, x.numpy() + 0.2), 0, 1)
    for _ in range(7):
        slope = np.cos(naive**3 - naive) * (3 * naive**2 - 1)
        naive = np.clip(np.clip(naive + 0.05 * np.sign(slope), x.numpy() - 0.2, x.numpy() + 0.2), 0, 1)
    found = worst(losses, x, start, eps=0.2, size=0.05, steps=7, bounds=bounds)
    np.testing.assert_allclose(found, naive, atol=1e-12)
    outside = torch.tensor([[3.0, -2.0]], dtype=torch.float64)  # such rows are still within eps of themselves
    moved = worst(losses, outside, torch.zeros(1, 2), eps=0.1, size=0.1, steps=3, bounds=bounds)
    assert (moved - outside).abs().max() <= 0.1 + 1e-12


def test_the_inner_loop_moves_no_statistics() -> None:
    """BatchNorm has seen as many batches as there were steps, whatever the adversary asked."""
    seen = []
    for steps in (0, 3):
        at = worker(FAL(attack_steps=steps, batch_size=4, local_steps=2, form="delta"), federation(), NORMED)
        start = at.method.broadcast(at.program[0], at.method.init_server(at.host(0, "init")), None)  # type: ignore[arg-type]
        update, _ = at.method.client_update(at.program[0], site(at), start, None)
        seen.append([int(b) for name, b in update.buffers.items() if name.endswith("num_batches_tracked")])
    assert seen[0] == seen[1]
    assert seen[0]
    assert set(seen[0]) == {2}


@pytest.mark.parametrize("bad", ["x", "1:0", "0", "0:1:2", "nan:1", "1:1"])
def test_bounds_that_make_no_sense(bad: str) -> None:
    with pytest.raises(ConfigError, match="bounds"):
        FAL(bounds=bad)
    assert parse_bounds("-1:1") == Bounds(-1.0, 1.0)


# --- measures --------------------------------------------------------------------------------------------------


def test_square_finds_what_a_linear_model_gives_away() -> None:
    """Of a model that looks at the sum of one channel alone, the worst image is known."""
    x = torch.full((3, 2, 6, 6), 0.5)

    def scores(u: torch.Tensor) -> torch.Tensor:
        total = u[:, 1].sum((1, 2)) - 18.0
        return torch.stack([total + torch.tensor([1.0, 2.0, 3.3]), torch.zeros(3)], 1)

    y = torch.zeros(3, dtype=torch.int64)
    found = square_inputs(scores, x, y, 0.1, 2000, Bounds(0.0, 1.0), np.random.default_rng(0))
    assert (found - x).abs().max() <= 0.1 + 1e-6
    margins = scores(found)
    assert (margins.argmax(1) == 1).all()
    np.testing.assert_allclose(margins[:, 0], [1.0 - 3.6, 2.0 - 3.6, 3.3 - 3.6], atol=1e-4)


def test_squares_get_smaller() -> None:
    shares = [share_of_square(q, 10_000) for q in (1, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    assert shares == [0.8 / 2**k for k in range(10)]
    assert share_of_square(11, 100) == share_of_square(1100, 10_000)


def test_adversarial_training_pays_on_the_worst_inputs() -> None:
    """The claim, on digits: under both attacks a model trained on the worst inputs is right more often."""
    fed = consilience.make_federation("digits", clients=3, seed=0)
    usual: dict[str, Any] = {**DIGITS, "rounds": 12}
    plain = consilience.run(FedAvg(lr=0.2, batch_size=16), fed, **usual)
    hard = consilience.run(FAL(lr=0.2, batch_size=16, eps=0.15, attack_size=0.05, bounds="0:1"), fed, **usual)
    before, after = (robustness(run, 0.15, queries=150) for run in (plain, hard))
    for found in (before, after):
        assert found.both <= min(found.pgd, found.square) <= max(found.pgd, found.square) <= found.clean
    assert after.pgd > before.pgd + 0.1
    assert after.square > before.square
    assert before == robustness(plain, 0.15, queries=150)
    assert robustness(plain, 0.0, steps=1, restarts=1, queries=2).both == pytest.approx(before.clean)
    assert before.clean == pytest.approx(plain.history[-1]["global"]["accuracy"])


def test_robustness_needs_images_and_a_global_model() -> None:
    fed = consilience.make_federation("digits", clients=3, seed=0)
    alone = consilience.run(consilience.methods.Local(), fed, rounds=1, **DIGITS)
    with pytest.raises(ConfigError, match="global model"):
        robustness(alone, 0.1)
    rows = federation()
    with pytest.raises(ConfigError, match="images"):
        robustness(consilience.run(FedAvg(), rows, model="logistic", rounds=1, executor="serial"), 0.1)
    found = consilience.run(FedAvg(), fed, rounds=1, **DIGITS)
    with pytest.raises(ConfigError, match="given rows"):
        robustness(found, 0.1, rows=Split(found.worker.federation.test.x[:0], found.worker.federation.test.y[:0]))
    with pytest.raises(ConfigError, match="eps"):
        robustness(consilience.run(FedAvg(), fed, rounds=1, **DIGITS), -1.0)
    some = Split(fed.test.x[:5], fed.test.y[:5])
    assert robustness(consilience.run(FedAvg(), fed, rounds=1, **DIGITS), 0.1, rows=some, queries=5).rows == 5


# --- --robustness ----------------------------------------------------------------------------------------------


@pytest.fixture
def few() -> consilience.Federation:
    """Digits with 12 rows to be judged on."""
    raw = consilience.data.load("digits")
    return consilience.data.from_arrays(raw.x[:200], raw.y[:200], test=(raw.x[200:212], raw.y[200:212]), clients=2)


def test_a_run_ends_with_it_whatever_ran_it(few: consilience.Federation, tmp_path: Path) -> None:
    usual: dict[str, Any] = {"model": "mlp:32", "rounds": 3, "seed": 5, "eval_clients_every": 0}
    usual |= {"robustness": "0.05", "checkpoint_every": 1}
    method = FedAvg(lr=0.2, batch_size=16, local_epochs=5)
    whole = consilience.run(method, few, executor="serial", **usual)
    found = whole.history[-1]["robustness"]
    assert found == {"eps": 0.05, **asdict(robustness(whole, 0.05, seed=5))}
    assert found["rows"] == 12
    assert 0 < found["both"] < found["clean"]
    assert all("robustness" not in line for line in whole.history[:-1])
    other = consilience.run(method, few, executor="processes", workers=2, **usual)
    assert other.digest == whole.digest

    def stop(line: dict[str, Any]) -> None:
        if line["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consilience.run(method, few, executor="serial", out=tmp_path / "run", on_line=stop, **usual)
    again = consilience.run(method, few, executor="serial", out=tmp_path / "run", resume=True, **usual)
    assert again.digest == whole.digest
    without = consilience.run(method, few, executor="serial", **{**usual, "robustness": None})
    assert without.digest.splitlines()[:2] == whole.digest.splitlines()[:2]


def test_of_many_rows_some_are_drawn(few: consilience.Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "MOST", 5)
    line = consilience.run(FedAvg(), few, rounds=1, robustness="0.1:none", **DIGITS).history[-1]
    assert line["robustness"]["rows"] == 5
    assert 5 * line["robustness"]["clean"] == pytest.approx(round(5 * line["robustness"]["clean"]))


def test_what_may_be_asked() -> None:
    assert parse(None) is None
    assert parse("0.1") == Nearby(0.1, "0:1")
    assert parse("3:none") == Nearby(3.0, "none")
    assert parse("1.5:-1:1") == Nearby(1.5, "-1:1")
    for bad in ("0", "x", "-1", "nan", "inf:none", "2", "0.1:1:0", "0.1:x", ""):
        with pytest.raises(ConfigError, match="EPS"):
            parse(bad)


def test_what_cannot_be_judged_is_refused_before_the_run(few: consilience.Federation, tmp_path: Path) -> None:
    def refused(words: str, method: Any, fed: consilience.Federation, **options: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            consilience.run(method, fed, rounds=1, robustness="0.1", out=tmp_path / "none", **{**DIGITS, **options})

    refused("local with these options has none", consilience.methods.Local(), few)
    refused("this task is a regression", FedAvg(), consilience.make_federation("quadratic", clients=2))
    refused("on images", FedAvg(), federation(), model="logistic")
    few.test = None
    refused("global test set", FedAvg(), few)
    assert not (tmp_path / "none").exists()


def test_a_model_that_is_there_at_the_end_alone_is_judged(few: consilience.Federation) -> None:
    found = consilience.run(consilience.methods.get("finalmerge")(), few, rounds=2, robustness="0.1", **DIGITS)
    assert found.history[-1]["robustness"]["rows"] == 12
