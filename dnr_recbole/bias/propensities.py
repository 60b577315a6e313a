"""How likely the user looked at a candidate where it stood, each way to know it registered by name for ``propensity``.

========== ==========================================================================================================
column     the log says it: ``examination`` where it has that column, else ``propensity``
random     click rates by position where chance put the candidates, relative to the first position
swaps      the position-based model, fitted to candidates that stood where they were intended to and to those that were
           moved from there at random: candidates of the same intended position are alike but for where they stood
em         the position-based model, fitted by expectation maximisation; candidates of about the same incoming score
           count as alike
========== ==========================================================================================================

Estimates are relative to the first position: weights are normalised, so that only ratios matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional, Tuple

import numpy as np

from dnr_recbole.errors import DataError
from dnr_recbole.names import Names

FLOOR = 1e-3  # no position is estimated to be seen less often
GROUPS = 20  # of about the same incoming score
_LEAST_CLICKS = 20  # where chance put candidates: fewer say nothing
_ITERATIONS, _TOLERANCE = 5000, 1e-9


@dataclass(frozen=True)
class Logged:
    """What a log says of the candidates that were shown; every array has one entry for each.

    Attributes:
        position: int64 [M], from 0.
        click: bool [M].
        score: float [M], the incoming one.
        propensity, examination: float [M]; intended: int64 [M]; randomised: bool [M]; None = no such column.
    """

    position: np.ndarray
    click: np.ndarray
    score: np.ndarray
    propensity: Optional[np.ndarray] = None
    examination: Optional[np.ndarray] = None
    intended: Optional[np.ndarray] = None
    randomised: Optional[np.ndarray] = None


Estimator = Callable[[Logged], np.ndarray]
PROPENSITIES: Names[Estimator] = Names("propensity", "propensity")


def register_propensity(name: str) -> Callable[[Estimator], Estimator]:
    """Decorator: ``estimate(logged) -> float [positions]``, relative examination, becomes ``propensity: name``."""
    return PROPENSITIES.register(name)


def examination_curve(name: str, logged: Logged) -> np.ndarray:
    """Relative examination float64 [positions] of an estimator; the first position has 1.

    Raises:
        UnknownNameError: nobody registered it.
        DataError: the log lacks what it needs.
    """
    curve = np.asarray(PROPENSITIES.find(name)(logged), dtype=np.float64)
    return np.clip(curve / max(curve[0], FLOOR), FLOOR, None)


def known_propensity(logged: Logged) -> np.ndarray:
    """The log's own column, float [M].

    Raises:
        DataError: there is none.
    """
    found = logged.propensity if logged.examination is None else logged.examination
    if found is None:
        raise DataError(
            "propensity=column needs a column examination or propensity in the log; without one, use "
            "propensity=random, swaps or em"
        )
    return found


@register_propensity("random")
def of_random_exposures(logged: Logged) -> np.ndarray:
    """Click rate by position where chance put the candidates: what was shown is alike at every position."""
    if logged.randomised is None or not logged.randomised.any():
        raise DataError("propensity=random needs a column randomised that is true somewhere; try propensity=em")
    chosen = logged.randomised.astype(bool)
    clicks, shown = _table(logged.position[chosen], np.zeros(int(chosen.sum()), dtype=np.int64), logged.click[chosen])
    _check_clicks(clicks, "random")
    return _filled(clicks[:, 0] / np.maximum(shown[:, 0], 1), shown[:, 0] > 0)


@register_propensity("swaps")
def of_swaps(logged: Logged) -> np.ndarray:
    """The position-based model over intended positions."""
    if logged.intended is None or not (logged.intended != logged.position).any():
        raise DataError(
            "propensity=swaps needs a column intended_position that differs from position where candidates were moved "
            "at random; try propensity=em"
        )
    known = logged.intended >= 0
    clicks, shown = _table(logged.position[known], logged.intended[known], logged.click[known])
    _check_clicks(clicks, "swaps")
    return _filled(position_based_model(clicks, shown)[0], shown.sum(1) > 0)


@register_propensity("em")
def by_em(logged: Logged) -> np.ndarray:
    """The position-based model over groups of about the same incoming score."""
    finite = np.where(np.isfinite(logged.score), logged.score, -np.inf)
    edges = np.unique(np.quantile(finite[np.isfinite(finite)], np.linspace(0, 1, GROUPS + 1)[1:-1]))
    clicks, shown = _table(logged.position, np.searchsorted(edges, finite, side="right"), logged.click)
    _check_clicks(clicks, "em")
    return _filled(position_based_model(clicks, shown)[0], shown.sum(1) > 0)


def position_based_model(clicks: np.ndarray, shown: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Maximum likelihood of c ~ Bernoulli(θ_k γ_g) by expectation maximisation.

    Args:
        clicks, shown: [K, G], how often candidates of group g were clicked, and shown, at position k.

    Returns:
        θ float64 [K] and γ float64 [G]. Only their products are determined: divide θ by θ_0.
    """
    clicks, shown = clicks.astype(np.float64), shown.astype(np.float64)
    missed = shown - clicks
    theta, gamma = np.full(len(clicks), 0.9), np.full(clicks.shape[1], 0.5)
    by_position, by_group = np.maximum(shown.sum(1), 1e-12), np.maximum(shown.sum(0), 1e-12)
    for _ in range(_ITERATIONS):
        both = theta[:, None] * gamma
        rest = missed / np.maximum(1 - both, 1e-12)
        seen = clicks + rest * theta[:, None] * (1 - gamma)  # examined, though not clicked
        liked = clicks + rest * (1 - theta[:, None]) * gamma  # attractive, though not examined
        new = seen.sum(1) / by_position, liked.sum(0) / by_group
        moved = max(np.abs(new[0] - theta).max(), np.abs(new[1] - gamma).max())
        theta, gamma = new
        if moved < _TOLERANCE:
            break
    return theta, gamma


def _table(position: np.ndarray, group: np.ndarray, click: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """-> clicks and exposures, float64 [positions, groups] each."""
    size = int(position.max(initial=0)) + 1, int(group.max(initial=0)) + 1
    flat = position * size[1] + group
    counts = [np.bincount(flat, weights=w, minlength=size[0] * size[1]) for w in (click.astype(np.float64), None)]
    return counts[0].reshape(size), counts[1].astype(np.float64).reshape(size)


def _check_clicks(clicks: np.ndarray, name: str) -> None:
    if clicks.sum() < _LEAST_CLICKS or clicks[0].sum() == 0:
        raise DataError(
            f"propensity={name}: {int(clicks.sum())} clicks, {int(clicks[0].sum())} of them at position 0, in what can "
            f"be compared; at least {_LEAST_CLICKS} and one at position 0 are needed"
        )


def _filled(curve: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Positions where nothing was shown take the value of the last one before."""
    last = np.maximum.accumulate(np.where(known, np.arange(len(curve)), 0))
    return curve[last]
