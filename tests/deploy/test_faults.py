"""Sites that vanish, are late, err or lie, and servers that die: the run goes on or stops in one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from consilience.core import failpoint
from consilience.core.errors import ConfigError, ConsilienceError, NeedsError
from consilience.deploy.post import Trouble
from consilience.deploy.server import EVENTS
from consilience.deploy.site import Home
from consilience.exporting import digest
from consilience.folder import read_lines

from .conftest import Deployed, Direct, Make, Slow


def told(run: Deployed) -> list[str]:
    return [f"{event['site']} {event['what']}" for event in read_lines(run.app / "server" / EVENTS)]


def server_lines(folder: Path) -> list[str]:
    return digest(folder).split("\n")[:2]


@pytest.mark.parametrize(
    "name", ["work", "aggregate", "evaluate", "checkpoint-before", "checkpoint-middle", "checkpoint-after"]
)
@pytest.mark.parametrize("method", ["scaffold"])
def test_a_server_that_dies_goes_on(name: str, method: str, deployed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same round, to the same bits; sites that had trained already do so once more from the same state."""
    run = deployed(method)
    monkeypatch.setenv("CONSILIENCE_FAILPOINT", f"{name}:2:raise")
    with pytest.raises(failpoint.Died):
        run.run()
    monkeypatch.delenv("CONSILIENCE_FAILPOINT")
    folder = run.run().path
    assert server_lines(folder) == run.simulate().digest.split("\n")[:2]
    assert [line["round"] for line in read_lines(folder / "history.jsonl")] == [1, 2, 3]
    assert any("goes on after round" in line for line in told(run))


def test_an_asynchronous_server_that_dies_loses_no_work(deployed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that were out are waited for, and the whole can still be replayed."""
    run = deployed("fedbuff:buffer=1", rounds="6")
    monkeypatch.setenv("CONSILIENCE_FAILPOINT", "checkpoint-after:3:raise")
    with pytest.raises(failpoint.Died):
        run.run(Slow(run.sites))
    monkeypatch.delenv("CONSILIENCE_FAILPOINT")
    folder = run.run(Slow(run.sites)).path
    states = [line["state"] for line in read_lines(folder / "timeline.jsonl")]
    assert states.count("combined") == 6
    assert "lost" not in states
    again = run.simulate(replay=str(folder / "arrivals.jsonl"))
    assert digest(folder) == again.digest


def test_a_message_that_was_not_delivered_is_sent_again(deployed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that was killed at its work and comes back costs time, and nothing else."""
    monkeypatch.setattr("consilience.deploy.post.AGAIN", 0.01)
    run = deployed("scaffold")
    died: list[bool] = []

    def kill(node: int, message: Any, down: bool) -> Any:
        head = json.loads(message.head)
        if node == 101 and head.get("kind") == "call" and head["round"] == 2 and len(died) < 2:
            died.append(down)
            return Trouble("died at its work", True)
        return message

    folder = run.run(Direct(run.sites, kill)).path
    assert died == [True, True]
    assert server_lines(folder) == run.simulate().digest.split("\n")[:2]


@pytest.mark.parametrize("down", [True, False])
def test_a_site_that_never_answers(down: bool, deployed: Make) -> None:
    """The others go on; its state is what it was."""
    run = deployed("scaffold", {"timeout": 0.3})

    def eat(node: int, message: Any, going: bool) -> Any:
        late = node == 102 and json.loads(message.head).get("call") == "train" and going == down
        return (
            None if late or (not going and node == 102 and b'"kind": "call"' in message.head and not down) else message
        )

    folder = run.run(Direct(run.sites, eat)).path
    assert [line["round"] for line in read_lines(folder / "history.jsonl")] == [1, 2, 3]
    assert any("site2 did not answer in time" in line for line in told(run))
    states = [line["state"] for line in read_lines(folder / "timeline.jsonl") if line["client"] == 2]
    assert set(states) == {"lost"}


def test_a_site_that_answers_late(deployed: Make) -> None:
    run = deployed("scaffold", {"timeout": 0.4}, eval_clients_every="0", eval_clients="1")
    delays = iter([0.0] * 6 + [0.0, 0.0, 1.5] + [0.0] * 99)
    folder = run.run(Slow(run.sites, delays=delays)).path
    assert any("a later answer is not used" in line for line in told(run))
    states = [line["state"] for line in read_lines(folder / "timeline.jsonl")]
    assert states.count("lost") == 1
    assert states.count("combined") == 8
    again = run.simulate(replay=str(folder / "arrivals.jsonl"))
    assert server_lines(folder) == again.digest.split("\n")[:2]


def test_a_site_that_errs_tells_only_the_kind_of_error(deployed: Make) -> None:
    run = deployed("fedavg")
    (run.sites[1] / "loader.py").write_text(
        "import numpy as np\nfrom pathlib import Path\n\n\ndef rows():\n"
        "    found = dict(np.load(Path(__file__).parent / 'data.npz'))\n"
        "    if (Path(__file__).parent / 'broken').exists():\n        raise RuntimeError('patient 4711')\n"
        "    return found\n"
    )
    site = (run.sites[1] / "site.yaml").read_text()
    (run.sites[1] / "site.yaml").write_text(site.replace("data.npz", "loader:rows"))

    def break_(node: int, message: Any, down: bool) -> Any:
        if json.loads(message.head).get("call") == "train":
            (run.sites[1] / "broken").touch()
        return message

    folder = run.run(Direct(run.sites, break_)).path
    assert len(read_lines(folder / "history.jsonl")) == 3
    assert not any("4711" in line for line in told(run)) or any("loader:rows" in line for line in told(run))


def test_a_site_that_lost_its_state(deployed: Make) -> None:
    run = deployed("scaffold")

    def lose(node: int, message: Any, down: bool) -> Any:
        head = json.loads(message.head)
        if down and node == 100 and head.get("call") == "train" and head["round"] == 2:
            shutil.rmtree(next((run.sites[0] / "runs").iterdir()) / "states")
        return message

    folder = run.run(Direct(run.sites, lose)).path
    assert any("site0 refuses: this site has lost its state" in line for line in told(run))
    assert len(read_lines(folder / "history.jsonl")) == 3


def test_versions_must_fit(deployed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = deployed()
    monkeypatch.setattr("consilience.deploy.post.PROTOCOL", 99)
    with pytest.raises(ConsilienceError, match="site site0 refuses: version mismatch: the server speaks protocol 99"):
        run.run()


def test_sites_that_do_not_join(deployed: Make) -> None:
    run = deployed(section={"join": 0.2})
    wire = Direct(run.sites)
    wire.gone = {102}
    with pytest.raises(ConsilienceError, match=r"1 of 3 sites have not joined in 0.2 s: site2"):
        run.run(wire)


def test_data_that_change(deployed: Make) -> None:
    run = deployed()
    run.run()
    shutil.copy(run.sites[1] / "data.npz", run.sites[0] / "data.npz")
    with pytest.raises(ConsilienceError, match="site0 has other data than when this deployment began"):
        run.run()


def test_models_stay_where_they_belong(deployed: Make) -> None:
    from safetensors.torch import load_file

    run = deployed("fedproto")
    folder = run.run().path
    exported = [next((site / "runs").iterdir()) / "export" for site in run.sites]
    about = json.loads((exported[0] / "config.json").read_text())
    assert about["client"] == "site0"
    assert about["method"] == "fedproto"
    files = [path / about["file"] for path in exported]
    own = [load_file(file) for file in files]
    assert any((own[0][key] != own[1][key]).any() for key in own[0])
    assert files[0].stat().st_mode & 0o077 == 0
    assert not (folder / "export").exists()  # there is no global model, and nothing of theirs is at the server
    for path in folder.rglob("*.states"):
        assert path.stat().st_size < 5000  # names and hashes of states


def test_what_cannot_be_deployed(deployed: Make) -> None:
    with pytest.raises(NeedsError, match="centralised pools all clients' data"):
        deployed("centralised")
    with pytest.raises(ConfigError, match="availability is for simulations"):
        deployed(availability="bernoulli:0.5")
    with pytest.raises(ConfigError, match="give seconds"):
        deployed(schedule="deadline:50%")


def test_a_key_must_be_known(deployed: Make) -> None:
    """A site whose key was changed cannot take part."""
    run = deployed(section={"join": 0.3})
    shutil.copy(run.sites[1] / "site.key", run.sites[0] / "site.key")
    with pytest.raises(ConsilienceError, match="have not joined"):
        run.run()
    assert any("unauthenticated" in line for line in told(run))
    assert Home(run.sites[0])
