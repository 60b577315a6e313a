"""Requests + a retriever → the candidate table of the second stage.

Three things are guaranteed for every protocol: the scores are the retriever's own, also those of items it
would not have retrieved; candidates are stored in random order, so no tie broken by position can leak a
label; and labels and history never touch the same interaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional, Tuple

import numpy as np
import torch

from dnr_recbole._deprecated import renamed
from dnr_recbole.config_schema import Keys
from dnr_recbole.data.candidate_table import CandidateTable, shuffle_candidates
from dnr_recbole.data.cut import check_cut, retriever_end
from dnr_recbole.data.feasibility import check_present
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.ranges import blocks, ranges
from dnr_recbole.data.requests import NEVER, RequestTable, first_seen, groups, make_requests, positive_keys
from dnr_recbole.errors import DataError
from dnr_recbole.names import Names
from dnr_recbole.retriever.metrics import contains

if TYPE_CHECKING:
    from dnr_recbole.retriever.retrieval import Retrieval

__all__ = [
    "PROTOCOLS",
    "Builder",
    "CandidateTable",
    "build_candidates",
    "build_exposed",
    "build_retrieved",
    "candidate_table",
    "guarded_requests",
    "protocol",
    "register_protocol",
    "shuffle_candidates",
]


Builder = Callable[[Any, Interactions, Any], CandidateTable]  # the keys, the log, a Retrieval
PROTOCOLS: Names[Builder] = Names("protocol", "protocol")


def register_protocol(name: str) -> Callable[[Builder], Builder]:
    """Decorator: ``build(config, interactions, retrieval) -> CandidateTable`` becomes ``protocol: name``."""
    return PROTOCOLS.register(name)


protocol = renamed(register_protocol, "dnr_recbole.data.candidates.protocol")


def build_candidates(config: Keys, interactions: Interactions, retrieval: Retrieval) -> CandidateTable:
    """The candidate table of ``config['protocol']``, checked and shuffled."""
    name, n, slate_size = config["protocol"], config["n_candidates"], config["slate_size"]
    build = PROTOCOLS.find(name)
    if slate_size > n:
        raise DataError(f"slate_size {slate_size} is larger than n_candidates {n}; lower slate_size")
    if n > interactions.n_items - 1:
        raise DataError(f"n_candidates {n} is larger than the catalogue of {interactions.n_items - 1} items; lower it")
    table = build(config, interactions, retrieval)
    check_present(config, interactions, table.split.numpy(), table.n_positives.numpy())
    return shuffle_candidates(table, config["seed"])


@register_protocol("exposed")
def build_exposed(config: Keys, data: Interactions, retrieval: Retrieval) -> CandidateTable:
    """K exposed items and the retriever's best n − K others; positives are the clicked among the exposed.

    With `exclude_seen` the others are items that the user has not met before the request; should fewer than n be
    left, the row ends in padding. The retriever did not choose the exposed items, so a low score betrays them:
    compare with the model-free probes.
    """
    n, k = config["n_candidates"], config["slate_size"]
    requests = guarded_requests(config, data, retrieval)
    assert requests.exposed is not None and requests.clicked is not None  # of this protocol
    candidates, scores, labels = _empty(len(requests), n)
    for rows, visible, _ in groups(data, requests.split):
        met = None
        if config["exclude_seen"] and not config["repeatable"]:
            met = first_seen(data, visible)
        for r, best, best_scores, free in _ranked(data, requests, rows, retrieval, n, met):
            column = _first_n(free, n)
            shown, others = requests.exposed[r], np.take_along_axis(best * free, column, 1)
            for position in range(k):
                others[others == shown[:, position, None]] = 0
            pool = np.concatenate([shown, others], axis=1)  # [r, K + n], 0 = taken
            pool_scores = np.concatenate(
                [
                    retrieval.score_items(requests.user[r], shown).numpy(),
                    np.take_along_axis(best_scores, column, 1),
                ],
                axis=1,
            )
            column = _first_n(pool > 0, n)  # at most K of the best n are exposed themselves
            candidates[r] = np.take_along_axis(pool, column, 1)
            scores[r] = np.take_along_axis(pool_scores, column, 1) * (candidates[r] > 0)
            labels[r] = np.take_along_axis(np.pad(requests.clicked[r], ((0, 0), (0, n))), column, 1)
    return candidate_table(config, data, requests, candidates, scores, labels)


@register_protocol("retrieved")
def build_retrieved(config: Keys, data: Interactions, retrieval: Retrieval) -> CandidateTable:
    """The retriever's top n of what the user has not met yet; positives are clicked within the label window.

    Nothing is injected: a positive that was not retrieved is only counted in ``n_positives``. The retriever
    has seen its part of each user, and labels lie outside of it. With `repeatable`, items met before are
    candidates and positives like all others.
    """
    n = config["n_candidates"]
    requests = guarded_requests(config, data, retrieval)
    candidates, scores, labels = _empty(len(requests), n)
    known = None if config["repeatable"] else retrieval.split < 2
    for rows, visible, own in groups(data, requests.split):
        met = None if config["repeatable"] else first_seen(data, visible, known)
        for r, best, best_scores, free in _ranked(data, requests, rows, retrieval, n, met, known):
            column = _first_n(free, n)
            real = np.take_along_axis(free, column, 1)  # False where fewer than n items are left
            candidates[r] = np.take_along_axis(best, column, 1) * real
            scores[r] = np.take_along_axis(best_scores, column, 1) * real
            positive = positive_keys(data, requests.start[r], requests.end[r], own, met)
            labels[r] = contains(positive, np.arange(len(r))[:, None] * data.n_items + candidates[r]) & real
    return candidate_table(config, data, requests, candidates, scores, labels)


def guarded_requests(config: Keys, data: Interactions, retrieval: Retrieval) -> RequestTable:
    """The requests of ``config``: under ``protocol: exposed`` lists that were shown, else those of `retrieved`.

    Raises:
        DataError: the retriever was fitted on a label of one of them.
    """
    requests = make_requests(config, data, retriever_end(config, data))
    check_cut(config["protocol"], data, requests, retrieval.split < 2)
    return requests


def _empty(n_requests: int, n: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates, scores and labels to be filled, [R, n]."""
    candidates, scores, labels = (np.zeros((n_requests, n), dtype=kind) for kind in (np.int32, np.float32, bool))
    return candidates, scores, labels


def _ranked(
    data: Interactions,
    requests: RequestTable,
    rows: np.ndarray,
    retrieval: Retrieval,
    n: int,
    met: Optional[np.ndarray] = None,
    known: Optional[np.ndarray] = None,
) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The retriever's best items for the requests ``rows``, deep enough that n unmet ones are among them.

    Args:
        met: int64 [N], when the user met the item of each interaction (:func:`first_seen`); None = all items are free.
        known: bool [N], interactions whose items are never free; they are not even ranked.

    Yields:
        per block: its rows int64 [r], items int64 [r, D], best first, their x float32 [r, D], and bool [r, D], which
        of them are real and not met before the request starts.
    """
    users, first_row, n_rows = np.unique(requests.user[rows], return_index=True, return_counts=True)
    depth, when, exclude = np.full(len(users), n), None, None
    if met is not None:
        # A user's list must survive the removal of all he meets before his last request. Users are taken in the order
        # of that depth, so that a block is no deeper than its users need.
        when = met == np.arange(len(data))
        n_met = np.concatenate([[0], np.cumsum(when)])
        last_start = requests.start[rows[first_row + n_rows - 1]]
        depth = np.minimum(n + n_met[last_start] - n_met[data.ptr[users]], data.n_items - 1)
    if known is not None:
        known_items = data.item[known]
        known_ptr = np.concatenate([[0], np.cumsum(np.bincount(data.user[known], minlength=data.n_users))])
    order = np.argsort(depth, kind="stable")
    for low, high in blocks(len(users), data.n_items):
        block = order[low:high]
        u = users[block]
        if known is not None:
            exclude = (known_ptr[u], known_ptr[u + 1], known_items)
        top, top_scores = retrieval.top_n(u, int(depth[block[-1]]), exclude=exclude)
        top, top_scores = top.numpy(), top_scores.numpy()  # [b, D]
        met_at = None if when is None else _lookup(data, u, when, top)
        which, local = ranges(first_row[block], first_row[block] + n_rows[block])
        for begin, stop in blocks(len(which), top.shape[1]):
            r, at = rows[which[begin:stop]], local[begin:stop]
            items = top[at]
            free = items > 0
            if met_at is not None:
                free &= met_at[at] >= requests.start[r, None]
            yield r, items, top_scores[at], free


def candidate_table(
    config: Keys,
    data: Interactions,
    requests: RequestTable,
    candidates: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
) -> CandidateTable:
    """Requests and their lists as a table; ``candidates`` (0 at padding), ``scores`` and ``labels`` [R, n]."""
    history_begin, history_end, items, n_items = *np.zeros((2, len(requests)), dtype=np.int64), [], 0
    for rows, visible, _ in groups(data, requests.split):
        kept = visible & data.click if config["history_feedback"] == "positive" else visible
        n_before = n_items + np.concatenate([[0], np.cumsum(kept)])  # position in `items` of each interaction
        history_begin[rows] = n_before[data.ptr[requests.user[rows]]]
        history_end[rows] = n_before[requests.start[rows]]
        items.append(data.item[kept])
        n_items = n_before[-1]
    return CandidateTable(
        users=torch.from_numpy(requests.user.astype(np.int32)),
        candidates=torch.from_numpy(candidates),
        mask=torch.from_numpy(candidates > 0),
        scores=torch.from_numpy(scores),
        labels=torch.from_numpy(labels),
        split=torch.from_numpy(requests.split),
        n_positives=torch.from_numpy(requests.n_positives.astype(np.int32)),
        history_items=torch.from_numpy(np.concatenate([*items, [0]]).astype(np.int32)),
        history_begin=torch.from_numpy(history_begin),
        history_end=torch.from_numpy(history_end),
        history_length=config["history_length"],
    )


def _first_n(flags: np.ndarray, n: int) -> np.ndarray:
    """Columns of the first n True of each row (where there are fewer, False ones follow): int64 [r, n]."""
    return np.argsort(~flags, axis=1, kind="stable")[:, :n]


def _lookup(data: Interactions, users: np.ndarray, chosen: np.ndarray, top: np.ndarray) -> np.ndarray:
    """At which of the ``chosen`` interactions (bool [N]) each user [b] met the items ``top`` [b, D]; else NEVER."""
    when = np.full((len(top), data.n_items), NEVER)
    position, owner = ranges(data.ptr[users], data.ptr[users + 1])
    keep = chosen[position]
    when[owner[keep], data.item[position[keep]]] = position[keep]
    return np.take_along_axis(when, top, 1)
