"""Where the retriever's part of each user ends: decided once, before stage 1, for every protocol and split.

The retriever, its metrics, the requests and the candidates all read :func:`retriever_end`; :func:`check_cut`
guards what it promises: the retriever is never fitted on the label of a request that is evaluated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.interactions import Interactions, earlier_count
from dnr_recbole.data.requests import RequestTable, exposed_requests
from dnr_recbole.data.splits import SPLIT_NAMES, TEST, TRAIN, VALID
from dnr_recbole.errors import ConfigError, DataError


def retriever_end(config: Keys, data: Interactions) -> np.ndarray:
    """Where the retriever's part of each user ends, int64 [U], absolute positions (exclusive).

    - ``protocol: retrieved``: after the earlier ``retriever_fraction`` of his interactions, but at least one.
    - ``protocol: exposed``: at the same place; under ``split: last`` at the latest where his validation list begins
      (or his test list, if he has no other). That may leave nothing: the retriever then does not know this user.
    - own files (``data.part``): after the earlier ``retriever_fraction`` of his train lines, but at least one. Lines
      of other parts before that position do not belong to the retriever's part, see
      :func:`~dnr_recbole.data.requests.retriever_part`.

    Raises:
        ConfigError: `split` was given beside own files.
    """
    fraction = config["retriever_fraction"]
    if data.part is not None:
        _refuse_split(config)
        lines = np.flatnonzero(data.part == TRAIN)
        length = np.bincount(data.user[lines], minlength=data.n_users)
        count = earlier_count(length, fraction)
        end = data.ptr[:-1].copy()
        has = count > 0
        end[has] = lines[(np.cumsum(length) - length + count)[has] - 1] + 1
        return end
    end = data.split_positions(fraction)
    if config["protocol"] == "exposed" and config["split"] == "last":
        lists = exposed_requests(data, config["slate_size"], "last", config["seed"])
        held_out = np.flatnonzero(lists.split != TRAIN)[::-1]  # backwards, so that a user's first one remains
        first = data.ptr[1:].copy()
        first[lists.user[held_out]] = lists.start[held_out]
        end = np.minimum(end, first)
    return end


def check_cut(protocol: str, data: Interactions, requests: RequestTable, fitted: np.ndarray) -> None:
    """Refuse a retriever that was fitted on labels; ``fitted`` bool [N]: the interactions that it has seen.

    No label of a validation or test request may be among them and, except under protocol `exposed`, none of a
    training request.

    Raises:
        DataError: at least one is.
    """
    for code in (VALID, TEST) if protocol == "exposed" else (TRAIN, VALID, TEST):
        labels = fitted if data.part is None else fitted & (data.part == code)
        before = np.concatenate([[0], np.cumsum(labels)])
        rows = np.flatnonzero(requests.split == code)
        bad = rows[before[requests.end[rows]] > before[requests.start[rows]]]
        if len(bad):
            raise DataError(
                f"the retriever was fitted on labels: {len(bad)} of {len(rows)} {SPLIT_NAMES[code]} requests have an "
                "interaction in its part, so its scores would know the answer; fit it with the same protocol, split, "
                "slate_size and retriever_fraction"
            )


def _refuse_split(config: Any) -> None:
    """Own files are the split. A config that was fed back in names every key: there the default passes."""
    given = getattr(config, "external_config_dict", {})
    if "split" not in given:
        return
    source = config._sources.get("split")
    if source != "config_dict" or given["split"] != config.internal_config_dict.get("split"):
        raise ConfigError(
            f"split={given['split']!r} (from {source}): benchmark_filename={config['benchmark_filename']} says already "
            "what is for training, validation and test; give one of the two"
        )
