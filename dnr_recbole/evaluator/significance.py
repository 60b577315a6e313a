"""Is one model better than another? Paired tests over requests (one run each) or seeds (several runs each).

Over requests, the same requests must be in the same order: ``CandidateEvaluator.per_request`` gives them so.
Requests of one user are not independent; ``clusters`` averages each user's differences first, so that users
are what is sampled (:func:`over_users`). The two levels answer different questions: requests say whether
*these two trained models* differ on new requests; seeds say whether the *methods* differ when trained anew. A
claim about methods needs the latter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dnr_recbole.errors import DataError, UnknownNameError

METHODS = ("t", "wilcoxon", "permutation", "bootstrap")
ALTERNATIVES = ("two-sided", "greater", "less")
_BATCH = 256  # resamples held in memory at a time


@dataclass(frozen=True)
class PairedTest:
    """Outcome of a paired test of ``a`` against ``b``.

    Attributes:
        method: "t", "wilcoxon", "permutation" or "bootstrap".
        alternative: "two-sided", "greater" (a > b) or "less".
        n: number of independent pairs (requests, clusters or seeds).
        mean_a, mean_b, difference: means over these pairs; ``difference`` is a − b.
        statistic: t for "t", the rank sum W for "wilcoxon", else the mean difference.
        p_value: chance of such a difference if a and b were alike.
        low, high: two-sided confidence interval of the difference; NaN for "wilcoxon" and "permutation",
            which have none (0 if there is no difference at all).
    """

    method: str
    alternative: str
    n: int
    mean_a: float
    mean_b: float
    difference: float
    statistic: float
    p_value: float
    low: float
    high: float

    def significant(self, alpha: float = 0.05) -> bool:
        return self.p_value < alpha


def paired_test(
    a,
    b,
    method: str = "t",
    clusters=None,
    alternative: str = "two-sided",
    confidence: float = 0.95,
    n_resamples: int = 9999,
    seed: int = 0,
) -> PairedTest:
    """Compare paired samples ``a`` and ``b``, each ``[N]``.

    Pairs with a NaN are left out (gauc of a request without negatives). Samples that do not differ at all
    give p = 1.

    Args:
        method: "t": Student's paired t-test. "wilcoxon": signed ranks of the differences, pairs without one left
            out; exact up to 50 pairs without ties, else by a normal approximation. It asks whether a is above b
            more often and more clearly than below, not about the mean.
            "permutation": flips the signs of the differences, exact up to 13 pairs at the default number of
            resamples. "bootstrap": percentile bootstrap of the mean difference; p is the smallest level at
            which the interval excludes 0.
        clusters: ``[N]`` ids such as users; differences are averaged within each first.
        n_resamples, seed: for permutation and bootstrap.
    """
    _check_choice("method", method, METHODS)
    _check_choice("alternative", alternative, ALTERNATIVES)
    a, b = _pairs(a, b, clusters)
    difference = a - b
    n, mean = len(difference), float(difference.mean())
    if not difference.any():
        statistic, p_value, interval = 0.0, 1.0, (0.0, 0.0)
    elif method == "t":
        statistic, p_value, interval = _t(difference, alternative, confidence)
    elif method == "wilcoxon":
        statistic, p_value, interval = _wilcoxon(difference, alternative)
    else:
        resample = _permutation if method == "permutation" else _bootstrap
        generator = np.random.default_rng(seed)
        p_value, interval = resample(difference, alternative, confidence, n_resamples, generator)
        statistic = mean
    return PairedTest(
        method,
        alternative,
        n,
        float(a.mean()),
        float(b.mean()),
        mean,
        float(statistic),
        float(p_value),
        *map(float, interval),
    )


def over_requests(a, b, clusters=None, **options) -> PairedTest:
    """Test per-request values, ``[N]`` or ``[seeds, N]`` (seeds are averaged first); options as above."""
    a, b = np.atleast_2d(a).mean(axis=0), np.atleast_2d(b).mean(axis=0)
    return paired_test(a, b, clusters=clusters, **options)


def over_users(a, b, users, **options) -> PairedTest:
    """Test per-request values, ``[N]`` or ``[seeds, N]``, averaged per user first; ``users`` ``[N]`` are ids."""
    return over_requests(a, b, clusters=users, **options)


def each_his_own(users: np.ndarray, nobody: np.ndarray) -> np.ndarray:
    """Users ``[N]`` with a number of its own for each request without one (bool ``[N]``): they are no single person."""
    return np.where(nobody, users.max(initial=0) + 1 + np.arange(len(users)), users)


def over_seeds(a, b, **options) -> PairedTest:
    """Test one value per seed, ``[S]``, or per-request values ``[S, N]`` (then averaged over requests first).

    Position s of both must be the same seed. With few seeds the t-test is the one with power: a permutation
    test of 5 seeds cannot get below p = 2/32.
    """
    a, b = (values.mean(axis=1) if values.ndim == 2 else values for values in (np.asarray(a), np.asarray(b)))
    return paired_test(a, b, **options)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted by Holm's method: any below α is a false alarm with probability ≤ α at most.

    The k-th smallest of m is multiplied by m − k + 1, and none may be smaller than that of a smaller one.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def _pairs(a, b, clusters: np.ndarray | None):
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise DataError(f"paired samples must be 1-D and equally long, got shapes {a.shape} and {b.shape}")
    valid = ~(np.isnan(a) | np.isnan(b))
    a, b = a[valid], b[valid]
    if clusters is not None:
        clusters = np.asarray(clusters)
        if clusters.shape != valid.shape:
            raise DataError(f"clusters must have one id per pair, got {clusters.shape} for {valid.shape}")
        _, index, size = np.unique(clusters[valid], return_inverse=True, return_counts=True)
        a, b = np.bincount(index, a) / size, np.bincount(index, b) / size
    if len(a) < 2:
        raise DataError(f"a paired test needs at least 2 pairs, got {len(a)}")
    return a, b


def _t(difference, alternative, confidence):
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    mean = difference.mean()
    if error <= 1e-12 * abs(mean):  # the same difference in every pair, up to rounding
        beyond = alternative == "two-sided" or (mean > 0) == (alternative == "greater")
        return math.copysign(math.inf, mean), 0.0 if beyond else 1.0, (mean, mean)
    test = stats.ttest_1samp(difference, 0.0, alternative=alternative)
    margin = stats.t.ppf((1 + confidence) / 2, len(difference) - 1) * error
    return test.statistic, test.pvalue, (mean - margin, mean + margin)


def _wilcoxon(difference, alternative):
    difference = np.round(difference, 12)  # means of equal sums differ in the last digit, which must not become a rank
    difference = difference[difference != 0]
    if not len(difference):
        return 0.0, 1.0, (0.0, 0.0)
    # Left to choose, new versions of scipy enumerate permutations where a few values are tied, for seconds each.
    exact = len(difference) <= 50 and len(np.unique(np.abs(difference))) == len(difference)
    test = stats.wilcoxon(difference, alternative=alternative, method="exact" if exact else "approx")
    return test.statistic, test.pvalue, (math.nan, math.nan)


def _permutation(difference, alternative, confidence, n_resamples, generator):
    test = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=_BATCH,
        alternative=alternative,
        random_state=generator,
    )
    return test.pvalue, (math.nan, math.nan)


def _bootstrap(difference, alternative, confidence, n_resamples, generator):
    test = stats.bootstrap(
        (difference,),
        np.mean,
        vectorized=True,
        n_resamples=n_resamples,
        batch=_BATCH,
        confidence_level=confidence,
        method="percentile",
        random_state=generator,
    )
    means = test.bootstrap_distribution
    not_above = (1 + (means <= 0).sum()) / (1 + n_resamples)
    not_below = (1 + (means >= 0).sum()) / (1 + n_resamples)
    p_value = {"greater": not_above, "less": not_below, "two-sided": min(1.0, 2 * min(not_above, not_below))}
    return p_value[alternative], tuple(test.confidence_interval)


def _check_choice(name, value, choices):
    if value not in choices:
        raise UnknownNameError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
