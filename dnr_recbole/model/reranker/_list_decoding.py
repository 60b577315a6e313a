"""Making candidate lists and handling many of them per request: shared by generator–evaluator rerankers."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate
from dnr_recbole.lists import discounts, gather_lists, without
from dnr_recbole.model.losses import bce

_MODULUS = 2**31  # products of two residues stay below 2**62, so int64 never overflows


def cosine_matrix(vectors: Tensor) -> Tensor:
    """Cosine of every pair of candidates: ``[B, n, d]`` → ``[B, n, n]``."""
    unit = F.normalize(vectors.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def contrastive_decode(
    relevance: Tensor, similarity: Optional[Tensor], mask: Tensor, alpha: Tensor, top_k: Optional[int] = None
) -> Tensor:
    """Lists filled slot by slot, each candidate at most once (NAR4Rec's contrastive decoding).

    Slot j takes, among the ``top_k`` unused candidates of largest relevance there, the one with the largest
    (1 − α) · relevance − α · (largest similarity to an item already in the list). α = 0 is greedy decoding;
    relevance that does not depend on the slot makes it maximal marginal relevance.

    Args:
        relevance: ``[B, R, n, K]`` of candidate and slot, for each of R lists per request.
        similarity: ``[B, n, n]``; None if every α is 0.
        mask: ``[B, n]`` bool.
        alpha: ``[R]`` in [0, 1].
        top_k: None or 0 = all candidates.

    Returns:
        LongTensor ``[B, R, K]`` of candidate positions, −1 where no valid candidate is left.
    """
    batch, n_lists, n, n_slots = relevance.shape
    free = mask.unsqueeze(1).expand(batch, n_lists, n)
    nearest = relevance.new_zeros(batch, n_lists, n, dtype=torch.float32)
    weight = alpha.view(1, -1, 1).to(nearest)
    contrast = bool((alpha != 0).any())
    rows = torch.arange(batch, device=mask.device).unsqueeze(1)
    chosen = []
    for slot in range(n_slots):
        column = relevance[..., slot].float().masked_fill(~free, -torch.inf)
        key = column
        if contrast and slot > 0:  # nothing to be unlike yet: at α = 1 all keys would tie
            key = (1 - weight) * column - weight * nearest
            if top_k:
                floor = F.pad(column, (0, top_k), value=-torch.inf).topk(top_k, dim=-1).values[..., -1:]
                key = key.masked_fill(column < floor, -torch.inf)
            # At α = 1 the product 0 · −inf is NaN, so used and padded candidates are struck out again.
            key = key.masked_fill(~free, -torch.inf)
        pick = key.argmax(-1)
        chosen.append(pick.masked_fill(~free.any(-1), -1))
        free = without(free, pick.unsqueeze(-1))
        if contrast:
            assert similarity is not None
            row = similarity[rows, pick].float()
            nearest = row if slot == 0 else torch.maximum(nearest, row)
    return torch.stack(chosen, dim=-1)


def greedy_decode(relevance: Tensor, mask: Tensor) -> Tensor:
    """Each slot takes its most relevant unused candidate: ``[B, R, n, K]`` → ``[B, R, K]``."""
    return contrastive_decode(relevance, None, mask, torch.zeros(relevance.shape[1], device=mask.device))


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform noise."""
    return -(-uniform.clamp(1e-6, 1 - 1e-6).log()).log()


def seeded_gumbel(ids: Tensor, keys: Tensor, n_lists: int, n_slots: int) -> Tensor:
    """Gumbel noise that is a fixed function of request, candidate, list and slot.

    A hash instead of a generator: the same request gets the same noise alone or in any batch, on any device,
    and in any candidate order.

    Args:
        ids: ``[B, n]`` candidate ids; keys: ``[B]`` what else tells requests apart, e.g. user ids.

    Returns:
        ``[B, n_lists, n, n_slots]``.
    """
    salts = torch.arange(1, n_lists * n_slots + 1, device=ids.device).view(n_lists, 1, n_slots)
    state = (ids * 69069 + keys.unsqueeze(1) * 7919).view(ids.shape[0], 1, -1, 1) + salts * 104729
    for factor in (1103515245, 1664525, 22695477):
        state = ((state % _MODULUS) * factor + 12345) % _MODULUS
        state = state ^ (state >> 15)
    return gumbel(state.to(torch.float32) / _MODULUS)


def _list_logits(
    evaluator: nn.Module, tokens: Tensor, user: Tensor, lists: Tensor, residual: Optional[Tensor] = None
) -> Tensor:
    """Evaluator's logits ``[B, R, K]`` for lists ``[B, R, K]`` of candidates with vectors ``[B, n, d]``.

    residual ``[B, n]``: what the listed candidates' own scores add to them, whatever the list.
    """
    return plus_listed(evaluator(gather_lists(tokens, lists), user, lists >= 0).float(), residual, lists)


def plus_listed(logits: Tensor, residual: Optional[Tensor], lists: Tensor) -> Tensor:
    """``logits`` ``[B, R, K]`` plus the entries of ``residual`` ``[B, n]`` at the positions ``lists`` ``[B, R, K]``."""
    return logits if residual is None else logits + gather_lists(residual, lists)


def list_utility(
    evaluator: nn.Module, tokens: Tensor, user: Tensor, lists: Tensor, residual: Optional[Tensor] = None
) -> Tensor:
    """Expected DCG ``[B, R]`` of lists under the evaluator; ``residual`` ``[B, n]`` is added to its logits.

    The discount makes the order of a list count, as it does in the metric; without it, lists of the same
    items differ only by the evaluator's context effects.
    """
    clicks = torch.sigmoid(_list_logits(evaluator, tokens, user, lists, residual))
    return (clicks.masked_fill(lists < 0, 0.0) * discounts(lists.shape[-1], lists.device)).sum(-1)


def evaluator_loss(
    evaluator: nn.Module,
    tokens: Tensor,
    user: Tensor,
    lists: Tensor,
    slate: Slate,
    residual: Optional[Tensor] = None,
) -> Tensor:
    """Binary cross-entropy of the evaluator on the feedback of listed candidates, mean over filled slots, weighted.

    residual ``[B, n]`` is added to its logits.
    """
    logits = _list_logits(evaluator, tokens, user, lists, residual)
    weights = None if slate.weights is None else gather_lists(slate.weights, lists)
    return bce(logits, gather_lists(slate.feedback, lists), lists >= 0, weights)


def hit_shares(lists: Tensor, slate: Slate, size: int) -> Tensor:
    """Hits of lists ``[B, R, L]`` (−1 = nothing) as shares of min(``size``, positives among the candidates).

    Of a list longer than ``size`` the best part counts. Returns ``[B, R]``; NaN where a request has no positive.
    """
    hits = (gather_lists(slate.labels, lists) * (lists >= 0)).sum(-1).clamp(max=size)
    return hits / (slate.labels * slate.mask).sum(1, keepdim=True).clamp(max=size)
