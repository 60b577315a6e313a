"""MIND: ``behaviors.tsv`` and, beside it, ``news.tsv`` (Wu et al., ACL 2020)."""

from __future__ import annotations

import calendar
import time
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from dnr_recbole.convert.lines import SCORE, Clicks, Popularity, place, read_lines, refuse
from dnr_recbole.convert.registry import Counts, Request, converter


class _Impression(NamedTuple):
    number: int
    name: str
    user: str
    time: int  # unix seconds, as if the clock were UTC
    history: List[str]
    shown: List[Tuple[str, Optional[int]]]  # (item, clicked); None in a test file


@converter("mind", "behaviors.tsv [news.tsv…]", [SCORE])
def mind(inputs, options, counts):
    """Impressions in the order of the file, which is not the order of display; those of a test file are skipped.
    The file is read twice for popularity."""
    behaviors, *rest = inputs
    news = _news(rest, counts)
    popularity = None
    if options["score"] == "popularity":
        popularity = Popularity(_clicks(behaviors))
        counts.note("score: clicks before the impression")
    for each in _behaviors(behaviors, counts):
        if each.shown and all(label is None for _, label in each.shown):
            counts.skip("impressions without clicks or their absence (a test file)")
            continue
        items = [item for item, _ in each.shown]
        columns = {"item_id": items, "label": [label for _, label in each.shown]}
        if popularity is not None:
            columns["score"] = popularity(items, each.time)
        if news:
            about = [news.get(item) for item in items]
            counts.take("candidates that news.tsv does not have", sum(found is None for found in about))
            columns["category"] = [found and found[0] for found in about]
            columns["subcategory"] = [found and found[1] for found in about]
        yield Request(each.name, columns, each.user, each.time, each.history, place(behaviors, each.number))


def _news(paths: List[str], counts: Counts) -> Dict[str, Tuple[str, str]]:
    """Item -> category and subcategory."""
    found: Dict[str, Tuple[str, str]] = {}
    for path in paths:
        for number, line in read_lines(path, counts):
            parts = line.split("\t")
            if len(parts) != 8:
                refuse(path, number, f"news.tsv needs 8 columns separated by tabs, not {len(parts)}", line)
            found[parts[0]] = (parts[1], parts[2])
    return found


def _clicks(path: str) -> Clicks:
    clicks = Clicks()
    for each in _behaviors(path):
        for item, label in each.shown:
            if label:
                clicks.add(item, each.time)
    return clicks


def _behaviors(path: str, counts: Optional[Counts] = None) -> Iterator[_Impression]:
    for number, line in read_lines(path, counts):
        parts = line.split("\t")
        if len(parts) != 5:
            refuse(path, number, f"behaviors.tsv needs 5 columns separated by tabs, not {len(parts)}", line)
        name, user, when, history, impressions = parts
        try:
            seconds = calendar.timegm(time.strptime(when, "%m/%d/%Y %I:%M:%S %p"))
        except ValueError:
            refuse(path, number, "the time must look like 11/15/2019 10:22:32 AM", when)
        shown = [_shown(path, number, impression) for impression in impressions.split()]
        if len({label is None for _, label in shown}) > 1:
            refuse(path, number, "some impressions have -0 or -1 and some have none", impressions)
        yield _Impression(number, name, user, seconds, history.split(), shown)


def _shown(path: str, number: int, impression: str) -> Tuple[str, Optional[int]]:
    item, dash, label = impression.rpartition("-")
    if not dash:
        return impression, None
    if not item or label not in ("0", "1"):
        refuse(path, number, "an impression must look like N1234-1", impression)
    return item, int(label)
