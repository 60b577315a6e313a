"""Checked requests → rankings, through the same preprocessor as in training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import pyarrow as pa
import torch

from dnr_recbole.artefact import Artefact
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import DataError
from dnr_recbole.log_names import HISTORY, ITEM, USER
from dnr_recbole.ranking import Prepared, Scorer, predict, prepare
from dnr_recbole.requestlog.columns import Tokens, numbers, token
from dnr_recbole.requestlog.decoding import Requests, decode
from dnr_recbole.requestlog.encoders import Encoder
from dnr_recbole.requestlog.problems import Problems
from dnr_recbole.requestlog.reading import Batch
from dnr_recbole.serving.schema import RankRequest

_ALONE = 2048  # candidates that stand in a request of their own at a time: each takes the width of the longest list


class BadValue(DataError):
    """A value that the model cannot read; ``path`` names its field as in the body."""

    def __init__(self, path: Sequence[Any], message: str):
        super().__init__(message)
        self.path = list(path)


@dataclass
class RankedRequest:
    """One request's answer.

    Attributes:
        candidate: numbers of its candidates in their new order.
        score: of these; NaN where the model read no more.
        incoming: their places in the incoming order.
        ranks: name of a variant → rank of each candidate (by its number) in it; empty without explanation.
    """

    candidate: np.ndarray
    score: np.ndarray
    incoming: np.ndarray
    ranks: Dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def check_values(artefact: Artefact, request: RankRequest, path: Sequence[Any]) -> None:
    """Scores that the model needs are there and are numbers it can read.

    Raises:
        BadValue: names the field.
    """
    columns, calibrations = artefact.preprocessor.columns, artefact.preprocessor.calibrations
    for name, calibration in zip(columns.scores, calibrations):
        for number, item in enumerate(request.items):
            where = [*path, "items", number, name]
            value = item.given.get(name)
            if value is None:
                continue
            if isinstance(value, (bool, str, list)):
                raise BadValue(where, f"{name} is a score of the model: a number, not {type(value).__name__}")
            if not math.isfinite(value):
                raise BadValue(where, f"{name} must be finite")
            if calibration.kind == "identity" and not 0 <= value <= 1:
                raise BadValue(where, f"{name} must lie in [0, 1]: the model has no calibration for others")
    first = columns.scores[0]
    if all(item.given.get(first) is None for item in request.items):
        raise BadValue([*path, "items"], f"no item has '{first}', a score that the model reads")


def _column(encoder: Optional[Encoder], values: List[Any]) -> pa.Array:
    """A feature in the type that its encoder reads; each value by itself, whatever stands beside it in the batch."""
    if encoder is None:
        return pa.nulls(len(values))
    if encoder.kind == "number":
        return pa.array(_numbers(values), type=pa.float64())
    several = [value if isinstance(value, list) else [value] for value in values]
    ptr = np.concatenate([[0], np.cumsum([len(value) for value in several])])
    flat = [value for one in several for value in one]
    if encoder.kind == "vector":
        parts: pa.Array = pa.array(_numbers(flat), type=pa.float64())
    else:
        parts = pa.array([token(value) for value in flat], type=pa.string())
    return pa.ListArray.from_arrays(pa.array(ptr, type=pa.int32()), parts)


def _numbers(values: List[Any]) -> np.ndarray:
    """float64 [m]: numbers as they are and those that texts hold; NaN for all else."""
    texts = pa.array([value if isinstance(value, str) else None for value in values], type=pa.string())
    read = numbers(texts).values
    given = [float(value) if isinstance(value, (bool, int, float)) else np.nan for value in values]
    return np.where(texts.is_valid().to_numpy(zero_copy_only=False), read, np.array(given, dtype=np.float64))


def requests_of(artefact: Artefact, requests: Sequence[RankRequest]) -> Requests:
    """The arrays of some requests that all bring a history, or of which none does."""
    items = [item for request in requests for item in request.items]
    given = [item.given for item in items]
    columns = artefact.preprocessor.columns
    lengths = [len(request.items) for request in requests]
    per_candidate = {ITEM: pa.array([str(item.item_id) for item in items], type=pa.string())}
    for name in columns.scores:
        per_candidate[name] = pa.array([item.score(name) for item in items], type=pa.float64())
    encoders = artefact.preprocessor.log_features.encoders
    for name in columns.features:
        per_candidate[name] = _column(encoders.get(name), [one.get(name) for one in given])
    users = [None if request.user_id is None else str(request.user_id) for request in requests]
    per_request = {USER: pa.array(users, type=pa.string())}
    if requests[0].history is not None:
        histories = [[str(item) for item in request.history or []] for request in requests]
        per_request[HISTORY] = pa.array(histories, type=pa.list_(pa.string()))
    names = np.array([str(number) for number in range(len(requests))], dtype=object)
    batch = Batch(
        request=Tokens(np.arange(len(requests)), names),
        ptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        per_request=per_request,
        per_candidate=per_candidate,
        row=np.arange(1, len(items) + 1),
        source="request",
    )
    return decode(batch, columns, Problems(), labelled=False, bounded=False, checked=True)


def rank(artefact: Artefact, requests: Sequence[RankRequest], explain: bool = False) -> List[RankedRequest]:
    """Rank checked requests together; each result is the same as alone."""
    out: List[Optional[RankedRequest]] = [None] * len(requests)
    for with_history in (True, False):
        some = [number for number, request in enumerate(requests) if (request.history is not None) is with_history]
        if not some:
            continue
        found = requests_of(artefact, [requests[number] for number in some])
        prepared = prepare(artefact, found)
        ranked = prepared.ranked(lambda slate: predict(artefact, slate))
        ptr = found.batch.ptr
        for place, number in enumerate(some):
            rows = slice(ptr[place], ptr[place + 1])
            own = RankedRequest(ranked.candidate[rows] - ptr[place], ranked.score[rows], ranked.incoming[rows])
            out[number] = own
        if explain:
            _explain(artefact, prepared, [each for number in some if (each := out[number]) is not None])
    return out  # type: ignore[return-value]


def _explain(artefact: Artefact, prepared: Prepared, ranked: List[RankedRequest]) -> None:
    """Ranks under slates that lack something: the scores (all equal), the history, the other candidates."""
    score: Scorer = lambda slate: predict(artefact, slate)  # noqa: E731
    ptr = prepared.found.batch.ptr
    variants = {
        "without_score": lambda slate: score(_flat(slate)),
        "without_history": lambda slate: score(_forgetful(slate)),
        "alone": lambda slate: _alone(slate, score),
    }
    for name, variant in variants.items():
        other = prepared.ranked(variant)
        for request, (first, last) in enumerate(zip(ptr, ptr[1:])):
            ranks = np.empty(last - first, dtype=np.int64)
            ranks[other.candidate[first:last] - first] = np.arange(last - first)
            ranked[request].ranks[name] = ranks


def _flat(slate: Slate) -> Slate:
    """Every candidate has the mean scores of its request."""
    mask = slate.mask if slate.scores.dim() == 2 else slate.mask.unsqueeze(-1) & (slate.scores >= 0)
    total = (slate.scores * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return dataclasses.replace(slate, scores=torch.where(mask, total, slate.scores))


def _forgetful(slate: Slate) -> Slate:
    return dataclasses.replace(
        slate, history=torch.zeros_like(slate.history), history_mask=torch.zeros_like(slate.history_mask)
    )


def _alone(slate: Slate, score: Scorer) -> np.ndarray:
    """Each candidate as a request of its own, in the same place."""
    out = torch.full(slate.mask.shape, -torch.inf)
    for some in slate.mask.nonzero().split(_ALONE):
        request, place = some.unbind(1)
        number, single = torch.arange(len(some)), slate.select(request)
        keep = torch.zeros_like(single.mask)
        keep[number, place] = True
        values = torch.from_numpy(score(dataclasses.replace(single, mask=keep)))
        out[request, place] = values[number, place].float()
    return out.numpy()
