"""Files and DataFrames → batches of whole requests, in bounded memory."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from dnr_recbole.errors import DataError, closest
from dnr_recbole.log_names import (
    ITEM,
    ITEMS,
    PER_REQUEST,
    REQUEST,
    SPLIT,
    TIME,
    USER,
)
from dnr_recbole.requestlog.columns import Lists, Tokens, is_list, lists, plain, to_table, tokens

ROWS = 1 << 16  # of a batch
ENDINGS = (".parquet", ".feather", ".arrow", ".csv", ".tsv", ".csv.gz", ".tsv.gz")
_CSV_BLOCK = 1 << 24  # bytes; no row may be longer

Table = Union[str, os.PathLike, pd.DataFrame]


@dataclass
class Batch:
    """R whole requests with M candidates in all, still with the ids and types of the file.

    Attributes:
        request: ids of the requests, [R].
        ptr: int64 [R + 1], where each request's candidates begin.
        per_request: Arrow arrays [R] by name.
        per_candidate: Arrow arrays [M] by name.
        row: int64 [M], the row of each candidate in its source, from 1.
        source: the file, or "DataFrame".
    """

    request: Tokens
    ptr: np.ndarray
    per_request: Dict[str, pa.Array]
    per_candidate: Dict[str, pa.Array]
    row: np.ndarray
    source: str
    lines: bool = False  # whether rows are lines of a text file, under a header
    problems: List[tuple] = field(default_factory=list)  # (what, column, rows, values)
    request_row: Optional[np.ndarray] = None  # int64 [R], where a row is a request: its row, from 1

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @property
    def owner(self) -> np.ndarray:
        """int64 [M], the request of each candidate."""
        return np.repeat(np.arange(len(self)), np.diff(self.ptr))

    def place(self, candidate: int) -> str:
        """Where a candidate stands, in words."""
        return self._place(self.row[candidate])

    def request_place(self, request: int) -> str:
        """Where a request begins, in words."""
        name = self.request.values[self.request.codes[request]] if self.request.codes[request] >= 0 else "?"
        rows, number = (self.row, self.ptr[request]) if self.request_row is None else (self.request_row, request)
        return self._place(rows[number]) + f" (request {name})" if number < len(rows) else f"request {name}"

    def _place(self, row: int) -> str:
        return f"line {row + 1}" if self.lines else f"row {row}"


class Source:
    """A table in a file or in memory.

    Args:
        table: a path that ends in one of :data:`ENDINGS`, or a DataFrame.
        encoding: of text files.

    Raises:
        DataError: no such file, another ending, or one that cannot be read.
    """

    first_row = 0  # of its file: rows in messages are counted from there
    order: Optional[np.ndarray] = None  # of a table that was put in order: the row in the file, from 0, of each row

    def __init__(self, table: Table, encoding: str = "utf-8"):
        self.path: Optional[Path] = None if isinstance(table, pd.DataFrame) else Path(table)
        self.encoding = encoding
        self.name = "DataFrame" if self.path is None else str(self.path)
        self.table: Optional[pa.Table] = None
        if self.path is None:
            self.table = to_table(table)  # type: ignore[arg-type]
        elif not self.path.is_file():
            near = closest(self.path.name, os.listdir(self.path.parent)) if self.path.parent.is_dir() else ""
            raise DataError(f"'{self.path}' does not exist{': ' + near if near else ''}")
        elif not self.path.name.lower().endswith(ENDINGS):
            raise DataError(f"'{self.path}': the name must end in one of {', '.join(ENDINGS)}")
        ending = "" if self.path is None else self.path.name.lower().removesuffix(".gz")
        self.text, self.parquet = ending.endswith((".csv", ".tsv")), ending.endswith(".parquet")

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        if self.table is not None:
            return self.table.schema
        with self.explained():
            for batch in self._batches(None):
                return batch.schema
            if self.path is not None and self.parquet:
                return pq.read_schema(self.path)
        raise DataError(f"'{self.name}' is empty")

    @property
    def list_form(self) -> bool:
        """Whether a row is a request, with lists, and not a candidate."""
        schema = self.schema
        return ITEMS in schema.names or (ITEM in schema.names and is_list(schema.field(ITEM).type))

    @property
    def names(self) -> List[str]:
        """Names of the columns, those inside a list of structs included."""
        schema = self.schema
        nested = ITEMS in schema.names and is_list(schema.field(ITEMS).type)
        return [*schema.names, *([field.name for field in schema.field(ITEMS).type.value_type] if nested else [])]

    @property
    def n_rows(self) -> Optional[int]:
        """How many rows there are; None where only reading tells."""
        if self.table is not None:
            return self.table.num_rows
        return pq.read_metadata(self.path).num_rows if self.path is not None and self.parquet else None

    def batches(self, columns: Optional[Sequence[str]] = None) -> Iterator[pa.RecordBatch]:
        """The rows in order, at most :data:`ROWS` at a time."""
        with self.explained():
            for batch in self._batches(columns):
                if batch.num_rows <= ROWS:
                    yield batch
                    continue
                for start in range(0, batch.num_rows, ROWS):
                    yield batch.slice(start, ROWS)

    def place(self, row: int) -> str:
        """Where a row of the file, from 1, stands, in words: a text file has a header above."""
        return f"line {row + 1}" if self.text else f"row {row}"

    def rows(self, before: int, n: int) -> np.ndarray:
        """int64 [n]: the rows of the file, from 1, in which the n rows behind the first ``before`` ones stand."""
        found = before + np.arange(n)
        return 1 + (found if self.order is None else self.order[found])

    def read(self, columns: Optional[Sequence[str]] = None) -> pa.Table:
        """All rows."""
        found = list(self.batches(columns))
        return pa.Table.from_batches(found) if found else self.schema.empty_table()

    def _batches(self, columns: Optional[Sequence[str]]) -> Iterator[pa.RecordBatch]:
        if self.table is not None:
            table = self.table if columns is None else self.table.select(list(columns))
            yield from table.combine_chunks().to_batches(ROWS)
        elif self.path is not None and self.parquet:
            file = pq.ParquetFile(self.path, memory_map=True)
            yield from file.iter_batches(ROWS, columns=None if columns is None else list(columns))
        elif self.text:
            yield from self._text(columns)
        else:
            with pa.memory_map(str(self.path)) as file:
                reader = pa.ipc.open_file(file)
                for number in range(reader.num_record_batches):
                    batch = reader.get_batch(number)
                    yield batch if columns is None else batch.select(list(columns))

    def _text(self, columns: Optional[Sequence[str]]) -> Iterator[pa.RecordBatch]:
        """All columns as texts: what a number is, is decided here, and said with its line."""
        assert self.path is not None  # a table in memory has types of its own
        tabs = ".tsv" in self.path.name.lower()
        parse = pacsv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=not tabs)
        read = pacsv.ReadOptions(block_size=_CSV_BLOCK, encoding=self.encoding)
        with pacsv.open_csv(self.path, read_options=read, parse_options=parse) as reader:
            names = reader.schema.names
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise DataError(f"'{self.name}', line 1: two columns are called '{twice}'")
        convert = pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""],
            include_columns=None if columns is None else list(columns),
        )  # fmt: skip
        with pacsv.open_csv(self.path, read_options=read, parse_options=parse, convert_options=convert) as reader:
            yield from reader

    def explained(self) -> "_Explained":
        """A block whose errors of pyarrow and of the system become one line about the file, a DataError."""
        return _Explained(self)


class _Explained:
    """:meth:`Source.explained`."""

    def __init__(self, source: Source):
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, (pa.ArrowException, OSError, UnicodeError, ValueError, KeyError)):
            return
        if isinstance(error, DataError):
            return
        reason = " ".join(str(error).split())[:300]
        if "UTF8" in reason or "UTF-8" in reason or "utf-8" in reason or isinstance(error, UnicodeError):
            raise DataError(
                f"'{self.source.name}' is not {self.source.encoding}: set the key encoding, e.g. latin-1 ({reason})"
            ) from error
        if "straddl" in reason:
            reason = f"a row is longer than {_CSV_BLOCK >> 20} MiB (an unclosed quote?)"
        raise DataError(f"'{self.source.name}' cannot be read: {reason}") from error


def read_batches(source: Source, columns: Optional[Sequence[str]] = None) -> Iterator[Batch]:
    """Whole requests in the order of the file. In the long form, the rows of a request must stand together."""
    rows = source.first_row
    if source.list_form:
        for batch in source.batches(columns):
            yield _from_lists(batch, source, rows)
            rows += batch.num_rows
        return
    rest: Optional[pa.Table] = None
    for batch in source.batches(columns):
        table = pa.Table.from_batches([batch])
        if rest is not None:
            table = pa.concat_tables([rest, table])
        starts = starts_of(tokens(plain(table[REQUEST])).codes)
        if len(starts) and starts[-1] > 0:
            yield _from_rows(table.slice(0, starts[-1]), source, rows)
            rows += int(starts[-1])
            table = table.slice(starts[-1])
        rest = table
    if rest is not None and rest.num_rows:
        yield _from_rows(rest, source, rows)


def regrouped(source: Source) -> Source:
    """The same in memory, the rows of a request together, in the order in which requests begin."""
    table, out = source.read(), copy.copy(source)
    out.order = np.argsort(tokens(plain(table[REQUEST])).codes, kind="stable")
    out.path, out.table = None, table.take(pa.array(out.order))
    return out


def starts_of(codes: np.ndarray) -> np.ndarray:
    """Where another request begins."""
    return np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]])) if len(codes) else np.zeros(0, np.int64)


def _from_rows(table: pa.Table, source: Source, before: int) -> Batch:
    request = tokens(plain(table[REQUEST]))
    starts = starts_of(request.codes)
    ptr = np.append(starts, table.num_rows).astype(np.int64)
    columns = {name: plain(table[name]) for name in table.column_names}
    batch = Batch(
        request=request.take(starts),
        ptr=ptr,
        per_request={name: columns[name].take(pa.array(starts)) for name in columns if name in PER_REQUEST},
        per_candidate={name: column for name, column in columns.items() if name not in PER_REQUEST},
        row=source.rows(before, table.num_rows),
        source=source.name,
        lines=source.text,
    )
    for name in (USER, TIME, SPLIT):
        if name in columns:
            _check_constant(batch, name, columns[name])
    return batch


def _check_constant(batch: Batch, name: str, column: pa.Array) -> None:
    codes = tokens(column).codes
    differs = np.flatnonzero(codes != codes[batch.ptr[:-1]][batch.owner])
    if len(differs):
        batch.problems.append(("rows of one request differ", name, differs, column))


def _from_lists(batch: pa.RecordBatch, source: Source, before: int) -> Batch:
    columns = {name: plain(batch.column(number)) for number, name in enumerate(batch.schema.names)}
    flat: Dict[str, pa.Array] = {}
    if ITEMS in columns:
        ptr, structs = lists(columns.pop(ITEMS))
        if not pa.types.is_struct(structs.type):
            raise DataError(
                f"'{source.name}', column {ITEMS}: must be lists of structs with an item_id, not {structs.type}"
            )
        flat = {structs.type.field(i).name: plain(part) for i, part in enumerate(structs.flatten())}
    else:
        ptr = lists(columns[ITEM]).ptr
    problems = []
    for name in list(columns):
        if name in PER_REQUEST or not is_list(columns[name].type):
            continue
        found: Lists = lists(columns[name])
        wrong = np.flatnonzero(np.diff(found.ptr) != np.diff(ptr))
        if len(wrong):
            problems.append((f"as many values as {ITEM} are needed in each row", name, wrong, None))
        else:
            flat[name] = plain(found.values)
        del columns[name]
    n, owner = len(ptr) - 1, np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    request = columns.get(REQUEST)
    numbered = pa.array([str(before + 1 + i) for i in range(n)])
    for name in list(columns):
        if name not in PER_REQUEST:  # one value for all candidates of the request
            flat.setdefault(name, columns.pop(name).take(pa.array(owner)))
    return Batch(
        request=tokens(numbered if request is None else request),
        ptr=ptr,
        per_request=columns,
        per_candidate=flat,
        row=source.rows(before, n)[owner],
        request_row=source.rows(before, n),
        source=source.name,
        problems=problems,
    )
