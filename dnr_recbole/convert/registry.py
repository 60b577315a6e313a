"""What a converter is: a generator of :class:`Request`, registered by name, with its options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from dnr_recbole.errors import ConfigError, closest
from dnr_recbole.log_names import ITEMS, KNOWN

CANONICAL = (
    "request_id", "user_id", "item_id", "score", "label", "position", "exposed", "propensity", "timestamp", "split",
    "history",
)  # fmt: skip

_TAKEN = frozenset((*CANONICAL, *KNOWN, ITEMS))


@dataclass
class Request:
    """One request.

    Attributes:
        request_id: must not come again in the log.
        columns: a value per candidate, in the order of the input; ``item_id`` and ``label`` (0/1) at least.
        user_id, timestamp (unix seconds), history (item ids, oldest first): None where the format has none.
        place: file and line or row where it begins, for messages.
    """

    request_id: str
    columns: Dict[str, List[Any]]
    user_id: Optional[str] = None
    timestamp: Optional[int] = None
    history: Optional[List[str]] = None
    place: str = ""


@dataclass(frozen=True)
class Option:
    """An option of a converter, ``--name=value`` on the command line; its type is that of the default."""

    name: str
    default: Any
    help: str
    choices: Tuple[str, ...] = ()
    minimum: Optional[float] = None

    @property
    def type(self) -> type:
        """str, int or float."""
        return type(self.default)

    def parse(self, text: str) -> Any:
        """Raises:
        ConfigError: the text is no value of this option.
        """
        try:
            return self.check(self.type(text))
        except ValueError:
            raise ConfigError(f"--{self.name}={text}: must be {self._must()}") from None

    def check(self, value: Any) -> Any:
        """The value in this option's type.

        Raises:
            ConfigError: it has another type, is not finite, too small, or not among the choices.
        """
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        good = type(value) is self.type
        if good and self.type is str:
            good = value in self.choices if self.choices else bool(value)
        elif good:
            good = math.isfinite(value) and (self.minimum is None or value >= self.minimum)
        if not good:
            raise ConfigError(f"--{self.name}={value}: must be {self._must()}")
        return value

    def _must(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        name = {str: "a name", int: "a whole number", float: "a number"}[self.type]
        return name if self.minimum is None else f"{name} from {self.minimum:g} on"


@dataclass
class Counts:
    """What a conversion read and wrote.

    Attributes:
        rows: lines or rows read, of all inputs.
        requests, candidates, positives: written.
        skipped: what could not become part of the log, reason -> count.
        taken: what was written by an assumption, which -> count.
        notes: what else the reader of the log must know.
    """

    rows: int = 0
    requests: int = 0
    candidates: int = 0
    positives: int = 0
    skipped: Dict[str, int] = field(default_factory=dict)
    taken: Dict[str, int] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count something that is left out."""
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + count

    def take(self, assumption: str, count: int = 1) -> None:
        """Count something that is written as an assumption has it."""
        if count:
            self.taken[assumption] = self.taken.get(assumption, 0) + count

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)

    def __str__(self) -> str:
        written = f"{self.requests:,} requests, {self.candidates:,} candidates, {self.positives:,} positives"
        skipped = [f"skipped {reason}: {count:,}" for reason, count in self.skipped.items()]
        taken = [f"{assumption}: {count:,}" for assumption, count in self.taken.items()]
        return "; ".join([f"{self.rows:,} rows read", written, *skipped, *taken, *self.notes])


Reader = Callable[[List[str], Dict[str, Any], Counts], Iterator[Request]]


@dataclass(frozen=True)
class Converter:
    """A registered format; ``least`` and ``most`` (None: any number) say how many inputs it takes."""

    name: str
    read: Reader
    options: Dict[str, Option]
    inputs: str
    least: int = 1
    most: Optional[int] = None


CONVERTERS: Dict[str, Converter] = {}


def converter(
    name: str,
    inputs: str = "FILE…",
    options: Sequence[Option] = (),
    least: int = 1,
    most: Optional[int] = None,
) -> Callable[[Reader], Reader]:
    """Decorator: the generator reads the format ``name``; ``inputs`` says which files, for the help."""

    def register(read: Reader) -> Reader:
        CONVERTERS[name] = Converter(name, read, {option.name: option for option in options}, inputs, least, most)
        return read

    return register


def get_converter(name: str) -> Converter:
    """Raises:
    ConfigError: nobody registered that format.
    """
    if name not in CONVERTERS:
        hint = closest(name, CONVERTERS) or f"known: {', '.join(sorted(CONVERTERS))}"
        raise ConfigError(f"format '{name}' is unknown: {hint}")
    return CONVERTERS[name]


def options_of(name: str) -> Dict[str, Option]:
    """The options of a format, name -> Option.

    Raises:
        ConfigError: nobody registered that format.
    """
    return dict(get_converter(name).options)


def get_option(found: Converter, name: str) -> Option:
    """Raises:
    ConfigError: the format has no such option.
    """
    if name not in found.options:
        has = ", ".join(found.options) or "none"
        hint = closest(name, found.options) or f"{found.name} has {has}"
        raise ConfigError(f"unknown option '--{name}' of {found.name}: {hint}")
    return found.options[name]


def feature_names(names: Iterable[str], counts: Counts, prefix: str = "item_") -> Dict[str, str]:
    """name in the input -> column of the log. A feature that is called like a column that readers of logs know gets a
    prefix, since it would take that column's place; a score under its own name stays a score."""
    renamed = {}
    for name in names:
        renamed[name] = name
        if name in _TAKEN:
            renamed[name] = f"{prefix}{name}"
            counts.note(f"field '{name}' became column '{prefix}{name}'")
    return renamed
