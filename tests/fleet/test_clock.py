"""Devices, and what a job takes on them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import consilience
from consilience.core.errors import ConfigError, DataError
from consilience.core.messages import Device, Job, Trip
from consilience.core.model import Architecture
from consilience.fleet.availability import Always, Trace
from consilience.fleet.clock import Fleet, correlated, make_devices
from consilience.fleet.device import checked, read_csv
from consilience.fleet.profiles import KNOTS, PROFILES, draw, profile
from consilience.fleet.summary import summarise
from consilience.methods import FedAvg
from consilience.models import architecture

JOB = Job(0, 0, 1, 0, 0, 0)


def test_flops_of_a_linear_model_by_hand() -> None:
    """Forward 2 d k, backward 2 d k for the weights; inputs take no gradient."""
    assert architecture("logistic", (20,), 3).flops == (2 * 20 * 3, 2 * 2 * 20 * 3)
    hidden = 2 * 2 * 20 * 7 + 3 * 2 * 7 * 3
    assert architecture("mlp:7", (20,), 3).flops.training == hidden
    assert architecture("lenet", (1, 28, 28), 10).flops.training > 1e6


@pytest.mark.parametrize("name", ["logistic", "mlp:30x20", "lenet", "cnn", "resnet8", "resnet8:batchnorm"])
def test_flops_are_those_of_torch_s_counter(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    found = architecture(name, (1, 28, 28), 10)
    with FlopCounterMode(display=False) as counter:
        found.build().train()(torch.zeros(2, 1, 28, 28)).sum().backward()
    assert found.flops.training == counter.get_total_flops() / 2


def test_counting_does_not_import_the_compiler() -> None:
    code = (
        "import sys; from consilience.models import architecture; "
        "architecture('lenet', (1, 28, 28), 10).flops; assert 'torch._dynamo' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Scale(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1, keepdim=True) * self.w


def test_a_model_without_products_counts_its_parameters() -> None:
    assert Architecture("scale", Scale, (4,), 3).flops == (6, 18)


def test_a_trip_by_hand() -> None:
    fleet = Fleet([Device(100.0, 10.0, 5.0, 0.5), Device(1.0, 10.0, 5.0, rate=4.0)], Always(), [50.0, 50.0])
    trip = fleet.trip(JOB, 7.0, down=20, up=30, samples=8, steps=2)
    assert trip == Trip(0.0, 0.5 + 2.0, 8 * 50 / 100, 0.5 + 6.0)
    assert trip.seconds == 13.0
    assert fleet.trip(JOB._replace(client=1), 0.0, down=0, up=0, samples=8, steps=2) == Trip(compute=2.0)


def test_a_client_that_goes_takes_its_job_along() -> None:
    fleet = Fleet([Device(1.0, 1.0, 1.0)], Trace({0: [(5.0, 15.0), (18.0, 40.0)]}), [1.0])
    trip = fleet.trip(JOB, 2.0, down=4, up=4, samples=4, steps=1)
    assert (trip.wait, trip.lost, trip.seconds) == (3.0, 13.0, 13.0)
    assert (trip.computed, trip.uploaded) == (1.0, 0.5)
    assert fleet.trip(JOB, 18.0, down=4, up=4, samples=4, steps=1).lost is None


@settings(max_examples=200, deadline=None)
@given(
    down=st.integers(0, 10**7), up=st.integers(0, 10**7), samples=st.integers(0, 10**5), more=st.integers(0, 10**5),
    start=st.floats(0, 1e4), drops=st.sampled_from([0.0, 0.5]), number=st.integers(1, 50),
)  # fmt: skip
def test_more_work_never_arrives_earlier(
    down: int, up: int, samples: int, more: int, start: float, drops: float, number: int
) -> None:
    """What the loop's lower bound rests on."""
    fleet = Fleet([Device(1e5, 3e5, 1e5, 0.1)], Trace({0: [(3.0, 40.0), (55.0, 90.0)]}), [7.0], drops, seed=1)
    job = JOB._replace(number=number)
    least = fleet.trip(job, start, down=down, up=0, samples=samples, steps=0)
    true = fleet.trip(job, start, down=down, up=up, samples=samples + more, steps=3)
    assert start + least.seconds <= start + true.seconds


def test_parts_of_trips() -> None:
    lost = Trip(1.0, 2.0, 4.0, 2.0, lost=5.0)
    assert (lost.computed, lost.uploaded, lost.seconds) == (0.5, 0.0, 5.0)
    assert Trip(1.0, 2.0, 4.0, 2.0) + lost == Trip(2.0, 4.0, 8.0, 4.0, lost=14.0)
    assert Trip().computed == Trip().uploaded == 1.0


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_have_the_quantiles_they_state(name: str) -> None:
    devices = draw(name, 4000, seed=0)
    kind = profile(name)
    for values, stated in (
        ([d.speed for d in devices], kind.speed),
        ([d.down for d in devices], kind.down),
        ([d.latency for d in devices], sorted(kind.latency)),
    ):
        assert np.quantile(values, KNOTS) == pytest.approx(stated, rel=0.12)
        assert min(values) >= min(stated) * (1 - 1e-12)
        assert max(values) <= max(stated) * (1 + 1e-12)
    assert len(kind.source) > 20


def test_phones_spread_tenfold() -> None:
    assert PROFILES["phones"].speed[-1] / PROFILES["phones"].speed[0] == 10


def test_lognormal() -> None:
    logs = np.log([d.speed for d in draw("lognormal:0.5", 5000, seed=0)])
    assert np.median(logs) == pytest.approx(math.log(5e9), abs=0.03)
    assert np.std(logs) == pytest.approx(0.5, rel=0.05)
    assert {d.speed for d in draw("lognormal:0", 5, seed=0)} == {draw("uniform", 1, seed=0)[0].speed}


def test_speed_goes_with_rows() -> None:
    amount = np.array([5, 50, 500, 20, 200] * 40)
    along, against, apart = (correlated(amount, rho, 0) for rho in (1.0, -1.0, 0.0))
    assert np.all(np.diff(along[np.argsort(amount, kind="stable")].reshape(5, 40).mean(1)) > 0)
    assert np.corrcoef(along, against)[0, 1] < -0.9
    assert abs(np.corrcoef(along, apart)[0, 1]) < 0.2
    fed = consilience.make_federation("digits", clients=20, partition="power:1.5", seed=0)
    devices = make_devices("phones", fed, 0, "1.0")
    sizes = [fed.size(c) for c in range(20)]
    fastest, slowest = max(devices, key=lambda d: d.speed), min(devices, key=lambda d: d.speed)
    assert fed.size(devices.index(fastest)) == max(sizes)
    assert fed.size(devices.index(slowest)) == min(sizes)


def test_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.csv"
    path.write_text("client,samples_per_second,down,up,latency\n1, 50, 1e6, 5e5, 0.1\n0, 20, 2e6, 1e6, 0.2\n")
    first, second = read_csv(path, 2)
    assert (first.rate, first.down, first.latency) == (20, 2e6, 0.2)
    assert (second.rate, second.up, second.watts) == (50, 5e5, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("client,speed,down,up\n0,1e9,0,1e6\n1,1e9,1e6,1e6\n", r"line 2: down is 0; a bandwidth must be above 0"),
        ("client,speed,down,up\n0,1e9,1e6,-3\n1,1e9,1e6,1e6\n", r"line 2: up is -3; a bandwidth"),
        ("client,speed,down,up\n0,0,1e6,1e6\n1,1e9,1e6,1e6\n", r"line 2: speed is 0; a speed"),
        ("client,speed,down,up\n0,,1e6,1e6\n1,1e9,1e6,1e6\n", r"line 2: speed is nan"),
        ("client,speed,down,up,latency\n0,1,1,1,-1\n1,1,1,1,1\n", r"line 2: latency is -1"),
        ("client,speed,down,up\n0,1e9,1e6,1e6\n", r"client 1 has no device \(1 of 2"),
        ("client,speed,down,up\n0,1,1,1\n0,1,1,1\n", r"line 3: client 0 has a device already"),
        ("client,speed,down,up\n0,1,1,1\n2,1,1,1\n", r"line 3: client is 2"),
        ("client,speed,down,up\n0,fast,1,1\n", r"line 2, speed: 'fast' is not a number"),
        ("client,speed,down\n0,1,1\n", "column 'up' is missing"),
        ("client,down,up\n0,1,1\n", "column 'speed'"),
        ("client,speed,down,up,upp\n0,1,1,1,1\n", "unknown column 'upp'; did you mean 'up'"),
        ("", "no devices"),
    ],
)
def test_bad_csv_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "fleet.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as found:
        read_csv(path, 2)
    assert len(str(found.value).splitlines()) == 1


def made(n: int, rng: np.random.Generator) -> list[Device]:
    return [Device(float(s), 1e6, 1e6) for s in rng.uniform(1e9, 2e9, n)]


def broken(n: int, rng: np.random.Generator) -> list[Device]:
    return [Device(1e9, 0.0, 1e6)] * n


def test_a_function_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    monkeypatch.setitem(sys.modules, "our_devices", types.SimpleNamespace(made=made, broken=broken))
    fed = helpers.federation()
    devices = make_devices("our_devices:made", fed, 5)
    assert devices == make_devices("our_devices:made", fed, 5) != make_devices("our_devices:made", fed, 6)
    with pytest.raises(DataError, match="client 0: down is 0; a bandwidth"):
        make_devices("our_devices:broken", fed, 5)
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_devices("our_devices:lost", fed, 5)
    with pytest.raises(ConfigError, match="did you mean 'phones'"):
        make_devices("phone", fed, 5)
    with pytest.raises(DataError, match="3 devices for 5 clients"):
        checked(devices[:3], 5, "fleet")


def run(**more: Any) -> Any:
    return consilience.run(FedAvg(), helpers.federation(), model="logistic", rounds=2, executor="serial", **more)


def test_a_federation_that_is_never_online(tmp_path: Path) -> None:
    fed = helpers.federation()
    fed.unseen = frozenset({3})
    path = tmp_path / "trace.csv"
    path.write_text("client,on,off\n3,0,50\n")
    with pytest.raises(ConfigError, match="no client that may train is ever online") as found:
        consilience.run(FedAvg(), fed, model="logistic", availability=str(path))
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [{"drops": 1.0}, {"fleet_correlation": "2"}, {"fleet_correlation": "size:0.5"}, {"fleet": "lognormal:x"},
     {"availability": "bernoulli:2"}],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as found:
        run(**options)
    assert len(str(found.value).splitlines()) == 1


def test_summary() -> None:
    fed = consilience.make_federation("digits", clients=8, seed=0)
    work = [1e6] * 8
    rows = summarise(Fleet(draw("phones", 8, 0), Always(), work), fed)
    by = {row["name"]: row for row in rows}
    assert by["speed"]["least"] <= by["speed"]["median"] <= by["speed"]["most"]
    assert by["online"]["median"] == 1.0
    slow = max(fed.size(c) * 1e6 / d.speed for c, d in enumerate(draw("phones", 8, 0)))
    assert by["pass over own rows"]["most"] == pytest.approx(1e3 * slow)
