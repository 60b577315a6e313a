"""Columns of a log as arrays: ids as codes, numbers, switches and lists, whatever type a file gives them."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dnr_recbole.errors import DataError

Place = Callable[[int], str]  # number of a row in the batch → its place in words
_TRUE, _FALSE = ("1", "1.0", "true", "t", "yes"), ("0", "0.0", "false", "f", "no")


class Tokens(NamedTuple):
    """Ids as codes into the distinct ones: codes int64 [m], −1 = missing; values object [v], texts."""

    codes: np.ndarray
    values: np.ndarray

    def texts(self) -> np.ndarray:
        """object [m]; None where missing."""
        out = np.full(len(self.codes), None, dtype=object)
        known = self.codes >= 0
        out[known] = self.values[self.codes[known]]
        return out

    def take(self, rows: Union[np.ndarray, slice]) -> Tokens:
        """Those of some rows."""
        return Tokens(self.codes[rows], self.values)


class Lists(NamedTuple):
    """Lists of different lengths: ptr int64 [r + 1] into ``values``, a flat array or :class:`Tokens`."""

    ptr: np.ndarray
    values: Any


def token(value: Any) -> Optional[str]:
    """An id as text: the same for 7, "7" and 7.0, which integers become where a column has a gap; None = missing."""
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, (float, np.floating)) and float(value).is_integer() and abs(float(value)) < 2**63:
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    text = str(value)
    return text if text else None


def to_table(frame: pd.DataFrame) -> pa.Table:
    """A DataFrame as an Arrow table; columns of mixed types become texts."""
    arrays = []
    for name in frame:
        column = frame[name]
        if isinstance(column, pd.DataFrame):
            raise DataError(f"the DataFrame has two columns '{name}'")
        try:
            arrays.append(pa.array(column, from_pandas=True))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            arrays.append(_mixed(column))
    return pa.table(dict(zip(map(str, frame.columns), arrays)))


def _mixed(column: pd.Series) -> pa.Array:
    if any(isinstance(value, (list, tuple, np.ndarray)) for value in column):
        return pa.array([None if value is None else [token(v) for v in value] for value in column])
    return pa.array([token(value) for value in column], type=pa.string())


def plain(column: Any) -> pa.Array:
    """One array without chunks, dictionaries or extension types."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # older pyarrow: no or several chunks
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is one of lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def tokens(column: pa.Array) -> Tokens:
    """The ids of a column."""
    column = plain(column)
    if pa.types.is_null(column.type):
        return Tokens(np.full(len(column), -1), np.zeros(0, dtype=object))
    if pa.types.is_nested(column.type):
        raise DataError(f"ids are of type {column.type}: write texts or integers")
    encoded = column.dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    texts = [token(value) for value in encoded.dictionary.to_pylist()]
    if None not in texts and len(set(texts)) == len(texts):
        return Tokens(codes, np.array(texts, dtype=object))
    index = {text: number for number, text in enumerate(dict.fromkeys(t for t in texts if t is not None))}
    renumbered = np.array([-1 if text is None else index[text] for text in texts] + [-1], dtype=np.int64)
    return Tokens(renumbered[codes], np.array(list(index), dtype=object))


class Numbers(NamedTuple):
    """float64 [m]; NaN where ``missing`` or ``wrong`` (no number at all); bool [m] each."""

    values: np.ndarray
    missing: np.ndarray
    wrong: np.ndarray


def numbers(column: pa.Array) -> Numbers:
    """The numbers of a column, from texts as well. A NaN that stands there is no missing value: values has it."""
    column = plain(column)
    missing = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_null(column.type):
        return Numbers(np.full(len(column), np.nan), missing, np.zeros(len(column), dtype=bool))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        texts = pc.utf8_trim_whitespace(column)
        missing = missing | pc.equal(texts, "").fill_null(False).to_numpy(zero_copy_only=False)
        texts = texts.to_numpy(zero_copy_only=False)
        values = pd.to_numeric(pd.Series(texts, dtype=object).mask(missing), errors="coerce").to_numpy(np.float64)
        said_nan = np.isin(np.char.lower(np.where(missing, "", texts).astype(str)), ("nan", "+nan", "-nan"))
        return Numbers(values, missing, np.isnan(values) & ~missing & ~said_nan)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = pc.divide(column.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64()), 1e6)
    try:
        values = column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return Numbers(np.full(len(column), np.nan), missing, ~missing)
    return Numbers(values, missing, np.zeros(len(column), dtype=bool))


def flags(column: pa.Array) -> Numbers:
    """0 or 1 per row, from true/false, yes/no and 0/1; anything else is ``wrong``."""
    column = plain(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        found = tokens(column)
        texts = [str(text).strip().lower() for text in found.values]
        meaning = np.array([1.0 if t in _TRUE else 0.0 if t in _FALSE else np.nan for t in texts] + [np.nan])
        values, missing = meaning[found.codes], found.codes < 0
        return Numbers(values, missing, np.isnan(values) & ~missing)
    values, missing, wrong = numbers(column)
    return Numbers(values, missing, wrong | (~missing & ~np.isin(values, (0.0, 1.0))))


def times(column: pa.Array) -> Numbers:
    """Seconds, of any scale and origin: numbers as they are, dates and times as Unix seconds."""
    column = plain(column)
    found = numbers(column)
    if found.wrong.any() and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        texts = pd.Series(column.to_numpy(zero_copy_only=False), dtype=object)[found.wrong]
        parsed = pd.to_datetime(texts, errors="coerce", utc=True)
        known = parsed.notna().to_numpy()
        rows = np.flatnonzero(found.wrong)[known]
        found.values[rows] = (parsed[known] - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy()
        found.wrong[rows] = False
    return found


def lists(column: pa.Array) -> Lists:
    """The offsets of a list column and its flat values, an Arrow array; a missing list is an empty one."""
    column = plain(column)
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    length = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return Lists(np.concatenate([[0], np.cumsum(length)]), column.flatten())


def text_lists(column: pa.Array) -> Lists:
    """Lists of ids from a list column, or from texts in which blanks separate them."""
    column = plain(column)
    if is_list(column.type):
        ptr, values = lists(column)
        return Lists(ptr, tokens(values))
    if pa.types.is_null(column.type):
        return Lists(np.zeros(len(column) + 1, dtype=np.int64), tokens(column[:0]))
    parts = pc.split_pattern_regex(pc.utf8_trim_whitespace(column.cast(pa.string()).fill_null("")), r"\s+")
    ptr, values = lists(parts)
    found = tokens(values)  # of an empty text: one missing id
    keep = found.codes >= 0
    kept = np.concatenate([[0], np.cumsum(keep)])
    return Lists(kept[ptr], found.take(keep))
