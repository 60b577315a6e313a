"""Estimated examination against the truth, and what a log must have for it."""

from __future__ import annotations

import numpy as np
import pytest

from dnr_recbole.bias.propensities import (
    Logged,
    examination_curve,
    known_propensity,
    position_based_model,
    register_propensity,
)
from dnr_recbole.bias.weights import effective_sample_size, inverse_weights, normalised
from dnr_recbole.errors import DataError, UnknownNameError

THETA = np.array([1.0, 0.6, 0.4, 0.25, 0.15])


def log_of(n=60_000, random_share=0.0, swap_share=0.0, seed=0):
    """Requests of five candidates with uniform scores, attraction = score², shown by score."""
    rng = np.random.default_rng(seed)
    score = np.sort(rng.random((n, 5)), axis=1)[:, ::-1]
    intended = np.broadcast_to(np.arange(5), score.shape).copy()
    position = intended.copy()
    swapped = np.flatnonzero(rng.random(n) < swap_share)
    upper = rng.integers(4, size=len(swapped))
    position[swapped, upper], position[swapped, upper + 1] = upper + 1, upper
    randomised = rng.random(n) < random_share
    position[randomised] = rng.permuted(position[randomised], axis=1)
    click = rng.random(score.shape) < score**2 * THETA[position]
    return Logged(
        position.ravel(), click.ravel(), score.ravel(),
        intended=intended.ravel() if swap_share else None,
        randomised=np.repeat(randomised, 5) if random_share else None,
    )  # fmt: skip


@pytest.mark.parametrize("name, keys", [("random", {"random_share": 0.3}), ("swaps", {"swap_share": 0.5}), ("em", {})])
def test_every_estimator_finds_the_truth(name, keys):
    assert examination_curve(name, log_of(**keys)) == pytest.approx(THETA, rel=0.12)


def test_click_rates_alone_do_not():
    log = log_of()
    rates = np.array([log.click[log.position == place].mean() for place in range(5)])
    assert (rates / rates[0])[-1] < 0.5 * THETA[-1], "the last position holds the worst candidates"


def test_without_bias_the_curve_is_flat():
    rng = np.random.default_rng(1)
    score = np.sort(rng.random((60_000, 4)), axis=1)[:, ::-1]
    position = np.broadcast_to(np.arange(4), score.shape)
    click = rng.random(score.shape) < score**2
    assert examination_curve("em", Logged(position.ravel(), click.ravel(), score.ravel())) == pytest.approx(1, rel=0.1)


def test_the_model_reproduces_exact_tables():
    theta, gamma = np.array([1.0, 0.5, 0.25]), np.array([0.8, 0.4, 0.1, 0.3])
    shown = np.full((3, 4), 1e6)
    found, attraction = position_based_model(shown * theta[:, None] * gamma, shown)
    assert found[:, None] * attraction == pytest.approx(theta[:, None] * gamma, rel=1e-3)
    assert found / found[0] == pytest.approx(theta, rel=1e-3)


def test_what_a_log_lacks_is_said():
    log = log_of(n=200)
    for name, lacking in (("random", "randomised"), ("swaps", "intended_position")):
        with pytest.raises(DataError, match=lacking):
            examination_curve(name, log)
    with pytest.raises(DataError, match="examination or propensity"):
        known_propensity(log)
    with pytest.raises(DataError, match="clicks"):
        examination_curve("em", Logged(log.position, np.zeros_like(log.click), log.score))
    with pytest.raises(UnknownNameError, match="choose one of random, swaps"):
        examination_curve("unheard", log)


def test_an_estimator_from_outside():
    @register_propensity("flat")
    def flat(logged):
        return np.ones(int(logged.position.max()) + 1)

    assert examination_curve("flat", log_of(n=10)).tolist() == [1] * 5


def test_weights_by_hand():
    propensity = np.array([1.0, 0.5, 0.05])
    assert inverse_weights(propensity, 0.1).tolist() == [1, 2, 10]
    assert normalised(np.array([1.0, 3.0, 100.0]), np.array([True, True, False])).tolist() == [0.5, 1.5, 50]
    assert effective_sample_size(np.array([1.0, 1, 1, 1])) == 4
    assert effective_sample_size(np.array([3.0, 1])) == pytest.approx(16 / 10)
    assert effective_sample_size(np.zeros(3)) == 0
