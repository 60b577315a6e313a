"""Click models by hand, and the biased log of a generated world against what its keys say."""

from __future__ import annotations

import pytest
import torch

from dnr_recbole.bias.clicks import ClickModel, make_click_model, register_click_model
from dnr_recbole.config import Config
from dnr_recbole.data.exposure import display_probability
from dnr_recbole.data.splits import TEST
from dnr_recbole.data.synthetic import synthetic_rerank_data
from dnr_recbole.errors import UnknownNameError
from dnr_recbole.evaluator import probes

WORLD = dict(
    dataset="synthetic", synthetic_users=400, synthetic_items=60, synthetic_requests_per_user=6, n_candidates=8,
    synthetic_shown=5, synthetic_intercept=-0.5, metrics=["NDCG"], topk=[6], valid_metric="NDCG@6", use_gpu=False,
    history_interaction="none", seed=5, synthetic_clicks="position",
)  # fmt: skip


def world(**keys):
    config = Config("PRM", config_dict={**WORLD, **keys})
    return synthetic_rerank_data(config), config


def test_the_position_based_model_by_hand():
    attraction = torch.full((2, 4), 0.5)
    for strength, by_hand in ((1.0, [1, 1 / 2, 1 / 3, 1 / 4]), (2.0, [1, 1 / 4, 1 / 9, 1 / 16])):
        found = make_click_model("position", strength).examination(attraction)
        assert found[1].tolist() == pytest.approx(by_hand)


def test_the_cascade_by_hand():
    attraction = torch.tensor([[0.5, 0.2, 1.0, 0.3]])
    assert make_click_model("cascade", 1.0).examination(attraction)[0].tolist() == pytest.approx([1, 0.5, 0.4, 0.0])
    half = make_click_model("cascade", 0.5).examination(attraction)[0]
    assert half.tolist() == pytest.approx([1, 0.75, 0.75 * 0.9, 0.75 * 0.9 * 0.5])
    attracted = torch.tensor([[False, True, False, True]])
    seen = make_click_model("cascade", 1.0).examined(attracted, torch.Generator().manual_seed(0))
    assert seen.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("name", ["position", "cascade", "even"])
def test_draws_have_the_examination_that_is_said_and_strength_0_sees_everything(name):
    generator = torch.Generator().manual_seed(1)
    attraction = torch.rand(1, 5, generator=generator).expand(40000, 5)
    attracted = torch.rand(attraction.shape, generator=generator) < attraction
    model = make_click_model(name, 0.8)
    seen = model.examined(attracted, generator).float().mean(0)
    assert torch.allclose(seen, model.examination(attraction)[0], atol=0.012)
    assert make_click_model(name, 0.0).examined(attracted, generator).all()
    assert (make_click_model(name, 0.0).examination(attraction) == 1).all()


def test_a_click_model_from_outside_is_known_by_its_name():
    @register_click_model("last_only")
    class LastOnly(ClickModel):
        def examination(self, attraction):
            return torch.zeros_like(attraction).index_fill(1, torch.tensor([attraction.shape[1] - 1]), 1.0)

    assert make_click_model("last_only", 1.0).examination(torch.ones(1, 3)).tolist() == [[0, 0, 1]]
    with pytest.raises(UnknownNameError, match="choose one of position, even, cascade"):
        make_click_model("unheard", 1.0)


def test_display_probabilities_by_hand():
    """Four candidates, three shown; a fifth of the requests at random, half of the others with one of two swaps."""
    intended = torch.tensor([[0, 1, 2, 3]])
    as_intended = display_probability(intended, intended, 3, 0.2, 0.5)
    assert as_intended[0, :3].tolist() == pytest.approx([0.8 * 0.75 + 0.05, 0.8 * 0.5 + 0.05, 0.8 * 0.75 + 0.05])
    swapped = display_probability(intended, torch.tensor([[1, 0, 2, 3]]), 3, 0.2, 0.5)
    assert swapped[0, :2].tolist() == pytest.approx([0.8 * 0.25 + 0.05] * 2)
    far = display_probability(intended, torch.tensor([[2, 1, 0, 3]]), 3, 0.2, 0.5)
    assert far[0, 0].item() == pytest.approx(0.05)


def test_probabilities_of_display_are_the_frequencies():
    data, _ = world(synthetic_users=3000, synthetic_random_exposures=0.3, synthetic_swaps=0.4)
    table = data.train.table
    log = (table.split != TEST).unsqueeze(1) & table.mask
    for place in range(5):
        for to in range(max(0, place - 1), min(5, place + 2)):
            # Whoever is intended for a place stands there, or one place off, as often as the column says.
            here = log & (table.intended == place) & (table.position == to)
            said = table.propensity[here].unique()
            if place == to and not len(said):
                continue
            assert len(said) == 1
            assert said.item() == pytest.approx(_share(table, log, place, to), abs=0.012)


def _share(table, log, place, to):
    # `intended` is kept of shown candidates only; the intended order is a permutation, so it occurs once a request.
    requests = int(log.any(1).sum())
    return int((log & (table.intended == place) & (table.position == to)).sum()) / requests


def test_the_log_shows_the_best_by_score_and_the_test_keeps_the_truth():
    plain, _ = world(synthetic_clicks="none")
    data, config = world()
    table, true = data.train.table, plain.train.table
    assert torch.equal(table.scores, true.scores) and torch.equal(table.candidates, true.candidates)
    test = table.split == TEST
    assert torch.equal(table.labels[test], true.labels[test]) and bool(table.shown[test].all())
    log = ~test
    assert (table.shown[log].sum(1) == 5).all()
    assert not (table.labels[log] & ~true.labels[log]).any(), "a click on what is not attractive"
    assert not (table.labels[log] & ~table.shown[log]).any(), "a click on what was not shown"
    worst_shown = table.scores[log].masked_fill(~table.shown[log], 2).amin(1)
    best_hidden = table.scores[log].masked_fill(table.shown[log], -1).amax(1)
    assert (worst_shown >= best_hidden).all()
    optimum, before = (probes(c, d.test, d.catalogue, truth=d.truth) for d, c in ((data, config), (plain, config)))
    assert optimum["bayes_optimal"]["ndcg@6"] == before["bayes_optimal"]["ndcg@6"]


def test_clicks_divided_by_examination_are_attraction_at_every_position():
    for clicks, strength in (("position", 1.2), ("cascade", 0.9)):
        data, _ = world(synthetic_users=4000, synthetic_clicks=clicks, synthetic_click_bias=strength)
        plain, _ = world(synthetic_users=4000, synthetic_clicks="none")
        table, truth = data.train.table, plain.train.table.labels
        for place in range(5):
            here = table.position == place
            corrected = (table.labels[here].double() / table.examination[here]).mean()
            assert corrected.item() == pytest.approx(truth[here].double().mean().item(), rel=0.12)


def test_unknown_propensities_leave_the_table():
    data, _ = world(synthetic_known_propensities=False)
    assert data.train.table.propensity is None and data.train.table.examination is None
    assert data.train.table.weights is None and data.train.table.targets is None
