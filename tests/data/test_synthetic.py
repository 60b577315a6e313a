"""The generated world: its truth is the truth, and the noise key spans from perfect to useless scores."""

import pytest
import torch

from dnr_recbole.config import Config
from dnr_recbole.data.dataset import RerankDataset
from dnr_recbole.data.synthetic import ranking_quality, synthetic_rerank_data
from dnr_recbole.errors import ConfigError, DataError


def world(**changes):
    settings = {
        "synthetic_users": 300,
        "synthetic_items": 200,
        "synthetic_requests_per_user": 4,
        "synthetic_dim": 4,
        "n_candidates": 20,
        "state": "ERROR",
        **changes,
    }
    return synthetic_rerank_data(Config(model="PRM", dataset="synthetic", config_dict=settings))


@pytest.fixture(scope="module")
def data():
    return world(synthetic_noise=0.7)


def test_shape_of_the_world(data):
    assert [len(data[name]) for name in ("valid", "test")] == [300, 300]
    slate = data.test.slate(slice(None))
    ordered = slate.candidates.sort(1).values
    assert (ordered.diff(dim=1) > 0).all() and ordered.min() == 1 and ordered.max() == 200
    assert slate.scores.min() >= 0 and slate.scores.max() <= 1
    assert slate.history_mask.any(1).float().mean() > 0.9
    assert torch.equal(data.test.n_positives, slate.labels.sum(1).long())


def test_world_is_seeded(data):
    same, other = world(synthetic_noise=0.7), world(synthetic_noise=0.7, seed=1)
    for name in ("candidates", "scores", "labels", "history_items"):
        assert torch.equal(getattr(data.truth.raw, name), getattr(same.truth.raw, name))
    assert not torch.equal(data.truth.raw.candidates, other.truth.raw.candidates)


@pytest.mark.parametrize("ranking", ["optimal", "scores", "content"])
def test_probabilities_are_calibrated(ranking):
    """Among candidates of posterior p, a share p is positive: Bayes' rule, against the drawn labels."""
    truth = world(synthetic_noise=0.7, synthetic_users=4000).truth
    everything = RerankDataset(truth.raw, torch.arange(len(truth.raw)))
    p = truth.probabilities(everything, ranking).flatten()
    labels = truth.raw.labels.flatten().float()
    order = p.argsort()
    for group in order.chunk(20):
        expected, spread = p[group].mean(), (p[group] * (1 - p[group])).mean().sqrt()
        assert abs(labels[group].mean() - expected) < 5 * spread / len(group) ** 0.5


def test_density_is_that_of_the_scores(data):
    slate, grid = data.truth.raw.slate(torch.arange(len(data.truth.raw))), torch.linspace(0, 1, 2001)
    middle = (grid[1:] + grid[:-1]) / 2
    for z in (0, 1):
        density = data.truth.density(middle, z)
        assert density.mean() == pytest.approx(1.0, abs=0.01)
        x = slate.scores[slate.labels == z]
        assert x.mean() == pytest.approx(float((density * middle).mean()), abs=0.02)


@pytest.mark.parametrize("split", ["last", "user"])
def test_expected_metrics_match_the_sample(split):
    data = world(synthetic_users=2000, synthetic_noise=0.7, split=split)
    labels = data.test.slate(slice(None)).labels
    for ranking, expected in data.truth.expected_metrics(data.test).items():
        ndcg, auc = ranking_quality(data.truth.probabilities(data.test, ranking), labels, 6)
        assert ndcg == pytest.approx(expected["ndcg"], abs=0.04) and auc == pytest.approx(expected["auc"], abs=0.03)


def test_knowing_more_is_better(data):
    quality = data.truth.expected_metrics(data.test)
    for metric in ("ndcg", "auc"):
        assert quality["optimal"][metric] > max(quality["scores"][metric], quality["content"][metric]) + 0.01


def test_noise_from_perfect_to_useless():
    perfect, useless = world(synthetic_noise=0.0), world(synthetic_noise=1.0)
    slate = perfect.test.slate(slice(None))
    assert torch.equal(slate.scores, slate.labels)
    assert perfect.truth.expected_metrics(perfect.test)["scores"] == {"ndcg": 1.0, "auc": 1.0}
    with pytest.raises(ValueError, match="no density"):
        perfect.truth.density(torch.rand(3), 1)
    quality = useless.truth.expected_metrics(useless.test)
    assert quality["scores"]["auc"] == pytest.approx(0.5) and quality["optimal"] == quality["content"]


def test_truth_is_about_raw_scores():
    plain, ranked = world(synthetic_noise=0.7), world(synthetic_noise=0.7, score_normalization="rank")
    assert not torch.equal(plain.test.table.scores, ranked.test.table.scores)
    assert torch.equal(plain.truth.probabilities(plain.test), ranked.truth.probabilities(ranked.test))


def test_factors_only_on_request(data):
    assert data.catalogue.item_factors is None
    known = world(synthetic_factors=True, synthetic_factor_noise=0.0).catalogue
    truth = world().truth
    scale = known.item_factors[1:] / truth.item_factors[1:]
    assert torch.allclose(scale, scale[0, 0].expand_as(scale), rtol=1e-3)
    assert not known.user_factors[0].any()


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"n_candidates": 300}, DataError, "synthetic_items 200"),
        ({"synthetic_positive_scores": [1, 0]}, ConfigError, "two positive numbers"),
        ({"synthetic_positive_scores": [2, 1], "synthetic_noise": 0.0}, ConfigError, "both or none"),
    ],
)
def test_impossible_worlds(changes, error, words):
    with pytest.raises(error, match=words):
        world(**changes)
