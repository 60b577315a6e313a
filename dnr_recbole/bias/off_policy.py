"""How many clicks per request would another ranking get? Estimates from a log whose display was random to some extent.

The item-position model: a click depends on the item, the position and the request, not on the other items shown. With
w = 1[the new ranking puts the same item there] / p(it was shown there),

* IPS   = mean over requests of Σ_k w c: unbiased, noisy;
* SNIPS = Σ_k s_k (Σ w c / Σ w), per position, s_k being the share of requests that show something there: a little
  biased, less noisy, and never outside what was seen;
* DR    = mean of Σ_k [q(new item, k) + w (c − q(shown item, k))]: unbiased whatever q is, and the less noisy the better
  the model q of clicks is.

Intervals are percentiles of a bootstrap over users (or whatever group of requests is given).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

import numpy as np

from dnr_recbole.bias.weights import effective_sample_size

ESTIMATORS = ("ips", "snips", "dr")
FEW = 100  # effective displays per position, below which an estimate is warned of
_BATCH, _CELLS = 64, 1 << 24  # bootstrap samples at a time, and counts


@dataclass(frozen=True)
class PolicyValue:
    """Clicks per request of one ranking.

    Attributes:
        estimates: name of the estimator → value, and the ends of its interval.
        effective: effective number of displays per position, of those that were logged.
        logged: displays per position.
    """

    estimates: Dict[str, tuple]
    effective: float
    logged: float

    @property
    def doubtful(self) -> bool:
        """Whether too few displays agree with the ranking."""
        return self.effective < FEW


def policy_value(
    clicks: np.ndarray, weights: np.ndarray, shown: np.ndarray, groups: np.ndarray,
    new: Optional[np.ndarray] = None, old: Optional[np.ndarray] = None,
    level: float = 0.95, samples: int = 1000, seed: int = 0,
) -> PolicyValue:  # fmt: skip
    """IPS, SNIPS and, with a model of clicks, DR.

    Args:
        clicks: ``[R, K]`` of 0/1, at each position of what was shown.
        weights: ``[R, K]``, 0 where the new ranking has another item there, else 1 / propensity.
        shown: bool ``[R, K]``, where something was shown.
        groups: ``[R]``, requests of one group (a user) are drawn together.
        new, old: ``[R, K]``, modelled clicks of the new ranking's item and of the shown item at each position; without
            them there is no DR. They must not have been fitted on the request itself.
        level: of the intervals.
        samples: of the bootstrap.
    """
    weights = weights * shown
    gained = weights * clicks
    size = np.unique(groups, return_inverse=True)[1]
    totals = {"n": _sums(size, np.ones(len(clicks))), "gained": _sums(size, gained), "weights": _sums(size, weights),
              "shown": _sums(size, shown.astype(np.float64))}  # fmt: skip
    if new is not None:
        totals["dr"] = _sums(size, (new + weights * (clicks - old) * shown).sum(1))
    values = _values({name: part.sum(0, keepdims=True) for name, part in totals.items()})
    drawn: Dict[str, List[np.ndarray]] = {name: [] for name in values}
    rng, n = np.random.default_rng(seed), len(totals["n"])
    step = max(1, min(_BATCH, _CELLS // n))
    for start in range(0, samples, step):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, samples - start)).astype(np.float64)
        for name, part in _values({name: counts @ part for name, part in totals.items()}).items():
            drawn[name].append(part)
    ends = (1 - level) / 2, (1 + level) / 2
    estimates = {
        name: (float(value[0]), *(float(end) for end in np.quantile(np.concatenate(drawn[name]), ends)))
        for name, value in values.items()
    }
    positions = max(1, int(shown.any(0).sum()))
    return PolicyValue(estimates, effective_sample_size(weights) / positions, float(shown.sum()) / positions)


def _sums(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Totals per group, ``[G, …]`` float64."""
    out = np.zeros((int(group.max(initial=0)) + 1, *values.shape[1:]))
    np.add.at(out, group, values)
    return out if values.ndim > 1 else out[:, None]


def _values(totals: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """Estimates ``[S]`` of sums over the requests of S samples."""
    n, gained, weights = totals["n"][:, 0], totals["gained"], totals["weights"]
    rates = np.divide(gained, weights, out=np.zeros_like(gained), where=weights > 0)
    out = {"ips": gained.sum(1) / n, "snips": (rates * totals["shown"]).sum(1) / n}
    if "dr" in totals:
        out["dr"] = totals["dr"][:, 0] / n
    return out


def modelled_clicks(
    position: np.ndarray, features: np.ndarray, clicks: np.ndarray, fold: np.ndarray,
    other_features: np.ndarray, other_position: np.ndarray, other_fold: np.ndarray,
) -> Tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """A logistic regression of clicks on position and features, fitted without the fold that it predicts.

    Args:
        position int ``[M]``, features ``[M, F]``, clicks ``[M]``, fold ``[M]`` of 0/1: the logged displays.
        other_features, other_position, other_fold: displays ``[N]`` to predict as well.

    Returns:
        predictions of the logged displays ``[M]`` and of the others ``[N]``.
    """
    from sklearn.linear_model import LogisticRegression

    mean, spread = features.mean(0), np.maximum(features.std(0), 1e-9)
    size = int(max(position.max(initial=0), other_position.max(initial=0))) + 1

    def columns(place: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.eye(size)[place], (values - mean) / spread], axis=1)

    logged, others = columns(position, features), columns(other_position, other_features)
    out = np.zeros(len(position)), np.zeros(len(other_position))
    for held in (0, 1):
        learn = fold != held
        if not learn.any() or clicks[learn].min() == clicks[learn].max():
            model, rate = None, float(clicks[learn].mean()) if learn.any() else 0.0
        else:
            model, rate = LogisticRegression(max_iter=200).fit(logged[learn], clicks[learn]), 0.0
        for values, rows, chosen in ((out[0], logged, fold == held), (out[1], others, other_fold == held)):
            if chosen.any():
                values[chosen] = rate if model is None else model.predict_proba(rows[chosen])[:, 1]
    return out
