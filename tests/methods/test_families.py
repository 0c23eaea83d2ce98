"""Families of different depth and width: FlexiFed, FedADP and its NetChange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import consilience
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError, NeedsError
from consilience.core.model import Architecture, Weights
from consilience.methods import FedADP, FedAvg, FlexiFed, Local
from consilience.methods.flexifed import _grouped
from consilience.models import architecture, small
from consilience.models.axes import Nested
from consilience.parts.netchange import Change

IMAGE = (1, 8, 8), 4
MIXED = {"model": "mlp:12x10", "models": "mlp:8*0.4,mlp:12x10*0.6"}


class Normed(Nested):
    """A hidden layer, or two, with BatchNorm."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, widths: tuple[int, ...] = (5,)) -> None:
        layers: list[nn.Module] = []
        before = input_shape[0]
        for width in widths:
            layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU()]
            before = width
        super().__init__(nn.Sequential(*layers), nn.Linear(before, outputs), before)


class Skipping(Nested):
    """A stage of residual blocks."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, norm: small.Norm, width: int, blocks: int) -> None:
        stage = nn.Sequential(*(small._Block(width, width, 1, norm) for _ in range(blocks)))
        first = (nn.Conv2d(input_shape[0], width, 3, 1, 1, bias=False), norm(width), nn.ReLU())
        features = nn.Sequential(*first, stage, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(features, nn.Linear(width, outputs), width)


class Bent(Nested):
    """Layers with tanh, which no layer in between passes on."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, depth: int = 1) -> None:
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(6 if i else input_shape[0], 6), nn.Tanh()]
        super().__init__(nn.Sequential(*layers), nn.Linear(6, outputs), 6)


def normed(*widths: int) -> Architecture:
    def make(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Normed(input_shape, outputs, widths)

    return Architecture(f"normed{widths}", make, (7,), 3, torch.float64, family="normed")


def skipping(norm: small.Norm, width: int, blocks: int) -> Architecture:
    def make(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Skipping(input_shape, outputs, norm, width, blocks)

    return Architecture(f"skipping{width}x{blocks}", make, (2, 5, 5), 3, torch.float64, family="skipping")


def bent(depth: int) -> Architecture:
    def make(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Bent(input_shape, outputs, depth)

    return Architecture(f"bent{depth}", make, (7,), 3, family="bent")


def run(method: Any, **options: Any) -> consilience.Result:
    federation = consilience.make_federation("digits", clients=5, partition="shards:3", seed=2)
    usual = {"rounds": 3, "participation": 3, "executor": "serial", "model": "mlp:16"}
    return consilience.run(method, federation, **{**usual, **options})


def scores(architecture: Architecture, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    module = architecture.build().eval()
    module.load_state_dict({**weights.params, **weights.buffers})
    with torch.no_grad():
        return module(x.to(architecture.dtype))


def random_weights(architecture: Architecture, seed: int) -> Weights:
    """Also of norms, whose initial values are 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t.clone()
        values = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return (values.abs() + 0.5 if name.endswith("running_var") else values / 2).to(t.dtype)

    return Weights(*({n: drawn(n, t) for n, t in part.items()} for part in architecture.spec))


# --- NetChange -------------------------------------------------------------------------------------------------

PAIRS = [
    (architecture("mlp:5", *IMAGE), architecture("mlp:9", *IMAGE)),
    (architecture("mlp:5", *IMAGE), architecture("mlp:9x7x5", *IMAGE)),
    (architecture("mlp:6x5", *IMAGE), architecture("mlp:6x5x8", *IMAGE)),
    (architecture("vgg5", *IMAGE), architecture("vgg8", *IMAGE)),
    (architecture("vgg5@0.3", *IMAGE), architecture("vgg11", *IMAGE)),
    (architecture("vgg8@0.5", (1, 17, 16), 4), architecture("vgg8", (1, 17, 16), 4)),
    (architecture("resnet8:batchnorm@0.5", *IMAGE), architecture("resnet8:batchnorm", *IMAGE)),
    (normed(5), normed(8)),
    (normed(5), normed(6, 9)),
    (skipping(nn.BatchNorm2d, 3, 1), skipping(nn.BatchNorm2d, 5, 3)),
    (skipping(small.group_norm, 4, 1), skipping(small.group_norm, 4, 2)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}-{pair[1].name}")
@pytest.mark.parametrize("seed", [0, 1])
def test_expanding_changes_no_score_and_shrinking_undoes_it(pair: tuple[Architecture, Architecture], seed: int) -> None:
    narrow, big = pair
    change = Change(narrow, big, seed)
    weights = random_weights(narrow, seed)
    up = change.up(weights)
    for part in ("params", "buffers"):
        found, spec = getattr(up, part), getattr(big.spec, part)
        assert [(n, t.shape, t.dtype) for n, t in found.items()] == [(n, t.shape, t.dtype) for n, t in spec.items()]
    x = torch.randn(6, *narrow.input_shape, generator=torch.Generator().manual_seed(3))
    wanted = scores(narrow, weights, x)
    torch.testing.assert_close(scores(big, up, x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    down = change.down(up)
    for part in ("params", "buffers"):
        assert list(getattr(down, part)) == list(getattr(weights, part))
        for n, t in getattr(weights, part).items():
            torch.testing.assert_close(getattr(down, part)[n], t, rtol=1e-6, atol=0)


def test_depth_alone_comes_back_bit_for_bit() -> None:
    narrow, big = architecture("vgg5", *IMAGE), architecture("vgg11", *IMAGE)
    weights = narrow.initial(4)
    change = Change(narrow, big, 0)
    assert tr.digest(change.down(change.up(weights))) == tr.digest(weights)
    assert Change(big, big, 0).up(weights) is weights


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_narrowing_is_the_mean_of_copies_and_the_sum_of_what_takes_them(few: int, more: int, seed: int) -> None:
    """Against loops, of weights that are no copies any more."""
    narrow, big = architecture(f"mlp:{few}", (3,), 2), architecture(f"mlp:{few + more}", (3,), 2)
    change = Change(narrow, big, seed)
    w = random_weights(big, seed)
    of = change.copies["features.1"].tolist()
    assert of[:few] == list(range(few))
    down = change.down(w).params
    for i in range(few):
        copies = [j for j in range(few + more) if of[j] == i]
        incoming = sum(w.params["features.1.weight"][j].double() for j in copies) / len(copies)
        taken = sum(w.params["head.weight"][:, j].double() for j in copies)
        torch.testing.assert_close(down["features.1.weight"][i].double(), incoming, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(down["head.weight"][:, i].double(), taken, rtol=1e-6, atol=1e-7)


def test_models_that_cannot_be_converted() -> None:
    with pytest.raises(ConfigError, match=r"fewer than the 9 of 'mlp:9'"):
        Change(architecture("mlp:9", *IMAGE), architecture("mlp:8x9", *IMAGE), 0)
    with pytest.raises(ConfigError, match="no counterpart"):
        Change(architecture("mlp:9x9", *IMAGE), architecture("mlp:9", *IMAGE), 0)
    with pytest.raises(ConfigError, match="GroupNorm"):
        Change(architecture("resnet8@0.5", *IMAGE), architecture("resnet8", *IMAGE), 0).check()
    Change(bent(1), bent(1), 0).check()
    with pytest.raises(ConfigError, match="computes something else"):
        Change(bent(1), bent(2), 0).check()


# --- FedADP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_fedadp_with_one_architecture_is_fedavg(weights: Any) -> None:
    found, wanted = run(FedADP(weights=weights)), run(FedAvg(weights=weights))
    assert tr.digest(found.server.model) == tr.digest(wanted.server.model)


@pytest.mark.parametrize("clients", [1, 3])
def test_fedadp_is_its_equations(clients: int) -> None:
    """What clients of a smaller architecture train is FedAvg's model of that architecture, expanded."""
    options = {"rounds": 1, "participation": clients}
    found = run(FedADP(), model="mlp:12x10", models="mlp:8", **options).server
    narrow, big = (architecture(name, (1, 8, 8), 10) for name in ("mlp:8", "mlp:12x10"))
    change = Change(narrow, big, found.seed)
    trained = run(FedAvg(), model="mlp:8", init=change.down(big.initial(0)), **options).server.model
    wanted = change.up(trained)
    if clients == 1:
        assert tr.digest(found.model) == tr.digest(wanted)
    for n, p in wanted.params.items():
        torch.testing.assert_close(found.model.params[n], p, rtol=1e-5, atol=1e-7)


def test_fedadp_sends_models_of_the_clients_sizes() -> None:
    result = run(FedADP(), model="mlp:12x10", models="mlp:8", rounds=1, participation=2)
    own = encoded_size(architecture("mlp:8", (1, 8, 8), 10).spec)
    whole = encoded_size(architecture("mlp:12x10", (1, 8, 8), 10).spec)
    for direction in ("bytes_up", "bytes_down"):
        assert 2 * own <= result.history[-1][direction] < 2 * whole


def test_fedadp_learns_with_mixed_models() -> None:
    result = run(FedADP(lr=0.1), **MIXED, rounds=12, participation=1.0)
    assert result.history[-1]["global"]["accuracy"] > result.history[0]["global"]["accuracy"] + 0.1


def test_fedadp_refuses_a_server_that_is_smaller() -> None:
    with pytest.raises(ConfigError, match="no counterpart"):
        run(FedADP(), model="mlp:8", models="mlp:8*0.5,mlp:12x10*0.5")
    with pytest.raises(NeedsError):
        run(FedADP(), model="mlp:8", models="mlp:8*0.5,cnn*0.5")


# --- FlexiFed --------------------------------------------------------------------------------------------------


def groups(strategy: str, *names: str) -> dict[tuple[str, ...], list[str]]:
    return _grouped(tuple(architecture(name, *IMAGE) for name in names), strategy)


def test_common_layers() -> None:
    a, b, c = "mlp:8x6", "mlp:8x6x6", "mlp:8x5"
    first, second = ["features.1.weight", "features.1.bias"], ["features.3.weight", "features.3.bias"]
    third, head = ["features.5.weight", "features.5.bias"], ["head.weight", "head.bias"]
    assert groups("basic", a, b, c) == {(a, b, c): first}
    assert groups("clustered", a, b, c) == {
        (a, b, c): first, (a,): second + head, (b,): second + third + head, (c,): second + head
    }  # fmt: skip
    assert groups("max", a, b, c) == {
        (a, b, c): first, (a, b): second, (a,): head, (b,): third + head, (c,): second + head
    }  # fmt: skip
    assert groups("basic", "mlp:8", "mlp:9") == {}
    apart = groups("max", "mlp:8x6", "mlp:9x6")  # heads alike, but not what is before them
    assert set(apart) == {("mlp:8x6",), ("mlp:9x6",)}
    deep = groups("max", "vgg5", "vgg8")
    assert deep["vgg5", "vgg8"] == ["features.0.0.weight", "features.0.0.bias"]


@given(st.lists(st.lists(st.integers(2, 3), min_size=1, max_size=3), min_size=1, max_size=4, unique_by=tuple))
@settings(deadline=None, max_examples=25)
def test_max_common_averages_all_that_the_others_do_and_each_layer_once(widths: list[list[int]]) -> None:
    names = ["mlp:" + "x".join(map(str, w)) for w in widths]
    found = {s: groups(s, *names) for s in ("basic", "clustered", "max")}
    for name in names:
        spec = architecture(name, *IMAGE).spec
        for strategy in ("clustered", "max"):
            held = [n for archs, own in found[strategy].items() if name in archs for n in own]
            assert sorted(held) == sorted(spec.params)
        among = {s: {n: set(a) for a, own in found[s].items() if name in a for n in own} for s in found}
        for n, archs in among["basic"].items():
            assert archs == among["clustered"][n] == among["max"][n] == set(names)
        assert all(archs <= among["max"][n] for n, archs in among["clustered"].items())


@pytest.mark.parametrize("strategy", ["basic", "clustered", "max"])
@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_flexifed_with_one_architecture_is_fedavg(strategy: Any, weights: Any) -> None:
    found, wanted = run(FlexiFed(strategy=strategy, weights=weights)), run(FedAvg(weights=weights))
    assert tr.digest(found.server.models["mlp:16"]) == tr.digest(wanted.server.model)
    assert found.history[-1]["clients"] == wanted.history[-1]["clients"]


def test_flexifed_with_nothing_in_common_is_local() -> None:
    options = {"model": "mlp:8", "models": "mlp:8*0.4,mlp:9*0.6"}
    found, wanted = run(FlexiFed(strategy="basic"), **options), run(Local(), **options)
    assert {k: tr.digest(v) for k, v in found.states.items()} == {k: tr.digest(v) for k, v in wanted.states.items()}


def test_flexifed_is_its_equations() -> None:
    """One round of all clients: each layer is the mean of those who have it in common, in float64."""
    options = {"model": "mlp:8x6", "models": "mlp:8x6*0.4,mlp:8x5*0.6", "rounds": 1, "participation": 1.0}
    basic = run(FlexiFed(strategy="basic"), **options)
    own = basic.states
    names = ["features.1.weight", "features.1.bias"]
    assert {tuple(m.params) for n, m in basic.server.models.items()} == {tuple(names)}
    for n in names:
        mean = sum(w.params[n].double() for w in own.values()) / 5
        for model in basic.server.models.values():
            torch.testing.assert_close(model.params[n].double(), mean, rtol=1e-6, atol=1e-8)
    best = run(FlexiFed(strategy="max"), **options)
    assert best.states == {} or set(best.states.values()) == {None}
    assert tr.digest(best.server.models["mlp:8x6"].params["features.1.weight"]) == tr.digest(
        best.server.models["mlp:8x5"].params["features.1.weight"]
    )
    assert list(best.server.models["mlp:8x5"].params) == list(architecture("mlp:8x5", (1, 8, 8), 10).spec.params)
    assert basic.history[-1]["bytes_up"] < best.history[-1]["bytes_up"]


def test_a_layer_that_nobody_of_a_round_has_stays() -> None:
    options = {"model": "mlp:8", "models": ["mlp:8", "mlp:9", "mlp:9", "mlp:9", "mlp:9"], "rounds": 1}
    result = run(FlexiFed(), **options, participation=1)
    start = {n: architecture(n, (1, 8, 8), 10) for n in ("mlp:8", "mlp:9")}
    still = [n for n, a in start.items() if tr.digest(result.server.models[n]) == tr.digest(a.initial(0))]
    assert len(still) == 1


def test_a_server_model_that_no_client_has_is_left_out() -> None:
    result = run(FlexiFed(strategy="basic"), model="mlp:7", models="mlp:8x6*0.4,mlp:8x5*0.6", rounds=1)
    assert result.server.models["mlp:7"] == Weights({}, {})
    assert list(result.server.models["mlp:8x5"].params) == ["features.1.weight", "features.1.bias"]


@pytest.mark.parametrize(
    "method", [FedADP(batch_size=64, buffers="local"), FlexiFed(batch_size=64, buffers="local")], ids=lambda m: m.name
)
def test_buffers_may_stay_at_home(method: Any) -> None:
    name = "resnet8:batchnorm"
    result = run(method, model=name, models=f"{name}@1.0,0.5", rounds=2)
    assert not result.refused
    assert result.history[-1]["clients"]["mean"] >= 0
