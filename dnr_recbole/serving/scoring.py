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
from dnr_recbole.ranking import Prepared, Scorer, predict, prepare
from dnr_recbole.requestlog.columns import Tokens
from dnr_recbole.requestlog.decoding import Requests, decode
from dnr_recbole.requestlog.problems import Problems
from dnr_recbole.requestlog.reading import HISTORY, ITEM, USER, Batch
from dnr_recbole.serving.schema import RankRequest


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
            if isinstance(value, (bool, str)):
                raise BadValue(where, f"{name} is a score of the model: a number, not {type(value).__name__}")
            if not math.isfinite(value):
                raise BadValue(where, f"{name} must be finite")
            if calibration.kind == "identity" and not 0 <= value <= 1:
                raise BadValue(where, f"{name} must lie in [0, 1]: the model has no calibration for others")
    first = columns.scores[0]
    if all(item.given.get(first) is None for item in request.items):
        raise BadValue([*path, "items"], f"no item has '{first}', a score that the model reads")


def _column(values: List[Any]) -> pa.Array:
    """Values of mixed types as one column: numbers if all are, else texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float, bool}:
        return pa.array([None if value is None else float(value) for value in values], type=pa.float64())
    return pa.array([None if value is None else str(value) for value in values], type=pa.string())


def requests_of(artefact: Artefact, requests: Sequence[RankRequest]) -> Requests:
    """The arrays of some requests that all bring a history, or of which none does."""
    items = [item for request in requests for item in request.items]
    given = [item.given for item in items]
    columns = artefact.preprocessor.columns
    lengths = [len(request.items) for request in requests]
    per_candidate = {ITEM: pa.array([str(item.item_id) for item in items], type=pa.string())}
    for name in columns.scores:
        values = [None if (value := one.get(name)) is None else float(value) for one in given]
        per_candidate[name] = pa.array(values, type=pa.float64())
    for name in columns.features:
        per_candidate[name] = _column([one.get(name) for one in given])
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


def rank(
    artefact: Artefact, requests: Sequence[RankRequest], explain: bool = False, scorer: Optional[Scorer] = None
) -> List[RankedRequest]:
    """Rank checked requests together; each result is the same as alone.

    Args:
        scorer: what scores in the place of the artefact's model.
    """
    score: Scorer = scorer or (lambda slate: predict(artefact, slate))
    out: List[Optional[RankedRequest]] = [None] * len(requests)
    for with_history in (True, False):
        some = [number for number, request in enumerate(requests) if (request.history is not None) is with_history]
        if not some:
            continue
        found = requests_of(artefact, [requests[number] for number in some])
        prepared = prepare(artefact, found)
        ranked = prepared.ranked(score)
        ptr = found.batch.ptr
        for place, number in enumerate(some):
            rows = slice(ptr[place], ptr[place + 1])
            own = RankedRequest(ranked.candidate[rows] - ptr[place], ranked.score[rows], ranked.incoming[rows])
            out[number] = own
        if explain:
            _explain(score, prepared, [out[number] for number in some])
    return out  # type: ignore[return-value]


def _explain(score: Scorer, prepared: Prepared, ranked: List[RankedRequest]) -> None:
    """Ranks under slates that lack something: the scores (all equal), the history, the other candidates."""
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
    request, place = slate.mask.nonzero(as_tuple=True)
    single = slate.select(request)
    keep = torch.zeros_like(single.mask)
    keep[torch.arange(len(request)), place] = True
    values = torch.from_numpy(score(dataclasses.replace(single, mask=keep)))
    out = torch.full(slate.mask.shape, -torch.inf, dtype=values.dtype)
    out[request, place] = values[torch.arange(len(request)), place]
    return out.numpy()
