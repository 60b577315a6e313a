"""Interactions → requests: hand-computed cases and the properties that keep evaluation honest."""

import numpy as np
import pytest
from data_helpers import make_interactions, random_interactions

from dnr_recbole.data.requests import exposed_requests, first_seen, retrieved_requests
from dnr_recbole.data.splits import TEST, TRAIN, VALID, split_users
from dnr_recbole.errors import UnknownNameError


def clicks(*flags, first=1):
    return [(first + i, bool(f)) for i, f in enumerate(flags)]


def test_exposed_lists_by_hand():
    data = make_interactions(
        [
            clicks(1, 0, 0, 0, 0, 1, 1, 1, 1),  # lists 10 | 00 | 01 | 11, tail 1
            clicks(0, 1, 1, 0),  # lists 01 | 10
            clicks(1),  # too short
            clicks(0, 0, 1, 0),  # lists 00 | 10
        ],
        n_items=9,
    )
    table = exposed_requests(data, slate_size=2, split="last", seed=0)
    assert table.user.tolist() == [1, 1, 1, 2, 2, 4]
    assert table.start.tolist() == [0, 4, 6, 9, 11, 16]
    assert table.split.tolist() == [TRAIN, VALID, TEST, VALID, TEST, TEST]
    assert table.exposed.tolist() == [[1, 2], [5, 6], [7, 8], [1, 2], [3, 4], [3, 4]]
    assert table.clicked.tolist() == [[1, 0], [0, 1], [1, 1], [0, 1], [1, 0], [1, 0]]
    assert table.n_positives.tolist() == [1, 1, 2, 1, 1, 1]


def test_exposed_item_repeated_in_a_list_is_one_candidate():
    data = make_interactions([[(7, False), (7, True), (3, False), (3, False), (4, True), (4, True)]], n_items=9)
    table = exposed_requests(data, slate_size=3, split="last", seed=0)
    assert table.exposed.tolist() == [[7, 0, 3], [3, 4, 0]]
    assert table.clicked.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert table.n_positives.tolist() == [1, 1]


def request_tuples(lengths, later, split="last", window=4, stride=2, slate_size=2):
    data = make_interactions([clicks(*[1] * n) for n in lengths], n_items=max(lengths))
    start = data.ptr[:-1] + np.array([0, *later])
    table = retrieved_requests(data, start, window, stride, slate_size, split, seed=0)
    offset = start[table.user]
    return list(zip(table.user, table.start - offset, table.end - offset, table.split))


def test_retrieved_requests_by_hand():
    # 11 later interactions: the latest full window starts at 6; what is before it, 6, holds [2, 6); before
    # that, 2 interactions remain, too few for a training window.
    assert request_tuples([15], [4]) == [(1, 2, 6, VALID), (1, 6, 10, TEST)]
    # 16: test [12, 16), validation [8, 12), training [0, 4), [2, 6), [4, 8): they may overlap each other.
    assert request_tuples([20], [4]) == [
        (1, 0, 4, TRAIN), (1, 2, 6, TRAIN), (1, 4, 8, TRAIN), (1, 8, 12, VALID), (1, 12, 16, TEST),
    ]  # fmt: skip
    # 7: test [2, 6), validation truncated to [0, 2). 5: test [0, 4) only. 3: truncated test. 1: nothing.
    assert request_tuples([9, 7, 5, 3], [2, 2, 2, 2]) == [
        (1, 0, 2, VALID), (1, 2, 6, TEST), (2, 0, 4, TEST), (3, 0, 3, TEST),
    ]  # fmt: skip


def test_retrieved_requests_split_by_user():
    found = request_tuples([12, 5, 3] * 10, [2, 2, 2] * 10, split="user")
    assert len({(u, s) for u, _, _, s in found}) == len({u for u, *_ in found}) == 20
    assert [(a, b) for u, a, b, _ in found if u == 1] == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert [(a, b) for u, a, b, _ in found if u == 2] == [(0, 3)]


@pytest.mark.parametrize("seed", range(20))
def test_windows_of_different_splits_never_overlap(seed):
    rng = np.random.default_rng(seed)
    data = random_interactions(seed, n_users=40, longest=60)
    later = data.split_positions(float(rng.uniform(0.2, 0.8)))
    window, stride, k = (int(rng.integers(1, high)) for high in (12, 6, 5))
    table = retrieved_requests(data, later, window, stride, k, "last", seed)
    assert len(table)
    assert (table.start >= later[table.user]).all() and (table.end <= data.ptr[table.user + 1]).all()
    for user in np.unique(table.user):
        mine = table.user == user
        for earlier, next_one in ((TRAIN, VALID), (TRAIN, TEST), (VALID, TEST)):
            ends, starts = (
                table.end[mine & (table.split == earlier)],
                table.start[mine & (table.split == next_one)],
            )
            assert not len(ends) or not len(starts) or ends.max() <= starts.min()
        assert (table.split[mine] == TEST).sum() <= 1 and (table.split[mine] == VALID).sum() <= 1


def test_positives_are_new_unique_clicks():
    events = [(1, True), (2, False), (1, True), (3, True), (3, True), (2, True), (4, False), (4, True)]
    data = make_interactions([events], n_items=5)
    table = retrieved_requests(data, np.array([0, 2]), 6, 6, 2, "last", seed=0)
    assert table.n_positives.tolist() == [2]  # 3 and 4; 1 and 2 were met before
    everything = np.ones(len(data), dtype=bool)
    assert first_seen(data, everything).tolist() == [0, 1, 0, 3, 3, 1, 6, 6]
    again = retrieved_requests(data, np.array([0, 2]), 6, 6, 2, "last", seed=0, repeatable=True)
    assert again.n_positives.tolist() == [4]


def test_users_are_split_8_1_1():
    user = np.repeat(np.arange(1, 101), 3)
    split = split_users(user, "user", seed=5)
    assert [len(set(user[split == code])) for code in (TRAIN, VALID, TEST)] == [80, 10, 10]
    assert (split.reshape(100, 3) == split[::3, None]).all()
    assert (split == split_users(user, "user", seed=5)).all()
    assert (split != split_users(user, "user", seed=6)).any()
    with pytest.raises(UnknownNameError, match="split of users 'random' is unknown; choose one of user"):
        split_users(user, "random", seed=0)
