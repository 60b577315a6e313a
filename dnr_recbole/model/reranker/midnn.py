"""MiDNN: pointwise scoring with features normalised over the candidate set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.lists import min_max
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.nets import mlp
from dnr_recbole.model.context import Context
from dnr_recbole.registry import register_reranker


@dataclass(frozen=True)
class MiDNNContext(Context):
    """Attributes:
    hidden: ``[B, n, width]``, the first layer; None where it reads the score.
    """

    hidden: Optional[Tensor] = None


@register_reranker
class MiDNN(AbstractReranker[MiDNNContext]):
    """A net on each candidate's features f and on f' = (f − min) / (max − min) over the valid candidates.

    f = [e ; e ⊙ h], with candidate vector e and user state h, which is a further input. Under ``score_fusion:
    concat`` (the default: the paper's features include the score) the retriever's score is one more feature
    [x ; x'], for a linear map of [e ; x] in front of the normalisation would destroy the invariance of x';
    the other kinds of fusion act on e, or on the logit. Layer norm replaces batch norm, so that no request
    depends on its batch. Price, beam search and the recurrent variant of the paper have no counterpart here.
    """

    family = "pointwise"
    paper = "Zhuang et al., IJCAI 2018: Globally Optimized Mutual Influence Aware Ranking in E-Commerce Search"
    objective_outputs = True
    permutation = "equivariant"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        width, *rest = config["hidden_sizes"]
        self.normalised = nn.Linear(2 * self.dim, width)
        self.raw = nn.Linear(2 * self.dim, width, bias=False) if config["raw_features"] else None
        self.from_user = nn.Linear(self.dim, width, bias=False)
        self.from_score = None
        if "concat" in self.fusion.parts:
            columns = 1 if catalogue.n_scores == 1 else 2 * catalogue.n_scores
            self.from_score = nn.Linear(columns * (2 if config["raw_features"] else 1), width, bias=False)
            self.fusion.leave_concat_to_the_model()  # see the class docstring
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.ReLU(), self.dropout, mlp([width, *rest, self.n_outputs], config["dropout"])
        )

    def first_layer(self, candidates: Tensor, user: Tensor, mask: Tensor) -> Tensor:
        """The first layer on all inputs but the score: ``[B, n, d]``, ``[B, d]`` → ``[B, n, width]``."""
        features = torch.cat([candidates, candidates * user.unsqueeze(1)], dim=-1)
        hidden = self.normalised(min_max(features, mask)) + self.from_user(user).unsqueeze(1)
        return hidden if self.raw is None else hidden + self.raw(features)

    def encode(self, slate: UnscoredSlate) -> MiDNNContext:
        # Dropout would move minima and maxima: it belongs into the net, not before the normalisation.
        candidates, history = self.embed(slate)
        user = self.embedder.user(slate, history)
        hidden = None if self.fusion.acting else self.first_layer(candidates, user, slate.mask)
        return MiDNNContext(candidates, history, user, hidden)

    def score(self, context: MiDNNContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        hidden = context.hidden
        if hidden is None:
            hidden = self.first_layer(self.fusion(context.candidates, x, slate.mask), context.user, slate.mask)
        if self.from_score is not None:
            x = self.fusion.columns(x)
            columns = [min_max(x, slate.mask)] + ([] if self.raw is None else [x])
            hidden = hidden + self.from_score(torch.cat(columns, dim=-1))
        return self.head(hidden).squeeze(-1)
