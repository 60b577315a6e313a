"""Objectives of DNR; each equation of the paper has its one home here.

=======  ==============================================  ================================================
Eq. 2    L_direct = −log q_θ(z | x)                      :func:`dnr_recbole.model.losses.bce` on real x
Eq. 5    L_z = −log q_θ(z | x')                          the same on synthetic x'
Eq. 6    L_θ = L_direct + λ_m L_z                        :func:`reranker_objective`
Eq. 7    L_adv = log q_θ(z | x'_φ), θ fixed              :func:`adversarial`
Eq. 5    L_x = KL(p_φ(x'|z) ‖ p_x(x))                    :func:`score_divergence`
=======  ==============================================  ================================================

The paper does not say how L_x is estimated. Four estimators are offered, registered by name; all compare the batch's
synthetic scores with its real scores and are differentiable in the synthetic ones:

``histogram``    KL of soft histograms p_k ∝ Σ_i exp(−(x_i − c_k)² / 2h²) over bin centres c_k
``wasserstein``  1-D Wasserstein-1 distance, the mean absolute difference of the sorted scores
``moments``      KL between Gaussians with the batch's means and variances
``lists``        the mean of three Wasserstein distances: of all scores, of the requests' means, and of the deviations
                 from them; so that lists differ from each other, and within themselves, as real ones do

What is compared (``lx_condition``): ``label``, p_φ(x'|z) with p(x|z) for each z, which is −δ_x of Eq. 5's sum;
``marginal``, p_φ(x') with p(x), which a generator can match while giving z away; ``literal``, Eq. 5's
KL(p_φ(x'|z) ‖ p(x)), whose optimum makes x' independent of z.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Tuple

import torch
from torch import Tensor

from dnr_recbole.names import Names

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
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return -ctx.scale * grad, None


class BalancedReversal(torch.autograd.Function):
    """Identity forward; backward gives the reversed gradient the norm ``size``, and none to requests not ``kept``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(size, kept)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        size, kept = ctx.saved_tensors
        grad = grad * kept.view(-1, *[1] * (grad.dim() - 1))
        return -size * grad / grad.norm().clamp(min=1e-12), None, None


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
    """W1 of two flat samples: mean |sorted x' − sorted x|; of other sizes, the quantiles of the real one take part."""
    synthetic, real = synthetic.sort().values, real.sort().values
    if len(synthetic) != len(real):
        place = (torch.arange(len(synthetic), device=real.device) + 0.5) / len(synthetic) * len(real) - 0.5
        place = place.clamp(0, len(real) - 1).to(real.dtype)
        low = place.floor().long()
        real = torch.lerp(real[low], real[(low + 1).clamp(max=len(real) - 1)], place - low)
    return (synthetic - real).abs().mean()


def spread(x: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:
    """Means of the requests ``[R]`` that have one, and all deviations from them (flat); x and mask ``[B, n]``."""
    count = mask.sum(1)
    mean = (x * mask).sum(1) / count.clamp(min=1)
    return mean[count > 0], (x - mean.unsqueeze(1))[mask]


# (x' [B, n], x [B, n], which of x' to compare, with which of x: bool [B, n]) -> a scalar with a gradient in x'.
Estimator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ESTIMATORS: Names[Estimator] = Names("lx_estimator", "lx_estimator")


def register_estimator(name: str) -> Callable[[Estimator], Estimator]:
    """Decorator: ``estimate(synthetic, real, part, against)`` becomes ``lx_estimator: name``."""
    return ESTIMATORS.register(name)


def of_samples(distance: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """An estimator that pools the scores of all requests: ``distance`` of two flat samples ``[N]`` and ``[M]``."""

    @functools.wraps(distance)
    def estimate(synthetic: Tensor, real: Tensor, part: Tensor, against: Tensor) -> Tensor:
        return distance(synthetic[part], real[against])

    return estimate


for _name, _distance in (("histogram", histogram_kl), ("moments", moments_kl), ("wasserstein", wasserstein)):
    register_estimator(_name)(of_samples(_distance))


@register_estimator("lists")
def _lists(synthetic: Tensor, real: Tensor, part: Tensor, against: Tensor) -> Tensor:
    """Wasserstein distances of lists: as a whole, between requests, within requests."""
    ours, theirs = spread(synthetic, part), spread(real, against)
    pairs = [(synthetic[part], real[against]), *zip(ours, theirs)]
    return sum((wasserstein(a, b) for a, b in pairs), synthetic.new_zeros(())) / len(pairs)


CONDITIONS = ("label", "marginal", "literal")


def score_divergence(
    estimator: str, synthetic: Tensor, real: Tensor, mask: Tensor, labels: Tensor, condition: str = "marginal"
) -> Tensor:
    """L_x: how far synthetic scores are from real ones.

    Args:
        estimator: one of :data:`ESTIMATORS`.
        synthetic, real: x' and x ``[B, n]``; mask ``[B, n]`` bool.
        labels: z ``[B, n]``.
        condition: one of :data:`CONDITIONS`; the mean over z = 0 and z = 1 where z is a condition.
    """
    synthetic, real = synthetic.float(), real.float()
    groups = [mask] if condition == "marginal" else [mask & (labels == value) for value in (0, 1)]
    total, count = synthetic.new_zeros(()), 0
    for part in groups:
        if not bool(part.any()):
            continue
        against = mask if condition == "literal" else part
        total = total + ESTIMATORS.find(estimator)(synthetic, real, part, against)
        count += 1
    return total / max(count, 1)


def request_auc(x: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean over requests of the chance that a positive scores above a negative, ties one half; NaN without a pair.

    x, labels, mask ``[B, n]``; memory is B · n².
    """
    positive, negative = (labels > 0) & mask, (labels == 0) & mask
    pairs = positive.unsqueeze(2) & negative.unsqueeze(1)
    wins = (x.unsqueeze(2) > x.unsqueeze(1)).float() + 0.5 * (x.unsqueeze(2) == x.unsqueeze(1)).float()
    count = pairs.sum((1, 2))
    auc = (wins * pairs).sum((1, 2)) / count.clamp(min=1)
    return auc[count > 0].mean()
