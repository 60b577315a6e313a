"""The algebra of candidate lists: sorting, picking, gathering and putting back.

Whatever orders candidates does it here, in one way: padding last, ties by storage position, which the data layer has
made random.

Positions are LongTensors that point into the n candidates of a request; −1 = nothing there.
"""

from __future__ import annotations

from typing import Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = -1e9  # finite, so that a row without a valid entry stays free of NaN
EPSILON = 1e-8  # a range of values below it counts as constant

# ---------------------------------------------------------------------- orders


def first_score(x: Tensor) -> Tensor:
    """The scores ``[B, n]`` that give the incoming order, of ``x`` ``[B, n]`` or ``[B, n, S]``."""
    return x if x.dim() == 2 else x[..., 0]


def best_first(scores: Tensor, mask: Tensor) -> Tensor:
    """Positions ``[B, n]`` by descending (first) score of ``[B, n]`` or ``[B, n, S]``, padding behind."""
    return first_score(scores).masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def worst_first(scores: Tensor, mask: Tensor) -> Tensor:
    """Positions ``[B, n]`` by ascending score; padding is still behind, so that a scan meets it last."""
    return first_score(scores).masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True)


def inverse(order: Tensor) -> Tensor:
    """The place of each candidate in ``order``, both ``[.., n]`` permutations."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def score_ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Rank ``[B, n]`` of each candidate by descending (first) score, 0 = best; padding ranks last."""
    return inverse(best_first(scores, mask))


def top_positions(scores: Tensor, mask: Tensor, k: int) -> Tensor:
    """Positions ``[B, k]`` of the k best valid candidates, best first, −1 where there are fewer."""
    if torch.onnx.is_in_onnx_export():  # a graph does not know how many candidates there will be
        scores, mask = F.pad(scores, (0, k)), F.pad(mask, (0, k))
    k_eff = min(k, scores.shape[1])
    top = scores.masked_fill(~mask, -torch.inf).topk(k_eff, dim=-1).indices
    top = top.masked_fill(~mask.gather(1, top), -1)
    return F.pad(top, (0, k - k_eff), value=-1)


def list_scores(positions: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Ranking scores of a generated list: its items first, in order, then the rest by a base score.

    Args:
        positions: ``[B, K]`` distinct candidate positions, best first, −1 = nothing.
        base: ``[B, n]`` scores for the candidates outside the list.
        mask: ``[B, n]`` bool.

    Returns:
        ``[B, n]``: n − rank (n … 1); padding gets a very low score.
    """
    n, k = base.shape[1], positions.shape[1]
    lift = (k - list_ranks(positions, n)).to(torch.float32)  # K … 1 in the list, 0 outside
    key = lift * n - score_ranks(base, mask).float()
    return (n - score_ranks(key, mask)).to(torch.float32).masked_fill(~mask, NEG_INF)


# ---------------------------------------------------------------------- moving values


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Entries of values ``[B, n]``, or rows of ``[B, n, d]``, at positions ``[B, m]`` → ``[B, m]`` or ``[B, m, d]``."""
    if values.dim() == 2:
        return values.gather(1, positions)
    return values.gather(1, positions.unsqueeze(-1).expand(*positions.shape, values.shape[-1]))


def without(free: Tensor, positions: Tensor) -> Tensor:
    """``free`` bool ``[.., n]`` with the candidates at ``positions`` ``[.., m]`` (≥ 0) struck out."""
    return free.scatter(-1, positions, torch.zeros_like(positions, dtype=torch.bool))


def put_back(values: Tensor, order: Tensor) -> Tensor:
    """Undo a sort: ``values[:, j]``, ``[B, n]`` or ``[B, n, d]``, goes to position ``order[:, j]``."""
    return take(values, inverse(order))


def last_state(states: Tensor, mask: Tensor) -> Tensor:
    """State ``[B, d]`` behind the last real step of ``[B, L, d]``; mask ``[B, L]``, the real part first."""
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    return take(states, last).squeeze(1)


def row(values: Tensor, position: Tensor) -> Tensor:
    """``values[b, position[b]]``: ``[B, n, …]``, ``[B]`` → ``[B, …]``."""
    return values[torch.arange(values.shape[0], device=values.device), position]


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


def pick_best(lists: Tensor, utility: Tensor) -> Tensor:
    """The first list of largest utility: lists ``[B, R, K]``, utility ``[B, R]`` → ``[B, K]``."""
    return row(lists, utility.argmax(1))


# ---------------------------------------------------------------------- lists


def pages(order: Tensor, mask: Tensor, size: int) -> Tuple[Tensor, Tensor]:
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


def list_ranks(lists: Tensor, n: int) -> Tensor:
    """Slot of each of n candidates in lists ``[.., K]`` → ``[.., n]``; K where absent."""
    k = lists.shape[-1]
    ranks = torch.full((*lists.shape[:-1], n + 1), k, dtype=torch.long, device=lists.device)
    slots = torch.arange(k, device=lists.device).expand_as(lists)
    return ranks.scatter(-1, lists.masked_fill(lists < 0, n), slots)[..., :n]  # column n swallows the −1s


def discounts(k: int, device: Union[torch.device, str, None] = None) -> Tensor:
    """What a hit in each slot counts in DCG: 1 / log2(slot + 2), ``[k]``."""
    return 1 / torch.log2(torch.arange(k, device=device) + 2.0)


# ---------------------------------------------------------------------- values within a request


def bounds(values: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:
    """Smallest and largest value of the valid candidates: ``[B, 1]`` of ``[B, n]``, ``[B, 1, F]`` of ``[B, n, F]``."""
    valid = mask if values.dim() == 2 else mask.unsqueeze(-1)
    low = values.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    return low, values.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)


def min_max(values: Tensor, mask: Tensor) -> Tensor:
    """Each feature mapped to [0, 1] over the valid candidates of its request; a constant feature becomes 0.

    Where a feature is constant the gradient is 0 too: dividing by a tiny range would make it explode.

    Args:
        values: ``[B, n]`` or ``[B, n, F]``.
        mask: ``[B, n]`` bool, at least one True per row.

    Returns:
        The shape of ``values``, translation- and scale-invariant in it; values at padding are arbitrary.
    """
    low, high = bounds(values, mask)
    spread = high - low
    scale = torch.where(spread > EPSILON, 1 / spread.clamp(min=EPSILON), torch.zeros_like(spread))
    return (values - low) * scale
