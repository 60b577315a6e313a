"""SetRank: permutation-invariant ranking of a candidate set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.attention import AttentionBlock
from dnr_recbole.model.blocks.nets import UserItemToken
from dnr_recbole.model.context import TokenContext
from dnr_recbole.registry import register_reranker


class MSAB(AttentionBlock):
    """Self-attention of the set: MAB(X, X)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x ``[B, n, d]``, mask ``[B, n]`` bool → ``[B, n, d]``."""
        return super().forward(x, x, mask)


class IMSAB(nn.Module):
    """Induced self-attention: M points I read the set, T = MAB(I, X); the set reads them, MAB(X, T)."""

    def __init__(self, n_points: int, dim: int, *shape):
        super().__init__()
        self.points = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_points, dim)))
        self.read = AttentionBlock(dim, *shape)
        self.write = AttentionBlock(dim, *shape)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x ``[B, n, d]``, mask ``[B, n]`` bool → ``[B, n, d]``. Only the first attention has padded keys."""
        summary = self.read(self.points.expand(x.shape[0], -1, -1), x, mask)
        return self.write(x, summary)


@register_reranker
class SetRank(AbstractReranker[TokenContext]):
    """Stacked set attention and a shared linear scorer (Pang et al., SIGIR 2020).

    A token is a row-wise feed-forward net of [candidate ; user]. ``attention: msab`` lets all candidates see
    each other, ``imsab`` goes through M induced points (for n = 50 and M = 20 that saves no time; it
    regularises). ``score_fusion: rank`` is the paper's ordinal embedding; ``fuse_every_block`` adds it before
    each block again.

    The attention-rank loss with binary labels is the list cross-entropy. The linear maps of the attention
    have no ReLU, unlike the authors' program, and the feed-forward net is 2d wide instead of 4d to keep the
    cost of six blocks near that of other rerankers (``d_ff``). ``layer_scale`` lets six post-norm blocks
    learn without warm-up.
    """

    family = "list refinement"
    paper = "Pang et al., SIGIR 2020: SetRank: Learning a Permutation-Invariant Ranking Model for Information Retrieval"
    objective_outputs = True
    permutation = "equivariant"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        shape = (self.dim, config["n_heads"], config["d_ff"], config["dropout"], config["layer_scale"])
        self.token = UserItemToken(self.dim, self.dim)
        self.row_ff = nn.Sequential(nn.ReLU(), nn.Linear(self.dim, self.dim))
        self.blocks = nn.ModuleList(
            MSAB(*shape) if config["attention"] == "msab" else IMSAB(config["n_points"], *shape)
            for _ in range(config["n_layers"])
        )
        self.fuse_every_block = config["fuse_every_block"]
        self.head = nn.Linear(self.dim, self.n_outputs)

    def encode(self, slate: UnscoredSlate) -> TokenContext:
        context = super().encode(slate)
        return TokenContext.of(context, tokens=self.row_ff(self.token(context.candidates, context.user)))

    def score(self, context: TokenContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        hidden = self.fusion(context.tokens, x, slate.mask)
        for i, block in enumerate(self.blocks):
            if i and self.fuse_every_block:
                hidden = self.fusion(hidden, x, slate.mask)
            hidden = block(hidden, slate.mask)
        return self.head(hidden).squeeze(-1)
