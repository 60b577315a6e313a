"""Columns of features as numbers: fitted once, saved as JSON, the same in training and in serving."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from dnr_recbole.errors import DataError
from dnr_recbole.requestlog.columns import is_list, lists, numbers, plain, tokens

_NUMERIC_SHARE = 0.95  # of the values of a column of texts; the odd one ("unknown") counts as missing

_FARTHEST = 1e6  # standard deviations; farther values, such as 1e30 in a request, would overflow in a model


class Encoder:
    """One column as ``width`` numbers.

    ``kind`` is "number" (standardised), "vector" (each place standardised) or "category" (one-hot, multi-hot for
    lists); a missing or unknown value gives zeros, for numbers the mean.
    """

    def __init__(
        self, kind: str, mean: Sequence[float] = (), std: Sequence[float] = (), values: Sequence[str] = ()
    ) -> None:
        self.kind, self.mean, self.std, self.values = kind, list(mean), list(std), list(values)
        self._index = {value: number for number, value in enumerate(self.values)}
        if kind not in ("number", "vector", "category") or len(self.mean) != len(self.std):
            raise DataError(f"an encoder of features is damaged: kind {kind!r}")

    @property
    def width(self) -> int:
        """Numbers per row."""
        return len(self.values) if self.kind == "category" else len(self.mean)

    def to_dict(self) -> Dict[str, Any]:
        """JSON-able; the inverse of ``Encoder(**…)``."""
        return {"kind": self.kind, "mean": self.mean, "std": self.std, "values": self.values}

    @classmethod
    def fit(cls, column: pa.Array, max_vocabulary: int) -> Optional[Encoder]:
        """The encoder that suits a column; None for one of more than ``max_vocabulary`` categories."""
        column = plain(column)
        kind = column.type
        if is_list(kind) and not _texts(kind.value_type):
            return cls("vector", *_moments(_vectors(column, None)))
        if is_list(kind) or _texts(kind):
            if not is_list(kind):
                found = numbers(column)
                known = (~found.missing).sum()
                if known and (~found.missing & ~found.wrong).sum() >= _NUMERIC_SHARE * known:
                    return cls("number", *_moments(found.values[:, None]))
            values = sorted(tokens(lists(column).values if is_list(kind) else column).values)
            return cls("category", values=values) if len(values) <= max_vocabulary else None
        return cls("number", *_moments(numbers(column).values[:, None]))

    def transform(self, column: pa.Array) -> np.ndarray:
        """float32 [m, width]."""
        column = plain(column)
        if self.kind == "number":
            values = numbers(column).values[:, None]
        elif self.kind == "vector":
            values = _vectors(column, self.width)
        else:
            return self._one_hot(column)
        with np.errstate(over="ignore"):
            scaled = (values - np.array(self.mean)) / np.array(self.std)
        return np.clip(np.where(np.isfinite(scaled), scaled, 0.0), -_FARTHEST, _FARTHEST).astype(np.float32)

    def _one_hot(self, column: pa.Array) -> np.ndarray:
        out = np.zeros((len(column), self.width), dtype=np.float32)
        if is_list(column.type):
            ptr, flat = lists(column)
            row, found = np.repeat(np.arange(len(column)), np.diff(ptr)), tokens(flat)
        else:
            row, found = np.arange(len(column)), tokens(column)
        place = np.array([self._index.get(value, -1) for value in found.values] + [-1], dtype=np.int64)[found.codes]
        out[row[place >= 0], place[place >= 0]] = 1.0
        return out


class Encoders:
    """Several columns side by side."""

    def __init__(self, encoders: Dict[str, Encoder]):
        self.encoders = encoders

    @classmethod
    def fit(cls, columns: Dict[str, pa.Array], max_vocabulary: int) -> Encoders:
        """One per column; those with too many categories are left out (see :attr:`names`)."""
        fitted = {name: Encoder.fit(column, max_vocabulary) for name, column in columns.items()}
        return cls({name: encoder for name, encoder in fitted.items() if encoder is not None})

    @property
    def names(self) -> List[str]:
        """The columns that are encoded."""
        return list(self.encoders)

    @property
    def width(self) -> int:
        """Numbers per row."""
        return sum(encoder.width for encoder in self.encoders.values())

    def transform(self, columns: Dict[str, pa.Array], n_rows: int) -> np.ndarray:
        """float32 [m, width]; a column that is not there is missing in every row."""
        blocks = [np.zeros((n_rows, 0), dtype=np.float32)]
        for name, encoder in self.encoders.items():
            if name in columns:
                blocks.append(encoder.transform(columns[name]))
            else:
                blocks.append(np.zeros((n_rows, encoder.width), dtype=np.float32))
        return np.concatenate(blocks, axis=1)

    def to_dict(self) -> Dict[str, Any]:
        """JSON-able; the inverse of :meth:`from_dict`."""
        return {name: encoder.to_dict() for name, encoder in self.encoders.items()}

    @classmethod
    def from_dict(cls, content: Dict[str, Any]) -> Encoders:
        """Undo of :meth:`to_dict`."""
        return cls({name: Encoder(**each) for name, each in content.items()})


def _texts(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind)


def _vectors(column: pa.Array, width: Optional[int]) -> np.ndarray:
    """float64 [m, width]; NaN where there is none, or one of another width."""
    ptr, flat = lists(column)
    values, length = numbers(flat).values, np.diff(ptr)
    if width is None:
        width = int(length.max(initial=0))
    out = np.full((len(column), width), np.nan)
    rows = np.flatnonzero(length == width)
    if width and len(rows):
        out[rows] = values[ptr[rows, None] + np.arange(width)]
    return out


def _moments(values: np.ndarray) -> Tuple[List[float], List[float]]:
    """Mean and standard deviation of the finite values of each column, 1 for a constant one."""
    known = np.isfinite(values)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, values, 0.0).sum(0) / count
    std = np.sqrt(np.where(known, (values - mean) ** 2, 0.0).sum(0) / count)
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()
