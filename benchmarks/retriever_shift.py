"""Retriever shift: train a reranker with the scores of one retriever, rank the lists of another.

    python benchmarks/retriever_shift.py --seeds=3 --output=results/shift.jsonl

What production meets when the retriever is retrained and the reranker is not. Trained on the candidates and scores of
an MF (A); ranked are the test requests of the same users with A's lists, with those of the same MF under another seed,
half-trained, and of EASE, and with A's lists whose log-odds got Gaussian noise. One line per method, initialisation
and setting with the NDCG@6 of the reranker; a summary is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections import defaultdict
from typing import Dict, List, Tuple

import numpy as np
import torch
from scipy import stats
from training import trained

from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.dataset import RerankDataset
from dnr_recbole.data.normalization import normalize_scores
from dnr_recbole.evaluator.significance import holm
from dnr_recbole.quick_start import prepare

BASE = {
    "dataset": "ml-1m", "split": "user", "embedding_size": 64, "train_batch_size": 256, "epochs": 8,
    "rerank_loss": "listce", "score_normalization": "minmax", "use_features": True, "log_dir": None,
    "tensorboard_dir": None, "show_progress": False, "use_gpu": False, "baselines": [], "metrics": ["NDCG", "MAP"],
    # What a retriever's own vectors say would change with it: the shift is that of scores and lists.
    "use_retriever_factors": False, "use_popularity": False, "affinity_spaces": ["svd", "covisit"],
}  # fmt: skip
A = {"retriever": "MF", "retriever_args": {"epochs": 4, "embedding_size": 64}}
OTHERS = {
    "other seed": {"retriever": "MF", "retriever_args": {"epochs": 4, "embedding_size": 64, "seed": 7}},
    "half-trained": {"retriever": "MF", "retriever_args": {"epochs": 2, "embedding_size": 64}},
    "EASE": {"retriever": "EASE", "retriever_args": {}},
}
NOISE = (0.5, 1.0, 2.0)
_DNR = {"model": "DNR", "score_fusion": "concat+residual", "adversarial": False}
METHODS: Dict[str, dict] = {
    "PRM, no score": {"model": "PRM", "score_fusion": "none"},
    "PRM, concat": {"model": "PRM", "score_fusion": "concat"},
    "PRM, concat+residual": {"model": "PRM", "score_fusion": "concat+residual"},
    "DNR-B, concat": {"model": "DNR", "score_fusion": "concat", "noise_type": "beta", "lambda_e": 4},
    "DNR, fitted": {**_DNR, "noise_type": "fitted"},
    "DNR, empirical": {**_DNR, "noise_type": "empirical"},
    "DNR, residual": {**_DNR, "noise_type": "residual"},
}


def noisy(test: RerankDataset, size: float) -> RerankDataset:
    """The same lists; the log-odds of the scores get Gaussian noise of that size, then they are rescaled again."""
    table, generator = test.table, torch.Generator().manual_seed(0)
    odds = torch.logit(table.scores, eps=1e-3) + size * torch.randn(table.scores.shape, generator=generator)
    scores = normalize_scores(torch.sigmoid(odds), table.mask, "minmax")
    return dataclasses.replace(test, table=dataclasses.replace(table, scores=scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="results/shift.jsonl")
    parser.add_argument("--data_path", default="dataset/")
    arguments = parser.parse_args()
    base = {**BASE, "data_path": arguments.data_path}
    config_of = lambda **keys: Config(config_dict={**base, **keys})  # noqa: E731
    own = prepare(config_of(model="PRM", **A)).data
    tests = {"A": own.test, **{f"noise {size}": noisy(own.test, size) for size in NOISE}}
    for name, keys in OTHERS.items():
        tests[name] = prepare(config_of(model="PRM", **keys)).data.test
    done = set()
    if os.path.exists(arguments.output):
        with open(arguments.output, encoding="utf-8") as file:
            done = {(row["method"], row["seed"]) for row in map(json.loads, file)}
    for seed in range(1, arguments.seeds + 1):
        for method, keys in METHODS.items():
            if (method, seed) in done:
                continue
            config = config_of(**A, **keys, init_seed=seed)
            trainer = trained(config, own, seed)
            lines = []
            for setting, test in tests.items():
                result = trainer.evaluate(SlateLoader(test, 2048), load_best_model=False)
                lines.append({"method": method, "seed": seed, "setting": setting, "ndcg@6": result["ndcg@6"]})
            with open(arguments.output, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            print(method, seed, {line["setting"]: round(line["ndcg@6"], 4) for line in lines}, flush=True)
    summary(arguments.output, list(tests))


def summary(path: str, settings: List[str], backbone: str = "PRM, concat+residual") -> None:
    """Two Markdown tables, in percent: mean and standard deviation over initialisations; and how much more than the
    backbone a method loses from A to a setting, paired by initialisation, with Holm's method over all of the table."""
    values: Dict[Tuple[str, str], Dict[int, float]] = defaultdict(dict)
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            values[row["method"], row["setting"]][row["seed"]] = 100 * row["ndcg@6"]
    methods = [method for method in METHODS if all(values[method, setting] for setting in settings)]
    print("| | " + " | ".join(settings) + " |\n|" + "---|" * (len(settings) + 1))
    for method in methods:
        found = [list(values[method, setting].values()) for setting in settings]
        cells = [f"{np.mean(v):.2f} ± {np.std(v, ddof=1) if len(v) > 1 else 0:.2f}" for v in found]
        print(f"| {method} | " + " | ".join(cells) + " |")

    def lost(method: str, setting: str, seeds: List[int]) -> np.ndarray:
        return np.array([values[method, "A"][seed] - values[method, setting][seed] for seed in seeds])

    shifts, others = settings[1:], [method for method in methods if method not in (backbone, "PRM, no score")]
    more = {}
    for method in others:
        seeds = sorted(values[method, "A"].keys() & values[backbone, "A"].keys())
        if len(seeds) < 3:
            return
        more.update({(method, s): lost(method, s, seeds) - lost(backbone, s, seeds) for s in shifts})
    corrected = dict(zip(more, holm([stats.ttest_1samp(change, 0.0).pvalue for change in more.values()])))
    print("\n| lost more than " + backbone + " | " + " | ".join(shifts) + " |\n|" + "---|" * (len(shifts) + 1))
    for method in others:
        cells = [f"{more[method, s].mean():+.2f}{' *' if corrected[method, s] < 0.05 else ''}" for s in shifts]
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
