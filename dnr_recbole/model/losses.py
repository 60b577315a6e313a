"""Likelihoods of a request's feedback under a reranker's logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = -1e9  # finite, so that a row without a valid entry stays free of NaN


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` over the True entries of ``mask``; 0 if there is none."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def bce(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, mean over valid candidates (DNR, Eq. 2).

    Args:
        logits: ``[B, n]``; labels: ``[B, n]`` of 0/1; mask: ``[B, n]`` bool.
    """
    return masked_mean(F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none"), mask)


def list_ce(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Softmax cross-entropy against the uniform distribution over positives, mean over requests with one.

    With binary labels this equals the attention-rank loss of DLCM and SetRank. Requests without a positive
    carry no listwise information and are skipped; a batch of only such requests gives 0 with zero gradient.

    Args:
        logits: ``[B, n]``; labels: ``[B, n]`` of 0/1; mask: ``[B, n]`` bool.
    """
    log_p = torch.log_softmax(logits.float().masked_fill(~mask, NEG_INF), dim=-1)
    positives = labels * mask
    count = positives.sum(-1)
    nll = -(positives * log_p).sum(-1) / count.clamp(min=1)
    return masked_mean(nll, count > 0)


LOSSES = {"bce": bce, "listce": list_ce}
