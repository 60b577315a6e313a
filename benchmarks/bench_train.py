"""Training speed: requests per second, ratios in one run, and peak memory.

    python benchmarks/bench_train.py                                # PRM, PRM + score, DNR in both phases
    python benchmarks/bench_train.py --models=SetRank,PIER,DCDR     # any rerankers, relative to PRM
    python benchmarks/bench_train.py --models=SetRank,SetRank:n_layers=2    # with keys of their own
    python benchmarks/bench_train.py --dataset=ml-1m --batches=10   # real requests in place of generated ones

The variants take turns batch by batch, so a machine whose speed drifts slows all of them alike; the ratio is the median
over these turns. So does a matrix product of a PRM's shapes, whose rate is the limit that "of the limit" compares with.
Any configuration key may follow, e.g. --embedding_size=64.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.quick_start import prepare
from dnr_recbole.registry import get_reranker
from dnr_recbole.trainer.memory import reuse_large_blocks
from dnr_recbole.trainer.precision import autocast, use_bf16
from dnr_recbole.trainer.steps import as_step, take_step

VARIANTS = {
    "PRM": ("PRM", {"score_fusion": "none"}),
    "PRM + score": ("PRM", {"score_fusion": "concat"}),
    "DNR heuristic": ("DNR", {"lambda_e": 1000, "score_fusion": "concat"}),
    "DNR fitted": ("DNR", {"variant": "fitted", "score_fusion": "concat"}),
    "DNR adversarial": ("DNR", {"lambda_e": 0, "score_fusion": "concat"}),
    "DNR reversal": ("DNR", {"lambda_e": 0, "alternation": "reversal", "score_fusion": "concat"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated rerankers; default: PRM and DNR")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--batches", type=int, default=8, help="timed batches per variant (default: 8)")
    parser.add_argument("--epoch_requests", type=int, default=149643, help="requests of an epoch (default: ML-1M's)")
    arguments, keys = parser.parse_known_args()

    variants = VARIANTS
    if arguments.models:
        variants = {"PRM": VARIANTS["PRM"], **{text: variant(text) for text in arguments.models.split(",")}}
    base = [f"--dataset={arguments.dataset}", "--show_progress=False", *keys]
    if arguments.dataset == "synthetic":
        base += ["--synthetic_users=500", "--synthetic_items=3000", "--synthetic_requests_per_user=10"]
    data = prepare(Config("PRM", argv=base)).data
    reuse_large_blocks()  # as the trainer does
    runs = {name: Run(model, overrides, base, data) for name, (model, overrides) in variants.items()}
    config = next(iter(runs.values())).config
    loader = SlateLoader(data.train, config["train_batch_size"], shuffle=True, seed=1)
    print(
        f"batch {len(loader.batches()[0])}, {config['n_candidates']} candidates, d = {config['embedding_size']}, "
        f"{torch.get_num_threads()} threads, {config['precision']}"
    )

    limit = Limit(config, next(iter(runs.values())).bf16)
    done = -1  # the first turn warms up
    while done < arguments.batches:
        for slate in loader:
            for run in runs.values():
                run.train(slate, count=done >= 0)
            limit.measure(count=done >= 0)
            done += 1
            if done >= arguments.batches:
                break
        loader.set_epoch(loader.epoch + 1)

    reference = next(iter(runs.values())).seconds
    print(f"matrix products: {limit.rate / 1e9:.0f} GFLOP/s")
    columns = f"{'ratio to ' + next(iter(runs)):>16}{'of the limit':>14}"
    print(f"{'variant':<36}{'requests/s':>12}{'s per epoch':>13}{columns}")
    for name, run in runs.items():
        per_request = statistics.median(run.seconds) / len(slate)
        ratio = statistics.median(a / b for a, b in zip(run.seconds, reference))
        share = run.flop(slate) / statistics.median(run.seconds) / limit.rate
        epoch = per_request * arguments.epoch_requests
        print(f"{name:<36}{1 / per_request:>12.0f}{epoch:>13.1f}{ratio:>16.2f}{share:>14.0%}")
    if "PRM + score" in runs:
        for phase in ("heuristic", "fitted", "adversarial", "reversal"):
            pairs = zip(runs[f"DNR {phase}"].seconds, runs["PRM + score"].seconds)
            print(f"DNR {phase} / PRM + score: {statistics.median(a / b for a, b in pairs):.2f}")
    scale = 2**20 if sys.platform == "darwin" else 2**10
    print(f"peak memory of the whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale:.0f} MiB")


def variant(text: str):
    """``MODEL:key=value:key=value`` → the model's name and its keys."""
    model, *keys = text.split(":")
    return model, {name: yaml.safe_load(value) for name, _, value in (key.partition("=") for key in keys)}


class Run:
    """One variant with its own optimisers."""

    def __init__(self, model: str, overrides: dict, base: list, data):
        self.config = Config(model, config_dict=overrides, argv=base)
        torch.manual_seed(0)
        self.model = get_reranker(model)(self.config, data.catalogue).to(self.config["device"]).train()
        self.bf16 = use_bf16(self.config, self.model, self.config["device"])
        self.model.set_epoch(0)
        for stage in self.model.pretraining():
            if stage.finish:
                stage.finish()
        self.groups = self.model.parameter_groups()
        self.optimizers = {name: torch.optim.Adam(params, lr=1e-3) for name, params in self.groups.items() if params}
        self.seconds = []

    def train(self, slate, count: bool) -> None:
        """One batch with all its optimiser steps; timed if ``count``."""
        started = time.perf_counter()
        steps = self.model.training_steps(slate.to(self.config["device"]))
        while True:
            with autocast(self.config["device"], self.bf16):
                step = next(steps, None)
            if step is None:
                break
            take_step(as_step(step), self.groups, self.optimizers)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if count:
            self.seconds.append(time.perf_counter() - started)

    def flop(self, slate) -> int:
        """Operations of the matrix products of one batch; one more step is taken."""
        with FlopCounterMode(display=False) as counter:
            self.train(slate, count=False)
        return counter.get_total_flops()


class Limit:
    """How fast this machine multiplies [requests · candidates, d] by [d, d], in the precision of the first variant."""

    def __init__(self, config, bf16: bool):
        rows, d = config["train_batch_size"] * config["n_candidates"], config["embedding_size"]
        kind = torch.bfloat16 if bf16 else torch.float32
        self.device = config["device"]
        self.left, self.right = torch.randn(rows, d).to(self.device, kind), torch.randn(d, d).to(self.device, kind)
        self.seconds = []

    def measure(self, count: bool) -> None:
        started = time.perf_counter()
        self.left @ self.right
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if count:
            self.seconds.append(time.perf_counter() - started)

    @property
    def rate(self) -> float:
        """FLOP per second."""
        return 2 * self.left.shape[0] * self.right.numel() / statistics.median(self.seconds)


if __name__ == "__main__":
    main()
