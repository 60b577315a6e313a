"""Likelihoods of a request's feedback under a reranker's logits."""

from __future__ import annotations

from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from dnr_recbole.lists import NEG_INF
from dnr_recbole.names import Names


def masked_mean(values: Tensor, mask: Tensor, weights: Optional[Tensor] = None) -> Tensor:
    """Mean of ``values`` over the True entries of ``mask``; 0 if there is none.

    ``weights`` of the shape of ``values`` multiply them, and do not count as entries: they are normalised over the
    whole training data, not within a batch, whose mean weight depends on the clicks that are to be corrected.
    """
    mask = mask.to(values.dtype)
    weighted = values * mask if weights is None else values * weights.to(values.dtype) * mask
    return weighted.sum() / mask.sum().clamp(min=1)


# (logits [B, n], labels [B, n], mask [B, n], weights [B, n] or None) -> a scalar.
Loss = Callable[..., Tensor]
LOSSES: Names[Loss] = Names("rerank_loss", "rerank_loss")


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Decorator: ``loss(logits, labels, mask, weights=None)`` becomes ``rerank_loss: name``."""
    return LOSSES.register(name)


@register_loss("bce")
def bce(logits: Tensor, labels: Tensor, mask: Tensor, weights: Optional[Tensor] = None) -> Tensor:
    """Binary cross-entropy, mean over valid candidates (DNR, Eq. 2).

    Args:
        logits: ``[B, n]``; labels: ``[B, n]`` of 0/1, or other targets; mask: ``[B, n]`` bool.
        weights: ``[B, n]``, of each candidate's term; None = 1.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    return masked_mean(losses, mask, weights)


@register_loss("listce")
def list_ce(logits: Tensor, labels: Tensor, mask: Tensor, weights: Optional[Tensor] = None) -> Tensor:
    """Softmax cross-entropy against the uniform distribution over positives, mean over requests with one.

    With binary labels this equals the attention-rank loss of DLCM and SetRank. Requests without a positive
    carry no listwise information and are skipped; a batch of only such requests gives 0 with zero gradient.

    Args:
        logits: ``[B, n]``; labels: ``[B, n]`` of 0/1, or targets ≥ 0; mask: ``[B, n]`` bool.
        weights: ``[B, n]``, of each positive's term. With them every positive counts for itself, mean over positives
            and not over requests: how many clicks of a request were seen is part of what the weights correct.
    """
    log_p = torch.log_softmax(logits.float().masked_fill(~mask, NEG_INF), dim=-1)
    positives = labels * mask
    count = (positives > 0).sum(-1)
    if weights is not None:
        return -(positives * weights * log_p).sum() / count.sum().clamp(min=1)
    nll = -(positives * log_p).sum(-1) / count.clamp(min=1)
    return masked_mean(nll, count > 0)
