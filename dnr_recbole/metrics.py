"""Metrics that RecBole lacks, registered under RecBole's own roof: name them in ``metrics`` like any other.

RecBole's list metrics, for a request with ``R`` positive candidates and ``h`` of them in the top ``K``:

================ ======================================================================================
``precision@K``  ``h / K``. The denominator is K even if fewer candidates exist. (The paper calls it H@K.)
``recall@K``     ``h / R``.
``hit@K``        1 if ``h > 0``.
``mrr@K``        1 / rank of the first positive, 0 if it is not in the top K.
``ndcg@K``       sum over hits of 1 / log2(rank + 1), divided by that sum for ``min(R, K)`` hits on top.
``map@K``        sum over hits of precision@rank, divided by ``min(R, K)`` (trec_eval divides by ``R``).
``gauc``         AUC of every request (ties count one half), averaged with weight ``R``; requests whose
                 candidates are all positive have no AUC and are left out.
================ ======================================================================================

With gains (grades, several objectives, clicks weighted by inverse propensities) in the place of 0 and 1:

================ ======================================================================================
``gdcg@K``       sum over the top K of gain / log2(rank + 1): with weighted clicks, an estimate of what it
                 would be had every candidate been seen, and so what to select a model by (`valid_metric`).
``gndcg@K``      the same divided by its value for the best order of these gains; for grades.
================ ======================================================================================

All but gauc are plain means over requests. Conventions that hold for every metric here and for RecBole's:

- Requests without a positive candidate are not part of list metrics: nothing could be ranked right.
- Equal scores: the top K are picked by ``torch.topk``, which breaks ties without a rule. Candidates are
  stored in random order, so equal scores amount to random order. gauc and pooledauc average over ties
  instead.
- Values are fractions, rounded to ``metric_decimal_place``.
"""

from __future__ import annotations

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

import numpy as np
from recbole.evaluator import register
from recbole.evaluator.base_metric import AbstractMetric, TopkMetric
from recbole.utils import EvaluatorType

from dnr_recbole.names import Names

METRICS: Names[type] = Names("metric", "metrics")  # those that did not come with RecBole


def register_metric(cls):
    """Class decorator: make a RecBole metric available to configs by its lower-case class name."""
    name = cls.__name__.lower()
    # Other RecBole modules hold references to these objects: change them in place, never rebind.
    register.metrics_dict[name] = cls
    register.metric_information[name] = cls.metric_need
    register.metric_types[name] = cls.metric_type
    if cls.smaller and name not in register.smaller_metrics:
        register.smaller_metrics.append(name)
    return METRICS.register(name)(cls)


@register_metric
class F1(TopkMetric):
    """F1@K: the harmonic mean of precision@K and recall@K of a request, averaged over requests.

    For ``h`` hits among the top K and ``R`` positives that is ``2 h / (K + R)``.

    It is the mean of F1s, not the F1 of the mean precision and recall. (The paper does not define its F1@6;
    70.71 on ML-1M is what this formula gives for its precision@6 of 64.89 with 5 positives per list.)
    """

    def calculate_metric(self, dataobject):
        pos_index, pos_len = self.used_info(dataobject)
        return self.topk_result("f1", self.metric_info(pos_index, pos_len))

    def metric_info(self, pos_index, pos_len):
        k = np.arange(1, pos_index.shape[1] + 1)
        return 2 * pos_index.cumsum(axis=1) / (k + pos_len.reshape(-1, 1))


class GainMetric(AbstractMetric):
    """Of ``rec.gains`` ``[R, 2, K]``: the gains of the top K, and the K largest gains of the request."""

    metric_type = EvaluatorType.RANKING
    metric_need = ("rec.gains",)

    def __init__(self, config):
        super().__init__(config)
        self.topk = config["topk"]

    def values(self, gains: np.ndarray) -> np.ndarray:
        """Per request and cut-off, ``[R, K]``."""
        raise NotImplementedError

    def calculate_metric(self, dataobject):
        values = self.values(dataobject.get("rec.gains").numpy().astype(np.float64))
        name = type(self).__name__.lower()
        return {f"{name}@{k}": round(float(values[:, k - 1].mean()), self.decimal_place) for k in self.topk}


def _discounted(gains: np.ndarray) -> np.ndarray:
    return (gains / np.log2(np.arange(gains.shape[1]) + 2.0)).cumsum(1)


@register_metric
class GDCG(GainMetric):
    """DCG@K of gains, not divided by that of the best order, so that what a request weighs stays in it."""

    def values(self, gains):
        return _discounted(gains[:, 0])


@register_metric
class GNDCG(GainMetric):
    """NDCG@K of gains. 0/1 labels as gains give NDCG@K."""

    def values(self, gains):
        return _discounted(gains[:, 0]) / np.maximum(_discounted(gains[:, 1]), 1e-12)


class _ShareInTopK(AbstractMetric):
    """The number of distinct items in all top K lists, divided by :meth:`denominator`."""

    metric_type = EvaluatorType.RANKING

    def __init__(self, config):
        super().__init__(config)
        self.topk = config["topk"]

    def denominator(self, dataobject) -> int:
        raise NotImplementedError

    def calculate_metric(self, dataobject):
        items = dataobject.get("rec.items").numpy()  # [R, max K], 0 where a list has no more candidates
        total = max(self.denominator(dataobject), 1)
        name = type(self).__name__.lower()
        return {f"{name}@{k}": round(distinct_items(items[:, :k]) / total, self.decimal_place) for k in self.topk}


def distinct_items(items) -> int:
    """How many different items an array of ids holds; 0 is padding and no item."""
    unique = np.unique(items)
    return int(unique.size - (unique == 0).sum())


@register_metric
class Coverage(_ShareInTopK):
    """Coverage@K: share of the catalogue that appears in the top K of at least one request.

    The denominator is the number of items without RecBole's padding row (``n_items - 1``). RecBole's
    ``itemcoverage`` counts that row as an item, above the line (if some list is shorter than K) and below it.
    """

    metric_need = ("rec.items", "data.num_items")

    def denominator(self, dataobject):
        return dataobject.get("data.num_items") - 1


@register_metric
class CandidateCoverage(_ShareInTopK):
    """CandidateCoverage@K: as Coverage@K, but of the items that are a candidate in at least one request.

    No reranker can show other items, so 1 is reachable here; under Coverage the retriever sets the ceiling.
    """

    metric_need = ("rec.items", "data.candidate_items")

    def denominator(self, dataobject):
        return dataobject.get("data.candidate_items")


@register_metric
class PooledAUC(AbstractMetric):
    """AUC over all (candidate, label) pairs, pooled over requests; ties count one half.

    Unlike gauc it compares candidates of different requests, so scores must be comparable across requests:
    logits are, ranks within a list are not. RecBole's own ``auc`` is this value too, but is a VALUE metric
    and RecBole refuses it beside NDCG; this one is a RANKING metric. NaN if all pairs have the same label.
    """

    metric_type = EvaluatorType.RANKING
    metric_need = ("rec.score", "data.label")

    def calculate_metric(self, dataobject):
        scores = dataobject.get("rec.score").numpy()  # [pairs]
        positive = dataobject.get("data.label").numpy() > 0
        return {"pooledauc": round(pooled_auc(scores[positive], scores[~positive]), self.decimal_place)}


def pooled_auc(positives, negatives) -> float:
    """P(positive > negative) + P(equal) / 2 for two arrays of scores; needs one sorted copy of each."""
    pairs = len(positives) * len(negatives)
    if pairs == 0:
        return float("nan")
    negatives, positives = np.sort(negatives), np.sort(positives)
    below = np.searchsorted(negatives, positives, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(negatives, positives, side="right").sum(dtype=np.int64)
    return (int(below) + int(not_above)) / (2 * pairs)
