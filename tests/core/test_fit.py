"""The training loop against loops written by hand with torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    FEATURES,
    LINEAR,
    NOISY,
    NORMED,
    Counting,
    Frozen,
    Normed,
    Parts,
    Twins,
    architecture,
    federation,
    site,
    vector,
    worker,
)
from torch import nn
from torch.nn import functional as F

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.federation import ClientData, Split, Task
from consilience.core.fit import Plan
from consilience.core.model import Architecture, Instance, Weights
from consilience.core.predict import Ensemble, Net
from consilience.core.site import Site
from consilience.methods.fedavg import FedAvg
from consilience.simulate import prepare, run

ROWS = 23


def place(method: FedAvg | None = None, model: Architecture = LINEAR) -> Site:
    return site(worker(method or FedAvg(batch_size=5), federation((ROWS, 8)), model))


def load(model: Architecture, weights: Weights) -> nn.Module:
    module = model.build()
    module.load_state_dict({**weights.params, **weights.buffers})
    return module.train()


def by_hand(
    at: Site,
    model: Architecture,
    make: Callable[..., torch.optim.Optimizer],
    epochs: int,
    *,
    clip: float | None = None,
    steps: int | None = None,
    loss: Callable[[nn.Module, Split, torch.Tensor], torch.Tensor] | None = None,
) -> Weights:
    module = load(model, at.initial())
    optimizer = make(module.parameters())
    rng, data, done = at.rng("batches"), at.train, 0
    for _ in range(epochs):
        for index in torch.from_numpy(rng.permutation(len(data))).split(at.method.batch_size):
            if done == steps:
                break
            optimizer.zero_grad()
            rows = data.rows(index)
            value = F.cross_entropy(module(rows.x), rows.y) if loss is None else loss(module, rows, index)
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            done += 1
    return Weights(dict(module.named_parameters()), dict(module.named_buffers()))


def equal(a: Weights, b: Weights) -> bool:
    return a.params.keys() == b.params.keys() and all(torch.equal(a.params[k], b.params[k]) for k in a.params)


@pytest.mark.parametrize(
    ("fields", "make", "clip"),
    [
        ({}, lambda p: torch.optim.SGD(p, lr=0.05), None),
        ({"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), None),
        ({"weight_decay": 0.1}, lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1), None),
        (
            {"momentum": 0.5, "weight_decay": 0.1},
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5, weight_decay=0.1),
            None,
        ),
        ({"clip": 0.3}, lambda p: torch.optim.SGD(p, lr=0.05), 0.3),
        ({"clip": 0.3, "weight_decay": 0.5}, lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.5), 0.3),
        ({"clip": 1e6, "lr": 0.7}, lambda p: torch.optim.SGD(p, lr=0.7), None),
        ({"optimizer": "adam"}, lambda p: torch.optim.Adam(p, lr=0.05), None),
        ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1), None),
        ({"optimizer": "rmsprop", "momentum": 0.9}, lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9), None),
    ],
)
@pytest.mark.parametrize("model", [LINEAR, NORMED], ids=lambda m: m.name)
def test_equals_a_loop_by_hand_bit_for_bit(fields: Any, make: Any, clip: float | None, model: Architecture) -> None:
    at = place(FedAvg(batch_size=5, local_epochs=3, **fields), model)
    fit = at.fit(at.initial())
    wanted = by_hand(at, model, make, 3, clip=clip)
    assert equal(fit.weights, wanted)
    assert all(torch.equal(fit.weights.buffers[k], b) for k, b in wanted.buffers.items())
    assert (fit.steps, fit.samples) == (15, 3 * ROWS)  # the last of 5 batches has 3 rows


@pytest.mark.parametrize("fields", [{"clip": 0.1}, {"weight_decay": 0.5}])
def test_parameters_may_share_a_gradient_tensor(fields: dict[str, float]) -> None:
    model = architecture(Twins)
    at = place(FedAvg(batch_size=5, **fields), model)
    decay, clip = fields.get("weight_decay", 0.0), fields.get("clip")
    wanted = by_hand(at, model, lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=decay), 1, clip=clip)
    assert equal(at.fit(at.initial()).weights, wanted)


def test_gradients_may_be_expanded_views() -> None:
    at = place(FedAvg(batch_size=5, weight_decay=0.5))

    def loss(module: Any, rows: Any, index: Any = None) -> torch.Tensor:
        return sum((p.sum() for p in module.parameters()), torch.zeros(()))

    wanted = by_hand(at, LINEAR, lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.5), 1, loss=loss)
    assert equal(at.fit(at.initial(), loss=loss).weights, wanted)


def test_steps_instead_of_epochs() -> None:
    at = place(FedAvg(batch_size=5, local_steps=7, local_epochs=9))
    fit = at.fit(at.initial())
    assert (fit.steps, fit.samples) == (7, ROWS + 10)  # an epoch and two batches
    assert equal(fit.weights, by_hand(at, LINEAR, lambda p: torch.optim.SGD(p, lr=0.05), 2, steps=7))
    assert at.fit(at.initial(), epochs=2).steps == 10
    assert at.fit(at.initial(), steps=3, batch_size=ROWS).samples == 3 * ROWS
    given = [torch.tensor([0, 1]), torch.tensor([2])]
    assert (at.fit(at.initial(), batches=given).steps, at.fit(at.initial(), batches=given).samples) == (2, 3)


def test_what_was_given_is_not_changed() -> None:
    at = place(model=NORMED)
    start = at.initial()
    before = tr.digest(start)
    assert tr.digest(at.fit(start).weights) != before
    assert tr.digest(start) == before


def test_only_chosen_parameters_move() -> None:
    at = place(FedAvg(batch_size=5, weight_decay=0.1, momentum=0.9), NOISY)
    start = at.initial()
    fit = at.fit(start, trainable=lambda name: name.startswith("head."), sum_gradients=True)
    moved = {k for k in start.params if not torch.equal(start.params[k], fit.weights.params[k])}
    assert moved == {"head.weight", "head.bias"} == set(fit.grad_sum)
    again = at.fit(start)  # the next borrower of the module trains everything
    assert not torch.equal(again.weights.params["features.0.weight"], start.params["features.0.weight"])
    with pytest.raises(ValueError, match="nothing to train"):
        at.fit(start, trainable=lambda name: False)


def test_parameters_that_the_model_froze_stay_frozen() -> None:
    at = place(model=architecture(Frozen))
    start = at.initial()
    end = at.fit(start).weights
    assert torch.equal(end.params["features.weight"], start.params["features.weight"])
    assert not torch.equal(end.params["head.weight"], start.params["head.weight"])


def test_a_borrowed_module_remembers_nothing_of_the_last_borrower() -> None:
    at = place(model=architecture(Counting))
    one, two = at.fit(at.initial()), at.fit(at.initial())
    assert tr.digest(one.weights) == tr.digest(two.weights)


def test_sample_weights_multiply_each_rows_loss() -> None:
    at = place()
    weight = torch.arange(ROWS) / 7.0

    def loss(module: nn.Module, rows: Split, index: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(module(rows.x), rows.y, reduction="none") * weight[index]).mean()

    wanted = by_hand(at, LINEAR, lambda p: torch.optim.SGD(p, lr=0.05), 1, loss=loss)
    assert equal(at.fit(at.initial(), sample_weight=weight).weights, wanted)


def test_step_sizes_may_change_within_a_round_and_after_it() -> None:
    at = place(FedAvg(batch_size=5, local_steps=4))
    rates = [0.1, 0.2, 0.05, 0.4]
    fit = at.fit(at.initial(), lr=lambda k: rates[k], sum_gradients=True)
    assert fit.lr_sum == sum(rates)
    parts = at.initial()
    for k, rate in enumerate(rates):
        index = torch.from_numpy(at.rng("batches").permutation(ROWS))[5 * k : 5 * k + 5]
        parts = at.fit(parts, batches=[index], lr=rate).weights
    assert equal(parts, fit.weights)
    late = site(worker(FedAvg(lr=0.5, lr_decay=0.5, batch_size=5)), version=3)
    assert late.fit(late.initial(), steps=2).lr_sum == 2 * 0.5 * 0.5**3


def test_grad_sum_is_the_sum_of_raw_gradients() -> None:
    at = place(FedAvg(batch_size=5, momentum=0.9, local_epochs=2))
    seen: list[Any] = []

    def step(params: Any, grad: Any, batch: Any, carry: Any) -> Any:
        raw = grad()
        seen.append(tr.clone(raw))
        return {name: 3 * g for name, g in raw.items()}, (carry or 0) + 1

    fit = at.fit(at.initial(), step=step, sum_gradients=True)
    total = tr.zeros_like(seen[0])
    for raw in seen:
        total = tr.add(total, raw)
    assert tr.digest(fit.grad_sum) == tr.digest(total)
    assert fit.carry == len(seen) == 10
    assert at.fit(at.initial()).grad_sum == {}


def test_clipping_is_of_the_loss_and_comes_before_weight_decay() -> None:
    at = place(FedAvg(batch_size=5, clip=0.1, weight_decay=0.5, local_steps=1))
    start, raw = at.initial(), place(FedAvg(batch_size=5, local_steps=1))
    loss = raw.fit(start, sum_gradients=True).grad_sum
    short = tr.scale(loss, 0.1 / (tr.norm(loss) + 1e-6))
    assert tr.norm(loss) > 0.1
    wanted = tr.axpy(-0.05, tr.axpy(0.5, start.params, short), start.params)
    fit = at.fit(start, sum_gradients=True)
    torch.testing.assert_close(vector(fit.weights.params), vector(wanted))
    assert tr.digest(fit.grad_sum) == tr.digest(loss)  # neither clipped nor decayed


def test_a_gradient_may_be_asked_for_again() -> None:
    at = place(model=NOISY)
    elsewhere: list[bool] = []

    def step(params: Any, grad: Any, batch: Any, carry: Any) -> Any:
        one, two = tr.clone(grad()), grad()
        assert tr.digest(one) == tr.digest(two)  # the same dropout mask
        before = tr.clone(params)
        shifted = {name: p + 0.1 for name, p in params.items()}
        three = grad(shifted)
        elsewhere.append(tr.digest(three) != tr.digest(one))
        assert tr.digest(params) == tr.digest(before)
        return two, carry

    once, thrice = at.fit(at.initial(), sum_gradients=True), at.fit(at.initial(), step=step, sum_gradients=True)
    assert any(elsewhere)
    assert tr.digest(once.weights, once.grad_sum) == tr.digest(thrice.weights, thrice.grad_sum)
    assert int(thrice.weights.buffers["features.1.num_batches_tracked"]) == thrice.steps
    assert (once.samples, thrice.samples) == (ROWS, 3 * ROWS)
    assert once.loss == thrice.loss


def test_dropout_masks_differ_between_steps_and_jobs() -> None:
    at = place(model=NOISY)
    index = torch.arange(5)
    found: list[str] = []

    def step(params: Any, grad: Any, batch: Any, carry: Any) -> Any:
        found.append(tr.digest(grad()))
        return tr.zeros_like(params), carry

    at.fit(at.initial(), step=step, batches=[index] * 4)
    other = site(worker(FedAvg(batch_size=5), federation((ROWS, 8)), NOISY), number=2)
    other.fit(at.initial(), step=step, batches=[index])
    assert len(set(found)) == 5


def test_samples_are_counted_where_another_batch_is_asked_for() -> None:
    at = place()
    whole = at.train

    def step(params: Any, grad: Any, batch: Any, carry: Any) -> Any:
        from consilience.core.fit import Batch

        grad(batch=Batch(whole.x, whole.y, torch.arange(len(whole))))
        return grad(), carry

    assert at.fit(at.initial(), step=step, steps=2).samples == 2 * (5 + ROWS)


def test_several_models_in_one_fit() -> None:
    at = place(model=NORMED)
    start = {"a": at.initial(), "b": at.initial(component=1)}

    def loss(models: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(models["a"](batch.x) + models["b"](batch.x), batch.y)

    fit = at.fit(start, loss=loss, sum_gradients=True)
    assert set(fit.weights) == {"a", "b"}
    assert "a/head.bias" in fit.grad_sum
    assert not equal(fit.weights["a"], start["a"])
    assert not equal(fit.weights["b"], start["b"])
    half = at.fit(start, loss=loss, trainable=lambda name: name.startswith("b/"))
    assert equal(half.weights["a"], start["a"])
    assert not equal(half.weights["b"], start["b"])
    one = at.fit({"x": at.initial()}, loss=lambda models, batch: F.cross_entropy(models["x"](batch.x), batch.y))
    assert equal(one.weights["x"], at.fit(at.initial()).weights)


def test_nothing_global_moves() -> None:
    at = place(model=NOISY)
    start = at.initial()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    at.fit(start)
    at.evaluate(start)
    at.map(lambda module, rows: module(rows.x), start)
    site(worker(FedAvg())).initial()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_map_that_draws_moves_nothing_either() -> None:
    at = place(model=NOISY)
    before = torch.random.get_rng_state()
    one, two = (at.map(lambda module, rows: F.dropout(module(rows.x)), at.initial()) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tr.digest(one) == tr.digest(two)


def test_judging_moves_nothing() -> None:
    at, fresh = place(model=NOISY), place(model=NOISY)
    start = at.initial()
    fit = at.fit(start, steps=3)
    digest, computed = tr.digest(fit.weights), replace(at.computed)
    assert at.evaluate(fit.weights) == at.evaluate(Net(fit.weights))
    assert at.computed == computed
    at.map(lambda module, rows: module.features(rows.x), fit.weights)
    assert tr.digest(fit.weights) == digest
    assert replace(at.computed, flops=computed.flops) == computed
    assert tr.digest(at.fit(fit.weights).weights) == tr.digest(fresh.fit(fit.weights).weights)


def test_judging_uses_evaluation_mode_and_the_right_numbers() -> None:
    at = place(model=NOISY)
    weights = at.fit(at.initial(), steps=3).weights
    module = load(NOISY, weights).eval()
    with torch.no_grad():
        out = module(at.test.x)
    score = at.evaluate(weights)
    assert score.n == 6
    assert score.loss == pytest.approx(float(F.cross_entropy(out, at.test.y)), rel=1e-6)
    assert score.accuracy == float((out.argmax(1) == at.test.y).double().mean())
    assert at.evaluate(None).n == 0
    (mapped,) = at.map(lambda module, rows: module(rows.x), weights, at.test)
    torch.testing.assert_close(mapped, out)
    assert not mapped.requires_grad


def test_a_model_may_be_judged_before_it_is_first_trained() -> None:
    at = place(model=NOISY)
    at.evaluate(at.initial())
    assert at.fit(at.initial()).steps == 5


def test_a_run_may_judge_in_its_first_round() -> None:
    result = run(FedAvg(), federation(), model=LINEAR, rounds=1, executor="serial")
    assert result.history[0]["clients"]["after"]["mean"] >= 0


def test_scores_can_teach() -> None:
    at = place()
    target = at.scores(Net(at.initial()), at.train.x)
    weight = torch.ones(CLASSES, requires_grad=True)
    (weight * target).sum().backward()
    assert weight.grad is not None


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    at = place()
    one, two = at.initial(), at.initial(component=1)
    scores = at.scores(Ensemble((Net(one), Net(two)), (0.25, 0.75)), at.test.x)
    wanted = sum(s * load(LINEAR, w)(at.test.x).softmax(1) for s, w in ((0.25, one), (0.75, two)))
    torch.testing.assert_close(scores.clone().exp(), wanted.detach())


class Game(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))


def bilinear(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    return {"u": model.v * batch.x.mean(), "v": -model.u * batch.x.mean()}


def test_an_operator_is_followed() -> None:
    rows = Split(torch.full((4, 1), 2.0, dtype=torch.float64), torch.zeros(4))
    data = ClientData(rows, rows.rows(slice(0)), rows.rows(slice(0)))
    task = Task("operator", 1, operator=bilinear)
    fed = Parts(name="game", task=task, n_clients=1, input_shape=(1,), parts=[data])
    model = Architecture("game", Game, (1,), 1, torch.float64)
    at = site(prepare(FedAvg(lr=0.1, local_steps=5), fed, model=model))
    fit = at.fit(at.initial(), sum_gradients=True)
    state, total = np.ones(2), np.zeros(2)
    for _ in range(5):
        direction = np.array([2 * state[1], -2 * state[0]])
        state, total = state - 0.1 * direction, total + direction
    np.testing.assert_allclose(vector(fit.weights), state, rtol=1e-12)
    np.testing.assert_allclose(vector(fit.grad_sum), total, rtol=1e-12)
    result = run(FedAvg(lr=0.1, local_steps=5), fed, model=model, rounds=2, executor="serial")
    assert len(result.history) == 2


def test_an_optimizer_that_is_not_there_is_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="adam"):
        run(FedAvg(optimizer="adamm"), federation(), model=LINEAR, rounds=2, executor="serial")
    with pytest.raises(ConfigError, match="momentum"):
        run(FedAvg(optimizer="adam", momentum=0.9), federation(), model=LINEAR, rounds=2, executor="serial")


def test_options_are_checked() -> None:
    for bad in ({"lr": 0}, {"lr": float("nan")}, {"batch_size": 0}, {"weights": "x"}, {"momentum": 1.1}, {"clip": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            FedAvg(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        FedAvg.make({"lrr": 1})
    assert FedAvg.make({"lr": "0.5", "local_steps": "3"}) == FedAvg(lr=0.5, local_steps=3)


def test_initial_weights_depend_on_seed_architecture_and_component_only() -> None:
    digests = {tr.digest(m.initial(s, c)) for m in (NORMED, LINEAR) for s in (0, 1) for c in (0, 1)}
    assert len(digests) == 8
    same = Architecture("normed", Normed, (FEATURES,), CLASSES)
    assert tr.digest(same.initial(0)) == tr.digest(NORMED.initial(0))


def test_batchnorm_takes_one_row_by_its_running_statistics() -> None:
    """An epoch of 11 rows in batches of 5 leaves one; so does a client that has only one."""
    at = site(worker(FedAvg(batch_size=5), federation((11, 8)), NORMED))
    fit = at.fit(at.initial())
    assert (fit.steps, fit.samples) == (3, 11)
    module = load(NORMED, at.initial())
    for index in torch.from_numpy(at.rng("batches").permutation(11)).split(5):
        module.train(len(index) > 1)
        value = F.cross_entropy(module(at.train.x[index]), at.train.y[index])
        grads = torch.autograd.grad(value, list(module.parameters()))
        for p, g in zip(module.parameters(), grads, strict=True):
            p.data.add_(g, alpha=-0.05)
    assert equal(fit.weights, Weights(dict(module.named_parameters()), {}))
    for name, buffer in module.named_buffers():
        assert torch.equal(fit.weights.buffers[name], buffer)
    assert int(fit.weights.buffers["features.1.num_batches_tracked"]) == 2
    alone = site(worker(FedAvg(batch_size=5), federation((1, 8)), NORMED))
    assert alone.fit(alone.initial()).steps == 1
    images = nn.BatchNorm2d(3)  # a single image has many values in each channel, which is enough
    image = torch.randn(1, 3, 4, 4)
    instance = Architecture("images", lambda shape, outputs: nn.BatchNorm2d(3), (3, 4, 4), 1)
    here = Instance(instance).fill(Weights(dict(images.named_parameters()), dict(images.named_buffers())), train=True)
    assert torch.equal(here(image), images(image))
    assert torch.equal(here.running_mean, images.running_mean)


def test_no_rows_is_an_error() -> None:
    at = place()
    with pytest.raises(ValueError, match="no rows"):
        at.fit(at.initial(), Plan(data=at.train.rows(slice(0))))
