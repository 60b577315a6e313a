"""DPP: greedy MAP inference of a determinantal point process."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from dnr_recbole.lists import row
from dnr_recbole.model.reranker._diversity import DiversityReranker, greedy
from dnr_recbole.registry import register_reranker

_EXHAUSTED = 1e-6  # residual variance below which float32 cannot tell an item from the span of the list
_LAST_RESORT = -1e3  # below any log-determinant gain; a larger number would swallow differences of r


def dpp(relevance: Tensor, vectors: Tensor, mask: Tensor, k: int, alpha: float, epsilon: float) -> Tensor:
    """Greedy list by log det of the kernel L = diag(q) S diag(q), q = exp(α r); O(K² n + K n f).

    S is the cosine Gram matrix plus ε on the diagonal. Since log det L_Y = 2α Σ r + log det S_Y, the gain of
    item i is 2α r_i + log(v_i), with v_i the part of S_ii that the list does not explain yet. An incremental
    Cholesky factorisation of S alone keeps v up to date; no exponential of r is ever formed. Items inside the
    span of the list (possible only for ε near 0) come last, by relevance, so the list is always full.

    Args:
        relevance: ``[B, n]`` in [0, 1]; vectors: ``[B, n, f]`` of unit length; mask: ``[B, n]`` bool.
        k: length of the list; alpha, epsilon: α and ε.

    Returns:
        positions ``[B, k]``, −1 behind the last valid candidate.
    """
    residual = torch.full_like(relevance, 1 + epsilon)
    # Rows of the Cholesky factor, one column per step: [B, n, t].
    factor: Optional[Tensor] = None

    def gain() -> Tensor:
        volume = residual.clamp(min=_EXHAUSTED).log().masked_fill(residual <= _EXHAUSTED, _LAST_RESORT)
        return 2 * alpha * relevance + volume

    def update(chosen: Tensor) -> None:
        nonlocal residual, factor
        # ε on the diagonal matters only for the chosen item itself, which is never asked for again.
        covariance = torch.einsum("bnf,bf->bn", vectors, row(vectors, chosen))
        if factor is not None:
            covariance = covariance - torch.einsum("bnt,bt->bn", factor, row(factor, chosen))
        variance = row(residual, chosen).unsqueeze(1)
        # An exhausted item is chosen only once all are: whatever its column holds, they stay exhausted.
        column = (covariance / variance.clamp(min=_EXHAUSTED).sqrt()).unsqueeze(-1)
        factor = column if factor is None else torch.cat([factor, column], dim=-1)
        residual = residual - column.squeeze(-1).square()

    return greedy(mask, k, gain, update)


@register_reranker
class DPP(DiversityReranker):
    """The list with a large determinant: items that are relevant and span a large volume.

    See :class:`~dnr_recbole.model.reranker._diversity.DiversityReranker` for relevance and vectors, :func:`dpp` for the
    rule.
    """

    paper = "Chen et al., NeurIPS 2018: Fast Greedy MAP Inference for Determinantal Point Process"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.alpha: float = config["dpp_alpha"]
        self.epsilon: float = config["dpp_epsilon"]

    def select(self, relevance: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
        return dpp(relevance, vectors, mask, self.slate_size, self.alpha, self.epsilon)
