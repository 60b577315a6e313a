"""Requests become rows of a parquet file, a row group at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any, BinaryIO, Dict, List, Set

import pyarrow as pa
import pyarrow.parquet as pq

from dnr_recbole.convert.registry import CANONICAL, Counts, Request
from dnr_recbole.errors import DataError
from dnr_recbole.files import temporary_name

ROWS = 1 << 16  # of a row group; the rows held in memory are these and those of one request
_TYPES = {
    "request_id": pa.string(), "user_id": pa.string(), "item_id": pa.string(), "score": pa.float64(),
    "label": pa.int8(), "position": pa.int32(), "exposed": pa.bool_(), "propensity": pa.float64(),
    "timestamp": pa.int64(), "split": pa.string(), "history": pa.list_(pa.string()),
}  # fmt: skip
_ALWAYS = ("request_id", "user_id", "item_id", "label")


class Writer:
    """Writes requests to an open file; use as a context and call :meth:`close` when all is well.

    Columns are canonical ones first, then features in the order they appear. A type follows from the values; where a
    later row group has a new column or a wider type, a new part begins, and :meth:`close` joins the parts under one
    schema.

    Args:
        file: binary, empty, with a name.
        output: what it will be called; parts lie beside it.
        counts: gets requests, candidates and positives.
    """

    def __init__(self, file: BinaryIO, output: str, counts: Counts):
        self._file, self._output, self._counts = file, output, counts
        self._parts: List[str] = []  # beside the first, which is the file itself
        self._writer: Any = None
        self._schema = pa.schema([])
        self._rows: Dict[str, List[Any]] = {}
        self._count = 0
        # Hashes, since ids of millions of requests would fill the memory that streaming saves.
        self._seen: Set[int] = set()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        for part in self._parts:
            with contextlib.suppress(OSError):
                os.unlink(part)

    def add(self, request: Request) -> None:
        """Raises:
        DataError: a request of this id was there before, or values of a column have no common type.
        """
        columns = request.columns
        n = len(columns["item_id"])
        if n == 0:
            self._counts.skip("requests without a candidate")
            return
        before = len(self._seen)
        self._seen.add(hash(request.request_id))
        if len(self._seen) == before:
            where = f"{request.place}: " if request.place else ""
            raise DataError(f"{where}request '{request.request_id}' was there before; its rows must stand together")
        if len(set(columns["item_id"])) < n:
            columns = self._once(columns)
            n = len(columns["item_id"])
        self._counts.requests += 1
        self._counts.candidates += n
        self._counts.positives += sum(columns["label"])
        whole = {
            "request_id": request.request_id, "user_id": request.user_id, "timestamp": request.timestamp,
            "history": request.history,
        }  # fmt: skip
        for name, value in whole.items():
            self._column(name).extend([value] * n)
        for name, values in columns.items():
            self._column(name).extend(values)
        self._count += n
        for column in self._rows.values():
            column.extend([None] * (self._count - len(column)))
        if self._count >= ROWS:
            self._flush()

    def _once(self, columns: Dict[str, List[Any]]) -> Dict[str, List[Any]]:
        """Each item once, at its first place; positive if any of its rows is."""
        first: Dict[str, int] = {}
        label = list(columns["label"])
        for place, item in enumerate(columns["item_id"]):
            at = first.setdefault(item, place)
            label[at] = max(label[at], label[place])
        self._counts.skip("repetitions of an item in its request", len(label) - len(first))
        columns = {**columns, "label": label}
        return {name: [values[place] for place in first.values()] for name, values in columns.items()}

    def _column(self, name: str) -> List[Any]:
        # Not setdefault: it would build the list of gaps at every call.
        if name not in self._rows:
            self._rows[name] = [None] * self._count
        return self._rows[name]

    def _flush(self) -> None:
        table = self._table()
        schema = _join(self._schema, table.schema)
        if self._writer is None or schema != self._schema:
            self._begin_part(schema)
        self._writer.write_table(_conform(table, schema))
        self._rows, self._count = {}, 0

    def _table(self) -> pa.Table:
        arrays = {}
        for name in [*(name for name in CANONICAL if name in self._rows), *self._rows]:
            if name in arrays:
                continue
            values = self._rows[name]
            if name not in _ALWAYS and all(value is None for value in values):
                continue
            kind = pa.float64() if name.startswith("score_") else _TYPES.get(name)
            try:
                arrays[name] = pa.array(values, type=kind)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                reason = " ".join(str(error).split())[:200]
                raise DataError(f"the values of column '{name}' have no common type: {reason}") from None
        return pa.table(arrays)

    def _begin_part(self, schema: pa.Schema) -> None:
        target: Any = self._file
        if self._writer is not None:
            self._writer.close()
            target = temporary_name(self._output)
            self._parts.append(target)
        self._schema = schema
        self._writer = pq.ParquetWriter(target, schema)

    def close(self) -> None:
        """Write what is left.

        Raises:
            DataError: as :meth:`add`.
        """
        if self._count:
            self._flush()
        self._writer.close()
        if self._parts:
            self._join_parts()

    def _join_parts(self) -> None:
        self._file.flush()
        joined = temporary_name(self._output)
        first, *rest = self._file.name, *self._parts
        self._parts.append(joined)
        with pq.ParquetWriter(joined, self._schema) as writer:
            for part in (first, *rest):
                with pq.ParquetFile(part) as source:
                    for group in range(source.num_row_groups):
                        writer.write_table(_conform(source.read_row_group(group), self._schema))
        self._file.seek(0)
        self._file.truncate()
        with open(joined, "rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 20)


def _join(old: pa.Schema, new: pa.Schema) -> pa.Schema:
    """Both schemas' columns, canonical ones first; a whole number and a number make a number."""
    types: Dict[str, pa.DataType] = {field.name: field.type for field in old}
    for field in new:
        types[field.name] = _wider(types[field.name], field.type, field.name) if field.name in types else field.type
    order = [*(name for name in CANONICAL if name in types), *(name for name in types if name not in CANONICAL)]
    return pa.schema([(name, types[name]) for name in order])


def _wider(old: pa.DataType, new: pa.DataType, name: str) -> pa.DataType:
    if old == new or pa.types.is_null(new):
        return old
    if pa.types.is_null(old):
        return new
    if pa.types.is_list(old) and pa.types.is_list(new):
        return pa.list_(_wider(old.value_type, new.value_type, name))
    numeric = [pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (old, new)]
    if all(numeric):
        return pa.float64()
    raise DataError(f"the values of column '{name}' have no common type: {old} first, {new} later")


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    have = set(table.schema.names)
    columns = [
        table.column(field.name).cast(field.type) if field.name in have else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
