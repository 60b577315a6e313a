"""Rescaling of retriever scores within a request. All ways are monotone and stay in [0, 1]."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from dnr_recbole.lists import bounds
from dnr_recbole.names import Names

# (scores [R, n], mask [R, n]) -> [R, n], monotone within a request; what stands at padding does not matter.
Normalization = Callable[[Tensor, Tensor], Tensor]
NORMALIZATIONS: Names[Normalization] = Names("score_normalization", "score_normalization")
_ROWS = 1 << 16  # per step, bounds the memory of the temporaries


def register_normalization(name: str) -> Callable[[Normalization], Normalization]:
    """Decorator: ``rescale(scores, mask)`` becomes ``score_normalization: name``; results are clipped to [0, 1]."""
    return NORMALIZATIONS.register(name)


def normalize_scores(scores: Tensor, mask: Tensor, how: str) -> Tensor:
    """FloatTensor [R, n] → [R, n], over the valid candidates of each request; 0 at padding.

    ``minmax``; ``zscore``, squashed by a sigmoid; ``rank``: 1 for the best … 0 for the worst, ties share
    their mean rank. A list of equal scores becomes 0.5 under each of these; ``none`` only clips to [0, 1].
    """
    rescale = NORMALIZATIONS.find(how)
    out = torch.zeros_like(scores)
    for part in range(0, len(scores), _ROWS):
        rows = slice(part, part + _ROWS)
        out[rows] = rescale(scores[rows], mask[rows]).clamp(0.0, 1.0).masked_fill(~mask[rows], 0.0)
    return out


@register_normalization("none")
def _clip(scores: Tensor, mask: Tensor) -> Tensor:
    return scores


@register_normalization("minmax")
def _minmax(scores: Tensor, mask: Tensor) -> Tensor:
    low, high = bounds(scores, mask)
    return torch.where(high > low, (scores - low) / (high - low), 0.5)


@register_normalization("zscore")
def _zscore(scores: Tensor, mask: Tensor) -> Tensor:
    low, high = bounds(scores, mask)
    # First to [0, 1], where the variance of tiny scores does not underflow; what stands at padding may be beyond it.
    scaled = _minmax(scores, mask).masked_fill(~mask, 0.0)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    centred = scaled - (scaled * mask).sum(1, keepdim=True) / count
    std = ((centred.square() * mask).sum(1, keepdim=True) / count).sqrt()
    return torch.where(high > low, torch.sigmoid(centred / std), 0.5)


@register_normalization("rank")
def _rank(scores: Tensor, mask: Tensor) -> Tensor:
    ordered, order = scores.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True)
    place = torch.arange(scores.shape[1]).expand_as(order)
    changes = ordered[:, 1:] != ordered[:, :-1]
    edge = torch.ones_like(changes[:, :1])
    first = place.masked_fill(~torch.cat([edge, changes], 1), 0).cummax(1).values
    last = place.masked_fill(~torch.cat([changes, edge], 1), scores.shape[1]).flip(1).cummin(1).values.flip(1)
    rank = torch.empty_like(scores).scatter_(1, order, (first + last).to(scores.dtype) / 2)
    count = mask.sum(1, keepdim=True)
    return torch.where(count > 1, 1 - rank / (count - 1).clamp(min=1), 0.5)
