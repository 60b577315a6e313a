"""Does a row of a table differ from its reference? Paired tests over users, and over seeds where they share the data.

What is sampled is users: a user's requests are not independent, nor are the same user's lists under several seeds. So
the values are averaged over a user's requests under each seed, then over the seeds under which the user is evaluated,
and each user counts once. Where all seeds evaluate the same users (``seed_key: init_seed``, or ``split: last``) that is
the mean over seeds; where each seed draws its own (``seed_key: seed`` and ``split: user``) the (seed, user) pairs are
pooled, and a user drawn several times is still one user. The models are taken as they were trained: the test over users
says whether *these* differ on other users. Whether the methods do when trained anew is what the test over seeds says;
it needs the same users under each seed, or the choice of users would be counted as an effect of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

import numpy as np

from dnr_recbole.errors import DataError
from dnr_recbole.evaluator.per_request import PerRequest, same_population, same_requests
from dnr_recbole.evaluator.significance import over_seeds, paired_test

MIN_SEEDS = 5  # fewer say next to nothing about training anew
Runs = Dict[int, PerRequest]  # by seed


@dataclass(frozen=True)
class Difference:
    """A row against its reference in one metric.

    Attributes:
        seeds: those that both have values of.
        n_users, n_requests: distinct users; requests with a value, over all seeds.
        mean: of row − reference over users.
        low, high: its bootstrap interval over users.
        p_users: Wilcoxon's signed-rank test over users.
        ranks_above: whether the signed ranks lie above 0, which need not be the side of the mean.
        p_seeds: paired t-test over seeds; None if it was not asked for or there are fewer than ``MIN_SEEDS``.
        mean_seeds: mean over seeds of the difference of the means over users; None like ``p_seeds``.
    """

    seeds: List[int]
    n_users: int
    n_requests: int
    mean: float
    low: float
    high: float
    p_users: float
    ranks_above: bool
    p_seeds: Optional[float] = None
    mean_seeds: Optional[float] = None


def difference(row: Runs, reference: Runs, metric: str, confidence: float = 0.95, seeds: bool = False) -> Difference:
    """Compare a row with its reference over the seeds that both have.

    Args:
        row, reference: values per request by seed.
        metric: such as ``ndcg@6``.
        confidence: of the interval.
        seeds: whether to test over seeds, too.

    Raises:
        DataError: they have no seed in common, other requests, no such metric, or fewer than two users.
    """
    common = sorted(set(row) & set(reference))
    if not common:
        raise DataError("it has no seed in common with the reference")
    parts = [_by_user(row[seed], reference[seed], metric) for seed in common]
    users, a, b = (np.concatenate([part[i] for part in parts]) for i in range(3))
    if len(np.unique(users)) < 2:
        raise DataError(f"{metric} has values for fewer than two users")
    interval = paired_test(a, b, "bootstrap", clusters=users, confidence=confidence)
    ranks = paired_test(a, b, "wilcoxon", clusters=users)
    above = paired_test(a, b, "wilcoxon", clusters=users, alternative="greater").p_value < 0.5
    trained: Tuple[Optional[float], Optional[float]] = None, None
    if seeds and len(common) >= MIN_SEEDS:
        test = over_seeds([part[1].mean() for part in parts], [part[2].mean() for part in parts])
        trained = test.p_value, test.difference
    n_requests = sum(part[3] for part in parts)
    shown = (ranks.n, n_requests, interval.difference, interval.low, interval.high, ranks.p_value, bool(above))
    return Difference(common, *shown, *trained)


def _by_user(row: PerRequest, reference: PerRequest, metric: str) -> Tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Under one seed: users ``[U]``, the means of both over each one's requests ``[U]``, number of requests."""
    same_requests(row, reference)
    for file in (row, reference):
        if metric not in file.metrics:
            raise DataError(f"{metric} has no values per request; there are {', '.join(file.metrics)}")
    same_population(row, reference, metric)
    valid = ~np.isnan(row.metrics[metric])
    users, index, count = np.unique(row.users[valid], return_inverse=True, return_counts=True)
    a, b = (np.bincount(index, file.metrics[metric][valid], len(users)) / count for file in (row, reference))
    return users, a, b, int(valid.sum())
