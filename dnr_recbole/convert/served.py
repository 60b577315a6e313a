"""What a server recorded: its answers and the feedback to them, joined by request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from dnr_recbole.convert.registry import Counts, Option, Request, converter, feature_names
from dnr_recbole.errors import DataError

_ANSWER, _FEEDBACK = {"items": list, "time": (int, float)}, {"clicked": list}  # fields of a whole line


@converter(
    "served", "FOLDER",
    [Option("silent", "negative", "answers without feedback: nothing was clicked, or left out", ("negative", "skip"))],
    most=1,
)  # fmt: skip
def served(inputs, options, counts):
    """The folder of `dnr-recbole serve --record`. Of a request that was answered twice, the last answer counts; several
    messages of feedback add up. What was not returned, or by the feedback not shown, is not exposed. Feedback is held
    in memory."""
    folder = Path(inputs[0])
    answers = folder / "answers.jsonl"
    if not answers.is_file():
        raise DataError(f"'{folder}' has no answers.jsonl: give the folder of `serve --record`")
    size = answers.stat().st_size  # the server may be writing: its next answers, without any feedback yet, come later
    feedback: Dict[str, Dict[str, Any]] = {}
    for message in _lines(folder / "feedback.jsonl", counts, _FEEDBACK):
        known = feedback.setdefault(str(message["request_id"]), {"clicked": set(), "exposed": None})
        known["clicked"] |= {str(item) for item in message["clicked"]}
        if message.get("exposed") is not None:
            known["exposed"] = (known["exposed"] or set()) | {str(item) for item in message["exposed"]}
    last = {str(answer["request_id"]): number for number, answer in enumerate(_lines(answers, Counts(), _ANSWER, size))}
    for number, answer in enumerate(_lines(answers, counts, _ANSWER, size)):
        name = str(answer["request_id"])
        if last[name] != number:
            counts.skip("answers that a later one of the same request replaced")
            continue
        found = feedback.pop(name, None)
        if found is None:
            if options["silent"] == "skip":
                counts.skip("answers without feedback")
                continue
            counts.take("answers without feedback, taken as without a click")
        yield _request(name, answer, found or {"clicked": set(), "exposed": None}, f"{answers}", counts)
    counts.skip("feedback to requests that were not answered here", len(feedback))


def _request(name: str, answer: Dict[str, Any], found: Dict[str, Any], place: str, counts: Counts) -> Request:
    items = answer["items"]
    ids = [str(item["item_id"]) for item in items]
    returned = [item["rank"] is not None for item in items]
    exposed = [name in found["exposed"] for name in ids] if found["exposed"] is not None else returned
    strange = found["clicked"] - set(ids)
    counts.skip("clicks on items that were no candidates", len(strange))
    values = list(dict.fromkeys(key for item in items for key in item["values"]))
    renamed = {"score": "score", **feature_names([key for key in values if key != "score"], counts)}
    columns = {renamed[key]: [item["values"].get(key) for item in items] for key in values}
    return Request(
        request_id=name,
        columns={
            "item_id": ids,
            "label": [int(item in found["clicked"]) for item in ids],
            **columns,
            "position": [item["rank"] for item in items],
            "exposed": exposed,
        },
        user_id=None if answer.get("user_id") is None else str(answer["user_id"]),
        timestamp=int(answer["time"]),
        history=None if answer.get("history") is None else [str(item) for item in answer["history"]],
        place=place,
    )


def _lines(path: Path, counts: Counts, needed: Dict[str, Any], size: Optional[int] = None) -> Iterator[Dict[str, Any]]:
    """The messages of a file, or of the lines within its first ``size`` bytes; lines that hold none, since a crash or a
    full disk has cut them, are counted."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        end = 0
        for line in file:
            end += len(line)
            if size is not None and end > size:
                return
            if not line.strip():
                continue
            counts.rows += 1
            message = _parsed(line, needed)
            if message is None:
                counts.skip("lines that a crash has cut")
            else:
                yield message


def _parsed(line: bytes, needed: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    try:
        message = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or message.get("request_id") is None:
        return None
    if not all(isinstance(message.get(name), kind) for name, kind in needed.items()):
        return None
    return message if all(map(_is_item, message.get("items") or [])) else None


def _is_item(item: Any) -> bool:
    return isinstance(item, dict) and {"item_id", "rank"} <= set(item) and isinstance(item.get("values"), dict)
