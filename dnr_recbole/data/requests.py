"""When does a user ask for a list, and what does he do next: interactions → requests.

A request stands at a position of the flat, time-ordered :class:`Interactions` arrays: everything before
``start`` is its past, the positions ``start`` … ``end - 1`` carry its labels. With files of the user's own
(``Interactions.part``) the lines of several files may alternate in time: then only the lines of the request's own
part are labels, and its past holds the parts up to its own, so that no training request ever reads a test line.
All functions are array operations over every user at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, NamedTuple, Optional, Tuple

import numpy as np

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.ranges import blocks, count_within, ranges
from dnr_recbole.data.splits import SPLIT_NAMES, TEST, TRAIN, VALID, register_split, split_last_lists, split_users

__all__ = [
    "NEVER",
    "SPLIT_NAMES",
    "TEST",
    "TRAIN",
    "VALID",
    "Group",
    "RequestTable",
    "blocks",
    "count_within",
    "exposed_requests",
    "first_seen",
    "groups",
    "make_requests",
    "positive_keys",
    "ranges",
    "register_split",
    "retrieved_requests",
    "retriever_part",
    "split_last_lists",
    "split_users",
]

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class RequestTable:
    """R requests, sorted by (user, start).

    Attributes:
        user: int64 [R].
        start: int64 [R], position of the first interaction after the request; the history ends before it.
        end: int64 [R], where the label window ends (exclusive).
        split: int8 [R], TRAIN, VALID or TEST.
        n_positives: int64 [R], unique items clicked in the window (protocol `retrieved`, unless `repeatable`: and
            new to the user).
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


class Group(NamedTuple):
    """Requests that may know the same interactions.

    Attributes:
        rows: int64 [R'], rows of the request table, ascending.
        visible: bool [N], interactions that are the past of a request once they lie before its start.
        own: bool [N], interactions that may be its labels.
    """

    rows: np.ndarray
    visible: np.ndarray
    own: np.ndarray


def groups(data: Interactions, split: np.ndarray) -> Iterator[Group]:
    """All requests at once, or with files of the user's own one group per part; ``split`` int8 [R]."""
    if data.part is None:
        everything = np.ones(len(data), dtype=bool)
        yield Group(np.arange(len(split)), everything, everything)
        return
    for code in (TRAIN, VALID, TEST):
        rows = np.flatnonzero(split == code)
        if len(rows):
            yield Group(rows, data.part <= code, data.part == code)


def make_requests(config: Keys, data: Interactions, end: np.ndarray) -> RequestTable:
    """The requests of ``config``; ``end`` int64 [U] is where the retriever's part of each user ends."""
    if config["protocol"] == "exposed":
        return exposed_requests(data, config["slate_size"], config["split"], config["seed"], end)
    return retrieved_requests(
        data,
        end,
        config["label_window"],
        config["request_stride"],
        config["slate_size"],
        config["split"],
        config["seed"],
        config["repeatable"],
    )


def exposed_requests(
    data: Interactions, slate_size: int, split: str, seed: int, end: Optional[np.ndarray] = None
) -> RequestTable:
    """Each user's interactions cut into consecutive lists of ``slate_size``.

    The incomplete tail and lists without a click are dropped. ``end`` [U], where the retriever's part ends, is
    needed for ``split='user'``, whose held-out users keep the lists that begin after it, and for own files, whose
    training lists begin after it.
    """
    own_files = data.part is not None
    pieces = []
    for code, lines in _label_lines(data, end if own_files and end is not None else data.ptr[:-1]):
        length = np.bincount(data.user[lines], minlength=data.n_users)
        n_lists = length // slate_size
        user = np.repeat(np.arange(data.n_users), n_lists)
        first = (np.cumsum(length) - length)[user] + slate_size * count_within(n_lists)
        pieces.append((user, lines[first[:, None] + np.arange(slate_size)], np.full(len(user), code, np.int8)))
    user, block, code = (np.concatenate(column) for column in zip(*pieces))
    order = np.lexsort((block[:, 0], user))
    order = order[data.click[block[order]].any(1)]
    user, block, code = user[order], block[order], code[order]
    if not own_files and split == "last":
        code = split_last_lists(user)
    elif not own_files:
        code, keep = _hold_out_users(user, block[:, 0], end, split, seed)
        user, block, code = user[keep], block[keep], code[keep]

    # An item repeated within a list is one candidate, clicked if any of its showings was.
    item, click = data.item[block], data.click[block]
    same = item[:, :, None] == item[:, None, :]
    repeated = (same & np.tri(slate_size, k=-1, dtype=bool)).any(2)
    clicked = (same & click[:, None, :]).any(2) & ~repeated
    return RequestTable(
        user=user,
        start=block[:, 0],
        end=block[:, -1] + 1,
        split=code,
        n_positives=clicked.sum(1),
        exposed=np.where(repeated, 0, item),
        clicked=clicked,
    )


def retrieved_requests(
    data: Interactions,
    later: np.ndarray,
    window: int,
    stride: int,
    slate_size: int,
    split: str,
    seed: int,
    repeatable: bool = False,
) -> RequestTable:
    """Requests every ``stride`` interactions of each user's later part, labelled by the next ``window`` ones.

    ``later`` int64 [U] is the absolute position where the later part (unknown to the retriever) begins. A
    user whose later part is shorter than the window has one request at its beginning with the truncated
    window, if at least ``slate_size`` interactions follow (own validation and test files: at least one).

    ``split='last'``: the windows of different splits of a user never overlap. Test is the latest request
    whose full window fits; validation the latest whose window ends before the test request; training all
    whose windows end before the validation (or test) request. ``split='user'``: whole users are held out, so
    windows may overlap; as they may within a part of the user's own.

    Validation and test requests without a positive are dropped; training ones are kept, to be filtered with
    the labels.
    """
    pieces = []
    for code, lines in _label_lines(data, later):
        room = np.bincount(data.user[lines], minlength=data.n_users)
        if data.part is None and split == "last":
            user, begin, stop, codes = _windows_of_last(room, window, stride, slate_size)
        else:
            user, begin, stop = _windows(room, window, stride, slate_size if code == TRAIN else 1)
            codes = np.full(len(user), code, np.int8)
        first = (np.cumsum(room) - room)[user]
        pieces.append((user, lines[first + begin], lines[first + stop - 1] + 1, codes))
    user, start, end, code = (np.concatenate(column) for column in zip(*pieces))
    order = np.lexsort((start, user))
    user, start, end, code = user[order], start[order], end[order], code[order]
    if data.part is None and split != "last":
        code = split_users(user, split, seed)
    n_positives = _count_positives(data, start, end, code, retriever_part(data, later), repeatable)
    keep = (code == TRAIN) | (n_positives > 0)
    return RequestTable(user[keep], start[keep], end[keep], code[keep], n_positives[keep])


def retriever_part(data: Interactions, end: np.ndarray) -> np.ndarray:
    """bool [N]: the interactions before ``end`` [U] of each user; of own files, the train lines among them."""
    part = np.arange(len(data)) < end[data.user]
    return part if data.part is None else part & (data.part == TRAIN)


def first_seen(data: Interactions, visible: np.ndarray, known: Optional[np.ndarray] = None) -> np.ndarray:
    """Where the user first met the item of each interaction, int64 [N]: a position, or NEVER where not ``visible``.

    Items of the interactions ``known`` (bool [N]: what the retriever was fitted on) count as met before everything
    else: -1. In own files such a line may be younger than the request.
    """
    pair = data.user * data.n_items + data.item
    lines = np.flatnonzero(visible)
    _, first, inverse = np.unique(pair[lines], return_index=True, return_inverse=True)
    out = np.full(len(data), NEVER)
    out[lines] = lines[first[inverse]]
    if known is not None:
        out[np.isin(pair, pair[known])] = -1
    return out


def positive_keys(
    data: Interactions, start: np.ndarray, end: np.ndarray, own: np.ndarray, seen: Optional[np.ndarray]
) -> np.ndarray:
    """What is clicked in each window: sorted unique ``row * n_items + item``; ``start``, ``end`` int64 [r].

    Only interactions in ``own`` (bool [N]) count; with ``seen`` (int64 [N], see :func:`first_seen`) only items that
    the user had not met before the start.
    """
    position, row = ranges(start, end)
    keep = data.click[position] & own[position]
    if seen is not None:
        keep &= seen[position] >= start[row]
    return np.unique(row[keep] * data.n_items + data.item[position[keep]])


def _label_lines(data: Interactions, begin: np.ndarray) -> Iterator[Tuple[int, np.ndarray]]:
    """(TRAIN, all interactions from ``begin`` [U] on); of own files per part (its code, its lines), the training
    lines from ``begin`` on: int64 [M], ascending."""
    later = np.arange(len(data)) >= begin[data.user]
    if data.part is None:
        yield TRAIN, np.flatnonzero(later)
        return
    for code in (TRAIN, VALID, TEST):
        yield code, np.flatnonzero((data.part == code) & (later | (code != TRAIN)))


def _hold_out_users(
    user: np.ndarray, start: np.ndarray, end: Optional[np.ndarray], split: str, seed: int
) -> Tuple[np.ndarray, np.ndarray]:
    """Split code of every list (int8 [R]) and which to keep (bool [R]), for ``split='user'``.

    Users are drawn among those with a list after the retriever's part; the others can only train.
    """
    after = np.ones(len(user), dtype=bool) if end is None else start >= end[user]
    of_user = np.full(int(user.max(initial=0)) + 1, TRAIN, dtype=np.int8)
    of_user[user[after]] = split_users(user[after], split, seed)
    code = of_user[user]
    return code, after | (code == TRAIN)


def _windows(room: np.ndarray, window: int, stride: int, minimum: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Full windows within ``room`` [U], or one truncated one of at least ``minimum``: user, begin, end offsets [R]."""
    full = (room - window) // stride + 1
    count = np.where(room >= window, full, (room >= minimum).astype(np.int64))
    user = np.repeat(np.arange(len(room)), count)
    begin = stride * count_within(count)
    return user, begin, np.minimum(begin + window, room[user])


def _windows_of_last(room: np.ndarray, window: int, stride: int, minimum: int) -> Tuple[np.ndarray, ...]:
    """Windows under ``split='last'``: user, begin, end offsets and split code [R]."""
    test, test_end = _latest_request(room, window, stride, minimum)  # offsets [U]; -1 = no such request
    valid, valid_end = _latest_request(test, window, stride, minimum)
    bound = np.where(valid >= 0, valid, test)
    n_train = np.where(bound >= window, (bound - window) // stride + 1, 0)
    has_valid, has_test = np.flatnonzero(valid >= 0), np.flatnonzero(test >= 0)
    train = stride * count_within(n_train)
    return (
        np.concatenate([np.repeat(np.arange(len(room)), n_train), has_valid, has_test]),
        np.concatenate([train, valid[has_valid], test[has_test]]),
        np.concatenate([train + window, valid_end[has_valid], test_end[has_test]]),
        np.repeat(np.array([TRAIN, VALID, TEST], dtype=np.int8), [len(train), len(has_valid), len(has_test)]),
    )


def _latest_request(room: np.ndarray, window: int, stride: int, minimum: int) -> Tuple[np.ndarray, np.ndarray]:
    """The latest request whose window ends within ``room`` [U]: (start, end) offsets [U]; start -1 = none."""
    start = np.where(room >= window, (room - window) // stride * stride, np.where(room >= minimum, 0, -1))
    return start, np.minimum(start + window, room)


def _count_positives(
    data: Interactions, start: np.ndarray, end: np.ndarray, split: np.ndarray, known: np.ndarray, repeatable: bool
) -> np.ndarray:
    """int64 [R], see :attr:`RequestTable.n_positives`; ``known`` bool [N]: what the retriever was fitted on."""
    count = np.zeros(len(start), dtype=np.int64)
    for rows, visible, own in groups(data, split):
        seen = None if repeatable else first_seen(data, visible, known)
        for low, high in blocks(len(rows), int((end[rows] - start[rows]).max(initial=1))):
            r = rows[low:high]
            keys = positive_keys(data, start[r], end[r], own, seen)
            count[r] = np.bincount(keys // data.n_items, minlength=len(r))
    return count
