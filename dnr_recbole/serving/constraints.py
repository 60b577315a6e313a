"""What must hold of an answer whatever the model thinks."""

from __future__ import annotations

from typing import Dict, List, Sequence

from dnr_recbole.serving.schema import RankRequest, Scalar


def constrained(request: RankRequest, order: Sequence[int]) -> List[int]:
    """The candidates (numbers) in ``order`` under the request's rules.

    Without the excluded ones, at most ``at_most`` of a category among the first k, and those of ``pins`` at their
    places. Where a rule cannot hold, since too few others are left, the list is filled up with the best that break it.
    An excluded item is not returned even if it is pinned.
    """
    names = [str(item.item_id) for item in request.items]
    excluded = {str(item) for item in request.exclude}
    free = [number for number in order if names[number] not in excluded and names[number] not in request.pins]
    pinned = {place: names.index(name) for name, place in request.pins.items() if name not in excluded}
    total = len(free) + len(pinned)
    k = min(request.k or total, total)
    fixed = {place: number for place, number in pinned.items() if place < k}
    behind = [pinned[place] for place in sorted(pinned) if place >= k]
    chosen = iter([*_varied(request, free, list(fixed.values()), k - len(fixed)), *behind])
    return [fixed[place] if place in fixed else next(chosen) for place in range(k)]


def _varied(request: RankRequest, free: List[int], fixed: List[int], size: int) -> List[int]:
    """``size`` of ``free``: those with at most ``at_most`` of a category beside ``fixed``, then those that break it."""
    counts: Dict[Scalar, int] = {}
    for number in fixed:
        _count(counts, request, number)
    chosen: List[int] = []
    late: List[int] = []
    for number in free:
        if len(chosen) == size:
            break
        category = request.items[number].category
        if request.at_most is not None and category is not None and counts.get(category, 0) >= request.at_most:
            late.append(number)
            continue
        _count(counts, request, number)
        chosen.append(number)
    return [*chosen, *late][:size]


def _count(counts: Dict[Scalar, int], request: RankRequest, number: int) -> None:
    category = request.items[number].category
    if category is not None:
        counts[category] = counts.get(category, 0) + 1
