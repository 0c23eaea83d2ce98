"""Distillation losses, and the methods that learn from what others say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience
from consilience.core import tree as tr
from consilience.core.errors import NeedsError
from consilience.core.messages import Job
from consilience.core.predict import Net
from consilience.methods import FML, MHD, FedAvg, FedDF, FedGen, FedKD, FedMD, KnFu, LGFedAvg, Local
from consilience.methods.fedgen import likeness
from consilience.methods.knfu import fusion
from consilience.methods.mhd import chain
from consilience.parts import distillation
from consilience.parts.lowrank import Factors, misfit, pack, unpack
from consilience.parts.public import rows_of_round

MIXED = {"models": "mlp:16*0.4,mlp:24x12*0.4,logistic*0.2", "feature_dim": 8}


def run(method: Any, **options: Any) -> consilience.Result:
    federation = consilience.make_federation("digits", clients=5, partition="shards:3", public=60, seed=2)
    usual = {"rounds": 3, "participation": 3, "executor": "serial", "model": "mlp:16"}
    return consilience.run(method, federation, **{**usual, **options})


def job(client: int) -> Job:
    return Job(client, client, 1, 0, 0, 0)


def own(result: consilience.Result) -> dict[int, str]:
    """Digests of the clients' own models."""
    found = {}
    for client, state in result.states.items():
        model = getattr(state, "mentor", getattr(state, "model", state))
        found[client] = tr.digest(model)
    return found


# --- losses ----------------------------------------------------------------------------------------------------


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(st.integers(1, 6), st.integers(2, 5), st.floats(0.5, 4.0), st.integers(0, 50))
@settings(deadline=None)
def test_kl_against_a_naive_one(rows: int, classes: int, temperature: float, seed: int) -> None:
    scores, teacher = random(seed, rows, classes), random(seed + 1, rows, classes)
    p, q = (softmax(t.numpy() / temperature) for t in (teacher, scores))
    naive = temperature**2 * np.mean((p * np.log(p / q)).sum(1))
    assert distillation.kl(scores, teacher, temperature).item() == pytest.approx(naive)
    assert distillation.kl(scores, scores, temperature).item() == pytest.approx(0, abs=1e-12)


def test_what_is_learned_from_takes_no_gradient() -> None:
    for loss in (distillation.kl, distillation.squared, distillation.absolute, distillation.features,
                 distillation.relation):  # fmt: skip
        z, teacher = random(0, 4, 3).requires_grad_(), random(1, 4, 3).requires_grad_()
        loss(z, teacher).backward()
        assert teacher.grad is None
        assert z.grad is not None
        assert torch.isfinite(z.grad).all()


def test_differences_of_scores() -> None:
    a, b = random(0, 4, 3), random(1, 4, 3)
    assert distillation.squared(a, b).item() == pytest.approx(np.mean((a - b).numpy() ** 2))
    assert distillation.absolute(a, b).item() == pytest.approx(np.mean(np.abs((a - b).numpy())))


def test_mutual_is_the_mean_over_peers() -> None:
    scores, peers = random(0, 4, 3), [random(1, 4, 3), random(2, 4, 3)]
    naive = sum(distillation.kl(scores, peer) for peer in peers) / 2
    torch.testing.assert_close(distillation.mutual(scores, peers), naive)
    assert distillation.mutual(scores, []) == 0


def test_features_are_compared_by_direction() -> None:
    z, t = random(0, 5, 3), random(1, 5, 3)
    naive = np.mean(
        [
            np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2)
            for a, b in zip(z.numpy(), t.numpy(), strict=True)
        ]
    )
    assert distillation.features(z, t).item() == pytest.approx(naive)
    assert distillation.features(z, 7 * z).item() == pytest.approx(0, abs=1e-12)


@given(st.integers(0, 50), st.floats(0.1, 10))
@settings(deadline=None)
def test_relations_know_neither_scale_nor_rotation_nor_width(seed: int, scale: float) -> None:
    z = random(seed, 6, 4)
    rotation, _ = torch.linalg.qr(random(seed + 1, 4, 4))
    assert distillation.relation(z, scale * z @ rotation).item() == pytest.approx(0, abs=1e-9)
    assert distillation.relation(z, torch.cat([z, torch.zeros(6, 2, dtype=z.dtype)], 1)).item() == pytest.approx(
        0, abs=1e-9
    )
    assert distillation.relation(z, random(seed + 2, 6, 4)).item() > 0


# --- reductions ------------------------------------------------------------------------------------------------

ALONE = [
    FML(alpha=1.0),
    FedKD(transfer=0.0),
    FedMD(digest_epochs=0),
    KnFu(learn_epochs=0),
    MHD(nu_emb=0.0, nu_aux=0.0),
]


@pytest.mark.parametrize("method", ALONE, ids=lambda m: m.name)
@pytest.mark.parametrize("options", [{}, MIXED], ids=["one", "mixed"])
def test_without_what_others_say_it_is_local_training(method: Any, options: dict[str, Any]) -> None:
    assert own(run(method, **options)) == own(run(Local(), **options))


@pytest.mark.parametrize("method", [FML(), FedKD(), FedMD(), KnFu(), MHD()], ids=lambda m: m.name)
def test_with_it_it_is_not(method: Any) -> None:
    assert own(run(method)) != own(run(Local()))


def test_the_common_model_that_learns_from_labels_alone_is_fedavg() -> None:
    small = {**MIXED, "feature_dim": None, "model": "logistic"}
    plain = run(FedAvg(weights="uniform"), model="logistic")
    assert tr.digest(run(FML(beta=1.0), **small).server.model) == tr.digest(plain.server.model)


def test_a_mentee_that_is_not_taught_is_fedavg() -> None:
    method = FedKD(transfer=0.0, energy_start=1.0, energy_end=1.0)
    plain = run(FedAvg(weights="uniform", form="delta"), model="mlp:16")
    assert tr.digest(run(method, model="mlp:16", models="mlp:24").server.model) == tr.digest(plain.server.model)


def test_feddf_without_steps_is_fedavg_within_an_architecture() -> None:
    plain = run(FedAvg())
    assert tr.digest(run(FedDF(server_steps=0)).server.models["mlp:16"]) == tr.digest(plain.server.model)
    mixed = run(FedDF(server_steps=0), models="mlp:16*0.6,logistic*0.4", participation=1.0, rounds=1)
    names = mixed.worker.place.models
    alone = run(FedAvg(), model="logistic", participation=1.0, rounds=1)
    assert names is not None
    ours = [c for c in range(5) if names[c] == "logistic"]
    sizes = {c: mixed.worker.federation.size(c) for c in ours}
    trained = []
    for c in ours:
        here = alone.worker.site(job(c))[0]
        trained.append(here.fit(here.initial()).weights)
    for name, value in mixed.server.models["logistic"].params.items():
        naive = sum(
            sizes[c] / sum(sizes.values()) * w.params[name].double() for c, w in zip(ours, trained, strict=True)
        )
        torch.testing.assert_close(value.double(), naive, rtol=1e-5, atol=1e-7)


def test_fedgen_without_its_terms_is_what_it_shares() -> None:
    assert tr.digest(run(FedGen(alpha=0.0, beta=0.0)).server.shared) == tr.digest(run(FedAvg()).server.model)
    off = run(FedGen(alpha=0.0, beta=0.0, share="head"), **MIXED)
    assert tr.digest(off.server.shared) == tr.digest(run(LGFedAvg(), **MIXED).server.head)


def test_fedgen_begins_as_fedavg() -> None:
    assert tr.digest(run(FedGen(), rounds=1).server.shared) == tr.digest(run(FedAvg(), rounds=1).server.model)
    assert tr.digest(run(FedGen(), rounds=2).server.shared) != tr.digest(run(FedAvg(), rounds=2).server.model)


# --- the methods' own rules ------------------------------------------------------------------------------------


def test_fedgen_refuses_to_average_models_that_differ() -> None:
    with pytest.raises(NeedsError, match="share=head"):
        run(FedGen(), **MIXED)


def test_fedgen_s_likeness_against_a_naive_one() -> None:
    eps, z = random(0, 4, 3), random(1, 4, 5)
    pairs = [
        -float((eps[i] - eps[j]).square().mean()) * float((z[i] - z[j]).abs().mean())
        for i in range(4)
        for j in range(4)
    ]
    assert likeness(eps, z).item() == pytest.approx(np.exp(np.mean(pairs)))
    assert likeness(eps, torch.zeros(4, 5)).item() == 1.0


def test_public_rows_are_everybody_s() -> None:
    result = run(FedMD(), rounds=1)
    at = result.worker
    rows = [rows_of_round(at.site(job(c))[0], 20, 3).x for c in (0, 4)]
    rows.append(rows_of_round(at.host(7, "x"), 20, 3).x)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows_of_round(at.host(7, "x"), 20, 4).x)


def test_fedmd_digests_the_mean() -> None:
    """What the server holds is the mean of what clients say before their training."""
    result = run(FedMD(public_rows=20), rounds=1, participation=1.0, **MIXED)
    at = result.worker
    said = []
    for c in range(5):
        here = at.site(job(c))[0]
        net = Net(here.initial(), here.model)
        said.append(here.scores(net, rows_of_round(here, 20, 0).x).double())
    torch.testing.assert_close(result.server.scores.double(), torch.stack(said).mean(0), rtol=1e-5, atol=1e-6)


def test_fedmd_warms_up() -> None:
    warm = run(FedMD(warm_up=2, digest_epochs=0), rounds=1)
    assert warm.history[-1]["samples"] > run(FedMD(digest_epochs=0), rounds=1).history[-1]["samples"]


def test_knfu_fusion() -> None:
    laws = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])
    even, sharp = fusion(laws, 0.0), fusion(laws, 1e3)
    torch.testing.assert_close(even, torch.full((3, 3), 1 / 3, dtype=torch.float64))
    assert sharp[0].tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert sharp[2].tolist() == pytest.approx([0.0, 0.0, 1.0])
    d = 0.9 * np.log(0.9 / 0.1) + 0.1 * np.log(0.1 / 0.9)
    w = np.exp(-2 * np.array([0, 0, d]))
    assert fusion(laws, 2.0)[0].tolist() == pytest.approx((w / w.sum()).tolist(), rel=1e-5)


def test_mhd_chain_against_a_naive_one() -> None:
    scores, teacher = random(0, 3, 7, 4), random(1, 2, 7, 4).mul(2).softmax(-1)
    own = scores.softmax(-1)
    total = 0.0
    for k in (1, 2):
        for row in range(7):
            below = max((teacher[k - 1, row], own[k - 1, row]), key=lambda p: float(p.max()))
            if own[k, row].max() <= below.max():
                total += -float((below * scores[k, row].log_softmax(-1)).sum()) / 7
    assert chain(scores, teacher).item() == pytest.approx(total)


def test_mhd_s_last_head_learns_and_own_labels_do_not_touch_it() -> None:
    last, main = run(MHD(predict="last"), rounds=4), run(MHD(), rounds=4)
    assert last.digest.splitlines()[1] == main.digest.splitlines()[1]
    still = run(MHD(nu_aux=0.0), rounds=4)
    start = tr.digest(still.worker.site(job(0))[0].initial("heads:16"))
    assert {tr.digest(state.heads) for state in still.states.values()} == {start}
    assert {tr.digest(state.heads) for state in main.states.values()} != {start}


# --- compression -----------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(2, 12), st.floats(0.3, 0.999), st.integers(0, 30))
@settings(deadline=None)
def test_the_smallest_rank_that_holds_the_energy(rows: int, columns: int, energy: float, seed: int) -> None:
    p = {"w": random(seed, rows, columns), "b": random(seed, rows)}
    packed = pack(p, energy)
    assert torch.equal(packed["b"], p["b"])
    s = torch.linalg.svdvals(p["w"]).square()
    needed = next(r for r in range(1, len(s) + 1) if s[:r].sum() >= energy * s.sum() * (1 - 1e-12))
    if isinstance(packed["w"], Factors):
        assert packed["w"].u.shape[1] == needed
        error = (unpack(packed, p)["w"] - p["w"]).square().sum()
        assert error <= (1 - energy) * s.sum() * (1 + 1e-9) + 1e-12
    else:
        assert needed * (rows + columns) >= rows * columns
        assert torch.equal(packed["w"], p["w"])
    assert misfit(packed, p) is None


def test_rank_one_survives_any_energy() -> None:
    w = torch.outer(random(0, 20), random(1, 30)).reshape(20, 5, 6)
    for energy in (0.1, 0.999):
        packed = pack({"w": w}, energy)
        assert packed["w"].u.shape == (20, 1)
        torch.testing.assert_close(unpack(packed, {"w": w})["w"], w)


def test_factors_that_cannot_be_right_are_refused() -> None:
    like = {"w": torch.zeros(6, 8), "b": torch.zeros(6)}
    good = {"w": Factors(torch.zeros(6, 2), torch.zeros(2, 8)), "b": torch.zeros(6)}
    assert misfit(good, like) is None
    for wrong in (
        {**good, "w": Factors(torch.zeros(6, 2), torch.zeros(3, 8))},
        {**good, "w": Factors(torch.zeros(5, 2), torch.zeros(2, 8))},
        {**good, "w": Factors(torch.zeros(6, 2).double(), torch.zeros(2, 8).double())},
        {**good, "w": torch.zeros(8, 6)},
        {**good, "b": Factors(torch.zeros(6, 1), torch.zeros(1, 1))},
        {"w": good["w"]},
        [1],
    ):
        assert misfit(wrong, like) is not None


def test_fedkd_sends_fewer_bytes() -> None:
    model = {"model": "mlp:64", "rounds": 2}
    packed, whole = run(FedKD(), **model), run(FedKD(energy_start=1.0, energy_end=1.0), **model)
    for way in ("bytes_up", "bytes_down"):
        assert packed.history[-1][way] < 0.7 * whole.history[-1][way]
