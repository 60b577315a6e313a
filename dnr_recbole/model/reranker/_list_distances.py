"""How different the lists of several generators are: distances of lists and list comprehensiveness.

Lists are positions ``[.., K]``, best first, −1 = nothing. Yang et al., SIGIR 2025: "Comprehensive List
Generation for Multi-Generator Reranking".
"""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dnr_recbole.lists import discounts, gather_lists, list_ranks
from dnr_recbole.model.losses import masked_mean

Distance = Callable[[Tensor, Tensor], Tensor]


def pod(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise order distance: share of item pairs that two lists order differently.

    Pairs of the union of both lists; an absent item is tied with the other absent ones below the list, and a
    tie is another order than a strict one. Equal lists have 0; a list and its reverse, or disjoint lists,
    have 1.

    Args:
        a, b: ``[.., K]``; leading dimensions are broadcast.

    Returns:
        ``[..]`` in [0, 1].
    """
    a, b = torch.broadcast_tensors(a, b)
    items = torch.cat([a, b], dim=-1)
    repeated = F.pad((b.unsqueeze(-1) == a.unsqueeze(-2)).any(-1), (a.shape[-1], 0))
    real = (items >= 0) & ~repeated

    def order(ranked: Tensor) -> Tensor:
        found = items.unsqueeze(-1) == ranked.unsqueeze(-2)
        rank = torch.where(found.any(-1), found.long().argmax(-1), ranked.shape[-1])
        return (rank.unsqueeze(-1) - rank.unsqueeze(-2)).sign()

    pairs = (real.unsqueeze(-1) & real.unsqueeze(-2)).triu(1)
    return ((order(a) != order(b)) & pairs).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)


def list_embedding(vectors: Tensor, lists: Tensor) -> Tensor:
    """Discounted mean of item vectors: ``[B, n, d]``, lists ``[B, .., K]`` → ``[B, .., d]``."""
    weight = (lists >= 0) * discounts(lists.shape[-1], lists.device)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    return (gather_lists(vectors, lists) * weight.unsqueeze(-1)).sum(-2)


def ebd(vectors: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Embedding-based distance: 1 − cosine of the list embeddings.

    ``functools.partial(ebd, vectors)`` is a :data:`Distance`.

    Args:
        vectors: ``[B, n, d]``; a, b: ``[B, .., K]``, leading dimensions are broadcast.

    Returns:
        ``[B, ..]`` in [0, 2].
    """
    return (1 - F.cosine_similarity(list_embedding(vectors, a), list_embedding(vectors, b), dim=-1)).clamp(min=0)


def comprehensiveness(lists: Tensor, distance: Distance = pod) -> Tensor:
    """LC: sum of the distances of all pairs of the lists ``[B, m, K]`` of a request → ``[B]``."""
    return distance(lists.unsqueeze(2), lists.unsqueeze(1)).triu(1).sum((-2, -1))


def comprehensiveness_gain(lists: Tensor, new: Tensor, distance: Distance = pod) -> Tensor:
    """GC: what ``new`` ``[B, K]`` adds to LC, its summed distance to the lists ``[B, m, K]`` → ``[B]``."""
    return distance(lists, new.unsqueeze(1)).sum(-1)


def soft_pod(scores: Tensor, lists: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Differentiable POD between the order of ``scores`` and fixed lists.

    Mean of σ((s_j − s_i) / τ) over the pairs that a list orders strictly, i above j or j absent: near 1 where
    the scores turn all of them round, near 0 where they agree.

    Args:
        scores: ``[B, n]``; lists: ``[B, m, K]``; mask: ``[B, n]`` bool.

    Returns:
        scalar in [0, 1], the mean over the pairs of all lists of the batch.
    """
    k, n = lists.shape[-1], scores.shape[1]
    above = gather_lists(scores, lists).unsqueeze(-1)  # [B, m, K, 1]
    slots = torch.arange(k, device=lists.device).unsqueeze(-1)
    pairs = (list_ranks(lists, n).unsqueeze(2) > slots) & (lists >= 0).unsqueeze(-1) & mask[:, None, None, :]
    return masked_mean(torch.sigmoid((scores[:, None, None, :] - above) / temperature), pairs)
