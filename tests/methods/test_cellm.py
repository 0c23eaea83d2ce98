"""CELLM: reductions, masks by hand, and that nothing frozen travels or moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import Frozen, architecture, federation, loop, worker

import consilience
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.errors import ConfigError
from consilience.core.messages import Job, Reply
from consilience.core.model import Weights
from consilience.methods import CELLM, FedAdam, FedAvg
from consilience.methods.cellm import Sparse
from consilience.models import architecture as named
from consilience.wire.validate import Validation

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "momentum": 0.5}
WHOLE: dict[str, Any] = {"density_up": 1.0, "density_down": 1.0}


def model_of(method: Any, rounds: int = 4) -> Weights:
    at = worker(method, federation(), architecture(Frozen))
    server = loop(at, rounds, cohort=3).snapshots[rounds].server
    found: Weights = method.global_model(server).weights
    order = at.place.network("frozen").spec.params
    return Weights({name: found.params[name] for name in order}, found.buffers)


def test_with_everything_sent_it_is_fedadam_or_fedavg_bit_for_bit() -> None:
    assert tr.digest(model_of(CELLM(**WHOLE, **USUAL))) == tr.digest(model_of(FedAdam(**USUAL)))
    plain = CELLM(server_optimizer="sgd", server_lr=1.0, **WHOLE, **USUAL)
    assert tr.digest(model_of(plain)) == tr.digest(model_of(FedAvg(form="delta", **USUAL)))
    assert tr.digest(model_of(CELLM(density_down=0.5, density_up=1.0, **USUAL))) != tr.digest(
        model_of(FedAdam(**USUAL))
    )


def top(v: np.ndarray, share: float) -> np.ndarray:
    """All but the largest numbers set to 0."""
    found = np.zeros_like(v)
    index = np.argsort(-np.abs(v), kind="stable")[: max(1, round(share * len(v)))]
    found[index] = v[index]
    return found


def flat(params: Any) -> np.ndarray:
    return torch.cat([p.flatten() for p in params.values()]).numpy()


def test_a_round_is_the_equations() -> None:
    """Masks, dense training from the masked start, sparse changes and the server's step, by hand."""
    method = CELLM(density_down=0.3, density_up=0.2, server_optimizer="sgd", server_lr=0.7, weights="uniform", **USUAL)
    at = worker(method, federation(), architecture(Frozen))
    server = method.init_server(at.host(0, "init"))
    theta = flat(server.own.model.params)
    message = method.broadcast(at.program[0], server, None)  # type: ignore[arg-type]
    changes, replies = [], []
    for client in (0, 3):
        here = at.site(Job(client, client, 1, 0, 0, 0))[0]
        start = method._start(here, message)
        trained = {n: p for n, p in start.params.items() if n.startswith("head")}
        np.testing.assert_array_equal(flat(trained), top(theta, 0.3))
        assert all(torch.equal(p, here.initial().params[n]) for n, p in start.params.items() if n not in trained)
        end = here.fit(start).weights
        changes.append(top(flat({n: end.params[n] for n in trained}) - flat(trained), 0.2))
        update, _ = method.client_update(at.program[0], here, message, None)
        replies.append(Reply(here.job, update, 9, 9, 1, 0, 0.0, 0.0))
    after = method.aggregate(at.program[0], at.host(0, "train"), server, replies, [0, 3])
    np.testing.assert_allclose(flat(after.own.model.params), theta + 0.7 * np.mean(changes, 0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda u: u._replace(numbers=u.numbers[1:]), "numbers has shape"),
        (lambda u: u._replace(packed=u.packed.flip(0)), "packed indices that are not ascending"),
        (lambda u: u._replace(packed=u.packed[1:]), "packed .* are not"),
        (lambda u: u._replace(packed=None), "packed is not a tensor"),
        (lambda u: u._replace(numbers=u.numbers * float("nan")), "finite"),
    ],
)
def test_malformed_pieces_are_refused(change: Any, why: str) -> None:
    method = CELLM(density_up=0.5, **USUAL)
    at = worker(method, federation(), architecture(Frozen))
    here = at.site(Job(0, 1, 1, 0, 0, 0))[0]
    message = method.broadcast(at.program[0], method.init_server(at.host(0, "init")), None)  # type: ignore[arg-type]
    update, _ = method.client_update(at.program[0], here, message, None)
    check = Validation(at.place)
    assert check.wrong(here.job, update) is None
    wrong = check.wrong(here.job, change(update))
    assert wrong is not None
    with pytest.raises(ValueError, match=why):
        raise ValueError(" ".join(wrong))


@pytest.fixture(scope="module")
def tuned() -> consilience.Result:
    pytest.importorskip("peft")
    fed = consilience.make_federation("digits", clients=4, partition="dirichlet:1.0", seed=0)
    options: dict[str, Any] = {
        "model": "transformer+lora:8",
        "rounds": 3,
        "executor": "serial",
        "eval_clients_every": 3,
    }
    return consilience.run(CELLM(local_steps=4), fed, **options)


def test_adapters_of_peft_are_tuned_and_nothing_else_moves(tuned: consilience.Result) -> None:
    before = named("transformer+lora:8", (1, 8, 8), 10).initial(0)
    own, base = tuned.server.own.model.params, tuned.server.base.params
    assert {n for n in own if not n.startswith("head.")} == {n for n in before.params if "lora_" in n}
    assert all(torch.equal(p, before.params[n]) for n, p in base.items())
    first = [n for n in own if "lora_B" in n]
    assert len(first) == 4
    assert not any(before.params[n].any() for n in first)  # so that the adapted model begins as the frozen one
    assert any(bool(own[n].any()) for n in first)


def test_only_the_pieces_are_sent(tuned: consilience.Result) -> None:
    d = 4 * 8 * 2 * 32 + 330
    size = encoded_size(Sparse(torch.zeros(round(d / 4)), torch.zeros(-(-round(d / 4) * 12 // 8), dtype=torch.uint8)))
    last = tuned.history[-1]
    assert last["bytes_up"] == last["bytes_down"] == 3 * 4 * size
    assert size < 0.5 * 4 * d


def test_lora_begins_as_the_model_itself() -> None:
    pytest.importorskip("peft")
    bare, tuned = (named(f"mlp:12x9{end}", (1, 4, 4), 3) for end in ("", "+lora:3"))
    weights = bare.initial(0).params
    module = tuned.build(0)
    kept = {n.replace(".base_layer", ""): p for n, p in module.named_parameters() if "lora_" not in n}
    for name, p in kept.items():
        p.data.copy_(weights[name])
    plain = bare.build(0)
    plain.load_state_dict(weights)
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), plain(x))
    assert {n for n, p in module.named_parameters() if p.requires_grad and "lora_" not in n} == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("logistic+lora", (3,), "have none"),
        ("transformer", (3,), "images"),
        ("mlp+lora@0.5", (3,), "nested"),
        ("mlp+lora:0", (3,), "mlp"),
    ],
)
def test_models_that_cannot_be(name: str, shape: tuple[int, ...], why: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=why):
        named(name, shape, 2).build()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (1, 28, 28)])
def test_the_transformer_takes_images_of_any_size(shape: tuple[int, ...]) -> None:
    module = named("transformer", shape, 5).build(0)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    out = module(x)
    assert out.shape == (2, 5)
    assert torch.allclose(module(x[1:])[0], out[1], atol=1e-6)
    moved = x.clone()
    moved[0, :, 0, 0] += 1.0
    assert not torch.allclose(module(moved)[0], out[0], atol=1e-6)


def test_attention_is_pytorchs_own() -> None:
    from consilience.models.transformer import Attention

    torch.manual_seed(0)
    own, theirs = Attention(8, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([own.query.weight, own.key.weight, own.value.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([own.query.bias, own.key.bias, own.value.bias]).detach()
    theirs.out_proj.load_state_dict(own.out.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(own(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)
