"""Accumulates scored requests and reports list metrics, end-to-end metrics and per-request values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from recbole.evaluator import Evaluator
from recbole.evaluator.base_metric import TopkMetric
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import metrics_dict
from torch import Tensor

from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import DataError, UnknownNameError
from dnr_recbole.evaluator.collector import CandidateCollector
from dnr_recbole.metrics import GainMetric

E2E = "e2e_"
SHOWN = "shown_"
E2E_METRICS = ("recall", "ndcg", "hit", "precision")


class CandidateEvaluator:
    """RecBole's metrics over candidate lists.

    Two populations of requests are reported, and they answer different questions:

    - *list metrics* (``ndcg@6`` …): how well are the candidates ordered? Over the requests with a positive
      among their candidates; positives that the retriever missed do not count.
    - *end-to-end metrics* (``e2e_ndcg@6`` …): how good is the whole system? Over the requests with any
      positive; positives that the retriever missed stay in the denominators of recall and NDCG. Only
      reported if some positive was missed.

    Where a log says which candidates were shown, a third population follows, ``shown_ndcg@6`` …: the same ranking of
    the shown ones alone, since the labels of the others are not known.

    Collected rows live on the CPU, whatever the device of the scores.

    Args:
        config: RecBole's keys metrics, topk, metric_decimal_place, device, eval_args, LABEL_FIELD.
        n_items: catalogue size including the padding row.
        item_counter: interactions per item in training data (mapping or tensor ``[n_items]``), for
            popularity metrics.
    """

    def __init__(self, config, n_items: int | None = None, item_counter=None):
        self.config = config
        self.collector = CandidateCollector(config, n_items, item_counter)
        self.evaluator = Evaluator(config)
        self._arguments = config, n_items, item_counter
        self.shown: CandidateEvaluator | None = None

    def add(self, scores, candidates, mask, labels, n_positives=None, rows=None, shown=None, gains=None):
        """Add a batch, as in :meth:`CandidateCollector.collect`; n may differ between batches.

        ``shown``: BoolTensor ``[B, n]``, which candidates the user saw; None = nothing is said of that.
        """
        self.collector.collect(scores, candidates, mask, labels, n_positives, rows, gains)
        if shown is not None:
            self.shown = self.shown or CandidateEvaluator(*self._arguments)
            self.shown.add(scores, candidates, mask & shown, labels, rows=rows, gains=gains)

    def add_slate(self, scores, slate: Slate, n_positives=None, rows=None):
        """Add a batch of requests under ``scores`` ``[B, n]``."""
        self.add(scores, slate.candidates, slate.mask, slate.labels, n_positives, rows, slate.shown, slate.gains)

    def reset(self):
        """Forget all requests."""
        self.collector.reset()
        self.shown = None

    def state(self) -> dict[str, Tensor]:
        """Everything added so far as CPU tensors, to be gathered from other processes."""
        inner = {} if self.shown is None else {SHOWN + name: value for name, value in self.shown.state().items()}
        return {**self.collector.state(), **inner}

    def merge(self, states: Iterable[dict[str, Tensor]]) -> CandidateEvaluator:
        """Replace all requests by those of ``states``, the :meth:`state` of all ranks, this one included."""
        states = list(states)
        inner = [{k[len(SHOWN) :]: v for k, v in state.items() if k.startswith(SHOWN)} for state in states]
        self.collector.load([{k: v for k, v in state.items() if not k.startswith(SHOWN)} for state in states])
        if any(inner):
            self.shown = CandidateEvaluator(*self._arguments).merge([state for state in inner if state])
        return self

    def result(self) -> OrderedDict:
        """All metrics: ``metrics`` of the config in its order, then the end-to-end ones."""
        result = self.evaluator.evaluate(self._struct())
        for name in E2E_METRICS if self._misses_positives() else ():
            values, place = self._topk_values(E2E + name), self.config["metric_decimal_place"]
            assert values is not None  # each of them is a metric of the top k
            for k in self.config["topk"]:
                result[f"{E2E}{name}@{k}"] = round(values[:, k - 1].mean(), place)
        if self.shown is not None:
            result.update((SHOWN + name, value) for name, value in self.shown.result().items())
        return result

    def per_request(self, metric: str) -> np.ndarray:
        """Values of one metric such as ``ndcg@6``, ``gauc`` or ``e2e_recall@6`` per request.

        They cover the requests of the metric's population; their means are the reported numbers; only gauc
        weighs requests by their positives, and is NaN where all candidates are positive. Metrics over all
        requests at once (pooledauc, coverage) have no such values.
        """
        name, _, k = metric.lower().partition("@")
        if name == "gauc" and "gauc" in self.evaluator.metrics:
            return _auc_per_request(self._struct())
        max_k = max(self.config["topk"])
        in_range = k.isdigit() and 1 <= int(k) <= max_k
        if in_range and name in self.evaluator.metrics and issubclass(metrics_dict[name], GainMetric):
            gains = self._struct().get("rec.gains").numpy().astype(np.float64)
            return metrics_dict[name](self.config).values(gains)[:, int(k) - 1]
        values = self._topk_values(name) if in_range else None
        if values is None:
            raise UnknownNameError(
                f"no per-request values for {metric!r}: use a top-K metric with K up to {max_k} as in "
                f"'ndcg@{max_k}' or 'e2e_ndcg@{max_k}', or 'gauc' if `metrics` has it"
            )
        return values[:, int(k) - 1]

    def request_rows(self, metric: str) -> np.ndarray:
        """The ``rows`` that :meth:`per_request` reports, in its order; -1 if ``add`` was given none."""
        return self._struct(metric.lower().startswith(E2E)).get("request.row").numpy()

    def _struct(self, end_to_end: bool = False) -> DataStruct:
        if "rec.topk" not in self.collector.data_struct:
            raise DataError("nothing to evaluate: no request was added")
        struct = self.collector.get_data_struct(end_to_end)
        if len(struct.get("rec.topk")) == 0:
            raise DataError(
                "no request has a positive among its candidates, so nothing can be evaluated: "
                "raise n_candidates or label_window, or check the labels"
            )
        return struct

    def _misses_positives(self) -> bool:
        requests = self.collector.requests()
        return bool((requests["request.positives"] > requests["rec.topk"][:, -1]).any())

    def _topk_values(self, name: str) -> np.ndarray | None:
        """``[R, max K]`` values of a top-K metric, taken where RecBole's metric is about to average them."""
        end_to_end = name.startswith(E2E)
        cls = metrics_dict.get(name[len(E2E) :] if end_to_end else name)
        if cls is None or not hasattr(cls, "topk_result") or (end_to_end and not issubclass(cls, TopkMetric)):
            return None
        if not all(self.collector.register.need(need) for need in cls.metric_need):
            return None
        seen: list[np.ndarray] = []

        def catch(_: str, values: np.ndarray) -> dict:
            seen.append(values)
            return {}

        metric = cls(self.config)
        metric.topk_result = catch
        metric.calculate_metric(self._struct(end_to_end))
        return seen[0].astype(float)


def _auc_per_request(struct: DataStruct) -> np.ndarray:
    """AUC of every request from the mean ranks that RecBole's GAUC uses."""
    ranks, total, positives = struct.get("rec.meanrank").double().numpy().T
    negatives = total - positives
    pairs = positives * (total + 1) - positives * (positives + 1) / 2 - ranks
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(negatives > 0, pairs / (positives * negatives), np.nan)
