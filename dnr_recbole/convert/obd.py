"""Open Bandit (Saito et al., 2020): a fashion shop's three slots, with the probability of every choice."""

from __future__ import annotations

from typing import Dict, Iterator, List

from dnr_recbole.convert.lines import milliseconds, shorten
from dnr_recbole.convert.registry import Counts, Request, converter
from dnr_recbole.convert.tables import ID, MAYBE, NUMBER, ROW, TEXT, Group, Source, groups

_AFFINITY = "user-item_affinity_"


@converter("obd", "campaign.csv…")
def obd(inputs, options, counts):
    """A line is an item in a slot. Consecutive lines of one time and one user description, in ascending slots, are a
    request; a slot that stands alone is a request of one candidate. The score is the line's affinity to its own
    item."""
    for path in inputs:
        source = Source(path)
        about = [name for name in source.names if name.startswith("user_feature")]
        affinity = {name[len(_AFFINITY) :]: name for name in source.names if name.startswith(_AFFINITY)}
        columns = {
            "timestamp": ID, "item_id": ID, "position": NUMBER, "click": NUMBER, "propensity_score": NUMBER,
            **dict.fromkeys(about, TEXT), **dict.fromkeys(affinity.values(), MAYBE),
        }  # fmt: skip
        _note_columns(source, columns, counts)
        number = 0
        for group in groups(source.batches(columns, counts), ["timestamp", *about]):
            for part in _slates(group):
                number += 1
                if len(set(part["item_id"])) < len(part["item_id"]):
                    # One of the two propensities would be lost.
                    counts.skip("requests that show an item twice")
                    continue
                name = f"{path}:{number}" if len(inputs) > 1 else str(number)
                yield _request(name, part, source, about, affinity)


def _note_columns(source: Source, columns: Dict[str, str], counts: Counts) -> None:
    source.need(columns)
    left = [name or "the row number" for name in source.names if name not in columns]
    if left:
        counts.note(f"columns left out: {', '.join(left)}")


def _slates(group: Group) -> Iterator[Group]:
    """Parts in which slots ascend."""
    slots, low = group["position"], 0
    for high in range(1, len(slots) + 1):
        if high == len(slots) or slots[high] <= slots[high - 1]:
            yield {name: values[low:high] for name, values in group.items()}
            low = high


def _request(name: str, part: Group, source: Source, about: List[str], affinity: Dict[str, str]) -> Request:
    items, n, row = part["item_id"], len(part["item_id"]), part[ROW][0]
    time = milliseconds(part["timestamp"][0])
    if time is None:
        shown = shorten(part["timestamp"][0])
        source.refuse(row, f"the timestamp must look like 2019-11-24 00:00:07+00:00: '{shown}'")
    for at, slot in enumerate(part["position"]):
        if slot < 1 or slot % 1:
            source.refuse(part[ROW][at], f"position must be a slot from 1 on: {slot:g}")
    columns = {
        "item_id": items,
        "label": [int(click > 0) for click in part["click"]],
        "position": [int(slot) - 1 for slot in part["position"]],
        "exposed": [True] * n,
        "propensity": part["propensity_score"],
        **{feature: part[feature] for feature in about},
    }
    if affinity:
        columns["score"] = [part[affinity[item]][at] if item in affinity else None for at, item in enumerate(items)]
    return Request(name, columns, timestamp=time // 1000, place=source.place(row))
