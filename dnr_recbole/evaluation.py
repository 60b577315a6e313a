"""A trained model on a log with labels: metrics beside the incoming order, two models beside each other, slices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from logging import getLogger
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.artefact import Artefact
from dnr_recbole.bias.off_policy import ESTIMATORS, FEW, PolicyValue
from dnr_recbole.config import Config
from dnr_recbole.data.candidate_table import CandidateTable
from dnr_recbole.evaluator import CandidateEvaluator
from dnr_recbole.evaluator.off_policy import OffPolicy
from dnr_recbole.evaluator.significance import PairedTest, each_his_own, over_users
from dnr_recbole.lists import first_score
from dnr_recbole.log_names import PLACE, PROPENSITY
from dnr_recbole.ranking import predict
from dnr_recbole.requestlog.maker import Maker
from dnr_recbole.requestlog.request_log import RequestLog
from dnr_recbole.requestlog.scan import Scan
from dnr_recbole.retriever.calibration import IsotonicCalibration, PlattCalibration

INCOMING = "incoming order"
_SHORT = 5  # items of a short history
_REQUESTS = 2048  # at a time


@dataclass
class Evaluation:
    """Attributes:
    metrics: name of the ranking → metric → value: the model, perhaps the other one, and the incoming order.
    tests: paired tests over users of the first ranking against each other one, on the metric ``metric``.
    slices: name of a group of requests → its size and each ranking's mean of ``metric``.
    requests: how many requests, and how many have a positive.
    off_policy: name of the ranking → clicks per request that it would get, of a log with positions and propensities.
    """

    metrics: Dict[str, Dict[str, float]]
    tests: Dict[str, PairedTest] = field(default_factory=dict)
    slices: Dict[str, Dict[str, float]] = field(default_factory=dict)
    metric: str = ""
    requests: Dict[str, int] = field(default_factory=dict)
    off_policy: Dict[str, PolicyValue] = field(default_factory=dict)

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
            rows = [[self.metric, "requests", *names]]
            for name, each in self.slices.items():
                rows.append([name, f"{int(each['requests']):,}", *(f"{each[n]:.4f}" for n in names)])
            lines += ["", *_aligned(rows)]
        return "\n".join([*lines, *_off_policy_lines(self.off_policy)])


def evaluate_log(artefact: Artefact, log: RequestLog, other: Optional[Artefact] = None) -> Evaluation:
    """Metrics of one or two models on a log.

    Where the log brings no histories, a request's is what the user clicked earlier in it, behind what the model has
    stored of him. What is stored may hold the clicks of requests from before the end of the model's training log, so it
    is not read where the log has such requests (or neither has times).

    Raises:
        DataError: the log has problems, or no request has a positive.
    """
    models = {_name(artefact, "A" if other else ""): artefact}
    if other is not None:
        models[_name(other, "B")] = other
    read = {name: _table(each, log) for name, each in models.items()}
    tables = {name: table for name, (table, _, _) in read.items()}
    config = _metrics_config(artefact)
    n_items = max(len(each.preprocessor.items) for each in models.values())
    counts = torch.ones(n_items, dtype=torch.long)
    evaluators = {name: CandidateEvaluator(config, n_items, counts) for name in (*models, INCOMING)}
    first = next(iter(models))
    _, found, incoming = read[first]
    values = _displayed(tables[first], found)
    rows = torch.nonzero(tables[first].mask.any(1)).flatten()
    groups: Dict[str, List[np.ndarray]] = {name: [] for name in ("unknown user", "unknown item", "short history")}
    for part in rows.split(_REQUESTS):
        for name, each in models.items():
            slate, propensity = tables[name].slate(part), tables[name].propensity
            request = slate, tables[name].n_positives[part], part
            scores = torch.from_numpy(predict(each, slate.without_labels()))
            evaluators[name].add_slate(scores, *request)
            if values is not None and propensity is not None:
                values.add(name, scores, slate, propensity[part])
            if name == first:
                evaluators[INCOMING].add_slate(incoming[part], *request)
                if values is not None and propensity is not None:
                    values.add(INCOMING, incoming[part], slate, propensity[part])
                unknown = each.preprocessor.items.unknown
                groups["unknown user"].append((slate.users == each.preprocessor.users.unknown).numpy())
                groups["unknown item"].append(((slate.candidates == unknown) & slate.mask).any(1).numpy())
                groups["short history"].append((slate.history_mask.sum(1) < _SHORT).numpy())
    # By the log's own numbers: users that the model does not know are one to it, and still different people.
    users = found.user.astype(np.int64)
    users = each_his_own(users, users < 0)
    place = np.full(len(users), -1)
    place[rows.numpy()] = np.arange(len(rows))
    out = _result(config, evaluators, users, {n: np.concatenate(p) for n, p in groups.items()}, place, len(users))
    return out if values is None else replace(out, off_policy=values.result(users[rows.numpy()]))


def _displayed(table: CandidateTable, found: Scan) -> Optional[OffPolicy]:
    """What collects off-policy values, where the log says what was shown where, and how likely that was."""
    if table.position is None or table.propensity is None or int(table.position.max()) < 0:
        return None
    unknown = int((~(table.propensity > 0) & (table.position >= 0) & table.mask).sum())
    if unknown:
        getLogger(__name__).warning(f"no off-policy values: {unknown:,} candidates were shown without a propensity")
        return None
    place = torch.where((table.position >= 0) & table.mask, table.position, -1).sort(1).values
    shared = int(((place[:, 1:] == place[:, :-1]) & (place[:, 1:] >= 0)).sum())
    if shared:
        getLogger(__name__).warning(f"no off-policy values: {shared:,} candidates were shown where another one was")
        return None
    if found.longest > table.mask.shape[1]:
        getLogger(__name__).warning(
            f"clicks per request: lists are cut to {table.mask.shape[1]} candidates (n_candidates), and what was shown "
            "beyond them counts as not shown"
        )
    return OffPolicy(int(table.position.max()) + 1)


def _off_policy_lines(values: Dict[str, PolicyValue]) -> List[str]:
    if not values:
        return []
    rows = [["clicks per request", *ESTIMATORS, "effective displays per position"]]
    for name, value in values.items():
        cells = [value.estimates.get(estimator) for estimator in ESTIMATORS]
        shown = ["-" if cell is None else "{:.4f} [{:.4f}, {:.4f}]".format(*cell) for cell in cells]
        rows.append([name, *shown, f"{value.effective:,.0f} of {value.logged:,.0f}"])
    doubtful = [name for name, value in values.items() if value.doubtful]
    lines = ["", *_aligned(rows)]
    if doubtful:
        lines.append(
            f"WARNING: fewer than {FEW} effective displays per position agree with {', '.join(doubtful)}: do not rely "
            "on these values, nor on their intervals; more random exposures are needed"
        )
    return lines


def _table(artefact: Artefact, log: RequestLog) -> Tuple[CandidateTable, Scan, Tensor]:
    """The log's requests as the model reads them, what the log holds, and scores ``[R, n]`` in the incoming order."""
    preprocessor = artefact.preprocessor
    keys = {
        "source": "log",
        "order_by": preprocessor.columns.scores[0],
        "score_columns": preprocessor.columns.scores,
        "log_features": preprocessor.columns.features,
        "history_length": preprocessor.history_length,
    }
    names = log.requests.names
    keys.update(label_grades=artefact.config["label_grades"], positive_grade=artefact.config["positive_grade"])
    if set(artefact.config["objectives"]) <= set(names):
        keys["objectives"] = artefact.config["objectives"]
    if PLACE in names and PROPENSITY in names:
        keys["propensity"] = "column"  # so that these columns are read
    if any(each.kind != "identity" for each in preprocessor.calibrations):
        keys["score_calibration"] = "logistic"  # any: scores of whatever scale are fine
    config = Config("PRM", "log", config_dict={**keys, "n_candidates": max(6, preprocessor.n_candidates)})
    found, source = log.scan(config)
    found.problems.raise_fatal(log.name)
    newer = found.time is not None and preprocessor.until is not None and found.time.min() > preprocessor.until
    stored = preprocessor.histories if newer else None
    maker = Maker(config, RequestLog(source), found, source, np.zeros(len(found), dtype=np.int8), stored)
    arrays = maker.arrays(preprocessor, None)
    table = CandidateTable(
        **{name: torch.from_numpy(values) for name, values in arrays.items()},
        split=torch.zeros(len(found), dtype=torch.int8),
        history_length=preprocessor.history_length,
    )
    incoming, first = first_score(table.scores), preprocessor.calibrations[0]
    if isinstance(first, IsotonicCalibration):
        # It gives candidates of different scores the same value, and an order by that would be a worse one.
        low, high = first.knots[0], first.knots[-1]
        strict = PlattCalibration((low + high) / 2, max((high - low) / 4, 1e-9), 1.0, 0.0)
        calibrations = [strict, *preprocessor.calibrations[1:]]
        again = maker.arrays(replace(preprocessor, calibrations=calibrations, normalization="none"), None)
        incoming = first_score(torch.from_numpy(again["scores"]))
    return table, found, incoming


def _result(config, evaluators, users: np.ndarray, groups, place: np.ndarray, n_requests: int) -> Evaluation:
    metric = config["valid_metric"].lower()
    metrics = {name: {k: float(v) for k, v in each.result().items()} for name, each in evaluators.items()}
    values = {name: each.per_request(metric) for name, each in evaluators.items()}
    first = next(iter(values))
    rows = evaluators[first].request_rows(metric)
    others = list(values)[1:] if len(np.unique(users[rows])) > 1 else []  # one user alone says nothing of others
    tests = {name: over_users(values[first], values[name], users[rows]) for name in others}
    slices = {}
    for name, parts in groups.items():
        chosen = parts[place[rows]]
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
