"""Noise at real sites: the server's on its sums, a site's on its rows, from secrets of their own; and what it costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from consilience.core import tree as tr
from consilience.core.encode import decode
from consilience.core.errors import ConfigError, ConsilienceError
from consilience.deploy import budget, ledger
from consilience.deploy.budget import Cost
from consilience.deploy.keys import read_private
from consilience.deploy.seal import Sealed, seal
from consilience.deploy.site import Home
from consilience.exporting import digest
from consilience.folder import read_lines
from consilience.methods import make
from consilience.privacy.mechanism import Poisson

from .conftest import Deployed, Direct, Make

CENTRAL = {"clients": "4", "noise_multiplier": "0.8", "dp_clip": "0.3", "participation": "0.5"}
ROWS = "fedavg:row_noise=1.2:0.5,batch_size=16"


def copied(run: Deployed, to: Path) -> Deployed:
    """The same folders elsewhere."""
    for folder in (run.app, *run.sites, run.root / "given"):
        shutil.copytree(folder, to / folder.name)
    return Deployed(to, to / run.app.name, [to / site.name for site in run.sites], run.settings, run.method)


def digest_of(run: Deployed, wire: Any = None) -> str:
    return digest(run.run(wire).path).split("\n")[0]


@pytest.mark.parametrize("mechanism", ["poisson", "fixed", "tree"])
def test_the_servers_noise(mechanism: str, deployed: Make, tmp_path: Path) -> None:
    """It comes from the server's secret, so that it is the same after a crash, another elsewhere, and costs what the
    simulation says."""
    run = deployed("fedavg", dp_mechanism=mechanism, rounds="4", **CENTRAL)
    (run.app / "server" / "noise.key").write_text("a" * 64)
    killed, other = copied(run, tmp_path / "killed"), copied(run, tmp_path / "other")
    (other.app / "server" / "noise.key").unlink()
    folder = run.run().path
    assert len(read_lines(folder / "privacy.jsonl")) == 4
    sent = 0

    def stop(node: int, message: Sealed, down: bool) -> Sealed:
        nonlocal sent
        sent += down and json.loads(message.head).get("call") == "train" and json.loads(message.head)["round"] == 3
        if sent:
            raise KeyboardInterrupt
        return message

    with pytest.raises(KeyboardInterrupt):
        killed.run(Direct(killed.sites, stop))
    assert digest_of(killed) == digest(folder).split("\n")[0]
    assert digest_of(other) != digest_of(killed)
    last = read_lines(folder / "history.jsonl")[-1]["privacy"]
    run.simulate()
    assert last["epsilon"] == read_lines(run.root / "simulated" / "history.jsonl")[-1]["privacy"]["epsilon"] > 0


def test_rows_have_the_sites_own_noise(deployed: Make, tmp_path: Path) -> None:
    run = deployed(ROWS, rounds="2", clients="3")
    for site in run.sites:
        (site / budget.KEY).write_bytes(bytes(32))
    same, other = copied(run, tmp_path / "same"), copied(run, tmp_path / "other")
    (other.sites[0] / budget.KEY).unlink()
    assert digest_of(run) == digest_of(same)
    assert digest_of(other) != digest_of(run)
    key = other.sites[0] / budget.KEY
    assert len(key.read_bytes()) == 32
    assert key.stat().st_mode & 0o077 == 0


def test_every_training_stands_in_the_ledger(deployed: Make) -> None:
    """With all that the server asked for; the same question again is answered alike and costs nothing more."""
    run = deployed(ROWS, rounds="2", clients="3", eval_clients_every="2")
    wire = Direct(run.sites)
    run.run(wire)
    site, method = run.sites[0], make("fedavg", {"batch_size": 16, "row_noise": "1.2:0.5"})
    lines = ledger.read(site)
    calls = [line["message"] for line in lines if "rows" in line]
    assert sorted(calls) == ["judge", "train", "train"]
    found = budget.costs(lines)
    rows = found[0].rows
    steps = method.steps_of(rows)
    assert {one[1:] for one in found} == {(1.2, rows, 16, steps)}
    assert budget.spent(found, 1e-5) == Poisson(rows, 16, 1).epsilon(1.2, 3 * steps, 1e-5)

    def again(message: Sealed, **change: Any) -> list[Any]:
        head = {**{k: v for k, v in json.loads(message.head).items() if k != "blobs"}, **change}
        node = head["node"]
        given = seal(read_private(run.app / "server" / "server.key"), head, message.blobs)
        return [decode(blob) for blob in Home(site).answer(given, node).blobs]

    node, train = next((n, m) for n, m in wire.sent if json.loads(m.head).get("call") == "train")
    assert node == 100
    number = json.loads(train.head)["number"]
    first, second = (again(train, number=number + 10**12 * k)[0] for k in (1, 2))
    assert tr.digest(first) == tr.digest(second)
    after = budget.costs(ledger.read(site))
    assert len(after) == 5
    assert budget.spent(after, 1e-5) == budget.spent(found, 1e-5)
    shown = ledger.show(site)
    assert f"a row has spent epsilon {budget.spent(found, 1e-5):.3g} at delta 1e-05" in shown.caption


def test_noise_is_of_what_was_asked_and_of_who_answers(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    seeds = {
        budget.seed(tmp_path / name, blobs)
        for name in "ab"
        for blobs in ([b"x", b"y"], [b"xy"], [b"y", b"x"], [b"x", b"y", b""])
    }
    assert len(seeds) == 8
    assert budget.seed(tmp_path / "a", [b"x"]) == budget.seed(tmp_path / "a", [b"x"])


def test_trainings_of_other_kinds_are_added_up() -> None:
    a, b = Cost("a", 1.0, 100, 10, 20), Cost("b", 2.0, 100, 10, 20)
    alone = [Poisson(100, 10, 1).epsilon(one.noise, 20, 1e-5) for one in (a, b)]
    assert budget.spent([a, b], 1e-5) == pytest.approx(sum(alone))
    assert budget.spent([a, a], 1e-5) == alone[0]
    assert budget.spent([a, a._replace(id="c")], 1e-5) == Poisson(100, 10, 1).epsilon(1.0, 40, 1e-5)


def test_an_owners_budget(deployed: Make) -> None:
    """A site stops when its rows have spent what their owner allows; the others go on."""
    run = deployed(ROWS, rounds="3", clients="3", eval_clients_every="0")
    run.run()
    costs = budget.costs(ledger.read(run.sites[1]))
    two, three = (budget.spent(costs[:n], 1e-5) for n in (2, 3))
    for folder in (run.app / "server" / "run", *(site / "runs" for site in run.sites)):
        shutil.rmtree(folder)
    (run.app / "server" / "registered.json").unlink()
    for site in run.sites:
        (site / ledger.FILE).unlink()
    (run.sites[1] / "policy.yaml").write_text(f"epsilon: {(two + three) / 2}\n")
    run.run()
    assert any("site site1 refuses: the policy's epsilon" in said and "is used up" in said for said in run.said)
    kept = [len(budget.costs(ledger.read(site))) for site in run.sites]
    assert kept == [4, 2, 4]  # the last is the training by which they are judged at the end


def test_a_budget_needs_noise(deployed: Make) -> None:
    run = deployed("fedavg", rounds="1")
    (run.sites[0] / "policy.yaml").write_text("epsilon: 3\n")
    with pytest.raises(ConsilienceError, match="the policy's epsilon of 3 for a row needs a method with row_noise"):
        run.run()


def test_privacy_is_checked_when_a_deployment_is_made(deployed: Make) -> None:
    with pytest.raises(ConfigError, match="say the same thing"):
        deployed("fedavg", epsilon="3", noise_multiplier="1")
    with pytest.raises(ConfigError, match="only weights=uniform"):
        deployed("fedavg:weights=samples", noise_multiplier="1")
