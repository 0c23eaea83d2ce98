"""Client states: the same bits whether they are in memory or on file, and whole after any crash or damage."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NOISY, Gossip, federation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consilience.core import failpoint
from consilience.core import tree as tr
from consilience.core.errors import CheckpointError, ConfigError
from consilience.core.method import Method
from consilience.core.states import OVERHEAD, States, Stored
from consilience.core.units import parse_bytes
from consilience.methods.fedavg import FedAvg
from consilience.methods.local import Local
from consilience.methods.moon import Moon
from consilience.methods.scaffold import Scaffold
from consilience.simulate import run

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1}


def state(value: int, size: int = 5) -> dict[str, Any]:
    return {"x": torch.full((size,), float(value)), "n": value, "half": torch.ones((), dtype=torch.bfloat16)}


def values(states: Any) -> dict[int, int]:
    """What each client's state says, after checking that the whole of it does."""
    found = {}
    for client, own in states.items():
        assert torch.equal(own["x"], state(own["n"], len(own["x"]))["x"])
        found[client] = own["n"]
    return found


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.states"))


STEPS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 6)),
    st.tuples(st.just("get"), st.integers(0, 6)),
    st.tuples(st.sampled_from(["save", "fail", "crash", "shrink"]), st.just(0)),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=40), budget=st.sampled_from([None, 0, 2 * (OVERHEAD + 30)]))
def test_states_are_those_of_a_dict_through_saves_and_crashes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], budget: int | None
) -> None:
    """fail: a checkpoint whose note is never written. crash: what was not saved is lost, and nothing else."""
    folder = tmp_path_factory.mktemp("states")
    states, model = States(lambda: folder, budget), dict[int, int]()
    generations: list[tuple[Any, dict[int, int]]] = []
    for i, (what, client) in enumerate(steps):
        if what == "put":
            states.put(client, state(i))
            model[client] = i
        elif what == "get":
            pinned = states.pin(client)
            found = pinned.tree() if isinstance(pinned, Stored) else pinned
            assert (found and found["n"]) == model.get(client)
        elif what == "save":
            generations = [*generations, (states.save(), dict(model))][-2:]
            states.saved()
        elif what == "shrink" and not generations:
            states.shrink()
        elif what in ("fail", "crash"):
            if what == "fail":
                states.save()
            states = States(lambda: folder, budget)
            model = {}
            if generations:
                noted, model = generations[-1][0], dict(generations[-1][1])
                states.load(noted, generations[0][0] if len(generations) > 1 else None)
            states.tidy()
        assert (len(states), list(states)) == (len(model), sorted(model))
        assert budget is None or states._bytes <= budget
    assert values(states) == model
    for noted, then in generations:  # both generations can still be read
        again = States(lambda: folder)
        again.load(noted)
        assert values(again) == then


def test_a_save_writes_what_has_changed_only(tmp_path: Path) -> None:
    states = States(lambda: tmp_path)
    for client in range(100):
        states.put(client, state(client, 500))
    sizes = []
    for client in (0, 0, 1, 2, 3):
        states.put(client, state(1000 + client, 500))
        before = {path.name for path in tmp_path.iterdir()}
        states.save()
        sizes.append(sum(p.stat().st_size for p in tmp_path.iterdir() if p.name not in before))
        states.saved()
    one = sizes[0] / 100
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)  # the other line's first
    assert all(size < 4 * one for size in sizes[2:]), sizes  # what has changed since the line's last turn


def test_a_save_of_nothing_new_writes_nothing(tmp_path: Path) -> None:
    states = States(lambda: tmp_path / "states")
    assert states.save()["files"] == []
    states.saved()
    assert not (tmp_path / "states").exists()
    states.put(3, state(1))
    for _ in range(2):
        states.save()
        states.saved()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()}
    states.save()
    states.saved()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()} == before


@pytest.mark.parametrize("saves", [True, False])
def test_files_do_not_grow_for_ever(tmp_path: Path, saves: bool) -> None:
    states, sizes = States(lambda: tmp_path, 0), []
    for i in range(60):
        for client in range(5) if i % 2 else (9,):
            states.put(client, state(i, 1000))
        if saves:
            states.save()
            states.saved()
        else:
            states.shrink()
        sizes.append(on_disk(tmp_path))
    assert max(sizes[30:]) <= 2 * max(sizes[:10])
    assert values(states) == {0: 59, 1: 59, 2: 59, 3: 59, 4: 59, 9: 58}


def test_any_damage_to_a_line_is_seen_and_leaves_the_other_whole(tmp_path: Path) -> None:
    states, noted = States(lambda: tmp_path, 0), []
    for i in range(2):
        states.put(i, state(i))
        noted.append(states.save())
        states.saved()
    for name, _, _ in noted[1]["files"]:
        path = tmp_path / name
        whole = path.read_bytes()
        for at in range(0, len(whole), 3):
            for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]):
                path.write_bytes(damaged)
                with pytest.raises(CheckpointError):
                    States(lambda: tmp_path).load(noted[1])
            older = States(lambda: tmp_path)
            older.load(noted[0])
            assert values(older) == {0: 0}
        path.write_bytes(whole)
        damaged_other = States(lambda: tmp_path)
        (tmp_path / noted[0]["files"][0][0]).write_bytes(b"")
        damaged_other.load(noted[1], noted[0])  # the predecessor is of no use, and is written anew
        damaged_other.save()
        assert values(damaged_other) == {0: 0, 1: 1}


def test_a_state_damaged_while_a_run_goes_on_is_named(tmp_path: Path) -> None:
    states = States(lambda: tmp_path, 0)
    states.put(4, state(1))
    (path,) = tmp_path.iterdir()
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match="damaged"):
        states[4]


def test_a_pinned_state_is_the_one_that_was_pinned(tmp_path: Path) -> None:
    states = States(lambda: tmp_path, 0)
    states.put(1, state(1))
    pinned = states.pin(1)
    states.put(1, state(2))
    assert isinstance(pinned, Stored)
    assert pinned.tree()["n"] == 1
    assert states[1]["n"] == 2


@pytest.mark.parametrize(("text", "n"), [("0", 0), (7, 7), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("2kB", 2000)])
def test_amounts(text: Any, n: int) -> None:
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "-1", "1GiB", "many", "1e9", "nan", "MB"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(ConfigError, match="500MB"):
        parse_bytes(text)


# --- in runs ---------------------------------------------------------------------------------------------------

METHODS: list[Method] = [
    FedAvg(buffers="local", **USUAL), Scaffold(**USUAL), Scaffold(buffers="local", **USUAL), Moon(**USUAL),
    Local(**USUAL), Gossip(**USUAL),
]  # fmt: skip


def whole(method: Method, memory: Any, **more: Any) -> Any:
    options: dict[str, Any] = {
        "model": NOISY, "rounds": 6, "participation": 3, "eval_clients_every": 2, "checkpoint_every": 2,
        "executor": "serial",
    }  # fmt: skip
    return run(method, federation(), client_state_memory=memory, **{**options, **more})


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.buffers}")
def test_any_budget_gives_the_same_bits(method: Method, tmp_path: Path) -> None:
    expected = whole(method, None)
    assert isinstance(expected.states, dict)
    assert expected.states
    for budget in (0, 4 * OVERHEAD):
        tight = whole(method, budget)
        assert not isinstance(tight.states, dict)
        assert tight.digest == expected.digest
        assert tr.digest(dict(tight.states)) == tr.digest(expected.states)
        assert whole(method, budget, out=tmp_path / f"{budget}").digest == expected.digest
    assert whole(method, 0, executor="processes", workers=2).digest == expected.digest


def test_states_on_file_are_read_for_clients_in_step() -> None:
    """The stacked executor gets several states in one call."""
    expected = whole(Scaffold(**USUAL), None, executor="stacked", workers=1)
    tight = whole(Scaffold(**USUAL), 0, executor="stacked", workers=1)
    assert not isinstance(tight.states, dict)
    assert tight.digest == expected.digest


PLACES = ("client-after:11", "aggregate:4", "evaluate:3", "state:2", "state:9", "state:13", "checkpoint-before:2")
PLACES += ("states-sealed:1", "states-sealed:2", "checkpoint-middle:2", "checkpoint-middle:3", "checkpoint-after:2")


def named(folder: Path) -> set[str]:
    """The files of states that the checkpoints in a folder name."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {name for note in found for name, _, _ in note["states"]["files"]}


@pytest.fixture(scope="module")
def straight() -> str:
    return str(whole(Scaffold(buffers="local", **USUAL), None).digest)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("budget", ["0", "6KB"])
def test_dying_anywhere_with_states_on_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, budget: str, straight: str
) -> None:
    method = Scaffold(buffers="local", **USUAL)
    with monkeypatch.context() as patch:
        patch.setenv("CONSILIENCE_FAILPOINT", f"{place}:raise")
        with pytest.raises(failpoint.Died):
            whole(method, budget, out=tmp_path)
    other = None if budget == "0" else 0
    assert whole(method, other, out=tmp_path, resume=True).digest == straight
    left = {path.name for path in (tmp_path / "checkpoint" / "states").iterdir()}
    assert left == named(tmp_path / "checkpoint")  # no litter


def test_temporary_files_go_with_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("consilience.execute.shared._RAM", tmp_path / "none")
    result = whole(Scaffold(**USUAL), 0)
    assert [path.suffix for folder in tmp_path.iterdir() for path in folder.glob("a*")] == [".states"]
    assert len(result.states) == 5
    del result
    gc.collect()
    assert not list(tmp_path.iterdir())
    whole(Scaffold(**USUAL), None)
    whole(FedAvg(**USUAL), 0)
    assert not list(tmp_path.iterdir())
