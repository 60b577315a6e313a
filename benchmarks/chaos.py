"""Kill, corrupt, collide and starve runs: every try must end in the right number or in one clear line.

    python benchmarks/chaos.py                              # 240 tries, about ten minutes on two cores
    python benchmarks/chaos.py --tries=40 --kinds=kill,disk --seed=3
    python benchmarks/chaos.py --only=kill:17 --keep        # one of them again, its folder stays

Kinds: **kill** sends signals at random moments to runs, their workers, compare and tune; **corrupt** damages
checkpoints, cache entries, results, plans and logs; **concurrent** starts processes that share folders; **disk** fills
disks or makes them read-only. A try is right if every process in it ended with exit code 0 and exactly the numbers
of an undisturbed run, or with another code and one line that begins with "error:" or "interrupted"; if a later
undisturbed command gives exactly those numbers; and if no traceback, no half-written result, no temporary file and no
process stays.

The table counts tries; "number" and "line" say how the disturbed process ended. Exit code 1 if any try is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Tuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forks are only safe without threads

from chaos_lab import Lab, Process, Wrong, own_mounts, read_row  # noqa: E402
from chaos_trials import COMPARE, KINDS, OTHER_PLAN, RUNS, STORED, TABLE, command, furnish, tune  # noqa: E402

REAL_EVERY = 9  # one try in so many begins with a real `python run_dnr.py`

Number = Tuple[str, int]  # kind, number of the try


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=60, help="of each kind (default: 60)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"default: {','.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="a single try, e.g. kill:17")
    parser.add_argument("--jobs", type=int, default=2, help="tries at a time (default: 2)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all tries, not of the wrong ones only")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if set(kinds) - set(KINDS):
        parser.error(f"kinds: {', '.join(KINDS)}")
    numbers = [(kind, n) for n in range(arguments.tries) for kind in kinds]
    if arguments.only:
        kind, _, n = arguments.only.partition(":")
        numbers = [(kind, int(n))]

    started, folder = time.time(), Path(tempfile.mkdtemp(prefix="chaos-"))
    can_mount = own_mounts()
    if not can_mount:
        print("disks cannot be mounted here: the size of files is limited instead, and nothing is read-only")
    try:
        _import_everything(folder / "warm")
        references = prepare(folder)
        print(f"{len(RUNS) + 2} undisturbed references in {time.time() - started:.0f} s; tries in {folder}", flush=True)
        outcomes = _all_tries(numbers, arguments, folder, references, can_mount)
    except Wrong as error:
        print(f"an undisturbed run fails: {error}")
        return 1
    wrong = [outcome for outcome in outcomes if outcome["end"] == "wrong"]
    print_table(outcomes)
    print(f"seed {arguments.seed}, {len(outcomes)} tries, {len(wrong)} wrong, {time.time() - started:.0f} s")
    if not wrong and not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong or len(outcomes) < len(numbers) else 0


def _import_everything(folder: Path) -> None:
    """All that a run imports, so that forks need not: by a run."""
    import hyperopt  # noqa: F401

    import dnr_recbole.experiment.compare  # noqa: F401
    import dnr_recbole.experiment.table  # noqa: F401
    import dnr_recbole.hyper  # noqa: F401
    from dnr_recbole.quick_start import run_dnr

    before = os.getcwd()
    furnish(folder)
    os.chdir(folder)
    try:
        run_dnr(argv=command("dnr", log_dir=None, tensorboard_dir=None, state="error", epochs=2)[1:])
    finally:
        os.chdir(before)


# ---------------------------------------------------------------------- references


def prepare(folder: Path) -> Dict[str, Any]:
    """Undisturbed runs: rows by name, and the folders of those that tries begin from."""
    references: Dict[str, Any] = {"loaded": []}
    for name in RUNS:
        lab = Lab(folder / "stored" / name, references, random.Random(0))
        furnish(lab.root)
        seconds, _ = _timed(lab, command(name))
        references[name] = {"row": read_row(lab.root / "result.json"), "seconds": seconds}
        if name in STORED:
            for path in sorted((lab.root / "saved").glob("*.pth")):
                references["loaded"].append(_timed(lab, ["load", f"saved/{path.name}"])[1].said("out"))
        shutil.rmtree(lab.root / "said")
    lab = Lab(folder / "stored" / "real", references, random.Random(0), real=True)
    furnish(lab.root)
    references["real"] = max(0.0, _timed(lab, command("prm"))[0] - references["prm"]["seconds"])
    lab.right_row("prm")

    lab = Lab(folder / "stored" / "plan", references, random.Random(0))
    furnish(lab.root)
    (lab.root / "plan.yaml").write_text(json.dumps(OTHER_PLAN))
    _timed(lab, COMPARE)
    (lab.root / "rows.jsonl").rename(lab.root / "others.jsonl")
    shutil.rmtree(lab.root / "cache")
    furnish(lab.root)
    seconds, _ = _timed(lab, COMPARE)
    lines = [json.loads(text) for text in (lab.root / "rows.jsonl").read_text().splitlines()]
    shown = _timed(lab, TABLE)[1].said("out")
    references["plan"] = {"lines": {line["identity"]: line for line in lines}, "seconds": seconds, "table": shown}
    for name in ("said", "saved", "cache"):
        shutil.rmtree(lab.root / name, ignore_errors=True)

    lab = Lab(folder / "stored" / "tune", references, random.Random(0))
    furnish(lab.root)
    seconds, _ = _timed(lab, tune())
    references["tune"] = {"row": read_row(lab.root / "tuned.json"), "seconds": seconds}
    return references


def _timed(lab: Lab, argv: List[str]) -> Tuple[float, Process]:
    started = time.monotonic()
    process = lab.run(argv)
    seconds = time.monotonic() - started
    try:
        if lab.judge(process) != "number":
            raise Wrong("it is refused")
    except Wrong as error:
        raise Wrong(f"{error}\n{process.report()}") from None
    return seconds, process


# ---------------------------------------------------------------------- tries


def _all_tries(numbers: List[Number], arguments, folder: Path, references, can_mount: bool) -> List[Dict[str, Any]]:
    """Shares the tries among ``jobs`` forks; prints what is wrong as soon as it is known."""
    jobs = []
    for job in range(arguments.jobs):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
            with os.fdopen(writing, "w") as file:
                for number in numbers[job :: arguments.jobs]:
                    outcome = one_try(number, arguments, folder, references, can_mount)
                    file.write(json.dumps(outcome) + "\n")
                    file.flush()
            os._exit(0)
        os.close(writing)
        jobs.append((pid, reading))
    outcomes = []
    for pid, reading in jobs:
        with os.fdopen(reading) as file:
            outcomes += [json.loads(line) for line in file]
        os.waitpid(pid, 0)
    return sorted(outcomes, key=lambda outcome: (outcome["kind"], outcome["number"]))


def one_try(number: Number, arguments, folder: Path, references, can_mount: bool) -> Dict[str, Any]:
    """The outcome of a try; the same for the same seed and number, but for the speed of the machine."""
    kind, n = number
    rng = random.Random(f"{arguments.seed} {kind} {n}")
    trials = KINDS[kind]
    trial = rng.choices(list(trials), list(trials.values()))[0]
    lab = Lab(folder / f"{kind}-{n}", references, rng, real=n % REAL_EVERY == 0, can_mount=can_mount)
    furnish(lab.root)
    outcome = {"kind": kind, "number": n, "trial": trial.__name__, "real": lab.real}
    started = time.time()
    try:
        outcome["end"] = trial(lab)
    except Wrong as error:
        outcome.update(end="wrong", why=str(error))
    except Exception:  # a fault of this script is no right end, either
        outcome.update(end="wrong", why=traceback.format_exc())
    if outcome["end"] == "wrong":
        reports = "\n".join(process.report() for process in lab.processes)
        print(f"\nWRONG {kind}:{n} {trial.__name__}, in {lab.root}: {outcome['why']}\n{reports}", flush=True)
    lab.close(keep=arguments.keep or outcome["end"] == "wrong")
    outcome["seconds"] = time.time() - started
    return outcome


def print_table(outcomes: List[Dict[str, Any]]) -> None:
    """A line per kind and per trial."""
    print(f"\n{'':<30}{'tries':>8}{'real':>8}{'number':>8}{'line':>8}{'WRONG':>8}{'s/try':>8}")
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome["kind"] == kind]
        names = [kind, *(trial.__name__ for trial in KINDS[kind])] if of_kind else []
        for name in names:
            chosen = [outcome for outcome in of_kind if name in (kind, outcome["trial"])]
            ends = Counter(outcome["end"] for outcome in chosen)
            real = sum(outcome["real"] for outcome in chosen)
            each = sum(outcome["seconds"] for outcome in chosen) / max(len(chosen), 1)
            label = name if name == kind else f"  {name}"
            print(
                f"{label:<30}{len(chosen):>8}{real:>8}{ends['number']:>8}{ends['line']:>8}{ends['wrong']:>8}{each:>8.1f}"
            )


if __name__ == "__main__":
    sys.exit(main())
