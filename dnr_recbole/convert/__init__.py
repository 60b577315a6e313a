"""Other formats → the canonical request log: ``dnr-recbole convert FORMAT IN… OUT.parquet``.

A converter is a generator of :class:`Request`, registered by name with its options; reading streams, and the output is
written under a temporary name and renamed::

    @converter("mine", [Option("threshold", 1.0, "grades from this on are positive")])
    def mine(inputs, options, counts): ...
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from dnr_recbole.config_schema import closest, parse_text
from dnr_recbole.errors import ConfigError, DataError
from dnr_recbole.files import atomic_write

_ROWS = 1 << 16  # of a row group
_TYPES = {
    "request_id": pa.string(), "user_id": pa.string(), "item_id": pa.string(), "score": pa.float64(),
    "label": pa.int8(), "position": pa.int32(), "exposed": pa.bool_(), "propensity": pa.float64(),
    "timestamp": pa.int64(), "split": pa.string(), "history": pa.list_(pa.string()),
}  # fmt: skip


@dataclass
class Request:
    """One request: ``columns`` hold a value per candidate (item_id and label at least); ``history`` is oldest first."""

    request_id: str
    columns: Dict[str, Sequence[Any]]
    user_id: Optional[str] = None
    timestamp: Optional[int] = None
    history: Optional[List[str]] = None


@dataclass(frozen=True)
class Option:
    """An option of a converter: ``--name=value``; its type is that of the default (None: text or number)."""

    name: str
    default: Any
    help: str
    choices: Sequence[str] = ()

    def parse(self, text: str) -> Any:
        """Raises:
        ConfigError: the text is no value of this option.
        """
        value = text if isinstance(self.default, str) else parse_text(text)
        wanted = (int, float) if isinstance(self.default, (int, float)) else object
        if isinstance(value, bool) or not isinstance(value, wanted) or (self.choices and value not in self.choices):
            must = f"one of {', '.join(self.choices)}" if self.choices else "a number"
            raise ConfigError(f"--{self.name}={text}: must be {must}")
        return value


@dataclass
class Counts:
    """What a conversion read and wrote; ``skipped`` counts what could not become part of the log, by reason."""

    requests: int = 0
    candidates: int = 0
    positives: int = 0
    skipped: Dict[str, int] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count something that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count

    def __str__(self) -> str:
        text = f"{self.requests:,} requests, {self.candidates:,} candidates, {self.positives:,} positives"
        more = [f"{reason}: {count:,}" for reason, count in self.skipped.items()]
        return "; ".join([text, *more, *self.notes])


Reader = Callable[[List[str], Dict[str, Any], Counts], Iterator[Request]]


@dataclass(frozen=True)
class Converter:
    """A registered format."""

    name: str
    read: Reader
    options: Dict[str, Option]
    inputs: str


CONVERTERS: Dict[str, Converter] = {}


def converter(name: str, inputs: str, options: Sequence[Option] = ()) -> Callable[[Reader], Reader]:
    """Decorator: the generator reads the format ``name``; ``inputs`` says which files, for the help."""

    def register(read: Reader) -> Reader:
        CONVERTERS[name] = Converter(name, read, {option.name: option for option in options}, inputs)
        return read

    return register


def get_converter(name: str) -> Converter:
    """Raises:
    ConfigError: nobody registered that format.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if name not in CONVERTERS:
        hint = closest(name, CONVERTERS) or f"known: {', '.join(sorted(CONVERTERS))}"
        raise ConfigError(f"format '{name}' is unknown: {hint}")
    return CONVERTERS[name]


def convert(name: str, inputs: List[str], output: str, **options: Any) -> Counts:
    """Convert files into a canonical request log in parquet.

    Raises:
        ConfigError: an unknown format or option.
        DataError: an input is damaged; the message names file and line. No output is left then.
    """
    found = get_converter(name)
    unknown = [option for option in options if option not in found.options]
    if unknown:
        hint = closest(unknown[0], found.options) or f"{name} has {', '.join(found.options) or 'none'}"
        raise ConfigError(f"unknown option '--{unknown[0]}' of {name}: {hint}")
    if not output.endswith(".parquet"):
        raise ConfigError(f"'{output}': the output's name must end in .parquet")
    if not inputs:
        raise ConfigError(f"{name} needs {found.inputs}")
    values = {key: options.get(key, option.default) for key, option in found.options.items()}
    counts = Counts()
    try:
        with atomic_write(output) as file:
            writer = _Writer(file)
            for request in found.read(inputs, values, counts):
                n = len(request.columns["item_id"])
                if n == 0:
                    counts.skip("requests without a candidate")
                    continue
                counts.requests += 1
                counts.candidates += n
                counts.positives += sum(request.columns["label"])
                writer.add(request, n)
            if not counts.requests:
                raise DataError(f"{', '.join(inputs)}: no request was found in the format {name}")
            writer.close()
    except UnicodeDecodeError as error:
        raise DataError(f"{', '.join(inputs)}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name}: {reason}") from error
    return counts


def convert_command(argv: List[str]) -> str:
    """What ``dnr-recbole convert`` does with its arguments; returns what it prints."""
    flags = [token for token in argv if token.startswith("--")]
    words = [token for token in argv if not token.startswith("--")]
    if not words or "--help" in flags:
        return _help(words[0] if words else None)
    found = get_converter(words[0])
    options = {}
    for flag in flags:
        name, equals, text = flag[2:].partition("=")
        if not equals:
            raise ConfigError(f"{flag} needs a value: {flag}=…")
        if name not in found.options:
            hint = closest(name, found.options) or f"{found.name} has {', '.join(found.options) or 'none'}"
            raise ConfigError(f"unknown option '--{name}' of {found.name}: {hint}")
        options[name] = found.options[name].parse(text)
    if len(words) < 3:
        raise ConfigError(f"convert {found.name} needs {found.inputs} and an output")
    counts = convert(words[0], words[1:-1], words[-1], **options)
    return f"{counts} -> {words[-1]}"


def _help(name: Optional[str]) -> str:
    if name is None:
        get_converter("mind")
        rows = [f"  {each.name:<10} {each.inputs}" for each in sorted(CONVERTERS.values(), key=lambda each: each.name)]
        return "\n".join(["dnr-recbole convert FORMAT IN… OUT.parquet [--option=value]", "", *rows])
    found = get_converter(name)
    rows = [f"  --{o.name}={o.default}  {o.help}" for o in found.options.values()]
    return "\n".join([f"dnr-recbole convert {found.name} {found.inputs} OUT.parquet", *rows])


class _Writer:
    """Requests as rows of a parquet file, in row groups; types are those of the first ones."""

    def __init__(self, file):
        self.file, self.writer, self.schema = file, None, None
        self.rows: Dict[str, List[Any]] = {}
        self.count = 0

    def add(self, request: Request, n: int) -> None:
        whole = {
            "request_id": request.request_id, "user_id": request.user_id, "timestamp": request.timestamp,
            "history": request.history,
        }  # fmt: skip
        for name, value in whole.items():
            self._column(name).extend([value] * n)
        for name, values in request.columns.items():
            self._column(name).extend(values)
        self.count += n
        for column in self.rows.values():
            column.extend([None] * (self.count - len(column)))
        if self.count >= _ROWS:
            self.flush()

    def _column(self, name: str) -> List[Any]:
        return self.rows.setdefault(name, [None] * self.count)

    def flush(self) -> None:
        if self.schema is None:
            always = ("request_id", "item_id", "label")
            used = {n: values for n, values in self.rows.items() if n in always or any(v is not None for v in values)}
            table = pa.table({name: pa.array(values, type=_TYPES.get(name)) for name, values in used.items()})
            self.schema = table.schema
            self.writer = pq.ParquetWriter(self.file, self.schema)
        new = [
            name for name in self.rows if name not in self.schema.names and any(v is not None for v in self.rows[name])
        ]
        if new:
            raise DataError(f"column '{new[0]}' appears after {_ROWS:,} rows for the first time: sort the input")
        columns = [self.rows.get(name, [None] * self.count) for name in self.schema.names]
        arrays = [pa.array(values, type=kind) for values, kind in zip(columns, self.schema.types)]
        self.writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self.rows, self.count = {}, 0

    def close(self) -> None:
        if self.count or self.writer is None:
            self.flush()
        self.writer.close()
