"""Every method, awkward ones, and every schedule, against every promise of the core."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import consilience
from consilience import methods
from consilience.core import failpoint
from consilience.core import tree as tr
from consilience.core.encode import decode, encode, encoded_size
from consilience.core.events import Decision, Instant
from consilience.core.federation import Federation
from consilience.core.messages import Job, Trip
from consilience.execute.ray import connected
from consilience.methods import (
    DPSGD,
    DProxSGT,
    FedAdam,
    FedASMU,
    FedAvg,
    FedBuff,
    FedProx,
    FinalMerge,
    LocalGDA,
    Scaffold,
    Tracking,
    VarGossip,
)
from consilience.schedule.immediate import Immediate
from consilience.schedule.rounds import Rounds

from .fixtures.fedem import FedEM

ROUNDS = 4


@dataclass
class Case:
    """A method and how to run it."""

    method: Any
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread(Instant):
    """Devices of very different speed: client i takes i + 1 seconds a step."""

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        return Trip(compute=(job.client + 1.0) * steps)


FIXTURES = {
    "fedem": Case(FedEM()),
    "dpsgd-ring": Case(DPSGD(), {"topology": "ring", "participation": 1.0}),
    "adversary": Case(LocalGDA(variant="gt", local_steps=2), {"model": "mlp:16+adversary:0.5"}),
    "svrg": Case(LocalGDA(variant="svrg", p=0.5), {"participation": 1.0}),
    "tracking-semi": Case(Tracking(order="semi", local_steps=2), {"topology": "ring"}),
    "dproxsgt-qsgd": Case(DProxSGT(compress="qsgd:4"), {"topology": "ring", "participation": 1.0}),
    "dpsgd-cta": Case(
        DPSGD(order="cta"), {"topology": "er:0.7", "availability": "bernoulli:0.7", "participation": 1.0}
    ),
    "dpsgd-onepeer": Case(DPSGD(), {"topology": "onepeer*2,matching:ring", "participation": 4}),
    "finalmerge-end": Case(FinalMerge(), {"topology": "none"}),
    "fedasmu-spread": Case(FedASMU(), {"schedule": Immediate(), "clock": Spread(), "participation": 3}),
}
LOCAL = {
    "sam": Case(
        FedProx(optimizer="sam+sgg:2+grokfast+adam", local_steps=4, lr=0.01, row_order="curriculum:both:root:0.8:0.3")
    ),
    "chosen": Case(Scaffold(weights="fedce", selection="curriculum:2:root:3:0.5", local_steps=4)),
    "oasis": Case(FedAvg(optimizer="oasis", local_steps=3, lr=0.01, buffers="local", row_order="anti:local")),
}
"""Local optimisers that ask much, and orders of rows and clients."""
COMPOSED = {
    "scaffold-disco": Case(Scaffold(weights="disco")),
    "fedprox-fedce": Case(FedProx(weights="fedce", aggregator="trimmed:0.2")),
    "fedadam-fedau": Case(FedAdam(weights="fedau", aggregator="upgrad")),
    "fedavg-krum": Case(FedAvg(aggregator="bucketing:2+krum:0.2"), {"attack": "alie:0.2"}),
    "fedavg-ida": Case(FedAvg(weights="ida", aggregator="rfa")),
    "scaffold-ccvr": Case(Scaffold(then="ccvr:20")),
    "fedavg-topk-both": Case(FedAvg(compress="ef21:topk:0.05", compress_down="topk:0.1")),
    "scaffold-econtrol": Case(Scaffold(compress="econtrol:randk:0.1")),
    "fedadam-qsgd": Case(FedAdam(compress="qsgd:4", weights="fedau", aggregator="median")),
    "fedprox-lowrank-ccvr": Case(FedProx(compress="ef:lowrank:2", then="ccvr:20", weights="fedce")),
    "fedbuff-bits": Case(FedBuff(buffer=2, compress="ef:bits:4", compress_down="bits:8")),
    "fedprox-rows": Case(FedProx(row_noise="0.5:0.5", client_momentum=0.5, aggregator="median")),
    "scaffold-past": Case(Scaffold(client_momentum=0.9, aggregator="cclip"), {"attack": "ipm:0.2"}),
    "fedavg-past-topk": Case(FedAvg(client_momentum=0.5, compress="ef21:topk:0.1", weights="fedce", buffers="local")),
    "fedprox-fedce-ccvr": Case(FedProx(weights="fedce", aggregator="median", then="ccvr:20")),
}
"""Methods combined otherwise than they do themselves."""
ROUGH = {"fleet": "phones", "drops": 0.15}
SCHEDULES = {
    "rounds": Case(FedAvg(), {**ROUGH, "availability": "markov:0.5:0.2"}),
    "deadline": Case(FedAvg(), {**ROUGH, "schedule": "deadline:60%", "over_selection": 1.5}),
    "partial": Case(FedProx(), {**ROUGH, "schedule": "deadline:50%", "late": "partial"}),
    "buffered": Case(FedAvg(form="delta"), {**ROUGH, "schedule": "buffered:2", "availability": "bernoulli:0.5:labels"}),
    "interval": Case(FedAvg(form="delta"), {**ROUGH, "schedule": "interval:40%"}),
    "tiered": Case(FedAvg(form="delta"), {**ROUGH, "schedule": "tiered:2", "availability": "markov:0.5:0.2"}),
    "compass": Case(FedAvg(form="delta"), {**ROUGH, "schedule": "compass:2:8:1.2", "participation": 1.0}),
    "async": Case(FedAvg(form="delta"), {**ROUGH, "schedule": "async", "availability": "markov:0.5:0.2"}),
    "gossip": Case(
        VarGossip(), {**ROUGH, "schedule": "gossip", "availability": "markov:0.5:0.2", "topology": "onepeer"}
    ),
    "gossip-all": Case(DPSGD(), {"fleet": "phones", "schedule": "gossip", "topology": "ring", "participation": 1.0}),
}
SMALL: dict[str, dict[str, Any]] = {
    "fedbuff": {"buffer": 2},
    "fedopt": {"server_optimizer": "sgg:2+grokfast+adam"},
    "fedcompass": {"least": 2, "most": 8},
    "cfl": {"wait": 1, "eps1": 9.0, "eps2": 0.0},
    "ahc": {"wait": 1, "every": 1, "cut": 0.0},
    "scool": {"settle": 2, "keep": 0.6},
    "finalmerge": {"merge_after": 2},
    "feddistill": {"exclude_own": True},
    "fedtgp": {"server_epochs": 2},
    "feddf": {"server_steps": 3},
    "fedgen": {"share": "head", "generator_steps": 3},
    "fedmd": {"warm_up": 1},
    "flexifed": {"strategy": "basic"},
    "fedlex": {"explore_epochs": 2, "patience": 1},
    "fedimpro": {"ramp": 2, "cut": 1, "statistics": "pooled"},
    "ggeur": {"target": 30},
    "fedcog": {"start": 1, "images": 16, "generate_steps": 3},
    "fald": {"burn_in": 1, "thin": 2, "keep": 2},
    "ccvr": {"virtual": 20},
    "fedloge": {"frame_steps": 20},
    "fedetf": {"personal_rounds": 2},
    "fedd2s": {"drop_every": 2},
    "fedins": {"entries": 4, "top": 2},
    "fal": {"attack_steps": 2, "bounds": "0:1"},
    "onebyte": {"history": 1, "check_every": 1, "local_steps": 2},
}
"""Options without which a method does not fit a federation of five clients, or a test, or shows less of its state."""
MIXED = {"models": "mlp:16*0.5,logistic*0.5", "feature_dim": 8}
RUNS: dict[str, dict[str, Any]] = {
    name: MIXED for name, cls in methods.every().items() if cls.needs.architectures == "any"
} | {
    "inco": {"model": "mlp:16x16", "models": "mlp:16x16*0.5,mlp:16*0.5"},
    **{name: {"models": "mlp:16@1.0,0.5,0.25"} for name in ("heterofl", "fedrolex", "feddropout")},
    "flexifed": {"model": "mlp:16x12", "models": "mlp:16x12*0.5,mlp:16*0.5"},
    "fedadp": {"model": "mlp:16x12", "models": "mlp:16x12*0.5,mlp:10*0.5"},
    "fedd2s": {"model": "mlp:16x12"},
    "mhd": {**MIXED, "topology": "ring", "participation": 1.0},
    "scool": {"topology": "er:0.7", "participation": 1.0},
    "finalmerge": {"topology": "pull:0.5", "participation": 1.0},
    "vargossip": {"topology": "matching:ring", "participation": 1.0},
    **{name: {"participation": 1.0} for name in ("localgda", "masha1", "masha2")},
    "tracking": {"topology": "er:0.7", "availability": "bernoulli:0.7", "participation": 1.0},
    "dadao": {"topology": "ring", "participation": 1.0},
    "dproxsgt": {"topology": "ring", "participation": 1.0},
    "sgc": {"participation": 1.0, "availability": "bernoulli:0.9"},
}
"""Options of a run with which a method shows what it is for."""
PUBLIC: dict[str, Any] = {"public": 60}
"""What the federation offers to methods that need public rows."""
CASES = (
    {
        name: Case(cls(**SMALL.get(name, {})), RUNS.get(name, {}), PUBLIC if cls.needs.public_data else {})
        for name, cls in methods.every().items()
    }
    | {f"fixture-{k}": c for k, c in FIXTURES.items()}
    | {f"local-{k}": c for k, c in LOCAL.items()}
    | {f"composed-{k}": c for k, c in COMPOSED.items()}
    | {f"schedule-{k}": c for k, c in SCHEDULES.items()}
)


@cache
def federation(public: int = 0) -> Federation:
    """The one for every run that wants so many public rows."""
    return consilience.make_federation("digits", clients=6, partition="dirichlet:0.5", unseen=1, seed=1, public=public)


def run(case: Case, executor: str = "serial", **options: Any) -> consilience.Result:
    base = {"model": "mlp:16", "rounds": ROUNDS, "participation": 3, "eval_clients_every": 2, "checkpoint_every": 1}
    return consilience.run(
        case.method, federation(**case.data), **{**base, **case.options, "executor": executor, **options}
    )


@pytest.fixture(scope="module")
def straight() -> dict[str, consilience.Result]:
    return {}


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def serial(name: str, straight: dict[str, consilience.Result]) -> consilience.Result:
    """A case's run, which leaves torch's generator alone."""
    if name not in straight:
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        straight[name] = run(CASES[name])
        assert torch.equal(torch.rand(1), expected)
    return straight[name]


def test_learns_and_reports(name: str, serial: consilience.Result) -> None:
    assert [line["round"] for line in serial.history] == [1, 2, 3, 4]
    last = serial.history[-1]
    assert last["samples"] > 0
    assert {"mean", "worst10", "std", "jain", "before", "after", "valid"} <= last["clients"].keys()
    assert ("global" in last) == (serial.global_model is not None)
    served = serial.worker.place.topology is None or "global" in last or "merged" in last
    assert ("unseen" in last) == served
    assert not served or last["unseen"]["mean"] >= 0
    assert not serial.refused
    judged = [row for row in serial.clients if row["round"] == ROUNDS]
    assert [row["client"] for row in judged] == list(range(6))
    assert sum(not row["seen"] for row in judged) == 1


def test_processes_give_the_same_bits(name: str, serial: consilience.Result) -> None:
    beside = run(CASES[name], "processes", workers=2)
    assert beside.digest == serial.digest
    assert beside.timeline == serial.timeline


@pytest.fixture(scope="module")
def on_ray() -> Iterator[None]:
    root = str(Path(__file__).parents[2])
    sys.path.append(root)  # where actors find the fixtures
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        with connected(None, 2):
            yield
    sys.path.remove(root)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_bits(name: str, serial: consilience.Result, on_ray: None) -> None:
    beside = run(CASES[name], "ray", workers=2)
    assert beside.digest == serial.digest
    assert beside.timeline == serial.timeline


def test_same_bits_after_dying_anywhere(
    name: str, serial: consilience.Result, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run that dies at each place in turn, each time after it has gone on from where it died before."""
    out, resumed = tmp_path / "run", False
    for place, count in (("client-after", 5), ("work", 1), ("aggregate", 2), ("evaluate", 1), ("checkpoint-middle", 1)):
        with monkeypatch.context() as patch:
            patch.setenv("CONSILIENCE_FAILPOINT", f"{place}:{count}:raise")
            with pytest.raises(failpoint.Died, match=place):
                run(CASES[name], out=out, resume=resumed)
        resumed = True
    result = run(CASES[name], out=out, resume=True)
    assert result.digest == serial.digest
    assert (out / "digest.txt").read_text() == serial.digest
    timeline = out / "timeline.jsonl"
    lines = [json.loads(line) for line in timeline.read_text().splitlines()] if timeline.exists() else []
    assert lines == result.timeline == serial.timeline
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]


def test_state_survives_the_codec(name: str, serial: consilience.Result) -> None:
    blob = encode(serial.snapshot)
    assert len(blob) == encoded_size(serial.snapshot)
    again = decode(blob)
    assert tr.digest(again) == tr.digest(serial.snapshot)
    assert type(again.server) is type(serial.server)


def test_evaluation_changes_nothing(name: str, serial: consilience.Result) -> None:
    quiet = run(CASES[name], eval_every=3, eval_clients_every=0, checkpoint_every=0)
    assert quiet.digest.splitlines()[:2] == serial.digest.splitlines()[:2]


class Backwards(Rounds):
    """Rounds whose replies are combined in the order in which they came last to first."""

    def on(self, events: Any, view: Any, state: Any) -> Decision:
        decision = super().on(events, view, state)
        return decision._replace(admit=[list(reversed(group)) for group in decision.admit], start=decision.start[::-1])


def test_order_of_arrival_does_not_matter(name: str, serial: consilience.Result) -> None:
    case = CASES[name]
    own = "schedule" in case.options or case.method.default_schedule() != "rounds"
    plain = run(case, schedule="rounds", late="discard", over_selection=1.0) if own else serial
    assert run(case, schedule=Backwards()).digest == plain.digest


def test_fedasmu_merges_fresh_models_in_mid_job() -> None:
    """With equal speeds nothing is newer in mid-job; with different speeds something is."""
    options = FIXTURES["fedasmu-spread"].options
    mixed = run(Case(FedASMU(), options), rounds=8)
    stale = run(Case(FedASMU(mu_b=0.0), options), rounds=8)
    assert mixed.history[-1]["virtual_s"] == stale.history[-1]["virtual_s"] > 0
    assert mixed.digest != stale.digest
    level = {"participation": 3, "schedule": "rounds"}
    assert run(Case(FedASMU(), level)).digest == run(Case(FedASMU(mu_b=2.0), level)).digest


def test_fedem_with_one_component_is_fedavg() -> None:
    one, plain = run(Case(FedEM(components=1))), run(CASES["fedavg"])
    assert tr.digest(one.server.models[0]) == tr.digest(plain.server.model)


def test_dpsgd_on_a_complete_graph_is_fedavg() -> None:
    alone = {"topology": "complete", "participation": 1.0}
    mixed = run(Case(DPSGD(), alone))
    plain = run(Case(methods.FedAvg(weights="uniform"), alone))
    assert {tr.digest(state.model) for state in mixed.states.values()} == {tr.digest(plain.server.model)}


def test_neighbours_pay_for_their_links() -> None:
    ring = run(FIXTURES["dpsgd-ring"])
    size = encoded_size(ring.states[0].model)
    assert ring.history[-1]["bytes_up"] == ring.history[-1]["bytes_down"]
    assert ring.history[-1]["bytes_up"] % size == 0


def test_failpoints_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CONSILIENCE_FAILPOINT" not in os.environ
    for place in failpoint.NAMES:
        failpoint.reach(place)
