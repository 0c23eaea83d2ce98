"""Whoever does not keep to the protocol: a server that asks for more than it may, a site that answers nonsense."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from consilience.core.encode import decode, encode
from consilience.core.errors import CheckpointError, ConsilienceError
from consilience.core.messages import DeltaUpdate
from consilience.core.tree import Elsewhere
from consilience.deploy import budget, ledger
from consilience.deploy.keys import read_private
from consilience.deploy.policy import PolicyError, smallest
from consilience.deploy.post import Trouble
from consilience.deploy.seal import Sealed, SealError, seal
from consilience.deploy.site import Home
from consilience.deploy.store import Store
from consilience.exporting import digest
from consilience.folder import read_lines
from consilience.privacy.numbers import Recipe

from .conftest import Deployed, Direct, Make
from .test_private_sites import ROWS, copied
from .test_secret_sums import MASKED, steps, talk, three


def ask(run: Deployed, head: dict[str, Any], blobs: Sequence[bytes], number: int) -> dict[str, Any]:
    """What site 0 says to a message that the server's key has signed, anew."""
    given = {k: v for k, v in head.items() if k != "blobs"} | {"number": head["number"] + number * 10**12}
    message = seal(read_private(run.app / "server" / "server.key"), given, blobs)
    return dict(json.loads(Home(run.sites[0]).answer(message, given["node"]).head))


def sent(wire: Direct, what: str) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """The first message of a kind to site 0."""
    message = next(m for node, m in wire.sent if node == 100 and steps(m) == what)
    return json.loads(message.head), message.blobs


def spoiled(run: Deployed, step: str, nonsense: Any) -> Direct:
    """A wire on which site 2 answers so in a step."""
    asked: list[str] = []

    def spoil(node: int, message: Sealed, down: bool) -> Sealed:
        if node == 102 and down:
            asked.append(steps(message))
        if node != 102 or down or asked[-1] != step:
            return message
        head = {k: v for k, v in json.loads(message.head).items() if k != "blobs"}
        said = nonsense(decode(message.blobs[0]))
        return seal(read_private(run.sites[2] / "site.key"), head, [encode(said)])

    return Direct(run.sites, spoil)


# --- a server --------------------------------------------------------------------------------------------------


def test_the_same_message_in_another_deployment_is_another_question(deployed: Make) -> None:
    """With other noise, and paid for, although its bytes are the same. A deployment that has begun stays what it is."""
    run = deployed(ROWS, rounds="1", clients="3", eval_clients_every="0")
    wire = Direct(run.sites)
    run.run(wire)
    hello, _ = sent(wire, "hello")
    train, blobs = sent(wire, "train")
    before = budget.costs(ledger.read(run.sites[0]))
    ask(run, train, blobs, 1)
    assert budget.spent(budget.costs(ledger.read(run.sites[0])), 1e-5) == budget.spent(before, 1e-5)
    hello["told"]["options"]["row_noise"] = "9.0:0.5"
    assert "another configuration" in ask(run, hello, [], 2)["refused"]
    begin, shared = sent(wire, "begin")
    for number, (head, parts) in enumerate([(hello, ()), (begin, shared), (train, blobs)], 3):
        ask(run, {**head, "run": "other"}, parts, number)
    after = budget.costs(ledger.read(run.sites[0]))
    assert len({one.id for one in after}) == len({one.id for one in before}) + 1
    assert budget.spent(after, 1e-5) > budget.spent(before, 1e-5)


@pytest.mark.parametrize("number", [-50, 0.5, True, "7"])
def test_steps_are_whole_numbers(number: Any, deployed: Make) -> None:
    """Fewer than none would give back what was spent."""
    run = deployed(ROWS, rounds="1", clients="3", eval_clients_every="0")
    wire = Direct(run.sites)
    run.run(wire)
    train, blobs = sent(wire, "train")
    job, *rest = decode(blobs[1])
    before = budget.costs(ledger.read(run.sites[0]))
    said = ask(run, train, [blobs[0], bytes(encode((job._replace(steps=number), *rest)))], 1)
    assert "steps" in said["refused"]
    assert budget.costs(ledger.read(run.sites[0])) == before


@pytest.mark.parametrize("key", ["../other/0000000001-00", "./0000000001-00", "/etc/x", "0000000001-0", "", 3])
def test_names_of_states_are_no_paths(key: Any, tmp_path: Path) -> None:
    Store(tmp_path / "other").put(1, 0, {"a": torch.ones(1)})
    Store(tmp_path / "states").put(1, 0, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no name of a state"):
        Store(tmp_path / "states").get(Elsewhere(key, ""))


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/x", "a\0b", "x" * 999])
def test_names_of_deployments_are_no_paths(name: str, deployed: Make) -> None:
    run = deployed("fedavg", rounds="1", eval_clients_every="0")
    wire = Direct(run.sites)
    run.run(wire)
    hello, _ = sent(wire, "hello")
    files = sorted(run.sites[0].rglob("*"))
    with pytest.raises(SealError, match="no run or number"):
        ask(run, {**hello, "run": name}, [], 1)
    assert sorted(run.sites[0].rglob("*")) == files


def test_with_secret_sums_nothing_goes_among_neighbours(deployed: Make) -> None:
    run = deployed("fedavg", rounds="1", eval_clients_every="0", **MASKED)
    wire = Direct(run.sites)
    run.run(wire)
    train, blobs = sent(wire, "train")
    for call in ("send", "mix"):
        assert "secret sums" in ask(run, {**train, "call": call}, blobs, len(call))["refused"]


def test_an_update_made_anew_is_not_masked_again(tmp_path: Path) -> None:
    """Under the same masks the difference of both would be told."""
    sites, update = three(tmp_path)
    told, _ = talk(sites, update)
    other = DeltaUpdate({"p": torch.full((3,), 9.0)}, {})
    with pytest.raises(PolicyError, match="masked its update already"):
        sites[0].answer("masked", 1, told["wanted"][0], lambda key: other)


def test_an_update_of_long_ago_is_not_masked_again(tmp_path: Path) -> None:
    sites, update = three(tmp_path)
    for round, key in enumerate("ab", 1):
        talk(sites, update, round, key)
    with pytest.raises(PolicyError, match="masked its update already"):
        talk(sites, update, 3, "a")


def test_an_update_is_clipped_to_the_norm_that_was_told(deployed: Make) -> None:
    run = deployed("fedavg", rounds="1", noise_multiplier="1.0", dp_clip="0.3", dp_mechanism="fixed", **MASKED)
    wire = Direct(run.sites)
    run.run(wire)
    masked, (blob,) = sent(wire, "masked")
    args = decode(blob)
    norms: list[Any] = [0.4, float("nan"), float("inf"), "1"]
    for i, norm in enumerate(norms, 1):
        wanted = bytes(encode({**args, "recipe": Recipe({"delta": 1.0}, "0.3", norm)}))
        assert "clipped otherwise" in ask(run, masked, [wanted], i)["refused"]


def test_a_poisson_draw_may_be_of_one() -> None:
    config = {
        "participation": 0.5, "secure": None, "schedule": None, "noise_multiplier": 1.0, "epsilon": None,
        "dp_mechanism": "poisson", "delta": 1e-5, "dp_clip": "1.0",
    }  # fmt: skip
    told = {"config": config, "sites": list("abcdefgh"), "method": "fedavg", "options": {}}
    assert smallest(told) == 1
    assert smallest({**told, "config": {**config, "dp_mechanism": "fixed"}}) == 4
    assert smallest({**told, "config": {**config, "participation": 1.0}}) == 8
    assert smallest({**told, "config": {**config, "noise_multiplier": None}}) == 4


# --- a site ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "nonsense"),
    [
        ("keys", lambda said: {**said, "mask": "00" * 32}),
        ("keys", lambda said: {**said, "seal": "00" * 32}),
        ("keys", lambda said: {**said, "mask": 3}),
        ("shares", lambda said: {**said, float("inf"): "00"}),
        ("shares", lambda said: {**said, 1e300: "00"}),
        ("shares", lambda said: {**said, "9" * 5000: "00"}),
        ("unmask", lambda said: {**said, "seeds": {float("-inf"): "0"}}),
        ("unmask", lambda said: {**said, "seeds": {**said["seeds"], "1": "f" * 10**6}}),
        ("unmask", lambda said: {**said, "seeds": {**said["seeds"], "1": "-1"}}),
    ],
    ids=["low mask", "low seal", "a number", "infinity", "large", "long", "minus infinity", "digits", "negative"],
)
def test_nonsense_costs_its_site_alone(step: str, nonsense: Any, deployed: Make) -> None:
    run = deployed("fedavg", rounds="1", eval_clients_every="0", **MASKED)
    folder = run.run(spoiled(run, step, nonsense))
    assert len(read_lines(folder.path / "history.jsonl")) == 1
    assert any("site2" in said and "malformed" in said for said in run.said)


@pytest.mark.parametrize("kept", [3, {"a": [1]}, None])
def test_what_stands_for_an_update_has_a_name(kept: Any, deployed: Make) -> None:
    run = deployed("fedavg", rounds="1", eval_clients_every="0", **MASKED)
    asked: list[str] = []

    def spoil(node: int, message: Sealed, down: bool) -> Sealed:
        if node == 102 and down:
            asked.append(steps(message))
        if node != 102 or down or asked[-1] != "train":
            return message
        head = {k: v for k, v in json.loads(message.head).items() if k != "blobs"}
        blobs = [bytes(encode(Elsewhere(kept, ""))), message.blobs[1]]
        return seal(read_private(run.sites[2] / "site.key"), head, blobs)

    folder = run.run(Direct(run.sites, spoil))
    assert len(read_lines(folder.path / "history.jsonl")) == 1
    assert any("site2" in said and "malformed" in said for said in run.said)


def test_boxes_that_cannot_be_opened_are_told_of(deployed: Make) -> None:
    run = deployed("fedavg", rounds="1", eval_clients_every="0", **MASKED)
    wire = spoiled(run, "shares", lambda said: {i: "00" * (len(box) // 2) for i, box in said.items()})
    with pytest.raises(ConsilienceError, match="secure aggregation has"):
        run.run(wire)
    assert any("the shares of client 3 cannot be opened" in said for said in run.said)


def test_a_site_that_is_lost_in_the_sum_keeps_its_old_state(deployed: Make, tmp_path: Path) -> None:
    """Its new one is of an update that nobody has combined: states are as if it had been lost in training."""
    run = deployed("scaffold", rounds="1", eval_clients_every="0", **MASKED)
    other = copied(run, tmp_path / "other")

    def losing(at: str) -> Any:
        return lambda _, m, down: Trouble("x", False) if down and _ == 101 and steps(m) == at else m

    ours = run.run(Direct(run.sites, losing("masked"))).path
    theirs = other.run(Direct(other.sites, losing("train"))).path
    assert digest(ours).split("\n")[1] == digest(theirs).split("\n")[1]
    assert "did not go on with the secret sum" in (ours / "refused.jsonl").read_text()
