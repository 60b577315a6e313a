"""LibRerank's processed TSV: user, profile, items with categories, dense features, labels."""

from __future__ import annotations

import ast
import re
from typing import Any, List, NamedTuple, Optional

from dnr_recbole.convert.lines import place, read_lines, refuse
from dnr_recbole.convert.registry import Option, Request, converter

_NULL = re.compile(r"\b(?:null|nan|NaN)\b")


class _Line(NamedTuple):
    user: str
    profile: List[Optional[str]]
    items: List[List[Any]]  # [n][1 + categories]; an item 0 is padding
    dense: List[List[Optional[float]]]  # [n][features]
    labels: List[int]  # [n]


@converter(
    "librerank", "FILE…",
    [Option("score", -1, "which dense feature is the incoming score, from 0; -1 = by the order of the items",
            minimum=-1)],
)  # fmt: skip
def librerank(inputs, options, counts):
    """Five Python literals a line; item 0 is padding. Dense features become d0, d1 … (the one that is the score does
    not), category fields c0, c1 …, the user's profile u0, u1 …; ids are text, since one space of ids has no order."""
    at = options["score"]
    for path in inputs:
        for number, text in read_lines(path, counts):
            line = _parse(path, number, text)
            kept = [i for i, item in enumerate(line.items) if item[0] not in (0, "0")]
            counts.skip("padding items", len(line.items) - len(kept))
            n = len(kept)
            items, dense = [line.items[i] for i in kept], [line.dense[i] for i in kept]
            width = len(dense[0]) if dense else 0
            if n and at >= width:
                refuse(path, number, f"--score={at}: there are {width} dense features, from 0 on")
            columns = {
                "item_id": [str(item[0]) for item in items],
                "label": [line.labels[i] for i in kept],
                "score": [row[at] for row in dense] if at >= 0 else [1 - rank / n for rank in range(n)],
            }
            for field in range(1, len(items[0]) if items else 0):
                columns[f"c{field - 1}"] = [_text(item[field]) for item in items]
            for field in range(width):
                if field != at:
                    columns[f"d{field}"] = [row[field] for row in dense]
            columns.update({f"u{field}": [value] * n for field, value in enumerate(line.profile)})
            name = f"{path}:{number}" if len(inputs) > 1 else str(number)
            yield Request(name, columns, line.user, place=place(path, number))
    counts.note(f"score: {f'dense feature {at}' if at >= 0 else 'the order of the items'}")


def _parse(path: str, number: int, text: str) -> _Line:
    try:
        user, profile, items, dense, labels = (ast.literal_eval(_NULL.sub("None", part)) for part in text.split("\t"))
        line = _Line(_id(user), [_text(value) for value in profile], items, dense, labels)
        if not len(items) == len(dense) == len(labels):
            raise ValueError
        if any(label not in (0, 1) for label in labels):
            raise ValueError
        if len({len(item) for item in items}) > 1 or len({len(row) for row in dense}) > 1:
            raise ValueError
        for item in items:
            _id(item[0])
        dense = [[None if value is None else float(value) for value in row] for row in dense]
        return line._replace(dense=dense, labels=[int(label) for label in labels])
    except (ValueError, SyntaxError, TypeError, IndexError, MemoryError, RecursionError):
        refuse(path, number, "a line needs five Python literals separated by tabs, with lists of one length", text)


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    return str(value)


def _text(value: Any) -> Optional[str]:
    return None if value is None else str(value)
