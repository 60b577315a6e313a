"""The laboratory of chaos.py: small data, processes that cost half a second, undisturbed references, the judge.

Importing torch and RecBole takes seconds, so a process is usually a fork of this one, which has imported everything
and runs ``cli.main(argv)``; a real one is started with ``python run_dnr.py``.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 180.0  # seconds until a process counts as hanging
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STREAMS = ("out", "err")
_REASONS = ("error:", "interrupted")
_SAME = ("identity", "data", "test", "best_valid", "best_valid_score", "epochs")  # what a right row shares


class Wrong(Exception):
    """A try that ended neither in the right number nor in one clear line; its text is what was wrong."""


@dataclass
class Process:
    """A command that was started.

    Attributes:
        folder: where it runs; its output is below ``folder/said``.
        sent: the signals that it was sent.
        code: its exit status once it has ended, -n if signal n ended it.
    """

    argv: List[str]
    folder: Path
    pid: int
    name: str
    sent: List[int] = field(default_factory=list)
    code: Optional[int] = None
    hung: bool = False

    def alive(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def send(self, number: int, group: bool = False) -> None:
        """A signal to the process or, as a terminal does it, to all of its group, unless it has ended."""
        if self.alive():
            self.sent.append(number)
            try:
                (os.killpg if group else os.kill)(self.pid, number)
            except ProcessLookupError:  # it has no group of its own yet
                os.kill(self.pid, number)

    def wait(self) -> Process:
        deadline = time.monotonic() + PATIENCE
        while self.alive():
            if time.monotonic() > deadline:
                self.hung = True
                os.killpg(self.pid, signal.SIGKILL)
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            time.sleep(0.005)
        return self

    def family(self) -> List[int]:
        """The living processes of its session."""
        return [pid for pid, session in _sessions() if session == self.pid]

    def said(self, stream: str) -> str:
        return (self.folder / "said" / f"{self.name}.{stream}").read_text(encoding="utf-8", errors="replace")

    def reasons(self) -> List[str]:
        return [line for line in self.said("err").splitlines() if line.startswith(_REASONS)]

    def report(self) -> str:
        """Command, end and output, for a person."""
        said = "".join(f"\n  {s}| {line}" for s in _STREAMS for line in self.said(s).splitlines()[-25:])
        sent = f" after {', '.join(signal.Signals(n).name for n in self.sent)}" if self.sent else ""
        return f"$ {' '.join(self.argv)}\n  exit {self.code}{sent}{said}"


def _sessions() -> Iterable[tuple]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                state, _, _, session = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if state not in "ZX":
                yield int(entry.name), int(session)


def _become(argv: List[str], real: bool, largest: Optional[int]) -> int:
    """In a child: the command itself."""
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))  # Python ignores SIGXFSZ: writes fail
    if real and argv[0] != "load":
        start = [str(ROOT / "run_dnr.py"), *argv[1:]] if argv[0] == "run" else ["-m", "dnr_recbole", *argv]
        os.execve(sys.executable, [sys.executable, *start], {**os.environ, "PYTHONPATH": str(ROOT)})
    sys.argv = ["dnr-recbole", *argv]
    sys.modules["__main__"] = type(sys)("__main__")  # what workers would import anew
    if argv[0] == "load":
        return _load(argv[1])
    from dnr_recbole.cli import main

    return main(argv)


def _flushed(code: int) -> int:
    """As the interpreter does at its end: what was printed and cannot be written changes the exit code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: <stdout>\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    return code


def _load(path: str) -> int:
    """What a program does that uses a trained model: its weights' digest, or the reason."""
    from dnr_recbole.errors import DnrError
    from dnr_recbole.identity import content_digest
    from dnr_recbole.trainer.checkpoint import load_reranker

    try:
        model, config = load_reranker(path)
        print(content_digest([model.state_dict(), config.as_dict()]))
        return 0
    except DnrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


class Lab:
    """The folder of one try, processes in it, and the references that all tries share.

    Args:
        root: the folder of the try; what undisturbed runs left is in ``../stored``.
        references: rows, seconds and more of the undisturbed runs, by name.
        rng: all chance of the try.
        real: the first process is ``python run_dnr.py`` in place of a fork.
        can_mount: see :func:`own_mounts`.
    """

    def __init__(
        self, root: Path, references: Dict[str, Any], rng: random.Random, real: bool = False, can_mount: bool = False
    ):
        self.root, self.references, self.rng, self.real, self.can_mount = root, references, rng, real, can_mount
        self.processes: List[Process] = []
        self.mounts: List[str] = []
        root.mkdir(parents=True, exist_ok=True)

    def stored(self, name: str) -> Path:
        """The folder that an undisturbed run has left."""
        return self.root.parent / "stored" / name

    def begin_from(self, name: str) -> None:
        """The try begins with what an undisturbed run has left."""
        shutil.copytree(self.stored(name), self.root, dirs_exist_ok=True)

    # ------------------------------------------------------------------ processes

    def start(
        self, argv: List[str], real: Optional[bool] = None, largest: Optional[int] = None, stdout: Optional[str] = None
    ) -> Process:
        """A process of its own session; ``largest`` is how long a file it may write, in bytes.

        The first one of a real try is real.
        """
        name = f"{len(self.processes):02d}"
        (self.root / "said").mkdir(exist_ok=True)
        real = self.real and not self.processes if real is None else real
        outputs = [
            os.open(self.root / "said" / f"{name}.{s}", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for s in _STREAMS
        ]
        sys.stdout.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                for number in _SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                os.chdir(self.root)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(os.open(stdout, os.O_WRONLY) if stdout else outputs[0], 1)
                os.dup2(outputs[1], 2)
                os.closerange(3, 256)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                code = _become(argv, real, largest)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                logging.shutdown()
                os._exit(_flushed(code))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for output in outputs:
            os.close(output)
        self.processes.append(Process(argv, self.root, pid, name))
        return self.processes[-1]

    def run(self, argv: List[str], **how: Any) -> Process:
        return self.start(argv, **how).wait()

    # ------------------------------------------------------------------ the judge

    def judge(self, process: Process) -> str:
        """How a process ended: "number" (exit 0, to be looked at), "line" or "killed".

        Raises:
            Wrong: it hung, left a traceback or children, or did not give exactly one reason.
        """
        if process.hung:
            raise Wrong("it hangs")
        self.no_family(process)
        texts = [process.said("out"), process.said("err")]
        texts += [path.read_text(errors="replace") for path in self.root.rglob("*.log") if path.is_file()]
        if any("Traceback" in text for text in texts):
            raise Wrong("a traceback")
        if process.code == 0:
            return "number"
        if process.code < 0:
            if -process.code not in process.sent:
                raise Wrong(f"died of signal {-process.code}, which nobody sent")
            return "killed"
        reasons = process.reasons()
        if len(reasons) != 1:
            raise Wrong(f"{len(reasons)} lines of reason with exit code {process.code}")
        if reasons[0].startswith("interrupted") and process.code - 128 not in process.sent:
            raise Wrong("interrupted by a signal that nobody sent")
        return "line"

    @staticmethod
    def no_family(process: Process) -> None:
        """What a process started is gone 10 s after it at the latest; what is not is killed here."""
        deadline = time.monotonic() + 10
        while process.family():
            if time.monotonic() > deadline:
                for pid in process.family():
                    os.kill(pid, signal.SIGKILL)
                raise Wrong("it left processes behind")
            time.sleep(0.02)

    def right_row(self, name: str, path: str = "result.json") -> None:
        """A result file holds the row of an undisturbed run."""
        file = self.root / path
        if not file.exists():
            raise Wrong(f"exit code 0, but no {path}")
        same_row(read_row(file), self.references[name]["row"])

    def no_half_result(self, *names: str, path: str = "result.json") -> None:
        """A result file is absent, or whole and that of one of the references."""
        file = self.root / path
        if file.exists():
            row = read_row(file)
            if all(differences(row, self.references[name]["row"]) for name in names):
                raise Wrong(f"{path} holds numbers of no undisturbed run")

    def recovered(self, argv: List[str], name: str, path: str = "result.json") -> Process:
        """A later run of ``argv``, undisturbed, gives the right row and leaves nothing temporary."""
        process = self.run(argv)
        if self.judge(process) != "number":
            raise Wrong("the rerun fails")
        self.right_row(name, path)
        self.nothing_temporary()
        return process

    def nothing_temporary(self) -> None:
        left = [str(path.relative_to(self.root)) for path in self.root.rglob("*.tmp")]
        if left:
            raise Wrong(f"temporary files are left: {', '.join(left[:5])}")

    def right_lines(self, path: str = "rows.jsonl", whole: bool = True, known_only: bool = True) -> None:
        """A results file holds the lines of an undisturbed plan, each once; all of them if ``whole``."""
        wanted = self.references["plan"]["lines"]
        seen: Dict[str, int] = {}
        file = self.root / path
        for text in file.read_text(errors="replace").splitlines() if file.exists() else []:
            try:
                line = checked_line(text)
            except ValueError:  # a half-written line stays, on a line of its own
                continue
            if "error" in line:
                continue
            name = line["identity"]
            seen[name] = seen.get(name, 0) + 1
            if name not in wanted:
                if known_only:
                    raise Wrong(f"{path} holds a line that belongs to no run of the plan")
            elif differences(line, wanted[name]):
                raise Wrong(f"{path}: {line['row']}: {differences(line, wanted[name])}")
        twice = [name for name, count in seen.items() if count > 1]
        if twice:
            raise Wrong(f"{path}: {len(twice)} runs were made more than once")
        if whole and set(wanted) - set(seen):
            raise Wrong(f"{path}: {len(set(wanted) - set(seen))} runs are missing")

    # ------------------------------------------------------------------ disks

    def mount(self, folder: str, *options: str) -> Path:
        """A file system of its own at ``folder``; see `mount(8)` for the options of tmpfs."""
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path)], check=True)
        self.mounts.append(str(path))
        return path

    def remount(self, path: Path, options: str) -> bool:
        """Change it; whether the system did so: a busy one cannot become read-only."""
        done = subprocess.run(["mount", "-o", f"remount,{options}", str(path)], capture_output=True)
        return done.returncode == 0

    def close(self, keep: bool) -> None:
        for process in self.processes:
            for pid in process.family():
                os.kill(pid, signal.SIGKILL)
            process.wait()
        if keep:
            return
        for path in reversed(self.mounts):
            subprocess.run(["umount", "-l", path], capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)


def own_mounts() -> bool:
    """Give this process mounts that nobody else sees and that end with it; whether the system lets it mount."""
    if sys.platform != "linux" or os.geteuid() != 0 or ctypes.CDLL(None).unshare(0x20000):  # CLONE_NEWNS
        return False
    return not subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode


# ---------------------------------------------------------------------- rows


def read_row(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Wrong(f"{path.name} is half-written: {error}") from None


def checked_line(text: str) -> Dict[str, Any]:
    """A line that the package itself would use."""
    from dnr_recbole.experiment.rows import _parse

    line = _parse(text)
    if line is None:
        raise ValueError("no result")
    return line


def differences(row: Dict[str, Any], reference: Dict[str, Any]) -> str:
    """Which parts of a row are not those of its reference; empty if it is right."""
    return ", ".join(f"{k} {row.get(k)} for {reference[k]}" for k in _SAME if row.get(k) != reference.get(k))


def same_row(row: Dict[str, Any], reference: Dict[str, Any]) -> None:
    if differences(row, reference):
        raise Wrong(f"another number: {differences(row, reference)}")


# ---------------------------------------------------------------------- data


def write_log(path: Path, seed: int, users: int = 40, items: int = 60, length: int = 30) -> None:
    """A small .inter file."""
    draw = random.Random(seed)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        for time_, item in enumerate(draw.sample(range(items), length)):
            rating = min(5, max(1, 1 + (user * item) % 4 + draw.randint(0, 2)))
            lines.append(f"u{user}\ti{item}\t{rating}\t{time_ * 100 + user}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
