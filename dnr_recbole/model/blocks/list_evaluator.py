"""Evaluators of ordered lists, and the index work around lists, for generator–evaluator rerankers."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from dnr_recbole.model.blocks.attention import TransformerBlock
from dnr_recbole.model.blocks.nets import mlp

KINDS = ("gru", "transformer")


class ListEvaluator(nn.Module):
    """Per-slot logits of any number of ordered lists per request.

    A slot's input is the listed item's vector plus a projection of the user's state. ``gru`` reads the list
    from the top, so a slot's logit depends on the slots above it and on nothing below (a generator can be
    paid step by step); ``transformer`` adds a learned slot embedding and lets every slot see every other. A
    two-layer head reads the slot's input together with its state in the list.

    Args:
        dim: width d of item vectors and user state.
        hidden: width of the GRU's state (of the feed-forward net for ``transformer``) and of the head.
        n_slots: longest list, K.
        kind: one of :data:`KINDS`.
        dropout: inside the head and the transformer.
        n_heads, n_layers: of the transformer.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        n_slots: int,
        kind: str = "gru",
        dropout: float = 0.0,
        n_heads: int = 4,
        n_layers: int = 1,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind of list evaluator must be one of {KINDS}, got {kind!r}")
        self.kind = kind
        self.user_to_slot = nn.Linear(dim, dim)
        if kind == "gru":
            self.gru = nn.GRU(dim, hidden, batch_first=True)
        else:
            self.slots = nn.Parameter(torch.randn(n_slots, dim) * 0.02)
            self.blocks = nn.ModuleList(TransformerBlock(dim, n_heads, hidden, dropout) for _ in range(n_layers))
        state = hidden if kind == "gru" else dim
        self.head = mlp([dim + state, hidden, max(1, hidden // 2), 1], dropout)

    def forward(self, list_vectors: Tensor, user: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Logits of a click in each slot.

        Args:
            list_vectors: ``[.., L, d]`` item vectors in list order, L ≤ K.
            user: ``[.., d]``; leading dimensions it lacks are broadcast,
                e.g. ``[B, d]`` for lists ``[B, R, L, d]``.
            mask: ``[.., L]`` bool, True = filled slot (filled slots first); None = all are.

        Returns:
            ``[.., L]``; values in unfilled slots mean nothing.
        """
        while user.dim() < list_vectors.dim() - 1:
            user = user.unsqueeze(-2)
        tokens = list_vectors + self.user_to_slot(user).unsqueeze(-2)
        lead, length = tokens.shape[:-2], tokens.shape[-2]
        tokens = tokens.reshape(-1, length, tokens.shape[-1])
        if self.kind == "gru":
            state, _ = self.gru(tokens)
        else:
            flat_mask = None if mask is None else mask.expand(*lead, length).reshape(-1, length)
            state = tokens + self.slots[:length]
            for block in self.blocks:
                state = block(state, flat_mask)
        return self.head(torch.cat([tokens, state], dim=-1)).view(*lead, length)
