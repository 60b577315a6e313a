"""DNR in a world whose truth is known (dnr_recbole/data/synthetic.py)."""

from __future__ import annotations

import pytest
import torch

from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.synthetic import synthetic_rerank_data
from dnr_recbole.dnr.noise import HeuristicNoise
from dnr_recbole.dnr.objectives import wasserstein
from dnr_recbole.evaluator import CandidateEvaluator, probes
from dnr_recbole.registry import get_reranker
from dnr_recbole.trainer.steps import as_step, take_step

BASE = dict(
    dataset="synthetic", synthetic_users=400, synthetic_items=150, synthetic_requests_per_user=12, n_candidates=20,
    synthetic_factors=True, synthetic_factor_noise=0.0, synthetic_dim=2, embedding_size=32, dropout=0.0,
    history_length=10, metrics=["NDCG"], topk=[6], valid_metric="NDCG@6", use_gpu=False, score_fusion="concat", seed=3,
    lambda_e=4, lz_fraction=1.0,
)  # fmt: skip


def train(model: str, epochs: int, **overrides):
    """→ trained model, its data, and its NDCG@6 on test."""
    config = Config(model, config_dict={**BASE, **overrides})
    data = synthetic_rerank_data(config)
    torch.manual_seed(0)
    reranker = get_reranker(model)(config, data.catalogue)
    groups = reranker.parameter_groups()
    optimizers = {name: torch.optim.Adam(parameters, lr=3e-3) for name, parameters in groups.items()}
    loader = SlateLoader(data.train, 256, shuffle=True, seed=0)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        reranker.train().set_epoch(epoch)
        for slate in loader:
            for step in map(as_step, reranker.training_steps(slate)):
                take_step(step, groups, optimizers)
    return reranker.eval(), data, config, ndcg(reranker, data, config)


@torch.no_grad()
def ndcg(reranker, data, config, scores=None) -> float:
    evaluator = CandidateEvaluator(config, data.catalogue.n_items)
    slate = data.test.slate(torch.arange(len(data.test)))
    slate = slate if scores is None else slate.with_scores(scores)
    evaluator.add(reranker.predict(slate), slate.candidates, slate.mask, slate.labels)
    return evaluator.result()["ndcg@6"]


def test_a_reranker_approaches_the_optimum_and_beats_either_half_of_the_evidence():
    _, data, config, reached = train("DNR", 20)
    truth = data.truth.expected_metrics(data.test, k=6)
    optimum, scores, content = (truth[name]["ndcg"] for name in ("optimal", "scores", "content"))
    assert reached <= optimum + 0.03, "better than the optimum: the labels leak"
    assert reached > max(scores, content)
    assert reached > 0.92 * optimum
    assert reached > max(result["ndcg@6"] for result in probes(config, data.test, data.catalogue).values())


def test_the_learned_generator_is_closer_to_the_true_noise_than_gaussian_and_beta():
    """Figure 5 of the paper, in Wasserstein distance to x given z, averaged over z."""
    reranker, data, *_ = train("DNR", 12, lambda_e=2)
    slate = data.test.slate(torch.arange(len(data.test)))
    torch.manual_seed(1)
    with torch.no_grad():
        reranker.set_epoch(99)
        candidates = {
            "learned": reranker.synthesise(reranker.encode(slate), slate),
            "gaussian": HeuristicNoise("gaussian", 0.6)(slate.labels),
            "beta": HeuristicNoise("beta", 0.6)(slate.labels),
        }
    distance = {
        name: sum(float(wasserstein(x[slate.labels == z], slate.scores[slate.labels == z])) for z in (0, 1)) / 2
        for name, x in candidates.items()
    }
    assert distance["learned"] < 0.5 * min(distance["gaussian"], distance["beta"]), distance


def test_pure_noise_is_ignored():
    reranker, data, config, reached = train("DNR", 15, synthetic_noise=1.0)
    torch.manual_seed(2)
    shuffled = data.test.slate(torch.arange(len(data.test))).scores
    shuffled = shuffled[torch.randperm(len(shuffled))]
    assert ndcg(reranker, data, config, shuffled) == pytest.approx(reached, abs=0.04)
    content = data.truth.expected_metrics(data.test, k=6)["content"]["ndcg"]
    assert reached > 0.9 * content


def test_perfect_scores_are_copied():
    *_, reached = train("DNR", 10, synthetic_noise=0.0)
    assert reached > 0.99
