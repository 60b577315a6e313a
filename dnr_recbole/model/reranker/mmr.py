"""MMR: maximal marginal relevance."""

from __future__ import annotations

import torch
from torch import Tensor

from dnr_recbole.lists import row
from dnr_recbole.model.reranker._diversity import DiversityReranker, greedy
from dnr_recbole.registry import register_reranker


def mmr(relevance: Tensor, vectors: Tensor, mask: Tensor, k: int, trade_off: float) -> Tensor:
    """Greedy list by λ · r − (1 − λ) · (largest similarity to what is already in the list); O(K n f).

    Similarity is (1 + cosine) / 2, on the same scale as r. The first item is the most relevant one for every
    λ.

    Args:
        relevance: ``[B, n]`` in [0, 1]; vectors: ``[B, n, f]`` of unit length; mask: ``[B, n]`` bool.
        k: length of the list; trade_off: λ.

    Returns:
        positions ``[B, k]``, −1 behind the last valid candidate.
    """
    closest = None

    def gain() -> Tensor:
        return relevance if closest is None else trade_off * relevance - (1 - trade_off) * closest

    def update(chosen: Tensor) -> None:
        nonlocal closest
        similarity = (1 + torch.einsum("bnf,bf->bn", vectors, row(vectors, chosen))) / 2
        closest = similarity if closest is None else torch.maximum(closest, similarity)

    return greedy(mask, k, gain, update)


@register_reranker
class MMR(DiversityReranker):
    """Greedy selection that subtracts the similarity to the nearest item chosen already.

    See :class:`~dnr_recbole.model.reranker._diversity.DiversityReranker` for relevance and vectors, :func:`mmr` for the
    rule.
    """

    paper = (
        "Carbonell & Goldstein, SIGIR 1998: "
        "The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing Summaries"
    )

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.trade_off: float = config["mmr_lambda"]

    def select(self, relevance: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
        return mmr(relevance, vectors, mask, self.slate_size, self.trade_off)
