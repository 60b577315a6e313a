"""Time and memory of ranking a file of requests: by one process, and in parts by the processes of a Ray cluster.

    python benchmarks/bench_ray.py 100000 1000000 10000000 --folder=/tmp/bench_ray

A row is one of the 50 candidates of a request (row groups of 250,000), the model a small PRM. Each command runs as a
process of its own with one thread; the cluster is up before it starts, with one node of one CPU for each worker.
Seconds are those of the whole command by the clock; CPU seconds are its own and its workers', and depend less on what
else the machine does. Memory is the peak of what is anonymous (what cannot be given back to the page cache): of the
command, and of the largest worker.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Dict, Iterator, List, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_log import ITEMS, N
from bench_log import generate as generate_lists

_TRAINED_ON = 10_000  # requests
_GROUP = 250_000  # rows
_EVERY = 0.05  # seconds between two looks at the processes
_TICKS = os.sysconf("SC_CLK_TCK")


class Measured(NamedTuple):
    """Seconds by the clock and of all CPUs, and MiB of the command and of the largest worker."""

    seconds: float
    cpu: float
    command: float
    worker: float


class Process(NamedTuple):
    """A process as it is now: its title, anonymous MiB, CPU seconds since it began."""

    title: str
    mib: float
    cpu: float


def command(*arguments: object) -> List[str]:
    return [sys.executable, "-m", "dnr_recbole", *map(str, arguments)]


def measure(arguments: List[str]) -> Measured:
    """Run a command and watch it and all workers that this process has started."""
    started, peak, spent = time.time(), {"command": 0.0, "worker": 0.0}, {}
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY):
            for pid, found in descendants(os.getpid()).items():
                kind = "command" if pid == process.pid else "worker" if found.title.startswith("ray::") else ""
                if kind:
                    peak[kind], spent[pid] = max(peak[kind], found.mib), found.cpu

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.time() - started
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return Measured(seconds, sum(spent.values()), **peak)


def descendants(root: int) -> Dict[int, Process]:
    """All living descendants of a process."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            pid, stat = int(folder.name), (folder / "stat").read_text().rpartition(")")[2].split()
            parents[pid] = int(stat[1])
            mib = int((folder / "status").read_text().split("RssAnon:")[1].split()[0]) / 1024
            title = (folder / "cmdline").read_text().replace("\0", " ")
            found[pid] = Process(title, mib, (int(stat[11]) + int(stat[12])) / _TICKS)

    def descends(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == root:
                return True
        return False

    return {pid: each for pid, each in found.items() if descends(pid)}


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[str]:
    """A cluster of one node for each worker, all on this machine; its address."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(workers - 1):
            nodes.add_node(**node)
        yield nodes.address
    finally:
        nodes.shutdown()


def generate(path: Path, rows: int, seed: int = 1) -> None:
    """Requests in the long form, ids are numbers and texts."""
    rng, writer = np.random.default_rng(seed), None
    names = pa.array([f"i{i}" for i in range(ITEMS)])
    for start in range(0, rows, _GROUP):
        request = (start + np.arange(min(_GROUP, rows - start))) // N
        first = rng.integers(0, ITEMS, len(request) // N + 1)[request - request[0]]
        table = pa.table({
            "request_id": request,
            "user_id": request % 10_007,
            "item_id": names.take(pa.array((first + np.arange(len(request)) % N * 1_999) % ITEMS)),
            "score": rng.random(len(request), dtype=np.float32),
        })  # fmt: skip
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    writer.close()


def train(folder: Path) -> Path:
    generate_lists(folder / "log.parquet", _TRAINED_ON)
    keys = ["--model=PRM", "--embedding_size=16", "--epochs=1", "--baselines=[]", "--use_gpu=False"]
    subprocess.run(command("fit", "log.parquet", "--out=model", *keys), cwd=folder, check=True, capture_output=True)
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000], metavar="rows")
    parser.add_argument("--folder", default="/tmp/bench_ray")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--passes", type=int, default=1, help="the medians of so many are printed")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(arguments.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = train(folder)
    print("| rows | by | seconds | CPU seconds | the command, MiB | a worker, MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    for size in arguments.sizes:
        requests = folder / f"{size}.parquet"
        generate(requests, size)
        for workers in [0, *arguments.workers]:
            with cluster(workers) if workers else contextlib.nullcontext() as address:
                passes = []
                for _ in range(arguments.passes):
                    out = folder / ("ranked" if workers else "ranked.parquet")
                    shutil.rmtree(folder / "ranked", ignore_errors=True)
                    more = [f"--ray={address}"] if workers else []
                    passes.append(measure(command("rank", model, requests, out, *more)))
            assert pq.read_table(out, columns=["rank"]).num_rows == size
            found = Measured(*map(median, zip(*passes)))
            by = f"`--ray`, {workers} worker{'s' * (workers > 1)}" if workers else "`rank`"
            worker = f"{found.worker:,.0f}" if workers else ""
            times = f"{found.seconds:,.0f} | {found.cpu:,.0f}"
            print(f"| {size:,} | {by} | {times} | {found.command:,.0f} | {worker} |", flush=True)
        requests.unlink()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
