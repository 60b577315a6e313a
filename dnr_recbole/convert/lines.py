"""What text formats share: lines with their place, and an incoming order where a format has none."""

from __future__ import annotations

import contextlib
import gzip
import io
from typing import Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple

import numpy as np

from dnr_recbole.convert import Option
from dnr_recbole.errors import DataError

SCORE = Option(
    "score", "popularity", "where the incoming order comes from, since the format has no score: popularity = clicks "
    "before the request; none = no score column", ("popularity", "none"),
)  # fmt: skip


def read_lines(path: str) -> Iterator[Tuple[int, str]]:
    """(number, line without its end) of a text file, plain, .gz or .zst; empty lines are left out.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        with open(path, "rb") as raw, contextlib.ExitStack() as stack:
            stream = raw
            if path.endswith(".gz"):
                stream = stack.enter_context(gzip.open(raw))
            elif path.endswith(".zst"):
                try:
                    import zstandard
                except ImportError:
                    raise DataError(f"'{path}' needs the package zstandard: pip install zstandard") from None
                stream = stack.enter_context(zstandard.ZstdDecompressor().stream_reader(raw))
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n"), 1):
                line = line.rstrip("\r\n")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8: {error.reason} at byte {error.start}") from error
    except (OSError, EOFError) as error:
        raise DataError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from error


def refuse(path: str, number: int, reason: str, line: str = "") -> NoReturn:
    """Raises:
    DataError: always, with the place.
    """
    shown = f": '{line[:60]}'" if line else ""
    raise DataError(f"'{path}', line {number}: {reason}{shown}")


class Popularity:
    """Clicks of each item before a time, as a score in [0, 1]: log(1 + its clicks) / log(1 + all clicks)."""

    def __init__(self, clicks: Dict[str, List[float]]):
        self.times = {item: np.sort(np.array(times, dtype=np.float64)) for item, times in clicks.items()}
        every = [np.zeros(0), *self.times.values()]
        self.all = np.sort(np.concatenate(every))

    def __call__(self, items: Sequence[str], time: Optional[float]) -> List[float]:
        """Scores of some items at a time; ties and unknown items get what their clicks say."""
        if time is None:
            time = np.inf
        total = np.log1p(np.searchsorted(self.all, time))
        if total == 0:
            return [0.0] * len(items)
        nothing = np.zeros(0)
        counts = [np.searchsorted(self.times.get(item, nothing), time) for item in items]
        return [float(np.log1p(count) / total) for count in counts]
