"""A log's preprocessor: its ids, and calibrations and encoders that are fitted on training requests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np
import pyarrow as pa

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.splits import TRAIN
from dnr_recbole.errors import DataError
from dnr_recbole.requestlog.columns import Tokens, plain
from dnr_recbole.requestlog.decoding import Requests
from dnr_recbole.requestlog.encoders import Encoders
from dnr_recbole.requestlog.preprocessor import Preprocessor, Vocabulary
from dnr_recbole.requestlog.scan import Scan
from dnr_recbole.retriever.calibration import Calibration, fit_calibration

SAMPLE = 1_000_000  # candidates that calibrations and encoders are fitted on

Sides = Dict[str, Tuple[Tokens, Dict[str, pa.Array]]]  # "user" and "item" -> ids and columns of the side table


@dataclass
class Sample:
    """Candidates to fit on: scores float64 [m, S], labels [m], and columns of features."""

    scores: np.ndarray
    labels: np.ndarray
    features: Dict[str, pa.Array]


def take_sample(config: Keys, found: Scan, decoded: Iterator[Requests], split: np.ndarray) -> Sample:
    """Candidates of training requests, at most about :data:`SAMPLE`, evenly over the log; none if nothing is fitted."""
    names = found.columns.features
    if config["score_calibration"] == "none" and not names:
        return Sample(np.zeros((0, 1)), np.zeros(0), {})
    every = max(1, found.rows // SAMPLE)
    scores: List[np.ndarray] = []
    labels: List[np.ndarray] = []
    columns: Dict[str, List[pa.Array]] = {name: [] for name in names}
    before = 0
    for requests in decoded:
        number = before + np.arange(len(requests))
        before += len(requests)
        chosen = (split[number] == TRAIN) & (number % every == 0)
        rows = np.flatnonzero(chosen[requests.batch.owner] & requests.shown)
        scores.append(requests.scores[rows])
        assert requests.label is not None  # of a log to learn from
        labels.append(requests.label[rows])
        for name, parts in columns.items():
            parts.append(requests.features[name].take(pa.array(rows)))
    joined = {name: plain(pa.chunked_array(parts)) for name, parts in columns.items()}
    return Sample(np.concatenate(scores), np.concatenate(labels), joined)


def fit_preprocessor(config: Keys, found: Scan, sides: Sides, sample: Sample) -> Preprocessor:
    """Ids of the log and the side tables, and what is fitted on ``sample``.

    Raises:
        DataError: a calibration has no positive or no negative to learn from.
    """
    for ids, side in ((found.users, "user"), (found.items, "item")):
        ids.add(sides[side][0].texts())
    most = config["max_feature_vocabulary"]
    of_side = {
        side: Encoders.fit(columns if config["use_features"] else {}, most) for side, (_, columns) in sides.items()
    }
    return Preprocessor(
        columns=found.columns,
        users=Vocabulary(found.users.list()),
        items=Vocabulary(found.items.list()),
        calibrations=[
            _calibration(config["score_calibration"], sample, number, name)
            for number, name in enumerate(found.columns.scores)
        ],
        normalization=config["score_normalization"],
        n_candidates=config["n_candidates"],
        history_length=config["history_length"],
        user_features=of_side["user"],
        item_features=of_side["item"],
        log_features=Encoders.fit(sample.features, most),
        until=newest(found),
    )


def continue_preprocessor(start: Preprocessor, found: Scan, sides: Sides) -> Preprocessor:
    """That of an earlier model with the ids of the log and the side tables behind its own; nothing is fitted."""
    users = start.users.with_ids([*found.users.list(), *sides["user"][0].texts()])
    items = start.items.with_ids([*found.items.list(), *sides["item"][0].texts()])
    return dataclasses.replace(start, users=users, items=items, histories=None, until=newest(found))


def newest(found: Scan) -> Optional[float]:
    """The time of the log's newest request, or None."""
    return None if found.time is None else float(found.time.max())


def _calibration(kind: str, sample: Sample, number: int, name: str) -> Calibration:
    if kind == "none":
        return Calibration()
    values = sample.scores[:, number]
    known = ~np.isnan(values)
    positive, negative = (values[known & (sample.labels == z)] for z in (1, 0))
    if not len(positive) or not len(negative):
        raise DataError(f"score_calibration={kind}: '{name}' has no positive or no negative in the training requests")
    return fit_calibration(kind, positive, negative)
