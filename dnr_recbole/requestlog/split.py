"""Which requests of a log are trained, validated and tested on, and which only knowledge is taken from."""

from __future__ import annotations

import numpy as np

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.splits import TEST, TRAIN, VALID
from dnr_recbole.errors import DataError
from dnr_recbole.requestlog.scan import Scan

EMPTY = 4  # split code of requests without a candidate
KNOWLEDGE = 3  # split code of the requests that item spaces and popularity are made of, and no reranker learns from


def choose_split(config: Keys, found: Scan) -> np.ndarray:
    """int8 [R]: the log's own column, or the newest requests as test and those before as validation.

    A request without a candidate is :data:`EMPTY`. Of the training requests, the oldest ``knowledge_share`` becomes
    :data:`KNOWLEDGE` under ``knowledge: oldest``.
    """
    n = len(found)
    time = np.arange(n) if found.time is None else found.time
    order = np.argsort(time, kind="stable")
    if (found.split >= 0).all() and n:
        split = found.split.copy()
    else:
        n_test, n_valid = (max(1, round(config[key] * n)) for key in ("test_share", "valid_share"))
        if n < 3 or n_test + n_valid >= n:
            raise DataError(f"{n} requests are too few to be divided into training, validation and test")
        split = np.full(n, TRAIN, dtype=np.int8)
        split[order[n - n_test :]] = TEST
        split[order[n - n_test - n_valid : n - n_test]] = VALID
    split[found.candidates == 0] = EMPTY
    if config["knowledge"] == "oldest":
        trained = order[split[order] == TRAIN]
        split[trained[: int(config["knowledge_share"] * len(trained))]] = KNOWLEDGE
    return split
