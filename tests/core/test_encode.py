"""Bytes and back, and what damaged bytes may do."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import spots
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as safetensors_load

from consilience.core import tree as tr
from consilience.core.encode import (
    ALIGNMENT,
    DTYPES,
    MAX_DEPTH,
    DecodeError,
    Encoder,
    decode,
    encode,
    encoded_size,
    memory,
)
from consilience.core.tree import record


@record
class Sent(NamedTuple):
    model: Any
    note: Any


class Unknown(NamedTuple):
    x: Any


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    if dtype is torch.bool:
        return torch.from_numpy(np.asarray(rng.integers(0, 2, shape))).bool()
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


TENSORS = st.builds(
    filled,
    st.sampled_from(list(DTYPES.values())),
    st.sampled_from([(), (0,), (1,), (3,), (2, 0, 3), (3, 5)]),
    st.integers(0, 2**31),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


def nodes(children: Any) -> Any:
    return (
        st.dictionaries(st.text(max_size=4) | st.integers(), children, max_size=3)
        | st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.builds(Sent, children, children)
    )


TREES = st.recursive(TENSORS | SCALARS, nodes, max_leaves=10)


def bits(x: torch.Tensor) -> bytes:
    return bytes(x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy())


def same(a: Any, b: Any) -> bool:
    """Same types, keys, dtypes, shapes and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        shaped = a.dtype == b.dtype and a.shape == b.shape
        return shaped and bits(a) == bits(b)
    children = tr.children_of(a)
    if children is None:
        return repr(a) == repr(b)
    keys = list(zip(tr.keys_of(a), tr.keys_of(b), strict=False))
    return (
        len(children) == len(tr.children_of(b))
        and all(type(k) is type(m) and k == m for k, m in keys)
        and all(same(x, y) for x, y in zip(children, tr.children_of(b), strict=True))
    )


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_what_comes_back_is_what_went_in(tree: Any) -> None:
    data = encode(tree)
    assert same(decode(data), tree)
    assert same(decode(data, copy=False), tree)
    assert encoded_size(tree) == len(data) == Encoder(tree).size
    opened = safetensors_load(bytes(data))
    for i, tensor in enumerate(tr.tensors(tree)):
        assert same(opened[str(i)], tensor)


def test_layout_does_not_change_the_bytes() -> None:
    x = torch.arange(48.0).reshape(2, 2, 3, 4)
    assert encode({"x": x.to(memory_format=torch.channels_last)}) == encode({"x": x})
    assert torch.equal(decode(encode(x[:, :, ::2].transpose(1, 3))), x[:, :, ::2].transpose(1, 3))


def test_a_decoded_copy_does_not_change_with_the_buffer() -> None:
    for n in range(64):  # names of different length
        data = in_memory(encode({"x" * n: torch.ones(16)}))
        copied, viewed = (decode(data, copy=copy)["x" * n] for copy in (True, False))
        data[-64:] = bytes(64)
        assert float(copied.sum()) == 16
        assert float(viewed.sum()) == 0


def in_memory(data: bytearray) -> memoryview:
    """The same bytes, where torch's tensors begin."""
    found = memory(len(data))
    found[:] = data
    return found


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_tensors_begin_where_torchs_own_do(tree: Any) -> None:
    for buffer in (in_memory(encode(tree)), bytearray(b"?") + encode(tree)):
        found = decode(buffer if isinstance(buffer, memoryview) else memoryview(buffer)[1:], copy=False)
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tr.tensors(found))


def test_what_fills_whole_blocks_is_not_copied() -> None:
    sizes = [1, 16, 3, 32, 10, 0, 48]
    data = in_memory(encode([torch.ones(size) for size in sizes]))
    found = decode(data, copy=False)
    data[-4 * sum(sizes) :] = bytes(4 * sum(sizes))
    assert [float(x.sum()) for x, size in zip(found, sizes, strict=True) if size % 16 == 0] == [0] * 4


def test_encoding_into_a_larger_buffer_leaves_the_rest() -> None:
    encoder = Encoder({"x": torch.ones(3)})
    buffer = bytearray(b"\xff" * (encoder.size + 5))
    encoder.into(buffer)
    assert bytes(buffer[encoder.size :]) == b"\xff" * 5


def test_records_must_be_registered() -> None:
    with pytest.raises(TypeError, match="not registered"):
        encode({"a": Unknown(1)})
    for name in ("os:system", f"{__name__}:Unknown", "builtins:list"):
        data = encode(Sent(1, 2))
        header = json.loads(bytes(data[8:]))
        tree = header["__metadata__"]["tree"].replace(tr.record_name(Sent), name)
        with pytest.raises(DecodeError):
            decode(blob({"__metadata__": {"tree": tree}}))


@pytest.mark.parametrize("leaf", [object(), {1, 2}, torch.zeros(1, dtype=torch.complex64), np.ones(2)])
def test_leaves_that_cannot_be_written_are_a_type_error(leaf: Any) -> None:
    with pytest.raises(TypeError):
        encode({"a": leaf})


def test_numpy_numbers_are_refused_or_keep_their_digest() -> None:
    tree = {"a": np.float64(0.5)}
    try:
        data = encode(tree)
    except TypeError:
        return
    assert tr.digest(decode(data)) == tr.digest(tree)


def test_the_limit_is_kept() -> None:
    data = encode(torch.ones(100))
    assert len(decode(data, limit=len(data))) == 100
    with pytest.raises(DecodeError, match="limit"):
        decode(data, limit=len(data) - 1)


def test_deep_nesting_is_refused() -> None:
    deep = '{"l":[' * 5000 + "1" + "]}" * 5000
    with pytest.raises(DecodeError):
        decode(blob({"__metadata__": {"tree": deep}}))
    with pytest.raises(DecodeError, match="nested"):
        decode(blob({"__metadata__": {"tree": '{"l":[' * 70 + "1" + "]}" * 70}}))


def nested(depth: int) -> Any:
    return 1 if depth == 0 else [nested(depth - 1)]


def test_what_could_not_be_read_is_not_written() -> None:
    for depth in (1, MAX_DEPTH - 1, MAX_DEPTH):
        assert same(decode(encode(nested(depth))), nested(depth))
    for depth in (MAX_DEPTH + 1, 5000 // 10):
        for write in (encode, encoded_size):
            with pytest.raises(ValueError, match=f"nested at most {MAX_DEPTH} deep"):
                write(nested(depth))


# --- damage ----------------------------------------------------------------------------------------------------

TREE = Sent({"w": torch.arange(6.0).reshape(2, 3), 3: torch.tensor(7), "e": torch.empty(0, 2)}, [1, "x", None, 2.5])
EVIL: list[Any] = [-1, 0, 1, 7, 2**31, 2**63, 10**30, 1.5, "F64", "x", None, True, [], {}, [0], ["ab", 10**13]]


def blob(header: Any, body: bytes = b"") -> bytearray:
    text = json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + body)


def tried(data: bytearray) -> bool:
    """Whether ``data`` decodes; anything but a DecodeError, or a tensor larger than the buffer, fails the test."""
    try:
        found = decode(data, copy=False)
    except DecodeError:
        return False
    start = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    for tensor in tr.tensors(found):
        room = tensor.untyped_storage()
        inside = start <= room.data_ptr() and room.data_ptr() + room.nbytes() <= start + len(data)
        assert inside or room.nbytes() <= len(data)  # a view of the buffer, or a copy of a part of it
    return True


def test_flipped_and_missing_bytes_are_a_decode_error_or_still_a_tree() -> None:
    rng = random.Random(0)
    good = encode(TREE)
    outcomes = [tried(good[:size]) for size in range(len(good))]
    assert not any(outcomes)  # every byte is needed
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            if rng.random() < 0.6:
                data[at] ^= 1 << rng.randrange(8)
            elif rng.random() < 0.5:
                data[at] = rng.choice(b'0129-"[]{},:eE.tdrvlu\x00\xff')
            else:
                del data[at : at + rng.randint(1, 4)]
        tried(data)


def test_headers_that_lie_are_a_decode_error_or_still_a_tree() -> None:
    rng = random.Random(1)
    good = bytes(encode(TREE))
    size = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for _ in range(3000):
        header = json.loads(good[8:size])
        tree = json.loads(header["__metadata__"]["tree"])
        for _ in range(rng.randint(1, 2)):
            container, key = rng.choice(spots(header) + spots(tree))
            container[key] = rng.choice(EVIL)
        if isinstance(header.get("__metadata__"), dict) and "tree" in header["__metadata__"]:
            header["__metadata__"]["tree"] = json.dumps(tree)
        refused += not tried(blob(header, good[size:]))
    assert refused > 1000


@pytest.mark.parametrize("shape", [[0, 10**30], [0, 2**62, 8], ["ab", 10**13], [[0], 10**13], [2**40, 2**40], [-1]])
def test_shapes_that_cannot_be_are_a_decode_error(shape: list[Any]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    with pytest.raises(DecodeError):
        decode(blob({"__metadata__": {"tree": '{"t":0}'}, "0": entry}))


def test_products_do_not_depend_on_where_a_tensor_was_decoded() -> None:
    """A matrix product's last bits depend on where its operands begin, so decoded ones begin as torch's own do."""
    rng = np.random.default_rng(0)
    tree = {f"{i}": torch.from_numpy(rng.standard_normal((3 + i, 8))).float() for i in range(9)}
    weight = torch.from_numpy(rng.standard_normal((10, 8))).float()
    for name, found in decode(encode(tree), copy=False).items():
        assert found.data_ptr() % 64 == 0
        assert torch.equal(found @ weight.T, tree[name] @ weight.T)
