"""Parquet files → parts that hold whole requests.

A part begins with a row group (or several small ones) and holds the requests that begin in it: rows of a request that
goes on in the next row group, or file, belong to the part in which it begins. So no request is cut, a file that is
added to a folder changes no part of the others, and a part can be read without its neighbours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dnr_recbole.errors import DataError
from dnr_recbole.identity import digest
from dnr_recbole.log_names import REQUEST
from dnr_recbole.requestlog.decoding import check_header
from dnr_recbole.requestlog.reading import Source
from dnr_recbole.requestlog.row_ranges import Range, RowRanges, Runs, request_ids

_PART_BYTES = 16 << 20  # row groups are put together up to this size, uncompressed


class File(NamedTuple):
    """A file as it was when it was looked at.

    Attributes:
        name: its path below the folder.
        size: bytes.
        changed: when, in nanoseconds since 1970.
        rows: how many it has.
    """

    name: str
    size: int
    changed: int
    rows: int


class Segment(NamedTuple):
    """Rows of a file: those from ``start`` on that lie before ``stop``."""

    file: File
    start: int
    stop: int

    def __str__(self) -> str:
        return f"rows {self.start + 1:,} to {self.stop:,} of '{self.file.name}'"


@dataclass(frozen=True)
class Part:
    """Rows that hold whole requests, in their order."""

    segments: List[Segment]

    @property
    def rows(self) -> int:
        return sum(stop - start for _, start, stop in self.segments)

    def identity(self, made_with: Dict[str, Any]) -> str:
        """16 hex digits: equal for the same rows of unchanged files ranked by the same model in the same way."""
        rows = [[*segment.file, segment.start, segment.stop] for segment in self.segments]
        return digest({"rows": rows, **made_with}, 16)

    def source(self, root: str) -> RowRanges:
        """The rows to read.

        Raises:
            DataError: a file is not as it was.
        """
        for segment in self.segments:
            path = os.path.join(root, segment.file.name)
            if (segment.file.size, segment.file.changed) != _state(path):
                raise DataError(f"'{path}' has changed since the command began: give it again when it is whole")
        return RowRanges([Range(os.path.join(root, file.name), start, stop) for file, start, stop in self.segments])

    def __str__(self) -> str:
        return " and ".join(map(str, self.segments))


@dataclass(frozen=True)
class Inputs:
    """The files to rank.

    Attributes:
        root: the folder that their names start from.
        files: in the order of their names.
        blocks: row groups to be read together, in the same order; none is empty.
        list_form: whether a row is a request.
    """

    root: str
    files: List[File]
    blocks: List[Segment]
    list_form: bool


def find_inputs(path: str) -> Inputs:
    """A parquet file, or all of a folder and the folders in it; names that begin with . or _ are left out.

    Raises:
        DataError: there is none, one cannot be read, their columns differ, or an id has none.
    """
    if os.path.isdir(path):
        root, found = os.path.abspath(path), []
        for each in Path(root).rglob("*"):
            name = each.relative_to(root)
            hidden = any(part.startswith((".", "_")) for part in name.parts)
            if each.name.lower().endswith(".parquet") and each.is_file() and not hidden:
                found.append(name.as_posix())
        if not found:
            raise DataError(f"'{path}' has no file that ends in .parquet")
    else:
        if not path.lower().endswith(".parquet"):
            raise DataError(f"'{path}': --ray reads parquet, a file or a folder of files")
        root, name = os.path.split(os.path.abspath(path))
        found = [name]
    files: List[File] = []
    blocks: List[Any] = []
    schemas: List[pa.Schema] = []
    for name in sorted(found):
        source = Source(os.path.join(root, name))
        with source.explained(), pq.ParquetFile(source.path) as content:
            files.append(File(name, *_state(str(source.path)), content.metadata.num_rows))
            blocks += _blocks(files[-1], content.metadata)
            schemas = [*schemas[:1], content.schema_arrow]
        _must_be_alike(source, schemas[-1], schemas[0])
    first = Source(os.path.join(root, files[0].name))
    check_header(first.names, f"'{first.name}'", labelled=False, list_form_needs_request=not first.list_form)
    if first.list_form and len(files) > 1 and REQUEST not in first.names:
        raise DataError(f"'{path}': several files of lists need the column '{REQUEST}', since their row numbers repeat")
    return Inputs(root, files, blocks, first.list_form)


def parts_of(inputs: Inputs, runs: Sequence[Runs]) -> List[Part]:
    """The parts of some files.

    Args:
        runs: of each block, in the long form; none in the list form, where every row is a request.

    Raises:
        DataError: rows of a request stand apart.
    """
    if inputs.list_form:
        return [Part([block]) for block in inputs.blocks]
    parts: List[List[Segment]] = []
    for number, (block, own) in enumerate(zip(inputs.blocks, runs)):
        begins = block.start
        if _goes_on(runs, number):
            begins += own.head
            before = parts[-1][-1]
            if before.file == block.file and before.stop == block.start:
                parts[-1][-1] = before._replace(stop=begins)
            else:
                parts[-1].append(block._replace(stop=begins))
        if begins < block.stop:
            parts.append([block._replace(start=begins)])
    _must_stand_together(inputs, runs)
    return [Part(segments) for segments in parts]


def _goes_on(runs: Sequence[Runs], number: int) -> bool:
    """Whether a block begins with the request that the one before ends with."""
    return number > 0 and runs[number].first == runs[number - 1].last


def _must_stand_together(inputs: Inputs, runs: Sequence[Runs]) -> None:
    """Refuse a request whose rows are in two places. Requests are known by hashes; those of equal ones are compared."""
    parts = [own.hashes[int(_goes_on(runs, number)) :] for number, own in enumerate(runs)]
    hashes = np.concatenate([np.zeros(0, np.uint64), *parts])
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    begin = np.cumsum([0, *map(len, parts)])
    for first, second in zip(order[again], order[again + 1]):
        places = []
        for run in (first, second):
            block = inputs.blocks[owner[run]]
            ids = request_ids(RowRanges([Range(os.path.join(inputs.root, block.file.name), block.start, block.stop)]))
            places.append((ids[run - begin[owner[run]] + int(_goes_on(runs, owner[run]))], block))
        if places[0][0] == places[1][0]:
            raise DataError(
                f"the rows of request '{places[0][0]}' stand apart, among {places[0][1]} and {places[1][1]}: write the "
                "rows of a request one after another"
            )


def _must_be_alike(source: Source, schema: pa.Schema, first: pa.Schema) -> None:
    """Refuse a file whose columns are not those of the first one."""
    own, wanted = ({field.name: str(field.type) for field in each} for each in (schema, first))
    for name in [*wanted, *own]:
        if own.get(name) != wanted.get(name):
            raise DataError(
                f"'{source.name}': column '{name}' is {own.get(name, 'not there')}, in the first file "
                f"{wanted.get(name, 'not there')}: the files of a folder must have the same columns"
            )


def _blocks(file: File, metadata: pq.FileMetaData) -> List[Segment]:
    """The row groups of a file, small ones put together."""
    found: List[Segment] = []
    row, size = 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        stop = row + group.num_rows
        if found and size + group.total_byte_size <= _PART_BYTES:
            found[-1], size = found[-1]._replace(stop=stop), size + group.total_byte_size
        elif stop > row:
            found.append(Segment(file, row, stop))
            size = group.total_byte_size
        row = stop
    return found


def _state(path: str) -> Tuple[int, int]:
    """Size and time of the last change, as in :class:`File`; (−1, −1) if there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns
