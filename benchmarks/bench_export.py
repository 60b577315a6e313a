"""ONNX against torch: what every reranker's graph differs by, how large it is, and the latency of one request.

    python benchmarks/bench_export.py                  # the table of docs/export.md

One thread, d = 64, 50 candidates, an invented log; medians over 200 requests, torch and graph in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

from dnr_recbole.threads import be_a_good_neighbour

be_a_good_neighbour()  # as the commands do; what follows imports torch

import torch  # noqa: E402
from bench_serve import invented_log  # noqa: E402

from dnr_recbole import Reranker  # noqa: E402
from dnr_recbole.export import OnnxScorer, difference, random_requests, to_onnx  # noqa: E402
from dnr_recbole.ranking import predict  # noqa: E402
from dnr_recbole.registry import list_models  # noqa: E402

KEYS = {"epochs": 1, "embedding_size": 64, "baselines": [], "use_gpu": False}


def table() -> None:
    """Every registered reranker, exported or refused."""
    print("| reranker | graph | scores differ by | MiB | torch, ms | onnx, ms |\n|---|---|---|---|---|---|")
    log = invented_log(200, 50)
    for each in list_models("reranker"):
        if each.cls.export_refusal:
            print(f"| {each.name} | no: {each.cls.export_refusal} | | | | |")
            continue
        artefact = Reranker(each.name, **KEYS).fit(log).artefact
        content = to_onnx(artefact)
        scorer = OnnxScorer(content)
        worst, _ = difference(artefact, scorer)
        request, taken = random_requests(artefact, 1, 50, 0), {"torch": [], "onnx": []}
        for _ in range(200):
            for name, run in (("torch", lambda: predict(artefact, request)), ("onnx", lambda: scorer(request))):  # noqa: B023
                started = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - started)
        cells = [f"{statistics.median(times) * 1000:.2f}" for times in taken.values()]
        print(f"| {each.name} | yes | {worst:.0e} | {len(content) / 2**20:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    table()
