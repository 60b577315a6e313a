"""LETOR, MSLR and others in svmlight's format: ``grade qid:N 1:v 2:v … # comment``."""

from __future__ import annotations

import math
import re
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set

from dnr_recbole.convert.lines import place, read_lines, refuse
from dnr_recbole.convert.registry import Counts, Option, Request, converter
from dnr_recbole.errors import ConfigError

_DOCUMENT = re.compile(r"docid\s*=\s*(\S+)")
_NUMBER = re.compile(r"(?<=\s)(\d+):")


class _Row(NamedTuple):
    number: int
    query: str
    grade: float
    values: Dict[int, float]
    document: Optional[str]


@converter(
    "letor", "FILE…",
    [Option("score", -1, "number of the feature that is the incoming score; needed"),
     Option("threshold", 1.0, "grades from this on are positive")],
)  # fmt: skip
def letor(inputs, options, counts):
    """Feature n becomes column fn (0 where a line leaves it out); the grade is kept as a column. Files are read twice,
    since a column must be known before the first line that has it."""
    wanted, threshold = options["score"], options["threshold"]
    numbers = sorted(_features(inputs))
    if wanted not in numbers:
        some = f"{numbers[0]} … {numbers[-1]}" if numbers else "none"
        given = f"--score={wanted}: there is no such feature" if wanted >= 0 else "--score is needed"
        raise ConfigError(f"{given}; name the feature that is the incoming score; there are {some}")
    for path in inputs:
        rows: List[_Row] = []
        for row in _rows(path, counts):
            if rows and row.query != rows[0].query:
                yield _request(path, rows, numbers, wanted, threshold)
                rows = []
            rows.append(row)
        if rows:
            yield _request(path, rows, numbers, wanted, threshold)


def _request(path: str, rows: List[_Row], numbers: List[int], wanted: int, threshold: float) -> Request:
    query = rows[0].query
    columns: Dict[str, List[Any]] = {
        "item_id": [row.document or f"{query}-{at}" for at, row in enumerate(rows)],
        "score": [row.values.get(wanted, 0.0) for row in rows],
        "label": [int(row.grade >= threshold) for row in rows],
        "grade": [row.grade for row in rows],
        **{f"f{n}": [row.values.get(n, 0.0) for row in rows] for n in numbers if n != wanted},
    }
    return Request(query, columns, place=place(path, rows[0].number))


def _features(paths: List[str]) -> Set[int]:
    found: Set[str] = set()
    for path in paths:
        for _, line in read_lines(path):
            found.update(_NUMBER.findall(line.partition("#")[0]))
    return {int(number) for number in found}


def _rows(path: str, counts: Counts) -> Iterator[_Row]:
    for number, line in read_lines(path, counts):
        content, _, comment = line.partition("#")
        if not content.strip():
            counts.skip("lines that are comments")
            continue
        document = _DOCUMENT.search(comment)
        try:
            grade, query, *pairs = content.split()
            if not query.startswith("qid:") or len(query) == 4:
                raise ValueError
            values = {int(index): float(value) for index, _, value in (pair.partition(":") for pair in pairs)}
            finite = math.isfinite(float(grade)) and all(map(math.isfinite, values.values()))
            if not finite or len(values) < len(pairs) or min(values, default=0) < 0:
                raise ValueError
        except ValueError:
            refuse(path, number, "a line must look like '2 qid:10 1:0.5 2:3', each feature once, finite", line)
        yield _Row(number, query[4:], float(grade), values, document and document[1])
