"""Evaluation over candidate lists with RecBole's metrics, model-free probes and significance tests."""

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

from dnr_recbole.evaluator.collector import CandidateCollector
from dnr_recbole.evaluator.evaluator import CandidateEvaluator
from dnr_recbole.evaluator.probes import format_probe_table, probe_warnings, probes
from dnr_recbole.evaluator.significance import PairedTest, over_requests, over_seeds, paired_test
from dnr_recbole.metrics import F1, CandidateCoverage, Coverage, PooledAUC, register_metric

__all__ = [
    "F1",
    "CandidateCollector",
    "CandidateCoverage",
    "CandidateEvaluator",
    "Coverage",
    "PairedTest",
    "PooledAUC",
    "format_probe_table",
    "over_requests",
    "over_seeds",
    "paired_test",
    "probe_warnings",
    "probes",
    "register_metric",
]
