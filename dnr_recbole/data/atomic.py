"""Read atomic files (.inter, .user, .item): every line of the file becomes a row, or the file is refused.

An atomic file is a table of text: line 1 names each column and its type, every further line has one cell per column.
There is no quoting, so a quote is a character like any other. A cell of a token column is text, whatever it says (`NA`,
`null`, `007`); an empty cell is a missing value. Row r of a frame is line r + 2 of its file.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import pandas as pd
from recbole.utils import FeatureType

from dnr_recbole.config_schema import Keys
from dnr_recbole.errors import ConfigError, DataError

TYPES = {kind.value: kind for kind in FeatureType}
_BLOCK = 1 << 24  # bytes looked at in one go
_STAND_INS = "\x1f\x1e\x1d\x1c\x02\x01"  # for a separator of several bytes, which the fast parser cannot take
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Format:
    """How the cells of a file are written: RecBole's keys of the same names."""

    field_separator: str = "\t"
    seq_separator: str = " "
    encoding: str = "utf-8"
    seq_len: Dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Keys) -> Format:
        """The format that a run's keys describe.

        Raises:
            ConfigError: a separator is empty or breaks lines, or the encoding is unknown.
        """
        for key in ("field_separator", "seq_separator"):
            if not config[key] or set(config[key]) & set("\r\n\0"):
                raise ConfigError(f"{key}={config[key]!r}: must be at least one character, and no line break")
        encoding = config["encoding"] or "utf-8"
        try:
            "a".encode(encoding)
        except (LookupError, UnicodeError):
            known = "utf-8, utf-16, latin-1, cp1252, gbk, ..."
            raise ConfigError(f"encoding={encoding!r} is unknown; use {known}") from None
        return cls(config["field_separator"], config["seq_separator"], encoding, dict(config["seq_len"] or {}))


class AtomicFile:
    """One atomic file in memory; its encoding and first line are checked at once, the rest by :meth:`frame`.

    Attributes:
        path: where it lies.
        fields: the columns in the order of the file, name -> FeatureType.

    Raises:
        DataError: it cannot be read or decoded, holds bytes that no text has, or line 1 is wrong.
    """

    def __init__(self, path: Union[str, Path], form: Optional[Format] = None) -> None:
        self.path, self.form = Path(path), form or Format()
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be read: {error.strerror}") from None
        data = self._utf8(data)
        self._refuse_control_bytes(data)
        if re.search(rb"\n\r?\n\Z", data[-4:]):
            data = data.rstrip(b"\r\n")  # empty lines at the end are no lines
        end = data.find(b"\n")
        end = len(data) if end < 0 else end
        header = data[:end].decode("utf-8").rstrip("\r")
        self.fields = self._header(header)
        self._data, self._begin = self._single_byte_separator(data, end + 1)

    # ------------------------------------------------------------------ text

    def _utf8(self, data: bytes) -> bytes:
        """The file as UTF-8 without a byte-order mark, whatever it was written in."""
        encoding = self.form.encoding
        try:
            if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
                data = data.decode(encoding).encode("utf-8")
            elif not data.isascii():
                _check_utf8(data)
        except UnicodeDecodeError as error:
            place = f"byte {error.start + 1}"
            if "utf-8" in codecs.lookup(encoding).name:
                place = f"line {data.count(10, 0, error.start) + 1}, {place}"
            mark = next((name for bom, name in _BYTE_ORDER_MARKS.items() if data.startswith(bom)), "")
            hint = f"encoding={mark}" if mark else "the key encoding, e.g. encoding=latin-1 or cp1252"
            what = f"0x{data[error.start]:02x}" if error.start < len(data) else "its end"
            raise DataError(
                f"'{self.path}' cannot be read as {encoding} ({place}: {what}): set {hint}, or convert the file"
            ) from None
        except (UnicodeError, LookupError) as error:
            raise DataError(f"'{self.path}' cannot be read with encoding={encoding}: {error}") from None
        return data[3:] if data.startswith(codecs.BOM_UTF8) else data

    def _refuse_control_bytes(self, data: bytes) -> None:
        place = data.find(0)
        if place >= 0:
            self._refuse(data.count(10, 0, place) + 1, "a NUL byte: this is no text, or has another encoding")
        if data.count(b"\r") != data.count(b"\r\n"):
            stray = re.search(rb"\r(?!\n|\Z)", data)
            if stray:
                self._refuse(
                    data.count(10, 0, stray.start()) + 1,
                    "a carriage return that does not end the line; write line ends as \\n or \\r\\n",
                )

    def _header(self, line: str) -> Dict[str, FeatureType]:
        if not line:
            raise DataError(f"'{self.path}' is empty: its first line must name the columns, such as user_id:token")
        fields: Dict[str, FeatureType] = {}
        for cell in line.split(self.form.field_separator):
            name, _, kind = cell.partition(":")
            if kind not in TYPES or not name:
                self._refuse(
                    1,
                    f"column '{shorten(cell)}' must be written name:type with type one of {', '.join(TYPES)}, "
                    f"columns separated by {self.form.field_separator!r}",
                )
            if name in fields:
                self._refuse(1, f"two columns are named '{shorten(name)}'; rename one of them")
            fields[name] = TYPES[kind]
        return fields

    def _single_byte_separator(self, data: bytes, begin: int) -> Tuple[bytes, int]:
        separator = self.form.field_separator.encode("utf-8")
        self._separator = self.form.field_separator
        if len(separator) == 1:
            return data, begin
        free = [stand_in for stand_in in _STAND_INS if stand_in.encode() not in data]
        if not free:
            raise DataError(f"'{self.path}': choose a field_separator of one character for this file")
        self._separator = free[0]
        head = data[:begin].replace(separator, free[0].encode())
        return head + data[begin:].replace(separator, free[0].encode()), len(head)

    # ------------------------------------------------------------------ cells

    def frame(self, columns: Optional[Sequence[str]] = None, required: Sequence[str] = ()) -> pd.DataFrame:
        """The table, one row per line: index 0 ... n - 1, columns in the order of the file.

        token: str; float: float64; token_seq: array of str; float_seq: float64 array. A missing token or float is
        NaN, a missing sequence an empty array.

        Args:
            columns: those to read; cells of other columns are counted, but not looked at. Default: all.
            required: columns among them in which no cell may be missing.

        Raises:
            DataError: a line has too many or too few cells, a number is none, or a required cell is empty.
        """
        names = [name for name in self.fields if columns is None or name in columns]
        n_lines = self._count_lines()
        frame = self._parse(names, n_lines)
        for name in names:
            kind, cells = self.fields[name], frame[name]
            if kind == FeatureType.TOKEN:
                missing = (cells == "").to_numpy()
                if missing.any():
                    frame[name] = cells.mask(missing, np.nan)
            elif kind == FeatureType.FLOAT:
                missing = np.isnan(cells.to_numpy())
            else:
                frame[name] = pd.Series(self._sequences(name, cells), index=frame.index, dtype=object)
                missing = np.zeros(0, dtype=bool)
            if name in required and missing.any():
                self.refuse_rows(missing, f"'{name}' is missing")
        return frame

    def _count_lines(self) -> int:
        """The number of lines below the header, each of which has as many cells as the header has names."""
        n_lines, wrong = 0, []  # of wrong lines: line number and number of cells
        separator, width = ord(self._separator), len(self.fields)
        low = self._begin
        while low < len(self._data):
            high = _end_of_block(self._data, low)
            block = np.frombuffer(self._data, dtype=np.uint8, count=high - low, offset=low)
            ends = np.flatnonzero(block == 10)
            if block[-1] != 10:
                ends = np.append(ends, len(block))
            cells = np.diff(np.searchsorted(np.flatnonzero(block == separator), ends), prepend=0) + 1
            bad = np.flatnonzero(cells != width)
            wrong.append(np.stack([bad + n_lines + 2, cells[bad]], axis=1))
            n_lines, low = n_lines + len(ends), high
        found = np.concatenate(wrong) if wrong else np.zeros((0, 2), dtype=int)
        if len(found):
            line, cells = (int(number) for number in found[0])
            what = f"{cells} cell{'s' * (cells > 1)} under {width} names"
            if cells == 1 and not self._line(line).strip("\r"):
                what = f"the line is empty ({what})"
            elif cells < width and line == n_lines + 1:
                what += " (is the file truncated?)"
            elif cells > width:
                what += f" (a {self.form.field_separator!r} inside a cell, or a column without a name in line 1?)"
            self._refuse(line, what, len(found))
        return n_lines

    def _line(self, number: int) -> str:
        begin = self._begin
        for _ in range(number - 2):
            begin = self._data.find(b"\n", begin) + 1
        end = self._data.find(b"\n", begin)
        return self._data[begin : end if end >= 0 else None].decode("utf-8")

    def _parse(self, names: List[str], n_lines: int) -> pd.DataFrame:
        """Cells as text, of float columns as float64; NaN where such a cell is empty."""
        floats = [name for name in names if self.fields[name] == FeatureType.FLOAT]
        try:
            frame = self._read_csv(names, floats, n_lines)
            # Words such as True become 1.0 in a column that has nothing else.
            first = self._line(2).rstrip("\r").split(self._separator) if n_lines else []
            cells = dict(zip(self.fields, first))
            if all(np.isfinite(frame[n].to_numpy()).all() and _NUMBER.fullmatch(cells.get(n, "0")) for n in floats):
                return frame
        except ValueError:  # some cell is no number, and the parser does not say which
            pass
        frame = self._read_csv(names, [], n_lines)
        for name in floats:
            frame[name] = self._numbers(name, frame[name].to_numpy())
        return frame

    def _read_csv(self, names: List[str], floats: List[str], n_lines: int) -> pd.DataFrame:
        place = {name: i for i, name in enumerate(self.fields)}
        frame = pd.read_csv(
            io.BytesIO(self._data),
            sep=self._separator,
            header=0,
            names=list(range(len(place))),
            usecols=[place[name] for name in names],
            dtype={place[name]: np.float64 if name in floats else str for name in names},
            index_col=False,
            quoting=csv.QUOTE_NONE,
            na_filter=False,
            skip_blank_lines=False,
            float_precision="round_trip",
            encoding="utf-8",
            engine="c",
        )
        if len(frame) != n_lines:  # cannot be, as far as we know; never go on with another table than the file's
            raise DataError(f"'{self.path}' has {n_lines} lines, but {len(frame)} rows were read")
        frame.columns = names
        return frame

    def _numbers(self, name: str, cells: np.ndarray) -> np.ndarray:
        """Text to float64, NaN where a cell is empty."""
        known = cells != ""
        bad = np.array([bool(cell) and not _NUMBER.fullmatch(cell) for cell in cells], dtype=bool)
        numbers = np.full(len(cells), np.nan)
        numbers[known & ~bad] = cells[known & ~bad].astype(np.float64)
        bad |= np.isinf(numbers)
        if bad.any():
            shown = shorten(cells[np.argmax(bad)])
            self.refuse_rows(bad, f"'{name}' is no number: '{shown}'")
        return numbers

    def _sequences(self, name: str, cells: pd.Series) -> List[np.ndarray]:
        tokens = [[token for token in cell.split(self.form.seq_separator) if token] for cell in cells]
        limit = self.form.seq_len.get(name)
        tokens = [row[:limit] for row in tokens] if limit else tokens
        if self.fields[name] == FeatureType.TOKEN_SEQ:
            return [np.array(row, dtype=object) for row in tokens]
        lengths = np.array([len(row) for row in tokens], dtype=int)
        flat = np.array([token for row in tokens for token in row], dtype=object)
        bad = np.array([not _NUMBER.fullmatch(token) for token in flat], dtype=bool)
        numbers = np.where(bad, "0", flat).astype(np.float64)
        bad |= np.isinf(numbers)
        if bad.any():
            row = np.repeat(np.arange(len(tokens)), lengths)[bad]
            rows = np.isin(np.arange(len(tokens)), row)
            self.refuse_rows(rows, f"'{name}' has a value that is no number: '{shorten(flat[np.argmax(bad)])}'")
        return np.split(numbers, np.cumsum(lengths)[:-1]) if len(tokens) else []

    # ------------------------------------------------------------------ refusals

    def refuse_rows(self, bad: np.ndarray, what: str) -> None:
        """Raise a DataError about the first of the rows that are True in ``bad`` [n]; there must be one."""
        self._refuse(int(np.argmax(bad)) + 2, what, int(bad.sum()))

    def _refuse(self, line: int, what: str, count: int = 1) -> None:
        more = f" (and on {count - 1} further line{'s' * (count > 2)})" if count > 1 else ""
        raise DataError(f"'{self.path}', line {line}: {what}{more}; repair or remove it")


def _check_utf8(data: bytes) -> None:
    """Raise UnicodeDecodeError with positions in ``data``; in blocks, so that no second copy of it is made."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for low in range(0, len(data), _BLOCK):
        high = low + _BLOCK
        try:
            decoder.decode(data[low:high], final=high >= len(data))
        except UnicodeDecodeError as error:
            begin = min(high, len(data)) - len(error.object)  # it begins with what the last block left over
            raise UnicodeDecodeError("utf-8", data, begin + error.start, begin + error.end, error.reason) from None


def _end_of_block(data: bytes, low: int) -> int:
    high = low + _BLOCK
    if high >= len(data):
        return len(data)
    return data.rfind(b"\n", low, high) + 1 or data.find(b"\n", high) + 1 or len(data)


def shorten(text: str) -> str:
    """At most 40 characters of a text from a file, in one line and without control characters."""
    text = "".join(c if c.isprintable() else "?" for c in text[:41])
    return text if len(text) <= 40 else text[:37] + "..."
