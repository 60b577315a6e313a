"""What tables share: parquet, feather, CSV and TSV in batches, sorted on disk where they must be, cut into groups.

A batch is a ``pyarrow.Table`` of some thousand rows. Its columns have the types that were asked for, whatever the file
gives: an id is text, so that 7 in one file is "7" in the other, and "007" stays "007".
"""

from __future__ import annotations

import contextlib
import csv
import heapq
import io
import os
import tempfile
import zlib
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, NoReturn, Optional, Sequence, Tuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dnr_recbole.convert.lines import open_bytes, shorten, unreadable
from dnr_recbole.convert.registry import Counts
from dnr_recbole.errors import DataError, closest

ID, NUMBER, MAYBE, TEXT, AS_IS = "id", "number", "number or nothing", "text", "as it is"
ROW = "\0row"  # the column of line numbers of a CSV (the header is line 1), row numbers from 1 on of other files
BATCH = 1 << 13  # rows
# pyarrow decodes names lazily, and raises what Python raises.
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)
RUN = 1 << 20  # rows that are sorted in memory
Group = Dict[str, List[Any]]


class Source:
    """A table on disk; ``names`` are its columns.

    Raises:
        DataError: it cannot be read or has two columns of one name.
    """

    def __init__(self, path: str):
        self.path = path
        name = path[:-3] if path.endswith(".gz") else path
        self._kind = {".parquet": "parquet", ".feather": "feather", ".arrow": "feather"}.get(
            os.path.splitext(name)[1], "csv"
        )
        self._separator = "\t" if name.endswith((".tsv", ".tab")) else ","
        with self._errors():
            self.names: List[str] = self._header()
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise DataError(f"'{path}' has two columns '{sorted(twice)[0]}': rename one")

    def place(self, row: int) -> str:
        """Where a row is, in words."""
        return f"'{self.path}', {'line' if self._kind == 'csv' else 'row'} {row}"

    def refuse(self, row: int, reason: str) -> NoReturn:
        """Raises:
        DataError: always, with the place.
        """
        raise DataError(f"{self.place(row)}: {reason}")

    def need(self, names: Iterable[str]) -> None:
        """Raises:
        DataError: a column is not there.
        """
        for name in names:
            if name not in self.names:
                hint = closest(name, self.names) or f"it has {', '.join(self.names)}"
                raise DataError(f"'{self.path}' has no column '{name}': {hint}")

    def batches(self, columns: Dict[str, str], counts: Optional[Counts] = None) -> Iterator[pa.Table]:
        """The table in batches of at most ``BATCH`` rows, with the column ``ROW`` beside those asked for.

        Args:
            columns: name -> ID (text, never missing), NUMBER (float64, never missing), MAYBE (float64, null = missing),
                TEXT (null = missing), AS_IS (as the file has it; text from a CSV).
            counts: gets the number of rows; None for a table that is read once more.

        Raises:
            DataError: a column or a value is missing, or a value is no number.
        """
        self.need(columns)
        with self._errors():
            for rows, batch in self._read(list(columns)):
                if counts is not None:
                    counts.rows += len(batch)
                arrays = {name: self._cast(batch.column(name), name, kind, rows) for name, kind in columns.items()}
                yield pa.table({**arrays, ROW: rows})

    def numeric(self, names: Iterable[str]) -> List[str]:
        """Those of some columns that hold nothing but numbers and gaps; a CSV is read once for it."""
        left = list(names)
        if self._kind != "csv" or not left:
            return []
        known = set()
        for _, batch in self._read(left):
            for name in list(left):
                try:
                    cells = batch.column(name).cast(pa.float64())
                except pa.ArrowInvalid:
                    left.remove(name)
                    continue
                if cells.null_count < len(cells):
                    known.add(name)
        return [name for name in left if name in known]

    # ------------------------------------------------------------------ reading

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise unreadable(self.path, error) from None

    def _header(self) -> List[str]:
        if self._kind == "parquet":
            return list(pq.read_schema(self.path).names)
        if self._kind == "feather":
            with pa.memory_map(self.path) as source:
                return list(pa.ipc.open_file(source).schema.names)
        names = next(self._lines(), (1, []))[1]
        if not names:
            raise DataError(f"'{self.path}' is empty: its first line must name the columns")
        return names

    def _read(self, names: List[str]) -> Iterator[Tuple[pa.Array, Any]]:
        """(row numbers, batch) with these columns in the types of the file."""
        if self._kind == "csv":
            yield from self._read_csv(names)
            return
        first = 1
        for batch in self._read_parquet(names) if self._kind == "parquet" else self._read_feather(names):
            for low in range(0, len(batch), BATCH):
                part = batch.slice(low, BATCH)
                yield pa.array(range(first, first + len(part)), pa.int64()), part
                first += len(part)

    def _read_parquet(self, names: List[str]) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=BATCH, columns=names)

    def _read_feather(self, names: List[str]) -> Iterator[pa.RecordBatch]:
        fields = [self.names.index(name) for name in names]
        with pa.memory_map(self.path) as source:
            reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def _read_csv(self, names: List[str]) -> Iterator[Tuple[pa.Array, pa.Table]]:
        places = [self.names.index(name) for name in names]
        lines = self._lines()
        next(lines)
        rows: List[int] = []
        cells: List[List[Optional[str]]] = [[] for _ in names]
        for number, line in lines:
            if len(line) != len(self.names):
                self.refuse(number, f"{len(line)} cells under {len(self.names)} names")
            rows.append(number)
            for column, at in zip(cells, places):
                column.append(line[at] or None)
            if len(rows) == BATCH:
                yield self._as_batch(rows, names, cells)
                rows, cells = [], [[] for _ in names]
        if rows:
            yield self._as_batch(rows, names, cells)

    @staticmethod
    def _as_batch(rows, names, cells) -> Tuple[pa.Array, pa.Table]:
        table = pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, cells)})
        return pa.array(rows, pa.int64()), table

    def _lines(self) -> Iterator[Tuple[int, List[str]]]:
        """(line number, cells) of a CSV, without empty lines."""
        number = 0
        try:
            with open_bytes(self.path) as raw:
                text = io.TextIOWrapper(cast(BinaryIO, raw), encoding="utf-8-sig", newline="")
                reader = csv.reader(text, delimiter=self._separator, strict=True)
                for cells in reader:
                    number = reader.line_num
                    if cells:
                        yield number, cells
        except csv.Error as error:
            self.refuse(number + 1, str(error))
        except UnicodeDecodeError as error:
            # The decoder reads ahead, so that it knows only about where.
            self.refuse(number + 1, f"not UTF-8 here or soon after (0x{error.object[error.start]:02x})")

    # ------------------------------------------------------------------ types

    def _cast(self, column: Any, name: str, kind: str, rows: pa.Array) -> Any:
        if isinstance(column, pa.Array):
            column = pa.chunked_array([column])
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if kind == AS_IS:
            return column
        cast = self._text(column) if kind in (ID, TEXT) else self._number(column, name, rows)
        if kind in (ID, NUMBER) and cast.null_count:
            missing = pc.index(pc.is_null(cast), pa.scalar(True)).as_py()
            self.refuse(rows[missing].as_py(), f"{name} is missing")
        return cast

    @staticmethod
    def _text(column: Any) -> Any:
        if pa.types.is_floating(column.type):
            # What was whole numbers before a gap made them floats: 7.0 is the id "7".
            column = pc.if_else(pc.is_nan(column), None, column)
            with contextlib.suppress(pa.ArrowInvalid):
                column = column.cast(pa.int64())
        text = column.cast(pa.string())
        return pc.if_else(pc.equal(text, ""), None, text)

    def _number(self, column: Any, name: str, rows: pa.Array) -> Any:
        try:
            numbers = pc.if_else(pc.is_nan(column), None, column) if pa.types.is_floating(column.type) else column
            if pa.types.is_boolean(numbers.type):
                numbers = numbers.cast(pa.int8())
            numbers = numbers.cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            self._refuse_first_text(column, name, rows)
        finite = pc.is_finite(numbers)
        if pc.any(pc.invert(finite)).as_py():
            bad = pc.index(finite, pa.scalar(False)).as_py()
            self.refuse(rows[bad].as_py(), f"{name} is no finite number: '{column[bad].as_py()}'")
        return numbers

    def _refuse_first_text(self, column: Any, name: str, rows: pa.Array) -> NoReturn:
        for row, value in zip(rows.to_pylist(), column.to_pylist()):
            try:
                float(value or 0)
            except (ValueError, TypeError):
                self.refuse(row, f"{name} is no number: '{shorten(str(value))}'")
        raise DataError(f"'{self.path}': {name} holds no numbers ({column.type})")


# ---------------------------------------------------------------------- order


def in_order(batches: Iterable[pa.Table], keys: Sequence[str]) -> Iterator[pa.Table]:
    """All rows sorted by some columns, in batches; rows that are equal there stay in their order.

    Up to ``RUN`` rows are sorted in memory; of more, sorted runs are written to the folder of temporary files (TMPDIR)
    and merged.
    """
    with tempfile.TemporaryDirectory(prefix="dnr-convert-") as folder:
        runs: List[str] = []
        held: List[pa.Table] = []
        for batch in batches:
            held.append(batch)
            if sum(map(len, held)) >= RUN:
                runs.append(_write_run(_sorted(held, keys), os.path.join(folder, str(len(runs)))))
                held = []
        if not runs:
            if held:
                yield from _slices(_sorted(held, keys))
            return
        if held:
            runs.append(_write_run(_sorted(held, keys), os.path.join(folder, str(len(runs)))))
        yield from _merge(runs, keys)


def _sorted(tables: List[pa.Table], keys: Sequence[str]) -> pa.Table:
    table = pa.concat_tables(tables)
    # sort_indices is stable; _merge relies on it, too.
    return table.take(pc.sort_indices(table, sort_keys=[(key, "ascending") for key in keys]))


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    for low in range(0, len(table), BATCH):
        yield table.slice(low, BATCH)


def _write_run(table: pa.Table, path: str) -> str:
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=BATCH)
    return path


def _read_run(path: str) -> Iterator[pa.Table]:
    with pa.OSFile(path) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


def _merge(runs: List[str], keys: Sequence[str]) -> Iterator[pa.Table]:
    schema = next(_read_run(runs[0])).schema
    held: List[Tuple[Any, ...]] = []
    at = [schema.names.index(key) for key in keys]

    def rows(path: str) -> Iterator[Tuple[Any, ...]]:
        for batch in _read_run(path):
            yield from zip(*(column.to_pylist() for column in batch.columns))

    for row in heapq.merge(*map(rows, runs), key=lambda row: tuple(row[i] for i in at)):
        held.append(row)
        if len(held) == BATCH:
            yield _as_table(held, schema)
            held = []
    if held:
        yield _as_table(held, schema)


def _as_table(rows: List[Tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(column, field.type) for column, field in zip(zip(*rows), schema)], schema=schema)


def groups(batches: Iterable[pa.Table], keys: Sequence[str]) -> Iterator[Group]:
    """Consecutive rows that are equal in some columns: column -> list of values, missing ones None."""
    group: Group = {}
    last: Any = None
    for batch in batches:
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
        values = list(zip(*(columns[key] for key in keys)))
        low = 0
        for high in range(1, len(values) + 1):
            if high < len(values) and values[high] == values[low]:
                continue
            if group and values[low] != last:
                yield group
                group = {}
            for name, column in columns.items():
                group.setdefault(name, []).extend(column[low:high])
            last, low = values[low], high
    if group:
        yield group


def by_first_row(batches: Iterable[pa.Table], key: str) -> Iterator[Group]:
    """Groups of one key in the order of their first rows, even if their rows do not stand together."""
    order = "\0order"
    numbers: Dict[Any, int] = {}

    def numbered() -> Iterator[pa.Table]:
        for batch in batches:
            places = [numbers.setdefault(value, len(numbers)) for value in batch.column(key).to_pylist()]
            yield batch.append_column(order, pa.array(places, pa.int64()))

    for group in groups(in_order(numbered(), [order]), [order]):
        group.pop(order)
        yield group
