"""MIND: ``behaviors.tsv`` and, beside it, ``news.tsv`` (Wu et al., ACL 2020)."""

from __future__ import annotations

import calendar
import time
from typing import Dict, List

from dnr_recbole.convert import Request, converter
from dnr_recbole.convert.lines import SCORE, Popularity, read_lines, refuse


@converter("mind", "behaviors.tsv [news.tsv]", [SCORE])
def mind(inputs, options, counts):
    """Impressions in the order of the file, which is not the order of display; those of a test file are skipped."""
    behaviors, *rest = inputs
    news: Dict[str, List[str]] = {}
    for path in rest:
        for number, line in read_lines(path):
            parts = line.split("\t")
            if len(parts) < 3:
                refuse(path, number, "news.tsv needs 8 columns separated by tabs", line)
            news[parts[0]] = parts[1:3]
    popularity = None
    if options["score"] == "popularity":
        clicks: Dict[str, List[float]] = {}
        for _, _, when, _, shown in _behaviors(behaviors):
            for item, label in shown:
                if label:
                    clicks.setdefault(item, []).append(when)
        popularity = Popularity(clicks)
        counts.notes.append("score: clicks before the impression")
    for name, user, when, history, shown in _behaviors(behaviors):
        if any(label is None for _, label in shown):
            counts.skip("impressions without clicks (a test file)")
            continue
        items = [item for item, _ in shown]
        columns = {"item_id": items, "label": [label for _, label in shown]}
        if popularity is not None:
            columns["score"] = popularity(items, when)
        if news:
            columns["category"] = [news.get(item, (None, None))[0] for item in items]
            columns["subcategory"] = [news.get(item, (None, None))[1] for item in items]
        yield Request(name, columns, user, when, history)


def _behaviors(path: str):
    for number, line in read_lines(path):
        parts = line.split("\t")
        if len(parts) != 5:
            refuse(path, number, f"behaviors.tsv needs 5 columns separated by tabs, not {len(parts)}", line)
        name, user, when, history, impressions = parts
        try:
            seconds = calendar.timegm(time.strptime(when, "%m/%d/%Y %I:%M:%S %p"))
        except ValueError:
            refuse(path, number, "the time must look like 11/15/2019 10:22:32 AM", when)
        shown = []
        for impression in impressions.split():
            item, dash, label = impression.rpartition("-")
            if dash and label in ("0", "1"):
                shown.append((item, int(label)))
            elif not dash:
                shown.append((impression, None))
            else:
                refuse(path, number, "an impression must look like N1234-1", impression)
        yield name, user, seconds, history.split(), shown
