"""Error feedback: what a client remembers, so that compression loses nothing for good.

v: what is to be sent; C: the compressor in its contractive form; e, h: the client's memory, 0 at first; the server has
a copy of each client's h.

    plain      send C(v), in the unbiased form where there is one;            read as C(v)
    ef         send m = C(e + v);  e <- e + v - m;                            read as m
    ef21       send m = C(v - h);  h <- h + m;                                read as h (new)
    econtrol   send m = C(eta e + v - h);  e <- e + v - h - m (old h);
               h <- h + m;                                                    read as h (new)

ef: Seide et al. 2014; Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD", ICML 2019 (EF-SGD).
ef21: Richtarik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
Feedback", NeurIPS 2021. ef21w: Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded", ICLR 2024 (EF21-W): clients
weighted by their smoothness. Every compressor here is positively homogeneous, and with such ones its iterates are those
of EF21 for any weights, so it *is* ef21; what it gains is that a larger step is safe: :func:`ef21_step`.
econtrol: Gao, Islamov, Stich, "EControl: Fast Distributed Optimization with Compression and Error Control", ICLR 2024.
Deviation: h begins at 0, not at the first gradient sent in full, so with eta = 0 it is EF21.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.model import Params
from consilience.core.tree import record
from consilience.parts import compressors
from consilience.parts.compressors import Coded, Compressor, Shapes

RULES = ("ef", "ef21", "ef21w", "econtrol")
ETA = 0.1
"""How strongly EControl feeds back unless it is said."""


@record
class Memory(NamedTuple):
    """What a client remembers of one field: e, h, and where a compressor begins. None: nothing, or zeros."""

    error: Params | None = None
    copy: Params | None = None
    basis: Params | None = None


@dataclass(frozen=True)
class Scheme:
    """A compressor and how errors are fed back."""

    compressor: Compressor
    rule: Literal["plain", "ef", "ef21", "econtrol"] = "plain"
    eta: float = ETA

    @property
    def tracks(self) -> bool:
        """Whether the server keeps a copy of each client's h."""
        return self.rule in ("ef21", "econtrol")

    def send(
        self, v: Params, memory: Memory, rng: np.random.Generator, again: np.random.Generator
    ) -> tuple[Coded, Params, Memory]:
        """What is sent of ``v``, as what it will be read, and the new memory. rng, again: one stream, twice from its
        start, to encode and to decode."""
        error, copy = _fitting(memory.error, v), _fitting(memory.copy, v)
        target = v if copy is None else tr.sub(v, copy)
        if error is not None:
            target = tr.axpy(1.0 if self.rule == "ef" else self.eta, error, target)
        coded, basis = self.compressor.encode(target, rng, _fitting_names(memory.basis, v))
        read = self.compressor.decode(coded, shapes_of(v), again)
        if self.rule == "plain":
            return coded, read, Memory(basis=basis)
        if self.rule == "ef":
            return coded, read, Memory(error=tr.sub(target, read), basis=basis)
        if self.rule == "econtrol":
            missed = tr.sub(v if copy is None else tr.sub(v, copy), read)
            error = missed if error is None else tr.add(error, missed)
        new = read if copy is None else tr.add(copy, read)
        return coded, new, Memory(error if self.rule == "econtrol" else None, new, basis)

    def receive(self, coded: Coded, shapes: Shapes, copy: Params | None, rng: np.random.Generator) -> Params:
        """What is read of a message; copy: the server's of this client's h. Raises MalformedError."""
        read = self.compressor.decode(coded, shapes, rng)
        copy = _fitting(copy, read) if self.tracks else None
        found: Params = read if copy is None else tr.add(copy, read)
        return found


def shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(p.shape) for name, p in params.items()}


def _fitting(memory: Params | None, v: Params) -> Params | None:
    """A memory of the same parameters; one of others, as of another sub-model, is forgotten at both ends."""
    if memory is None or list(memory) != list(v):
        return None
    return memory if all(memory[n].shape == p.shape and memory[n].dtype == p.dtype for n, p in v.items()) else None


def _fitting_names(basis: Params | None, v: Params) -> Params | None:
    if basis is None or any(n not in v or len(b) * len(v[n]) != v[n].numel() for n, b in basis.items()):
        return None
    return basis


def parse(text: str, where: str = "--compress") -> Scheme | None:
    """The scheme of ``[ef|ef21|ef21w|econtrol[@ETA]:]COMPRESSOR``; None for identity. Raises ConfigError."""
    if text == "identity":
        return None
    head, _, rest = text.partition(":")
    rule, at, number = head.partition("@")
    if rule not in RULES:
        return Scheme(compressors.parse(text, True, f"{where} {text}"))
    eta = ETA
    if at:
        try:
            eta = float(number)
        except ValueError:
            eta = math.nan
        if rule != "econtrol" or not 0 <= eta < math.inf:
            raise ConfigError(f"{where} {text}: only econtrol takes @ETA, a number from 0 on")
    made = compressors.parse(rest, False, f"{where} {text}")
    return Scheme(made, "ef21" if rule == "ef21w" else rule, eta)  # type: ignore[arg-type]


def ef21_step(smoothness: float, each: Sequence[float], delta: float, weighted: bool = True) -> float:
    """The step size that EF21's theory allows: 1 / (L + L_M ((1 + sqrt(1 - delta)) / delta - 1)).

    smoothness: L, of the mean of the clients' functions. each: L_i. delta: of the compressor. L_M is the arithmetic
    mean of L_i if ``weighted`` (EF21-W and, by its analysis, EF21), else the quadratic one (as EF21 was published).
    """
    mean = math.fsum(each) / len(each) if weighted else math.sqrt(math.fsum(x * x for x in each) / len(each))
    return 1 / (smoothness + mean * ((1 + math.sqrt(1 - delta)) / delta - 1))
