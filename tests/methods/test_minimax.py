"""Games and minimax problems: local GDA and MASHA against loops in NumPy, and against solutions that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import here
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience
from consilience import methods
from consilience.core import tree as tr
from consilience.core.errors import ConfigError, ConsilienceError, NeedsError
from consilience.core.federation import Federation, Task
from consilience.core.model import Architecture
from consilience.core.streams import Streams, philox
from consilience.data.games import Field
from consilience.methods import FedAvg, LocalGDA, Masha1, Masha2
from consilience.methods.masha import Down
from consilience.models import factory
from consilience.models.players import Opposed, Players
from tests.helpers import LINEAR, NORMED, federation, vector, worker

N, LR = 4, 0.25
PLAYERS = Architecture("players", Players, (5, 7), 10, torch.float64)
WHOLE: dict[str, Any] = {"batch_size": 80, "local_steps": 1, "lr": LR}


class Game:
    """The clients' operators F_c(z) = m_c z + s_c, by hand."""

    def __init__(self, mu: float = 1.0, spread: float = 1.0, seed: int = 0) -> None:
        self.fed: Federation = consilience.make_federation(f"bilinear:{mu}:{spread}", clients=N, seed=seed)
        self.m, self.s = [], []
        for c in range(N):
            mean = self.fed.data(c).train.x.double().numpy().mean(0)
            a, left, right = mean[:, :5], mean[:, 5], mean[:, 6]
            self.m.append(np.block([[mu * np.eye(5), a], [-a.T, mu * np.eye(5)]]))
            self.s.append(np.concatenate([left, right]))

    def field(self, c: int, z: np.ndarray) -> np.ndarray:
        return np.asarray(self.m[c] @ z + self.s[c])

    def mean(self, z: np.ndarray) -> np.ndarray:
        return np.asarray(np.mean([self.field(c, z) for c in range(N)], axis=0))

    @property
    def best(self) -> np.ndarray:
        return np.linalg.solve(np.mean(self.m, axis=0), -np.mean(self.s, axis=0))


@pytest.fixture(scope="module")
def game() -> Game:
    return Game()


def run(method: Any, fed: Federation, rounds: int, model: Any = PLAYERS, **options: Any) -> consilience.Result:
    usual = {"executor": "serial", "eval_every": rounds, "eval_clients_every": 0}
    return consilience.run(method, fed, model=model, rounds=rounds, **{**usual, **options})


def end(result: consilience.Result) -> np.ndarray:
    own = getattr(result.server, "server", result.server)
    return vector(own.model.params).numpy()


def start() -> np.ndarray:
    return vector(PLAYERS.initial(0).params).numpy()


# --- the problems ----------------------------------------------------------------------------------------------


def test_the_solution_of_the_game_is_what_its_rows_are_judged_by(game: Game) -> None:
    np.testing.assert_allclose(game.fed.about["solution"], game.best, rtol=1e-9)
    assert np.linalg.norm(game.mean(np.array(game.fed.about["solution"]))) < 1e-12
    assert min(np.linalg.norm(game.field(c, game.best)) for c in range(N)) > 0.5
    found = run(FedAvg(), game.fed, 2)
    wanted = 0.5 * np.square(end(found) - game.best).sum()
    assert found.history[-1]["global"]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_game_is_for_its_players_and_for_methods_without_a_loss(game: Game) -> None:
    with pytest.raises(ConsilienceError, match="--model players"):
        run(FedAvg(), game.fed, 1, model="mlp")
    with pytest.raises(ConfigError, match="players are for the rows of a game"):
        run(FedAvg(), federation(), 1, model="players")
    with pytest.raises(NeedsError, match="a task with a loss"):
        run(methods.get("scool")(), game.fed, 1)
    with pytest.raises(ConfigError, match="MU:SPREAD"):
        consilience.make_federation("bilinear:1")
    fed = federation()
    fed.task = Task("regression", 1, operator=Silent())
    with pytest.raises(ConfigError, match="nothing of parameter 'head"):
        run(FedAvg(), fed, 1, model=LINEAR)


class Silent(Field):
    """Says nothing of a bias."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def __call__(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"head.weight": model.head.weight}


@pytest.mark.parametrize("rho", [0.5, 3.0])
def test_an_adversary_climbs_and_is_not_deployed(rho: float) -> None:
    torch.manual_seed(0)
    plain = factory("mlp:6")((5,), 3)
    model = factory(f"mlp:6+adversary:{rho}")((5,), 3)
    assert isinstance(model, Opposed)
    inner = {name.replace("features.", "features.inner."): p for name, p in plain.state_dict().items()}
    model.load_state_dict(inner, strict=False)
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    shift = torch.randn(5, requires_grad=True)
    model.features.shift.data.copy_(shift)  # type: ignore[union-attr, operator]
    value = torch.nn.functional.cross_entropy(plain(x + shift), y)
    wanted = torch.autograd.grad(value, [shift, *plain.parameters()])
    found = dict(zip(*zip(*model.named_parameters(), strict=True), strict=True))
    got = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), list(found.values()))
    by_name = dict(zip(found, got, strict=True))
    torch.testing.assert_close(by_name["features.shift"], rho * shift.detach() - wanted[0])
    for (name, _), g in zip(plain.named_parameters(), wanted[1:], strict=True):
        torch.testing.assert_close(by_name[name.replace("features.", "features.inner.")], g)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("model", ["linear", "logistic"])
def test_robust_regression_ends_at_its_saddle(model: str) -> None:
    """GDA with one step a round: where it ends, w' residual is 0 and delta is what climbing would give: not 0 unless
    the model has an intercept to take it back."""
    fed = federation((12, 12, 12), regression=True, dtype=torch.float64)
    parts = []
    for part in fed.parts:
        x = (part.train.x - part.train.x.mean(0)) / part.train.x.std(0)
        parts.append(replace(part, train=replace(part.train, x=x, y=part.train.y / 10)))
    fed.parts = parts
    opposed = Architecture("robust", factory(f"{model}+adversary:6"), (5,), 1, torch.float64)
    params = run(FedAvg(weights="uniform", **WHOLE), fed, 400, model=opposed).server.model.params
    w, delta = (params[n].numpy().reshape(-1) for n in ("head.weight", "features.shift"))
    b = float(params["head.bias"]) if model == "logistic" else 0.0
    residual_w, residual_d = np.zeros(5), 6 * delta
    for part in fed.parts:
        x, y = part.train.x.numpy() + delta, part.train.y.numpy()
        r = x @ w + b - y
        residual_w, residual_d = residual_w + x.T @ r / len(r) / 3, residual_d - w * r.mean() / 3
    assert np.abs(residual_w).max() < 1e-6
    assert np.abs(residual_d).max() < 1e-6
    assert bool(np.linalg.norm(delta) > 1e-2) is (model == "linear")


def test_an_adversary_runs_in_step_with_others() -> None:
    usual: dict[str, Any] = {"model": "mlp:6+adversary", "rounds": 1, "eval_clients_every": 0}
    alone, beside = (
        consilience.run(FedAvg(local_steps=1), federation(), executor=e, **usual) for e in ("serial", "stacked")
    )
    torch.testing.assert_close(vector(beside.server.model), vector(alone.server.model), rtol=0, atol=1e-6)
    assert alone.server.model.params["features.shift"].abs().max() > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mlp+adversary:0", "above 0"), ("mlp+adversary:x", "above 0"), ("mlp+adversary@0.5", "no nested"),
        ("nope+adversary", "unknown model"),
    ],
)  # fmt: skip
def test_wrong_adversaries_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(FedAvg(), federation(), 1, model=name)


# --- local GDA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_gda_is_fedavg_bit_for_bit(weights: Any) -> None:
    usual: dict[str, Any] = {"weights": weights, "batch_size": 4, "momentum": 0.5}
    plain = run(FedAvg(**usual), federation(), 3, model=NORMED)
    found = run(LocalGDA(variant="gda", **usual), federation(), 3, model=NORMED)
    assert tr.digest(found.server) == tr.digest(plain.server)


def test_proxskip_by_hand(game: Game) -> None:
    found = run(LocalGDA(**WHOLE, p=0.3), game.fed, 25)
    x, h, counts = start(), np.zeros((N, 10)), []
    for version in range(25):
        counts.append(int(Streams(0).rng("shared", "localgda", version).geometric(0.3)))
        own = np.tile(x, (N, 1))
        for _ in range(counts[-1]):
            own = own - LR * (np.stack([game.field(c, own[c]) for c in range(N)]) - h)
        sent = own - LR / 0.3 * h
        x = sent.mean(0)
        h = h + 0.3 / LR * (x - own)
    assert len(set(counts)) > 3
    np.testing.assert_allclose(end(found), x, rtol=1e-10, atol=1e-12)
    held = [0.3 / LR * (end(found) - vector(found.states[c].sent).numpy()) for c in range(N)]
    np.testing.assert_allclose(held, h, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(np.sum(held, axis=0), 0, atol=1e-12)
    steps = sum(counts)
    assert found.history[-1]["samples"] == N * 80 * steps


def test_gt_and_eg_by_hand(game: Game) -> None:
    usual = {**WHOLE, "local_steps": 3, "lr": 0.1}
    gt, eg = (run(LocalGDA(variant=v, **usual), game.fed, 8) for v in ("gt", "eg"))
    x = y = start()
    for _ in range(8):
        own, other = np.tile(x, (N, 1)), np.tile(y, (N, 1))
        for _ in range(3):
            move = [game.field(c, own[c]) - game.field(c, x) + game.mean(x) for c in range(N)]
            own = own - 0.1 * np.stack(move)
            half = [other[c] - 0.1 * game.field(c, other[c]) for c in range(N)]
            other = other - 0.1 * np.stack([game.field(c, half[c]) for c in range(N)])
        x, y = own.mean(0), other.mean(0)
    np.testing.assert_allclose(end(gt), x, rtol=1e-10)
    np.testing.assert_allclose(end(eg), y, rtol=1e-10)


def test_only_corrected_forms_find_the_solution_and_linearly(game: Game) -> None:
    """Local GDA ends where its own map does; at the solution of the others h_i = F_i."""
    usual = {**WHOLE, "local_steps": 4, "lr": 0.1}
    gda = run(LocalGDA(variant="gda", **usual), game.fed, 150)
    one = np.eye(10)
    powers = [np.linalg.matrix_power(one - 0.1 * m, 4) for m in game.m]
    own = [np.linalg.solve(m, -s) for m, s in zip(game.m, game.s, strict=True)]
    moved = np.mean([(one - p) @ z for p, z in zip(powers, own, strict=True)], axis=0)
    stays = np.linalg.solve(one - np.mean(powers, axis=0), moved)
    np.testing.assert_allclose(end(gda), stays, rtol=1e-6)
    assert np.linalg.norm(stays - game.best) > 1e-2
    gt = run(LocalGDA(variant="gt", **usual), game.fed, 150)
    skips = run(LocalGDA(**{**WHOLE, "lr": 0.1}, p=0.25), game.fed, 250)
    for found in (gt, skips):
        np.testing.assert_allclose(end(found), game.best, rtol=0, atol=1e-8)
    for c in range(N):
        held = 2.5 * (end(skips) - vector(skips.states[c].sent).numpy())
        np.testing.assert_allclose(held, game.field(c, game.best), atol=1e-6)
    far = [np.linalg.norm(end(run(LocalGDA(variant="gt", **usual), game.fed, r)) - game.best) for r in (15, 30, 45)]
    assert np.log(far[1] / far[0]) == pytest.approx(np.log(far[2] / far[1]), rel=0.15)


def test_variance_reduction_takes_the_noise_of_batches_away(game: Game) -> None:
    noisy: dict[str, Any] = {"batch_size": 10, "lr": 0.1, "p": 0.25}
    svrg, plain = (run(LocalGDA(variant=v, **noisy), game.fed, 250) for v in ("svrg", "proxskip"))
    assert np.linalg.norm(end(svrg) - game.best) < 1e-6
    assert np.linalg.norm(end(plain) - game.best) > 1e-3
    never = run(LocalGDA(variant="svrg", q=0.0, **noisy), game.fed, 3)
    assert {tr.digest(s.anchor.point) for s in never.states.values()} == {tr.digest(PLAYERS.initial(0).params)}


def test_on_a_loss_it_is_minimisation() -> None:
    """ProxSkip on quadratics of clients of very different sizes: the minimiser of the mean, uniform or by samples."""
    fed = consilience.make_federation("quadratic:1", clients=3)
    model = Architecture("linear", factory("logistic"), (10,), 1, torch.float64)
    found = run(LocalGDA(batch_size=80, lr=0.3, p=0.3), fed, 500, model=model)
    best = fed.about["optimum"]
    np.testing.assert_allclose(end(found), [*best["weight"][0], *best["bias"]], atol=1e-6)


# --- MASHA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Masha1, Masha2])
def test_without_compression_and_with_a_refresh_each_round_it_is_extragradient(game: Game, cls: Any) -> None:
    found = run(cls(**WHOLE, refresh=1.0, compress="identity", compress_down="identity"), game.fed, 20)
    z = start()
    for _ in range(20):
        z = z - LR * game.mean(z - LR * game.mean(z))
    np.testing.assert_allclose(end(found), z, rtol=1e-10)


def top(v: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(v)
    index = np.argsort(-np.abs(v))[:k]
    kept[index] = v[index]
    return kept


def test_masha2_is_algorithm_2(game: Game) -> None:
    """Top-3 of 10 up and top-5 down with error feedback; only the coins are the library's."""
    method = Masha2(**{**WHOLE, "lr": 0.1}, refresh=0.3, compress="ef:topk:0.3", compress_down="topk:0.5")
    found = run(method, game.fed, 40)
    z, e, back, coins = start(), np.zeros((N, 10)), np.zeros(10), 0
    w, full = z, game.mean(z)
    for version in range(40):
        if philox(0, "coin", "refresh", version).random() < 0.3:
            w, full, coins = z, game.mean(z), coins + 1
        half = 0.7 * z + 0.3 * w - 0.1 * full
        sent = []
        for c in range(N):
            v = 0.1 * (game.field(c, half) - game.field(c, w)) + e[c]
            sent.append(top(v, 3))
            e[c] = v - sent[-1]
        u = np.mean(sent, axis=0) + back
        r = top(u, 5)
        back, z = u - r, half - r
    assert 5 < coins < 20
    np.testing.assert_allclose(end(found), z, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "method",
    [
        Masha1(batch_size=80, local_steps=1, lr=0.1, refresh=0.3, compress="randk:0.4", compress_down="randk:0.6"),
        Masha1(batch_size=80, local_steps=1, lr=0.1, refresh=0.3, compress="qsgd:4", compress_down="identity"),
        Masha2(batch_size=80, local_steps=1, lr=0.1, refresh=0.3, compress="ef:topk:0.3", compress_down="topk:0.5"),
    ],
    ids=["randk", "qsgd", "topk"],
)
def test_with_compression_it_finds_the_solution(game: Game, method: Any) -> None:
    """Linearly, with any noise of compressors gone at the end; clients have the server's z bit for bit."""
    found = run(method, game.fed, 300)
    assert np.linalg.norm(end(found) - game.best) < 1e-4
    server = found.server.server if hasattr(found.server, "server") else found.server
    for c in range(N):
        state = getattr(found.states[c], "own", found.states[c])
        site = worker(method, game.fed, PLAYERS).site(_job(c))[0]
        heard = Masha1._heard(method, site, Down(server.step, None), state)
        assert tr.digest(heard.params) == tr.digest(server.model.params)


def _job(client: int) -> Any:
    from consilience.core.messages import Job

    return Job(0, client, 301, 300, 300, 2)


@pytest.mark.slow
def test_on_a_bilinear_game_compressed_gda_spirals_away() -> None:
    game = Game(mu=0.0, spread=0.3, seed=1)
    usual: dict[str, Any] = {"batch_size": 80, "local_steps": 1, "lr": 0.1}
    near = np.linalg.norm(start() - game.best)
    gda = run(FedAvg(compress="randk:0.5", form="delta", weights="uniform", **usual), game.fed, 150)
    masha = run(Masha1(compress="randk:0.5", compress_down="identity", refresh=0.5, **usual), game.fed, 600)
    assert np.linalg.norm(end(gda) - game.best) > 2 * near
    assert np.linalg.norm(end(masha) - game.best) < 0.5 * near


def test_compression_saves_bytes_both_ways() -> None:
    usual: dict[str, Any] = {"batch_size": 20, "refresh": 0.1}
    rows = {}
    for name, fields in {"whole": {"compress": "identity", "compress_down": "identity"}, "tenth": {}}.items():
        rows[name] = run(Masha1(**usual, **fields), federation(), 10, model="mlp:64").history[-1]
    assert rows["tenth"]["bytes_up"] < 0.6 * rows["whole"]["bytes_up"]
    assert rows["tenth"]["bytes_down"] < 0.6 * rows["whole"]["bytes_down"]


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (Masha1, {"compress": "topk:0.1"}, "unbiased"), (Masha1, {"compress": "ef:randk:0.1"}, "unbiased"),
        (Masha1, {"compress_down": "sign"}, "unbiased"), (Masha2, {"compress": "topk:0.1"}, "errors are fed back"),
        (Masha2, {"compress_down": "ef:topk:0.1"}, "unknown compressor"), (Masha1, {"refresh": 0}, "refresh"),
        (LocalGDA, {"p": 0}, "p=0"), (LocalGDA, {"variant": "x"}, "variant"),
        (LocalGDA, {"compress": "topk:0.1"}, "use compress=identity"),
        (LocalGDA, {"variant": "svrg", "compress_down": "topk:0.1"}, "use compress_down=identity"),
        (LocalGDA, {"client_momentum": 0.9}, "use client_momentum=0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cls(**options)


@pytest.mark.parametrize("method", [LocalGDA(), Masha1(), Masha2()])
def test_everybody_takes_part(method: Any) -> None:
    with pytest.raises(ConfigError, match="every client in every round"):
        run(method, federation(), 1, model=LINEAR, participation=3)


@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 50),
    weights=st.sampled_from(["samples", "uniform"]),
    variant=st.sampled_from(["proxskip", "svrg"]),
)
def test_controls_sum_to_nothing(seed: int, weights: Any, variant: Any) -> None:
    fed = federation(dtype=torch.float64)
    model = Architecture("linear", factory("logistic"), (5,), 3, torch.float64)
    found = run(LocalGDA(variant=variant, weights=weights, batch_size=4, p=0.5), fed, 4, model=model, seed=seed)
    shares = np.array([fed.size(c) for c in range(5)]) if weights == "samples" else np.ones(5)
    held = [end(found) - vector(found.states[c].sent).numpy() for c in range(5)]
    assert np.abs(held).max() > 1e-3
    np.testing.assert_allclose(shares @ np.array(held) / shares.sum(), 0, atol=1e-13)


def test_games_from_the_command_line(tmp_path: Path) -> None:
    game = ["run", "masha1", "--data", "bilinear", "--rounds", "2", "--executor", "serial"]
    done = here(*game, "--model", "players", "--out", "game", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "game/history.jsonl").read_text().splitlines()[-1])["global"]["loss"] > 0
    refused = here(*game, "--out", "none", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "consilience: data 'bilinear' is a game of two players; use --model players\n"
    assert not (tmp_path / "none").exists()
