"""Every registered reranker as an ONNX file: whether, how near to torch, how large, how fast, and what int8 costs.

    python benchmarks/bench_export.py                          # all, on ml-100k; adds to results/export.json
    python benchmarks/bench_export.py --models=PRM,PIER --epochs=2
    python benchmarks/bench_export.py --table                  # the tables of docs/export.md

Each model is trained with its defaults. Differences and NDCG@6 are over all test requests, the latter under torch and
under int8; latencies are those of one request, slate to scores, torch and onnxruntime in turn on the same requests, in
time of the processor: with OMP_NUM_THREADS=1 what an idle machine would take, whatever else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from dnr_recbole.threads import be_a_good_neighbour

be_a_good_neighbour()  # as the commands do; what follows imports torch

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402

from dnr_recbole.artefact import Artefact, artefact_of_run  # noqa: E402
from dnr_recbole.config import Config  # noqa: E402
from dnr_recbole.data.dataloader import SlateLoader  # noqa: E402
from dnr_recbole.data.slate import Slate  # noqa: E402
from dnr_recbole.evaluator.evaluator import CandidateEvaluator  # noqa: E402
from dnr_recbole.export.onnx_file import TOLERANCE, export_artefact  # noqa: E402
from dnr_recbole.export.runtime import OnnxScorer  # noqa: E402
from dnr_recbole.files import write_json  # noqa: E402
from dnr_recbole.quick_start import prepare, train  # noqa: E402
from dnr_recbole.ranking import Scorer, predict  # noqa: E402
from dnr_recbole.registry import get_reranker, list_models  # noqa: E402

RESULTS = Path(__file__).parent.parent / "results" / "export.json"
METRIC = "ndcg@6"
_SINGLE = 200  # requests whose latency is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated; default: all")
    parser.add_argument("--table", action="store_true", help="print what was measured, as Markdown")
    arguments, keys = parser.parse_known_args()
    if arguments.table:
        print("\n\n".join("\n".join(table) for table in tables(json.loads(RESULTS.read_text(encoding="utf-8")))))
        return
    names = arguments.models.split(",") if arguments.models else [model.name for model in list_models("reranker")]
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"models": {}}
    with tempfile.TemporaryDirectory() as folder:
        base = ["--dataset=ml-100k", "--use_gpu=False", "--baselines=[]", "--log_dir=null", "--tensorboard_dir=null",
                "--show_progress=False", f"--checkpoint_dir={folder}", *keys]  # fmt: skip
        prepared = prepare(Config("PRM", argv=base))
        for name in names:
            found["models"][name] = row = measured(name, base, prepared)
            found["machine"] = machine()
            write_json(RESULTS, found)
            print(name, json.dumps(row), flush=True)


def machine() -> Dict[str, Any]:
    """What measured."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}  # fmt: skip


def measured(name: str, base: List[str], prepared) -> Dict[str, Any]:
    """A model's row."""
    if get_reranker(name).export_refusal:
        return {"refusal": get_reranker(name).export_refusal}
    config = Config(name, argv=base)
    artefact = artefact_of_run(train(config, prepared.data, {})["row"], prepared)
    started = time.perf_counter()
    whole = export_artefact(artefact)
    seconds, small = time.perf_counter() - started, export_artefact(artefact, "int8")
    scorers: Dict[str, Scorer] = {
        "torch": lambda slate: predict(artefact, slate),
        "onnx": OnnxScorer(whole.content),
        "int8": OnnxScorer(small.content),
    }
    slates = [slate.without_labels() for slate in SlateLoader(prepared.data.test, 1)][:_SINGLE]
    return {
        "inputs": whole.inputs, "seconds": round(seconds, 2),
        "bytes": len(whole.content), "bytes_int8": len(small.content),
        **apart(artefact, scorers["onnx"], prepared.data.test),
        **{f"p50_{key}": value for key, value in latencies(scorers, slates).items()},
        **{f"{METRIC}_{key}": value for key, value in quality(scorers, config, prepared.data).items()},
    }  # fmt: skip


def apart(artefact: Artefact, scorer: Scorer, test) -> Dict[str, Any]:
    """Over the test requests: the largest difference of a score, and how many requests are ordered otherwise."""
    largest, moved, count = 0.0, 0, 0
    for slate in SlateLoader(test, 64):
        slate = slate.without_labels()
        expected, found, mask = predict(artefact, slate), scorer(slate), slate.mask.numpy()
        near = np.abs(found - expected) <= TOLERANCE * np.maximum(np.abs(expected), 1)
        moved, count = moved + int((~(near | ~mask)).any(1).sum()), count + len(slate)
        largest = max(largest, float(np.abs(found - expected)[mask].max()))
    return {"difference": largest, "differing": moved, "requests": count}


def latencies(scorers: Dict[str, Scorer], slates: List[Slate]) -> Dict[str, float]:
    """p50 in milliseconds of processor time of one request."""
    for scorer in scorers.values():
        for slate in slates[:10]:
            scorer(slate)
    spent: Dict[str, List[float]] = {name: [] for name in scorers}
    for slate in slates:
        for name, scorer in scorers.items():
            spent[name].append(_milliseconds(scorer, slate))
    return {name: round(float(np.median(values)), 3) for name, values in spent.items()}


def _milliseconds(scorer: Callable, slate: Slate) -> float:
    started = time.process_time()
    scorer(slate)
    return 1000 * (time.process_time() - started)


def quality(scorers: Dict[str, Scorer], config: Config, data) -> Dict[str, float]:
    """:data:`METRIC` of the test requests under torch and under int8."""
    out = {}
    for name in ("torch", "int8"):
        evaluator = CandidateEvaluator(config, data.catalogue.n_items)
        for slate in SlateLoader(data.test, 64):
            evaluator.add_slate(torch.from_numpy(scorers[name](slate.without_labels())), slate)
        out[name] = float(np.mean(evaluator.per_request(METRIC)))
    return out


# ---------------------------------------------------------------------- the page


def tables(found: Dict[str, Any]) -> List[List[str]]:
    """Lines of Markdown: what exports, how fast, and what int8 costs."""
    rows = sorted(found["models"].items(), key=lambda pair: pair[0].lower())
    exported = [(name, row) for name, row in rows if "refusal" not in row]
    what = ["| model | exports | scored otherwise | largest difference | MB | exported in s |", "|---" * 6 + "|"]
    for name, row in rows:
        if "refusal" in row:
            what.append(f"| {name} | no: {row['refusal']} | | | | |")
        else:
            what.append(
                f"| {name} | yes | {row['differing']} of {row['requests']} | {row['difference']:.1e} | "
                f"{row['bytes'] / 1e6:.2f} | {row['seconds']:.1f} |"
            )
    speed = ["| p50, ms | torch | onnxruntime | times faster | int8 |", "|---" * 5 + "|"]
    cost = [f"| {METRIC} | fp32 | int8 | difference | MB fp32 | MB int8 |", "|---" * 6 + "|"]
    for name, row in exported:
        gain = row["p50_torch"] / row["p50_onnx"]
        speed.append(
            f"| {name} | {row['p50_torch']:.2f} | {row['p50_onnx']:.2f} | {gain:.1f} | {row['p50_int8']:.2f} |"
        )
        before, after = 100 * row[f"{METRIC}_torch"], 100 * row[f"{METRIC}_int8"]
        cost.append(
            f"| {name} | {before:.2f} | {after:.2f} | {after - before:+.2f} | {row['bytes'] / 1e6:.2f} | "
            f"{row['bytes_int8'] / 1e6:.2f} |"
        )
    return [what, speed, cost]


if __name__ == "__main__":
    main()
