"""What the code of each stage makes of fixed inputs, in numbers.

If a test of ``test_golden.py`` fails because results were meant to change, raise the version of that stage in
``dnr_recbole.identity.CODE_VERSIONS`` and run ``python tests/golden.py``, which writes ``golden.json`` anew: what was
stored under the old version is then made again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict

import torch
from data_helpers import CONFIG, make_retrieval, random_interactions
from input_helpers import Inputs

from dnr_recbole.config import Config
from dnr_recbole.data.candidates import build_candidates
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.loading import load_recbole_dataset
from dnr_recbole.evaluator import CandidateEvaluator
from dnr_recbole.identity import CODE_VERSIONS, content_digest
from dnr_recbole.quick_start import run_dnr
from dnr_recbole.registry import list_models
from dnr_recbole.retriever.training import train_retriever
from dnr_recbole.testing import build, random_slate

FILE = Path(__file__).with_name("golden.json")
_WORLD = {
    "dataset": "synthetic", "synthetic_users": 60, "synthetic_items": 50, "synthetic_requests_per_user": 4,
    "n_candidates": 10, "embedding_size": 8, "train_batch_size": 64, "epochs": 2, "use_gpu": False, "precision": "fp32",
    "show_progress": False, "log_dir": None, "tensorboard_dir": None, "state": "ERROR", "metrics": ["NDCG", "MAP"],
}  # fmt: skip


def source() -> Dict[str, Any]:
    """The interactions of a small log, under two filters."""
    return {name: _load(**keys)[1].digest() for name, keys in {
        "plain": {}, "filtered": {"val_interval": {"rating": "[2,5]"}, "item_inter_num_interval": "[9,inf)"},
    }.items()}  # fmt: skip


def retriever() -> Dict[str, Any]:
    """Fit, calibration and metrics of retrievers on that log."""
    found = {}
    for name in ("MF", "DualTower", "BPR", "EASE"):
        config, interactions, dataset = _load(
            retriever=name, retriever_args={"epochs": 2, "embedding_size": 4} if name != "EASE" else {}
        )
        retrieval = train_retriever(config, dataset, interactions)
        scores = retrieval.score_chunks(torch.arange(1, 6))
        found[name] = {"split": content_digest(torch.from_numpy(retrieval.split)), "auc": retrieval.metrics["auc"],
                       "x": scores[:, 1:4].flatten().tolist()}  # fmt: skip
    return found


def candidates() -> Dict[str, Any]:
    """Candidate tables under given scores."""
    data = random_interactions(0, n_users=60, n_items=30, longest=40)
    tables = {}
    for changes in (
        {"protocol": "exposed", "split": "last"}, {"protocol": "exposed", "split": "user", "exclude_seen": False},
        {"protocol": "retrieved", "split": "last"}, {"protocol": "retrieved", "split": "user", "repeatable": True},
    ):  # fmt: skip
        table = build_candidates({**CONFIG, **changes}, data, make_retrieval(data))
        tables[" ".join(map(str, changes.values()))] = content_digest(table.to_tensors())
    return tables


def reranker() -> Dict[str, Any]:
    """Untrained rerankers on a random request batch."""
    slate = random_slate(batch=3).without_labels()
    found = {}
    for info in list_models("reranker"):
        with torch.no_grad():
            scores = build(info.name, seed=1).predict(slate)
        found[info.name] = scores.masked_fill(~slate.mask, 0.0)[:, :4].flatten().tolist()
    return found


def training() -> Dict[str, Any]:
    """Losses and the best validation score of short trainings."""
    found = {}
    for name, keys in {
        "PRM": {"model": "PRM"}, "DNR": {"model": "DNR", "lambda_e": 1},
        "DNR of EGRerank": {"model": "DNR", "backbone": "EGRerank"},
        "MGE": {"model": "MGE"}, "reversal": {"model": "DNR", "lambda_e": 0, "alternation": "reversal"},
    }.items():  # fmt: skip
        row = run_dnr(config_dict={**_WORLD, **keys}, saved=False)["row"]
        found[name] = {"history": row["history"], "valid": row["best_valid_score"]}
    return found


def evaluation() -> Dict[str, Any]:
    """Every metric of random scores."""
    slate = random_slate(batch=40, n=12)
    config = Config("PRM", "ml-100k", config_dict={"n_candidates": 12, "topk": [1, 6], "use_gpu": False})
    evaluator = CandidateEvaluator(config, n_items=60)
    scores = torch.rand(slate.scores.shape, generator=torch.Generator().manual_seed(5))
    n_positives = slate.labels.sum(1).long() + torch.arange(40) % 2
    evaluator.add(scores, slate.candidates, slate.mask, slate.labels, n_positives)
    return {name: float(value) for name, value in evaluator.result().items()}


STAGES: Dict[str, Callable[[], Dict[str, Any]]] = {
    stage.__name__: stage for stage in (source, retriever, candidates, reranker, training, evaluation)
}


def _load(**keys):
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder))
        inputs.write("log")
        config = Config(
            "PRM",
            "log",
            config_dict={
                **inputs.keys(),
                "protocol": "exposed",
                "log_dir": None,
                "tensorboard_dir": None,
                "use_gpu": False,
                **keys,
            },  # fmt: skip
        )
        dataset = load_recbole_dataset(config)
        return config, Interactions.from_recbole(dataset, config), dataset


if __name__ == "__main__":
    golden = {stage: {"version": CODE_VERSIONS[stage], "numbers": make()} for stage, make in STAGES.items()}
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{FILE} written for {CODE_VERSIONS}")
