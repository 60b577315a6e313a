"""The pieces of ``device.sh``: what is checked and measured on a GPU, each written to one JSON file.

    python benchmarks/device_pieces.py PIECE OUT [--device=cuda] [--quick] [--seconds=120]

    contract   the whole contract test of every reranker on the device, fp32 and bf16
    equality   the same weights and requests on CPU and device: logits and lists
    speed      training speed and peak memory of every reranker, DNR beside PRM, and the matmul rate of the device
    runs       complete runs on synthetic and ml-100k, and whether an interrupted and resumed one gives the same numbers
    graphs     a PRM step replayed as a CUDA graph, and compiled
    rows       what is missing of plans (--plans), made by several processes that share the device

One model's failure is written down and the others go on. ``speed`` and ``rows`` continue where they were cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from device_common import RERANKERS, describe, finished, machine, read, write
from device_speed import graphs, speed

from dnr_recbole.experiment.rows import read_rows
from dnr_recbole.quick_start import run_dnr

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small sizes and few models, to try the script itself")
    parser.add_argument("--seconds", type=float, default=120, help="speed: start nothing after this; rows: end then")
    parser.add_argument("--plans", default="results/plan_full.yaml", help="rows: their files, comma-separated")
    parser.add_argument("--processes", type=int, default=12, help="rows: how many share the device")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device here (try --device=cpu --quick)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"{arguments.piece}.json"
    if finished(target):
        print(f"{arguments.piece}: already in {target}")
        return
    started = time.perf_counter()
    result = PIECES[arguments.piece](arguments, target)
    seconds = time.perf_counter() - started
    done = result.pop("complete", True)
    write(target, {**machine(arguments.device), **result, "seconds": round(seconds, 1)}, done=done)
    print(f"{arguments.piece}: {seconds:.0f} s, {target}")


# ---------------------------------------------------------------------- contract


def contract(arguments, target: Path) -> dict:
    """tests/model/test_contract.py on the device, in several processes where pytest-xdist is there."""
    selection = ["-k", "TestPRM or TestMMR"] if arguments.quick else []
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401

        selection += ["-n", "2" if arguments.quick else str(min(12, os.cpu_count() or 1))]
    environment = {
        **os.environ,
        "DNR_TEST_DEVICE": arguments.device,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]),
        "DNR_CONTRACT_FILE": str(target),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "device_recorder"]
    done = subprocess.run([*command, *selection, "tests/model/test_contract.py"], cwd=ROOT, env=environment)
    found = read(target)
    if not found.get("classes"):
        raise SystemExit(f"error: pytest ended with {done.returncode} and reported no test")
    return {"classes": found["classes"]}


# ---------------------------------------------------------------------- equality


def equality(arguments, target: Path) -> dict:
    """Logits and generated lists of every reranker: CPU against device, fp32; device fp32 against bf16."""
    os.environ["DNR_TEST_DEVICE"] = "cpu"
    from dnr_recbole.testing import build, random_slate

    torch.backends.cudnn.allow_tf32 = False
    slate = random_slate(seed=1, batch=64, n=50).without_labels()
    there = slate.to(arguments.device)
    rows = {}
    for name in RERANKERS:
        try:
            model = build(name, n_candidates=50, slate_size=6, embedding_size=32, topk=[6], valid_metric="NDCG@6")
            twin = copy.deepcopy(model).to(arguments.device).eval()
            with torch.no_grad():
                here, fp32 = model(slate), twin(there).float().cpu()
                lists, shown = model.generate(slate), twin.generate(there).cpu()
                with torch.autocast(arguments.device, dtype=torch.bfloat16):
                    bf16 = twin(there).float().cpu()
                    coarse = twin.generate(there).cpu()
            scale = float(here[slate.mask].abs().max().clamp(min=1e-6))
            row = {
                "logit_difference": float((here - fp32)[slate.mask].abs().max()) / scale,
                "equal_lists": float((lists == shown).all(1).float().mean()),
                "bf16_logit_difference": float((fp32 - bf16)[slate.mask].abs().max()) / scale,
                "bf16_equal_lists": float((shown == coarse).all(1).float().mean()),
            }
            # Near ties may fall differently; more than one list in 64 is no tie.
            row["passed"] = row["logit_difference"] < 1e-4 and row["equal_lists"] > 0.98
        except Exception as error:  # one model must not stop the rest
            row = {"passed": False, "error": describe(error)}
        rows[name] = row
        write(target, {"models": rows})
    return {"models": rows}


# ---------------------------------------------------------------------- runs


def runs(arguments, target: Path) -> dict:
    """DNR through both phases, straight and interrupted, with torch's default and with its deterministic algorithms."""
    rows = {}
    small = ["--synthetic_users=300", "--synthetic_items=500"]
    cases = [("synthetic", small, True), ("synthetic", small, False), ("ml-100k", [], False)]
    for dataset, keys, deterministic in cases[:1] if arguments.quick else cases:
        name = f"{dataset}{', deterministic algorithms' if deterministic else ''}"
        try:
            rows[name] = straight_and_resumed(dataset, keys, deterministic, arguments)
        except Exception as error:
            rows[name] = {"error": describe(error)}
        write(target, {"runs": rows})
    return {"runs": rows}


def straight_and_resumed(dataset: str, keys: list, deterministic: bool, arguments) -> dict:
    """Metrics and epochs of both, and whether they are equal to the last bit."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    base = [
        "--model=DNR", f"--dataset={dataset}", "--epochs=4", "--lambda_e=2", "--show_progress=False",
        f"--use_gpu={arguments.device == 'cuda'}", *keys,
    ]  # fmt: skip
    if arguments.quick:
        base += ["--embedding_size=16"]

    class Interrupted(Exception):
        pass

    def interrupt(epoch, score):
        if epoch == 2:  # two epochs are complete on disk
            raise Interrupted

    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # logs and checkpoints go there
        try:
            straight = run_dnr(argv=[*base, "--checkpoint_dir=straight"])["row"]
            try:
                run_dnr(argv=[*base, "--checkpoint_dir=resumed"], callback_fn=interrupt)
                raise RuntimeError("the run that should be interrupted was not")
            except Interrupted:
                pass
            resumed = run_dnr(argv=[*base, "--checkpoint_dir=resumed", "--resume"])["row"]
        finally:
            os.chdir(before)
            torch.use_deterministic_algorithms(False)
    losses = [[epoch["loss"] for epoch in row["history"]] for row in (straight, resumed)]
    return {
        "device": straight["device"],
        "test": straight["test"],
        "seconds_per_epoch": straight["seconds_per_epoch"],
        "seconds": straight["seconds"],
        "equal": straight["test"] == resumed["test"] and losses[0] == losses[1],
        "largest_metric_difference": max(abs(straight["test"][k] - resumed["test"][k]) for k in straight["test"]),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses)),
        "epochs": [len(row) for row in losses],
    }


# ---------------------------------------------------------------------- rows


def rows(arguments, target: Path) -> dict:
    """``compare`` on every plan, in so many processes: each of its runs is made by one of them.

    A training step at these sizes waits for kernels to be launched, so one process leaves most of the device idle. Half
    of the processes begin at each end of the list of plans. Results of PLAN.yaml are in ``PLAN.jsonl`` below OUT.
    """
    plans = [Path("results/plan_first.yaml")] if arguments.quick else [Path(p) for p in arguments.plans.split(",")]
    deadline = time.perf_counter() + arguments.seconds
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(arguments.out), *map(str, plans[:: 1 if number % 2 else -1])],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for number in range(2 if arguments.quick else arguments.processes)
    ]
    codes = []
    for worker in workers:
        try:
            codes.append(worker.wait(max(0.0, deadline - time.perf_counter())))
        except subprocess.TimeoutExpired:
            worker.kill()
            codes.append("cut off")
    lines = {plan.stem: _lines(arguments.out / f"{plan.stem}.jsonl") for plan in plans}
    return {"plans": lines, "processes": codes, "complete": "cut off" not in codes}


_WORKER = """
import sys
from pathlib import Path
from dnr_recbole.errors import DnrError
from dnr_recbole.experiment.compare import compare
for plan in sys.argv[2:]:
    try:
        compare(plan, str(Path(sys.argv[1]) / (Path(plan).stem + ".jsonl")))
    except DnrError as error:
        print(f"error: {plan}: {error}", flush=True)
"""


def _lines(path: Path) -> list:
    """What stands in a file of results, for the summary."""
    return [
        {**{key: line[key] for key in ("setting", "row", "seed")}, "error": line.get("error"),
         "ndcg@6": line.get("test", {}).get("ndcg@6"), "seconds": line.get("seconds")}
        for line in read_rows(str(path))
    ]  # fmt: skip


PIECES = {
    "contract": contract, "equality": equality, "speed": speed, "runs": runs, "graphs": graphs, "rows": rows,
}  # fmt: skip

if __name__ == "__main__":
    main()
