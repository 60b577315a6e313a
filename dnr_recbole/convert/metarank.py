"""metarank's events: JSON lines of rankings and of the interactions that follow them."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any, Dict, List

from dnr_recbole.convert import Option, Request, converter
from dnr_recbole.convert.lines import read_lines, refuse


@converter(
    "metarank", "events.jsonl[.gz|.zst]…",
    [Option("score", "relevancy", "the items' field that is the incoming score"),
     Option("window", 30.0, "minutes in which an interaction belongs to its ranking")],
)  # fmt: skip
def metarank(inputs, options, counts):
    """Items are in display order. What stands behind the last click was not examined (``exposed`` is false), and of a
    ranking without a click nothing is known to have been examined."""
    waiting: OrderedDict[str, Dict[str, Any]] = OrderedDict()
    window = options["window"] * 60_000
    for path in inputs:
        for number, line in read_lines(path):
            try:
                event = json.loads(line)
                kind, stamp = event["event"], int(event.get("timestamp", 0))
            except (ValueError, KeyError, TypeError):
                refuse(path, number, "no JSON object with an event and a timestamp in milliseconds", line)
            while waiting and next(iter(waiting.values()))["stamp"] + window < stamp:
                yield _request(*waiting.popitem(last=False), options["score"], counts)
            if kind == "ranking":
                items = event.get("items")
                if not isinstance(items, list) or not all(isinstance(i, dict) and "id" in i for i in items):
                    refuse(path, number, "a ranking needs items with an id", line)
                waiting[str(event["id"])] = {
                    "items": items, "stamp": stamp, "user": event.get("user"), "clicked": set(),
                    "fields": event.get("fields") or [],
                }  # fmt: skip
            elif kind == "interaction":
                ranking = waiting.get(str(event.get("ranking")))
                if ranking is None:
                    counts.skip("interactions without a ranking in the window")
                else:
                    ranking["clicked"].add(str(event.get("item")))
            elif kind not in ("item", "user"):
                counts.skip(f"events of the kind {kind}")
    while waiting:
        yield _request(*waiting.popitem(last=False), options["score"], counts)


def _request(name: str, ranking: Dict[str, Any], score: str, counts) -> Request:
    items = [str(item["id"]) for item in ranking["items"]]
    label = [int(item in ranking["clicked"]) for item in items]
    last = max((place for place, clicked in enumerate(label) if clicked), default=-1)
    values: List[Dict[str, Any]] = [_fields(item) for item in ranking["items"]]
    columns: Dict[str, List[Any]] = {
        "item_id": items, "label": label, "position": list(range(len(items))),
        "exposed": [place <= last for place in range(len(items))],
        "score": [value.pop(score, None) for value in values],
    }  # fmt: skip
    strangers = len(ranking["clicked"] - set(items))
    if strangers:
        counts.skip("clicks on items that are not in their ranking", strangers)
    for field in sorted({field for value in values for field in value}):
        columns[field] = [value.get(field) for value in values]
    for field, value in _fields({"fields": ranking["fields"]}).items():
        columns[f"request_{field}"] = [value] * len(items)
    user = ranking["user"]
    return Request(name, columns, None if user is None else str(user), ranking["stamp"] // 1000)


def _fields(item: Dict[str, Any]) -> Dict[str, Any]:
    found = {str(field["name"]): field.get("value") for field in item.get("fields") or [] if "name" in field}
    for name in ("relevancy", "label"):
        if name in item:
            found.setdefault(name, item[name])
    return found
