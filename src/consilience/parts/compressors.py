"""Compressors: parameters as fewer bytes, and back.

C is contractive if E ||C(v) - v||^2 <= (1 - delta) ||v||^2 with 0 < delta <= 1, and unbiased if E C(v) = v and
E ||C(v) - v||^2 <= omega ||v||^2. An unbiased one divided by 1 + omega is contractive with delta = 1 / (1 + omega): in
this form (``unbiased`` false) error feedback takes them. All here are positively homogeneous: C(a v) = a C(v), a > 0.

Most take all parameters as one flat vector of d numbers; ``bits`` has a scale and ``lowrank`` factors for each tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.core.errors import ConfigError, nearest
from consilience.core.model import Params
from consilience.core.tree import record

Shapes = Mapping[str, tuple[int, ...]]
"""Of parameters by name."""


class MalformedError(ValueError):
    """A compressed message that cannot be decompressed; the message says why."""


@record
class Coded(NamedTuple):
    """Compressed parameters. numbers: one-dimensional, in the parameters' dtype. packed: uint8, codes of some bits
    each, most significant bit first."""

    numbers: Tensor
    packed: Tensor


def pack(codes: NDArray[np.int64], width: int) -> Tensor:
    """Non-negative codes as ``width`` bits each, in whole bytes."""
    if width in (8, 16):
        return torch.from_numpy(np.frombuffer(codes.astype(f">u{width // 8}").tobytes(), np.uint8).copy())
    bits = (codes[:, None] >> np.arange(width)[::-1]) & 1
    return torch.from_numpy(np.packbits(bits.astype(np.uint8)))


def unpack(packed: Tensor, width: int, count: int) -> NDArray[np.int64]:
    """``count`` codes. Raises MalformedError."""
    if packed.dtype != torch.uint8 or packed.shape != ((count * width + 7) // 8,):
        raise MalformedError(
            f"{tuple(packed.shape)} packed {packed.dtype} are not {count} codes of {width} bits in bytes"
        )
    data = packed.contiguous().numpy()
    if width in (8, 16):
        return np.frombuffer(data.tobytes(), f">u{width // 8}").astype(np.int64)
    bits = np.unpackbits(data, count=count * width).reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width)[::-1])


def flatten(params: Params) -> Tensor:
    """All parameters as one new vector."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def restore(flat: Tensor, shapes: Shapes) -> Params:
    """A vector as parameters."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = zip(torch.split(flat, sizes), shapes.items(), strict=True)
    return {name: part.reshape(shape).clone() for part, (name, shape) in parts}


@dataclass(frozen=True)
class Compressor(ABC):
    """One way to compress. unbiased: False for the contractive form."""

    name: ClassVar[str]
    can_be_unbiased: ClassVar[bool] = False
    """Whether the form without error feedback is unbiased."""

    unbiased: bool = False

    @abstractmethod
    def encode(self, v: Params, rng: np.random.Generator, basis: Params | None) -> tuple[Coded, Params | None]:
        """``v`` compressed, and what to begin with next time. rng: drawn alike where it is decoded."""

    @abstractmethod
    def decode(self, coded: Coded, shapes: Shapes, rng: np.random.Generator) -> Params:
        """Parameters of these shapes. Raises MalformedError."""

    def delta(self, d: int) -> float:
        """The contraction that is certain for d numbers (contractive form)."""
        return 1 / (1 + self.omega(d))

    def omega(self, d: int) -> float:
        """The relative variance for d numbers (unbiased form)."""
        raise NotImplementedError(f"{self.name} is not unbiased")


@dataclass(frozen=True)
class _Flat(Compressor):
    """All parameters as one vector."""

    def encode(self, v: Params, rng: np.random.Generator, basis: Params | None) -> tuple[Coded, None]:
        return self.squeeze(flatten(v), rng), None

    def decode(self, coded: Coded, shapes: Shapes, rng: np.random.Generator) -> Params:
        d = sum(math.prod(shape) for shape in shapes.values())
        return restore(self.swell(coded, d, rng), shapes)

    @abstractmethod
    def squeeze(self, v: Tensor, rng: np.random.Generator) -> Coded:
        """A vector compressed."""

    @abstractmethod
    def swell(self, coded: Coded, d: int, rng: np.random.Generator) -> Tensor:
        """A vector of d numbers."""


def _share(fraction: float, d: int) -> int:
    return min(d, max(1, round(fraction * d)))


def _numbers(coded: Coded, count: int) -> Tensor:
    if coded.numbers.shape != (count,) or not coded.numbers.is_floating_point():
        raise MalformedError(
            f"{tuple(coded.numbers.shape)} numbers of {coded.numbers.dtype}, not {count} floating ones"
        )
    return coded.numbers


def _nothing(packed: Tensor) -> None:
    if packed.shape != (0,) or packed.dtype != torch.uint8:
        raise MalformedError(f"{tuple(packed.shape)} packed {packed.dtype} where no bytes belong")


_EMPTY = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class TopK(_Flat):
    """The k = ``fraction`` d numbers of largest size; of equal ones the first. delta = k / d. Sent: k numbers and k
    indices of ceil(log2 d) bits."""

    name = "topk"
    fraction: float = 0.01

    def squeeze(self, v: Tensor, rng: np.random.Generator) -> Coded:
        k, size = _share(self.fraction, len(v)), v.abs()
        least = torch.topk(size, k, sorted=False).values.min()
        above = (size > least).nonzero().flatten()
        ties = (size == least).nonzero().flatten()[: k - len(above)]
        index = torch.cat([above, ties]).sort().values
        return Coded(v[index], pack(index.numpy(), _width(len(v))))

    def swell(self, coded: Coded, d: int, rng: np.random.Generator) -> Tensor:
        k = _share(self.fraction, d)
        index = unpack(coded.packed, _width(d), k)
        if index[-1] >= d or (np.diff(index) <= 0).any():
            raise MalformedError(f"indices that are not ascending within {d} numbers")
        found = torch.zeros(d, dtype=coded.numbers.dtype)
        found[torch.from_numpy(index)] = _numbers(coded, k)
        return found

    def delta(self, d: int) -> float:
        return _share(self.fraction, d) / d


def _width(d: int) -> int:
    return max(1, (d - 1).bit_length())


@dataclass(frozen=True)
class RandK(_Flat):
    """k = ``fraction`` d numbers drawn uniformly, times d / k in the unbiased form: omega = d / k - 1, or delta = k /
    d. Both ends draw the same indices, so only the k numbers are sent."""

    name = "randk"
    can_be_unbiased = True
    fraction: float = 0.01

    def squeeze(self, v: Tensor, rng: np.random.Generator) -> Coded:
        return Coded(v[self._index(len(v), rng)], _EMPTY)

    def swell(self, coded: Coded, d: int, rng: np.random.Generator) -> Tensor:
        index = self._index(d, rng)
        _nothing(coded.packed)
        found = torch.zeros(d, dtype=coded.numbers.dtype)
        found[index] = _numbers(coded, len(index)) * (d / len(index) if self.unbiased else 1.0)
        return found

    def _index(self, d: int, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(np.sort(rng.choice(d, _share(self.fraction, d), replace=False)))

    def omega(self, d: int) -> float:
        return d / _share(self.fraction, d) - 1


@dataclass(frozen=True)
class QSGD(_Flat):
    """Each number as its sign and its share of ||v||_2, rounded at random to a multiple of 1 / s, s = 2^(bits - 1) - 1:
    omega = min(d / s^2, sqrt(d) / s). Sent: the norm, and ``bits`` bits a number.

    Source: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
    Encoding", NeurIPS 2017, without its variable-length code.
    """

    name = "qsgd"
    can_be_unbiased = True
    bits: int = 8

    def squeeze(self, v: Tensor, rng: np.random.Generator) -> Coded:
        norm = torch.linalg.vector_norm(v.double()).to(v.dtype).reshape(1)
        wide, s = v.double().numpy(), self._levels
        parts = np.abs(wide) / (float(norm) or 1.0) * s
        level = np.minimum(np.floor(parts + rng.random(len(wide))), s).astype(np.int64)
        return Coded(norm, pack(level + ((wide < 0) << (self.bits - 1)), self.bits))

    def swell(self, coded: Coded, d: int, rng: np.random.Generator) -> Tensor:
        norm = float(_numbers(coded, 1))
        codes = unpack(coded.packed, self.bits, d)
        level = codes & self._levels
        signed = np.where(codes >> (self.bits - 1), -level, level) * (norm / self._levels)
        if not self.unbiased:
            signed /= 1 + self.omega(d)
        return torch.from_numpy(signed).to(coded.numbers.dtype)

    @property
    def _levels(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def omega(self, d: int) -> float:
        return min(d / self._levels**2, math.sqrt(d) / self._levels)


@dataclass(frozen=True)
class Sign(_Flat):
    """(||v||_1 / d) sign(v): delta = ||v||_1^2 / (d ||v||_2^2), at least 1 / d. Sent: the scale and a bit a number."""

    name = "sign"

    def squeeze(self, v: Tensor, rng: np.random.Generator) -> Coded:
        scale = v.double().abs().mean().to(v.dtype).reshape(1)
        return Coded(scale, pack((v < 0).numpy().astype(np.int64), 1))

    def swell(self, coded: Coded, d: int, rng: np.random.Generator) -> Tensor:
        scale = _numbers(coded, 1)
        return torch.where(torch.from_numpy(unpack(coded.packed, 1, d) > 0), -scale, scale)

    def delta(self, d: int) -> float:
        return 1 / d


@dataclass(frozen=True)
class Rounded(Compressor):
    """Each number to the nearest multiple of its tensor's largest size over 2^(bits - 1) - 1: delta >= 1 / d, since the
    largest number stays and no other moves by more than its size. Sent: a scale for each tensor, ``bits`` a number."""

    name = "bits"
    bits: int = 8

    def encode(self, v: Params, rng: np.random.Generator, basis: Params | None) -> tuple[Coded, None]:
        scales = torch.stack([p.abs().max() if p.numel() else p.new_zeros(()) for p in v.values()])
        top = self._top
        codes = [
            np.rint(p.double().reshape(-1).numpy() / (float(scale) or 1.0) * top).astype(np.int64) + top
            for p, scale in zip(v.values(), scales, strict=True)
        ]
        return Coded(scales, pack(np.concatenate(codes), self.bits)), None

    def decode(self, coded: Coded, shapes: Shapes, rng: np.random.Generator) -> Params:
        sizes = [math.prod(shape) for shape in shapes.values()]
        scales = _numbers(coded, len(sizes))
        levels = unpack(coded.packed, self.bits, sum(sizes)) - self._top
        wide = torch.from_numpy(levels).double() / self._top
        per = torch.repeat_interleave(scales.double(), torch.tensor(sizes))
        return restore((wide * per).to(scales.dtype), shapes)

    @property
    def _top(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def delta(self, d: int) -> float:
        return 1 / d


@dataclass(frozen=True)
class LowRank(Compressor):
    """Each tensor as a matrix M (first dimension by all others) of rank r: P = M Q made orthonormal, Q <- M^T P, one
    power iteration that begins with the Q of the last time; M is read as P Q^T. Vectors, and matrices that this would
    not shorten, are sent as they are. Contractive, by how much depends on M.

    Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", NeurIPS 2019. Deviation: clients iterate each on its own matrix, not all on their mean, since the
    server combines whole updates.
    """

    name = "lowrank"
    rank: int = 2

    def encode(self, v: Params, rng: np.random.Generator, basis: Params | None) -> tuple[Coded, Params]:
        parts: list[Tensor] = []
        kept: Params = {}
        for name, p in v.items():
            start = torch.from_numpy(rng.standard_normal((self._columns(p.shape), self.rank)))
            if not self._shortens(p.shape):
                parts.append(p.reshape(-1))
                continue
            matrix = p.reshape(len(p), -1).contiguous()
            q = start.to(p.dtype) if basis is None or name not in basis else basis[name]
            left = torch.linalg.qr(matrix @ q).Q
            right = matrix.T @ left
            # a matrix of zeros, or one that last time's Q does not see, says nothing of where to look next
            kept[name] = right if bool(right.any()) else start.to(p.dtype)
            parts += [left.reshape(-1), right.reshape(-1)]
        return Coded(torch.cat(parts), _EMPTY), kept

    def decode(self, coded: Coded, shapes: Shapes, rng: np.random.Generator) -> Params:
        short = {name: self._shortens(shape) for name, shape in shapes.items()}
        sizes = []
        for name, shape in shapes.items():
            if short[name]:
                sizes += [shape[0] * self.rank, self._columns(shape) * self.rank]
            else:
                sizes.append(math.prod(shape))
        _nothing(coded.packed)
        parts = iter(torch.split(_numbers(coded, sum(sizes)), sizes))
        found: Params = {}
        for name, shape in shapes.items():
            if short[name]:
                left, right = next(parts).reshape(-1, self.rank), next(parts).reshape(-1, self.rank)
                found[name] = (left.clone() @ right.clone().T).reshape(shape)
            else:
                found[name] = next(parts).reshape(shape).clone()
        return found

    def _columns(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[1:])

    def _shortens(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self.rank * (shape[0] + self._columns(shape)) < math.prod(shape)

    def delta(self, d: int) -> float:
        return 0.0


USAGE = "topk:F, randk:F, qsgd:BITS, sign, bits:B or lowrank:R"
KINDS = ("topk", "randk", "qsgd", "sign", "bits", "lowrank")


def parse(text: str, unbiased: bool, where: str) -> Compressor:
    """A compressor by name, in its unbiased form where it has one and ``unbiased``. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"{where}: unknown compressor '{kind}'{nearest(kind, KINDS)}; write {USAGE}")
    if kind == "sign" and not rest:
        return Sign()
    try:
        number = float(rest)
    except ValueError:
        number = math.nan
    if kind in ("topk", "randk") and 0 < number <= 1:
        return TopK(False, number) if kind == "topk" else RandK(unbiased, number)
    if kind in ("qsgd", "bits") and number in range(2, 17):
        return QSGD(unbiased, int(number)) if kind == "qsgd" else Rounded(False, int(number))
    if kind == "lowrank" and number >= 1 and number == int(number):
        return LowRank(False, int(number))
    wanted = {
        "topk": "F is a fraction above 0 and at most 1", "randk": "F is a fraction above 0 and at most 1",
        "qsgd": "BITS is 2 to 16", "bits": "B is 2 to 16", "lowrank": "R is a rank from 1 on", "sign": "sign is all",
    }  # fmt: skip
    raise ConfigError(f"{where}: write {USAGE}; {wanted[kind]}")
