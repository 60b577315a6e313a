"""When does a user ask for a list, and what does he do next: interactions → requests.

A request stands at a position of the flat, time-ordered :class:`Interactions` arrays: everything before
``start`` is its past, the positions ``start`` … ``end - 1`` carry its labels. Nothing here knows a retriever.
All functions are array operations over every user at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np

from dnr_recbole.data.interactions import Interactions
from dnr_recbole.errors import ConfigError

TRAIN, VALID, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "valid", "test")
USER_SPLIT_SHARES = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class RequestTable:
    """R requests, sorted by (user, start).

    Attributes:
        user: int64 [R].
        start: int64 [R], position of the first interaction after the request; the history ends before it.
        end: int64 [R], where the label window ends (exclusive).
        split: int8 [R], TRAIN, VALID or TEST.
        n_positives: int64 [R], unique items clicked in the window (protocol `retrieved`: and new to the
            user).
        exposed: int64 [R, K], the items shown, 0 where an item repeats within the list; None if exposure is
            not used.
        clicked: bool [R, K], whether the exposed item was clicked; None together with ``exposed``.
    """

    user: np.ndarray
    start: np.ndarray
    end: np.ndarray
    split: np.ndarray
    n_positives: np.ndarray
    exposed: Optional[np.ndarray] = None
    clicked: Optional[np.ndarray] = None

    def __len__(self) -> int:
        return len(self.user)


def exposed_requests(data: Interactions, slate_size: int, split: str, seed: int) -> RequestTable:
    """Each user's interactions cut into consecutive lists of ``slate_size``.

    The incomplete tail and lists without a click are dropped.
    """
    n_lists = data.lengths // slate_size
    user = np.repeat(np.arange(data.n_users), n_lists)
    start = data.ptr[user] + slate_size * count_within(n_lists)
    block = start[:, None] + np.arange(slate_size)
    item, click = data.item[block], data.click[block]
    keep = click.any(1)
    user, start, item, click = user[keep], start[keep], item[keep], click[keep]

    # An item repeated within a list is one candidate, clicked if any of its showings was.
    same = item[:, :, None] == item[:, None, :]
    repeated = (same & np.tri(slate_size, k=-1, dtype=bool)).any(2)
    clicked = (same & click[:, None, :]).any(2) & ~repeated
    return RequestTable(
        user=user,
        start=start,
        end=start + slate_size,
        split=split_last_lists(user) if split == "last" else split_users(user, split, seed),
        n_positives=clicked.sum(1),
        exposed=np.where(repeated, 0, item),
        clicked=clicked,
    )


def retrieved_requests(
    data: Interactions, later: np.ndarray, window: int, stride: int, slate_size: int, split: str, seed: int
) -> RequestTable:
    """Requests every ``stride`` interactions of each user's later part, labelled by the next ``window`` ones.

    ``later`` int64 [U] is the absolute position where the later part (unknown to the retriever) begins. A
    user whose later part is shorter than the window has one request at its beginning with the truncated
    window, if at least ``slate_size`` interactions follow.

    ``split='last'``: the windows of different splits of a user never overlap. Test is the latest request
    whose full window fits; validation the latest whose window ends before the test request; training all
    whose windows end before the validation (or test) request. ``split='user'``: whole users are held out, so
    windows may overlap.

    Validation and test requests without a positive are dropped; training ones are kept, to be filtered with
    the labels.
    """
    room = data.ptr[1:] - later
    if split == "last":
        # All of these are offsets from `later`, [U]; -1 = no such request.
        test, test_end = _latest_request(room, window, stride, slate_size)
        valid, valid_end = _latest_request(test, window, stride, slate_size)
        bound = np.where(valid >= 0, valid, test)
        n_train = np.where(bound >= window, (bound - window) // stride + 1, 0)
        has_valid, has_test = np.flatnonzero(valid >= 0), np.flatnonzero(test >= 0)
        train_user = np.repeat(np.arange(data.n_users), n_train)
        train = stride * count_within(n_train)
        user = np.concatenate([train_user, has_valid, has_test])
        offset = np.concatenate([train, valid[has_valid], test[has_test]])
        end = np.concatenate([train + window, valid_end[has_valid], test_end[has_test]])
        code = np.repeat(np.int8([TRAIN, VALID, TEST]), [len(train), len(has_valid), len(has_test)])
    else:
        n_full = np.where(room >= window, (room - window) // stride + 1, 0)
        count = np.where(room >= window, n_full, (room >= slate_size).astype(np.int64))
        user = np.repeat(np.arange(data.n_users), count)
        offset = stride * count_within(count)
        end = np.minimum(offset + window, room[user])
        code = split_users(user, split, seed)
    order = np.lexsort((offset, user))
    user, code = user[order], code[order]
    start, end = later[user] + offset[order], later[user] + end[order]
    n_positives = _count_new_clicks(data, start, end, window)
    keep = (code == TRAIN) | (n_positives > 0)
    return RequestTable(user[keep], start[keep], end[keep], code[keep], n_positives[keep])


def first_occurrences(data: Interactions) -> Tuple[np.ndarray, np.ndarray]:
    """Where each (user, item) pair was first seen, and which positions are its first click.

    Returns int64 [N] (position of the pair's first interaction) and bool [N] (is this the pair's first
    click).
    """
    pair = data.user * data.n_items + data.item
    _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
    first_seen = first[inverse]
    clicks = np.flatnonzero(data.click)
    _, first_of_clicks = np.unique(pair[clicks], return_index=True)
    first_click = np.zeros(len(data), dtype=bool)
    first_click[clicks[first_of_clicks]] = True
    return first_seen, first_click


def split_users(user: np.ndarray, split: str, seed: int) -> np.ndarray:
    """Whole users at random to training, validation and test, 8:1:1 → int8 [R]; ``user`` [R] is sorted."""
    if split != "user":
        raise ConfigError(f"split '{split}' is unknown; choose 'last' or 'user'")
    present, row = np.unique(user, return_inverse=True)
    bounds = np.floor(np.cumsum(USER_SPLIT_SHARES[:2]) * len(present) + 0.5).astype(np.int64)
    rank = np.random.default_rng(seed).permutation(len(present))
    return np.searchsorted(bounds, rank, side="right").astype(np.int8)[row]


def split_last_lists(user: np.ndarray) -> np.ndarray:
    """The last request of a user is for test, the one before for validation: int8 [R]; ``user`` is sorted."""
    split = np.full(len(user), TRAIN, dtype=np.int8)
    ends = np.flatnonzero(np.diff(user, append=-1))
    split[ends] = TEST
    before = ends[ends > 0] - 1
    split[before[user[before] == user[before + 1]]] = VALID
    return split


def _latest_request(
    room: np.ndarray, window: int, stride: int, minimum: int
) -> Tuple[np.ndarray, np.ndarray]:
    """The latest request whose window ends within ``room`` [U]: (start, end) offsets [U]; start -1 = none."""
    start = np.where(room >= window, (room - window) // stride * stride, np.where(room >= minimum, 0, -1))
    return start, np.minimum(start + window, room)


def count_within(counts: np.ndarray) -> np.ndarray:
    """0, 1, …, counts[0] - 1, 0, 1, …, counts[1] - 1, …"""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _count_new_clicks(data: Interactions, start: np.ndarray, end: np.ndarray, window: int) -> np.ndarray:
    """Unique items clicked at positions start … end - 1 that the user had not met before start: int64 [R]."""
    first_seen, first_click = first_occurrences(data)
    count = np.zeros(len(start), dtype=np.int64)
    for ahead in range(window):  # one pass per position of the window keeps memory at [R]
        position = np.minimum(start + ahead, len(data) - 1)
        count += (start + ahead < end) & first_click[position] & (first_seen[position] >= start)
    return count
