"""Weights by rule and aggregators by name, alone and in front of other methods."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LINEAR,
    LINEAR64,
    NOISY,
    NORMED,
    SCALAR64,
    SIZES,
    architecture,
    federation,
    loop,
    reply,
    site,
    vector,
    worker,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Broadcast, DeltaUpdate, Job, Reply
from consilience.core.method import Method
from consilience.core.model import Architecture
from consilience.core.reduce import weighted_sum
from consilience.core.snapshot import Snapshot
from consilience.methods import (
    FML,
    IDA,
    FedAdam,
    FedAU,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedCE,
    FedDisco,
    FedDyn,
    FedNova,
    FedProx,
    FedSAM,
    Moon,
    Scaffold,
)
from consilience.parts import aggregators
from consilience.parts import weights as rules
from consilience.parts.combined import Combined
from consilience.parts.compose import composed
from consilience.parts.weighed import Asked, Weighed
from consilience.parts.weights import Given

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}


def run(method: Method, rounds: int = 3, model: Architecture = NOISY, cohort: int = 3, sizes: Any = SIZES) -> Snapshot:
    fed = federation(sizes, dtype=model.dtype)
    return loop(worker(method, fed, model), rounds, cohort=cohort).snapshots[rounds]


def digest(snapshot: Snapshot) -> str:
    server = snapshot.server
    return tr.digest(getattr(server, "server", server).model)


def delta(*values: float) -> DeltaUpdate:
    return DeltaUpdate({"p": torch.tensor(values, dtype=torch.float64)}, {})


def together(name: str, rows: Any, shares: Any = None) -> list[float]:
    """What an aggregator makes of these differences."""
    how = aggregators.parse(name)
    assert how is not None
    shares = [1 / len(rows)] * len(rows) if shares is None else list(shares)
    made = how.combine([delta(*row) for row in rows], {"delta": shares, "buffers": shares})
    found: list[float] = made.delta["p"].tolist()
    return found


# --- aggregators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "upgrad", "mgda"),
    [
        ([[-4, 1, 1], [6, 1, 1]], [0.292398, 1.900585, 1.900585], [0, 1, 1]),
        ([[1, 0], [-0.5, 1]], [0.4, 0.7], [4 / 13, 6 / 13]),
        ([[1, 0], [-1, 0]], [0, 0], [0, 0]),
        ([[2, 0], [0, 3]], [1, 1.5], [18 / 13, 12 / 13]),
        ([[0, 0], [0, 0]], [0, 0], [0, 0]),
    ],
)
def test_jacobian_descent_on_known_cases(rows: Any, upgrad: Any, mgda: Any) -> None:
    assert together("upgrad", rows) == pytest.approx(upgrad, abs=1e-6)
    assert together("mgda", rows) == pytest.approx(mgda, abs=1e-6)


matrices = st.integers(0, 10**6).map(lambda seed: np.random.default_rng(seed))


@given(matrices)
def test_upgrad_conflicts_with_nobody_and_is_linear_in_scale(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((rng.integers(2, 7), rng.integers(2, 7)))
    rows *= 10.0 ** rng.uniform(-2, 2)
    found = np.array(together("upgrad", rows))
    assert (rows @ found).min() >= -1e-8 * np.abs(rows).max() ** 2
    c, d = rng.uniform(0.1, 2, (2, len(rows)))
    parts = [np.array(together("upgrad", rows * s[:, None])) for s in (c, d, c + d)]
    np.testing.assert_allclose(parts[0] + parts[1], parts[2], atol=1e-7 * np.abs(rows).max())


@given(matrices)
def test_mgda_is_the_shortest_mean(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((rng.integers(2, 7), rng.integers(2, 7)))
    found = np.array(together("mgda", rows))
    assert (rows @ found).min() >= found @ found - 1e-8  # the condition for a minimum over the hull
    for _ in range(20):
        assert np.linalg.norm(rng.dirichlet(np.ones(len(rows))) @ rows) >= np.linalg.norm(found) - 1e-9


def test_upgrad_of_updates_that_agree_is_the_mean() -> None:
    rows = np.random.default_rng(0).uniform(0.1, 1, (4, 6))
    shares = [0.1, 0.2, 0.3, 0.4]
    mean = weighted_sum([delta(*row) for row in rows], shares)
    assert together("upgrad", rows, shares) == mean.delta["p"].tolist()


@given(matrices)
def test_the_median_is_numpys_and_has_half_the_weight_on_each_side(rng: np.random.Generator) -> None:
    rows = rng.integers(-3, 4, (rng.integers(1, 8), 5)).astype(float)
    np.testing.assert_allclose(together("median", rows), np.median(rows, axis=0))
    shares = rng.dirichlet(np.ones(len(rows)))
    for column, middle in zip(rows.T, together("median", rows, shares), strict=True):
        assert shares[column < middle - 1e-12].sum() <= 0.5 + 1e-9
        assert shares[column > middle + 1e-12].sum() <= 0.5 + 1e-9


@given(matrices)
def test_the_trimmed_mean(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((rng.integers(3, 9), 4))
    share = float(rng.choice([0.1, 0.25, 0.4]))
    np.testing.assert_allclose(together(f"trimmed:{share}", rows), trim_mean(rows, share, axis=0), atol=1e-12)
    shares = rng.dirichlet(np.ones(len(rows)))
    np.testing.assert_allclose(together("trimmed:0", rows, shares), shares @ rows, atol=1e-12)


def test_the_geometric_median() -> None:
    fermat = (3 - 3**0.5) / 6
    assert together("rfa", [[0, 0], [1, 0], [0, 1]]) == pytest.approx([fermat, fermat], abs=1e-6)
    far = [[1e6 + x, 1e6 + y] for x, y in ((0, 0), (1, 0), (0, 1))]
    assert together("rfa", far) == pytest.approx([1e6 + fermat, 1e6 + fermat], abs=1e-5)
    assert together("rfa", [[2, 3], [2, 3]]) == pytest.approx([2, 3])
    assert together("rfa", [[0], [10]], [0.6, 0.4]) == pytest.approx([0], abs=1e-3)
    shifted = together("rfa", [[0, 0], [1, 0], [0, 1], [0.2, 0.3], [1e9, -1e9]])
    assert max(map(abs, shifted)) < 1.5


@pytest.mark.parametrize("name", ["median", "trimmed:0.2", "rfa"])
def test_robust_means_move_with_their_updates_and_forget_one_liar(name: str) -> None:
    rows = np.random.default_rng(1).standard_normal((7, 5))
    moved = together(name, rows + 3.0)
    np.testing.assert_allclose(moved, np.array(together(name, rows)) + 3, atol=1e-5)
    lied = rows.copy()
    lied[2] = 1e8
    assert np.abs(together(name, lied)).max() < 5


def test_sums_stay_sums() -> None:
    """A field whose weights sum to 5 gets five times what its aggregate would be."""
    for name in ("median", "trimmed:0.2", "rfa", "upgrad", "mgda"):
        how = aggregators.parse(name)
        assert how is not None
        sent = [delta(float(i), 1.0) for i in range(5)]
        one = how.combine(sent, {"delta": [0.2] * 5, "buffers": [0.2] * 5})
        five = how.combine(sent, {"delta": [1.0] * 5, "buffers": [0.2] * 5})
        np.testing.assert_allclose(five.delta["p"], 5 * one.delta["p"], rtol=1e-12)


def test_buffers_are_means_whatever_the_weights_of_differences_sum_to() -> None:
    sent = [delta(-4, 1, 1), delta(6, 1, 1)]
    sent = [u._replace(buffers={"b": torch.tensor([float(i)])}) for i, u in enumerate(sent)]
    how = aggregators.parse("upgrad")
    assert how is not None
    made = how.combine(sent, {"delta": [0.5, 0.5], "buffers": [0.5, 0.5]})
    assert made.buffers["b"].tolist() == pytest.approx([0.789474 / (1.111111 + 0.789474)], abs=1e-5)


@pytest.mark.parametrize("name", ["mediam", "trimmed", "trimmed:0.5", "trimmed:x", "median:2"])
def test_aggregators_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="aggregator"):
        composed(FedAvg(aggregator=name))


COMBINED = [FedAvg, FedProx, FedSAM, Moon, FedAvgM, FedAdam, Scaffold]


@pytest.mark.parametrize("method", COMBINED)
@pytest.mark.parametrize("form", ["model", "delta"])
def test_a_trim_of_nobody_is_the_mean_in_every_method(method: Any, form: Any) -> None:
    if form == "model" and method in (Scaffold, FedAvgM, FedAdam):
        pytest.skip("sends differences")
    plain, trimmed = (
        run(method(form=form, aggregator=name, **USUAL), model=architecture(dtype=torch.float64))
        for name in ("mean", "trimmed:0.0")
    )
    torch.testing.assert_close(vector(plain.server), vector(trimmed.server), rtol=1e-9, atol=1e-11)
    robust = run(method(form=form, aggregator="median", **USUAL), model=architecture(dtype=torch.float64))
    assert digest(robust) != digest(plain)


def test_the_round_is_the_median_of_the_clients_models() -> None:
    method = FedAvg(weights="uniform", aggregator="median", **USUAL)
    at = worker(method, model=NORMED)
    after = loop(at, 1).snapshots[1].server.model
    plain = worker(FedAvg(weights="uniform", **USUAL), model=NORMED)
    start = Broadcast(NORMED.initial(0))
    sent = [plain.method.client_update(plain.program[0], site(plain, k), start, None)[0].model for k in range(5)]
    for part in ("params", "buffers"):
        for name, found in getattr(after, part).items():
            if found.is_floating_point():
                wanted = np.median(np.stack([getattr(s, part)[name].numpy() for s in sent]), axis=0)
                np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_methods_that_combine_in_their_own_way_are_told_so() -> None:
    for method in (FedDyn(aggregator="median"), FedBuff(aggregator="rfa"), FedNova(aggregator="median")):
        with pytest.raises(ConfigError, match="combines in its own way"):
            composed(method)
    assert type(composed(FedAvg())) is FedAvg


def test_what_works_on_differences_gets_them() -> None:
    for own in ({"aggregator": "upgrad"}, {"aggregator": "mgda"}, {"weights": "fedau"}):
        assert composed(FedAvg(**own)).form == "delta"
    with pytest.raises(ConfigError, match="fml sends whole models, and aggregator=mgda works on differences"):
        composed(FML(aggregator="mgda"))


@pytest.mark.parametrize(
    ("short", "long"), [("bucketing+cclip", "bucketing:2+cclip"), ("nnm+krum", "nnm:0.2+krum:0.2")]
)
def test_what_goes_in_front_needs_no_number(short: str, long: str) -> None:
    assert aggregators.parse(short) == aggregators.parse(long)


# --- rules -----------------------------------------------------------------------------------------------------


def test_disco_without_its_terms_is_fedavg() -> None:
    plain = run(FedAvg(**USUAL))
    assert digest(run(FedDisco(a=0.0, b=0.0, **USUAL))) == digest(plain)
    assert digest(run(FedDisco(**USUAL))) != digest(plain)


@pytest.mark.parametrize("base", [FedAvg, FedProx, Scaffold, FedNova, FedAvgM, Moon])
def test_a_rule_in_front_of_a_method_gives_what_the_weights_give(base: Any, monkeypatch: Any) -> None:
    """With the rule replaced by sizes, every method is itself; with the rule it is not."""
    plain = base(**{"weights": "samples", **USUAL})

    class Sizes(rules.IDA):
        def weigh(self, host: Any, memory: Any, found: Given) -> tuple[list[float], Any]:
            return [r.samples / sum(o.samples for o in found.replies) for r in found.replies], memory

    assert digest(run(base(weights="disco", **USUAL))) != digest(run(plain))
    monkeypatch.setitem(rules.RULES, "ida", Sizes())
    assert digest(run(base(weights="ida", **USUAL))) == digest(run(plain))


@pytest.mark.parametrize(("name", "own"), [("disco", FedDisco), ("fedce", FedCE)])
def test_a_rule_and_its_method_are_one(name: Any, own: Any) -> None:
    assert digest(run(FedAvg(weights=name, **USUAL))) == digest(run(own(**USUAL)))


def test_ida_and_fedau_by_rule() -> None:
    assert digest(run(FedAvg(weights="ida", **USUAL))) == digest(run(IDA(**USUAL)))
    ruled = run(FedAvg(weights="fedau", form="delta", **USUAL), 7, cohort=2)
    assert digest(ruled) == digest(run(FedAU(**USUAL), 7, cohort=2))
    assert digest(run(FedAvg(weights="fedau", **USUAL), 7, cohort=2)) == digest(ruled)


def test_rules_meet_aggregators() -> None:
    both = composed(FedAvg(weights="ida", aggregator="median", **USUAL))
    assert isinstance(both, Weighed)
    assert isinstance(both, Combined)
    digests = {
        digest(run(FedAvg(weights=w, aggregator=a, **USUAL))) for w in ("ida", "disco") for a in ("median", "rfa")
    }
    assert len(digests) == 4
    trimmed, plain = (
        run(FedAvg(weights="ida", aggregator=a, **USUAL), model=LINEAR64).server.server for a in ("trimmed:0", "mean")
    )
    torch.testing.assert_close(vector(trimmed), vector(plain), rtol=1e-10, atol=1e-12)
    own = run(FedDisco(aggregator="median", **USUAL))
    assert digest(own) == digest(run(FedAvg(weights="disco", aggregator="median", **USUAL)))


def test_composed_methods_can_be_pickled_and_are_made_once() -> None:
    for method in (FedAvg(weights="disco", lr=0.3), FedDisco(aggregator="rfa", a=0.2), Scaffold(weights="ida")):
        made = composed(method)
        assert composed(made) is made
        again = pickle.loads(pickle.dumps(made))
        assert type(again) is type(made)
        assert again == made
        assert again.name == method.name
    assert isinstance(composed(FedAvg(weights="fedce")), Asked)


@pytest.mark.parametrize("method", [FedBuff, FedDyn])
def test_methods_with_weights_of_their_own_take_no_rule(method: Any) -> None:
    with pytest.raises(ConfigError, match="weights"):
        composed(method(weights="disco"))


def weigh(rule: rules.Rule, memory: Any, deltas: Any, sizes: Any = None) -> tuple[list[float], Any]:
    sizes = sizes or [1] * len(deltas)
    replies: list[Reply] = [reply(k, delta(*d), size) for k, (d, size) in enumerate(zip(deltas, sizes, strict=True))]
    host = worker(FedAvg()).host(0, "train")
    return rule.weigh(host, memory, Given(replies, [r.update.delta for r in replies]))


def test_disco_by_hand() -> None:
    counts = {0: torch.tensor([8, 0]), 1: torch.tensor([4, 4]), 2: torch.tensor([3, 1])}
    kl = np.array([np.log(2), 0.0, np.log(2) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)])
    p = np.array([8, 8, 4]) / 20
    wanted = (p - 0.5 * kl / kl.sum() + 0.1).clip(0)
    found, _ = weigh(rules.Disco(), counts, [[0]] * 3, [8, 8, 4])
    assert found == pytest.approx(wanted / wanted.sum())
    l1 = np.array([1.0, 0.0, 0.5])
    wanted = (p - 0.3 * l1 + 0.1).clip(0)
    found, _ = weigh(rules.Disco(a=0.3, distance="l1"), counts, [[0]] * 3, [8, 8, 4])
    assert found == pytest.approx(wanted / wanted.sum())
    nobody, _ = weigh(rules.Disco(a=9.0, b=0.0, distance="l2"), {0: counts[0], 1: counts[0]}, [[0]] * 2, [3, 1])
    assert nobody == [0.75, 0.25]
    lost, _ = weigh(rules.Disco(), {0: counts[0], 2: counts[0]}, [[0]] * 3)
    assert lost == pytest.approx([1 / 3] * 3)
    everybody, _ = weigh(rules.Disco(target="global"), {0: counts[0], 1: counts[0]}, [[0]] * 2)
    assert everybody == pytest.approx([0.5, 0.5])
    even, _ = weigh(rules.Disco(b=1e9), counts, [[0]] * 3, [8, 8, 4])
    assert even == pytest.approx([1 / 3] * 3)


def test_label_counts_are_asked_once() -> None:
    found = run(FedDisco(**USUAL), 3, LINEAR)
    fed = federation()
    assert {k: c.tolist() for k, c in found.server.memory["rule"].items()} == {
        k: torch.bincount(fed.data(k).train.y, minlength=3).tolist() for k in range(5)
    }


@pytest.mark.parametrize("far", [0.1, 1.0, 1e6])
def test_ida_weighs_an_outlier_at_any_distance_alike(far: float) -> None:
    found, _ = weigh(rules.IDA(), None, [[1, 1]] * 4 + [[1 + far, 1]])
    assert found[-1] == pytest.approx(1 / 17, rel=1e-6)
    assert weigh(rules.IDA(), None, [[1, 2], [5, 9]])[0] == pytest.approx([0.5, 0.5])
    assert weigh(rules.IDA(), None, [[1, 2]] * 3)[0] == pytest.approx([1 / 3] * 3)
    assert weigh(rules.IDA(by_size=True), None, [[1, 2]] * 2, [3, 1])[0] == pytest.approx([0.75, 0.25])


def test_fedce_by_hand() -> None:
    rng = np.random.default_rng(2)
    memory: Any = rules.Parts(0.25, {})
    w, cosines, errors = np.full(4, 0.25), [], np.ones(4)
    for number in range(4):
        deltas = rng.standard_normal((4, 3)) + 0.5
        mean = w @ deltas
        others = mean - w[:, None] * deltas
        s = (deltas * others).sum(1) / np.linalg.norm(deltas, axis=1) / np.linalg.norm(others, axis=1)
        cosines.append(s)
        g = (1 - np.mean(cosines, axis=0)).clip(0)
        new = g / g.sum() + errors / errors.sum()
        w = new / new.sum()
        found, memory = weigh(rules.Contribution(), memory, deltas.tolist())
        assert found == pytest.approx(w), number
        errors = rng.uniform(0.1, 1, 4)
        told = [reply(k, rules.Failure(torch.tensor(e, dtype=torch.float64))) for k, e in enumerate(errors)]
        memory = rules.Contribution().learn(memory, told)
        assert [rules.Contribution().ask(memory, k) for k in range(4)] == pytest.approx(w)


def test_fedce_of_equal_clients_is_uniform_fedavg() -> None:
    shares, _ = weigh(rules.Contribution(), rules.Parts(0.25, {}), [[1.0, 2.0]] * 4)
    assert shares == pytest.approx([0.25] * 4)
    two, _ = weigh(rules.Contribution(), rules.Parts(0.5, {}), [[1.0, 2.0], [3.0, -1.0]])
    assert two == pytest.approx([0.5, 0.5])


def test_the_model_without_a_client_is_the_others() -> None:
    """With two clients and x their mean, it is the other's model, and its error that on the client's rows."""
    at = worker(composed(FedCE(**USUAL)), federation((12, 12)), LINEAR)
    shots = loop(at, 1).snapshots
    standing, states = shots[1].server, shots[1].states
    x = standing.server.model
    assert all(part.weight == pytest.approx(0.5) for part in standing.memory["rule"].known.values())
    for k in (0, 1):
        other = states[1 - k].last
        rebuilt = tr.sub(tr.scale(x.params, 2.0), states[k].last.params)
        torch.testing.assert_close(rebuilt, other.params)
        data = federation((12, 12)).data(k)
        host = at.host(1, "train")
        score = host.evaluate(other, data.train)
        assert standing.memory["rule"].known[k].error == pytest.approx(1 - score.accuracy)


def test_the_error_without_a_client_in_a_regression_is_the_loss() -> None:
    at = worker(FedAvg(), federation(regression=True, dtype=torch.float64), SCALAR64)
    own, x = SCALAR64.initial(0), SCALAR64.initial(0, 1)
    told = rules.Contribution().answer(site(at), x, 0.3, own)
    others = {name: (x.params[name] - 0.3 * p) / 0.7 for name, p in own.params.items()}
    wanted = site(at).evaluate(x._replace(params=others), site(at).train).loss
    assert float(told.error) == pytest.approx(wanted)


def test_a_rule_survives_refusals_and_absence() -> None:
    """Rounds with a third of the clients, with devices that lose jobs."""
    fed = consilience.make_federation("digits", clients=6, partition="dirichlet:0.5", seed=1)
    for method in (FedDisco(**USUAL), FedCE(**USUAL), FedAvg(weights="fedau", form="delta", **USUAL)):
        result = consilience.run(
            method, fed, model="logistic", rounds=4, participation=2, fleet="phones", drops=0.3, executor="serial"
        )
        assert [line["round"] for line in result.history] == [1, 2, 3, 4]
        assert result.history[-1]["global"]["accuracy"] > 0.2


def test_counts_that_cannot_be_are_refused() -> None:
    at = worker(composed(FedDisco(**USUAL)))
    assert at.check is not None
    wrong = at.check.wrong(Job(0, 0, 1, 0, 0, 0), rules.Counts(torch.tensor([1, -1, 2])))
    assert wrong is not None
    assert wrong[0] == "counts"
    assert at.check.wrong(Job(0, 0, 1, 0, 0, 0), rules.Counts(torch.tensor([1, 0, 2]))) is None


def test_history_of_weights_is_monotone_in_discrepancy() -> None:
    """More a, less weight for the client with one label only."""
    counts = {0: torch.tensor([9, 0, 0]), 1: torch.tensor([3, 3, 3])}
    found = [weigh(rules.Disco(a=a), counts, [[0]] * 2)[0][0] for a in (0.0, 0.2, 0.4, 0.6)]
    assert all(later <= earlier for earlier, later in pairwise(found))
    assert found[-1] == pytest.approx(0, abs=1e-12)


def test_a_method_that_reports_does_so_with_a_rule() -> None:
    """It sees its own state, not what mixins keep beside it."""

    class Telling(FedAvg):
        def report(self, server: Any) -> dict[str, float]:
            return {"norm": float(sum(p.square().sum() for p in server.model.params.values()))}

    for own in ({"weights": "ida"}, {"weights": "ida", "selection": "random:2"}):
        method = composed(Telling(**USUAL, **own))
        assert set(method.report(run(method).server)) == {"norm"}
