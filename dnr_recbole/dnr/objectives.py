"""Objectives of DNR; each equation of the paper has its one home here.

=======  ==============================================  ================================================
Eq. 2    L_direct = −log q_θ(z | x)                      :func:`dnr_recbole.model.losses.bce` on real x
Eq. 5    L_z = −log q_θ(z | x')                          the same on synthetic x'
Eq. 6    L_θ = L_direct + λ_m L_z                        :func:`reranker_objective`
Eq. 7    L_adv = log q_θ(z | x'_φ), θ fixed              :func:`adversarial`
Eq. 5    L_x = KL(p_φ(x'|z) ‖ p_x(x))                    :func:`score_divergence`
=======  ==============================================  ================================================

The paper does not say how L_x is estimated. Four estimators are offered; all compare the batch's synthetic scores
with its real scores and are differentiable in the synthetic ones:

``histogram``    KL of soft histograms p_k ∝ Σ_i exp(−(x_i − c_k)² / 2h²) over bin centres c_k
``softmax``      mean over requests of KL(softmax(x'/τ) ‖ softmax(x/τ)) over the candidate list
``wasserstein``  1-D Wasserstein-1 distance, the mean absolute difference of the sorted scores
``moments``      KL between Gaussians with the batch's means and variances
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from dnr_recbole.model.losses import NEG_INF

_EPS = 1e-6


def reranker_objective(direct: Tensor, denoising: Tensor, lambda_m: float) -> Tensor:
    """Eq. 6: L_direct + λ_m L_z."""
    return direct + lambda_m * denoising


def adversarial(denoising: Tensor) -> Tensor:
    """Eq. 7: L_adv = log q_θ(z | x'_φ) = −L_z as a function of φ; minimised by scores that θ denoises badly."""
    return -denoising


class GradientReversal(torch.autograd.Function):
    """Identity forward; backward multiplies the gradient by −``scale``."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return -ctx.scale * grad, None


def histogram_kl(synthetic: Tensor, real: Tensor, bins: int = 32) -> Tensor:
    """KL of Gaussian-kernel histograms on [0, 1]; both ``[N]`` and ``[M]`` flat. Bandwidth is one bin."""
    centres = torch.linspace(0, 1, bins, device=synthetic.device)

    def density(x: Tensor) -> Tensor:
        weight = torch.exp(-0.5 * ((x.unsqueeze(-1) - centres) * bins) ** 2).sum(0) + _EPS
        return weight / weight.sum()

    p, q = density(synthetic), density(real)
    return (p * (p.log() - q.log())).sum()


def moments_kl(synthetic: Tensor, real: Tensor) -> Tensor:
    """KL(N(μ', σ'²) ‖ N(μ, σ²)) of flat score samples."""
    # The floor keeps constant real scores, e.g. of a popularity retriever's tail, from dividing by zero.
    v1, v2 = synthetic.var(unbiased=False) + 1e-4, real.var(unbiased=False) + 1e-4
    return 0.5 * (torch.log(v2 / v1) + (v1 + (synthetic.mean() - real.mean()) ** 2) / v2 - 1)


def wasserstein(synthetic: Tensor, real: Tensor) -> Tensor:
    """W1 of two flat samples of equal size: mean |sorted x' − sorted x|."""
    return (synthetic.sort().values - real.sort().values).abs().mean()


def softmax_kl(synthetic: Tensor, real: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over requests of the KL between softmaxed lists; scores and mask ``[B, n]``."""
    log_p = torch.log_softmax((synthetic / temperature).masked_fill(~mask, NEG_INF), -1)
    log_q = torch.log_softmax((real / temperature).masked_fill(~mask, NEG_INF), -1)
    return (log_p.exp() * (log_p - log_q)).masked_fill(~mask, 0.0).sum(-1).mean()


_FLAT = {"histogram": histogram_kl, "moments": moments_kl, "wasserstein": wasserstein}
ESTIMATORS = (*_FLAT, "softmax")


def score_divergence(
    estimator: str, synthetic: Tensor, real: Tensor, mask: Tensor, labels: Optional[Tensor] = None
) -> Tensor:
    """L_x: how far synthetic scores are from real ones.

    Args:
        estimator: one of :data:`ESTIMATORS`.
        synthetic, real: x' and x ``[B, n]``; mask ``[B, n]`` bool.
        labels: ``[B, n]`` compares p_φ(x'|z) with p_x(x|z) for z = 0 and z = 1 and averages the two; None compares
            the marginals, which a generator can match while giving z away.
    """
    synthetic, real = synthetic.float(), real.float()
    if labels is None:
        parts = [mask]
    else:
        parts = [mask & (labels == value) for value in (0, 1)]
    total, count = synthetic.new_zeros(()), 0
    for part in parts:
        if not bool(part.any()):
            continue
        if estimator == "softmax":
            rows = part.any(-1)
            total = total + softmax_kl(synthetic[rows], real[rows], part[rows])
        else:
            total = total + _FLAT[estimator](synthetic[part], real[part])
        count += 1
    return total / max(count, 1)
