"""Requests + a retriever → the candidate table of the second stage.

Three things are guaranteed for every protocol: the scores are the retriever's own, also those of items it
would not have retrieved; candidates are stored in random order, so no tie broken by position can leak a
label; and labels and history never touch the same interaction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.cut import check_cut, retriever_end
from dnr_recbole.data.feasibility import check_present
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.requests import (
    NEVER,
    RequestTable,
    blocks,
    first_seen,
    groups,
    make_requests,
    positive_keys,
    ranges,
)
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import DataError
from dnr_recbole.names import Names
from dnr_recbole.retriever.metrics import contains

if TYPE_CHECKING:
    from dnr_recbole.retriever.retrieval import Retrieval


@dataclass(frozen=True)
class CandidateTable:
    """R requests with n candidates each, compact in memory; sorted by (user, time of the request).

    Histories of the requests of a user overlap, so they are kept once, as ranges of one flat array.

    Attributes:
        users: int32 [R].
        candidates: int32 [R, n], 0 at padding.
        mask: bool [R, n], True = real candidate.
        scores: float32 [R, n], the retriever's, in [0, 1]; 0 at padding; [R, n, S] of several retrievers.
        labels: bool [R, n].
        split: int8 [R], 0 train, 1 valid, 2 test.
        n_positives: int32 [R], all positives of the request, including those that were not retrieved.
        history_items: int32 [M], items in (user, time) order; the last element is 0 (what padding points at).
        history_begin, history_end: int64 [R], range of ``history_items`` that lies before the request.
        history_length: H, how many of them (the newest) a reranker sees.
        fold: int16 [R], see :attr:`~dnr_recbole.data.slate.Slate.fold`; None = 0 everywhere.
        features: float32 [R, n, P], see :attr:`~dnr_recbole.data.slate.Slate.features`, or None.
        shown: bool [R, n], see :attr:`~dnr_recbole.data.slate.Slate.shown`, or None.
        targets, weights: float32 [R, n], see :class:`~dnr_recbole.data.slate.Slate`, or None.
        objectives: float32 [R, n, T], see :attr:`~dnr_recbole.data.slate.Slate.objectives`, or None.
        position: int16 [R, n], where a candidate was shown, −1 = nowhere; None = not known or not asked for.
        intended: int16 [R, n], where the old system would have put it, had nothing been moved at random, or None.
        propensity: float32 [R, n], the probability that it was shown at its position, or None.
        examination: float32 [R, n], the probability that a user looks there, or None.
        randomised: bool [R, n], whether chance alone put it there, or None.
    """

    users: Tensor
    candidates: Tensor
    mask: Tensor
    scores: Tensor
    labels: Tensor
    split: Tensor
    n_positives: Tensor
    history_items: Tensor
    history_begin: Tensor
    history_end: Tensor
    history_length: int
    fold: Optional[Tensor] = None
    features: Optional[Tensor] = None
    shown: Optional[Tensor] = None
    targets: Optional[Tensor] = None
    objectives: Optional[Tensor] = None
    weights: Optional[Tensor] = None
    position: Optional[Tensor] = None
    intended: Optional[Tensor] = None
    propensity: Optional[Tensor] = None
    examination: Optional[Tensor] = None
    randomised: Optional[Tensor] = None

    def __len__(self) -> int:
        return len(self.users)

    def gather_history(self, rows: Tensor) -> Tuple[Tensor, Tensor]:
        """Histories of ``rows`` [B]: items (LongTensor [B, H], oldest first, 0 behind them) and mask."""
        end = self.history_end[rows]
        length = (end - self.history_begin[rows]).clamp(max=self.history_length)
        step = torch.arange(self.history_length)
        mask = step < length[:, None]
        position = torch.where(mask, (end - length)[:, None] + step, len(self.history_items) - 1)
        return self.history_items[position].long(), mask

    @property
    def history(self) -> Tensor:
        """All histories, LongTensor [R, H]: large; batches use :meth:`gather_history`."""
        return self.gather_history(torch.arange(len(self)))[0]

    @property
    def history_mask(self) -> Tensor:
        """BoolTensor [R, H]."""
        return self.gather_history(torch.arange(len(self)))[1]

    def slate(self, rows: Tensor) -> Slate:
        """The requests ``rows`` (LongTensor [B]) as a batch."""
        history, history_mask = self.gather_history(rows)
        return Slate(
            users=self.users[rows].long(),
            history=history,
            history_mask=history_mask,
            candidates=self.candidates[rows].long(),
            mask=self.mask[rows],
            scores=self.scores[rows],
            labels=self.labels[rows].float(),
            fold=None if self.fold is None else self.fold[rows].long(),
            features=None if self.features is None else self.features[rows],
            shown=None if self.shown is None else self.shown[rows],
            targets=None if self.targets is None else self.targets[rows],
            objectives=None if self.objectives is None else self.objectives[rows],
            weights=None if self.weights is None else self.weights[rows],
            position=None if self.position is None else self.position[rows].long(),
        )

    def to_tensors(self) -> Dict[str, Tensor]:
        """Everything as tensors, for the cache; inverse of :meth:`from_tensors`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: torch.as_tensor(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Dict[str, Tensor]) -> "CandidateTable":
        values: Dict[str, Any] = {**tensors, "history_length": int(tensors["history_length"])}
        return cls(**values)


Builder = Callable[[Any, Interactions, Any], CandidateTable]  # the keys, the log, a Retrieval
PROTOCOLS: Names[Builder] = Names("protocol", "protocol")


def register_protocol(name: str) -> Callable[[Builder], Builder]:
    """Decorator: ``build(config, interactions, retrieval) -> CandidateTable`` becomes ``protocol: name``."""
    return PROTOCOLS.register(name)


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


def shuffle_candidates(table: CandidateTable, seed: int) -> CandidateTable:
    """Candidates of each request in random, seeded order: storage order then says nothing about labels."""
    generator = np.random.default_rng(seed)
    out: Dict[str, Any] = {
        name: torch.empty_like(getattr(table, name)) for name in ("candidates", "mask", "scores", "labels")
    }
    n = table.candidates.shape[1]
    for low, high in blocks(len(table), n):
        order = torch.from_numpy(generator.random((high - low, n), dtype=np.float32).argsort(1))
        for name, target in out.items():
            target[low:high] = getattr(table, name)[low:high].gather(1, order)
    return dataclasses.replace(table, **out)


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
