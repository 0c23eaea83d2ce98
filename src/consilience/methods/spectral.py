"""Spectral co-distillation: a generic and a personal model learn from each other's spectra (Chen et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import Broadcast
from consilience.core.method import Method, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree


@dataclass(frozen=True)
class Spectral(Method):
    """Clients train the generic model beside one of their own; each is pulled towards the spectrum of the other's
    weights, and the personal one is trained while the generic one is on its way.

        s(y) = |FFT(y)| by tensor, in the order of the model;   p(y) = s(y) / sum s(y)
        q(y): the same of the first share rho of s(y)
        y_k <- y_k - eta grad [ F_k(y_k; batch) + lam_g KL( q(v_k) || q(y_k) ) ]     from x;   x <- sum_k p_k y_k
        v_k <- v_k - eta grad [ F_k(v_k; batch) + lam_p KL( p(y_k) || p(v_k) ) ]     while y_k travels

    Tensors are taken as matrices (outputs x rest) for a two-dimensional FFT, vectors for one of one dimension. Client
    state: v_k, which begins as the common initial model and is what a client deploys; before its first round that is x.
    In a client's first round the generic model has nothing to learn from and trains plainly. With lam_g = 0 the generic
    model is FedAvg's, with lam_p = 0 the personal ones are those of ``local``, both bit for bit.

    On the virtual clock the second training takes no time as long as it fits into the transfers of its job, and what is
    left over where it does not; its samples and FLOP are counted. In a deployment it delays the reply.

    Source: Chen, Yang, Quek, Chong, "Spectral Co-Distillation for Personalized Federated Learning", NeurIPS 2023.
    Deviations: in the official code the spectra carry no gradient and both sides are the global model's; here they are
    as in the paper's text. A cut spectrum is normalised again. No mixup and no proximal term.
    """

    name = "spectral"
    family = "personal models"
    source = "Chen et al., NeurIPS"
    year = 2023
    confidence = "medium"
    sums = Method.means

    lam_g: Annotated[float, Ge(0)] = option(
        0.3, "pull of the generic model to the personal spectrum", Search(0.01, 1.0)
    )
    lam_p: Annotated[float, Ge(0)] = option(
        0.4, "pull of the personal model to the generic spectrum", Search(0.01, 1.0)
    )
    rho: Annotated[float, Gt(0), Le(1)] = option(0.4, "share of the personal spectrum that the generic model sees")
    every: Annotated[int, Ge(1)] = option(1, "the pulls are computed on one of so many steps")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """The first training; the other may take no time."""
        return self.one_fit(rows, steps)

    def sends(self, phase: Phase) -> type:
        """Models or differences, as FedAvg."""
        return self.packs

    def client_update(
        self, phase: Phase, site: Site, message: Broadcast, state: Weights | None
    ) -> tuple[Tree, Weights]:
        """The generic model, which is sent; then the personal one."""
        generic = site.fit(message.model, self._pulled(state, self.lam_g, self.rho)).weights
        with site.meanwhile():
            start = site.initial() if state is None else state
            own = site.fit(start, self._pulled(generic, self.lam_p, 1.0)).weights
        return self.pack(message.model, generic), own

    def _pulled(self, towards: Weights | None, lam: float, share: float) -> Plan:
        if not lam or towards is None:
            return Plan()
        known: list[Tensor] = []

        def step(params: Params, grad: Grad, batch: Batch, number: int) -> tuple[Params, Tree]:
            direction = grad()
            if number % self.every == 0:
                if not known:
                    known.append(spectrum({n: towards.params[n] for n in params}, share))
                pulls = pull(params, known[0], share)
                torch._foreach_add_([direction[n] for n in params], [pulls[n] for n in params], alpha=lam)
            return direction, number + 1

        return Plan(step=step, carry=0)

    def personal_model(self, site: Site, message: Broadcast, state: Weights | None) -> Predictor:
        """The own model, or the generic one where there is none yet."""
        return Net(message.model if state is None else state, site.model)

    def trained_model(self, site: Site, message: Broadcast, update: Tree, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)


def magnitudes(params: Params) -> list[Tensor]:
    """|FFT| of each tensor, flattened."""
    found = []
    for p in params.values():
        wave = torch.fft.fft2(p.flatten(1)) if p.dim() > 1 else torch.fft.fft(p.reshape(-1))
        found.append(wave.abs().flatten())
    return found


def spectrum(params: Params, share: float) -> Tensor:
    """The first ``share`` of all magnitudes (one at least), made to sum to 1."""
    every = torch.cat(magnitudes(params))
    kept = every[: max(1, int(share * len(every)))]
    return kept / kept.sum().clamp_min(torch.finfo(kept.dtype).tiny)


def divergence(target: Tensor, found: Tensor) -> Tensor:
    """KL(target || found) of two spectra; numbers below 1e-12 count as that."""
    return (target * (target.clamp_min(1e-12).log() - found.clamp_min(1e-12).log())).sum()


def pull(params: Params, target: Tensor, share: float) -> Params:
    """The gradient of the divergence of the spectrum of ``params`` from ``target``."""
    with torch.enable_grad():
        leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        value = divergence(target, spectrum(leaves, share))
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), gradients, strict=True)}
