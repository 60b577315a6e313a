"""ONNX against torch: what every reranker's graph differs by, how large it is, and the latency of one request.

    python benchmarks/bench_export.py                  # the table of docs/export.md
    python benchmarks/bench_export.py --int8           # what 8-bit weights cost in NDCG@6

One thread, d = 64, 50 candidates, an invented log; medians over 200 requests, torch and graph in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from dnr_recbole.threads import be_a_good_neighbour

be_a_good_neighbour()  # as the commands do; what follows imports torch

import torch  # noqa: E402
from bench_serve import invented_log  # noqa: E402

from dnr_recbole import Reranker, run_dnr  # noqa: E402
from dnr_recbole.artefact import load_artefact  # noqa: E402
from dnr_recbole.config import Config  # noqa: E402
from dnr_recbole.export import OnnxScorer, difference, export, random_requests, to_onnx  # noqa: E402
from dnr_recbole.lists import best_first, discounts, take  # noqa: E402
from dnr_recbole.quick_start import prepare  # noqa: E402
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


def int8(models) -> None:
    """Models trained on ml-100k (users held out), their graphs, and those with 8-bit weights, on the test requests."""
    print("| reranker | torch | onnx | int8 | MiB | int8, MiB |\n|---|---|---|---|---|---|")
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            keys = {
                "split": "user", "artefact_dir": f"{folder}/m", "baselines": [],
                "log_dir": None, "tensorboard_dir": None,
                "checkpoint_dir": folder, "rerank_loss": "listce", "show_progress": False,
            }  # fmt: skip
            run_dnr(model=name, dataset="ml-100k", config_dict=keys)
            test = prepare(Config(name, "ml-100k", config_dict=keys)).data.test
            artefact, cells, sizes = load_artefact(f"{folder}/m"), [], []
            for quantise in (None, False, True):
                if quantise is not None:
                    export(artefact, f"{folder}/m.onnx", quantise)
                    content = Path(f"{folder}/m.onnx").read_bytes()
                    sizes.append(f"{len(content) / 2**20:.1f}")
                    artefact.scorer = OnnxScorer(content)
                slate = test.slate(torch.arange(len(test)))
                labels = take(slate.labels, best_first(torch.from_numpy(predict(artefact, slate)), slate.mask))[:, :6]
                ideal = take(slate.labels, best_first(slate.labels, slate.mask))[:, :6]
                gain, most = ((each * discounts(6)).sum(1) for each in (labels, ideal))
                cells.append(f"{100 * float((gain / most)[most > 0].mean()):.2f}")
        print(f"| {name} | {' | '.join([*cells, *sizes])} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--int8", action="store_true")
    torch.set_num_threads(1)
    if parser.parse_args().int8:
        int8(("PRM", "SetRank", "MiDNN"))
    else:
        table()
