"""A site's part in secret sums: a session a round, kept on disk, that answers the same when it is asked again.

A server that died asks again, and so might one that wants to know more. Two masked vectors under the same masks, or two
sums that differ by one site, would tell it an update. So the site masks one update a round, each once, and from then on
says only what it has said.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consilience.core import tree as tr
from consilience.core.encode import encode as encode_tree
from consilience.core.errors import CheckpointError, ConsilienceError
from consilience.core.tree import Tree
from consilience.deploy.keys import write_secret
from consilience.deploy.policy import PolicyError
from consilience.privacy.numbers import BITS, HEAD, Recipe, encode, numbered, numbers, threshold
from consilience.privacy.protocol import Client, Keys

STEPS = ("keys", "shares", "masked", "unmask")


@dataclass(frozen=True)
class Session:
    """What a site has said in a round. round: 0 if in none. peers: public keys by number in the protocol. held: shares
    that others made for this site. masked: a hash of the update that was masked and of what was asked for. key: of
    that update. last: of the one of the session before. there: whose shares were given."""

    round: int = 0
    asked: list[int] = field(default_factory=list)
    seed: str = ""
    peers: dict[str, list[str]] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    masked: str = ""
    key: str = ""
    last: str = ""
    there: list[int] = field(default_factory=list)


@dataclass
class Masking:
    """A site's sessions. path: of its file. client: the site's id. share: of those asked that must be left. least:
    fewest sites whose sum the site's owner lets be known."""

    path: Path
    client: int
    share: float
    least: int

    def answer(self, step: str, round: int, args: Mapping[str, Any], update: Callable[[str], Tree]) -> Tree:
        """What to say in a step. update: gives the update that is kept under a key. Raises PolicyError."""
        session = Session(**json.loads(self.path.read_text())) if self.path.exists() else Session()
        if step not in STEPS:
            raise PolicyError(f"nothing is known of step {step!r} of a secret sum")
        if step != "keys" and round != session.round:
            raise PolicyError(f"no secret sum of round {round} has begun here")
        try:
            if step == "keys":
                return self._keys(session, round, [int(client) for client in args["asked"]])
            if step == "shares":
                return self._shares(session, {str(int(i)): [str(k) for k in keys] for i, keys in args["peers"].items()})
            if step == "masked":
                return self._masked(session, args["boxes"], args["recipe"], str(args["key"]), update)
            return self._unmask(session, sorted({int(i) for i in args["there"]}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PolicyError(f"malformed message of a secret sum: {type(error).__name__}") from None
        except (PolicyError, CheckpointError):
            raise
        except ConsilienceError as error:  # the protocol's own words, which tell nothing of data
            raise PolicyError(str(error)) from None

    def _keep(self, session: Session) -> None:
        write_secret(self.path, json.dumps(asdict(session)).encode())

    def _client(self, session: Session) -> Client:
        """The protocol's client as it was, since all its secrets come from the session's seed."""
        seed, count = bytes.fromhex(session.seed), itertools.count()
        ids, least = numbered(session.asked), threshold(self.share, len(session.asked))
        client = Client(
            ids[self.client], least, lambda n: hashlib.shake_256(seed + next(count).to_bytes(8, "big")).digest(n)
        )
        if session.peers:
            client.shares({int(i): Keys(*map(bytes.fromhex, keys)) for i, keys in session.peers.items()})
        return client

    def _keys(self, session: Session, round: int, asked: list[int]) -> Tree:
        if round < session.round:
            raise PolicyError(f"round {round} is over here")
        if asked != sorted(set(asked)) or self.client not in asked:
            raise PolicyError("malformed message of a secret sum: this site was not asked in it")
        least = threshold(self.share, len(asked))
        if least < self.least:
            raise PolicyError(f"the policy wants {self.least} sites in a sum; of {len(asked)} here {least} may be left")
        if (session.round, session.asked) != (round, asked):
            if session.round == round and session.masked:
                raise PolicyError(f"in round {round} this site is in a secret sum of others")
            last = session.key or session.last
            session = Session(round, asked, secrets.token_hex(32), last=last)
            self._keep(session)
        keys = self._client(session).keys()
        return {"seal": keys.seal.hex(), "mask": keys.mask.hex()}

    def _shares(self, session: Session, peers: dict[str, list[str]]) -> Tree:
        if session.peers != peers and session.masked:
            raise PolicyError(f"in round {session.round} this site has masked its update for other sites")
        if not {int(i) for i in peers} <= set(numbered(session.asked).values()):
            raise ValueError("a stranger")
        client = self._client(replace(session, peers={}))
        boxes = client.shares({int(i): Keys(*map(bytes.fromhex, keys)) for i, keys in peers.items()})
        self._keep(replace(session, peers=peers))
        return {str(i): box.hex() for i, box in boxes.items()}

    def _masked(
        self, session: Session, boxes: dict[str, str], recipe: Any, key: str, update: Callable[[str], Tree]
    ) -> Tree:
        if not session.peers or not isinstance(recipe, Recipe):
            raise ValueError("no keys, or no recipe")
        own = None if key <= session.last else update(key)  # keys go up from job to job
        asked_for = hashlib.sha256(encode_tree((boxes, recipe, key, tr.digest(own)))).hexdigest()
        if own is None or session.masked not in ("", asked_for):
            raise PolicyError(f"in round {session.round} this site has masked its update already")
        whole = encode(numbers(own, recipe), len(session.asked))
        held = {int(i): bytes.fromhex(box) for i, box in boxes.items()}
        vector = self._client(session).masked(whole, held, BITS)
        self._keep(replace(session, held=dict(boxes), masked=asked_for, key=key))
        return pack(vector)

    def _unmask(self, session: Session, there: list[int]) -> Tree:
        if session.there not in ([], there):
            raise PolicyError(f"in round {session.round} this site has given its shares for other sites")
        client = self._client(session)
        client.hold({int(i): bytes.fromhex(box) for i, box in session.held.items()})
        found = client.unmask(there)
        self._keep(replace(session, there=there))
        return {
            "seeds": {str(i): f"{share:x}" for i, share in found.seeds.items()},
            "keys": {str(i): f"{share:x}" for i, share in found.keys.items()},
        }


def pack(vector: np.ndarray) -> torch.Tensor:
    """Numbers below 2^BITS in as many bytes as they take."""
    return torch.from_numpy(vector.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :HEAD].copy())


def unpack(packed: torch.Tensor) -> np.ndarray:
    """The way back."""
    whole = np.zeros((len(packed), 8), dtype=np.uint8)
    whole[:, :HEAD] = packed.numpy()
    return whole.view("<u8")[:, 0].astype(np.uint64)
