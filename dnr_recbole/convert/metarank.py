"""metarank's events: JSON lines of rankings and of the interactions that follow them."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Set

from dnr_recbole.convert.lines import milliseconds, place, read_lines, refuse, shorten
from dnr_recbole.convert.registry import Counts, Option, Request, converter, feature_names


class _Event(NamedTuple):
    path: str
    number: int
    kind: str
    time: int  # unix milliseconds
    content: Dict[str, Any]

    def refuse(self, reason: str) -> NoReturn:
        refuse(self.path, self.number, reason)


@dataclass
class _Ranking:
    """A ranking that waits for its interactions."""

    event: _Event
    items: List[str]
    fields: List[Dict[str, Any]]  # per item
    about: Dict[str, Any]  # of the request
    clicked: Set[str] = field(default_factory=set)


@converter(
    "metarank", "events.jsonl[.gz|.zst]…",
    [Option("score", "relevancy", "the items' field that is the incoming score"),
     Option("window", 30.0, "minutes in which an interaction belongs to its ranking", minimum=0)],
)  # fmt: skip
def metarank(inputs, options, counts):
    """Items are in display order. What stands behind the last click was not examined (exposed is false), and of a
    ranking without a click nothing is known to have been examined. An interaction of any type makes an item positive.
    Item fields become columns, fields of the ranking request_NAME. Rankings of one window are held in memory."""
    waiting: OrderedDict[str, _Ranking] = OrderedDict()
    window, kinds = options["window"] * 60_000, _Kinds()
    for event in _events(inputs, counts):
        while waiting and next(iter(waiting.values())).event.time + window < event.time:
            yield _request(*waiting.popitem(last=False), options["score"], counts)
        if event.kind == "ranking":
            name = _id(event, "id")
            if name in waiting:
                event.refuse(f"ranking '{name}' was there before")
            waiting[name] = _ranking(event, kinds, options["score"])
        elif event.kind == "interaction":
            ranking = waiting.get(str(event.content.get("ranking")))
            if ranking is None:
                counts.skip("interactions without a ranking in the window")
            else:
                ranking.clicked.add(_id(event, "item"))
        elif event.kind in ("item", "user"):
            counts.skip("item and user events, whose fields are not joined")
        else:
            counts.skip(f"events of the kind '{shorten(event.kind)}'")
    while waiting:
        yield _request(*waiting.popitem(last=False), options["score"], counts)


def _request(name: str, ranking: _Ranking, score: str, counts: Counts) -> Request:
    items, n = ranking.items, len(ranking.items)
    label = [int(item in ranking.clicked) for item in items]
    last = max((at for at, clicked in enumerate(label) if clicked), default=-1)
    columns: Dict[str, List[Any]] = {
        "item_id": items, "label": label, "position": list(range(n)), "exposed": [at <= last for at in range(n)],
        "score": [fields.pop(score, None) for fields in ranking.fields],
    }  # fmt: skip
    counts.take("candidates without the score", columns["score"].count(None))
    counts.skip("clicks on items that are not in their ranking", len(ranking.clicked.difference(items)))
    names = dict.fromkeys(name for fields in ranking.fields for name in fields)
    for old, new in feature_names(names, counts).items():
        columns[new] = [fields.get(old) for fields in ranking.fields]
    for old, value in ranking.about.items():
        columns[f"request_{old}"] = [value] * n
    user = ranking.event.content.get("user")
    return Request(
        name, columns, None if user is None else str(user), ranking.event.time // 1000,
        place=place(ranking.event.path, ranking.event.number),
    )  # fmt: skip


def _ranking(event: _Event, kinds: _Kinds, score: str) -> _Ranking:
    items = event.content.get("items")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        event.refuse("ranking: 'items' must be a list of objects")
    fields = []
    for item in items:
        found = kinds.read(event, item, "")
        for name in ("relevancy", "score"):
            if isinstance(item.get(name), (int, float)):
                found.setdefault(name, float(item[name]))
        if not isinstance(found.get(score, 0.0), float):
            event.refuse(f"the field '{score}' is no number, and cannot be the score")
        fields.append(found)
    ids = [_id(event, "id", item) for item in items]
    return _Ranking(event, ids, fields, kinds.read(event, event.content, "request_"))


class _Kinds:
    """Fields are text, numbers, switches or lists of one of these: the first value of a name says which."""

    def __init__(self) -> None:
        self._known: Dict[str, str] = {}

    def read(self, event: _Event, holder: Dict[str, Any], prefix: str) -> Dict[str, Any]:
        """The fields of an event or item, name -> value; numbers are float.

        Raises:
            DataError: they are none, or a name had values of another kind before.
        """
        fields = holder.get("fields") or []
        if not isinstance(fields, list) or not all(isinstance(each, dict) and "name" in each for each in fields):
            event.refuse("fields must be a list of objects with name and value")
        found = {}
        for each in fields:
            name, value = str(each["name"]), each.get("value")
            if value is None or value == []:
                continue
            if isinstance(value, list):
                kinds = {_kind(single) for single in value}
                kind = f"lists of {kinds.pop()}" if len(kinds) == 1 else "a mixed list"
                value = [_plain(single) for single in value]
            else:
                kind, value = _kind(value), _plain(value)
            if "mixed" in kind or "object" in kind:
                event.refuse(
                    f"field '{name}' holds {kind}; it must be text, a number, true or false, or a list of one of these"
                )
            if self._known.setdefault(prefix + name, kind) != kind:
                event.refuse(f"field '{name}' holds {kind} here, and {self._known[prefix + name]} before")
            found[name] = value
        return found


def _kind(value: Any) -> str:
    return {str: "text", bool: "true or false", int: "number", float: "number"}.get(type(value), "an object")


def _plain(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _events(paths: List[str], counts: Counts) -> Iterator[_Event]:
    for path in paths:
        for number, line in read_lines(path, counts):
            try:
                content = json.loads(line, parse_constant=_no_constant)
                kind, time = content["event"], _time(content["timestamp"])
                if not isinstance(kind, str):
                    raise ValueError
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                refuse(path, number, "no JSON object with an event and a timestamp in milliseconds or ISO 8601", line)
            yield _Event(path, number, kind, time, content)


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _time(value: Any) -> int:
    found: Optional[int] = milliseconds(value) if isinstance(value, str) else None
    return int(value) if found is None else found


def _id(event: _Event, name: str, holder: Optional[Dict[str, Any]] = None) -> str:
    value = (event.content if holder is None else holder).get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        whose = event.kind if holder is None else f"{event.kind}, an item"
        event.refuse(f"{whose}: '{name}' is missing, or neither text nor whole number")
    return str(value)
