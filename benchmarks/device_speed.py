"""Speed on a GPU: training steps of every reranker, the matmul rate beside them, CUDA graphs and compilation."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from bench_train import VARIANTS, Run
from device_common import RERANKERS, describe, read, synchronize, write

from dnr_recbole.config import Config
from dnr_recbole.quick_start import prepare

PRECISIONS = ("bf16", "fp32")


def speed(arguments, target: Path) -> dict:
    """Requests per second of training steps; requests are on the device already, the loader is timed on its own."""
    deadline = time.perf_counter() + arguments.seconds
    batches = (64,) if arguments.quick else (2048, 16384, 8192)  # the middle one if time is left
    dim = 16 if arguments.quick else 128
    users = 60 if arguments.quick else 3000
    base, data = requests(users, dim, arguments.device)
    variants = {**VARIANTS, **{name: (name, {}) for name in RERANKERS if name not in ("PRM", "DNR")}}
    if arguments.quick:
        variants = {name: variants[name] for name in [*VARIANTS, "MMR", "Seq2Slate"]}
    result = read(target)
    rows = result.setdefault("rows", [])
    known = {(row["model"], row["batch"], row["precision"]) for row in rows}
    size = 256 if arguments.quick else 8192
    result["matmul_tflops"] = {p: matmul_rate(arguments.device, p, size) for p in PRECISIONS}
    result.update(embedding_size=dim, candidates=50, skipped=[])
    for batch in batches:
        indices = torch.arange(batch) % len(data.train)
        result.setdefault("loader_requests_per_second", {})[str(batch)] = loader_rate(data, indices, arguments.device)
        slate = data.train.slate(indices).to(arguments.device)
        for precision in PRECISIONS:
            for name, (model, overrides) in variants.items():
                if (name, batch, precision) in known:
                    continue
                if time.perf_counter() > deadline:
                    result["skipped"].append([name, batch, precision])
                    continue
                row = {"model": name, "batch": batch, "precision": precision}
                try:
                    row.update(train_rate(model, {**overrides, "precision": precision}, base, data, slate, arguments))
                except Exception as error:  # out of memory, say: one model must not stop the rest
                    row["error"] = describe(error)
                rows.append(row)
                write(target, result)
    return result


def requests(users: int, dim: int, device: str):
    """Command line and data of a generated world with six training requests per user."""
    base = [
        "--dataset=synthetic", "--show_progress=False", f"--embedding_size={dim}", f"--use_gpu={device == 'cuda'}",
        f"--synthetic_users={users}", "--synthetic_items=3000", "--synthetic_requests_per_user=8",
    ]  # fmt: skip
    return base, prepare(Config("PRM", argv=base)).data


def train_rate(model, overrides, base, data, slate, arguments) -> dict:
    """Median time of a batch with all its optimiser steps, for about a second at most."""
    cuda = arguments.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = Run(model, overrides, base, data)
    for _ in range(1 if arguments.quick else 2):
        run.train(slate, count=False)
    started = time.perf_counter()
    while len(run.seconds) < 2 or (len(run.seconds) < 10 and time.perf_counter() - started < 0.6):
        run.train(slate, count=True)
    median = statistics.median(run.seconds)
    return {
        "requests_per_second": len(slate) / median,
        "milliseconds": 1000 * median,
        "spread": max(run.seconds) / min(run.seconds),
        "memory_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }


def loader_rate(data, indices, device: str) -> float:
    """Requests per second from the candidate table to the device."""
    seconds = []
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        data.train.slate(indices).to(device, non_blocking=True)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return len(indices) / statistics.median(seconds[1:])


def matmul_rate(device: str, precision: str, size: int) -> float:
    """TFLOP/s of a square product of random matrices."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


# ---------------------------------------------------------------------- graphs


def graphs(arguments, target: Path) -> dict:
    """Milliseconds of a PRM training step: as it is, as a replayed CUDA graph, and compiled."""
    base, data = requests(600, 16 if arguments.quick else 128, arguments.device)
    rows = []
    # Graphs last: a failed recording may leave the device unusable for the rest of the process.
    for name, make in (("eager", eager_step), ("compiled", compiled_step), ("graph", graph_step)):
        for batch in (32,) if arguments.quick else (256, 2048):
            if name != "eager" and arguments.device == "cpu":
                continue
            slate = data.train.slate(torch.arange(batch) % len(data.train)).to(arguments.device)
            row = {"variant": name, "batch": batch}
            try:
                started = time.perf_counter()
                step = make(Run("PRM", {"score_fusion": "concat", "precision": "bf16"}, base, data), slate)
                row["preparation_seconds"] = time.perf_counter() - started
                row["milliseconds"] = 1000 * step_seconds(step, arguments.device)
            except Exception as error:
                row["error"] = describe(error)
            rows.append(row)
            write(target, {"steps": rows})
    return {"steps": rows}


def eager_step(run: Run, slate):
    """The step that training takes."""
    return train_step(run, slate, run.model.calculate_loss, torch.optim.Adam(run.groups["reranker"], lr=1e-3))


def compiled_step(run: Run, slate):
    """The same with encoding, scoring and loss compiled."""
    loss = torch.compile(run.model.calculate_loss)
    step = train_step(run, slate, loss, torch.optim.Adam(run.groups["reranker"], lr=1e-3))
    step()  # compiles
    return step


def graph_step(run: Run, slate):
    """The whole step, optimiser included, recorded once."""
    step = train_step(
        run, slate, run.model.calculate_loss, torch.optim.Adam(run.groups["reranker"], lr=1e-3, capturable=True)
    )
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay():
        graph.replay()

    replay.keep = step  # weights and requests, which the graph reads by address
    return replay


def train_step(run: Run, slate, loss, optimizer):
    """A function that takes one step; autocast keeps no copies of weights, which a recorded graph would reuse."""

    def step():
        with torch.autocast(slate.device.type, dtype=torch.bfloat16, cache_enabled=False):
            value = loss(slate)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


def step_seconds(step, device: str) -> float:
    seconds = []
    for _ in range(15):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[5:])
