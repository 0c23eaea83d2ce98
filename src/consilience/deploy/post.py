"""The server's post office: seals what goes to a site, opens what comes back, once each, and knows who is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from consilience.core.errors import ConsilienceError
from consilience.deploy import data
from consilience.deploy.keys import read_private, read_public
from consilience.deploy.seal import ANY, Sealed, SealError, open_sealed, seal
from consilience.deploy.spec import PROTOCOL, Deployment
from consilience.folder import versions

AGAIN = 2.0
"""Seconds before a message that was not delivered is sent again."""


WORDS = 300
"""Most characters of a site's reason that are shown."""


class Trouble(NamedTuple):
    """In the place of a reply: the transport could not deliver (``lost``), or the site's process failed."""

    reason: str
    lost: bool


class Wire(Protocol):
    """A transport of sealed messages between the server and nodes."""

    def nodes(self) -> set[int]:
        """The nodes that are connected now."""
        ...

    def push(self, node: int, message: Sealed, seconds: float, group: str) -> str | None:
        """Send a message that is of no use after so many seconds; its id, or None if it cannot be sent now."""
        ...

    def pull(self, ids: Iterable[str]) -> list[tuple[str, Sealed | Trouble]]:
        """The replies that have come to messages with these ids, each once."""
        ...


class Answer(NamedTuple):
    """What a site said; ``blobs`` None: nothing that can be used, ``head`` says why."""

    head: dict[str, Any]
    blobs: tuple[bytes, ...] | None


@dataclass
class _Letter:
    """A message that is not answered yet. name: of the site, "" if only the node is known."""

    name: str
    node: int | None
    head: dict[str, Any]
    blobs: Sequence[bytes | bytearray]
    until: float
    again: bool
    number: int = 0
    not_before: float = 0.0


@dataclass
class Post:
    """Messages of one deployment. tell: called with a site's name and a sentence about what happened."""

    wire: Wire
    deployment: Deployment
    key: Path
    tell: Callable[[str, str], None]
    pause: float = 0.2
    now: Callable[[], float] = time.monotonic
    where: dict[str, int] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        section = self.deployment.section
        self._private = read_private(self.key)
        self._keys = {name: read_public(text, f"deploy.sites.{name}") for name, text in section.sites.items()}
        self._out: dict[str, tuple[int, _Letter]] = {}
        self._waiting: dict[int, _Letter] = {}
        self._answers: dict[int, Answer] = {}
        self._greeted: dict[int, float] = {}
        self._next = 0
        self._nodes: set[int] = set()
        self._last: set[str] = set()
        self._seen = self.now()

    # --- sending -----------------------------------------------------------------------------------------------

    def send(
        self, name: str, kind: str, round_: int, head: dict[str, Any], blobs: Sequence[bytes | bytearray] = (), *,
        seconds: float | None = None, again: bool = True,
    ) -> int:  # fmt: skip
        """Send to a site; returns a ticket. again: if it cannot be delivered, try until ``seconds`` are over."""
        until = self.now() + (seconds or self.deployment.section.timeout)
        return self._post(_Letter(name, None, {**head, "kind": kind, "round": round_}, blobs, until, again))

    def _post(self, letter: _Letter) -> int:
        self._next += 1
        self._waiting[self._next] = letter
        self._push(self._next)
        return self._next

    def _push(self, ticket: int) -> None:
        """Hand a waiting letter to the transport, if its site is there."""
        letter = self._waiting[ticket]
        node = letter.node if letter.node is not None else self.where.get(letter.name)
        if node is None or node not in self._nodes or self.now() < letter.not_before:
            return
        left = letter.until - self.now()
        letter.number = time.time_ns()
        head = {
            **letter.head, "run": self.deployment.section.id, "from": "server", "to": letter.name or ANY,
            "node": node, "number": letter.number, "expires": time.time() + max(left, 1.0),
        }  # fmt: skip
        message = seal(self._private, head, letter.blobs)
        if message.size > self.deployment.section.max_bytes:
            raise ConsilienceError(
                f"a message to site {letter.name} has {message.size:,} bytes; deploy.max_bytes allows "
                f"{self.deployment.section.max_bytes:,}"
            )
        found = self.wire.push(node, message, max(left, 1.0), str(letter.head["round"]))
        if found is None:
            letter.not_before = self.now() + AGAIN
            return
        del self._waiting[ticket]
        self._out[found] = (ticket, letter)

    # --- receiving ---------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Take what has come, greet who is new, send again what was not delivered, give up what is too late."""
        self._nodes = self.wire.nodes()
        for node in self._nodes - self._greeted.keys():
            self._greeted[node] = self.now()
            self._greet(node)
        there = {name for name, node in self.where.items() if node in self._nodes}
        for name in sorted(self._last - there):
            self.tell(name, "is away")
        for name in sorted(there - self._last):
            self.tell(name, "is there")
        self._last = there
        self._seen = self.now() if there or not self.where else self._seen
        if self.now() - self._seen > self.deployment.section.join:
            raise ConsilienceError(
                f"no site has been there for {self.deployment.section.join:g} s; start the server again when they are"
            )
        for found, reply in self.wire.pull(list(self._out)) if self._out else ():
            if found in self._out:  # a second reply to the same message is nobody's
                ticket, letter = self._out.pop(found)
                self._take(ticket, letter, reply)
        for ticket, letter in [(t, w) for t, w in self._waiting.items()]:
            if self.now() >= letter.until:
                del self._waiting[ticket]
                self._give_up(ticket, letter, "did not answer in time")
            else:
                self._push(ticket)
        for found, (ticket, letter) in list(self._out.items()):
            if self.now() >= letter.until:
                del self._out[found]
                self._give_up(ticket, letter, "did not answer in time; a later answer is not used")

    def _take(self, ticket: int, letter: _Letter, reply: Sealed | Trouble) -> None:
        if isinstance(reply, Trouble):
            if not letter.name:  # a greeting: again when the node is seen again
                self._greeted.pop(letter.node or 0, None) if reply.lost else None
                self.tell(f"node {letter.node}", f"did not join: {reply.reason}")
                self._answers[ticket] = Answer({"failed": reply.reason}, None)
            elif reply.lost and letter.again:
                letter.not_before = self.now() + AGAIN
                self._waiting[ticket] = letter
            else:
                self._give_up(ticket, letter, reply.reason)
            return
        try:
            answer = self._opened(letter, reply)
        except SealError as error:
            self._give_up(ticket, letter, f"its answer is {error}")
            return
        self._answers[ticket] = answer
        word = "refuses" if "refused" in answer.head else "failed"
        why = answer.head.get("refused") or answer.head.get("failed")
        if why:
            why = " ".join(str(why).split())[:WORDS]
            self._answers[ticket] = Answer({**answer.head, "failed": why, "refused": None}, None)
            self.tell(answer.head["from"], f"{word}: {why}")
        if not letter.name:
            self._greeting(letter, self._answers[ticket])

    def _opened(self, letter: _Letter, reply: Sealed) -> Answer:
        """A reply, if it is from its site and answers this very message. Raises SealError."""
        name = letter.name
        if not name:  # whoever it says it is must have signed it
            try:
                name = json.loads(reply.head)["from"]
                key = self._keys[name]
            except (ValueError, KeyError, TypeError):
                raise SealError("unauthenticated: from no site of this deployment") from None
        else:
            key = self._keys[name]
        expected = {"run": self.deployment.section.id, "from": name, "to": "server", "answers": letter.number}
        head = open_sealed(key, reply, expected, self.deployment.section.max_bytes)
        return Answer(head, reply.blobs)

    def _give_up(self, ticket: int, letter: _Letter, reason: str) -> None:
        self.tell(letter.name or f"node {letter.node}", reason)
        self._answers[ticket] = Answer({"failed": reason}, None)

    def answered(self, ticket: int) -> bool:
        """Whether :meth:`answer` has one."""
        return ticket in self._answers

    def answer(self, ticket: int) -> Answer:
        """The answer to a message; waits for it."""
        while ticket not in self._answers:
            self.look()
            if ticket not in self._answers:
                time.sleep(self.pause)
        return self._answers.pop(ticket)

    def drop(self, ticket: int) -> None:
        """Nobody waits for this answer any more."""
        self._waiting.pop(ticket, None)
        self._answers.pop(ticket, None)
        for found in [found for found, (t, _) in self._out.items() if t == ticket]:
            del self._out[found]

    # --- who is there ------------------------------------------------------------------------------------------

    def there(self) -> set[str]:
        """The names of the sites that can be reached now."""
        return {name for name, node in self.where.items() if node in self._nodes}

    def _greet(self, node: int) -> None:
        """Ask a node who it is."""
        head = {
            "kind": "hello", "round": 0, "protocol": PROTOCOL, "versions": versions(), "told": self.deployment.told()
        }  # fmt: skip
        self._post(_Letter("", node, head, (), self.now() + self.deployment.section.timeout, False))

    def _greeting(self, letter: _Letter, answer: Answer) -> None:
        name = answer.head["from"]
        if answer.blobs is None:
            raise ConsilienceError(f"site {name} refuses: {answer.head['failed']}")
        theirs, ours = dict(answer.head["versions"]), versions()
        for what in ("torch", "cpu_capability"):
            if theirs.get(what) != ours[what]:
                self.tell(name, f"has {what} {theirs.get(what)}, the server {ours[what]}: the last bits may differ")
        facts = data.checked(answer.head["facts"], name)
        if name in self.facts and self.facts[name] != facts:
            raise ConsilienceError(f"site {name} has other data than when this deployment began")
        assert letter.node is not None
        self.where[name], self.facts[name] = letter.node, facts

    def gather(self, waiting: Callable[[list[str]], None]) -> None:
        """Wait until every site has joined. Raises ConsilienceError, naming those that have not in time."""
        until = self.now() + self.deployment.section.join
        while True:
            self.look()
            missing = [name for name in self.deployment.names if name not in self.where]
            waiting(missing)
            if not missing:
                return
            if self.now() >= until:
                raise ConsilienceError(
                    f"{len(missing)} of {len(self.deployment.names)} sites have not joined in "
                    f"{self.deployment.section.join:g} s: {', '.join(missing)}"
                )
            time.sleep(self.pause)
