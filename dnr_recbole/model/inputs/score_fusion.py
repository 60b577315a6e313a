"""Ways to let a reranker use the retriever's score: one implementation, shared by every model."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from dnr_recbole.errors import ConfigError
from dnr_recbole.lists import score_ranks

METHODS = ("none", "weight", "rank", "concat", "add", "residual")  # but for none: in the order of application
DIFFERENTIABLE = ("weight", "concat", "add", "residual")
JOIN = "+"
EPSILON = 1e-3


def log_odds(scores: Tensor) -> Tensor:
    """log(y / (1 − y)) of y = ε + (1 − 2ε) x, ε = 0.001: scores x in [0, 1] of any shape → within ±6.91.

    Scores rescaled within a request contain 0 and 1, whose log-odds are infinite. Squeezing keeps the order of all
    scores and a gradient at each, which a bound would not.
    """
    return torch.logit(EPSILON + (1 - 2 * EPSILON) * scores)


def parts_of(method: str) -> Tuple[str, ...]:
    """The ways that ``method``, e.g. ``"rank+concat"``, joins, in the order of application; none of ``"none"``.

    Raises:
        ConfigError: a part is unknown, stands twice, or is ``none`` beside others.
    """
    parts = method.split(JOIN)
    if not set(parts) <= set(METHODS) or len(set(parts)) < len(parts) or ("none" in parts and len(parts) > 1):
        known = ", ".join(METHODS)
        raise ConfigError(f"score_fusion={method}: must be one of {known}, or several but none joined by {JOIN}")
    return tuple(part for part in METHODS[1:] if part in parts)


class ScoreFusion(nn.Module):
    """Fuses retriever scores into candidate representations (DNR, Tables 2 and 4), and into logits.

    ============  ===================================================================================
    ``none``      the representation as it is
    ``weight``    representation multiplied by x ("w score")
    ``rank``      plus a learned embedding of the candidate's rank by score (not differentiable in x)
    ``concat``    [representation ; x] through a linear layer ("c score")
    ``add``       plus a learned projection of x ("+ score")
    ``residual``  the representation as it is; the *logit* becomes logit + a · log-odds(x)
    ============  ===================================================================================

    Several are joined by ``+`` and act in the order of this table, whatever the order they are named in:
    ``rank+concat`` is a linear layer on [representation + rank embedding ; x].

    Of several scores, x ``[B, n, S]``, ``concat``, ``add`` and ``residual`` read all, with a flag for each that says
    whether the candidate has it; ``weight`` and ``rank`` read the first, which gives the incoming order.

    The slope a of ``residual`` is learned. It starts where the training data put it
    (:meth:`~dnr_recbole.model.abstract_reranker.AbstractReranker.prepare`), so that a reranker whose own logits are
    near zero starts from the order by score if the score tells positives from negatives, and ignores it if not.

    Args:
        method: one of :data:`METHODS`, or several joined by :data:`JOIN`.
        dim: width d of the representations.
        max_candidates: number of rank embeddings; deeper ranks share the last one.
        n_scores: S.

    Attributes:
        parts: the ways in the order of application, empty for ``none``.
        acting: those of them that :meth:`forward` applies to representations.
        slope: a, a scalar, or ``[S]`` of several scores; None without ``residual``.
    """

    def __init__(self, method: str, dim: int, max_candidates: int = 50, n_scores: int = 1):
        super().__init__()
        self.n_scores = n_scores
        width = 1 if n_scores == 1 else 2 * n_scores
        self.parts = parts_of(method)
        self.acting = tuple(part for part in self.parts if part != "residual")
        if "rank" in self.parts:
            self.rank_embedding = nn.Embedding(max_candidates, dim)
            nn.init.normal_(self.rank_embedding.weight, std=0.02)
        if "concat" in self.parts:
            self.project: Any = nn.Linear(dim + width, dim)
        if "add" in self.parts:
            # Alone it has had this name always, and checkpoints know it by that.
            self.added = "shift" if "concat" in self.parts else "project"
            self.add_module(self.added, nn.Linear(width, dim))
        # 1 leaves a calibrated probability as it is, until the slope is fitted.
        slope = torch.ones(()) if n_scores == 1 else (torch.arange(n_scores) == 0).float()
        self.slope = nn.Parameter(slope) if "residual" in self.parts else None

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the scores, as the adversarial phase of DNR needs."""
        return any(part in DIFFERENTIABLE for part in self.parts)

    def leave_concat_to_the_model(self) -> None:
        """Drop the layer of ``concat``: the model reads x as an input of its own instead."""
        self.acting, self.project = tuple(part for part in self.acting if part != "concat"), None

    def forward(self, tokens: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """tokens ``[B, n, d]``, scores ``[B, n]`` or ``[B, n, S]`` in [0, 1], mask ``[B, n]`` → ``[B, n, d]``."""
        if not self.acting:
            return tokens
        x = self.columns(scores).to(tokens.dtype)
        if "weight" in self.acting:
            tokens = tokens * x[..., :1]
        if "rank" in self.acting:
            ranks = score_ranks(scores, mask).clamp(max=self.rank_embedding.num_embeddings - 1)
            tokens = tokens + self.rank_embedding(ranks)
        if "concat" in self.acting:
            tokens = self.project(torch.cat([tokens, x], dim=-1))
        if "add" in self.acting:
            tokens = tokens + getattr(self, self.added)(x)
        return tokens

    def columns(self, scores: Tensor) -> Tensor:
        """Scores as input columns: ``[B, n, 1]``, or ``[B, n, 2 S]`` of several, the flags of those present last."""
        if scores.dim() == 2:
            return scores.unsqueeze(-1)
        there = scores >= 0
        return torch.cat([scores * there, there.to(scores.dtype)], dim=-1)

    def residual(self, scores: Tensor) -> Optional[Tensor]:
        """What the scores add to the candidates' logits: float ``[B, n]``, a missing one 0; None = nothing."""
        if self.slope is None:
            return None
        if scores.dim() == 2:
            return self.slope * log_odds(scores.float())
        there = scores >= 0
        return (self.slope * log_odds(scores.float().clamp(min=0.0)) * there).sum(-1)
