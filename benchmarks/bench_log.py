"""Time and memory of turning a request log into tensors: does it scale?

    python benchmarks/bench_log.py 10000 100000 1000000 --folder=/tmp/bench_log

For each number of requests a log of 50 candidates each is generated (list form, parquet, streamed), and built in a
process of its own; printed are seconds, the peak of anonymous memory (what cannot be given back to the page cache), and
the sizes on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

N, ITEMS, BLOCK = 50, 100_000, 20_000


def generate(path: Path, n_requests: int, seed: int = 0) -> None:
    """Clicks follow a noisy score; 10 requests per user, ids are texts."""
    rng = np.random.default_rng(seed)
    n_users, writer = max(1, n_requests // 10), None
    for start in range(0, n_requests, BLOCK):
        size = min(BLOCK, n_requests - start)
        score = rng.random((size, N), dtype=np.float32)
        label = (rng.random((size, N), dtype=np.float32) < 0.08 * score).astype(np.int8)
        first = rng.integers(0, ITEMS, (size, 1))
        items = (first + np.arange(N) * 1_999) % ITEMS  # distinct
        offsets = pa.array(np.arange(0, size * N + 1, N, dtype=np.int32))
        names = pa.array([f"i{i}" for i in range(ITEMS)])
        columns = {
            "request_id": pa.array(np.arange(start, start + size)),
            "user_id": pa.array(rng.integers(0, n_users, size)),
            "timestamp": pa.array(np.arange(start, start + size)),
            "item_id": pa.ListArray.from_arrays(offsets, names.take(pa.array(items.ravel()))),
            "score": pa.ListArray.from_arrays(offsets, pa.array(score.ravel())),
            "label": pa.ListArray.from_arrays(offsets, pa.array(label.ravel())),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    writer.close()


def build(path: str, cache: str) -> None:
    """The child: build and report as JSON."""
    from dnr_recbole.config import Config
    from dnr_recbole.requestlog.building import build as build_log
    from dnr_recbole.requestlog.request_log import RequestLog

    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            text = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(text.split("RssAnon:")[1].split()[0]))

    watcher = threading.Thread(target=watch)
    config = Config("PRM", config_dict={"requests": path, "cache_dir": cache, "affinity_spaces": ["svd", "covisit"]})
    os.makedirs(cache, exist_ok=True)
    watcher.start()
    started = time.time()
    built = build_log(config, RequestLog.of(config))
    seconds = time.time() - started
    started = time.time()
    slate = built.data.train.slate(np.arange(2048) % len(built.data.train))
    done.set()
    watcher.join()
    print(json.dumps({
        "seconds": seconds, "anonymous_mib": peak[0] / 1024, "batch_ms": 1000 * (time.time() - started),
        "training_requests": len(built.data.train), "candidates": tuple(slate.candidates.shape),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", default="/tmp/bench_log")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build(*arguments.build)
        return
    print("| requests | log, MiB | tensors, MiB | seconds | anonymous memory, MiB | first batch, ms |")
    print("|---|---|---|---|---|---|", flush=True)
    for size in arguments.sizes:
        folder = Path(arguments.folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log, cache = folder / "log.parquet", folder / "cache"
        generate(log, size)
        command = [sys.executable, __file__, "--build", str(log), str(cache)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        tensors = sum(path.stat().st_size for path in cache.rglob("*.npy"))
        print(
            f"| {size:,} | {log.stat().st_size / 2**20:,.0f} | {tensors / 2**20:,.0f} | {found['seconds']:,.0f} | "
            f"{found['anonymous_mib']:,.0f} | {found['batch_ms']:.0f} |",
            flush=True,
        )
    shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
