"""Time and memory of turning large inputs of other formats into a request log.

    python benchmarks/bench_convert.py                       # mind, kuairand, recflow; about two minutes
    python benchmarks/bench_convert.py mind --share=0.1

Each input is invented and converted by a command of its own. Printed are its rows, the seconds of a processor that the
command took, so that other jobs on the machine hardly count, and the peak of its resident memory; the last line is
what a command that only lists the formats holds.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import numpy as np
import pandas as pd
import pyarrow.feather

BLOCK = 50_000  # rows or lines that are invented at a time


def mind(path: Path, lines: int, rng: np.random.Generator, shown: int = 37, met: int = 30) -> None:
    """Impressions of one day, one in ten of their candidates clicked."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(lines):
            items = rng.integers(0, 50_000, met + 1)
            first, second = number % 3600 // 60, number % 60
            history = " ".join(f"N{item}" for item in items[:met])
            offered = (items[met] + 1_009 * np.arange(shown)) % 50_000  # distinct
            impressions = " ".join(f"N{item}-{int(click)}" for item, click in zip(offered, rng.random(shown) < 0.1))
            file.write(
                f"{number}\tU{number % 9_000}\t11/15/2019 10:{first:02d}:{second:02d} AM\t{history}\t{impressions}\n"
            )


def kuairand(path: Path, rows: int, rng: np.random.Generator, users: int = 100_000) -> None:
    """Rows in random order of two weeks, so that most requests have one of them."""
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        block = pd.DataFrame({
            "user_id": rng.integers(0, users, size), "video_id": rng.integers(0, 30_000, size),
            "time_ms": rng.integers(0, 14 * 86_400_000, size), "is_click": (rng.random(size) < 0.3).astype(int),
            "tab": rng.integers(0, 3, size),
        })  # fmt: skip
        block.to_csv(path, mode="a", header=start == 0, index=False)


def recflow(path: Path, rows: int, rng: np.random.Generator, candidates: int = 30) -> None:
    """Requests of one day in the order of time."""
    request = np.arange(rows) // candidates
    items = rng.integers(0, 100_000, request[-1] + 1)[request] + 1_009 * (np.arange(rows) % candidates)
    table = pd.DataFrame({
        "request_id": request, "request_timestamp": 1_000 * request, "user_id": request % 10_000, "video_id": items,
        "realshow": (np.arange(rows) % candidates < 6).astype(int), "rank_index": np.arange(rows) % candidates,
        "effective_view": (rng.random(rows) < 0.1).astype(int),
    })  # fmt: skip
    pyarrow.feather.write_feather(table, str(path))


# A process says itself what it held: what wait4 tells counts the parent's memory, too.
CHILD = """
import time
from pathlib import Path
from dnr_recbole.cli import main
code = main()
print(time.process_time(), Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
raise SystemExit(code)
"""
INPUTS: Dict[str, Tuple[Callable[..., None], str, int]] = {  # how it is invented, its file, its rows
    "mind": (mind, "behaviors.tsv", 60_000),
    "kuairand": (kuairand, "log.csv", 2_500_000),
    "recflow": (recflow, "day.feather", 1_500_000),
}


def spent(arguments: List[str]) -> Tuple[float, float]:
    """Seconds of a processor and peak megabytes of ``dnr-recbole convert``."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "convert", *arguments], check=True, capture_output=True, text=True
    )
    seconds, kib = done.stdout.split()[-2:]
    return float(seconds), float(kib) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", choices=[*INPUTS, []], help="default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows of each input (default: 1)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    print("| invented input | rows | seconds of a processor | peak memory, MB |\n|---|---|---|---|", flush=True)
    try:
        for name in arguments.formats or INPUTS:
            invent, file, rows = INPUTS[name]
            rows = int(arguments.share * rows)
            invent(folder / file, rows, np.random.default_rng(0))
            seconds, memory = spent([name, str(folder / file), str(folder / f"{name}.parquet")])
            print(f"| `{name}` | {rows:,} | {seconds:.0f} | {memory:.0f} |", flush=True)
            (folder / file).unlink()
    finally:
        shutil.rmtree(folder)
    print(f"| none | | | {spent([])[1]:.0f} |")


if __name__ == "__main__":
    main()
