"""What RecTools and LensKit share: lists that are recommended, labelled by a table of what was held out."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from dnr_recbole.convert.registry import Counts, Request, feature_names
from dnr_recbole.convert.tables import AS_IS, ID, MAYBE, Group, Source, by_first_row

Positives = Dict[str, Set[str]]  # list -> items
# Given by the order and the score, or by the other columns.
NO_FEATURES = ("user_id", "item_id", "score", "rank", "label", "item_num")


def positives_of(source: Source, key: str, counts: Counts) -> Positives:
    """What a flat table of interactions holds, in memory."""
    found: Positives = {}
    for batch in source.batches({key: ID, "item_id": ID}, counts):
        for name, item in zip(batch.column(key).to_pylist(), batch.column("item_id").to_pylist()):
            found.setdefault(name, set()).add(item)
    return found


def flat_lists(source: Source, key: str, counts: Counts) -> Iterator[Tuple[str, Group, Dict[str, str]]]:
    """(list, its rows, features: name in the file -> column) of a table with one row per item."""
    extra = [name for name in source.names if name not in (*NO_FEATURES, key)]
    numbers = set(source.numeric(extra))
    columns = {key: ID, "item_id": ID}
    columns.update({name: MAYBE for name in ("score", "rank", "label") if name in source.names})
    columns.update({name: MAYBE if name in numbers or name.startswith("score_") else AS_IS for name in extra})
    renamed = feature_names(extra, counts)
    for group in by_first_row(source.batches(columns, counts), key):
        yield group[key][0], group, renamed


def label_lists(lists, positives: Optional[Positives], counts: Counts, where: Any) -> Iterator[Request]:
    """Requests of lists; with ``positives`` None, the column ``label`` says what is positive."""
    seen: Set[str] = set()
    for name, group, renamed in lists:
        items: List[str] = group["item_id"]
        columns: Dict[str, List[Any]] = {"item_id": items, "score": scores(group)}
        if positives is None:
            columns["label"] = [int((value or 0) > 0) for value in group["label"]]
        else:
            truth = positives.get(name, set())
            columns["label"] = [int(item in truth) for item in items]
            counts.skip("positives that were not recommended", len(truth.difference(items)))
            counts.take("lists without a held-out item", int(not truth))
            seen.add(name)
        columns.update({new: group[old] for old, new in renamed.items() if old in group})
        user = group["user_id"][0] if "user_id" in group else None
        yield Request(name, columns, user, place=where(group))
    if positives is not None:
        left = [items for name, items in positives.items() if name not in seen]
        counts.skip("positives of lists that were not recommended", sum(map(len, left)))


def scores(group: Group) -> List[Optional[float]]:
    """The score, or 1 / (1 + place) by the rank, which may begin at 0 or 1."""
    if "score" in group:
        return group["score"]
    ranks = [rank for rank in group["rank"] if rank is not None]
    best = min(ranks, default=0)
    return [None if rank is None else 1 / (1 + rank - best) for rank in group["rank"]]
