"""Exact top-n over the whole catalogue in bounded memory."""

from __future__ import annotations

from typing import Callable, Optional, Tuple

import numpy as np
import torch

from dnr_recbole.errors import DataError

# Scores of 16 MiB at a time: glibc hands out larger blocks as fresh pages each time, which cost more than the scores.
DEFAULT_BYTES = 64 * 2**20
_BLOCK = 2**20  # scores that are searched at a time: what stays in a CPU's cache
# Score matrix, its masked copy and the work space of topk, each float32 or int64.
_BYTES_PER_SCORE = 16


def rows_per_chunk(n_items: int, byte_budget: int = DEFAULT_BYTES) -> int:
    """How many rows of ``n_items`` scores fit the budget; at least one."""
    return max(1, byte_budget // (n_items * _BYTES_PER_SCORE))


def top_n(
    retrieval,
    users,
    n: int,
    exclude: Optional[Tuple[np.ndarray, ...]] = None,
    byte_budget: int = DEFAULT_BYTES,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The n best items of every row and their x in [0, 1], best first: int64 [R, n], float32 [R, n].

    Arguments as in :func:`best_items`. Rows with fewer than n items left end with item 0 and x = 0. Selection
    and order are by raw score, so they do not depend on the calibration.
    """
    items, raw = best_items(retrieval.raw_scores, users, n, retrieval.n_items, exclude, byte_budget)
    x = retrieval.calibration(raw.nan_to_num(neginf=0.0))
    return items, torch.where(items > 0, x, torch.zeros_like(x))


def best_items(
    score_fn: Callable[[torch.Tensor], torch.Tensor],
    users,
    n: int,
    n_items: int,
    exclude: Optional[Tuple[np.ndarray, ...]] = None,
    byte_budget: int = DEFAULT_BYTES,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The n best items of every row, best first.

    Args:
        score_fn: users [b] -> scores [b, n_items] on any device.
        users: [R] user ids; the same user may occur in several rows.
        n: items per row, at most the catalogue without the padding item 0.
        exclude: items not to be returned, as ``(ptr [R + 1], items)`` or ``(begin [R], end [R], items)``: row
            r excludes ``items[begin[r]:end[r]]``. The second form points into an array that is shared by many
            rows, e.g. ``Interactions.item``, without copying anybody's history.
        byte_budget: upper bound for the scores held at a time (one row at least).

    Returns:
        items int64 [R, n] and scores float32 [R, n] on the CPU. A row with fewer than n items left ends with
        item 0 and score -inf. Item 0 is never returned otherwise. Ties are broken arbitrarily but
        reproducibly.
    """
    if n < 1 or n > n_items - 1:
        raise DataError(
            f"{n} candidates were asked for, but the catalogue has {n_items - 1} items after filtering; "
            "lower n_candidates"
        )
    users = torch.as_tensor(users, dtype=torch.long)
    items = torch.zeros(len(users), n, dtype=torch.long)
    scores = torch.empty(len(users), n, dtype=torch.float32)
    step = rows_per_chunk(n_items, byte_budget)
    for start in range(0, len(users), step):
        rows = slice(start, min(start + step, len(users)))
        chunk = score_fn(users[rows])
        part = max(1, _BLOCK // n_items) if chunk.device.type == "cpu" else len(chunk)
        for first in range(rows.start, rows.stop, part):
            few = slice(first, min(first + part, rows.stop))
            # A copy, because a scorer may hand out a view of something it keeps.
            block = chunk[first - start : few.stop - start].to(dtype=torch.float32, copy=True)
            block[:, 0] = -torch.inf
            if exclude is not None:
                row, column = _excluded(exclude, few)
                block[row.to(block.device), column.to(block.device)] = -torch.inf
            best, index = _largest(block, n)
            items[few] = torch.where(torch.isneginf(best), torch.zeros_like(index), index).cpu()
            scores[few] = best.cpu()
    return items, scores


def _largest(scores: torch.Tensor, n: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The n largest of each row and their columns, as ``torch.topk``; faster on CPUs where the rows are long.

    The columns are dealt into w groups of g. The n largest lie in the n groups with the largest maxima, and maxima over
    equal strides are a vectorised pass.
    """
    rows, width = scores.shape
    g = int((width / n) ** 0.5)
    if g < 2 or scores.device.type != "cpu":
        return torch.topk(scores, n, dim=1)
    w = width // g
    groups = scores[:, : g * w].view(rows, g, w).amax(1).topk(n, dim=1, sorted=False).indices
    columns = (groups.unsqueeze(1) + w * torch.arange(g).unsqueeze(-1)).flatten(1)
    if g * w < width:
        columns = torch.cat([columns, torch.arange(g * w, width).expand(rows, -1)], dim=1)
    best, place = scores.gather(1, columns).topk(n, dim=1)
    return best, columns.gather(1, place)


def _excluded(exclude: Tuple[np.ndarray, ...], rows: slice) -> Tuple[torch.Tensor, torch.Tensor]:
    """Row and column indices of the excluded cells of one chunk; no loop over rows."""
    if len(exclude) == 2:
        ptr, items = exclude
        begin, end = ptr[:-1][rows], ptr[1:][rows]
    else:
        begin, end, items = exclude[0][rows], exclude[1][rows], exclude[2]
    begin, length = np.asarray(begin), np.asarray(end) - np.asarray(begin)
    row = np.repeat(np.arange(len(length)), length)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    column = np.asarray(items)[begin[row] + offset]
    return torch.from_numpy(row), torch.from_numpy(column.astype(np.int64))
