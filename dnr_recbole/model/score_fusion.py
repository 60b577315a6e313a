"""Ways to let a reranker use the retriever's score: one implementation, shared by every model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

METHODS = ("none", "rank", "concat", "add", "weight")
DIFFERENTIABLE = ("concat", "add", "weight")


def score_ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Rank of each candidate by descending score, 0 = best; padding ranks last. ``[B, n]`` LongTensor.

    Equal scores are ranked by storage position, which the data layer has made random.
    """
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    return ranks.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


class ScoreFusion(nn.Module):
    """Fuses retriever scores into candidate representations (DNR, Tables 2 and 4).

    ==========  =====================================================================================
    ``none``    the representation as it is
    ``rank``    plus a learned embedding of the candidate's rank by score (not differentiable in x)
    ``concat``  [representation ; x] through a linear layer ("c score")
    ``add``     plus a learned projection of x ("+ score")
    ``weight``  representation multiplied by x ("w score")
    ==========  =====================================================================================

    Args:
        method: one of :data:`METHODS`.
        dim: width d of the representations.
        max_candidates: number of rank embeddings; deeper ranks share the last one.
    """

    def __init__(self, method: str, dim: int, max_candidates: int = 50):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"score_fusion must be one of {METHODS}, got {method!r}")
        self.method = method
        if method == "rank":
            self.rank_embedding = nn.Embedding(max_candidates, dim)
            nn.init.normal_(self.rank_embedding.weight, std=0.02)
        elif method == "concat":
            self.project = nn.Linear(dim + 1, dim)
        elif method == "add":
            self.project = nn.Linear(1, dim)

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the scores, as the adversarial phase of DNR needs."""
        return self.method in DIFFERENTIABLE

    def forward(self, tokens: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """tokens ``[B, n, d]``, scores ``[B, n]`` in [0, 1], mask ``[B, n]`` → ``[B, n, d]``."""
        if self.method == "rank":
            ranks = score_ranks(scores, mask).clamp(max=self.rank_embedding.num_embeddings - 1)
            return tokens + self.rank_embedding(ranks)
        if self.method == "concat":
            return self.project(torch.cat([tokens, scores.unsqueeze(-1).to(tokens.dtype)], dim=-1))
        if self.method == "add":
            return tokens + self.project(scores.unsqueeze(-1).to(tokens.dtype))
        if self.method == "weight":
            return tokens * scores.unsqueeze(-1).to(tokens.dtype)
        return tokens
