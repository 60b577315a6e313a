"""LibRerank's processed TSV: user, profile, items with categories, dense features, labels."""

from __future__ import annotations

import ast

from dnr_recbole.convert import Option, Request, converter
from dnr_recbole.convert.lines import read_lines, refuse


@converter(
    "librerank", "FILE…",
    [Option("score", -1, "which dense feature is the incoming score, from 0; −1 = by the order of the items")],
)  # fmt: skip
def librerank(inputs, options, counts):
    """Five Python literals a line; item 0 is padding. Dense features become d0, d1 …, category fields c0, c1 …."""
    for path in inputs:
        for number, line in read_lines(path):
            parts = line.split("\t")
            try:
                user, _, items, dense, labels = (ast.literal_eval(part.replace("null", "None")) for part in parts)
                rows = [
                    (item[0], item[1:], values, int(label))
                    for item, values, label in zip(items, dense, labels)
                    if item[0]
                ]
                if not len(items) == len(dense) == len(labels):
                    raise ValueError
            except (ValueError, SyntaxError, TypeError, IndexError, MemoryError, RecursionError):
                refuse(
                    path, number, "a line needs five Python literals separated by tabs, with lists of one length", line
                )
            padding = len(items) - len(rows)
            if padding:
                counts.skip("padding items", padding)
            n, place = len(rows), options["score"]
            columns = {"item_id": [str(item) for item, *_ in rows], "label": [label for *_, label in rows]}
            if place >= 0:
                if any(place >= len(values) for _, _, values, _ in rows):
                    refuse(path, number, f"there is no dense feature {place}")
                columns["score"] = [values[place] for _, _, values, _ in rows]
            else:
                columns["score"] = [1 - position / n for position in range(n)]
            for name, part in (("c", 1), ("d", 2)):
                for at in range(min((len(row[part]) for row in rows), default=0)):
                    columns[f"{name}{at}"] = [None if row[part][at] is None else float(row[part][at]) for row in rows]
            yield Request(f"{path}:{number}" if len(inputs) > 1 else str(number), columns, str(user))
