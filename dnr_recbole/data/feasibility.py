"""Will there be requests for training, validation and test: asked before anything is trained, answered in words.

The requests themselves are made (that needs no retriever), so the question is never answered by a rule of thumb;
only when a split turns out empty is the reason looked for.
"""

from __future__ import annotations

from logging import getLogger
from typing import List

import numpy as np

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.cut import check_cut, retriever_end
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.requests import first_seen, make_requests, retriever_part
from dnr_recbole.data.splits import SPLIT_NAMES, TEST, TRAIN, VALID
from dnr_recbole.errors import DataError

_MANY_REPEATS = 0.5  # share of clicks from which on a run is told of the key `repeatable`
_ENOUGH_USERS = 10  # 8:1:1 of fewer may leave a split empty


def check_feasible(config: Keys, data: Interactions) -> None:
    """Make the requests of ``config`` and count them; also says what the protocol's keys do not do here.

    Raises:
        DataError: a split would have no request; the message says why and what to change.
        ConfigError: `split` was given beside own files, or is unknown.
    """
    if config["protocol"] not in ("exposed", "retrieved"):  # a plug-in's: its builder has to tell
        return
    end = retriever_end(config, data)
    requests = make_requests(config, data, end)
    check_present(config, data, requests.split, requests.n_positives, bool(config["keep_empty_requests"]))
    check_cut(config["protocol"], data, requests, retriever_part(data, end))
    counts = ", ".join(f"{(requests.split == code).sum()} {name}" for code, name in enumerate(SPLIT_NAMES))
    getLogger(__name__).info(f"protocol {config['protocol']}: {counts} requests")
    if config["protocol"] == "exposed" and config["repeatable"] and config["exclude_seen"]:
        getLogger(__name__).info(
            "repeatable=True: items that a user has met may be asked for again, so exclude_seen has no effect"
        )
    if config["protocol"] == "retrieved" and not config["repeatable"]:
        share = _share_of_repeats(data, end)
        if share >= _MANY_REPEATS:
            getLogger(__name__).warning(
                f"{share:.1%} of the clicks after the retriever's part are repeats, which are neither candidates nor "
                "positives: set repeatable=True if they should be"
            )


def check_present(
    config: Keys, data: Interactions, split: np.ndarray, n_positives: np.ndarray, keep_empty: bool = True
) -> None:
    """Refuse if a split has no request to use; ``split`` int8 [R], ``n_positives`` int [R].

    ``keep_empty``: training requests need no positive.

    Raises:
        DataError: with the reasons.
    """
    usable = ((split == TRAIN) & keep_empty) | (n_positives > 0)
    missing = [code for code in (TRAIN, VALID, TEST) if not (usable & (split == code)).any()]
    if missing:
        names = ", ".join(SPLIT_NAMES[code] for code in missing)
        raise DataError(
            f"protocol '{config['protocol']}' makes no request for {names} from {len(data)} interactions of "
            f"{_n_users(data)} users: " + "; ".join(_reasons(config, data, missing))
        )


def _reasons(config: Keys, data: Interactions, missing: List[int]) -> List[str]:
    if not data.click.any():
        return [_no_click(config, data)]
    end, reasons = retriever_end(config, data), []
    if data.part is not None:
        reasons = _short_files(config, data, end, missing)
    elif config["protocol"] == "exposed":
        reasons = _short_exposed(config, data, end)
    elif config["protocol"] == "retrieved":
        reasons = _short_retrieved(config, data, end, missing)
    if config["protocol"] == "retrieved" and not config["repeatable"]:
        share = _share_of_repeats(data, end)
        if share >= _MANY_REPEATS or _repeats_would_help(config, data, end, missing):
            reasons.insert(0, f"{share:.1%} of the clicks after the retriever's part are repeats: set repeatable=True")
    share = data.click.mean()
    return reasons or [
        f"only {data.click.sum()} of them ({share:.1%}) are clicks at label_threshold={config['label_threshold']:g}, "
        "and requests without one are of no use: lower label_threshold or use more data"
    ]


def _no_click(config: Keys, data: Interactions) -> str:
    if data.rating is None:
        return "none of them is a click"
    highest = float(data.rating.max())
    return (
        f"the highest rating is {highest:g}, so nothing reaches label_threshold={config['label_threshold']:g}: set "
        f"label_threshold={highest:g} (or RATING_FIELD to another column, or to null if every interaction is a click)"
    )


def _short_files(config: Keys, data: Interactions, end: np.ndarray, missing: List[int]) -> List[str]:
    """Own files whose users have too few lines."""
    k, reasons = config["slate_size"], []
    later = np.arange(len(data)) >= end[data.user]
    for code in missing:
        lines = (data.part == code) & (later | (code != TRAIN))
        need = k
        if config["protocol"] != "exposed":
            need = min(k, config["label_window"]) if code == TRAIN else 1
        have = (np.bincount(data.user[lines], minlength=data.n_users) >= need).sum()
        where = "train file after the retriever's part" if code == TRAIN else f"{SPLIT_NAMES[code]} file"
        if not have:
            reasons.append(
                f"a user needs at least {need} interactions in the {where} (slate_size={k}) and 0 of {_n_users(data)} "
                "users have them"
            )
    return reasons


def _short_exposed(config: Keys, data: Interactions, end: np.ndarray) -> List[str]:
    k = config["slate_size"]
    if config["split"] == "last":
        have = (data.lengths >= 3 * k).sum()
        return [] if have else [
            f"a user needs 3 x slate_size = {3 * k} interactions for a training, a validation and a test list "
            f"(protocol exposed, split last) and 0 of {_n_users(data)} users have them: lower slate_size"
        ]  # fmt: skip
    begin = -(-(end - data.ptr[:-1]) // k) * k  # of the first list after the retriever's part
    have = (data.lengths >= begin + k)[data.lengths > 0].sum()
    return _few_users(config, data, have, f"a complete list of slate_size = {k}")


def _short_retrieved(config: Keys, data: Interactions, end: np.ndarray, missing: List[int]) -> List[str]:
    window, k = config["label_window"], min(config["slate_size"], config["label_window"])
    room = data.ptr[1:] - end
    if config["split"] != "last":
        return _few_users(config, data, (room >= k).sum(), f"{k} interactions")
    stride = config["request_stride"]
    third = -(-window // stride) * stride  # where a validation window may begin if a training one lies before it
    need, windows = {
        TRAIN: (-(-(third + window) // stride) * stride + window, "a training, a validation and a test window"),
        VALID: (-(-k // stride) * stride + window, "a validation and a test window"),
        TEST: (k, "a test window"),
    }[min(missing)]
    if (room >= need).any():
        return []
    whole = int(np.ceil(need / (1 - config["retriever_fraction"]) - 1e-9))
    return [
        f"a user needs {need} interactions after the retriever's part for {windows} of label_window={window}, about "
        f"{whole} in all at retriever_fraction={config['retriever_fraction']:g} (protocol retrieved, split last), and "
        f"0 of {_n_users(data)} users have them: lower label_window or use split=user"
    ]


def _few_users(config: Keys, data: Interactions, have: int, what: str) -> List[str]:
    if have >= _ENOUGH_USERS:
        return []
    return [
        f"a user needs {what} after the retriever's part (retriever_fraction={config['retriever_fraction']:g}) to be "
        f"held out, {have} of {_n_users(data)} users have them, and split user needs about {_ENOUGH_USERS} such users"
    ]


def _n_users(data: Interactions) -> int:
    return int((data.lengths > 0).sum())


def _share_of_repeats(data: Interactions, end: np.ndarray) -> float:
    """Share of the clicks outside the retriever's part on items that the user had met."""
    clicks = np.flatnonzero(data.click & ~retriever_part(data, end))
    seen = first_seen(data, np.ones(len(data), dtype=bool))
    return float((seen[clicks] < clicks).mean()) if len(clicks) else 0.0


def _repeats_would_help(config: Keys, data: Interactions, end: np.ndarray, missing: List[int]) -> bool:
    keys = ("protocol", "label_window", "request_stride", "slate_size", "split", "seed")
    requests = make_requests({**{k: config[k] for k in keys}, "repeatable": True}, data, end)
    return any(((requests.split == code) & (requests.n_positives > 0)).any() for code in missing)
