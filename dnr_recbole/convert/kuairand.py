"""KuaiRand (Gao et al., CIKM 2022): logs of a feed without requests, some items of which were inserted at random."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional

import pyarrow as pa

from dnr_recbole.convert.lines import SCORE, Clicks, Popularity
from dnr_recbole.convert.registry import Counts, Option, Request, converter
from dnr_recbole.convert.tables import ID, MAYBE, NUMBER, Group, Source, groups, in_order


@converter(
    "kuairand", "log.csv…",
    [Option("gap", 10.0, "minutes without an item that part two requests of a user and tab", minimum=0),
     Option("label", "is_click", "column that says what a positive is"), SCORE],
)  # fmt: skip
def kuairand(inputs, options, counts):
    """What a user saw in one tab without a longer pause is a request; random marks items that were inserted at random.
    Feedback other than the label is left out."""
    label = options["label"]
    clicks = Clicks() if options["score"] == "popularity" else None
    rows = in_order(_batches(inputs, label, clicks, counts), ["user_id", "tab", "time_ms"])
    popularity, number = None, 0
    for group in groups(rows, ["user_id", "tab"]):
        if popularity is None and clicks is not None:
            # in_order has read everything by now.
            popularity = Popularity(clicks)
            counts.note("score: clicks before the request")
        for part in _sessions(group, options["gap"] * 60_000):
            number += 1
            start = part["time_ms"][0]
            n = len(part["video_id"])
            columns: Dict[str, List[Any]] = {
                "item_id": part["video_id"], "label": [int(value > 0) for value in part[label]],
                "position": list(range(n)), "exposed": [True] * n, "tab": part["tab"],
            }  # fmt: skip
            if any(value is not None for value in part["is_rand"]):
                columns["random"] = [None if value is None else value > 0 for value in part["is_rand"]]
            if any(value is not None for value in part["duration_ms"]):
                columns["duration_ms"] = part["duration_ms"]
            if popularity is not None:
                columns["score"] = popularity(part["video_id"], start)
            yield Request(str(number), columns, part["user_id"][0], int(start // 1000))


def _batches(paths: List[str], label: str, clicks: Optional[Clicks], counts: Counts) -> Iterator[pa.Table]:
    """All files under the same columns; clicks are collected on the way."""
    for path in paths:
        source = Source(path)
        columns = {"user_id": ID, "video_id": ID, "time_ms": NUMBER, "tab": ID, label: NUMBER}
        optional = [name for name in ("is_rand", "duration_ms") if name != label]
        columns.update({name: MAYBE for name in optional if name in source.names})
        left = [name for name in source.names if name not in columns]
        if left:
            counts.note(f"columns left out: {', '.join(left)}")
        for batch in source.batches(columns, counts):
            if clicks is not None:
                _collect(clicks, batch, label)
            for name in ("is_rand", "duration_ms"):
                if name not in batch.schema.names:
                    batch = batch.append_column(name, pa.nulls(len(batch), pa.float64()))
            yield batch.select(["user_id", "video_id", "time_ms", "tab", label, "is_rand", "duration_ms"])


def _collect(clicks: Clicks, batch: pa.Table, label: str) -> None:
    for item, time, positive in zip(*(batch.column(name).to_pylist() for name in ("video_id", "time_ms", label))):
        if positive > 0:
            clicks.add(item, time)


def _sessions(group: Group, gap: float) -> Iterator[Group]:
    """Parts of a user's rows in one tab, cut where more than ``gap`` milliseconds lie between two rows."""
    times, low = group["time_ms"], 0
    for high in range(1, len(times) + 1):
        if high == len(times) or times[high] - times[high - 1] > gap:
            yield {name: values[low:high] for name, values in group.items()}
            low = high
