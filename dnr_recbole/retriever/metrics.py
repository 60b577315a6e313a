"""How good a retriever is on what came after its training part: AUC and Recall@n."""

from __future__ import annotations

from typing import Dict, Tuple

import numpy as np

from dnr_recbole.data.interactions import Interactions

MAX_USERS = 20_000  # metrics and calibration look at a random sample of users beyond this
_NEGATIVES = 4


def pair_keys(interactions: Interactions, rows: np.ndarray) -> np.ndarray:
    """Sorted distinct user * n_items + item of the selected interactions (bool [N]), for membership tests."""
    return np.unique(interactions.user[rows] * np.int64(interactions.n_items) + interactions.item[rows])


def contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool, same shape as ``keys``: which of them are in ``sorted_keys``."""
    if len(sorted_keys) == 0:
        return np.zeros(keys.shape, dtype=bool)
    position = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[position] == keys


def sample_unseen(
    users: np.ndarray,
    per_user: int,
    seen: np.ndarray,
    n_items: int,
    rng: np.random.Generator,
    rounds: int = 100,
) -> Tuple[np.ndarray, np.ndarray]:
    """Uniformly sampled items whose pair is not in ``seen`` (sorted pair keys).

    -> users [M], items [M] with M = len(users) * per_user, less the rows of users who have seen (nearly)
    everything.
    """
    users = np.repeat(users, per_user)
    items = rng.integers(1, n_items, size=len(users))
    bad = np.flatnonzero(contains(seen, users * np.int64(n_items) + items))
    for _ in range(rounds):
        if len(bad) == 0:
            break
        items[bad] = rng.integers(1, n_items, size=len(bad))
        bad = bad[contains(seen, users[bad] * np.int64(n_items) + items[bad])]
    keep = np.ones(len(users), dtype=bool)
    keep[bad] = False
    return users[keep], items[keep]


def sample_users(users: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """All distinct users, or a random ``limit`` of them, sorted."""
    users = np.unique(users)
    return users if len(users) <= limit else np.sort(rng.choice(users, size=limit, replace=False))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs of the two samples."""
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    return float((below + not_above).mean() / (2 * len(negative)))


def evaluate_retrieval(
    retrieval, interactions: Interactions, n: int, seed: int, repeatable: bool = False
) -> Dict[str, float]:
    """AUC and Recall@n of what the retriever has not seen of each user (``retrieval.split == 2``).

    Unless ``repeatable``, items of the retriever's part are left out: they cannot be retrieved. ``auc`` pools the
    pairs of all users, as a click model is judged; ``recall@n`` is the share of a user's later items among
    the top n (unseen) ones, averaged over users with at least one.
    """
    rng = np.random.default_rng(seed)
    n_items = interactions.n_items
    fitted = retrieval.split < 2
    earlier = pair_keys(interactions, fitted)
    later = pair_keys(interactions, ~fitted)
    if not repeatable:
        later = later[~contains(earlier, later)]
    users = sample_users(later // n_items, MAX_USERS, rng)
    later = later[np.isin(later // n_items, users)]
    if len(later) == 0:
        return {"auc": float("nan"), f"recall@{n}": float("nan")}

    positive_users, positive_items = later // n_items, later % n_items
    seen = np.union1d(earlier, later)
    negative_users, negative_items = sample_unseen(positive_users, _NEGATIVES, seen, n_items, rng)
    positive = retrieval.raw_pairs(positive_users, positive_items)
    negative = retrieval.raw_pairs(negative_users, negative_items)

    exclude = None
    if not repeatable:
        ptr = np.append(0, np.cumsum(np.bincount(interactions.user[fitted], minlength=interactions.n_users)))
        exclude = (ptr[users], ptr[users + 1], interactions.item[fitted])
    items, _ = retrieval.top_n(users, n, exclude)
    hit = contains(later, users[:, None] * np.int64(n_items) + items.numpy())
    targets = np.bincount(positive_users, minlength=interactions.n_users)[users]
    return {
        "auc": auc(positive, negative),
        f"recall@{n}": float((hit.sum(1) / targets).mean()),
    }
