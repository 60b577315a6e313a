"""Whether what is faster ranks as well: each training as it is, and with the arithmetic that it had before.

    python benchmarks/speed_quality.py --seeds=10 --output=results/speed_quality.jsonl

``before``: float32 throughout, PyTorch's fused attention, PyTorch's dropout. ``now``: `precision: auto` (bf16 where the
CPU has it), attention from matrix products, dropout from shared random words. The same users, retriever, weights and
batches for each pair; NDCG@6 of ML-1M's test requests (`retrieved`, users held out). One line per run; the mean
difference with its 95 % interval over the initialisations is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from typing import Dict, Iterator
from unittest import mock

from dnr_recbole.threads import be_a_good_neighbour

be_a_good_neighbour()  # as the commands do; what follows imports torch

import numpy as np  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from scipy import stats  # noqa: E402
from torch import nn  # noqa: E402
from training import trained  # noqa: E402

from dnr_recbole.config import Config  # noqa: E402
from dnr_recbole.data.dataloader import SlateLoader  # noqa: E402
from dnr_recbole.model.blocks import attention  # noqa: E402
from dnr_recbole.model.blocks.dropout import Dropout  # noqa: E402
from dnr_recbole.quick_start import prepare  # noqa: E402

BASE = {
    "dataset": "ml-1m", "split": "user", "embedding_size": 64, "train_batch_size": 256, "epochs": 6, "dropout": 0.1,
    "rerank_loss": "listce", "score_fusion": "concat+residual", "log_dir": None, "tensorboard_dir": None,
    "show_progress": False, "use_gpu": False, "baselines": [], "metrics": ["NDCG"],
    "retriever": "MF", "retriever_args": {"epochs": 4, "embedding_size": 64},
}  # fmt: skip
MODELS: Dict[str, dict] = {"PRM": {"model": "PRM"}, "DNR": {"model": "DNR", "lambda_e": 3, "noise_type": "beta"}}


@contextlib.contextmanager
def before() -> Iterator[None]:
    """Attention and dropout of PyTorch."""
    with mock.patch.object(attention, "attend", fused), mock.patch.object(Dropout, "forward", nn.Dropout.forward):
        yield


def fused(query, key, value, mask=None):
    """PyTorch's attention."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def ndcg(config: Config, data, seed: int) -> float:
    """NDCG@6 on the test requests."""
    result = trained(config, data, seed).evaluate(SlateLoader(data.test, 2048), load_best_model=False)
    return float(result["ndcg@6"])


def summary(path: str) -> None:
    """A Markdown table: NDCG@6 in percent and the paired differences."""
    values: Dict[tuple, float] = {}
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            values[row["method"], row["arithmetic"], row["seed"]] = 100 * row["ndcg@6"]
    print("| | initialisations | before | now | now − before | 95 % interval |\n|---|---|---|---|---|---|")
    for method in MODELS:
        seeds = [s for m, a, s in values if (m, a) == (method, "now") and (method, "before", s) in values]
        old, new = (np.array([values[method, which, s] for s in seeds]) for which in ("before", "now"))
        if len(seeds) > 1:
            change = new - old
            low, high = stats.t.interval(0.95, len(seeds) - 1, change.mean(), stats.sem(change))
            print(
                f"| {method} | {len(seeds)} | {old.mean():.2f} | {new.mean():.2f} | {change.mean():+.2f} | "
                f"[{low:.2f}, {high:.2f}] |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", default="results/speed_quality.jsonl")
    parser.add_argument("--data_path", default="dataset/")
    arguments = parser.parse_args()
    base = {**BASE, "data_path": arguments.data_path}
    data = prepare(Config(config_dict={**base, "model": "PRM"})).data
    done = set()
    if os.path.exists(arguments.output):
        with open(arguments.output, encoding="utf-8") as file:
            done = {(row["method"], row["arithmetic"], row["seed"]) for row in map(json.loads, file)}
    for method, keys in MODELS.items():
        for seed in range(1, arguments.seeds + 1):
            for which, precision in (("before", "fp32"), ("now", "auto")):
                if (method, which, seed) in done:
                    continue
                config = Config(config_dict={**base, **keys, "precision": precision, "init_seed": seed})
                with before() if which == "before" else contextlib.nullcontext():
                    line = {"method": method, "arithmetic": which, "seed": seed, "ndcg@6": ndcg(config, data, seed)}
                with open(arguments.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)
    summary(arguments.output)


if __name__ == "__main__":
    main()
