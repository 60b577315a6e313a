"""What users did when: a log's clicks in the order of time, as histories of requests and users and for item spaces."""

from __future__ import annotations

from functools import cached_property
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from dnr_recbole.data.ranges import ranges
from dnr_recbole.data.spaces import Known
from dnr_recbole.requestlog.preprocessor import Histories, Preprocessor
from dnr_recbole.requestlog.scan import Scan
from dnr_recbole.requestlog.storage import Store

_ROWS = 1 << 16  # requests at a time

Arrays = Dict[str, np.ndarray]


class Clicks(NamedTuple):
    """Positives in the order of their requests: request and item row, int64 [m] each."""

    request: np.ndarray
    item: np.ndarray

    @classmethod
    def of(cls, arrays: Arrays) -> Clicks:
        """Every click of a log. Not all candidates at once: their arrays may be larger than the memory."""
        requests, items = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(arrays["labels"]), _ROWS):
            row, column = np.nonzero(arrays["labels"][start : start + _ROWS])
            requests.append(row + start)
            items.append(arrays["candidates"][row + start, column].astype(np.int64))
        return cls(np.concatenate(requests), np.concatenate(items))

    def among(self, chosen: np.ndarray) -> Clicks:
        """Those of the requests that are marked, bool [R]."""
        kept = chosen[self.request]
        return Clicks(self.request[kept], self.item[kept])

    def per_item(self, chosen: np.ndarray, n_items: int) -> np.ndarray:
        """int64 [n_items]: clicks on each item in the requests that are marked."""
        return np.bincount(self.among(chosen).item, minlength=n_items)


class Timeline:
    """The clicks of one log in the order of time.

    Args:
        found: what the scan has found in it.
        stored: what users did before the log; None = nothing is known.
    """

    def __init__(self, found: Scan, stored: Optional[Histories] = None) -> None:
        self.found, self.stored = found, stored
        self._clicks: Optional[Clicks] = None

    def clicks(self, arrays: Arrays) -> Clicks:
        """Every click of the log, whose arrays these are; collected once."""
        if self._clicks is None:
            self._clicks = Clicks.of(arrays)
        return self._clicks

    @cached_property
    def when(self) -> np.ndarray:
        """int64 [R]: requests in the order of time; those at the same time share a number."""
        if self.found.time is None:
            return np.arange(len(self.found))
        return np.unique(self.found.time, return_inverse=True)[1].astype(np.int64)

    def histories(self, preprocessor: Preprocessor, arrays: Arrays, store: Store) -> Arrays:
        """Flat history items and each request's range of them, from each user's earlier clicks (and, in front of
        them, what he is known to have done before the log)."""
        request, item = self.clicks(arrays)
        when = self.when
        span = int(when.max(initial=0)) + 1
        user = self.found.user.astype(np.int64)  # by the log's own numbers: unknown users are different people
        known = user[request] >= 0
        owner, time, item = user[request][known], when[request][known] + 1, item[known]
        if self.stored is not None:
            before, items = _of_users(self.stored, preprocessor.users.rows(self.found.users.list()))
            owner, time, item = np.append(before, owner), np.append(np.zeros_like(before), time), np.append(items, item)
        key = owner * (span + 1) + time
        order = np.argsort(key, kind="stable")
        key = key[order]
        begin = np.searchsorted(key, user * (span + 1))
        end = np.where(user >= 0, np.searchsorted(key, user * (span + 1) + when + 1), begin)
        items = store.make("history_items", (len(item) + 1,), np.int32)
        items[:-1] = item[order]
        return {"history_items": items, **store.keep(history_begin=begin, history_end=end)}

    def known(self, arrays: Arrays, chosen: np.ndarray, n_users: int, n_items: int, dim: int, step: int) -> Known:
        """What the marked requests show of who liked what, in each user's order.

        The clicks of each user, and before them the history that his first request brought with it. A request without a
        user counts as a user of its own.

        Args:
            arrays: of the log.
            chosen: bool [R].
            n_users, n_items: rows of the tables.
            dim: of the spaces.
            step: number of folds of users.
        """
        request, item = self.clicks(arrays).among(chosen)
        when, user = self.when, arrays["users"].astype(np.int64)
        nobody = np.flatnonzero(user == 0)
        # Numbers in the fold of user 0, which is what such a request reads.
        first_free = -(-n_users // step)
        user[nobody] = (first_free + np.arange(len(nobody))) * step
        parts = [(user[request], when[request], item)]
        if self.found.has_history:
            rows = np.flatnonzero(chosen)
            order = rows[np.lexsort((when[rows], user[rows]))]
            first = order[np.unique(user[order], return_index=True)[1]]
            parts.append(_brought_along(arrays, first, user))
        users, times, items = _joined(parts)
        order = np.lexsort((times, users))
        return Known(
            user=users[order],
            item=items[order].astype(np.int64),
            n_users=int(max(n_users, user.max(initial=0) + 1)),
            n_items=n_items,
            dim=dim,
        )

    def last_histories(self, preprocessor: Preprocessor, arrays: Arrays) -> Histories:
        """The newest items of every user, as a request right after the log would find them."""
        user, when, length = arrays["users"].astype(np.int64), self.when, preprocessor.history_length
        parts: List[Tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        request, item = self.clicks(arrays)
        since = np.full(len(preprocessor.users), -1)
        if self.found.has_history:
            order = np.lexsort((when, user))
            last = order[np.append(np.flatnonzero(np.diff(user[order])), len(order) - 1)]
            since[user[last]] = when[last]
            parts.append(_brought_along(arrays, last, user))
        elif self.stored is not None:
            before, items = _of_users(self.stored, np.arange(len(preprocessor.users)))
            parts.append((before, np.full(len(before), -1), items))
        later = when[request] >= since[user[request]]
        parts.append((user[request][later], when[request][later], item[later]))
        users, times, items = _joined(parts)
        known = users > 0
        users, times, items = users[known], times[known], items[known]
        order = np.lexsort((times, users))
        users, items = users[order], items[order]
        count = np.bincount(users, minlength=len(preprocessor.users))
        end = np.cumsum(count)
        new = end[users] - np.arange(len(users)) <= length
        count = np.bincount(users[new], minlength=len(count))
        return Histories(np.concatenate([[0], np.cumsum(count)]), items[new].astype(np.int32))


def given_histories(given: List[Tuple[np.ndarray, np.ndarray]], store: Store) -> Arrays:
    """The same where the log brings histories: (ptr, item rows) of each batch of requests."""
    length = np.concatenate([np.diff(ptr) for ptr, _ in given])
    items = store.make("history_items", (int(length.sum()) + 1,), np.int32)
    place = 0
    for _, part in given:
        items[place : place + len(part)] = part
        place += len(part)
    end = np.cumsum(length)
    return {"history_items": items, **store.keep(history_begin=end - length, history_end=end)}


def _of_users(stored: Histories, rows: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The histories of some users (rows of the tables) from before the log: number of the user, item row."""
    rows = np.where(rows < len(stored.ptr) - 1, rows, 0)
    place, owner = ranges(stored.ptr[rows], stored.ptr[rows + 1])
    return owner, stored.items[place].astype(np.int64)


def _brought_along(arrays: Arrays, requests: np.ndarray, user: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The histories of some requests as (user, time, item); the time is before that of any click."""
    place, owner = ranges(arrays["history_begin"][requests], arrays["history_end"][requests])
    return user[requests][owner], np.full(len(owner), -1), arrays["history_items"][place]


def _joined(parts: List[Tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, times, items = (np.concatenate(each) for each in zip(*parts))
    return users, times, items
