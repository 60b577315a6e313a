"""Latency of one request and speed of large batches, for every reranker, beside the bare forward pass.

    python benchmarks/bench_predict.py                       # all rerankers, d = 64, 50 candidates
    python benchmarks/bench_predict.py --models=PRM,PIER --requests=200

For each model: p50 and p99 of one request from a Slate to the order of its candidates, p50 of its bare forward pass,
their ratio, and milliseconds per request in batches of 256. Untrained weights; any configuration key may follow.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Callable, List

from dnr_recbole.threads import be_a_good_neighbour

be_a_good_neighbour()  # as the commands do; what follows imports torch

import numpy as np  # noqa: E402
import torch  # noqa: E402

from dnr_recbole.config import Config  # noqa: E402
from dnr_recbole.data.dataloader import SlateLoader  # noqa: E402
from dnr_recbole.data.slate import Slate  # noqa: E402
from dnr_recbole.model.abstract_reranker import AbstractReranker  # noqa: E402
from dnr_recbole.quick_start import prepare  # noqa: E402
from dnr_recbole.registry import get_reranker, list_models  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated; default: all that are scored by torch")
    parser.add_argument("--requests", type=int, default=100)
    arguments, keys = parser.parse_known_args()
    base = ["--dataset=synthetic", "--show_progress=False", "--synthetic_users=300", "--synthetic_items=3000", *keys]
    data = prepare(Config("PRM", argv=base)).data
    single = [slate.without_labels() for slate in SlateLoader(data.test, 1)][: arguments.requests]
    large = next(iter(SlateLoader(data.test, 256))).without_labels()
    names = arguments.models.split(",") if arguments.models else [
        m.name for m in list_models() if m.kind == "reranker" and not m.cls.fits_itself and m.name != "DNR"
    ]  # fmt: skip
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'model':<12}{'p50 ms':>9}{'p99 ms':>9}{'forward':>9}{'ratio':>8}{'batch ms/request':>19}")
    for name in names:
        config = Config(name, argv=base)
        torch.manual_seed(0)
        model = get_reranker(name)(config, data.catalogue).eval()
        whole = timed(partial(order, model), single)
        with torch.inference_mode():
            bare = timed(model.predict, single)
            batch = min(timed(model.predict, [large] * 4))
        ratio = statistics.median(a / b for a, b in zip(whole, bare))
        p50, p99 = np.percentile(whole, [50, 99])
        print(f"{name:<12}{p50:>9.2f}{p99:>9.2f}{np.median(bare):>9.2f}{ratio:>8.2f}{batch / len(large):>19.3f}")


@torch.inference_mode()
def order(model: AbstractReranker, slate: Slate) -> torch.Tensor:
    """Positions of the candidates, best first, [B, n]."""
    return model.predict(slate).argsort(dim=-1, descending=True, stable=True)


def timed(call: Callable, slates: List) -> List[float]:
    """Milliseconds of each call, after three to warm up."""
    for slate in slates[:3]:
        call(slate)
    out = []
    for slate in slates:
        started = time.perf_counter()
        call(slate)
        out.append(1000 * (time.perf_counter() - started))
    return out


if __name__ == "__main__":
    main()
