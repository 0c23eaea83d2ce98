"""Mutated messages and checkpoints: the documented error or a tree, no code run, no more memory than was sent."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import spots
from payloads import PAYLOADS, honest, place

from consilience.core import checkpoint
from consilience.core import tree as tr
from consilience.core.encode import DecodeError, decode, encode
from consilience.core.errors import CheckpointError
from consilience.core.messages import Job
from consilience.wire.validate import Validation

MESSAGES, CHECKPOINTS = 1_000_000, 20_000
FEW, FEW_CHECKPOINTS = 6_000, 150
LIMIT = 1 << 16
"""Bytes of a message that are looked at."""
LIES: list[Any] = [
    -1, 0, 1, 7, 63, 64, 4096, 2**31, 2**63, 10**30, -(10**30), 1.5, 1e308, "F64", "BOOL", "x", "", "0", None, True, [],
    {}, [0], ["ab", 10**13], [0, 0], [0, 4], [1, 5], {"t": 0}, {"t": "0"}, {"l": []}, {"u": 1}, {"d": [[[], 1]]},
    {"d": "ab"}, {"r": "os:system", "v": ["true"]}, {"r": [], "v": []}, {"__class__": "x"}, "\ud800",
]  # fmt: skip
BYTES = b'0129-"[]{},:eE.tdrvlu\\\x00\xff'


def split(data: bytes) -> tuple[Any, Any, bytes]:
    """The header, the structure in it, and the rest."""
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    return header, json.loads(header["__metadata__"].pop("tree")), data[size:]


def lied(data: bytes, other: bytes, rng: random.Random) -> bytearray:
    """The same blob with lies in its header or structure, or with parts of another's."""
    header, tree, rest = split(data)
    for _ in range(rng.randint(1, 2)):
        places = spots(header) + spots(tree)
        container, key = rng.choice(places)
        if rng.random() < 0.3:
            away, at = rng.choice(places + spots(split(other)[1]))
            container[key] = json.loads(json.dumps(away[at]))
        elif rng.random() < 0.1 and isinstance(container, list):
            container.extend(json.loads(json.dumps(container[:50])))
        else:
            container[key] = copy.deepcopy(rng.choice(LIES))  # it may be lied about in turn
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["tree"] = json.dumps(tree)
    text = json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + rest)


def bent(data: bytes, other: bytes, rng: random.Random) -> bytearray:
    """The same blob with bytes changed, cut out, put in, or taken from another; in its header more often."""
    out = bytearray(data)
    head = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(head, len(out)) if rng.random() < 0.7 else len(out)) if out else 0
        how = rng.random()
        if how < 0.4 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif how < 0.7 and out:
            out[at] = rng.choice(BYTES)
        elif how < 0.8:
            del out[at : at + rng.randint(1, 16)]
        elif how < 0.9:
            start = rng.randrange(len(other))
            out[at:at] = other[start : start + rng.randint(1, 64)]
        elif how < 0.95:
            del out[at:]
        else:
            out[0:8] = rng.choice([*LIES[:8], 2**64 - 1]).__abs__().to_bytes(8, "little")
    return out


def mutations(corpus: list[bytes], count: int, seed: int) -> Iterator[bytearray]:
    rng = random.Random(seed)
    for _ in range(count):
        data, other = rng.choice(corpus), rng.choice(corpus)
        yield lied(data, other, rng) if rng.random() < 0.3 else bent(data, other, rng)


def stored(tree: Any) -> int:
    """Bytes of all memory that a tree's tensors hold on to."""
    rooms = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tr.tensors(tree)}
    return sum(rooms.values())


def grown() -> int:
    """Most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_messages(count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many of so many mutated messages were read, and of these how many were taken for an update."""
    for name in ("system", "popen"):
        monkeypatch.setattr(f"os.{name}", lambda *_: pytest.fail("code was run"))
    kinds = list(PAYLOADS)
    checks = {kind: Validation(place(kind, "mean").place) for kind in kinds}
    corpus = [bytes(encode(honest(kind)[0])) for kind in kinds]
    before, read, taken = grown(), 0, 0
    for i, data in enumerate(mutations(corpus, count, seed)):
        try:
            found = decode(data, limit=LIMIT)
        except DecodeError:
            continue
        read += 1
        assert stored(found) <= 2 * len(data)
        wrong = checks[kinds[i % len(kinds)]].wrong(Job(0, 0, 1, 0, 0, 0), found)  # must not raise, whatever it is
        taken += wrong is None
        assert wrong is None or all(isinstance(part, str) for part in wrong)
    assert grown() - before < 2**28
    return read, taken


def test_mutated_messages_are_an_error_or_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    read, taken = fuzz_messages(FEW, 0, monkeypatch)
    assert 0 < taken < read < FEW


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_million_mutated_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    read, taken = fuzz_messages(MESSAGES, 1, monkeypatch)
    assert 0 < taken < read < MESSAGES


def fuzz_checkpoints(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """How many of so many damaged checkpoints were loaded, and how many of these from the older generation. Every other
    one has its hashes made anew, as by somebody who wants it to be read."""
    rng = random.Random(seed)
    states = [{"server": honest(kind)[0], "round": i} for i, kind in enumerate(PAYLOADS)]
    blobs = [bytes(encode(state)) for state in states]
    for version in (1, 2):
        checkpoint.save(folder, version, states[version], {"note": version})
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = older = 0
    for _ in range(count):
        for name, data in good.items():
            (folder / name).write_bytes(data)
        sealed = rng.random() < 0.5
        for name in ["00000002.safetensors"] if sealed else rng.sample(sorted(good), rng.randint(1, 3)):
            how = lied if rng.random() < 0.3 and name.endswith("safetensors") else bent
            (folder / name).write_bytes(how(good[name], rng.choice(blobs), rng))
        if sealed:
            note = json.loads(good["00000002.json"])
            note["sha256"] = hashlib.sha256((folder / "00000002.safetensors").read_bytes()).hexdigest()
            note.pop("note_sha256")
            note["note_sha256"] = checkpoint._note_hash(note)
            (folder / "00000002.json").write_text(json.dumps(note))
        try:
            state, notes = checkpoint.load(folder, lambda state, _: state)
        except CheckpointError:
            continue
        loaded += 1
        older += notes["note"] == 1
        if not sealed:  # what nobody has signed anew is as it was written
            assert tr.digest(state) == tr.digest(states[notes["note"]])
    return loaded, older


def test_damaged_checkpoints_are_an_error_or_an_older_one(tmp_path: Path) -> None:
    loaded, older = fuzz_checkpoints(FEW_CHECKPOINTS, 0, tmp_path)
    assert 0 < older < loaded < FEW_CHECKPOINTS


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_checkpoints(tmp_path: Path) -> None:
    loaded, older = fuzz_checkpoints(CHECKPOINTS, 1, tmp_path)
    assert 0 < older < loaded < CHECKPOINTS


def test_bytes_cannot_be_used_twice() -> None:
    """Many tensors of the same bytes, each copied since it begins at an odd place, would be much memory for little."""
    entry = {"dtype": "U8", "shape": [999], "data_offsets": [1, 1000]}
    header: dict[str, Any] = {str(i): entry for i in range(100)}
    header["__metadata__"] = {"tree": json.dumps({"l": [{"t": i} for i in range(100)]})}
    text = json.dumps(header).encode()
    with pytest.raises(DecodeError, match="shares bytes"):
        decode(len(text).to_bytes(8, "little") + text + bytes(1000))


def test_a_tensor_cannot_be_referred_to_twice() -> None:
    """One of 1 KiB that stands in the structure 9,999 times would be 10 MB wherever it is copied."""
    header: dict[str, Any] = {"0": {"dtype": "U8", "shape": [1024], "data_offsets": [0, 1024]}}
    header["__metadata__"] = {"tree": json.dumps({"l": [{"t": 0}] * 9999})}
    text = json.dumps(header).encode()
    with pytest.raises(DecodeError, match="damaged"):
        decode(len(text).to_bytes(8, "little") + text + bytes(1024))
    tensor = torch.zeros(3)
    assert len(decode(encode([tensor, tensor]))) == 2


def test_dimensions_are_few() -> None:
    with pytest.raises(DecodeError):
        decode(blob_of([1] * 65))
    with pytest.raises(ValueError, match="at most 64 dimensions"):
        encode(torch.zeros([1] * 65))
    assert decode(encode(torch.zeros([1] * 64))).ndim == 64


def blob_of(shape: list[int]) -> bytes:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}
    text = json.dumps({"0": entry, "__metadata__": {"tree": '{"t":0}'}}).encode()
    return len(text).to_bytes(8, "little") + text + b"\x00"
