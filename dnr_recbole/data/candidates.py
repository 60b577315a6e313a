"""Requests + a retriever → the candidate table of the second stage.

Three things are guaranteed for every protocol: the scores are the retriever's own, also those of items it
would not have retrieved; candidates are stored in random order, so no tie broken by position can leak a
label; and labels and history never touch the same interaction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, Tuple

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.requests import (
    SPLIT_NAMES,
    RequestTable,
    count_within,
    exposed_requests,
    first_occurrences,
    retrieved_requests,
)
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import DataError, UnknownNameError

# Elements of the largest temporary array; float32 → 32 MiB. Bounds the memory, whatever the size of the data.
BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class CandidateTable:
    """R requests with n candidates each, compact in memory; sorted by (user, time of the request).

    Histories of the requests of a user overlap, so they are kept once, as ranges of one flat array.

    Attributes:
        users: int32 [R].
        candidates: int32 [R, n], 0 at padding.
        mask: bool [R, n], True = real candidate.
        scores: float32 [R, n], the retriever's, in [0, 1]; 0 at padding.
        labels: bool [R, n].
        split: int8 [R], 0 train, 1 valid, 2 test.
        n_positives: int32 [R], all positives of the request, including those that were not retrieved.
        history_items: int32 [M], items in (user, time) order; the last element is 0 (what padding points at).
        history_begin, history_end: int64 [R], range of ``history_items`` that lies before the request.
        history_length: H, how many of them (the newest) a reranker sees.
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
        )

    def to_tensors(self) -> Dict[str, Tensor]:
        """Everything as tensors, for the cache; inverse of :meth:`from_tensors`."""
        return {f.name: torch.as_tensor(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Dict[str, Tensor]) -> "CandidateTable":
        return cls(**{**tensors, "history_length": int(tensors["history_length"])})


Builder = Callable[[object, Interactions, object], CandidateTable]
PROTOCOLS: Dict[str, Builder] = {}


def protocol(name: str) -> Callable[[Builder], Builder]:
    """Decorator: ``build(config, interactions, retrieval) -> CandidateTable`` becomes ``protocol: name``."""

    def register(builder: Builder) -> Builder:
        PROTOCOLS[name] = builder
        return builder

    return register


def build_candidates(config, interactions: Interactions, retrieval) -> CandidateTable:
    """The candidate table of ``config['protocol']``, checked and shuffled."""
    name, n, slate_size = config["protocol"], config["n_candidates"], config["slate_size"]
    if name not in PROTOCOLS:
        raise UnknownNameError(f"protocol '{name}' is unknown; choose one of {', '.join(sorted(PROTOCOLS))}")
    if slate_size > n:
        raise DataError(f"slate_size {slate_size} is larger than n_candidates {n}; lower slate_size")
    if n > interactions.n_items - 1:
        raise DataError(
            f"n_candidates {n} is larger than the catalogue of {interactions.n_items - 1} items; lower it"
        )
    table = PROTOCOLS[name](config, interactions, retrieval)
    missing = [s for code, s in enumerate(SPLIT_NAMES) if not (table.split == code).any()]
    if missing:
        raise DataError(
            f"protocol '{name}' made {len(table)} requests from {len(interactions)} interactions of "
            f"{(interactions.lengths > 0).sum()} users, none of them for {', '.join(missing)}; use a larger "
            "dataset or lower label_threshold, label_window or slate_size"
        )
    return shuffle_candidates(table, config["seed"])


@protocol("exposed")
def build_exposed(config, data: Interactions, retrieval) -> CandidateTable:
    """K exposed items and the retriever's best n − K others; positives are the clicked among the exposed.

    The retriever did not choose the exposed items, so a low score betrays them: compare with the
    model-free probes.
    """
    n, k = config["n_candidates"], config["slate_size"]
    requests = exposed_requests(data, k, config["split"], config["seed"])
    candidates = np.zeros((len(requests), n), dtype=np.int32)
    scores = np.zeros((len(requests), n), dtype=np.float32)
    labels = np.zeros((len(requests), n), dtype=bool)
    users, user_row = np.unique(requests.user, return_inverse=True)
    top, top_scores = retrieval.top_n(users, n)  # once per user: the retriever does not change with time
    top, top_scores = top.numpy(), top_scores.numpy()
    for low, high in _blocks(len(requests), n * k):
        rows = slice(low, high)
        shown, best = requests.exposed[rows], top[user_row[rows]]
        others = best * ~(best[:, :, None] == shown[:, None, :]).any(2)
        pool = np.concatenate([shown, others], axis=1)  # [r, K + n], 0 = taken
        shown_scores = retrieval.score_items(requests.user[rows], shown).numpy()
        pool_scores = np.concatenate([shown_scores, top_scores[user_row[rows]]], axis=1)
        column = _first_n(pool > 0, n)  # never short: at most K of the top n are exposed themselves
        candidates[rows] = np.take_along_axis(pool, column, 1)
        scores[rows] = np.take_along_axis(pool_scores, column, 1)
        labels[rows] = np.take_along_axis(np.pad(requests.clicked[rows], ((0, 0), (0, n))), column, 1)
    return _table(config, data, requests, candidates, scores, labels)


@protocol("retrieved")
def build_retrieved(config, data: Interactions, retrieval) -> CandidateTable:
    """The retriever's top n of what the user has not met yet; positives are clicked within the label window.

    Nothing is injected: a positive that was not retrieved is only counted in ``n_positives``. The retriever
    has seen the earlier ``retriever_fraction`` of each user, and requests stand in the later part.
    """
    n = config["n_candidates"]
    later = data.split_positions(config["retriever_fraction"])
    if ((retrieval.split < 2) & (np.arange(len(data)) >= later[data.user])).any():
        raise DataError(
            f"the retriever was fitted beyond retriever_fraction={config['retriever_fraction']}, so its "
            "scores would know the labels; fit it with the same retriever_fraction"
        )
    requests = retrieved_requests(
        data,
        later,
        config["label_window"],
        config["request_stride"],
        config["slate_size"],
        config["split"],
        config["seed"],
    )
    candidates = np.zeros((len(requests), n), dtype=np.int32)
    scores = np.zeros((len(requests), n), dtype=np.float32)
    labels = np.zeros((len(requests), n), dtype=bool)
    first_seen, first_click = first_occurrences(data)
    is_first_seen = first_seen == np.arange(len(data))

    users, first_row = np.unique(requests.user, return_index=True)
    n_rows = np.diff(np.append(first_row, len(requests)))
    # A user's list must survive the removal of all he meets between `later` and his last request. Users are
    # taken in the order of that depth, so that a block is no deeper than its users need.
    depth = np.minimum(n + requests.start[first_row + n_rows - 1] - later[users], data.n_items - 1)
    order = np.argsort(depth, kind="stable")
    for low, high in _blocks(len(users), data.n_items):
        block = order[low:high]
        u = users[block]
        known = (data.ptr[u], later[u], data.item)  # what the retriever was fitted on is no candidate
        top, top_scores = retrieval.top_n(u, int(depth[block[-1]]), exclude=known)
        top, top_scores = top.numpy(), top_scores.numpy()  # [b, D]
        position, owner = _ranges(later[u], data.ptr[u + 1])
        seen_at = _lookup(data, position, owner, is_first_seen, top)
        clicked_at = _lookup(data, position, owner, first_click, top)

        rows, local = _ranges(first_row[block], first_row[block] + n_rows[block])
        for begin, stop in _blocks(len(rows), top.shape[1]):
            r, at = rows[begin:stop], local[begin:stop]
            start, end = requests.start[r, None], requests.end[r, None]
            free = (seen_at[at] >= start) & (top[at] > 0)
            column = _first_n(free, n)
            real = np.take_along_axis(free, column, 1)  # False where fewer than n items are left
            candidates[r] = top[at[:, None], column] * real
            scores[r] = top_scores[at[:, None], column] * real
            labels[r] = (
                clicked_at[at[:, None], column] < end
            ) & real  # free, so the first click is after start
    return _table(config, data, requests, candidates, scores, labels)


def shuffle_candidates(table: CandidateTable, seed: int) -> CandidateTable:
    """Candidates of each request in random, seeded order: storage order then says nothing about labels."""
    generator = np.random.default_rng(seed)
    out = {
        name: torch.empty_like(getattr(table, name)) for name in ("candidates", "mask", "scores", "labels")
    }
    n = table.candidates.shape[1]
    for low, high in _blocks(len(table), n):
        order = torch.from_numpy(generator.random((high - low, n), dtype=np.float32).argsort(1))
        for name, target in out.items():
            target[low:high] = getattr(table, name)[low:high].gather(1, order)
    return dataclasses.replace(table, **out)


def _table(config, data: Interactions, requests: RequestTable, candidates, scores, labels) -> CandidateTable:
    if config["history_feedback"] == "positive":  # positions among the clicked interactions only
        n_before = np.concatenate([[0], np.cumsum(data.click)])
        items = data.item[data.click]
    else:
        n_before, items = np.arange(len(data) + 1), data.item
    return CandidateTable(
        users=torch.from_numpy(requests.user.astype(np.int32)),
        candidates=torch.from_numpy(candidates),
        mask=torch.from_numpy(candidates > 0),
        scores=torch.from_numpy(scores),
        labels=torch.from_numpy(labels),
        split=torch.from_numpy(requests.split),
        n_positives=torch.from_numpy(requests.n_positives.astype(np.int32)),
        history_items=torch.from_numpy(np.append(items, 0).astype(np.int32)),
        history_begin=torch.from_numpy(n_before[data.ptr[requests.user]]),
        history_end=torch.from_numpy(n_before[requests.start]),
        history_length=config["history_length"],
    )


def _first_n(flags: np.ndarray, n: int) -> np.ndarray:
    """Columns of the first n True of each row (where there are fewer, False ones follow): int64 [r, n]."""
    return np.argsort(~flags, axis=1, kind="stable")[:, :n]


def _lookup(data: Interactions, position, owner, chosen, top: np.ndarray) -> np.ndarray:
    """At which of the ``chosen`` positions each listed item occurs, int64 [b, D]; never = the largest int.

    ``position``, ``owner`` [P]: positions to look at and the row of ``top`` [b, D] each belongs to.
    """
    when = np.full((len(top), data.n_items), np.iinfo(np.int64).max)
    keep = chosen[position]
    when[owner[keep], data.item[position[keep]]] = position[keep]
    return np.take_along_axis(when, top, 1)


def _ranges(begin: np.ndarray, end: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges [begin_i, end_i) in a row, and the index i of each."""
    owner = np.repeat(np.arange(len(begin)), end - begin)
    return begin[owner] + count_within(end - begin), owner


def _blocks(n_rows: int, width: int) -> Iterator[Tuple[int, int]]:
    """Row ranges whose [rows, width] array stays within BLOCK_ELEMENTS."""
    size = max(1, BLOCK_ELEMENTS // max(1, int(width)))
    for low in range(0, int(n_rows), size):
        yield low, min(low + size, int(n_rows))
