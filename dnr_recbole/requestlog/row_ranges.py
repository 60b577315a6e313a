"""Some rows of parquet files as a table of their own, and where requests begin in a table."""

from __future__ import annotations

from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dnr_recbole.errors import DataError
from dnr_recbole.log_names import REQUEST
from dnr_recbole.requestlog.columns import tokens
from dnr_recbole.requestlog.reading import ROWS, Source, starts_of


class Range(NamedTuple):
    """Rows of a file: those from ``start`` on that lie before ``stop``."""

    path: str
    start: int
    stop: int


class RowRanges(Source):
    """The rows of some ranges, one range after another; only the row groups that they touch are read.

    Rows are counted in the first range's file, and on from there in the next one's.

    Args:
        ranges: at least one; all files have the same columns.

    Raises:
        DataError: a file is missing.
    """

    def __init__(self, ranges: Sequence[Range]):
        super().__init__(ranges[0].path)
        self.ranges = list(ranges)
        self.first_row = ranges[0].start

    @property
    def schema(self) -> pa.Schema:
        with self.explained():
            return pq.read_schema(self.path)

    @property
    def n_rows(self) -> int:
        return sum(stop - start for _, start, stop in self.ranges)

    def _batches(self, columns: Optional[Sequence[str]]) -> Iterator[pa.RecordBatch]:
        for each in self.ranges:
            yield from _read(each, columns)


def _read(rows: Range, columns: Optional[Sequence[str]]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(rows.path, memory_map=True) as file:
        metadata = file.metadata
        bounds = np.cumsum([0, *(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))])
        touched = np.flatnonzero((bounds[:-1] < rows.stop) & (bounds[1:] > rows.start))
        if not len(touched):
            return
        row = int(bounds[touched[0]])
        for batch in file.iter_batches(ROWS, touched.tolist(), None if columns is None else list(columns)):
            low, high = max(rows.start - row, 0), min(rows.stop - row, batch.num_rows)
            if low < high:
                found = batch.slice(low, high - low)
                yield found if columns is None else found.select(list(columns))  # files may order them differently
            row += batch.num_rows
            if row >= rows.stop:
                return


class Runs(NamedTuple):
    """The runs of equal request ids in some rows, of which there is at least one.

    Attributes:
        first, last: ids of the first run and the last.
        head: rows of the first run.
        hashes: uint64, one for the id of each run.
    """

    first: str
    last: str
    head: int
    hashes: np.ndarray


def runs_of(source: Source) -> Runs:
    """Look at the request ids, one after another.

    Raises:
        DataError: one is missing.
    """
    first, last, head, n = "", "", 0, 0
    hashes: List[np.ndarray] = []
    for texts, lengths in _runs(source):
        first = texts[0] if n == 0 else first
        goes_on = n > 0 and texts[0] == last  # a run that began in the batch before
        if n == 0 or (n == 1 and goes_on):
            head += int(lengths[0])
        fresh = texts[int(goes_on) :]
        hashes.append(pd.util.hash_array(fresh, categorize=False))
        n, last = n + len(fresh), texts[-1]
    return Runs(first, last, head, np.concatenate(hashes))


def request_ids(source: Source) -> List[str]:
    """The ids behind :attr:`Runs.hashes`."""
    found: List[str] = []
    for texts, _ in _runs(source):
        found.extend(texts[1:] if found and found[-1] == texts[0] else texts)
    return found


def must_stand_together(source: Source, remedy: str) -> None:
    """Refuse a table in the long form in which the rows of a request are in two places.

    Two passes at most over the request ids, in eight bytes for each request: requests are known by hashes, and the ids
    of equal ones are compared.

    Args:
        remedy: ends the message.

    Raises:
        DataError: rows of a request stand apart, or a request id is missing.
    """
    parts: List[np.ndarray] = []
    last = None
    for texts, _ in _runs(source):
        fresh = texts[int(texts[0] == last) :]
        parts.append(pd.util.hash_array(fresh, categorize=False))
        last = texts[-1]
    hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *parts]))
    again = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(again):
        return
    begun: Dict[str, int] = {}  # row at which each of them begins
    last, row = None, source.first_row
    for texts, lengths in _runs(source):
        begins = row + np.cumsum(lengths) - lengths
        for number in np.flatnonzero(np.isin(pd.util.hash_array(texts, categorize=False), again)):
            if number == 0 and texts[0] == last:
                continue
            first = begun.setdefault(texts[number], int(begins[number]))
            if first != begins[number]:
                raise DataError(
                    f"'{source.name}': the rows of request '{texts[number]}' stand apart, from "
                    f"{source.place(first + 1)} and from {source.place(int(begins[number]) + 1)} on: {remedy}"
                )
        last, row = texts[-1], row + int(lengths.sum())


def _runs(source: Source) -> Iterator[tuple]:
    """Batch by batch the ids of its runs, object [r], and how many rows each has, int64 [r]."""
    row = source.first_row
    for batch in source.batches([REQUEST]):
        found = tokens(batch.column(0))
        if len(found.codes) and found.codes.min() < 0:
            missing = source.place(row + 1 + int(np.argmin(found.codes)))
            raise DataError(f"'{source.name}', {missing}: a request id is missing")
        starts = starts_of(found.codes)
        yield found.values[found.codes[starts]], np.diff(np.append(starts, len(found.codes)))
        row += len(found.codes)
