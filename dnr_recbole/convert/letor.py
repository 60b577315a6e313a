"""LETOR, MSLR and others in svmlight's format: ``grade qid:N 1:v 2:v … # comment``."""

from __future__ import annotations

import re
from typing import Dict

from dnr_recbole.convert import Option, Request, converter
from dnr_recbole.convert.lines import read_lines, refuse
from dnr_recbole.errors import ConfigError

_DOCUMENT = re.compile(r"docid\s*=\s*(\S+)")


@converter(
    "letor", "FILE…",
    [Option("score", 0, "number of the feature that is the incoming score; needed"),
     Option("threshold", 1.0, "grades from this on are positive")],
)  # fmt: skip
def letor(inputs, options, counts):
    """Feature n becomes column fn (0 where a line leaves it out); the grade is kept as a column."""
    wanted = options["score"]
    numbers = sorted({number for path in inputs for _, _, values, _ in _rows(path) for number in values})
    if not wanted or wanted not in numbers:
        some = f"{numbers[0]} … {numbers[-1]}" if numbers else "none"
        raise ConfigError(f"--score={wanted}: name the feature that is the incoming score; there are {some}")
    query, rows = None, []
    for path in inputs:
        for qid, grade, values, document in _rows(path):
            if qid != query and rows:
                yield _request(query, rows, numbers, wanted, options["threshold"])
                rows = []
            query = qid
            rows.append((grade, values, document))
    if rows:
        yield _request(query, rows, numbers, wanted, options["threshold"])


def _request(query, rows, numbers, wanted, threshold) -> Request:
    columns = {
        "item_id": [document or f"{query}-{place}" for place, (_, _, document) in enumerate(rows)],
        "score": [values.get(wanted, 0.0) for _, values, _ in rows],
        "label": [int(grade >= threshold) for grade, _, _ in rows],
        "grade": [grade for grade, _, _ in rows],
        **{f"f{n}": [values.get(n, 0.0) for _, values, _ in rows] for n in numbers if n != wanted},
    }
    return Request(query, columns)


def _rows(path: str):
    for number, line in read_lines(path):
        content, _, comment = line.partition("#")
        grade, *pairs = content.split()
        values: Dict[int, float] = {}
        try:
            if not pairs or not pairs[0].startswith("qid:"):
                raise ValueError
            for pair in pairs[1:]:
                index, _, value = pair.partition(":")
                values[int(index)] = float(value)
            yield pairs[0][4:], float(grade), values, (_DOCUMENT.search(comment) or [None, None])[1]
        except ValueError:
            refuse(path, number, "a line must look like '2 qid:10 1:0.5 2:3'", line)
