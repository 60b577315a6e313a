"""What text formats share: lines with their place, times, and an incoming order where a format has none."""

from __future__ import annotations

import calendar
import contextlib
import gzip
import io
import re
import zlib
from array import array
from typing import Any, BinaryIO, Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple

import numpy as np

from dnr_recbole.convert.registry import Counts, Option
from dnr_recbole.errors import DataError

SCORE = Option(
    "score", "popularity", "where the incoming order comes from, since the format has no score: popularity = clicks "
    "before the request; none = no score column", ("popularity", "none"),
)  # fmt: skip
_PACKED = 1 << 14  # bytes of a .zst that are unpacked at once
_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d+))? ?(?:Z|UTC|([+-])(\d\d):?(\d\d))?")


def read_lines(path: str, counts: Optional[Counts] = None) -> Iterator[Tuple[int, str]]:
    """(number, line without its end) of a UTF-8 text file, plain, .gz or .zst; empty lines are left out.

    Args:
        counts: gets the number of lines; None for a file that is read once more.

    Raises:
        DataError: the file is missing, cannot be read, or is no UTF-8.
    """
    try:
        with open_bytes(path) as stream:
            for number, raw in enumerate(stream, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    refuse(path, number, f"byte {error.start + 1} is not UTF-8; convert the file to UTF-8")
                if line.strip():
                    if counts is not None:
                        counts.rows += 1
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, unpacked if its name ends in .gz or .zst.

    Raises:
        DataError: .zst without the package zstandard, or damaged.
        OSError, EOFError, zlib.error: as they come.
    """
    with open(path, "rb") as raw:
        if path.endswith(".gz"):
            with gzip.open(raw) as stream:
                yield stream
        elif path.endswith(".zst"):
            try:
                import zstandard
            except ImportError:
                raise DataError(f"'{path}' needs the package zstandard: pip install zstandard") from None
            try:
                yield io.BufferedReader(_Zst(raw, zstandard.ZstdDecompressor()))
            except zstandard.ZstdError as error:
                raise unreadable(path, error) from None
        else:
            yield raw


class _Zst(io.RawIOBase):
    """The content of all frames of a .zst. zstandard's own reader takes a file that is cut off for a whole one.

    Raises:
        EOFError: the last frame has no end.
    """

    def __init__(self, raw: BinaryIO, decompressor: Any):
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._packed, self._content = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._content:
            self._packed = self._packed or self._raw.read(_PACKED)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it is cut off")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._content = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._content))
        buffer[:n], self._content = self._content[:n], self._content[n:]
        return n


def unreadable(path: str, error: BaseException) -> DataError:
    """The error to raise about a file that cannot be read."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return DataError(f"'{path}' cannot be read: {reason}")


def place(path: str, number: int) -> str:
    """Where a line is, in words."""
    return f"'{path}', line {number}"


def refuse(path: str, number: int, reason: str, line: str = "") -> NoReturn:
    """Raises:
    DataError: always, with the place.
    """
    shown = f": '{shorten(line)}'" if line else ""
    raise DataError(f"{place(path, number)}: {reason}{shown}")


def shorten(text: str) -> str:
    """One printable line of at most 60 characters."""
    text = "".join(c if c.isprintable() else "·" for c in text[:61])
    return text if len(text) <= 60 else text[:59] + "…"


def milliseconds(text: str) -> Optional[int]:
    """Unix milliseconds of a date and time in ISO 8601 (without a zone: UTC); None if it is none."""
    found = _TIME.fullmatch(text.strip())
    if not found:
        return None
    *clock, fraction, sign, hours, minutes = found.groups()
    year, month, day, hour, minute, second = map(int, clock)
    if not (1 <= month <= 12 and 1 <= day <= calendar.monthrange(max(year, 1), month)[1]):
        return None
    if hour > 23 or minute > 59 or second > 60:
        return None
    seconds = calendar.timegm((year, month, day, hour, minute, second))
    if sign:
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds += -offset if sign == "+" else offset
    return seconds * 1000 + int(f"{fraction or 0:0<3}"[:3])


class Clicks:
    """Times of clicks per item, 8 bytes each."""

    def __init__(self) -> None:
        self.times: Dict[str, array] = {}

    def add(self, item: str, time: float) -> None:
        """A click, in any order of time."""
        self.times.setdefault(item, array("d")).append(time)


class Popularity:
    """Clicks of each item before a time, as a score in [0, 1]: log(1 + its clicks) / log(1 + all clicks).

    The order of the file does not matter, only the times: a file need not be sorted by time (MIND's is not).
    """

    def __init__(self, clicks: Clicks):
        self._times = {item: np.sort(np.frombuffer(times)) for item, times in clicks.times.items()}
        self._all = np.sort(np.concatenate([np.zeros(0), *self._times.values()]))

    def __call__(self, items: Sequence[str], time: float) -> List[float]:
        """Scores of some items [n] at a time; a click at that very time does not count."""
        total = np.log1p(np.searchsorted(self._all, time))
        if total == 0:
            return [0.0] * len(items)
        nothing = np.zeros(0)
        counts = [np.searchsorted(self._times.get(item, nothing), time) for item in items]
        return [float(np.log1p(count) / total) for count in counts]
