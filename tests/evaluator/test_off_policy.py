"""Values of other rankings from logs: by hand, against the truth over many logs, and from the front door."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from dnr_recbole import Reranker
from dnr_recbole.bias.off_policy import modelled_clicks, policy_value
from dnr_recbole.data.slate import Slate
from dnr_recbole.evaluator.off_policy import AS_SHOWN, OffPolicy

N, K = 4, 2


def test_estimates_by_hand():
    """Three requests, two positions; the new ranking agrees at (0, 0), (1, 1) and (2, 0)."""
    clicks = np.array([[1.0, 0], [0, 1], [0, 1]])
    weights = np.array([[4.0, 0], [0, 2], [4, 0]])
    new, old = np.full((3, 2), 0.3), np.full((3, 2), 0.5)
    value = policy_value(clicks, weights, np.ones((3, 2), bool), np.arange(3), new, old, samples=50)
    assert value.estimates["ips"][0] == pytest.approx((4 + 2 + 0) / 3)
    assert value.estimates["snips"][0] == pytest.approx(4 / 8 + 2 / 2)
    assert value.estimates["dr"][0] == pytest.approx(0.6 + (4 * 0.5 + 2 * 0.5 - 4 * 0.5) / 3)
    assert value.effective == pytest.approx(10**2 / (16 + 4 + 16) / 2) and value.doubtful


def test_a_ranking_that_agrees_everywhere_has_the_value_of_the_log():
    rng = np.random.default_rng(0)
    clicks = (rng.random((500, 3)) < 0.2).astype(float)
    value = policy_value(clicks, np.ones_like(clicks), np.ones(clicks.shape, bool), np.arange(500))
    mean = clicks.sum(1).mean()
    assert value.estimates["ips"][0] == value.estimates["snips"][0] == pytest.approx(mean)
    half = 1.96 * clicks.sum(1).std() / 500**0.5
    assert value.estimates["ips"][1:] == pytest.approx((mean - half, mean + half), abs=0.012)
    assert value.effective == pytest.approx(500) and not value.doubtful


def test_requests_of_a_user_are_drawn_together():
    rng = np.random.default_rng(1)
    clicks = np.repeat((rng.random((50, 1)) < 0.5).astype(float), 20, axis=0)
    shown, ones = np.ones(clicks.shape, bool), np.ones(clicks.shape)
    alone = policy_value(clicks, ones, shown, np.arange(1000)).estimates["ips"]
    together = policy_value(clicks, ones, shown, np.repeat(np.arange(50), 20)).estimates["ips"]
    assert alone[0] == together[0]
    assert together[2] - together[1] > 3 * (alone[2] - alone[1])


def log_of(rng, requests):
    """N candidates in random order, K of them shown; a click needs attraction (known from a feature) and a look."""
    quality = rng.random((requests, N))
    chance = 0.1 + 0.8 * quality**2
    order = rng.permuted(np.broadcast_to(np.arange(N), (requests, N)), axis=1)[:, :K]
    seen = np.array([1.0, 0.5])
    clicks = rng.random((requests, K)) < np.take_along_axis(chance, order, 1) * seen
    return quality, chance, order, clicks.astype(float), seen


def test_intervals_cover_the_truth_as_often_as_they_say():
    """300 logs of 400 requests with the ranking by quality; 95 % intervals. Binomial noise of the rate: 1.3 points."""
    rng, logs, hits, errors = np.random.default_rng(7), 300, {"ips": 0, "snips": 0, "dr": 0}, {}
    quality, chance, *_, seen = log_of(rng, 200_000)
    best = np.argsort(-quality, axis=1)[:, :K]
    truth = float((np.take_along_axis(chance, best, 1) * seen).sum(1).mean())
    for number in range(logs):
        quality, _, order, clicks, _ = log_of(rng, 400)
        best = np.argsort(-quality, axis=1)[:, :K]
        weights, shown = (best == order) * float(N), np.ones(order.shape, bool)
        place, fold = np.broadcast_to(np.arange(K), order.shape).ravel(), np.repeat(np.arange(400) % 2, K)
        old, new = (np.take_along_axis(quality, at, 1).reshape(-1, 1) for at in (order, best))
        old, new = modelled_clicks(place, old, clicks.ravel(), fold, new, place, fold)
        value = policy_value(
            clicks, weights, shown, np.arange(400), new.reshape(-1, K), old.reshape(-1, K), samples=300, seed=number
        )
        for name, (estimate, low, high) in value.estimates.items():
            hits[name] += low <= truth <= high
            errors.setdefault(name, []).append(estimate - truth)
    rates = {name: count / logs for name, count in hits.items()}
    assert all(0.90 <= rate <= 0.985 for rate in rates.values()), rates
    bias = {name: np.mean(each) / (np.std(each) / logs**0.5) for name, each in errors.items()}
    assert abs(bias["ips"]) < 3.5 and abs(bias["dr"]) < 3.5, "unbiased"
    spread = {name: np.std(each) for name, each in errors.items()}
    assert spread["dr"] < spread["snips"] < spread["ips"], "the model of clicks helps"


def test_models_of_clicks_do_not_see_the_request_that_they_predict():
    place, fold = np.zeros(40, int), np.arange(40) % 2
    clicks = (fold == 0).astype(float)  # constant within a fold, so that the other fold's rate is the prediction
    old, new = modelled_clicks(place, np.zeros((40, 1)), clicks, fold, np.zeros((40, 1)), place, fold)
    assert (old == 1 - clicks).all() and (new == 1 - clicks).all()


def slate_of(position, labels, scores):
    n = len(position[0])
    fill = torch.zeros(len(position), 1, dtype=torch.long)
    return Slate(
        users=fill[:, 0], history=fill, history_mask=fill.bool(),
        candidates=torch.arange(1, n + 1).expand(len(position), n),
        mask=torch.ones(len(position), n, dtype=torch.bool), scores=torch.tensor(scores), labels=torch.tensor(labels),
        position=torch.tensor(position),
    )  # fmt: skip


def test_positions_of_a_slate_become_displays():
    slate = slate_of([[1, -1, 0], [0, 1, -1]], [[1.0, 0, 0], [0, 1.0, 0]], [[0.9, 0.5, 0.1], [0.2, 0.7, 0.6]])
    found = OffPolicy(2)
    found.add("new", torch.tensor([[0.1, 0.3, 0.9], [0.9, 0.8, 0.1]]), slate, torch.tensor([[0.5] * 3, [0.25] * 3]))
    value = found.result(np.array([1, 2]))
    # Request 0: new order 2, 1, 0; shown 2, 0: they agree at position 0, without a click. Request 1 agrees twice.
    assert value["new"].estimates["ips"][0] == pytest.approx(4 / 2)
    assert value["new"].estimates["snips"][0] == pytest.approx(0 + 1)
    assert value[AS_SHOWN].estimates["ips"][0] == pytest.approx(1)


def test_requests_that_show_less_than_others_are_valued_for_what_they_show():
    """Half of the requests show one candidate in random order, half two; all rankings find all four in each."""
    rng, n = np.random.default_rng(3), 4000
    quality, chance, order, clicks, seen = log_of(rng, n)
    long = np.arange(n) % 2 == 1
    position, labels = np.full((n, N), -1), np.zeros((n, N), np.float32)
    for k in range(K):
        rows = np.flatnonzero(long | (k == 0))
        position[rows, order[rows, k]] = k
        labels[rows, order[rows, k]] = clicks[rows, k]
    slate = slate_of(position.tolist(), labels.tolist(), quality.astype(np.float32).tolist())
    found = OffPolicy(K)
    found.add("new", torch.from_numpy(quality).float(), slate, torch.full((n, N), 1 / N))
    value = found.result(np.arange(n))
    best = np.sort(chance, 1)[:, ::-1][:, :K] * seen
    truth = best[:, 0].mean() + best[long, 1].sum() / n
    for name, tolerance in (("ips", 0.08), ("snips", 0.05), ("dr", 0.05)):
        assert value["new"].estimates[name][0] == pytest.approx(truth, abs=tolerance), name
    shown = value[AS_SHOWN].estimates
    assert shown["snips"][0] == pytest.approx(shown["ips"][0]) == labels.sum() / n


def random_log(requests, seed):
    """A request log of eight candidates, three shown at random; clicks need quality and a look."""
    rng, rows = np.random.default_rng(seed), []
    for request in range(requests):
        quality, place = rng.normal(size=8), rng.permutation(8)
        click = (rng.random(8) < 1 / (1 + np.exp(-2 * quality))) & (rng.random(8) < 1 / (1.0 + place)) & (place < 3)
        for item in range(8):
            rows.append({
                "request_id": f"r{seed}-{request}", "user_id": f"u{request % 40}", "item_id": f"i{item}",
                "score": 1 / (1 + np.exp(-quality[item] - rng.normal())), "label": int(click[item]),
                "quality": quality[item], "exposed": bool(place[item] < 3),
                "position": place[item] if place[item] < 3 else None, "propensity": 1 / 8,
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_evaluate_reports_clicks_per_request(caplog):
    model = Reranker(
        "PRM",
        embedding_size=8,
        epochs=3,
        baselines=[],
        log_features=["quality"],
        history_interaction="none",
        dropout=0.0,
    ).fit(random_log(600, 0))
    result = model.evaluate(random_log(900, 1))
    assert set(result.off_policy) == {"PRM", "incoming order", AS_SHOWN}
    ours, incoming, shown = (result.off_policy[name] for name in ("PRM", "incoming order", AS_SHOWN))
    for name in ("ips", "snips", "dr"):
        assert ours.estimates[name][1] < ours.estimates[name][0] < ours.estimates[name][2]
        assert ours.estimates[name][0] > shown.estimates["ips"][0], "better than chance"
    assert ours.estimates["dr"][0] > incoming.estimates["dr"][0]
    text = str(result)
    assert "clicks per request" in text and "WARNING" not in text
    few = model.evaluate(random_log(60, 2))
    assert few.off_policy["PRM"].doubtful and "WARNING: fewer than 100 effective displays" in str(few)
    gaps = random_log(60, 2)
    gaps.loc[gaps.position == 0, "propensity"] = None
    assert model.evaluate(gaps).off_policy == {}
    twice = random_log(60, 2)
    twice.loc[twice.position == 2, "position"] = 1
    caplog.clear()
    assert model.evaluate(twice).off_policy == {} and "60 candidates were shown where another one was" in caplog.text
    plain = model.evaluate(random_log(60, 2).drop(columns=["propensity"]))
    assert plain.off_policy == {} and "clicks per request" not in str(plain)
    model.artefact.preprocessor.n_candidates = 6
    caplog.clear()
    assert model.evaluate(random_log(60, 2)).off_policy and "lists are cut to 6 candidates" in caplog.text
