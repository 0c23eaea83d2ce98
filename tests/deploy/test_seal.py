"""Messages that must not be believed are not: captured and sent again, changed, old, of others, of nobody."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from consilience.core.encode import encode
from consilience.deploy import keys, ledger
from consilience.deploy.post import Trouble
from consilience.deploy.seal import REMEMBERED, Sealed, SealError, Window, open_sealed, seal
from consilience.deploy.server import EVENTS
from consilience.deploy.site import Home
from consilience.exporting import digest
from consilience.folder import read_lines

from .conftest import Deployed, Direct, Make


def train(wire: Direct) -> Sealed:
    """A message of a run that asked site 0 to train."""
    return next(m for node, m in wire.sent if node == 100 and json.loads(m.head).get("call") == "train")


@pytest.fixture
def done(deployed: Make) -> tuple[Deployed, Direct]:
    run = deployed(rounds="2")
    wire = Direct(run.sites)
    run.run(wire)
    return run, wire


def refusal(folder: Path, message: Sealed, node: int = 100) -> str:
    """Why a site does not take a message; that it says so in its ledger, and that nothing leaves."""
    before = len(ledger.read(folder))
    with pytest.raises(SealError) as error:
        Home(folder).answer(message, node)
    (line,) = ledger.read(folder)[before:]
    assert line["refused"] == str(error.value)
    return str(error.value)


def test_a_site_refuses(done: tuple[Deployed, Direct]) -> None:
    run, wire = done
    site, message = run.sites[0], train(wire)
    server = keys.read_private(run.app / "server" / "server.key")
    head = json.loads(message.head)
    fresh = {**head, "number": time.time_ns(), "expires": time.time() + 60}
    assert refusal(site, message) == "replayed: it was taken before"
    changed = bytearray(message.blobs[0])
    changed[-1] ^= 1
    assert "malformed" in refusal(site, message._replace(blobs=(bytes(changed), *message.blobs[1:])))
    assert "unauthenticated" in refusal(site, message._replace(head=message.head.replace(b'"round": 1', b'"round": 2')))
    assert "unauthenticated" in refusal(site, message._replace(signature=b"\x00" * 80))
    other = keys.read_private(run.sites[1] / "site.key")  # another site of the same deployment
    assert "unauthenticated" in refusal(site, seal(other, fresh, message.blobs))
    assert "stale: it has expired" in refusal(site, seal(server, {**fresh, "expires": time.time() - 60}, message.blobs))
    assert "not begun here" in refusal(site, seal(server, {**fresh, "run": "another"}, message.blobs))
    assert "malformed" in refusal(site, seal(server, {**fresh, "run": "../../x"}, message.blobs))
    assert "meant for 'site0'" in refusal(run.sites[1], seal(server, fresh, message.blobs))
    assert "stale: of another node" in refusal(site, seal(server, fresh, message.blobs), 101)
    hello = next(m for node, m in wire.sent if node == 101 and json.loads(m.head)["kind"] == "hello")
    assert "stale: of another node" in refusal(site, hello)  # a greeting names no site
    assert "malformed" in refusal(site, seal(server, {"from": "server", "to": "site0", "node": 100}))
    assert Home(site).answer(seal(server, fresh, message.blobs), 100)  # and all of it was for the reasons given


def test_what_a_signed_message_must_still_be(done: tuple[Deployed, Direct]) -> None:
    """The server itself can ask only for what the worker does, for this site's job."""
    run, wire = done
    message = train(wire)
    server = keys.read_private(run.app / "server" / "server.key")

    def asked(blobs: Any = message.blobs, **more: Any) -> str:
        head = {**json.loads(message.head), "number": time.time_ns(), "expires": time.time() + 60, **more}
        return str(json.loads(Home(run.sites[0]).answer(seal(server, head, blobs), 100).head).get("refused"))

    assert "nothing is known of the call 'aggregate'" in asked(call="aggregate")
    assert "nothing is known of messages of kind" in asked(kind="other")
    assert "malformed message" in asked(blobs=[b"x", b"y"])
    other = next(m for node, m in wire.sent if node == 101 and json.loads(m.head).get("call") == "train")
    assert "not this site's" in asked(blobs=other.blobs)
    job, _ = __import__("consilience.core.encode", fromlist=["decode"]).decode(message.blobs[1])
    from consilience.core.tree import Elsewhere

    lost = encode((job, Elsewhere("../../../etc/passwd", "0")))
    assert "no name of a state" in asked(blobs=[message.blobs[0], lost])


@pytest.mark.parametrize("how", ["signature", "body", "other site", "earlier answer", "malformed tree"])
def test_the_server_refuses(how: str, deployed: Make) -> None:
    """An answer that is not the site's own is not combined; the run goes on without it."""
    run = deployed(rounds="2")
    key = keys.read_private(run.sites[1] / "site.key")
    own = keys.read_private(run.sites[0] / "site.key")
    earlier: list[Sealed] = []

    def mangle(node: int, message: Sealed, down: bool) -> Sealed | Trouble | None:
        head = json.loads(message.head)
        if down or node != 100 or head["kind"] != "call":
            return message
        earlier.append(message)
        if how == "signature":
            return message._replace(signature=message.signature[:-1] + b"\x01")
        if how == "body":
            return message._replace(blobs=(message.blobs[0][:-1] + b"\x01", *message.blobs[1:]))
        if how == "other site":
            return seal(key, head, message.blobs)
        if how == "malformed tree":
            return seal(own, head, [message.blobs[0][:-9], *message.blobs[1:]])
        return earlier[0] if len(earlier) > 1 else None if head["round"] > 9 else message

    folder = run.run(Direct(run.sites, mangle)).path
    lines = read_lines(folder / "history.jsonl")
    assert [line["round"] for line in lines] == [1, 2]
    told = [e["what"] for e in read_lines(run.app / "server" / EVENTS) if e["site"] == "site0"]
    words = {"earlier answer": "stale: of another answers", "malformed tree": "malformed", "body": "malformed"}
    assert any(words.get(how, "unauthenticated") in what for what in told), told


def test_a_mangled_answer_changes_nothing_else(deployed: Make) -> None:
    """What is combined without the mangled site is what a run without it would combine."""
    run = deployed(rounds="1", eval_clients_every="0")
    wire = Direct(run.sites, lambda node, message, down: message if down or node != 100 or b"train" in message.head
                  or json.loads(message.head)["kind"] != "call" else message._replace(signature=b""))  # fmt: skip
    assert digest(run.run(wire).path).startswith("server ")


def test_window(tmp_path: Path) -> None:
    now = [1000.0]
    window = Window(tmp_path / "taken.json", lambda: now[0])
    for number in range(10, 10 + REMEMBERED):
        window.take(number, 1001.0)
    with pytest.raises(SealError, match="replayed"):
        window.take(10, 1001.0)
    window.take(9999, 1001.0)  # pushes 10 out
    with pytest.raises(SealError, match="stale: newer"):
        window.take(10, 1001.0)
    now[0] = 1010.0
    with pytest.raises(SealError, match="expired"):
        window.take(10000, 1001.0)


def test_limits(tmp_path: Path) -> None:
    keys.make_key(tmp_path / "k")
    key = keys.read_private(tmp_path / "k")
    message = seal(key, {"a": 1}, [b"12345"])
    public = keys.read_public((tmp_path / "k.pub").read_text(), "here")
    assert open_sealed(public, message, {"a": 1}, 10_000)["a"] == 1
    with pytest.raises(SealError, match="more than the limit"):
        open_sealed(public, message, {}, 100)
    with pytest.raises(SealError, match="stale: of another a"):
        open_sealed(public, message, {"a": 2}, 10_000)
    assert (tmp_path / "k").stat().st_mode & 0o077 == 0
