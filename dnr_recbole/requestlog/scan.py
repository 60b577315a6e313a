"""One pass over a log: every problem, and what the log holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional

import numpy as np
import pandas as pd

from dnr_recbole.config_schema import Keys
from dnr_recbole.log_names import ITEMS, KNOWN, LABEL, REQUEST
from dnr_recbole.logs import shows_progress
from dnr_recbole.requestlog.decoding import Columns, Requests, check_header, decode
from dnr_recbole.requestlog.problems import Problems
from dnr_recbole.requestlog.progress import watched
from dnr_recbole.requestlog.reading import Source, read_batches, regrouped

REGROUPED_ROWS = 20_000_000  # more are not sorted in memory
_PLACES = 10  # of the click rate by place
_NAMES = 10  # of columns in a message


class Ids:
    """Distinct ids in the order of appearance; growing."""

    def __init__(self, known: Optional[List[str]] = None):
        self.number: Dict[str, int] = {text: i for i, text in enumerate(dict.fromkeys(known or []))}

    def __len__(self) -> int:
        return len(self.number)

    def add(self, texts: Iterable[str]) -> np.ndarray:
        """int64 numbers of some texts, new ones appended."""
        number = self.number
        return np.array([number.setdefault(text, len(number)) for text in texts], dtype=np.int64)

    def find(self, texts: Iterable[str]) -> np.ndarray:
        """int64 numbers of some texts, −1 = unknown."""
        get = self.number.get
        return np.array([get(text, -1) for text in texts], dtype=np.int64)

    def list(self) -> List[str]:
        """All, by number."""
        return list(self.number)


@dataclass
class Scan:
    """What one pass over a log finds.

    Attributes:
        columns: names by use.
        problems: all that is wrong or needs a treatment.
        users, items: distinct ids.
        user: int32 [R], number of the user, −1 = none; time: float64 [R] or None; split: int8 [R], −1 = not said.
        candidates, positives: int32 [R].
        longest: candidates of the longest request.
        together: whether the rows of each request stand together.
        counts: totals for the summary.
    """

    columns: Columns
    problems: Problems
    users: Ids
    items: Ids
    user: np.ndarray
    time: Optional[np.ndarray]
    split: np.ndarray
    candidates: np.ndarray
    positives: np.ndarray
    together: bool
    rows: int
    has_history: bool
    has_shown: bool
    has_label: bool
    shown: int
    shown_positives: int
    clicks_by_place: np.ndarray
    requests_by_place: np.ndarray
    incoming_ndcg: float

    def __len__(self) -> int:
        return len(self.user)

    @property
    def longest(self) -> int:
        """Candidates of the longest request."""
        return int(self.candidates.max(initial=0))

    def summary(self) -> str:
        """What the log holds, a line each."""
        length = self.candidates
        lines = [
            f"requests       {len(self):,} of {len(self.users):,} users, {int((self.user < 0).sum()):,} without a user",
            f"candidates     {self.rows:,} ({self._quantiles(length)}), {len(self.items):,} items",
            f"scores         {', '.join(self.columns.scores)}; the first gives the incoming order",
        ]
        if self.has_label:
            empty = int((self.positives == 0).sum())
            lines.append(
                f"positives      {int(self.positives.sum()):,}, {self.positives.sum() / max(self.rows, 1):.2%} of the "
                f"candidates, {self.shown_positives / max(self.shown, 1):.2%} of the {self.shown:,} shown; "
                f"{empty:,} requests have none"
            )
            rates = self.clicks_by_place / np.maximum(self.requests_by_place, 1)
            lines.append("click rate     " + " ".join(f"{rate:.3f}" for rate in rates) + "  by incoming place")
            lines.append(f"incoming order NDCG@6 {self.incoming_ndcg:.4f} over requests with a positive")
        if self.time is not None and len(self):
            lines.append(f"times          {self.time.min():.15g} … {self.time.max():.15g}")
        counts = {name: int((self.split == code).sum()) for code, name in enumerate(("train", "valid", "test"))}
        if any(counts.values()):
            lines.append("split          " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
        lines.append(f"history        {'given' if self.has_history else 'built from earlier requests'}")
        return "\n".join(lines)

    @staticmethod
    def _quantiles(length: np.ndarray) -> str:
        if not len(length):
            return "none"
        low, middle, high = np.quantile(length, (0, 0.5, 1)).astype(int)
        return f"{low} to {high} per request, median {middle}"


def scan(source: Source, config: Keys, labelled: bool = True) -> Scan:
    """Read a log once.

    Args:
        source: the log; where the rows of a request do not stand together, it is put in order in memory.
        config: the keys of scope `source`.
        labelled: whether labels are needed.

    Raises:
        DataError: a needed column is missing or the file cannot be read. Everything else is in ``problems``.
    """
    names, list_form = source.names, source.list_form
    check_header(names, f"'{source.name}'", labelled, list_form_needs_request=not list_form)
    columns = Columns.choose(names, config, f"'{source.name}'")
    bounded = config["score_calibration"] == "none"
    problems, tally = Problems(), _Tally()
    read = columns.feedback.columns
    ignored = [n for n in names if n not in KNOWN and n not in (*columns.scores, *columns.features, ITEMS, *read)]
    if ignored:
        shown = ", ".join(ignored[:_NAMES]) + (", …" if len(ignored) > _NAMES else "")
        problems.add("columns that no key names, not read", shown, count=len(ignored), fatal=False)
    total = source.n_rows if list_form else None
    for batch in watched(read_batches(source, columns.all(source.schema.names)), total, "Read", shows_progress(config)):
        tally.add(decode(batch, columns, problems, labelled, bounded))
    if not tally.users_of:
        problems.add("there is no request", count=1)
    return tally.result(columns, problems, source, labelled)


class _Tally:
    def __init__(self) -> None:
        self.users, self.items = Ids(), Ids()
        self.users_of: List[np.ndarray] = []
        self.times: List[np.ndarray] = []
        self.splits: List[np.ndarray] = []
        self.lengths: List[np.ndarray] = []
        self.positives: List[np.ndarray] = []
        self.hashes: List[np.ndarray] = []
        self.rows = self.shown = self.shown_positives = 0
        self.has_history = self.has_shown = False
        self.by_place = np.zeros((2, _PLACES))
        self.ndcg, self.with_positive = 0.0, 0

    def add(self, found: Requests) -> None:
        user = np.append(self.users.add(found.user.values), -1)[found.user.codes]
        self.items.add(found.item.values)
        if found.history is not None:
            self.has_history = True
            self.items.add(found.history.values.values)
        self.users_of.append(user.astype(np.int32))
        if found.time is not None:
            self.times.append(found.time)
        self.splits.append(found.split)
        length = np.diff(found.batch.ptr)
        self.lengths.append(length.astype(np.int32))
        self.rows += int(length.sum())
        values = np.append(found.batch.request.values, "").astype(object)
        self.hashes.append(pd.util.hash_array(values, categorize=False)[found.batch.request.codes])
        label = np.zeros(len(found.item.codes), dtype=np.int8) if found.label is None else found.label
        self.positives.append(found.sums(label).astype(np.int32))
        self.has_shown |= not found.shown.all()
        self.shown += int(found.shown.sum())
        self.shown_positives += int(label[found.shown].sum())
        self._add_places(found, label, length)

    def _add_places(self, found: Requests, label: np.ndarray, length: np.ndarray) -> None:
        owner, order = found.batch.owner, found.incoming_order()
        place = np.arange(len(order)) - np.repeat(found.batch.ptr[:-1], length)
        near = place < _PLACES
        self.by_place[0] += np.bincount(place[near], weights=label[order][near], minlength=_PLACES)
        self.by_place[1] += np.bincount(place[near], minlength=_PLACES)
        hits = label[order] / np.log2(place + 2.0)
        gained = np.bincount(owner[place < 6], weights=hits[place < 6], minlength=len(length))
        positives = self.positives[-1]
        ideal = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(6) + 2.0))])[np.minimum(positives, 6)]
        some = positives > 0
        self.ndcg += float((gained[some] / ideal[some]).sum())
        self.with_positive += int(some.sum())

    def result(self, columns: Columns, problems: Problems, source: Source, labelled: bool) -> Scan:
        join = lambda parts, kind: np.concatenate(parts) if parts else np.zeros(0, dtype=kind)  # noqa: E731
        hashes = join(self.hashes, np.uint64)
        time = join(self.times, np.float64) if self.times else None
        found = Scan(
            columns, problems, self.users, self.items, join(self.users_of, np.int32), time,
            join(self.splits, np.int8), join(self.lengths, np.int32), join(self.positives, np.int32),
            len(np.unique(hashes)) == len(hashes), self.rows, self.has_history, self.has_shown, labelled,
            self.shown, self.shown_positives, self.by_place[0], self.by_place[1],
            self.ndcg / max(self.with_positive, 1),
        )  # fmt: skip
        if time is not None and len(time) and (np.diff(time) < 0).any():
            count = int((np.diff(time) < 0).sum())
            problems.add(
                "time goes backwards; requests are taken in the order of their times", count=count, fatal=False
            )
        nobody = int((found.user < 0).sum())
        if nobody:
            problems.add("requests without a user are anonymous", "user_id", count=nobody, fatal=False)
        if labelled and len(found) and not found.positives.any():
            problems.add("no label is 1", LABEL, count=found.rows)
        said = found.split >= 0
        if said.any() and not all((found.split == code).any() for code in range(3)):
            lacking = [name for code, name in enumerate(("train", "valid", "test")) if not (found.split == code).any()]
            problems.add(f"no request is {' or '.join(lacking)}", "split", count=len(found))
        return found


def in_order(source: Source, found: Scan) -> Source:
    """The log itself, or, where rows of one request stand apart, the same with them together, in memory."""
    if found.together:
        return source
    if found.rows > REGROUPED_ROWS:
        found.problems.add(
            f"the rows of a request must stand together in a log of more than {REGROUPED_ROWS:,} rows: sort it",
            REQUEST, count=len(found),
        )  # fmt: skip
        return source
    return regrouped(source)
