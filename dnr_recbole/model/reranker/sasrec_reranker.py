"""SASRec as a reranker. (The file is not called sasrec.py: it must never shadow RecBole's module.)"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnr_recbole.model.blocks.attention import Attention
from dnr_recbole.model.blocks.dropout import Dropout
from dnr_recbole.model.blocks.nets import mlp
from dnr_recbole.model.reranker._history_reranker import HistoryReranker, newest_state
from dnr_recbole.registry import register_reranker


class CausalBlock(nn.Module):
    """A SASRec block: the normalised sequence attends to the raw one, then a position-wise net."""

    def __init__(self, dim: int, n_heads: int, dropout: float):
        super().__init__()
        self.norm_query, self.norm_net = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, n_heads)
        self.net = mlp([dim, dim, dim], dropout)
        self.drop = Dropout(dropout)

    def forward(self, hidden: Tensor, causal: Tensor) -> Tensor:
        """hidden ``[B, H, d]``, causal ``[H, H]`` bool (True = may look) → ``[B, H, d]``."""
        query = self.norm_query(hidden)
        hidden = self.norm_net(query + self.attention(query, hidden, attn_mask=causal))
        return hidden + self.drop(self.net(hidden))


@register_reranker
class SASRec(HistoryReranker):
    """Causal self-attention over the history; the newest position's output is the user state.

    Input: √d · item vector + position vector. Positions count from the newest item, which is what the paper's
    left padding amounts to. Right padding needs no mask of its own here: a causal query at a real position
    sees only real items. RecBole's transformer layers are post-norm and cannot normalise the query alone,
    hence a block of our own; against the authors' code it has an output projection behind the heads.
    """

    embeds = ("items", "mean_history", "interaction")  # the paper's state comes from the history alone
    paper = "Kang & McAuley, ICDM 2018: Self-Attentive Sequential Recommendation"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.position = nn.Embedding(config["history_length"], self.dim)
        nn.init.normal_(self.position.weight, std=0.05)
        self.blocks = nn.ModuleList(
            CausalBlock(self.dim, config["n_heads"], config["dropout"]) for _ in range(config["n_layers"])
        )
        self.norm = nn.LayerNorm(self.dim)

    def states(self, history: Tensor, mask: Tensor) -> Tensor:
        """State ``[B, H, d]`` after each item of ``[B, H, d]``, mask ``[B, H]``; arbitrary at padding."""
        length = history.shape[1]
        age = mask.sum(1, keepdim=True) - 1 - torch.arange(length, device=history.device)
        position = self.position(age.clamp(min=0, max=self.position.num_embeddings - 1))
        hidden = history * self.dim**0.5 + self.dropout(position)
        causal = torch.ones(length, length, dtype=torch.bool, device=history.device).tril()
        for block in self.blocks:
            hidden = block(hidden, causal)
        return self.norm(hidden)

    def user_state(self, users: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        return newest_state(self.states(history, mask), mask, self.embedder.mean_history.empty)
