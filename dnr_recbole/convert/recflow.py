"""RecFlow (Liu et al., ICLR 2025): Kuaishou's candidates of all stages, a feather file per day."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Deque, Dict, List, Optional, Tuple

from dnr_recbole.convert.registry import Counts, Option, Request, converter
from dnr_recbole.convert.tables import ID, MAYBE, NUMBER, TEXT, Group, Source, groups, in_order
from dnr_recbole.errors import DataError

_HISTORY = 50  # newest items of a user that are kept
# Anonymous codes: as numbers they would have an order.
_CODES = (
    "device_id", "age", "gender", "province", "author_id", "category_level_one", "category_level_two", "upload_type",
)  # fmt: skip
_QUANTITIES = ("duration", "upload_timestamp")
_DROPPED_EARLIER = ("coarse_neg", "prerank_neg")  # 1 = never came to the ranking stage
_Seen = Deque[Tuple[float, str]]  # (milliseconds, item)


@converter(
    "recflow", "DAY.feather… (in the order of days)",
    [Option("label", "effective_view", "column that says what a positive is"),
     Option("score", "rank_index", "column of the place in the incoming order; the best place of a request gives 1")],
)  # fmt: skip
def recflow(inputs, options, counts):
    """Candidates of all stages; shown is realshow, histories are the last 50 videos shown before. Feedback other than
    the label, and flags of stages, are left out: they happened after the order was made."""
    histories: Dict[str, _Seen] = defaultdict(lambda: deque(maxlen=_HISTORY))
    begin = float("-inf")
    for path in inputs:
        source = Source(path)
        columns = _columns(source, options["label"], options["score"], counts)
        rows = in_order(source.batches(columns, counts), ["request_timestamp", "request_id"])
        for number, group in enumerate(groups(rows, ["request_id"])):
            time = group["request_timestamp"][0]
            if number == 0 and time < begin:
                raise DataError(f"'{path}' begins before the file in front of it: give the days in their order")
            begin = time if number == 0 else begin
            yield _request(path, group, options, histories, counts)


def _columns(source: Source, label: str, score: str, counts: Counts) -> Dict[str, str]:
    optional = {
        **dict.fromkeys(_CODES, TEXT), **dict.fromkeys(_QUANTITIES, MAYBE), **dict.fromkeys(_DROPPED_EARLIER, MAYBE),
    }  # fmt: skip
    needed = {
        "request_id": ID, "request_timestamp": NUMBER, "user_id": ID, "video_id": ID, "realshow": NUMBER,
        score: MAYBE, label: MAYBE,
    }  # fmt: skip
    source.need(needed)
    columns = {**{name: kind for name, kind in optional.items() if name in source.names}, **needed}
    left = [name for name in source.names if name not in columns]
    if left:
        counts.note(f"columns left out: {', '.join(left)}")
    return columns


def _request(path: str, group: Group, options, histories: Dict[str, _Seen], counts: Counts) -> Request:
    user, time, items = group["user_id"][0], group["request_timestamp"][0], group["video_id"]
    shown = [value > 0 for value in group["realshow"]]
    columns = {
        "item_id": items,
        "score": _scores(group, options["score"]),
        "label": [int((value or 0) > 0) for value in group[options["label"]]],
        "exposed": shown,
        **{name: group[name] for name in (*_CODES, *_QUANTITIES) if name in group},
    }
    counts.take("candidates that no rank is known of, without a score", columns["score"].count(None))
    # A request of the same time, or of a day that overlaps, is not earlier.
    history = [item for when, item in histories[user] if when < time]
    histories[user].extend((time, item) for item, seen in zip(items, shown) if seen)
    place = f"'{path}', request {group['request_id'][0]}"
    return Request(group["request_id"][0], columns, user, int(time // 1000), history, place)


def _scores(group: Group, name: str) -> List[Optional[float]]:
    """1 for the best place of the request, then in equal steps per place; None for what came to no ranking."""
    dropped = [group[flag] for flag in _DROPPED_EARLIER if flag in group]
    ranks = [
        None if rank is None or rank < 0 or any(flag[i] for flag in dropped) else rank
        for i, rank in enumerate(group[name])
    ]
    known = [rank for rank in ranks if rank is not None]
    if not known:
        return [None] * len(ranks)
    best = min(known)
    span = max(known) - best + 1
    return [None if rank is None else 1 - (rank - best) / span for rank in ranks]
