"""Two trainings at once on one machine, with idle threads that spin and with idle threads that sleep.

    python benchmarks/bench_neighbours.py [--steps=40] [--threads=2]

Each training is a process of its own (PRM, d = 64, batches of 256 generated requests). Milliseconds per step: alone and
beside a second one, under OMP_WAIT_POLICY=ACTIVE, under PASSIVE, and with what the commands set themselves; the median
of three rounds, in which they take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

CHILD = """
import sys, time, statistics
sys.path.insert(0, {folder!r})
if {ours}:
    from dnr_recbole.threads import be_a_good_neighbour
    be_a_good_neighbour()
from bench_train import Config, Run, SlateLoader, prepare
base = ["--dataset=synthetic", "--show_progress=False", "--synthetic_users=300", "--synthetic_items=3000",
        "--embedding_size=64", "--train_batch_size=256"]
data = prepare(Config("PRM", argv=base)).data
run = Run("PRM", {{}}, base, data)
slates = list(SlateLoader(data.train, 256, shuffle=True))
for number in range(5):
    run.train(slates[number % len(slates)], count=False)
print("ready", flush=True)
sys.stdin.readline()
for number in range({steps}):
    run.train(slates[number % len(slates)], count=True)
print(statistics.median(run.seconds) * 1000, flush=True)
"""


def measure(processes: int, policy: str, steps: int, threads: int) -> float:
    """Milliseconds per step, mean over ``processes`` that begin together; ``policy`` "ours" is the commands' own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_NUM_THREADS"] = str(threads)
    if policy != "ours":
        environment["OMP_WAIT_POLICY"] = policy
    code = CHILD.format(folder=os.path.dirname(os.path.abspath(__file__)), ours=policy == "ours", steps=steps)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(processes)
    ]  # fmt: skip
    for child in children:
        if "ready" not in child.stdout.readline():
            raise SystemExit("a training could not begin")
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    return statistics.mean(float(child.communicate()[0]) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2, help="of each training")
    arguments = parser.parse_args()
    print("| | alone, ms a step | beside another, ms a step |\n|---|---|---|")
    kinds = [(policy, count) for policy in ("ACTIVE", "PASSIVE", "ours") for count in (1, 2)]
    rounds = [{each: measure(each[1], each[0], arguments.steps, arguments.threads) for each in kinds} for _ in range(3)]
    for policy in ("ACTIVE", "PASSIVE", "ours"):
        cells = [f"{statistics.median(found[policy, count] for found in rounds):.0f}" for count in (1, 2)]
        print(f"| {policy} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
