"""Batches of a log as checked arrays: what every reader of requests, in training and in serving, works on."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pyarrow as pa

from dnr_recbole.config_schema import Keys
from dnr_recbole.errors import DataError, closest
from dnr_recbole.log_names import (
    HISTORY,
    ITEM,
    ITEMS,
    KNOWN,
    LABEL,
    PLACE,
    PROPENSITY,
    REQUEST,
    SHOWN,
    SPLIT,
    TIME,
    USER,
)
from dnr_recbole.requestlog.columns import Lists, Numbers, Tokens, flags, numbers, text_lists, times, tokens
from dnr_recbole.requestlog.feedback import Feedback
from dnr_recbole.requestlog.problems import Problems
from dnr_recbole.requestlog.reading import Batch

SCORE = "score"
SPLITS = {"train": 0, "valid": 1, "validation": 1, "test": 2}


@dataclass(frozen=True)
class Columns:
    """Which columns of a log are read, and as what.

    Attributes:
        scores: retriever scores; the first gives the incoming order.
        features: columns that are features of the request or of the pair.
        feedback: what is read of exposure and feedback beside the label; serving reads nothing of it.
    """

    scores: List[str]
    features: List[str]
    feedback: Feedback = field(default_factory=Feedback)

    @classmethod
    def choose(cls, names: Sequence[str], config: Keys, source: str) -> Columns:
        """Those that the keys ``order_by``, ``score_columns`` and ``log_features`` name among ``names``.

        Raises:
            DataError: one is not there, or there is no score.
        """
        order = config["order_by"] or SCORE
        scores = config["score_columns"]
        if scores is None:
            scores = [name for name in names if name == SCORE or name.startswith(SCORE + "_")]
        scores = [order, *(name for name in scores if name != order)]
        features, feedback = [], Feedback.choose(names, config, source)
        for wish in config["log_features"]:
            free = [name for name in names if name not in (*scores, *KNOWN, ITEMS, *feedback.columns)]
            features += fnmatch.filter(free, wish) if set(wish) & set("*?[") else [wish]
        for key, wanted in (("order_by", [order]), ("score_columns", scores), ("log_features", features)):
            for name in wanted:
                if name not in names:
                    hint = closest(name, names) or f"the columns are {', '.join(names)}"
                    raise DataError(f"{source} has no column '{name}' (key {key}): {hint}")
        taken = next((name for name in features if name in feedback.columns), None)
        if taken is not None:
            raise DataError(f"'{taken}' is feedback (objectives, sample_weight) and cannot be one of log_features")
        return cls(scores, [name for name in dict.fromkeys(features) if name not in scores], feedback)

    def all(self, names: Sequence[str]) -> List[str]:
        """The names to read of those that there are."""
        wanted = {*KNOWN, *self.scores, *self.features, *self.feedback.columns, ITEMS}
        return [name for name in names if name in wanted]


@dataclass
class Requests:
    """R requests with M candidates in all, checked; ids as codes into distinct texts.

    Attributes:
        batch: where they come from.
        user: codes [R], −1 = none; item: codes [M].
        scores: float64 [M, S]; NaN = missing.
        label: int8 [M], or None when serving.
        shown: bool [M]; all True without the column.
        time: float64 [R], or None.
        split: int8 [R], 0 train, 1 valid, 2 test, −1 = not said.
        history: items, oldest first, or None.
        features: Arrow arrays [M] by name.
        extra: arrays [M] of what :class:`~dnr_recbole.requestlog.feedback.Feedback` reads, by name in the table.
    """

    batch: Batch
    user: Tokens
    item: Tokens
    scores: np.ndarray
    label: Optional[np.ndarray]
    shown: np.ndarray
    time: Optional[np.ndarray]
    split: np.ndarray
    history: Optional[Lists]
    features: Dict[str, pa.Array]
    extra: Dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.batch)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Totals [R] of values of the candidates [M]."""
        return np.add.reduceat(np.append(values, 0), self.batch.ptr[:-1]) * (np.diff(self.batch.ptr) > 0)

    def incoming_order(self) -> np.ndarray:
        """Candidates (int64 [M]) request by request, best incoming score first; missing ones last."""
        key = np.where(np.isnan(self.scores[:, 0]), -np.inf, self.scores[:, 0])
        return np.lexsort((-key, self.batch.owner))


def decode(
    batch: Batch, columns: Columns, problems: Problems, labelled: bool, bounded: bool, checked: bool = False
) -> Requests:
    """The arrays of a batch; whatever is wrong goes to ``problems`` with its place, and gets a harmless value.

    Args:
        labelled: whether labels are needed.
        bounded: whether scores must lie in [0, 1], since nothing calibrates them.
        checked: whether the batch was decoded before, so that what costs time and changes nothing is left out.
    """
    reader = _Decoder(batch, problems)
    for what, name, rows, values in batch.problems:
        shown = [] if values is None else [values[int(i)].as_py() for i in rows[:10]]
        place = batch.request_place if values is None else batch.place
        problems.add(what, name, [place(int(i)) for i in rows[:10]], shown, count=len(rows))
    item = tokens(batch.per_candidate[ITEM])
    problems.add_rows("an item id is missing", ITEM, item.codes < 0, batch.place)
    if not checked:
        reader.check_duplicates(item)
        reader.check_place_and_propensity()
    codes = batch.request.codes
    problems.add_rows("a request id is missing", REQUEST, codes < 0, batch.request_place)
    empty = np.diff(batch.ptr) == 0
    problems.add_rows("requests without a candidate, left out", ITEM, empty, batch.request_place, fatal=False)
    scores = [reader.score(name, bounded) for name in columns.scores]
    user = batch.per_request.get(USER)
    label, grade = reader.label(columns.feedback) if labelled else (None, None)
    return Requests(
        batch=batch,
        user=Tokens(np.full(len(batch), -1), np.zeros(0, dtype=object)) if user is None else tokens(user),
        item=item,
        scores=np.stack(scores, axis=1),
        label=label,
        shown=reader.shown(),
        time=reader.time(),
        split=reader.split(),
        history=text_lists(batch.per_request[HISTORY]) if HISTORY in batch.per_request else None,
        features={name: batch.per_candidate[name] for name in columns.features},
        extra=columns.feedback.read(batch, grade, reader.add) if labelled else {},
    )


class _Decoder:
    def __init__(self, batch: Batch, problems: Problems):
        self.batch, self.problems = batch, problems

    def score(self, name: str, bounded: bool) -> np.ndarray:
        column = self.batch.per_candidate[name]
        values, missing, _ = found = self._numbers(name, numbers(column), column)
        infinite = ~np.isfinite(values) & ~missing & ~found.wrong
        self.add("a score is NaN or infinite", name, infinite, column)
        outside = np.isfinite(values) & ((values < 0) | (values > 1))
        if bounded:
            self.add("a score is outside [0, 1]: set score_calibration to logistic or isotonic", name, outside, column)
        self.add("scores are missing and count as the lowest", name, missing, fatal=False)
        return np.where(np.isfinite(values), values, np.nan)

    def label(self, feedback: Feedback) -> Tuple[np.ndarray, Optional[np.ndarray]]:
        """0 or 1, and the grade that says so where there are grades."""
        column = self.batch.per_candidate[LABEL]
        if feedback.grades > 1:
            grade = feedback.grade(column, self.add, LABEL)
            return (grade >= feedback.positive).astype(np.int8), grade
        values, missing, wrong = flags(column)
        self.add("a label is missing", LABEL, missing)
        self.add("a label is neither 0 nor 1", LABEL, wrong, column)
        return np.where(missing | wrong, 0, values).astype(np.int8), None

    def shown(self) -> np.ndarray:
        column = self.batch.per_candidate.get(SHOWN)
        if column is None:
            return np.ones(len(self.batch.row), dtype=bool)
        values, missing, wrong = flags(column)
        self.add("neither true nor false", SHOWN, wrong | missing, column)
        return values == 1

    def time(self) -> Optional[np.ndarray]:
        column = self.batch.per_request.get(TIME)
        if column is None:
            return None
        values, missing, wrong = times(column)
        place, shown = self.batch.request_place, _Shown(column)
        self.problems.add_rows("a time is missing", TIME, missing, place)
        bad = wrong | (~np.isfinite(values) & ~missing)
        self.problems.add_rows("no number and no time such as 2024-05-31 12:00:00", TIME, bad, place, shown)
        return np.where(np.isfinite(values), values, 0.0)

    def split(self) -> np.ndarray:
        column = self.batch.per_request.get(SPLIT)
        if column is None:
            return np.full(len(self.batch), -1, dtype=np.int8)
        codes, texts = tokens(column)
        meaning = np.array([SPLITS.get(str(text).strip().lower(), -2) for text in texts] + [-1], dtype=np.int8)
        split = meaning[codes]
        self.problems.add_rows(
            "must be train, valid or test", SPLIT, split < 0, self.batch.request_place, _Shown(column)
        )
        return np.where(split == -2, 0, split).astype(np.int8)

    def check_duplicates(self, item: Tokens) -> None:
        """A candidate occurs once in a request."""
        key = self.batch.owner * max(len(item.values), 1) + item.codes
        _, first = np.unique(key, return_index=True)
        again = np.ones(len(key), dtype=bool)
        again[first] = False
        self.add(
            "a candidate occurs twice in a request", ITEM, again & (item.codes >= 0), self.batch.per_candidate[ITEM]
        )

    def check_place_and_propensity(self) -> None:
        """Columns that are checked whether or not a key reads them."""
        column = self.batch.per_candidate.get(PLACE)
        if column is not None:
            values, missing, _ = self._numbers(PLACE, numbers(column), column)
            bad = np.isfinite(values) & ((values < 0) | (values % 1 != 0))
            self.add("a position is no number from 0 on", PLACE, bad, column)
            owner = self.batch.owner
            known = np.isfinite(values)
            lowest = np.full(len(self.batch), np.inf)
            np.minimum.at(lowest, owner[known], values[known])
            highest = np.full(len(self.batch), -1.0)
            np.maximum.at(highest, owner[known], values[known])
            count = np.bincount(owner[known], minlength=len(self.batch))
            order = np.lexsort((values[known], owner[known]))
            one, place = owner[known][order], values[known][order]
            shared = np.zeros(len(self.batch), dtype=bool)
            shared[one[1:][(one[1:] == one[:-1]) & (place[1:] == place[:-1])]] = True
            gap = (count > 0) & ((lowest != 0) | (highest != count - 1) | shared)
            self.problems.add_rows(
                "the positions of a request are not 0 … n−1", PLACE, gap, self.batch.request_place, fatal=False
            )
        column = self.batch.per_candidate.get(PROPENSITY)
        if column is not None:
            values, missing, _ = self._numbers(PROPENSITY, numbers(column), column)
            bad = ~missing & ~((values > 0) & (values <= 1))
            self.add("a propensity is outside (0, 1]", PROPENSITY, bad, column)

    def _numbers(self, name: str, found: Numbers, column: pa.Array) -> Numbers:
        self.add("not a number", name, found.wrong, column)
        return found

    def add(self, what: str, name: str, bad: np.ndarray, column: Any = None, fatal: bool = True) -> None:
        shown = None if column is None else _Shown(column)
        self.problems.add_rows(what, name, bad, self.batch.place, shown, fatal)


class _Shown:
    """Values of an Arrow column for examples."""

    def __init__(self, column: pa.Array):
        self.column = column

    def __getitem__(self, row: Any) -> Any:
        return self.column[int(row)].as_py()


def check_header(names: Sequence[str], source: str, labelled: bool, list_form_needs_request: bool = False) -> None:
    """Raises:
    DataError: a column is missing that everything needs.
    """
    needed = [ITEM] if ITEMS not in names else []
    needed += [LABEL] if labelled and ITEMS not in names else []
    if ITEMS not in names and list_form_needs_request:
        needed.insert(0, REQUEST)
    for name in needed:
        if name not in names:
            hint = closest(name, names) or f"it has {', '.join(names) or 'none'}"
            raise DataError(
                f"{source} has no column '{name}' ({hint}); a log has request_id, user_id, item_id, score, label"
            )
