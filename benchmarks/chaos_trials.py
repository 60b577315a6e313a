"""What chaos.py does to runs: four kinds of trouble, each a list of trials.

A trial is a function of a :class:`~chaos_lab.Lab`. It returns "number" if what was disturbed gave the right number in
the end, "line" if it refused or stopped with one clear line; then, too, the run that follows gave the right number.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import yaml
from chaos_lab import Lab, Process, Wrong, read_row, same_row, write_log

KEYS = {
    "dataset": "small", "data_path": "data", "checkpoint_dir": "saved", "cache_dir": "cache", "log_dir": "log",
    "tensorboard_dir": "board", "use_gpu": False, "n_candidates": 12, "embedding_size": 8, "train_batch_size": 64,
    "dropout": 0.1, "topk": [1, 6], "retriever_args": {"epochs": 1, "embedding_size": 4}, "epochs": 4, "model": "PRM",
}  # fmt: skip
# Undisturbed runs, by name: what each adds to KEYS.
RUNS: Dict[str, Dict[str, Any]] = {
    "prm": {},
    "prm-e2": {"epochs": 2},
    "prm-e6": {"epochs": 6},
    "prm-lr": {"learning_rate": 0.01},
    "prm-worker": {"worker": 1, "show_progress": False, "state": "warning"},
    "prm-other": {"data_path": "other"},
    "prm-nproc": {"nproc": 2},
    "dnr": {"model": "DNR", "backbone": "PRM", "lambda_e": 1},
    "retrieved": {"model": "MiDNN", "protocol": "retrieved", "split": "user", "label_window": 6, "epochs": 3},
}
STORED = ("prm", "prm-e2", "prm-lr", "dnr")  # whose folders are kept to begin from
PLAN = {
    "fixed": KEYS,
    "search": {"learning_rate": [0.001, 0.01]},
    "seeds": [1, 2],
    "rows": {"PRM": {}, "MiDNN": {"model": "MiDNN", "learning_rate": 0.005}},
}
OTHER_PLAN = {**PLAN, "seeds": [3], "search": {}}
COMPARE = ["compare", "plan.yaml", "rows.jsonl"]
TABLE = ["table", "plan.yaml", "rows.jsonl"]
TUNE = ["tune", "--params_file=params.txt", "--algo=exhaustive", "--output_file=tuned.json"]
PARAMS = "learning_rate choice [0.001, 0.01]\ndropout choice [0.0, 0.2]\n"
RESUME = "--resume"

Trial = Callable[[Lab], str]


def options(keys: Dict[str, Any]) -> List[str]:
    return [
        f"--{name}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}" for name, value in keys.items()
    ]


def command(name: str, **more: Any) -> List[str]:
    return ["run", *options({**KEYS, "result_file": "result.json", **RUNS[name], **more})]


def tune() -> List[str]:
    return [*TUNE, *options(KEYS)]


def furnish(folder: Path) -> None:
    """The inputs of all commands."""
    write_log(folder / "data" / "small" / "small.inter", 1)
    write_log(folder / "other" / "small" / "small.inter", 2)
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    (folder / "params.txt").write_text(PARAMS)


# ---------------------------------------------------------------------- kill


def _disturbed(lab: Lab, argv: List[str], name: str) -> Process:
    """A command that a signal hits at a moment drawn from its duration."""
    real = lab.real and not lab.processes
    duration = lab.references[name]["seconds"] + (lab.references["real"] if real else 0.0)
    process = lab.start(argv)
    time.sleep(lab.rng.uniform(0.3 if real else 0.0, 1.1 * duration))
    number = lab.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    process.send(number, group=lab.rng.random() < 0.3)
    return process.wait()


def _end(lab: Lab, process: Process) -> str:
    return "line" if lab.judge(process) == "line" else "number"


def kill_run(lab: Lab) -> str:
    """Once to three times, from the beginning on."""
    name, end = lab.rng.choice(["prm", "dnr", "retrieved"]), "number"
    for n in range(lab.rng.choice([1, 1, 1, 2, 3])):
        end = _end(lab, _disturbed(lab, command(name) + [RESUME] * (n > 0), name))
        lab.no_half_result(name)
    lab.recovered(command(name) + [RESUME] * (lab.rng.random() < 0.8), name)
    return end


def kill_restart(lab: Lab) -> str:
    """A finished run is started again, without or with more epochs."""
    stored, name, resumed = lab.rng.choice([("prm", "prm", False), ("dnr", "dnr", False), ("prm-e2", "prm", True)])
    lab.begin_from(stored)
    end = _end(lab, _disturbed(lab, command(name) + [RESUME] * resumed, name))
    lab.no_half_result(stored, name)
    lab.recovered([*command(name), RESUME], name)
    return end


def kill_workers(lab: Lab) -> str:
    """A run in two processes: its parent or one of the workers."""
    name = "prm-nproc"
    if lab.rng.random() < 0.4:
        end = _end(lab, _disturbed(lab, command(name), name))
    else:
        process = lab.start(command(name))
        time.sleep(lab.rng.uniform(0.3, 1.0) * lab.references[name]["seconds"])
        workers = [pid for pid in process.family() if pid != process.pid]
        if workers:
            os.kill(lab.rng.choice(workers), lab.rng.choice([signal.SIGKILL, signal.SIGTERM]))
        end = _end(lab, process.wait())
    lab.no_half_result(name)
    lab.recovered([*command(name), RESUME], name)
    return end


def kill_compare(lab: Lab) -> str:
    end = _end(lab, _disturbed(lab, COMPARE, "plan"))
    lab.right_lines(whole=False)
    _compared(lab)
    return end


def kill_tune(lab: Lab) -> str:
    end = _end(lab, _disturbed(lab, tune(), "tune"))
    if lab.judge(lab.run(tune())) != "number":
        raise Wrong("the rerun fails")
    same_row(read_row(lab.root / "tuned.json"), lab.references["tune"]["row"])
    lab.nothing_temporary()
    return end


def _compared(lab: Lab, argv: Optional[List[str]] = None) -> None:
    if lab.judge(lab.run(argv or COMPARE)) != "number":
        raise Wrong("the rerun fails")
    lab.right_lines()
    lab.nothing_temporary()


# ---------------------------------------------------------------------- corrupt


def damage(rng: random.Random, path: Path, other: Optional[Path] = None) -> str:
    """Spoil a file in one of many ways; returns which."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content)) if content else 0
    kind = rng.choice(["flip", "flip", "truncate", "zero", "garbage", "append", *["swap"] * (other is not None)])
    if kind == "flip" and content:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[rng.choice([0, at, at, len(content) - 1]) :]
    elif kind == "zero":
        size = len(content[at : at + rng.choice([1, 16, 512])])
        content[at : at + size] = bytes(size)
    elif kind == "garbage":
        content = bytearray(rng.randbytes(rng.choice([1, 100, len(content)])))
    elif kind == "append":
        content += rng.randbytes(rng.choice([1, 100]))
    elif kind == "swap":
        content = other.read_bytes()
    path.write_bytes(content)
    return kind


def _as_told(lab: Lab, process: Process, argv: List[str], name: str) -> None:
    """Follow the line with which a process refused; then the right number comes."""
    reason = process.reasons()[0]
    if "delete it" in reason:
        named = [lab.root / word.strip(":;,()'") for word in reason.split() if "/" in word]
        named = [path for path in named if path.exists() and path != lab.root]
        if not named:
            raise Wrong("it says what to delete, but names nothing that exists")
        entry = named[0] if named[0].suffix == ".pth" or named[0].is_dir() else named[0].parent
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    lab.recovered([word for word in argv if word != RESUME], name)


def corrupt_checkpoint(lab: Lab) -> str:
    """The best model or the last state; then resume, go on to more epochs, train again, or load."""
    stored = lab.rng.choice(["prm", "dnr"])
    lab.begin_from(stored)
    best, last = sorted((lab.root / "saved").glob("*.pth"), key=lambda path: "-last" in path.name)
    twins = sorted((lab.stored("prm-lr") / "saved").glob("*.pth"), key=lambda path: "-last" in path.name)
    action = lab.rng.choice(["resume", "resume", "longer", "rerun", "load"])
    if lab.rng.random() < 0.15:
        shutil.copy(twins[0], best)
        shutil.copy(twins[1], last)
        action = lab.rng.choice(["resume", "longer"])
    else:
        spoilt = lab.rng.randrange(2)
        damage(lab.rng, [best, last][spoilt], twins[spoilt])
    if action == "load":
        process = lab.run(["load", str(best if lab.rng.random() < 0.8 else last)])
        if lab.judge(process) == "line":
            return "line"
        if process.said("out") not in lab.references["loaded"]:
            raise Wrong("a damaged model was loaded")
        return "number"
    name = "prm-e6" if action == "longer" and stored == "prm" else stored
    argv = command(name) + [RESUME] * (action != "rerun")
    return _right_or_told(lab, argv, name)


def corrupt_cache(lab: Lab) -> str:
    """A fitted retriever or a candidate table; then train, resume, or compare."""
    stored = lab.rng.choice(["prm", "dnr"])
    lab.begin_from(stored)
    files = sorted(path for path in (lab.root / "cache").glob("*/*") if path.is_file())
    spoilt = lab.rng.choice(files)
    others = [path for path in files if path.name == spoilt.name and path != spoilt]
    damage(lab.rng, spoilt, lab.rng.choice(others))
    if lab.rng.random() < 0.3:
        process = lab.run(COMPARE)
        end = lab.judge(process)
        lab.right_lines(whole=end == "number")
        if end == "line":
            shutil.rmtree(spoilt.parent)
            _compared(lab)
        return end
    if lab.rng.random() < 0.5:
        shutil.rmtree(lab.root / "saved")
    return _right_or_told(lab, command(stored) + [RESUME] * (lab.rng.random() < 0.5), stored)


def _right_or_told(lab: Lab, argv: List[str], name: str) -> str:
    process = lab.run(argv)
    end = lab.judge(process)
    if end == "number":
        lab.right_row(name)
        lab.recovered([*argv, *[RESUME] * (RESUME not in argv)], name)
    else:
        _as_told(lab, process, argv, name)
    return end


def corrupt_lines(lab: Lab) -> str:
    """The results of compare; then compare or table."""
    lab.begin_from("plan")
    kind = damage(lab.rng, lab.root / "rows.jsonl", lab.stored("plan") / "others.jsonl")
    if lab.rng.random() < 0.3:
        process = lab.run(TABLE)
        end = lab.judge(process)
        words = "left out|belong to no run|not tested|no differences|tested on"
        told = re.search(words, process.said("out") + process.said("err"), re.IGNORECASE)
        if end == "number" and not told and process.said("out") != lab.references["plan"]["table"]:
            raise Wrong("another table, and no word")
    process = lab.run(COMPARE)
    if lab.judge(process) != "number":
        raise Wrong("damaged lines stop the plan")
    lab.right_lines(known_only=kind != "swap")
    lab.nothing_temporary()
    return "number"


def corrupt_plan(lab: Lab) -> str:
    lab.begin_from("plan")
    good = (lab.root / "plan.yaml").read_bytes()
    damage(lab.rng, lab.root / "plan.yaml")
    end = lab.judge(lab.run(COMPARE))
    lab.right_lines(whole=False, known_only=False)
    (lab.root / "plan.yaml").write_bytes(good)
    if lab.judge(lab.run(COMPARE)) != "number":
        raise Wrong("the rerun fails")
    lab.right_lines(known_only=False)
    return end


def corrupt_log(lab: Lab) -> str:
    """The interactions: refused with the file, or other data, which no checkpoint goes on with."""
    lab.begin_from("prm")
    log, argv = lab.root / "data" / "small" / "small.inter", command("prm")
    good = log.read_bytes()
    damage(lab.rng, log, lab.root / "other" / "small" / "small.inter")
    argv += [RESUME] * (lab.rng.random() < 0.6)
    process = lab.run(argv)
    end = lab.judge(process)
    if end == "line":
        if not re.search(r"small\.inter|small-", process.reasons()[0]):
            raise Wrong("the line does not name the file")
    else:
        row, reference = read_row(lab.root / "result.json"), lab.references["prm"]["row"]
        if log.read_bytes() != good and row["identity"] == reference["identity"]:
            raise Wrong("other data, the same identity")
        if RESUME in argv and row["data"] != reference["data"]:
            raise Wrong("went on with other data")
        if row["data"] == reference["data"] and row["test"] != reference["test"]:
            raise Wrong("another number from the same data")
    log.write_bytes(good)
    lab.recovered([*command("prm"), RESUME], "prm")
    return end


# ---------------------------------------------------------------------- concurrent


def _together(lab: Lab, commands: List[List[str]], within: float) -> List[Process]:
    processes = []
    for argv in commands:
        processes.append(lab.start(argv))
        time.sleep(lab.rng.choice([0.0, lab.rng.uniform(0.0, within)]))
    return [process.wait() for process in processes]


def same_command(lab: Lab) -> str:
    """Two to four times at once: each gives the right number or is refused; one may be killed."""
    name, n = lab.rng.choice(["prm", "dnr", "retrieved"]), lab.rng.randint(2, 4)
    own = lab.rng.random() < 0.7
    files = [f"result{k}.json" if own else "result.json" for k in range(n)]
    commands = [command(name, result_file=file) + [RESUME] * (lab.rng.random() < 0.3) for file in files]
    processes = _together(lab, commands, lab.references[name]["seconds"])
    ends = [lab.judge(process) for process in processes]
    for end, process, file in zip(ends, processes, files):
        if end == "number":
            lab.right_row(name, file)
        elif "another process is training this very run" not in process.reasons()[0]:
            raise Wrong("refused for another reason")
        elif own and (lab.root / file).exists():
            raise Wrong("a refused run wrote a result")
    if "number" not in ends:
        raise Wrong("nobody finished")
    lab.recovered([*command(name), RESUME], name)
    return "line" if "line" in ends else "number"


def kill_one_of_many(lab: Lab) -> str:
    name = lab.rng.choice(["prm", "dnr"])
    commands = [command(name, result_file=f"result{n}.json") for n in range(3)]
    processes = []
    for argv in commands:
        processes.append(lab.start(argv))
        time.sleep(lab.rng.uniform(0.0, 0.2))
    time.sleep(lab.rng.uniform(0.0, lab.references[name]["seconds"]))
    lab.rng.choice(processes).send(signal.SIGKILL)
    ends = [lab.judge(process.wait()) for process in processes]
    for n, end in enumerate(ends):
        if end == "number":
            lab.right_row(name, f"result{n}.json")
    lab.recovered([*command(name), RESUME], name)
    return "line" if "line" in ends else "number"


def shared_folders(lab: Lab) -> str:
    """Commands that differ in epochs, in their data or in what changes no number share checkpoints and cache."""
    if lab.rng.random() < 0.3:
        lab.begin_from("prm-e2")
    names = ["prm", "prm-e6", "prm-lr", "prm-other", "prm-worker", "dnr"]
    names = lab.rng.sample(names, lab.rng.randint(2, 4))
    resumed = lab.rng.random() < 0.4
    commands = [command(name, result_file=f"{name}.json") + [RESUME] * resumed for name in names]
    processes = _together(lab, commands, 1.0)
    ends = []
    for name, process in zip(names, processes):
        ends.append(lab.judge(process))
        if ends[-1] == "number":
            lab.right_row(name, f"{name}.json")
        elif not re.search("another process is training this very run|belong to other data", process.reasons()[0]):
            raise Wrong("refused for another reason")
    for name in names:
        lab.recovered(command(name, result_file=f"{name}.json"), name, f"{name}.json")
    return "line" if "line" in ends else "number"


def compare_together(lab: Lab) -> str:
    """Two to four on one file: each run once; one may be killed."""
    processes = [lab.start(COMPARE) for _ in range(lab.rng.randint(2, 4))]
    if lab.rng.random() < 0.4:
        time.sleep(lab.rng.uniform(0.0, lab.references["plan"]["seconds"]))
        processes[0].send(signal.SIGKILL)
    ends = [lab.judge(process.wait()) for process in processes]
    if "line" in ends:
        raise Wrong("one was refused")
    lab.right_lines(whole="number" in ends)
    _compared(lab)
    return "number"


def run_beside_compare(lab: Lab) -> str:
    """A user's own run with the keys of a row, before or during compare, keeps its checkpoint."""
    if lab.rng.random() < 0.5:
        lab.begin_from("prm")
    own = command("prm")
    processes = [lab.start(argv) for argv in lab.rng.sample([COMPARE, own], 2)]
    if any(lab.judge(process.wait()) != "number" for process in processes):
        raise Wrong("one of them fails")
    lab.right_row("prm")
    lab.right_lines()
    process = lab.recovered([*own, RESUME], "prm")
    if "Nothing left to train" not in process.said("err"):
        raise Wrong("the checkpoint of the run is gone")
    _compared(lab)
    return "number"


# ---------------------------------------------------------------------- disk

_PLACES = ("saved", "cache", "log", "board", "out")
_ROOM = "64m"


def _line_or_right(lab: Lab, process: Process, name: str) -> str:
    end = lab.judge(process)
    if end == "number":
        lab.right_row(name, "out/result.json")
    elif end == "line":
        lab.no_half_result(name, path="out/result.json")
    return end


def full_disk(lab: Lab) -> str:
    """One of the folders is a disk of a few kB or files, or fills while the run goes on; then there is room."""
    name, place = lab.rng.choice(["prm", "dnr"]), lab.rng.choice(_PLACES)
    argv = command(name, result_file="out/result.json")
    if not lab.can_mount:  # every file of the process is limited alike
        process = lab.run(argv, largest=lab.rng.choice([0, 100, 4096, lab.rng.randrange(300_000)]))
        end = _line_or_right(lab, process, name)
        lab.recovered(argv + [RESUME] * (lab.rng.random() < 0.7), name, "out/result.json")
        return end
    how = lab.rng.choice(["size", "size", "files", "fills"])
    size = {"size": f"size={4096 * lab.rng.randint(1, 100)}", "files": f"size={_ROOM}", "fills": f"size={_ROOM}"}[how]
    disk = lab.mount(place, size, *([f"nr_inodes={lab.rng.randint(1, 12)}"] if how == "files" else []))
    process = lab.start(argv)
    if how == "fills":
        time.sleep(lab.rng.uniform(0.0, lab.references[name]["seconds"]))
        subprocess.run(["dd", "if=/dev/zero", f"of={disk}/ballast", "bs=1M"], capture_output=True)
    end = _line_or_right(lab, process.wait(), name)
    (disk / "ballast").unlink(missing_ok=True)
    if not lab.remount(disk, f"size={_ROOM},nr_inodes=10000"):
        raise RuntimeError(f"{disk} cannot be made larger")
    lab.recovered(argv + [RESUME] * (lab.rng.random() < 0.7), name, "out/result.json")
    return end


def full_disk_of_compare(lab: Lab) -> str:
    """The folder of the results, of the checkpoints or of the cache."""
    place = lab.rng.choice(["out", "out", "saved", "cache"])
    argv = ["compare", "plan.yaml", "out/rows.jsonl"]
    if lab.can_mount:
        disk = lab.mount(place, f"size={4096 * lab.rng.randint(1, 20)}")
        process = lab.run(argv)
    else:
        process = lab.run(argv, largest=lab.rng.randrange(100_000))
    end = lab.judge(process)
    lab.right_lines("out/rows.jsonl", whole=end == "number") if (lab.root / "out" / "rows.jsonl").exists() else None
    if lab.can_mount and not lab.remount(disk, f"size={_ROOM}"):
        raise RuntimeError(f"{disk} cannot be made larger")
    if lab.judge(lab.run(argv)) != "number":
        raise Wrong("the rerun fails")
    lab.right_lines("out/rows.jsonl")
    lab.nothing_temporary()
    return end


def read_only(lab: Lab) -> str:
    """One of the folders cannot be written, from the start or from some moment on."""
    name, place = lab.rng.choice(["prm", "dnr"]), lab.rng.choice(_PLACES)
    argv = command(name, result_file="out/result.json")
    if not lab.can_mount:
        return unwritable(lab)
    disk, later = lab.mount(place, f"size={_ROOM}"), lab.rng.random() < 0.5
    if not later:
        lab.remount(disk, "ro")
    process = lab.start(argv)
    if later:
        time.sleep(lab.rng.uniform(0.0, lab.references[name]["seconds"]))
        lab.remount(disk, "ro")
    end = _line_or_right(lab, process.wait(), name)
    lab.remount(disk, "rw")
    lab.recovered(argv + [RESUME] * (lab.rng.random() < 0.7), name, "out/result.json")
    return end


def unwritable(lab: Lab) -> str:
    """A path that cannot be one: below a file, a file for a folder, a folder for a file, a full device, /proc."""
    (lab.root / "file").write_text("x")
    (lab.root / "folder").mkdir()
    key = lab.rng.choice(["checkpoint_dir", "cache_dir", "log_dir", "tensorboard_dir", "result_file"])
    value = lab.rng.choice(["file/below", "file", "/proc/none", "/sys/none"])
    if key == "result_file":
        value = lab.rng.choice(["folder", "file/below", "/dev/full", "/proc/none", "/sys/none"])
    end = lab.judge(lab.run(command("prm", **{key: value})))
    if end != "line":
        raise Wrong(f"{key}={value} was written to")
    if (lab.root / "file").read_text() != "x":
        raise Wrong("a file in the way was changed")
    lab.recovered([*command("prm"), RESUME], "prm")
    return end


def full_output(lab: Lab) -> str:
    """Nobody can write to stdout."""
    argv = lab.rng.choice([command("prm"), COMPARE, TABLE, ["models"], ["keys", "--model=PRM"]])
    if argv == TABLE:
        lab.begin_from("plan")
    process = lab.run(argv, stdout="/dev/full")
    end = lab.judge(process)
    if argv[0] == "run":
        lab.recovered([*argv, RESUME], "prm")
    elif argv == COMPARE:
        lab.right_lines(whole=False)
        _compared(lab)
    return end


KINDS: Dict[str, Dict[Trial, int]] = {
    "kill": {kill_run: 8, kill_restart: 6, kill_workers: 1, kill_compare: 4, kill_tune: 2},
    "corrupt": {corrupt_checkpoint: 6, corrupt_cache: 4, corrupt_lines: 3, corrupt_plan: 2, corrupt_log: 4},
    "concurrent": {same_command: 5, shared_folders: 5, kill_one_of_many: 2, compare_together: 3, run_beside_compare: 3},
    "disk": {full_disk: 8, read_only: 4, full_disk_of_compare: 3, unwritable: 3, full_output: 2},
}
