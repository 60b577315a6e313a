"""Time and memory of ranking a file of requests: by one process, and in parts by the processes of a Ray cluster.

    python benchmarks/bench_ray.py 100000 1000000 --folder=/tmp/bench_ray

A row is a request of 50 candidates (list form, row groups of 20,000), the model a small PRM. Each command runs as a
process of its own, with one thread, from its start to its end; the cluster is up before it starts, with one node of one
CPU for each worker. Memory is the peak of what is anonymous (what cannot be given back to the page cache): of the
command, and of the largest worker. With ``--passes`` the medians are printed.
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
from typing import Dict, Iterator, List, NamedTuple, Optional

import pyarrow.parquet as pq
from bench_log import generate

_TRAINED_ON = 10_000  # requests
_EVERY = 0.05  # seconds between two looks at the memory


class Measured(NamedTuple):
    """Seconds, and MiB of the command and of the largest worker."""

    seconds: float
    command: float
    worker: float


def command(*arguments: object) -> List[str]:
    return [sys.executable, "-m", "dnr_recbole", *map(str, arguments)]


def measure(arguments: List[str]) -> Measured:
    """Run a command and watch it and all workers that this process has started."""
    started, peak = time.time(), {"command": 0.0, "worker": 0.0}
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY):
            for pid, (name, mib) in anonymous(os.getpid()).items():
                kind = "command" if pid == process.pid else "worker" if name.startswith("ray::") else ""
                if kind:
                    peak[kind] = max(peak[kind], mib)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.time() - started
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return Measured(seconds, **peak)


def anonymous(root: int) -> Dict[int, tuple]:
    """Title and anonymous MiB of all living descendants of a process."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            status = (folder / "status").read_text()
            parents[int(folder.name)] = int(status.split("PPid:")[1].split()[0])
            title = (folder / "cmdline").read_text().replace("\0", " ")
            found[int(folder.name)] = title, int(status.split("RssAnon:")[1].split()[0]) / 1024

    def descends(pid: Optional[int]) -> bool:
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


def train(folder: Path) -> Path:
    generate(folder / "log.parquet", _TRAINED_ON)
    keys = ["--model=PRM", "--embedding_size=16", "--epochs=1", "--baselines=[]", "--use_gpu=False"]
    subprocess.run(command("fit", "log.parquet", "--out=model", *keys), cwd=folder, check=True, capture_output=True)
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--folder", default="/tmp/bench_ray")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--passes", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(arguments.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = train(folder)
    print("| requests | by | seconds | the command, MiB | a worker, MiB |")
    print("|---|---|---|---|---|", flush=True)
    for size in arguments.sizes:
        requests = folder / f"{size}.parquet"
        generate(requests, size, seed=1)
        for workers in [0, *arguments.workers]:
            with cluster(workers) if workers else contextlib.nullcontext() as address:
                passes = []
                for _ in range(arguments.passes):
                    out = folder / ("ranked" if workers else "ranked.parquet")
                    shutil.rmtree(folder / "ranked", ignore_errors=True)
                    more = [f"--ray={address}"] if workers else []
                    passes.append(measure(command("rank", model, requests, out, *more)))
            assert pq.read_table(out, columns=["rank"]).num_rows == size * 50
            found = Measured(*map(median, zip(*passes)))
            by = f"`--ray`, {workers} worker{'s' * (workers > 1)}" if workers else "`rank`"
            worker = f"{found.worker:,.0f}" if workers else ""
            print(f"| {size:,} | {by} | {found.seconds:,.0f} | {found.command:,.0f} | {worker} |", flush=True)
        requests.unlink()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
