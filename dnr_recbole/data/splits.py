"""Which requests are for training, validation and test: whole users, or the last requests of each."""

from __future__ import annotations

from typing import Callable

import numpy as np

from dnr_recbole.names import Names

TRAIN, VALID, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "valid", "test")
USER_SPLIT_SHARES = (0.8, 0.1, 0.1)


def split_users(user: np.ndarray, split: str, seed: int) -> np.ndarray:
    """Whole users to training, validation and test → int8 [R]; ``user`` [R] is sorted.

    Raises:
        UnknownNameError: nobody registered the split.
    """
    present, row = np.unique(user, return_inverse=True)
    return np.asarray(SPLITS.find(split)(present, seed)).astype(np.int8)[row]


# (ids of the users int64 [U], seed) -> TRAIN, VALID or TEST for each of them, [U].
Split = Callable[[np.ndarray, int], np.ndarray]
SPLITS: Names[Split] = Names("split of users", "split")


def register_split(name: str) -> Callable[[Split], Split]:
    """Decorator: ``assign(users, seed)``, which holds out whole users, becomes ``split: name``."""
    return SPLITS.register(name)


@register_split("user")
def at_random(users: np.ndarray, seed: int) -> np.ndarray:
    """8:1:1."""
    bounds = np.floor(np.cumsum(USER_SPLIT_SHARES[:2]) * len(users) + 0.5).astype(np.int64)
    return np.searchsorted(bounds, np.random.default_rng(seed).permutation(len(users)), side="right")


def split_last_lists(user: np.ndarray) -> np.ndarray:
    """The last request of a user is for test, the one before for validation: int8 [R]; ``user`` is sorted."""
    split = np.full(len(user), TRAIN, dtype=np.int8)
    ends = np.flatnonzero(np.diff(user, append=-1))
    split[ends] = TEST
    before = ends[ends > 0] - 1
    split[before[user[before] == user[before + 1]]] = VALID
    return split
