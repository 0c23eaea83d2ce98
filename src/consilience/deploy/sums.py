"""The server's part in secret sums among real sites: it passes on keys and shares, and adds up what is masked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from consilience.core.checkpoint import write_atomically
from consilience.core.encode import DecodeError, decode, encode
from consilience.core.errors import ConsilienceError
from consilience.core.messages import Refusal, Reply
from consilience.core.tree import Elsewhere, Tree
from consilience.deploy.masking import unpack
from consilience.deploy.post import Post
from consilience.privacy.numbers import BITS, HEAD, Wanted, numbered
from consilience.privacy.protocol import KEY, SEALED, Keys, Unmask, total, usable
from consilience.privacy.shamir import PRIME


def kept_there(replies: Sequence[Reply], server: Tree) -> tuple[list[Reply], list[Refusal]]:
    """The stage before a secret sum: an update that is at its site cannot be looked at, only be missing."""
    good = [reply for reply in replies if isinstance(reply.update, Elsewhere)]
    gone = [reply.job.client for reply in replies if not isinstance(reply.update, Elsewhere)]
    return good, [Refusal(client, "update", "is not at its site") for client in gone]


class Begun(NamedTuple):
    """Keys, and boxes of shares for the others, of who takes part, by number in the protocol."""

    keys: dict[int, Keys]
    boxes: dict[int, dict[int, bytes]]


@dataclass(frozen=True)
class AtSites:
    """Parties at the sites that ``post`` reaches, by client id. limit: most bytes of an answer. file: where keys and
    boxes of the sum under way are kept, since a site that has masked its update goes on with no others: a server that
    died goes on with these, whoever is gone meanwhile. The updates have been made before, so keys go between those who
    have one; who is lost after that is left out."""

    post: Post
    names: Sequence[str]
    limit: int
    file: Path

    def sum(self, wanted: Wanted) -> tuple[np.ndarray, dict[int, str]]:
        """The protocol, in four messages to each site. Raises ConsilienceError where too few are left."""
        asked, version = sorted(wanted.asked), wanted.version
        ids = numbered(asked)
        held = {ids[reply.job.client]: reply for reply in wanted.replies}
        recipe = {i: wanted.recipes[reply.job.client] for i, reply in held.items()}
        lost: dict[int, str] = {}

        def step(name: str, args: Mapping[int, Tree], read: Callable[[Any], Any]) -> dict[int, Any]:
            wanted.enough(len(args))
            clients = {i: (held[i].job.client, tree) for i, tree in args.items()}
            found = self._ask(name, version + 1, clients, read)
            left_out = set() if name == "unmask" else args.keys() - found.keys()
            lost.update((held[i].job.client, f"did not go on with the secret sum ({name})") for i in left_out)
            return found

        begun = self._begun(version, asked)
        if begun is None:
            found = step("keys", {i: {"asked": asked} for i in held}, _keys)
            peers = {str(i): [k.seal.hex(), k.mask.hex()] for i, k in found.items()}
            boxes = step("shares", {i: {"peers": peers} for i in found}, partial(_boxes, to=set(found)))
            begun = Begun({i: found[i] for i in boxes}, boxes)
            self._begin(version, asked, begun)
        keys, boxes = begun
        for i in held.keys() - boxes.keys():
            lost.setdefault(held[i].job.client, "was not there when the secret sum began")
        given = {i: {str(j): made[i].hex() for j, made in boxes.items()} for i in boxes.keys() & held.keys()}
        args = {i: {"boxes": given[i], "recipe": recipe[i], "key": held[i].update.key} for i in sorted(given)}
        masked = step("masked", args, partial(_vector, size=wanted.size))
        read = partial(_shares, there=set(masked), lost=set(boxes) - set(masked))
        answers = step("unmask", {i: {"there": sorted(masked)} for i in masked}, read)
        wanted.enough(len(answers))
        try:
            sums = total(masked, answers, keys, wanted.least, BITS)
        except ValueError as error:
            raise ConsilienceError(f"round {version + 1}: a secret sum cannot be unmasked: {error}") from None
        return sums, lost

    def _begin(self, version: int, asked: list[int], begun: Begun) -> None:
        """Keep what a sum began with, before anybody masks an update for it."""
        keys = {i: [k.seal.hex(), k.mask.hex()] for i, k in begun.keys.items()}
        boxes = {i: {j: box.hex() for j, box in made.items()} for i, made in begun.boxes.items()}
        told = {"version": version, "asked": asked, "keys": keys, "boxes": boxes}
        write_atomically(self.file, json.dumps(told))

    def _begun(self, version: int, asked: list[int]) -> Begun | None:
        """What this very sum began with, if it did."""
        told = json.loads(self.file.read_text()) if self.file.exists() else {}
        if (told.get("version"), told.get("asked")) != (version, asked):
            return None
        keys = {int(i): Keys(*map(bytes.fromhex, k)) for i, k in told["keys"].items()}
        boxes = {int(i): {int(j): bytes.fromhex(b) for j, b in made.items()} for i, made in told["boxes"].items()}
        return Begun(keys, boxes)

    def _ask(
        self, step: str, round: int, args: Mapping[int, tuple[int, Tree]], read: Callable[[Any], Any]
    ) -> dict[int, Any]:
        """The answers that come and can be read."""
        tickets = {
            i: (self.names[client], self.post.send(self.names[client], "secret", round, {"step": step}, [encode(tree)]))
            for i, (client, tree) in args.items()
        }
        found = {}
        for i, (name, ticket) in tickets.items():
            answer = self.post.answer(ticket)
            if answer.blobs is None:
                continue  # its reason was told when it came
            try:
                (blob,) = answer.blobs
                found[i] = read(decode(blob, limit=self.limit))
            except (DecodeError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                self.post.tell(name, f"its answer is malformed: {type(error).__name__} {error}")
        return found


def _bytes(text: Any, size: int) -> bytes:
    found = bytes.fromhex(text)
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes, not {size}")
    return found


def _keys(said: Any) -> Keys:
    keys = Keys(_bytes(said["seal"], KEY), _bytes(said["mask"], KEY))
    for key in keys:  # of a point of low order the others could make nothing, and would all be lost
        usable(key)
    return keys


def _boxes(said: Any, to: set[int]) -> dict[int, bytes]:
    found = {int(i): _bytes(box, SEALED) for i, box in said.items()}
    if set(found) != to:
        raise ValueError("shares for others than those who take part")
    return found


def _vector(said: Any, size: int) -> np.ndarray:
    if not isinstance(said, torch.Tensor) or said.dtype != torch.uint8 or said.shape != (size, HEAD):
        raise ValueError(f"no vector of {size} numbers")
    return unpack(said)


def _shares(said: Any, there: set[int], lost: set[int]) -> Unmask:
    seeds, keys = ({int(i): int(share, 16) for i, share in said[part].items()} for part in ("seeds", "keys"))
    if set(seeds) != there or set(keys) != lost or not all(0 <= s < PRIME for s in (*seeds.values(), *keys.values())):
        raise ValueError("shares of others than those who take part")
    return Unmask(seeds, keys)
