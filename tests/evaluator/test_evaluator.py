"""CandidateEvaluator: populations, end-to-end metrics, sharding, invariance, refusals, speed."""

import time

import numpy as np
import pytest
import torch

from dnr_recbole.errors import ConfigError, DataError, UnknownNameError
from dnr_recbole.evaluator import CandidateEvaluator

ALL = ["NDCG", "Recall", "MAP", "F1", "GAUC", "PooledAUC", "Coverage", "CandidateCoverage", "GiniIndex"]


class FakeConfig(dict):
    def __missing__(self, key):
        return None


def make_evaluator(metrics=ALL, topk=(1, 6), n_items=200, places=12, item_counter=None):
    base = {"eval_args": {"mode": "full"}, "device": torch.device("cpu"), "LABEL_FIELD": "label"}
    config = FakeConfig(base, metrics=list(metrics), topk=list(topk), metric_decimal_place=places)
    return CandidateEvaluator(config, n_items, item_counter)


def random_requests(requests=101, n=20, seed=0):
    """(scores, candidates, mask, labels, n_positives); some requests have no positive, some missed ones."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(requests, n, generator=g)
    mask = torch.rand(requests, n, generator=g) > 0.2
    mask[:, 0] = True
    candidates = torch.randint(1, 200, (requests, n), generator=g) * mask
    labels = ((torch.rand(requests, n, generator=g) < 0.1) & mask).float()
    missed = torch.randint(0, 3, (requests,), generator=g)
    return scores, candidates, mask, labels, labels.sum(dim=1).long() + missed


def filled(parts, rows=None, **options):
    evaluator = make_evaluator(**options)
    evaluator.add(*parts, rows=rows)
    return evaluator


def test_end_to_end_counts_what_was_not_retrieved():
    evaluator = make_evaluator(["Recall", "NDCG", "Precision"], topk=[2])
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 0, 0], [0, 0, 0]])
    candidates = torch.ones_like(labels).long()
    # request 1 lacks one positive, 3 both of its two; request 4 has none at all and counts nowhere
    evaluator.add(scores, candidates, candidates > 0, labels, torch.tensor([2, 1, 2, 0]))
    result = evaluator.result()
    assert result["recall@2"] == 0.5 and result["ndcg@2"] == 0.5 and result["precision@2"] == 0.25
    assert result["e2e_recall@2"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert result["e2e_ndcg@2"] == pytest.approx(1 / (1 + 1 / np.log2(3)) / 3)
    assert result["e2e_hit@2"] == pytest.approx(1 / 3)
    assert result["e2e_precision@2"] == pytest.approx((1 / 2) / 3)
    assert list(result)[:3] == ["recall@2", "ndcg@2", "precision@2"]
    assert evaluator.per_request("e2e_recall@2").tolist() == [0.5, 0, 0]
    assert evaluator.per_request("recall@2").tolist() == [1, 0]


def test_no_end_to_end_metrics_if_everything_was_retrieved():
    parts = random_requests()
    for evaluator in (filled(parts[:4]), filled((*parts[:4], parts[3].sum(dim=1).long()))):
        assert not any(name.startswith("e2e_") for name in evaluator.result())


@pytest.mark.parametrize("world", [2, 3])
def test_merging_shards_equals_one_process(world):
    parts = random_requests()
    rows = torch.arange(len(parts[0]))
    expected = filled(parts, rows)
    shards = []
    for rank in range(world):
        # ranks take every world-th request and are filled up with repetitions, as distributed samplers do
        mine = torch.cat((rows[rank::world], rows[:rank]))
        evaluator = make_evaluator()
        for batch in mine.split(7):
            evaluator.add(*(part[batch] for part in parts), rows=batch)
        shards.append(evaluator.state())
    merged = make_evaluator().merge(shards)
    assert merged.result() == expected.result()
    for metric in ("ndcg@6", "gauc", "e2e_recall@1"):
        assert np.array_equal(merged.per_request(metric), expected.per_request(metric), equal_nan=True)
        assert np.array_equal(merged.request_rows(metric), expected.request_rows(metric))


def test_merging_contiguous_shards_without_rows():
    parts = random_requests()
    shards = [filled([part[cut] for part in parts]).state() for cut in (slice(0, 40), slice(40, None))]
    assert make_evaluator().merge(shards).result() == filled(parts).result()


def test_merge_replaces_what_was_added():
    parts = random_requests()
    evaluator = filled(parts)
    before = evaluator.result()
    assert evaluator.merge([evaluator.state()]).result() == before


def test_ranks_and_batches_without_requests():
    parts = random_requests()
    idle, empty = make_evaluator(), filled([part[:0] for part in parts], torch.arange(0))
    full = filled(parts, torch.arange(101))
    assert make_evaluator().merge([idle.state(), full.state(), empty.state()]).result() == full.result()


def test_batches_of_different_width():
    scores, candidates, mask, labels, positives = random_requests()
    mask[:50, 12:] = False
    labels, candidates, positives = labels * mask, candidates * mask, positives + 20
    evaluator = make_evaluator()
    evaluator.add(*(p[:50, :12] for p in (scores, candidates, mask, labels)), positives[:50])
    evaluator.add(*(p[50:] for p in (scores, candidates, mask, labels, positives)))
    assert evaluator.result() == filled((scores, candidates, mask, labels, positives)).result()


def test_order_of_candidates_does_not_matter():
    scores, candidates, mask, labels, positives = random_requests()
    order = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    shuffled = [part.gather(1, order) for part in (scores, candidates, mask, labels)]
    expected = filled((scores, candidates, mask, labels, positives)).result()
    assert filled((*shuffled, positives)).result() == expected


def test_padding_is_ignored_whatever_it_holds():
    scores, candidates, mask, labels, positives = random_requests()
    expected = filled((scores, candidates, mask, labels, positives)).result()
    garbage = zip((scores, candidates, labels), (float("nan"), 199, 1))
    scores, candidates, labels = (part.masked_fill(~mask, value) for part, value in garbage)
    assert filled((scores, candidates, mask, labels, positives)).result() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_types(dtype):
    scores, *rest = random_requests()
    scores = torch.arange(20).float().expand(scores.shape)  # exact in every type
    assert filled((scores.to(dtype), *rest)).result() == filled((scores, *rest)).result()


def test_topk_beyond_the_candidates_counts_misses():
    evaluator = make_evaluator(["Precision", "Recall", "Coverage"], topk=[4], n_items=4)
    evaluator.add(*(torch.tensor(x) for x in ([[2.0, 1.0]], [[1, 2]], [[True, True]], [[1.0, 0.0]])))
    assert evaluator.result() == {"precision@4": 0.25, "recall@4": 1.0, "coverage@4": pytest.approx(2 / 3)}


def test_per_request_values_average_to_the_result():
    evaluator = filled(random_requests(), torch.arange(101).flip(0), item_counter={1: 5})
    result = evaluator.result()
    for metric in ("ndcg@6", "map@6", "f1@1", "e2e_ndcg@6", "e2e_recall@1"):
        assert evaluator.per_request(metric).mean() == pytest.approx(result[metric], abs=1e-9)
        assert len(evaluator.request_rows(metric)) == len(evaluator.per_request(metric))
    assert (np.diff(evaluator.request_rows("ndcg@6")) > 0).all()
    positives = random_requests()[3].sum(dim=1).flip(0).numpy()
    gauc = evaluator.per_request("gauc")
    assert np.average(gauc, weights=positives[positives > 0]) == pytest.approx(result["gauc"], abs=1e-6)


@pytest.mark.parametrize(
    "metric", ["pooledauc", "coverage@6", "ndcg@7", "ndcg", "nonsense@1", "ndcg@x", "e2e_coverage@6"]
)
def test_metrics_without_per_request_values_are_refused(metric):
    with pytest.raises(UnknownNameError, match="no per-request values"):
        filled(random_requests()).per_request(metric)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(value):
    parts = random_requests()
    parts[0][3, 0] = value
    with pytest.raises(DataError, match="request 3 of the batch, candidate 0"):
        filled(parts)


def test_other_refusals():
    parts = random_requests()
    with pytest.raises(DataError, match="no request was added"):
        make_evaluator().result()
    with pytest.raises(DataError, match="no request has a positive"):
        filled((*parts[:3], torch.zeros_like(parts[3]), parts[4])).result()
    with pytest.raises(DataError, match="n_positives is smaller"):
        filled((*parts[:4], torch.zeros(101).long()))
    with pytest.raises(ConfigError, match="item_counter"):
        make_evaluator(["AveragePopularity"])
    with pytest.raises(ConfigError, match="n_items"):
        make_evaluator(["Coverage"], n_items=None)
    mixed = filled(parts)
    mixed.add(*parts, rows=torch.arange(101))
    with pytest.raises(DataError, match="always or never"):
        mixed.result()


def test_reset_forgets():
    evaluator = filled(random_requests(seed=1))
    evaluator.reset()
    evaluator.add(*random_requests(seed=2))
    assert evaluator.result() == filled(random_requests(seed=2)).result()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_on_a_gpu():
    parts = random_requests()
    on_gpu = filled([part.cuda() for part in parts]).result()
    assert on_gpu == pytest.approx(filled(parts).result())


def test_speed():
    parts = random_requests(requests=6000, n=50)
    start = time.perf_counter()
    evaluator = make_evaluator()
    for batch in torch.arange(6000).split(100):
        evaluator.add(*(part[batch] for part in parts))
    evaluator.result()
    assert time.perf_counter() - start < 5  # about 0.2 s; room for busy machines, none for quadratic work
