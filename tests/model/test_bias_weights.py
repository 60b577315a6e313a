"""What a click counts, in every loss of every reranker; and positions that are held constant when a model ranks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.splits import TRAIN
from dnr_recbole.data.synthetic import synthetic_rerank_data
from dnr_recbole.data.weighting import weighted
from dnr_recbole.dnr.noises import make_noise
from dnr_recbole.errors import ConfigError, DataError
from dnr_recbole.evaluator import CandidateEvaluator
from dnr_recbole.model.inputs.residual_slope import fit_slope
from dnr_recbole.model.losses import bce, list_ce
from dnr_recbole.registry import get_reranker, list_models
from dnr_recbole.trainer.steps import as_step

WORLD = dict(
    dataset="synthetic", synthetic_users=60, synthetic_items=40, synthetic_requests_per_user=6, n_candidates=8,
    synthetic_shown=6, synthetic_intercept=0.0, synthetic_clicks="position", metrics=["NDCG", "GDCG", "GNDCG"],
    topk=[3], slate_size=3, valid_metric="NDCG@3", use_gpu=False, embedding_size=16, history_length=6, seed=2,
    dropout=0.0, epochs=1, show_progress=False,
)  # fmt: skip
MODELS = [info.name for info in list_models("reranker")]
OWN = {
    "DNR": {"adversarial": False}, "DCDR": {"n_heads": 2}, "MGE": {},
}  # fmt: skip


def world(model="PRM", **keys):
    config = Config(model, config_dict={**WORLD, **OWN.get(model, {}), **keys})
    return synthetic_rerank_data(config), config


# ---------------------------------------------------------------- losses by hand


def test_weighted_cross_entropy_by_hand():
    logits, labels = torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    mask, weights = torch.tensor([[True, True, False]]), torch.tensor([[4.0, 1.0, 9.0]])
    by_hand = (4 * math.log(2) + math.log(1 + math.e)) / 2
    assert bce(logits, labels, mask, weights).item() == pytest.approx(by_hand)
    assert torch.equal(bce(logits, labels, mask, torch.ones_like(labels)), bce(logits, labels, mask))


def test_weighted_list_loss_by_hand_and_weights_do_not_cancel_within_a_request():
    logits, mask = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    labels = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 1.0, 0]])
    weights = torch.tensor([[5.0, 1, 1, 1], [1, 2.0, 1.0, 1]])
    assert list_ce(logits, labels, mask, weights).item() == pytest.approx((5 + 2 + 1) * math.log(4) / 3)
    assert list_ce(logits, labels, mask).item() == pytest.approx(math.log(4))


def test_corrected_targets_are_unbiased_and_plain_clicks_are_not():
    """The mean loss over what could have been examined is the loss of the truth."""
    truth, theta = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.5, 0.2]])
    logits, mask = torch.tensor([[0.3, -0.2, 0.9]]), torch.ones(1, 3, dtype=torch.bool)
    expected = {"plain": 0.0, "corrected": 0.0}
    for pattern in range(8):
        seen = torch.tensor([[float(pattern >> i & 1) for i in range(3)]])
        chance = float(torch.where(seen > 0, theta, 1 - theta).prod())
        clicks = truth * seen
        expected["plain"] += chance * bce(logits, clicks, mask).item()
        expected["corrected"] += chance * bce(logits, clicks / theta, mask).item()
    assert expected["corrected"] == pytest.approx(bce(logits, truth, mask).item(), rel=1e-5)
    assert abs(expected["plain"] - bce(logits, truth, mask).item()) > 0.1


# ---------------------------------------------------------------- weights of a table


def test_clicks_weigh_what_their_position_says_and_one_on_average():
    data, _ = world(propensity="column", propensity_clip=0.25)
    table = data.train.table
    trained = table.labels & table.shown & (table.split == TRAIN).unsqueeze(1)
    assert table.weights[trained].double().mean().item() == pytest.approx(1, rel=1e-5)
    raw = 1 / np.maximum(1.0 / (1 + table.position[trained].numpy()), 0.25)
    assert table.weights[trained].numpy() == pytest.approx(raw / raw.mean(), rel=1e-5)
    assert (table.weights[~table.labels] == 1).all()
    plain, _ = world(propensity="column", propensity_clip=0.25, propensity_normalise=False)
    assert plain.train.table.weights[trained].numpy() == pytest.approx(raw, rel=1e-5)


def test_corrected_clicks_become_targets():
    data, _ = world(propensity="column", propensity_form="corrected", propensity_normalise=False, propensity_clip=0.01)
    table = data.train.table
    here = table.labels & table.shown & (table.position >= 0)
    assert table.targets[here].numpy() == pytest.approx(1.0 + table.position[here].numpy())
    assert (table.targets[~table.labels] == 0).all() and (table.weights == 1).all()


@pytest.mark.parametrize("name, keys", [("random", {"synthetic_random_exposures": 0.5}), ("em", {}),
                                        ("swaps", {"synthetic_swaps": 1.0})])  # fmt: skip
def test_estimated_weights_fall_with_examination(name, keys):
    data, _ = world(synthetic_users=1500, propensity=name, propensity_clip=0.01, **keys)
    table = data.train.table
    clicked = table.labels & (table.position >= 0)
    first, last = (table.weights[clicked & (table.position == place)].mean() for place in (0, 4))
    assert last / first == pytest.approx(5, rel=0.35)


def test_clicks_without_a_position_are_said(caplog):
    data, config = world()
    table = dataclasses.replace(data.train.table, weights=None)
    config = Config("PRM", config_dict={**WORLD, "propensity": "column"})
    clicked = table.labels & table.shown & (table.split == TRAIN).unsqueeze(1)
    weighted(config, table)
    assert "no position" not in caplog.text
    row, place = clicked.nonzero()[0].tolist()
    table.position[row, place] = -1
    assert weighted(config, table).weights[row, place] < 1
    assert f"1 of {int(clicked.sum()):,} training clicks have no position" in caplog.text


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(ConfigError, match="need positions"):
        world(synthetic_clicks="none", propensity="em")
    with pytest.raises(DataError, match="column examination or propensity"):
        world(synthetic_known_propensities=False, propensity="column")
    with pytest.raises(DataError, match="randomised"):
        world(propensity="random")
    with pytest.raises(DataError, match="intended_position"):
        world(propensity="swaps")
    with pytest.raises(ConfigError, match="source=log or synthetic"):
        Config("PRM", config_dict={"dataset": "ml-100k", "propensity": "em"})


# ---------------------------------------------------------------- every reranker


@pytest.mark.parametrize("name", [name for name in MODELS if not get_reranker(name).fits_itself])
def test_every_loss_of_every_reranker_reads_the_weights(name):
    """All weights twice as large make the parts of the loss that are about labels twice as large; none ignores them."""
    data, config = world(name, propensity="column")
    model = get_reranker(name)(config, data.catalogue)
    if not list(model.parameters()):
        pytest.skip("nothing is trained")
    model.train()
    slate = data.train.slate(torch.arange(24))

    def losses(weights):
        torch.manual_seed(0)
        return [as_step(step).loss.item() for step in model.training_steps(dataclasses.replace(slate, weights=weights))]

    ones = torch.ones_like(slate.weights)
    once, twice = losses(ones), losses(2 * ones)
    assert np.abs(np.subtract(once, twice)).max() > 1e-3 * np.abs(once).max()
    if type(model).loss.__module__.endswith("abstract_reranker") and name != "DNR":
        assert twice == pytest.approx([2 * loss for loss in once], rel=1e-4)
    some = torch.where(slate.labels > 0, torch.linspace(0.2, 5, slate.labels.shape[0]).unsqueeze(1), ones)
    assert losses(some) != pytest.approx(once, rel=1e-4)


@pytest.mark.parametrize("kind", ["logit", "vector"])
@pytest.mark.parametrize("name", [name for name in MODELS if not get_reranker(name).fits_itself])
def test_positions_teach_and_are_constant_when_ranking(name, kind):
    if kind not in get_reranker(name).position_inputs:
        with pytest.raises(ConfigError, match=f"{name} can use"):
            data, config = world(name, position_input=kind)
            get_reranker(name)(config, data.catalogue)
        return
    data, config = world(name, position_input=kind)
    model = get_reranker(name)(config, data.catalogue)
    table = next(parameter for key, parameter in model.named_parameters() if "position_input.table" in key)
    slate = data.train.slate(torch.arange(32))
    model.train()
    sum(as_step(step).loss for step in model.training_steps(slate)).backward()
    assert table.grad is not None and table.grad.abs().sum() > 0
    with torch.no_grad():
        table.copy_(torch.randn_like(table))
    model.eval()
    moved = dataclasses.replace(slate, position=slate.position.flip(0))
    assert torch.equal(model.predict(slate), model.predict(moved))
    assert torch.equal(model.predict(slate), model.predict(dataclasses.replace(slate, position=None)))


def test_trees_read_weights_positions_and_lightgbms_own_bias():
    pytest.importorskip("lightgbm")
    results = {}
    for label, keys in {
        "plain": {}, "weights": {"propensity": "column"}, "column": {"position_input": "logit"},
        "bias": {"gbdt_position_bias": True},
    }.items():  # fmt: skip
        data, config = world("LambdaMART", synthetic_users=300, min_data_in_leaf=5, **keys)
        model = get_reranker("LambdaMART")(config, data.catalogue)
        model.fit(*(SlateLoader(part, 64) for part in (data.train, data.valid)))
        slate = data.test.slate(torch.arange(20))
        results[label] = model.predict(slate)
        held = dataclasses.replace(slate, position=torch.full_like(slate.candidates, 3))
        assert torch.equal(results[label], model.predict(held)), "a position is read when ranking"
    for label in ("weights", "column", "bias"):
        assert not torch.equal(results[label], results["plain"]), label


# ---------------------------------------------------------------- DNR, slopes, metrics


def test_fitted_noise_knows_the_scores_of_what_would_be_clicked():
    """Clicks fall on what the old system put on top, so their scores are too high until they are weighted."""
    keys = dict(synthetic_users=1500, synthetic_click_bias=2.0, noise_type="fitted", synthetic_shown=8)
    full, config = world("DNR", **{**keys, "synthetic_click_bias": 0.0})
    naive, _ = world("DNR", **keys)
    corrected, _ = world("DNR", **keys, propensity="column", propensity_clip=0.01)
    means = []
    for data in (full, naive, corrected):
        noise = make_noise(config, data.catalogue)
        noise.fit(data.train)
        a, b = noise.shapes[1, 0]
        means.append(float(a / (a + b)))
    assert means[1] > means[0] + 0.03
    assert abs(means[2] - means[0]) < 0.5 * abs(means[1] - means[0])


def test_the_bank_of_redrawn_scores_is_drawn_by_weight():
    data, config = world("DNR", propensity="column", noise_type="empirical", noise_bank=4000, propensity_clip=0.01)
    noise = make_noise(config, data.catalogue)
    weights = torch.cat([data.train.slate(rows).request_weights for rows in torch.arange(len(data.train)).split(64)])
    rows = torch.arange(len(data.train))
    drawn = noise._chosen(data.train, rows, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=len(rows)) / len(drawn)
    assert torch.corrcoef(torch.stack([share, weights]))[0, 1] > 0.7


def test_a_slope_of_equal_weights_is_that_without_weights():
    data, _ = world(synthetic_intercept=-2.0)
    table = data.train.table
    for listwise in (True, False):
        plain = fit_slope(data.train, listwise)
        single = table.labels.sum(1) <= 1  # where each request has one positive, both kinds of means agree
        rows = data.train.rows[single[data.train.rows]]
        subset = dataclasses.replace(data.train, rows=rows)
        ones = dataclasses.replace(subset, table=dataclasses.replace(table, weights=torch.ones_like(table.scores)))
        assert fit_slope(ones, listwise) == pytest.approx(fit_slope(subset, listwise), rel=1e-6)
        assert math.isfinite(plain)


def test_metrics_of_gains_by_hand():
    _, config = world()
    evaluator = CandidateEvaluator(config, 40)
    scores, gains = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 3.0, 7.0]])
    labels, mask = (gains > 0).float(), torch.ones(1, 4, dtype=torch.bool)
    evaluator.add(scores, torch.tensor([[1, 2, 3, 4]]), mask, labels, gains=gains)
    result, log2 = evaluator.result(), np.log2
    assert result["gdcg@3"] == pytest.approx(1 + 3 / log2(4), abs=1e-5)
    assert result["gndcg@3"] == pytest.approx((1 + 3 / 2) / (7 + 3 / log2(3) + 1 / 2), abs=1e-5)
    evaluator.reset()
    evaluator.add(scores, torch.tensor([[1, 2, 3, 4]]), mask, labels)
    result = evaluator.result()
    assert result["gndcg@3"] == pytest.approx(result["ndcg@3"], abs=1e-5)
