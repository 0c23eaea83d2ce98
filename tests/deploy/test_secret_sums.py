"""Secret sums among real sites: the bits of a simulation, no update leaves alone, a site says only what it has said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from consilience.core.encode import decode
from consilience.core.errors import ConfigError, ConsilienceError
from consilience.core.messages import DeltaUpdate
from consilience.core.tree import Elsewhere
from consilience.deploy import ledger
from consilience.deploy.masking import Masking, pack, unpack
from consilience.deploy.policy import PolicyError
from consilience.deploy.post import Trouble
from consilience.deploy.seal import Sealed, SealError
from consilience.deploy.site import Home
from consilience.exporting import digest
from consilience.folder import read_lines
from consilience.privacy.numbers import BITS, Recipe

from .conftest import Direct, Make
from .test_private_sites import copied
from .test_same import numbers

MASKED = {"secure": "0.6", "clients": "4"}


def steps(message: Sealed) -> str:
    head = json.loads(message.head)
    return str(head.get("step", head.get("call", head["kind"])))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("fedavg", {}),
        ("scaffold", {"participation": "3"}),
        ("fedavg", {"noise_multiplier": "0.0", "dp_clip": "0.3", "dp_mechanism": "fixed", "participation": "1.0"}),
    ],
)
def test_the_bits_of_a_simulation(method: str, more: dict[str, str], deployed: Make) -> None:
    run = deployed(method, **MASKED, **more)
    wire = Direct(run.sites)
    folder = run.run(wire)
    simulated = run.simulate()
    ours, theirs = digest(folder.path).split("\n"), simulated.digest.split("\n")
    assert ours[:2] == theirs[:2]
    lines = [read_lines(path / "history.jsonl") for path in (folder.path, run.root / "simulated")]
    assert [numbers(line) for line in lines[0]] == [numbers(line) for line in lines[1]]
    assert {"keys", "shares", "masked", "unmask"} <= {steps(message) for _, message in wire.sent}


def test_no_update_leaves_alone(deployed: Make) -> None:
    """What a site says after training has no tensor and no hash of one; masked numbers look like chance."""
    run = deployed("fedavg", **MASKED)
    asked: dict[int, str] = {}
    said: list[tuple[str, Any]] = []

    def look(node: int, message: Sealed, down: bool) -> Sealed:
        if down:
            asked[node] = steps(message)
        else:
            said.append((asked[node], [decode(blob) for blob in message.blobs]))
        return message

    run.run(Direct(run.sites, look))
    trained = [blobs[0] for what, blobs in said if what == "train"]
    assert all(isinstance(update, Elsewhere) and update.sha256 == "" for update in trained)
    assert len(trained) == 12
    masked = [unpack(blobs[0]) for what, blobs in said if what == "masked"]
    assert len(masked) == 12
    for vector in masked:
        assert float(vector.mean()) / 2**BITS == pytest.approx(0.5, abs=0.05)
    for site in run.sites:
        fields = {name for line in ledger.read(site) for name in line["fields"]}
        assert "delta" not in fields
        assert "secret sum, masked" in fields


@pytest.mark.parametrize("at", ["keys", "shares", "masked", "unmask"])
def test_a_site_that_is_lost(at: str, deployed: Make) -> None:
    """Whenever one of four is lost, the sum is that of the others, or of all where it had sent already."""
    run = deployed("fedavg:weights=uniform", rounds="1", eval_clients_every="0", **MASKED)

    def lose(node: int, message: Sealed, down: bool) -> Sealed | Trouble:
        return Trouble("is not connected any more", False) if down and node == 101 and steps(message) == at else message

    folder = run.run(Direct(run.sites, lose))
    (line,) = read_lines(folder.path / "history.jsonl")
    refused = read_lines(folder.path / "refused.jsonl")
    assert [(found["client"], found["reason"]) for found in refused] == (
        [(1, f"did not go on with the secret sum ({at})")] if at != "unmask" else []
    )
    assert any("is not connected any more" in said for said in run.said)
    shutil.rmtree(run.app / "server" / "run")
    (run.app / "server" / "registered.json").unlink()
    for site in run.sites:
        shutil.rmtree(site / "runs")

    def without(node: int, message: Sealed, down: bool) -> Sealed | Trouble:
        lost = at != "unmask" and down and node == 101 and steps(message) == "train"
        return Trouble("x", False) if lost else message

    other = run.run(Direct(run.sites, without))
    (reference,) = read_lines(other.path / "history.jsonl")
    assert line["global"]["loss"] == pytest.approx(reference["global"]["loss"], abs=1e-6)


def test_too_few_are_left(deployed: Make) -> None:
    run = deployed("fedavg", rounds="1", **MASKED)

    def lose(node: int, message: Sealed, down: bool) -> Sealed | Trouble:
        return Trouble("x", False) if down and node in (101, 102) and steps(message) == "masked" else message

    with pytest.raises(ConsilienceError, match=r"round 1: secure aggregation has 2 of 4 clients left, 3 are needed"):
        run.run(Direct(run.sites, lose))


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "unmask"])
@pytest.mark.parametrize("how", ["cut", "other"])
def test_an_answer_that_is_no_use_costs_its_site(step: str, how: str, deployed: Make) -> None:
    """A site that signs nonsense is left out, and the rest goes on."""
    from consilience.core.encode import encode
    from consilience.deploy.keys import read_private
    from consilience.deploy.seal import seal

    run = deployed("fedavg", rounds="1", eval_clients_every="0", **MASKED)
    asked: list[str] = []

    def spoil(node: int, message: Sealed, down: bool) -> Sealed:
        if node != 102:
            return message
        if down:
            asked.append(steps(message))
            return message
        if asked[-1] != step:
            return message
        head = json.loads(message.head)
        nonsense = bytes(encode({"seal": "00", "seeds": {"1": "x"}, "1": 7}))
        blobs = [message.blobs[0][:-3] if how == "cut" else nonsense]
        return seal(read_private(run.sites[2] / "site.key"), {k: v for k, v in head.items() if k != "blobs"}, blobs)

    folder = run.run(Direct(run.sites, spoil))
    assert len(read_lines(folder.path / "history.jsonl")) == 1
    assert any("site2" in said and "malformed" in said for said in run.said)


def test_shares_that_do_not_fit_stop_the_run(deployed: Make) -> None:
    """In a clear line: without them the masks of a site cannot be taken out."""
    from consilience.core.encode import encode
    from consilience.deploy.keys import read_private
    from consilience.deploy.seal import seal

    run = deployed("fedavg", rounds="1", eval_clients_every="0", **MASKED)
    asked: list[str] = []

    def lie(node: int, message: Sealed, down: bool) -> Sealed:
        if node == 100 and down:
            asked.append(steps(message))
        if node != 100 or down or asked[-1] != "unmask":
            return message
        head, said = json.loads(message.head), decode(message.blobs[0])
        said["seeds"]["3"] = f"{int(said['seeds']['3'], 16) ^ 2**500:x}"
        return seal(
            read_private(run.sites[0] / "site.key"), {k: v for k, v in head.items() if k != "blobs"}, [encode(said)]
        )

    with pytest.raises(ConsilienceError, match="round 1: a secret sum cannot be unmasked"):
        run.run(Direct(run.sites, lie))


def test_a_lost_sites_state_is_not_committed(deployed: Make) -> None:
    """Its control variate goes back with its update: the run is the one in which it did not answer."""

    def lost_at(step: str) -> Callable[[int, Sealed, bool], Sealed | Trouble]:
        def lose(node: int, message: Sealed, down: bool) -> Sealed | Trouble:
            gone = down and node == 101 and steps(message) == step and json.loads(message.head)["round"] == 2
            return Trouble("x", False) if gone else message

        return lose

    run = deployed("scaffold:weights=uniform", rounds="3", eval_clients_every="0", **MASKED)
    first = run.run(Direct(run.sites, lost_at("masked"))).path
    clients = digest(first).split("\n")[1]
    shutil.rmtree(first)
    (run.app / "server" / "registered.json").unlink()
    for site in run.sites:
        shutil.rmtree(site / "runs")
    other = run.run(Direct(run.sites, lost_at("train"))).path
    assert digest(other).split("\n")[1] == clients


def test_a_server_that_dies_in_a_sum(deployed: Make) -> None:
    """It asks again, the sites say what they said, and the bits are those of a run that was not killed."""
    run = deployed("scaffold", **MASKED)
    simulated = run.simulate()
    asked: list[str] = []

    def stop(node: int, message: Sealed, down: bool) -> Sealed:
        if down:
            asked.append(steps(message))
            if asked.count("unmask") == 6 and steps(message) == "unmask":  # in the second round, two have answered
                raise KeyboardInterrupt
        return message

    with pytest.raises(KeyboardInterrupt):
        run.run(Direct(run.sites, stop))
    folder = run.run()
    assert digest(folder.path).split("\n")[:2] == simulated.digest.split("\n")[:2]


def test_a_server_that_dies_in_a_sum_and_a_site_that_is_gone_then(deployed: Make, tmp_path: Path) -> None:
    """Others have masked their updates for a sum with it, so it goes on, and the site is lost in it."""
    run = deployed("scaffold", rounds="2", eval_clients_every="0", **MASKED)
    other = copied(run, tmp_path / "other")
    masked = 0

    def stop(node: int, message: Sealed, down: bool) -> Sealed:
        nonlocal masked
        masked += down and steps(message) == "masked"
        if masked == 3:
            raise KeyboardInterrupt
        return message

    def lose(*at: str) -> Callable[[int, Sealed, bool], Sealed | Trouble]:
        return lambda node, message, down: (
            Trouble("x", False) if down and node == 101 and steps(message) in at else message
        )

    with pytest.raises(KeyboardInterrupt):
        run.run(Direct(run.sites, stop))
    ours = run.run(Direct(run.sites, lose("train", "keys", "shares", "masked"))).path

    def lost_too(node: int, message: Sealed, down: bool) -> Sealed | Trouble:
        at = "masked" if json.loads(message.head)["round"] == 1 else "train"
        return Trouble("x", False) if down and node == 101 and steps(message) == at else message

    theirs = other.run(Direct(other.sites, lost_too)).path
    assert digest(ours).split("\n")[0] == digest(theirs).split("\n")[0]


def test_what_the_policy_lets_leave(deployed: Make) -> None:
    seen = ["sizes", "sums", "losses", "scores"]
    for secure, why in (("0.6", None), (None, "lets no updates leave")):
        run_of: Callable[..., Any] = deployed
        run = run_of("fedavg", rounds="1", clients="4", **({"secure": secure} if secure else {}))
        (run.sites[1] / "policy.yaml").write_text(yaml.safe_dump({"server_sees": seen}))
        if why is None:
            run.run()
        else:
            with pytest.raises(ConsilienceError, match=why):
                run.run()
        shutil.rmtree(run.app)
        for folder in [*run.sites, run.root / "given"]:
            shutil.rmtree(folder)
    run = deployed("fedavg", rounds="1", **MASKED)
    (run.sites[1] / "policy.yaml").write_text("minimum_cohort: 4")
    with pytest.raises(ConsilienceError, match="wants 4 sites combined at once; here it may be 3"):
        run.run()


def test_what_does_not_fit_is_refused_first(deployed: Make) -> None:
    with pytest.raises(ConfigError, match="greater than 0"):
        deployed("fedavg", secure="0.4")
    with pytest.raises(ConsilienceError, match="not only their sum"):
        deployed("fednova", **MASKED)


# --- a site's session ------------------------------------------------------------------------------------------


def three(tmp_path: Path, least: int = 1) -> tuple[list[Masking], Callable[[int], Callable[[str], Any]]]:
    updates = [DeltaUpdate({"p": torch.full((3,), float(i + 1))}, {}) for i in range(3)]
    made = [Masking(tmp_path / f"{i}.json", i, 0.6, least) for i in range(3)]
    return made, lambda i: lambda key: updates[i]


def talk(sites: list[Masking], update: Any, round: int = 1, key: str = "a") -> tuple[dict[str, Any], list[Any]]:
    """Everything up to the masked vectors."""
    asked = {"asked": [0, 1, 2]}
    keys = [site.answer("keys", round, asked, update(i)) for i, site in enumerate(sites)]
    peers = {"peers": {str(i + 1): [k["seal"], k["mask"]] for i, k in enumerate(keys)}}
    boxes = [site.answer("shares", round, peers, update(i)) for i, site in enumerate(sites)]
    wanted = [
        {"boxes": {str(j + 1): boxes[j][str(i + 1)] for j in range(3)}, "recipe": Recipe({"delta": 1.0}), "key": key}
        for i in range(3)
    ]
    masked = [site.answer("masked", round, wanted[i], update(i)) for i, site in enumerate(sites)]
    return {"asked": asked, "peers": peers, "wanted": wanted}, masked


def test_a_site_says_only_what_it_has_said(tmp_path: Path) -> None:
    sites, update = three(tmp_path)
    told, masked = talk(sites, update)
    again, masked_again = talk(sites, update)  # the same question
    assert told == again
    assert all(torch.equal(a, b) for a, b in zip(masked, masked_again, strict=True))
    one, mine = sites[0], update(0)
    fewer = {"peers": {i: keys for i, keys in told["peers"]["peers"].items() if i != "3"}}
    for step, args, why in (
        ("keys", {"asked": [0, 1]}, "in a secret sum of others"),
        ("shares", fewer, "masked its update for other sites"),
        ("masked", {**told["wanted"][0], "recipe": Recipe({"delta": 2.0})}, "masked its update already"),
        ("masked", {**told["wanted"][0], "key": "b"}, "masked its update already"),
    ):
        with pytest.raises(PolicyError, match=why):
            one.answer(step, 1, args, mine)
    first = one.answer("unmask", 1, {"there": [1, 2]}, mine)
    assert one.answer("unmask", 1, {"there": [2, 1]}, mine) == first
    assert set(first["keys"]) == {"3"}
    with pytest.raises(PolicyError, match="given its shares for other sites"):
        one.answer("unmask", 1, {"there": [1, 2, 3]}, mine)
    for step in ("shares", "masked", "unmask"):
        with pytest.raises(PolicyError, match="no secret sum of round 2"):
            one.answer(step, 2, {}, mine)


def test_an_update_is_in_one_sum(tmp_path: Path) -> None:
    """A later round's sum needs another update: two sums with it would differ by somebody else's alone."""
    sites, update = three(tmp_path)
    _, masked = talk(sites, update)
    with pytest.raises(PolicyError, match="masked its update already"):
        talk(sites, update, round=2)
    _, later = talk(sites, update, round=3, key="b")
    assert not torch.equal(masked[0], later[0])
    with pytest.raises(PolicyError, match="round 2 is over"):
        sites[0].answer("keys", 2, {"asked": [0, 1, 2]}, update(0))


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "unmask", "other"])
@pytest.mark.parametrize(
    "args",
    [
        {}, {"asked": "x"}, {"asked": [1, 2]}, {"peers": {"9": ["00", "00"]}}, {"peers": {"1": ["zz"]}}, {"there": [7]},
        {"peers": 3}, {"boxes": {}, "recipe": None, "key": "a"}, {"there": "x"}, {"asked": [0, 0, 1]},
    ],
)  # fmt: skip
def test_what_a_server_may_ask(step: str, args: dict[str, Any], tmp_path: Path) -> None:
    sites, update = three(tmp_path)
    talk(sites, update)
    before = (tmp_path / "0.json").read_text()
    with pytest.raises(ConsilienceError):
        sites[0].answer(step, 1, args, update(0))
    assert (tmp_path / "0.json").read_text() == before


def test_the_owner_says_how_many_at_least(tmp_path: Path) -> None:
    sites, update = three(tmp_path, least=3)
    with pytest.raises(PolicyError, match="wants 3 sites in a sum; of 3 here 2 may be left"):
        sites[0].answer("keys", 1, {"asked": [0, 1, 2]}, update(0))


def test_numbers_are_packed() -> None:
    vector = np.array([0, 1, 2**48 - 1, 2**47], dtype=np.uint64)
    assert np.array_equal(unpack(pack(vector)), vector)
    assert pack(vector).shape == (4, 6)


def test_a_deployment_without_them_has_none(deployed: Make) -> None:
    """And a site clips as the deployment says, whatever the server asks."""
    from consilience.core.encode import encode
    from consilience.deploy.keys import read_private
    from consilience.deploy.seal import seal

    def ask(run: Any, args: Any) -> str:
        wire = Direct(run.sites)
        run.run(wire)
        node, message = next((n, m) for n, m in reversed(wire.sent) if steps(m) in ("train", "masked"))
        head = {k: v for k, v in json.loads(message.head).items() if k not in ("blobs", "call", "keep")}
        head |= {"kind": "secret", "step": "masked", "number": head["number"] + 10**12}
        forged = seal(read_private(run.app / "server" / "server.key"), head, [encode(args)])
        try:
            return str(json.loads(Home(run.sites[node - 100]).answer(forged, node).head).get("refused"))
        except SealError as error:
            return str(error)

    run = deployed("fedavg", rounds="1")
    assert "has no secret sums" in ask(run, {})
    for folder in [run.app, *run.sites, run.root / "given"]:
        shutil.rmtree(folder)
    private = {"noise_multiplier": "1.0", "dp_clip": "0.3", "dp_mechanism": "fixed"}
    run = deployed("fedavg", rounds="1", **MASKED, **private)
    assert "clipped otherwise" in ask(run, {"recipe": Recipe({"delta": 1.0}, "30", 30.0), "boxes": {}, "key": "a"})
