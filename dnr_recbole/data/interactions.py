"""The interactions of a RecBole dataset as flat numpy arrays in each user's time order.

RecBole turns every float column into a float32 tensor when it builds its data loaders. Unix timestamps need
31 bits and float32 has 24, so events up to two minutes apart would tie. Hence the arrays are read from the
pandas frame, before that conversion, and all later stages (requests, candidates, retriever) cut time by
*position* in these arrays.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Optional

import numpy as np
import pandas as pd

from dnr_recbole.config_schema import Keys
from dnr_recbole.errors import DataError

# Column of ``inter_feat`` that says which of the user's own files a line is from (`benchmark_filename`).
PART_FIELD = "__part__"
# 0.29 * 100 is 28.999…96 in binary: without this a fraction of a length would lose one item now and then.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interactions:
    """All N interactions, sorted by (user, time, order in the file); U users including the padding user 0.

    Attributes:
        user: int64 [N], RecBole's internal user ids (0 never occurs).
        item: int64 [N], RecBole's internal item ids (0 never occurs).
        time: float64 [N]; the order in the file if the dataset has no time field.
        rating: float32 [N], or None if the dataset has no rating field.
        click: bool [N], rating >= label_threshold; all True without a rating field.
        ptr: int64 [U + 1]; the interactions of user u are at positions ptr[u] … ptr[u + 1] - 1.
        row: int64 [N], the row of ``dataset.inter_feat`` each position comes from.
        n_items: number of items including the padding item 0.
        part: int8 [N], 0 train, 1 valid, 2 test: the file each line is from; None without `benchmark_filename`.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    rating: Optional[np.ndarray]
    click: np.ndarray
    ptr: np.ndarray
    row: np.ndarray
    n_items: int
    part: Optional[np.ndarray] = None

    @classmethod
    def from_recbole(cls, dataset: Any, config: Keys) -> "Interactions":
        """Read ``dataset.inter_feat``, still a pandas frame (``dataset.build()`` not called yet)."""
        frame = dataset.inter_feat
        if not isinstance(frame, pd.DataFrame):
            raise DataError(
                f"dataset '{dataset.dataset_name}' was already converted to float32 tensors, which makes "
                "timestamps tie; read the interactions right after create_dataset(), before build()"
            )
        if len(frame) == 0:
            raise DataError(
                f"dataset '{dataset.dataset_name}' has no interaction left after filtering; "
                "check user_inter_num_interval, item_inter_num_interval and val_interval"
            )
        user = frame[dataset.uid_field].to_numpy(dtype=np.int64)
        item = frame[dataset.iid_field].to_numpy(dtype=np.int64)
        time = _time(frame, dataset)
        part = frame[PART_FIELD].to_numpy(dtype=np.int8) if PART_FIELD in frame else None
        # Stable: equal times stay in file order; of own files, train before validation before test.
        order = np.lexsort((time, user) if part is None else (part, time, user))
        user, item, time = user[order], item[order], time[order]

        rating, click = None, np.ones(len(frame), dtype=bool)
        if config["RATING_FIELD"] in frame:
            rating = frame[config["RATING_FIELD"]].to_numpy(dtype=np.float32)[order]
            click = rating >= np.float32(config["label_threshold"])
        ptr = np.zeros(dataset.user_num + 1, dtype=np.int64)
        np.cumsum(np.bincount(user, minlength=dataset.user_num), out=ptr[1:])
        part = None if part is None else part[order]
        return cls(user, item, time, rating, click, ptr, order.astype(np.int64), int(dataset.item_num), part)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def n_users(self) -> int:
        """Number of users including the padding user 0."""
        return len(self.ptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Interactions per user, int64 [U]."""
        return np.diff(self.ptr)

    def digest(self) -> str:
        """sha256 over what happened: users, items, times, clicks and own parts, after filtering."""
        digest = hashlib.sha256()
        for array in (self.user, self.item, self.time, self.click, self.part):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def split_positions(self, fraction: float) -> np.ndarray:
        """Where each user's later part begins: int64 [U], absolute positions; see :func:`earlier_count`."""
        return self.ptr[:-1] + earlier_count(self.lengths, fraction)


def earlier_count(length: np.ndarray, fraction: float) -> np.ndarray:
    """How many of ``length`` interactions are the earlier part: ``floor(length * fraction)``, but at least one of any
    (so nothing is later than a single one); int64, the shape of ``length``."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    earlier = np.floor(length * fraction + _ROUNDING).astype(np.int64)
    return np.minimum(np.maximum(earlier, 1), length)


def _time(frame: pd.DataFrame, dataset: Any) -> np.ndarray:
    if dataset.time_field is None or dataset.time_field not in frame:
        getLogger(__name__).warning(
            "the dataset has no time field: interactions are taken to be in time order in the file"
        )
        return np.arange(len(frame), dtype=np.float64)
    try:
        return frame[dataset.time_field].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"time field '{dataset.time_field}' of dataset '{dataset.dataset_name}' is not numeric; "
            f"declare it as '{dataset.time_field}:float' in the .inter file"
        ) from error
