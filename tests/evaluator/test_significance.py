"""Paired tests against scipy, against exact values, and on degenerate samples."""

import math

import numpy as np
import pytest
from scipy import stats

from dnr_recbole.errors import DataError, UnknownNameError
from dnr_recbole.evaluator import over_requests, over_seeds, paired_test
from dnr_recbole.evaluator.significance import holm, over_users

METHODS = ["t", "wilcoxon", "permutation", "bootstrap"]


def samples(n=80, shift=0.0, seed=0):
    generator = np.random.default_rng(seed)
    b = generator.random(n)
    return b + shift + generator.normal(scale=0.1, size=n), b


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_t_equals_scipy(alternative):
    a, b = samples(shift=0.02)
    ours, theirs = paired_test(a, b, alternative=alternative), stats.ttest_rel(a, b, alternative=alternative)
    assert ours.p_value == pytest.approx(theirs.pvalue)
    assert ours.statistic == pytest.approx(theirs.statistic)
    assert (ours.n, ours.difference) == (80, pytest.approx((a - b).mean()))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx(tuple(interval))


def test_permutation_is_exact_for_few_pairs():
    a, b = np.array([0.5, 0.6, 0.7, 0.8, 0.9]), np.array([0.4, 0.4, 0.4, 0.4, 0.4])
    assert paired_test(a, b, "permutation").p_value == pytest.approx(2 / 32)
    assert paired_test(a, b, "permutation", alternative="greater").p_value == pytest.approx(1 / 32)
    assert paired_test(a, b, "permutation", alternative="less").p_value == 1


@pytest.mark.parametrize("method", METHODS)
def test_methods_agree(method):
    far, near = paired_test(*samples(shift=0.1), method), paired_test(*samples(shift=0.015), method)
    assert far.significant() and far.p_value < 1e-3
    assert near.p_value == pytest.approx(paired_test(*samples(shift=0.015)).p_value, abs=0.03)
    assert paired_test(*samples(shift=0.1), method, alternative="less").p_value > 0.99
    assert paired_test(*samples(shift=0.1), method, alternative="greater").p_value < 1e-3
    assert paired_test(*samples(shift=0.015), method).p_value == near.p_value  # reproducible


@pytest.mark.parametrize("method", METHODS)
def test_false_alarms_are_as_rare_as_promised(method):
    alarms = [paired_test(*samples(40, seed=s), method, n_resamples=499).significant() for s in range(200)]
    assert 0.005 < np.mean(alarms) < 0.11


@pytest.mark.parametrize("method", METHODS)
def test_identical_samples(method):
    a, _ = samples()
    result = paired_test(a, a.copy(), method)
    assert result.p_value == 1 and result.difference == 0 and not result.significant()


def test_the_same_difference_everywhere():
    result = paired_test([0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
    assert result.p_value == 0 and result.statistic == math.inf and result.low == result.high
    assert paired_test([0.3, 0.4], [0.2, 0.3], alternative="less").p_value == 1


def test_clusters_are_averaged_first():
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(20), 50)
    b = generator.random(1000)
    a = b + 0.01 + generator.normal(scale=0.1, size=20)[users]  # one effect per user, on all their requests
    clustered = paired_test(a, b, clusters=users)
    by_user = [(a - b)[users == user].mean() for user in range(20)]
    assert clustered.n == 20
    assert clustered.p_value == pytest.approx(stats.ttest_1samp(by_user, 0).pvalue)
    assert clustered.p_value > paired_test(a, b).p_value  # ignoring the clusters overstates the evidence
    names = np.array([f"user {user}" for user in users])
    assert paired_test(a, b, clusters=names).p_value == pytest.approx(clustered.p_value)


def test_wilcoxon_by_hand():
    """Signed ranks 1, 2, 3, 4, −5: of the 32 sign patterns, 10 give a rank sum of at most 5."""
    a, b = np.array([1.1, 1.2, 1.3, 1.4, 0.5]), np.ones(5)
    result = paired_test(a, b, "wilcoxon")
    assert (result.statistic, result.n) == (5, 5)
    assert result.p_value == pytest.approx(2 * 10 / 32)
    assert paired_test(b + [0.1, 0.2, 0.3, 0.4, 0.5], b, "wilcoxon", alternative="greater").p_value == 1 / 32
    assert math.isnan(result.low) and math.isnan(result.high)


def test_wilcoxon_with_ties_by_hand():
    """Signed ranks 1.5, 1.5, 3, −4: W⁺ = 6 against a mean of 5 and a variance of 7.5 less 6 / 48 for the tie."""
    a, b = np.array([1.1, 1.1, 1.2, 0.7, 1.0]), np.ones(5)
    expected = 2 * stats.norm.sf((6 - 5) / (7.5 - 6 / 48) ** 0.5)
    assert paired_test(a, b, "wilcoxon").p_value == pytest.approx(expected)


def test_wilcoxon_takes_rounding_for_no_difference():
    a, b = np.array([0.2, 0.4, 0.9, 0.3]), np.array([0.3, 0.3, 0.9, 0.3])  # user 1's means agree but for the last bit
    users = np.array([1, 1, 2, 3])
    assert paired_test(a, b, "wilcoxon", clusters=users).p_value == 1


def test_over_users_by_hand():
    """User 1: 0.5 − 0.25 over two requests; user 2: 0.5 − 0; user 3: 0 − 0. Mean 0.25, standard error 0.25 / √3."""
    result = over_users([1.0, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.0], users=[1, 1, 2, 3])
    assert result.n == 3
    assert (result.mean_a, result.mean_b) == (pytest.approx(1 / 3), pytest.approx(0.25 / 3))
    assert result.difference == pytest.approx(0.25)
    assert result.statistic == pytest.approx(3**0.5)
    assert result.p_value == pytest.approx(2 * stats.t.sf(3**0.5, 2))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 · .01, max(.06, 1 · .04), 2 · .03
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_over_requests_and_over_seeds():
    generator = np.random.default_rng(1)
    b = generator.random((5, 300))
    a = b + generator.normal(0.01, 0.05, size=(5, 300))
    assert over_requests(a, b) == paired_test(a.mean(axis=0), b.mean(axis=0))
    assert over_requests(a[0], b[0]) == paired_test(a[0], b[0])
    assert over_seeds(a, b) == paired_test(a.mean(axis=1), b.mean(axis=1))
    assert over_seeds([0.5, 0.6, 0.7], [0.4, 0.55, 0.6]).n == 3
    assert over_requests(a, b, clusters=np.arange(300) // 3).n == 100


def test_pairs_with_nan_are_left_out():
    a, b = samples()
    with_nan = np.append(a, np.nan), np.append(b, 0.5)
    assert paired_test(*with_nan) == paired_test(a, b)
    assert paired_test(*with_nan, clusters=np.arange(81)).n == 80


def test_refusals():
    with pytest.raises(DataError, match="equally long"):
        paired_test([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="at least 2"):
        paired_test([1.0], [2.0])
    with pytest.raises(DataError, match="one id per pair"):
        paired_test([1.0, 2.0], [1.0, 1.0], clusters=[1])
    with pytest.raises(UnknownNameError, match="method"):
        paired_test([1.0, 2.0], [1.0, 1.0], method="sign")
    with pytest.raises(UnknownNameError, match="alternative"):
        paired_test([1.0, 2.0], [1.0, 1.0], alternative="more")
