"""Error feedback against its equations, in float64, and on problems with known solutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.streams import philox
from consilience.parts.compressors import QSGD, LowRank, RandK, TopK
from consilience.parts.feedback import ETA, Memory, Scheme, ef21_step, parse, shapes_of


def tensor(x: np.ndarray) -> dict[str, torch.Tensor]:
    return {"x": torch.from_numpy(np.array(x))}


def send(scheme: Scheme, v: np.ndarray, memory: Memory, *key: int) -> tuple[np.ndarray, np.ndarray, Memory]:
    """What the compressor's message holds, what the server reads (with its own copy), and the new memory."""
    params = tensor(v)
    coded, read, new = scheme.send(params, memory, philox(0, *key), philox(0, *key))
    there = scheme.receive(coded, shapes_of(params), memory.copy, philox(0, *key))
    assert tr.digest(there) == tr.digest(read)  # both ends have the same bits
    bare = scheme.compressor.decode(coded, shapes_of(params), philox(0, *key))
    return bare["x"].numpy(), read["x"].numpy(), new


RNG = np.random.default_rng(0)


def read_of(scheme: Scheme, v: np.ndarray, memory: Memory) -> tuple[np.ndarray, Memory]:
    """What is read, and the new memory, of a compressor that draws nothing."""
    _, read, new = scheme.send(tensor(v), memory, RNG, RNG)
    return read["x"].numpy(), new


def top(v: np.ndarray, k: int) -> np.ndarray:
    """TopK, naive."""
    found = np.zeros_like(v)
    for i in sorted(range(len(v)), key=lambda i: (-abs(v[i]), i))[:k]:
        found[i] = v[i]
    return found


@pytest.mark.parametrize("text", ["topk:0.25", "ef:topk:0.25", "ef21:topk:0.25", "econtrol@0.3:topk:0.25"])
def test_every_rule_is_its_equations(text: str) -> None:
    scheme, memory = parse(text), Memory()
    assert scheme is not None
    rng = np.random.default_rng(0)
    e, h = np.zeros(8), np.zeros(8)
    for _ in range(30):
        v = rng.standard_normal(8)
        if scheme.rule == "plain":
            wanted = m = top(v, 2)
        elif scheme.rule == "ef":
            wanted = m = top(e + v, 2)
            e = e + v - m
        elif scheme.rule == "ef21":
            m = top(v - h, 2)
            wanted = h = h + m
        else:
            m = top(v - h + 0.3 * e, 2)
            e = e + (v - h - m)
            wanted = h = h + m
        sent, read, memory = send(scheme, v, memory)
        np.testing.assert_allclose(sent, m, atol=1e-13)
        np.testing.assert_allclose(read, wanted, atol=1e-13)


def test_what_is_not_sent_is_kept() -> None:
    """ef: the sum of what was sent and e is the sum of what was to be sent."""
    scheme, memory, rng = parse("ef:qsgd:3"), Memory(), np.random.default_rng(1)
    assert scheme is not None
    given, sent = np.zeros(20), np.zeros(20)
    for i in range(50):
        v = rng.standard_normal(20)
        _, read, memory = send(scheme, v, memory, i)
        given, sent = given + v, sent + read
    assert memory.error is not None
    np.testing.assert_allclose(sent + memory.error["x"].numpy(), given, atol=1e-12)


def test_econtrol_without_control_is_ef21() -> None:
    rng, a, b = np.random.default_rng(2), Memory(), Memory()
    for i in range(20):
        v = rng.standard_normal(12)
        _, one, a = send(Scheme(TopK(False, 0.2), "econtrol", 0.0), v, a, i)
        _, two, b = send(Scheme(TopK(False, 0.2), "ef21"), v, b, i)
        assert (one == two).all()


@pytest.mark.parametrize("rule", ["ef", "ef21", "econtrol"])
def test_without_loss_all_rules_send_what_is_given(rule: str) -> None:
    scheme, memory, rng = Scheme(TopK(False, 1.0), rule), Memory(), np.random.default_rng(3)  # type: ignore[arg-type]
    for i in range(10):
        v = rng.standard_normal(9)
        _, read, memory = send(scheme, v, memory, i)
        np.testing.assert_allclose(read, v, atol=1e-14)
        if memory.error is not None:
            assert np.abs(memory.error["x"].numpy()).max() < 1e-14


THREE = (np.array([-3.0, 2.0, 2.0]), np.array([2.0, -3.0, 2.0]), np.array([2.0, 2.0, -3.0]))
"""f_i(x) = <a_i, x>^2 + ||x||^2 / 4, from Beznosikov, Horvath, Richtarik, Safaryan, "On Biased Compression for
Distributed Learning", 2020, example 1: from x = (t, t, t) naive Top-1 multiplies x by 1 + 11 gamma / 6 in each step."""


def descend(scheme: Scheme, gamma: float, steps: int) -> np.ndarray:
    x, memories = np.ones(3), [Memory() for _ in THREE]
    for _ in range(steps):
        reads = []
        for i, a in enumerate(THREE):
            read, memories[i] = read_of(scheme, 2 * (a @ x) * a + x / 2, memories[i])
            reads.append(read)
        x = x - gamma * sum(reads) / 3
    return x


def test_naive_topk_diverges_where_ef21_converges() -> None:
    gamma = 0.01
    naive = descend(Scheme(TopK(False, 1 / 3)), gamma, 300)
    np.testing.assert_allclose(naive, (1 + 11 * gamma / 6) ** 300, rtol=1e-9)  # > 200, as the example says
    assert np.abs(descend(Scheme(TopK(False, 1 / 3), "ef21"), gamma, 800)).max() < 1e-3
    assert np.abs(descend(Scheme(TopK(False, 1 / 3), "econtrol", 0.05), gamma, 800)).max() < 1e-3


def quadratics(each: list[float], d: int = 10) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """f_i(x) = x' A_i x / 2 - b_i' x with smoothness L_i, and the minimiser of their mean."""
    rng, parts, shifts = np.random.default_rng(5), [], []
    for smooth in each:
        q, _ = np.linalg.qr(rng.standard_normal((d, d)))
        parts.append(q @ np.diag(np.linspace(0.5 * smooth, smooth, d)) @ q.T)
        shifts.append(rng.standard_normal(d) * smooth)
    return parts, shifts, np.linalg.solve(sum(parts), sum(shifts))


def distances(scheme: Scheme, each: list[float], gamma: float, steps: int) -> list[float]:
    parts, shifts, best = quadratics(each)
    x, memories, found = np.zeros(len(best)), [Memory() for _ in each], []
    for _ in range(steps):
        reads = []
        for i, (a, b) in enumerate(zip(parts, shifts, strict=True)):
            read, memories[i] = read_of(scheme, a @ x - b, memories[i])
            reads.append(read)
        x = x - gamma * sum(reads) / len(each)
        found.append(float(np.linalg.norm(x - best)))
    return found


@pytest.mark.parametrize("text", ["ef21:topk:0.2", "econtrol@0.1:topk:0.2", "ef21:sign", "ef21:bits:3"])
def test_linear_rate_to_the_exact_minimiser(text: str) -> None:
    """Strongly convex: the error falls by a constant factor again and again, to the last digits."""
    scheme = parse(text)
    assert scheme is not None
    found = distances(scheme, [1.0, 2.0, 3.0], ef21_step(3.0, [1.0, 2.0, 3.0], scheme.compressor.delta(10)), 1500)
    assert found[-1] < 1e-8
    halves = [next(t for t, e in enumerate(found) if e < 10.0**-p) for p in (2, 5, 8)]
    assert halves[2] - halves[1] < 1.5 * (halves[1] - halves[0])  # a straight line on a log scale


def test_ef_stalls_where_ef21_does_not() -> None:
    """With data that differ, EF keeps an error in proportion to the step."""
    gamma = 0.05
    ef = distances(Scheme(TopK(False, 0.2), "ef"), [1.0, 2.0, 3.0], gamma, 800)
    half = distances(Scheme(TopK(False, 0.2), "ef"), [1.0, 2.0, 3.0], gamma / 4, 2400)
    exact = distances(Scheme(TopK(False, 0.2), "ef21"), [1.0, 2.0, 3.0], gamma, 800)
    assert exact[-1] < 1e-10
    assert np.mean(ef[-200:]) > 1e-3
    assert np.mean(ef[-200:]) > 2 * np.mean(half[-200:])


def test_the_arithmetic_mean_allows_a_larger_step() -> None:
    """EF21-W's gain: L_i = (1, 1, 1, 100), the same iterates, a step by the arithmetic mean."""
    each, scheme = [1.0, 1.0, 1.0, 100.0], Scheme(TopK(False, 0.2), "ef21")
    large, small = (ef21_step(25.75, each, 0.2, weighted) for weighted in (True, False))
    assert large / small == pytest.approx(1.85, abs=0.05)
    slow, fast = distances(scheme, each, small, 500), distances(scheme, each, large, 500)
    assert next(t for t, e in enumerate(fast) if e < 1e-3) < 0.7 * next(t for t, e in enumerate(slow) if e < 1e-3)


def test_a_memory_of_other_parameters_is_forgotten() -> None:
    scheme = Scheme(LowRank(False, 1), "ef21")
    _, _, memory = scheme.send({"w": torch.ones(4, 5)}, Memory(), philox(0), philox(0))
    new = {"w": torch.ones(3, 5)}
    coded, read, _ = scheme.send(new, memory, philox(1), philox(1))
    assert tr.digest(scheme.receive(coded, shapes_of(new), memory.copy, philox(1))) == tr.digest(read)
    torch.testing.assert_close(read, new)


def test_names() -> None:
    assert parse("identity") is None
    assert parse("randk:0.1") == Scheme(RandK(True, 0.1))
    assert parse("ef:randk:0.1") == Scheme(RandK(False, 0.1), "ef")
    assert parse("ef21w:qsgd:4") == parse("ef21:qsgd:4") == Scheme(QSGD(False, 4), "ef21")
    assert parse("econtrol:topk:0.1") == Scheme(TopK(False, 0.1), "econtrol", ETA)
    assert parse("econtrol@0.5:topk:0.1") == Scheme(TopK(False, 0.1), "econtrol", 0.5)
    for wrong in ("ef", "ef:", "ef@0.1:sign", "econtrol@x:sign", "econtrol@-1:sign", "ef21:ef:sign", "efx:sign", ""):
        with pytest.raises(ConfigError, match="--compress"):
            parse(wrong)
