"""Sub-models: slices, their average where they overlap, and the methods that use them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError, NeedsError
from consilience.core.messages import Job
from consilience.core.model import Architecture, Weights
from consilience.methods import FedAvg, FedDropout, FedRolex, HeteroFL
from consilience.methods.heterofl import _scaled
from consilience.models import architecture
from consilience.parts import submodel
from consilience.parts.submodel import Piece, Slices

IMAGE = (1, 12, 12), 4
OFF = {"scaler": False, "masked_loss": False, "label_rows": False, "static_bn": False}
NAMES = ["mlp:6x5", "lenet", "cnn", "resnet8", "resnet8:batchnorm"]


def run(method: Any, **options: Any) -> consilience.Result:
    federation = consilience.make_federation("digits", clients=5, partition="shards:3", seed=2)
    usual = {"rounds": 3, "participation": 3, "executor": "serial", "model": "mlp:16"}
    return consilience.run(method, federation, **{**usual, **options})


# --- slices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [0.5, 0.3])
def test_a_slice_has_the_shapes_of_the_narrower_model(name: str, rate: float) -> None:
    whole, narrow = architecture(name, *IMAGE), architecture(f"{name}@{rate}", *IMAGE)
    slices = Slices(whole)
    cut = slices.cut(whole.initial(0), submodel.prefix(slices.sizes, submodel.sizes(narrow)))
    for part in ("params", "buffers"):
        found, wanted = getattr(cut, part), getattr(narrow.spec, part)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}
    for n, t in cut.params.items():
        assert (
            torch.equal(t, whole.initial(0).params[n][tuple(slice(k) for k in t.shape)])
            or "features" not in n
            or (
                t.dim() == 2  # behind a flatten, a channel's places go together
            )
        )


@pytest.mark.parametrize("name", NAMES)
def test_units_that_are_cut_are_those_that_are_silent(name: str) -> None:
    """A model whose units outside the slice give nothing computes what the slice computes."""
    whole, narrow = architecture(name, *IMAGE), architecture(f"{name}@0.5", *IMAGE)
    slices = Slices(whole)
    kept = submodel.sizes(narrow)
    units = submodel.chance(slices.sizes, kept, np.random.default_rng(0))
    start = whole.initial(3)
    silent = {n: torch.zeros_like(t) for n, t in start.params.items()}
    for n, t in start.params.items():
        grid = slices.grid(n, units)
        silent[n][grid] = t[grid]
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3, *IMAGE[0]))).float()
    big, small = whole.build(), narrow.build()
    cut = slices.cut(start, units)
    big.load_state_dict({**silent, **start.buffers})
    small.load_state_dict({**cut.params, **cut.buffers})
    if name == "resnet8":  # GroupNorm looks at units together: other units, other statistics
        return
    torch.testing.assert_close(big.eval()(x), small.eval()(x), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 40), st.floats(0.05, 1.0))
def test_a_rolling_window_meets_every_unit_equally_often(n: int, rate: float) -> None:
    k = int(np.ceil(round(n * rate, 9)))
    windows = [submodel.rolling({"a": n}, {"a": k}, j)["a"] for j in range(n)]
    assert torch.equal(windows[0], submodel.prefix({"a": n}, {"a": k})["a"])
    assert torch.bincount(torch.cat(windows), minlength=n).tolist() == [k] * n


def test_random_units_are_uniform() -> None:
    counts = np.zeros(6)
    for seed in range(600):
        found = submodel.chance({"a": 6}, {"a": 2}, np.random.default_rng(seed))["a"]
        assert len(set(found.tolist())) == 2
        counts[found.numpy()] += 1
    assert abs(counts / 600 - 1 / 3).max() < 0.08


# --- the average -----------------------------------------------------------------------------------------------


@st.composite
def overlaps(draw: Any) -> tuple[Architecture, Weights, list[Piece]]:
    whole = architecture("mlp:5x4", (3,), 3)
    slices = Slices(whole)
    pieces = []
    shares = [draw(st.integers(1, 9)) for _ in range(draw(st.integers(1, 20)))]
    for i, share in enumerate(shares):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        kept = {axis: draw(st.integers(1, n)) for axis, n in slices.sizes.items()}
        units = submodel.chance(slices.sizes, kept, rng)
        rows = draw(st.one_of(st.none(), st.sets(st.integers(0, 2), min_size=1)))
        outputs = None if rows is None else torch.tensor(sorted(rows))
        pieces.append(Piece(slices.cut(whole.initial(i + 1), units), units, share / sum(shares), outputs))
    return whole, whole.initial(0), pieces


@given(overlaps())
@settings(deadline=None, max_examples=40)
def test_the_average_against_a_naive_one(given_: tuple[Architecture, Weights, list[Piece]]) -> None:
    whole, old, pieces = given_
    slices = Slices(whole)
    found, least = submodel.average(slices, old, pieces)
    fewest = len(pieces)
    for name, value in old.params.items():
        axes = whole.axes[name]
        for place in np.ndindex(*value.shape):
            total = weight = count = 0.0
            for piece in pieces:
                inside = []
                for k, axis in zip(place, axes, strict=True):
                    kept = piece.units[axis].tolist() if axis in piece.units else list(range(99))
                    counts = axis != "outputs" or piece.outputs is None or k in piece.outputs
                    inside.append(kept.index(k) if k in kept and counts else None)
                if None not in inside:
                    total += piece.share * float(piece.weights.params[name][tuple(inside)])  # type: ignore[index]
                    weight += piece.share
                    count += 1
            fewest = min(fewest, int(count))
            got = float(found.params[name][place])
            assert got == (pytest.approx(total / weight, rel=1e-4, abs=1e-6) if count else float(value[place]))
    assert least == fewest


@pytest.mark.parametrize("n", [1, 7, 40])
def test_whole_pieces_are_averaged_as_fedavg_does(n: int) -> None:
    from consilience.core.reduce import uniform_weights, weighted_sum

    whole = architecture("mlp:5x4", (3,), 3)
    slices, models = Slices(whole), [whole.initial(i) for i in range(n)]
    units = submodel.prefix(slices.sizes, slices.sizes)
    pieces = [Piece(m, units, 1 / n) for m in models]
    found, least = submodel.average(slices, whole.initial(99), pieces)
    assert tr.digest(found) == tr.digest(weighted_sum(models, uniform_weights(n)))
    assert least == n


def test_disjoint_pieces_tile_the_model() -> None:
    whole = architecture("mlp:4", (3,), 2)
    slices = Slices(whole)
    halves = [{"features.1": torch.tensor(u)} for u in ([0, 2], [1, 3])]
    new = [whole.initial(1), whole.initial(2)]
    pieces = [Piece(slices.cut(w, u), u, 0.5) for w, u in zip(new, halves, strict=True)]
    found, least = submodel.average(slices, whole.initial(0), pieces)
    assert least == 1
    for w, u in zip(new, halves, strict=True):
        for name in ("features.1.weight", "features.1.bias", "head.weight"):
            grid = slices.grid(name, u)
            assert torch.equal(found.params[name][grid], w.params[name][grid])


# --- methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [HeteroFL, FedRolex, FedDropout])
@pytest.mark.parametrize("model", ["mlp:16", "mlp:12x8"])
def test_with_all_rates_one_it_is_uniform_fedavg(cls: Any, model: str) -> None:
    plain = run(FedAvg(weights="uniform"), model=model, rounds=4)
    whole = run(cls(**OFF), model=model, models=f"{model}@1.0", rounds=4)
    assert tr.digest(whole.server.model) == tr.digest(plain.server.model)
    assert whole.history[-1]["method"]["min_coverage"] == 3
    assert whole.history[-1]["method"]["reduction_noise"] == 0


def test_images_too() -> None:
    federation = consilience.make_federation("digits", clients=4, seed=0)
    options: dict[str, Any] = {"model": "resnet8", "rounds": 2, "executor": "serial"}
    plain = consilience.run(FedAvg(weights="uniform", local_steps=2), federation, **options)
    whole = consilience.run(HeteroFL(**OFF, local_steps=2), federation, **options)
    assert tr.digest(whole.server.model) == tr.digest(plain.server.model)


def test_the_first_round_of_fedrolex_is_heterofl_s() -> None:
    mixed = {"models": "mlp:16@1.0,0.5,0.25", "participation": 1.0}
    first = [run(cls(), rounds=1, **mixed) for cls in (HeteroFL, FedRolex)]
    assert tr.digest(first[0].server.model) == tr.digest(first[1].server.model)
    later = [run(cls(), rounds=2, **mixed) for cls in (HeteroFL, FedRolex)]
    assert tr.digest(later[0].server.model) != tr.digest(later[1].server.model)


def test_what_no_client_has_stays_as_it_was() -> None:
    result = run(HeteroFL(), models="mlp:16@0.5", participation=1.0)
    start = result.worker.host(0, "x").initial().params["features.1.weight"]
    end = result.server.model.params["features.1.weight"]
    assert torch.equal(end[8:], start[8:])
    assert not torch.equal(end[:8], start[:8])
    assert result.history[-1]["method"]["min_coverage"] == 0
    rolled = run(FedRolex(), models="mlp:16@0.5", participation=1.0, rounds=9)
    assert not (rolled.server.model.params["features.1.weight"] == start).all(1).any()


def test_small_clients_pay_less() -> None:
    result = run(HeteroFL(), model="mlp:64", models="mlp:64@1.0,0.25", participation=1.0, rounds=2)
    last = {row["model"]: row for row in result.clients if row["round"] == 2}
    assert last["mlp:64@0.25"]["bytes_up"] < 0.3 * last["mlp:64"]["bytes_up"]
    per_row = {name: row["flops"] / row["samples"] for name, row in last.items()}
    assert per_row["mlp:64@0.25"] == pytest.approx(0.25 * per_row["mlp:64"], rel=0.01)


def test_the_mask_leaves_absent_classes_alone() -> None:
    """Without label rows, what an absent class's row of the output layer learns comes from weight 0: nothing."""
    result = run(HeteroFL(label_rows=False), participation=1.0, rounds=1)
    federation = result.worker.federation
    everywhere = set(range(10)).difference(*({int(c) for c in federation.data(k).train.y} for k in range(5)))
    start = result.worker.host(0, "x").initial().params["head.weight"]
    for c in everywhere:
        torch.testing.assert_close(result.server.model.params["head.weight"][c], start[c], rtol=1e-5, atol=1e-6)
    open_ = run(HeteroFL(label_rows=False, masked_loss=False), participation=1.0, rounds=1)
    assert tr.digest(open_.server.model) != tr.digest(result.server.model)


def test_label_rows_are_averaged_over_their_owners() -> None:
    result = run(HeteroFL(masked_loss=False, scaler=False), participation=1.0, rounds=1)
    at = result.worker
    sites = [at.site(Job(c, c, 1, 0, 0, 0))[0] for c in range(5)]
    trained = [s.fit(s.initial()).weights.params["head.weight"] for s in sites]
    for c in range(10):
        owners = [w for s, w in zip(sites, trained, strict=True) if (s.train.y == c).any()]
        if owners:
            mean = torch.stack([w[c].double() for w in owners]).mean(0)
            found = result.server.model.params["head.weight"][c].double()
            torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)


def test_the_scaler_is_there_in_training_only() -> None:
    model = architecture("mlp:6@0.5", (3,), 2).build()
    x = torch.ones(2, 3)
    plain = model(x)
    with _scaled(model, 0.5):
        z = model.features(x)
    assert torch.equal(z, 2 * model.features(x))  # ReLU of twice as much
    assert torch.equal(model(x), plain)


def test_batch_statistics_of_the_end_are_those_of_the_data() -> None:
    federation = consilience.make_federation("digits", clients=3, seed=0)
    result = consilience.run(
        HeteroFL(local_steps=2), federation, model="resnet8:batchnorm", models="resnet8:batchnorm@1.0,0.5", rounds=1,
        executor="serial",
    )  # fmt: skip
    assert set(result.server.statistics) == {"resnet8:batchnorm", "resnet8:batchnorm@0.5"}
    names = result.worker.place.models
    assert names is not None
    client = names.index("resnet8:batchnorm@0.5")
    if names.count(names[client]) == 1:
        module = architecture(names[client], (1, 8, 8), 10).build().train()
        part = Slices(result.worker.host(0, "x").architecture())
        kept = submodel.sizes(architecture(names[client], (1, 8, 8), 10))
        cut = part.cut(result.server.model, submodel.prefix(part.sizes, kept))
        module.load_state_dict({**cut.params, **cut.buffers})
        first = module.features[0]
        x = federation.data(client).train.x
        means = [first(b).mean((0, 2, 3)) for b in x.split(32)]
        torch.testing.assert_close(
            result.server.statistics[names[client]]["features.1.running_mean"], torch.stack(means).mean(0).detach(),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    off = consilience.run(HeteroFL(local_steps=2, static_bn=False), federation, model="resnet8:batchnorm", rounds=1)
    assert not off.server.statistics


def test_narrow_residual_nets_keep_to_their_memory() -> None:
    """Laid out with channels last, they would crash, sooner or later; so this runs apart."""
    code = (
        "import consilience; from consilience.methods import HeteroFL;"
        "f = consilience.make_federation('digits', clients=2, seed=0);"
        "consilience.run(HeteroFL(local_steps=20), f, model='resnet8', models='resnet8@0.25,0.125', rounds=1,"
        "executor='serial')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what is refused -------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    with pytest.raises(NeedsError, match="nested widths of one model"):
        run(HeteroFL(), models="mlp:16*0.5,logistic*0.5")
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        run(HeteroFL(), models="mlp:16@0")
    with pytest.raises(ConfigError, match="has no hidden layer to cut"):
        run(HeteroFL(), models="logistic@0.5", model="logistic")
    with pytest.raises(ConfigError, match=r"cannot be cut: it has no method axes\(\)"):
        run(HeteroFL(), models="mlp:16@1.0,0.5", feature_dim=8)
