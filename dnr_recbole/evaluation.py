"""A trained model on a log with labels: metrics beside the incoming order, two models beside each other, slices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Optional

import numpy as np
import torch

from dnr_recbole.artefact import Artefact
from dnr_recbole.config import Config
from dnr_recbole.data.slate import first_score
from dnr_recbole.evaluator import CandidateEvaluator
from dnr_recbole.evaluator.significance import PairedTest, over_users
from dnr_recbole.log.problems import Problems
from dnr_recbole.log.request_log import RequestLog
from dnr_recbole.ranking import predict, requests_of, together

INCOMING = "incoming order"
_SHORT = 5  # items of a short history


@dataclass
class Evaluation:
    """Attributes:
    metrics: name of the ranking → metric → value: the model, perhaps the other one, and the incoming order.
    tests: paired tests over users of the first ranking against each other one, on the metric ``metric``.
    slices: name of a group of requests → its size and each ranking's mean of ``metric``.
    requests: how many requests, and how many have a positive.
    """

    metrics: Dict[str, Dict[str, float]]
    tests: Dict[str, PairedTest] = field(default_factory=dict)
    slices: Dict[str, Dict[str, float]] = field(default_factory=dict)
    metric: str = ""
    requests: Dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        first, *others = self.metrics
        shown = [m for m in self.metrics[first] if not m.endswith("@1")]
        rows = [["ranking", *shown]]
        rows += [
            [name, *(f"{values[m]:.4f}" if m in values else "-" for m in shown)]
            for name, values in self.metrics.items()
        ]
        lines = _aligned(rows)
        for name, test in self.tests.items():
            verdict = "no difference seen" if not test.significant() else "better" if test.difference > 0 else "worse"
            lines.append(
                f"{first} − {name}, {self.metric}: {test.difference:+.4f} [{test.low:+.4f}, {test.high:+.4f}], "
                f"p {test.p_value:.3g} over {test.n:,} users: {verdict}"
            )
        if self.slices:
            names = list(self.metrics)
            lines += ["", *_aligned([[self.metric, "requests", *names]] + [
                [name, f"{int(each['requests']):,}", *(f"{each[n]:.4f}" for n in names)] for name, each in self.slices.items()
            ])]  # fmt: skip
        return "\n".join(lines)


def evaluate_log(artefact: Artefact, log: RequestLog, other: Optional[Artefact] = None) -> Evaluation:
    """Metrics of one or two models on a log.

    Raises:
        DataError: the log has problems, or no request has a positive.
    """
    config = _metrics_config(artefact)
    models = {_name(artefact, "A" if other else ""): artefact}
    if other is not None:
        models[_name(other, "B")] = other
    n_items = max(len(each.preprocessor.items) for each in models.values())
    evaluators = {name: CandidateEvaluator(config, n_items, torch.ones(n_items)) for name in (*models, INCOMING)}
    problems, source, before = Problems(), together(log.requests), 0
    users: List[np.ndarray] = []
    groups: Dict[str, List[np.ndarray]] = {name: [] for name in ("unknown user", "unknown item", "short history")}
    for found in requests_of(artefact, source, True, problems):
        problems.raise_fatal(log.name)
        ranked = {name: each.preprocessor.arrays(found) for name, each in models.items()}
        first = ranked[next(iter(models))]
        some = np.flatnonzero(first["mask"].any(1))
        if not len(some):
            continue
        rows = torch.arange(before, before + len(some))
        before += len(some)
        for name, each in models.items():
            arrays = ranked[name]
            slate = each.preprocessor.slate(found, arrays).select(torch.from_numpy(some))
            shown = None if arrays["shown"].all() else torch.from_numpy(arrays["shown"][some])
            labels, positives = (torch.from_numpy(arrays[key][some]) for key in ("labels", "n_positives"))
            scores = torch.from_numpy(predict(each, slate))
            evaluators[name].add(scores, slate.candidates, slate.mask, labels, positives, rows, shown)
            if arrays is first:
                own = first_score(slate.scores)
                evaluators[INCOMING].add(own, slate.candidates, slate.mask, labels, positives, rows, shown)
                texts = found.user.texts()[some]
                users.append(
                    np.array([t if t is not None else f"\0{i}" for i, t in enumerate(texts, before)], dtype=object)
                )
                groups["unknown user"].append(slate.users.numpy() >= each.preprocessor.users.unknown)
                unknown = (slate.candidates == each.preprocessor.items.unknown) & slate.mask
                groups["unknown item"].append(unknown.any(1).numpy())
                groups["short history"].append(slate.history_mask.sum(1).numpy() < _SHORT)
    problems.raise_fatal(log.name)
    return _result(config, evaluators, np.concatenate(users) if users else np.zeros(0), groups, before)


def _result(config, evaluators, users: np.ndarray, groups, n_requests: int) -> Evaluation:
    metric = config["valid_metric"].lower()
    metrics = {name: {k: float(v) for k, v in each.result().items()} for name, each in evaluators.items()}
    values = {name: each.per_request(metric) for name, each in evaluators.items()}
    first = next(iter(values))
    rows = evaluators[first].request_rows(metric)
    tests = {name: over_users(values[first], values[name], users[rows]) for name in list(values)[1:]}
    slices = {}
    for name, parts in groups.items():
        chosen = np.concatenate(parts)[rows]
        if chosen.any() and not chosen.all():
            for label, part in ((name, chosen), (f"no {name}", ~chosen)):
                slices[label] = {"requests": int(part.sum()), **{n: float(v[part].mean()) for n, v in values.items()}}
    return Evaluation(metrics, tests, slices, metric, {"requests": n_requests, "with a positive": len(rows)})


def _metrics_config(artefact: Artefact) -> Config:
    """The metrics of the training, for whatever model."""
    names = ("metrics", "topk", "valid_metric", "metric_decimal_place", "n_candidates", "slate_size")
    return Config("PRM", "log", config_dict={"source": "log", **{name: artefact.config[name] for name in names}})


def _name(artefact: Artefact, letter: str) -> str:
    return f"{letter} {type(artefact.model).__name__}".strip()


def _aligned(rows: List[List[str]]) -> List[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
