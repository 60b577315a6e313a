"""Every metric against values computed by hand and against independent libraries."""

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import AP, RR, P, R, nDCG
from recbole.evaluator.register import metric_types, metrics_dict
from recbole.utils import EvaluatorType
from sklearn.metrics import roc_auc_score

from dnr_recbole.evaluator import CandidateEvaluator
from dnr_recbole.metrics import distinct_items, pooled_auc

LIST_METRICS = ["Precision", "Recall", "Hit", "MRR", "NDCG", "MAP", "F1", "GAUC", "PooledAUC"]


class FakeConfig(dict):
    def __missing__(self, key):
        return None


def make_config(metrics, topk, **extra):
    base = {"eval_args": {"mode": "full"}, "device": torch.device("cpu"), "LABEL_FIELD": "label"}
    return FakeConfig(base, metrics=metrics, topk=topk, metric_decimal_place=10, **extra)


def evaluate(metrics, topk, scores, labels, candidates=None, mask=None, item_counter=None, **extra):
    scores, labels = torch.tensor(scores), torch.tensor(labels)
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else torch.tensor(mask)
    if candidates is None:
        candidates = torch.arange(1, labels.shape[1] + 1).expand(labels.shape)
    evaluator = CandidateEvaluator(make_config(metrics, topk, **extra), 11, item_counter)
    evaluator.add(scores, torch.as_tensor(candidates), mask, labels)
    return evaluator.result()


def random_requests(seed, requests=60, n=12, padding=True):
    generator = np.random.default_rng(seed)
    scores = generator.permuted(np.tile(np.arange(n, dtype=np.float32), (requests, 1)), axis=1)  # no ties
    mask = generator.random((requests, n)) > (0.3 if padding else -1)
    mask[:, :2] = True
    labels = (generator.random((requests, n)) < 0.3) & mask
    labels[:, 0], labels[:, 1] = True, False  # so that every AUC exists
    return scores, labels.astype(int), mask


def test_by_hand():
    # ranking of request 1: + - + - (positions 3 0 1 2); of request 2: - - - + ; K = 3
    scores = [[0.5, 0.4, 0.1, 0.9], [4.0, 3.0, 2.0, 1.0]]
    labels = [[0, 1, 0, 1], [0, 0, 0, 1]]
    result = evaluate(LIST_METRICS, [1, 3], scores, labels)
    ndcg = (1 + 1 / 2) / (1 + 1 / np.log2(3))
    expected = {
        "precision@1": 0.5,
        "precision@3": (2 / 3 + 0) / 2,
        "recall@1": (1 / 2 + 0) / 2,
        "recall@3": 0.5,
        "hit@1": 0.5,
        "hit@3": 0.5,
        "mrr@3": 0.5,
        "ndcg@1": 0.5,
        "ndcg@3": ndcg / 2,
        "map@1": 0.5,
        "map@3": (1 + 2 / 3) / 2 / 2,
        "f1@1": (2 * 1 / (1 + 2)) / 2,
        "f1@3": (2 * 2 / (3 + 2)) / 2,
        "gauc": (2 * 3 / 4 + 1 * 0) / 3,  # AUC 3/4 with two positives, 0 with one
        "pooledauc": (2 + 1 + 2) / (3 * 5),  # 0.9, 0.4 and 1.0 against 0.5, 0.1, 4, 3 and 2
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-6), name


def test_f1_is_the_harmonic_mean_of_precision_and_recall_per_request():
    scores, labels, mask = random_requests(3)
    evaluator = CandidateEvaluator(make_config(["F1"], [6]))
    evaluator.add(torch.tensor(scores), torch.tensor(mask).long(), torch.tensor(mask), torch.tensor(labels))
    p, r = evaluator.per_request("precision@6"), evaluator.per_request("recall@6")
    with np.errstate(invalid="ignore"):
        harmonic = np.nan_to_num(2 * p * r / (p + r))
    assert np.allclose(evaluator.per_request("f1@6"), harmonic)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padding", [False, True])
def test_against_trec_eval(seed, padding):
    scores, labels, mask = random_requests(seed, padding=padding)
    qrels, run = (
        {str(q): {str(d): value for d, value in enumerate(row) if mask[q, d]} for q, row in enumerate(table)}
        for table in (labels.tolist(), scores.tolist())
    )
    ours = evaluate(LIST_METRICS, [3, 6, 12], scores, labels, mask=mask)
    theirs = ir_measures.calc_aggregate([nDCG @ 3, nDCG @ 6, P @ 6, R @ 6, R @ 3, AP, RR @ 6], qrels, run)
    names = {"nDCG": "ndcg", "P": "precision", "R": "recall", "RR": "mrr"}
    for measure, value in theirs.items():
        name, _, k = str(measure).partition("@")
        ours_name = "map@12" if name == "AP" else f"{names[name]}@{k}"  # cut nowhere, both divide by R
        assert ours[ours_name] == pytest.approx(value, abs=1e-6), measure


@pytest.mark.parametrize("ties", [False, True])
def test_auc_against_sklearn(ties):
    scores, labels, mask = random_requests(5)
    noise = np.random.default_rng(0).random(scores.shape, np.float32) / 2
    scores = np.floor(scores / 3) if ties else scores + noise
    result = evaluate(["GAUC", "PooledAUC", "NDCG"], [6], scores, labels, mask=mask)
    each = [roc_auc_score(z[m], x[m]) for z, x, m in zip(labels, scores, mask)]
    assert result["gauc"] == pytest.approx(np.average(each, weights=labels.sum(axis=1)), abs=1e-6)
    assert result["pooledauc"] == pytest.approx(roc_auc_score(labels[mask], scores[mask]), abs=1e-9)


def test_gauc_on_dense_lists_uses_the_whole_list():
    # Without padding, RecBole alone takes the position of the lowest score for the length of the list.
    assert evaluate(["GAUC"], [1], [[0.1, 0.9, 0.5]], [[0, 1, 1]])["gauc"] == 1.0
    assert evaluate(["GAUC"], [1], [[0.9, 0.1, 0.5]], [[0, 1, 0]])["gauc"] == 0.0


def test_recboles_value_auc_equals_pooled_auc():
    scores, labels, mask = random_requests(7)
    theirs, ours = (evaluate([name], [6], scores, labels, mask=mask) for name in ("AUC", "PooledAUC"))
    assert theirs["auc"] == pytest.approx(ours["pooledauc"], abs=1e-9)


def test_pooled_auc_ties_and_degenerate_sets():
    assert pooled_auc(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == 0.75
    assert np.isnan(pooled_auc(np.array([1.0]), np.array([])))


def test_coverage():
    candidates = [[1, 2, 3], [4, 2, 0], [9, 8, 7]]
    scores = [[3.0, 2.0, 1.0], [1.0, 2.0, 0.0], [1.0, 2.0, 3.0]]
    mask = [[True] * 3, [True, True, False], [True] * 3]
    labels = [[1, 0, 0], [0, 1, 0], [0, 0, 0]]  # the last request has no positive and is left out
    metrics = ["Coverage", "CandidateCoverage"]
    result = evaluate(metrics, [1, 2, 3], scores, labels, candidates, mask)
    assert [result[f"coverage@{k}"] for k in (1, 2, 3)] == [2 / 10, 3 / 10, 4 / 10]
    assert [result[f"candidatecoverage@{k}"] for k in (1, 2, 3)] == [2 / 4, 3 / 4, 1.0]
    assert distinct_items(np.array([0, 3, 3])) == 1


def test_recboles_item_metrics_see_item_ids():
    candidates = [[5, 6, 7], [5, 8, 9]]
    counter = {5: 10, 6: 1, 7: 4, 8: 2, 9: 100}
    metrics = ["ItemCoverage", "GiniIndex", "AveragePopularity", "TailPercentage", "ShannonEntropy"]
    arguments = (metrics, [1, 2], [[3.0, 2.0, 1.0]] * 2, [[1, 0, 0]] * 2, candidates)
    result = evaluate(*arguments, item_counter=counter, tail_ratio=2)
    assert result["itemcoverage@2"] == pytest.approx(3 / 11)
    assert result["averagepopularity@1"] == 10
    assert result["averagepopularity@2"] == (5.5 + 6) / 2
    assert result["tailpercentage@2"] == 0.5
    assert result["shannonentropy@1"] == 0
    assert 0 < result["giniindex@2"] < 1
    as_tensor = torch.zeros(11, dtype=torch.long)
    for item, count in counter.items():
        as_tensor[item] = count
    assert evaluate(*arguments, item_counter=as_tensor, tail_ratio=2) == result


def test_registration_lets_pooled_auc_stand_beside_ndcg():
    for name in ("f1", "coverage", "candidatecoverage", "pooledauc"):
        assert name in metrics_dict
        assert metric_types[name] == EvaluatorType.RANKING
