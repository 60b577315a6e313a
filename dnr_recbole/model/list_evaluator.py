"""Evaluators of ordered lists, and the index work around lists, for generator–evaluator rerankers."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate, first_score
from dnr_recbole.model.layers import TransformerBlock, mlp

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
            self.blocks = nn.ModuleList(
                TransformerBlock(dim, n_heads, hidden, dropout) for _ in range(n_layers)
            )
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


def gather_lists(values: Tensor, positions: Tensor) -> Tensor:
    """Rows of values ``[B, n, d]`` at positions ``[B, ..]`` → ``[B, .., d]``; or entries of ``[B, n]``.

    Negative positions (nothing there) read position 0; mask them.
    """
    batch, n = values.shape[:2]
    offset = torch.arange(batch, device=values.device).mul(n).view(-1, *[1] * (positions.dim() - 1))
    flat = positions.clamp(min=0) + offset
    if values.dim() == 2:
        return values.reshape(-1)[flat]
    return F.embedding(flat, values.reshape(batch * n, -1))  # its backward is far cheaper than that of gather


def hit_shares(lists: Tensor, slate: Slate, size: int) -> Tensor:
    """Hits of lists ``[B, R, L]`` (−1 = nothing) as shares of min(``size``, positives among the candidates).

    Of a list longer than ``size`` the best part counts. Returns ``[B, R]``; NaN where a request has no positive.
    """
    hits = (gather_lists(slate.labels, lists) * (lists >= 0)).sum(-1).clamp(max=size)
    return hits / (slate.labels * slate.mask).sum(1, keepdim=True).clamp(max=size)


def score_order(scores: Tensor, mask: Tensor) -> Tensor:
    """Positions ``[B, n]`` by descending score, padding last; ties stay in storage order."""
    return first_score(scores).masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def pages(order: Tensor, mask: Tensor, size: int):
    """A ranking cut into consecutive lists.

    Args:
        order: ``[B, n]`` positions of all candidates, valid ones first.
        mask: ``[B, n]`` bool, True = real candidate.
        size: items per list, K.

    Returns:
        positions ``[B, ceil(n / K), K]`` (−1 in the last list behind n) and their mask of the same shape.
    """
    short = -order.shape[1] % size
    positions = F.pad(order, (0, short), value=-1).unflatten(1, (-1, size))
    return positions, gather_lists(mask, positions) & (positions >= 0)


def unpage(values: Tensor, order: Tensor) -> Tensor:
    """Undo :func:`pages`: values ``[B, ceil(n / K), K]`` → ``[B, n]`` in storage order."""
    flat = values.flatten(1)[:, : order.shape[1]]
    return torch.zeros_like(flat).scatter(1, order, flat)
