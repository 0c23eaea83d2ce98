"""A site keeps to its owner's policy, and its ledger holds all that left it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from consilience.config import settle
from consilience.core.errors import ConfigError, ConsilienceError
from consilience.deploy import ledger, policy

from .conftest import Direct, Make


def rule(folder: Path, **rules: Any) -> None:
    (folder / "policy.yaml").write_text(yaml.safe_dump(rules))


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"data": ["other.csv"]}, "allows data other.csv, not data.npz"),
        ({"methods": ["fedavg", "fedprox"]}, "allows methods fedavg, fedprox, not scaffold"),
        ({"rounds": 2}, "allows 2 rounds, not 3"),
        ({"minimum_cohort": 4}, "wants 4 sites combined at once; here it may be 3"),
        ({"server_sees": ["sizes"]}, "lets no updates leave"),
    ],
)
def test_what_is_not_allowed_is_refused(rules: dict[str, Any], why: str, deployed: Make) -> None:
    run = deployed("scaffold")
    rule(run.sites[1], **rules)
    with pytest.raises(ConsilienceError, match=f"site site1 refuses: the policy {why}"):
        run.run()
    assert not (run.app / "server" / "run").exists()
    lines = ledger.read(run.sites[1])
    assert [line["fields"] for line in lines] == [{"refused": 0}]


def test_the_smallest_cohort() -> None:
    config = {**settle({}).config.model_dump(), "participation": 1.0}
    told = {"method": "fedavg", "options": {}, "sites": list("abcdef"), "config": config}
    assert policy.smallest(told) == 6
    assert policy.smallest({**told, "config": {**config, "participation": 2}}) == 2
    assert policy.smallest({**told, "config": {**config, "secure": 0.6}}) == 4
    assert policy.smallest({**told, "config": {**config, "schedule": "buffered:3"}}) == 3
    assert policy.smallest({**told, "config": {**config, "schedule": "async"}}) == 1
    assert policy.smallest({**told, "method": "fedbuff", "options": {"buffer": 4}}) == 4


def test_scores_and_losses_stay(deployed: Make) -> None:
    run = deployed("fedavg", sensitive="", data="adult", partition="iid", rounds="2", clients="3", model="logistic")
    rule(run.sites[0], server_sees=["sizes", "updates"])
    rule(run.sites[1], server_sees=["sizes", "updates", "losses", "scores"])
    folder = run.run().path
    rows = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    last = {row["client"]: row for row in rows if row["round"] == 2}
    assert last[0]["n"] == 0
    assert "accuracy" not in last[0]
    assert last[1]["n"]
    assert "groups" not in last[1]
    assert "groups" in last[2]


def test_the_ledger_holds_every_byte(deployed: Make) -> None:
    run = deployed("scaffold")
    left: dict[int, list[int]] = {}

    def count(node: int, message: Any, down: bool) -> Any:
        if not down:
            left.setdefault(node - 100, []).append(message.size)
        return message

    run.run(Direct(run.sites, count))
    for i, folder in enumerate(run.sites):
        lines = ledger.read(folder)
        assert [line["bytes"] for line in lines] == left[i]
        trained = [line for line in lines if line["message"] == "train"]
        assert [line["round"] for line in trained] == [1, 2, 3]
        assert trained[0]["fields"]["control"] == trained[0]["fields"]["delta"] > 1000
    with pytest.raises(ConfigError, match="nothing has left"):
        ledger.read(run.app)


def test_a_wrong_policy_is_told(tmp_path: Path) -> None:
    rule(tmp_path, round=3)
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        policy.read(tmp_path / "policy.yaml")
