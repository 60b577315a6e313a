"""How runs end: by every signal, with workers that die, beside folders that cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import work_of_tests
from places import ROOT

from dnr_recbole import cli, quick_start
from dnr_recbole.config import Config
from dnr_recbole.errors import ConfigError, DataError, DnrError
from dnr_recbole.files import temporary_name
from dnr_recbole.paths import check_paths
from dnr_recbole.signals import interruptible
from dnr_recbole.workers import run_processes

CPU = torch.device("cpu")
SMALL = [
    "--dataset=synthetic", "--synthetic_users=60", "--synthetic_items=60", "--synthetic_requests_per_user=4",
    "--n_candidates=12", "--embedding_size=8", "--train_batch_size=64", "--topk=[1,6]", "--model=PRM",
]  # fmt: skip
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")

# A parent whose workers train for ever, without the minutes that real data take.
PARENT = """
import sys, time
from dnr_recbole.signals import interruptible
from dnr_recbole.workers import run_processes

def train(rank, folder):
    import torch
    import torch.distributed as dist
    open(f"{folder}/{rank}", "w").close()
    while True:
        dist.all_reduce(torch.ones(10))
        time.sleep(0.01)

if __name__ == "__main__":
    import torch
    with interruptible():
        try:
            run_processes(train, (sys.argv[1],), 2, torch.device("cpu"))
        except KeyboardInterrupt as error:
            sys.exit(128 + error.number)
"""


def start(arguments, folder, ignored=()):
    """A process of its own session, so that nothing but the test ends it."""

    def prepare():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell may have ignored some
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, preexec_fn=prepare, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process=None, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and (process is None or process.poll() is None)
        time.sleep(0.05)


def workers_of(process) -> list:
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in pids if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------- workers


@linux
@pytest.mark.parametrize(
    "number, ignored, code",
    [
        (signal.SIGINT, (), 130),
        (signal.SIGKILL, (signal.SIGINT, signal.SIGHUP), -9),  # in the background, under nohup
    ],
)
def test_workers_end_with_their_parent(tmp_path, number, ignored, code):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    (tmp_path / "seen").mkdir()
    parent = start([str(script), "seen"], tmp_path, ignored)
    wait_for(lambda: len(list((tmp_path / "seen").iterdir())) == 2, parent)
    workers = workers_of(parent)
    assert len(workers) == 2 and all(map(lives, workers))
    parent.send_signal(number)
    output = parent.communicate(timeout=20)[0]
    assert parent.returncode == code and "Traceback" not in output
    wait_for(lambda: not any(map(lives, workers)), seconds=5)


@linux
def test_a_killed_worker_is_named(tmp_path):
    endless = [*SMALL, "--epochs=50000", "--stopping_step=99999", "--nproc=2"]
    run = start([str(ROOT / "run_dnr.py"), *endless], tmp_path)
    wait_for(lambda: list(tmp_path.glob("saved/*-last.pth")), run)
    workers = workers_of(run)
    os.kill(workers[1], signal.SIGKILL)
    output = run.communicate(timeout=30)[0]
    assert run.returncode == 1 and "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for word in (str(workers[1]), "worker 1 of 2", "SIGKILL", "--resume"):
        assert word in errors[0]
    assert not any(map(lives, workers))


@pytest.mark.parametrize(
    "what, words",
    [
        ("bug", ["worker 1 of 2", "failed with ValueError: the first line", "--resume"]),
        ("data", ["the file is damaged"]),
    ],
)
def test_the_failure_of_a_worker_is_one_line(what, words, capfd):
    with pytest.raises(DnrError) as error:
        run_processes(work_of_tests.work, (what,), 2, CPU)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    assert "Traceback" not in capfd.readouterr().err


def test_two_runs_at_once_do_not_meet():
    outcomes = {}

    def run(what):
        try:
            outcomes[what] = run_processes(work_of_tests.work, (what,), 2, CPU)
        except DnrError as error:
            outcomes[what] = str(error)

    threads = [threading.Thread(target=run, args=(what,)) for what in ("answer", "exit")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes["answer"] == {"rank": 0}
    assert "worker 1 of 2" in outcomes["exit"] and "exit code 7" in outcomes["exit"]


# ---------------------------------------------------------------------- signals


def test_sigterm_says_how_to_go_on_and_the_numbers_stay(tmp_path, monkeypatch):
    arguments = [*SMALL, "--epochs=20", "--stopping_step=99"]
    (tmp_path / "stopped").mkdir()
    stopped = start([str(ROOT / "run_dnr.py"), *arguments], tmp_path / "stopped")
    wait_for(lambda: list(tmp_path.glob("stopped/saved/*-last.pth")), stopped)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == 143 and "--resume" in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.tmp"))
    rows = []
    for folder in (tmp_path, tmp_path / "stopped"):
        monkeypatch.chdir(folder)
        rows.append(quick_start.run_dnr(argv=[*arguments, "--resume"])["row"])
    assert rows[0]["test"] == rows[1]["test"] and rows[0]["epochs"] == rows[1]["epochs"] == 20


def command(monkeypatch, name, function):
    monkeypatch.setitem(cli._COMMANDS, name, lambda arguments, rest: function())
    return cli.main([name, "plan", "results"] if name == "compare" else [name])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name, words", [("run", "--resume"), ("tune", "same command"), ("compare", "same command")])
def test_every_command_says_how_to_go_on(monkeypatch, capsys, name, words, number):
    def interrupted():
        os.kill(os.getpid(), number)
        time.sleep(10)

    before = signal.signal(number, signal.default_int_handler)  # whatever the shell of the tests ignores
    try:
        assert command(monkeypatch, name, interrupted) == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    lines = capsys.readouterr().err.splitlines()
    # The first ends whatever the terminal's line held.
    assert len(lines) == 2 and not lines[0] and number.name in lines[1] and words in lines[1]


def test_an_interrupt_that_a_library_turns_into_an_error_of_its_own(monkeypatch, capsys):
    def interrupted():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise DataError("cannot be read: stopped downloading") from None

    assert command(monkeypatch, "run", interrupted) == 143
    assert "error" not in capsys.readouterr().err


def test_ignored_signals_stay_ignored_and_threads_are_left_alone(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command(monkeypatch, "run", lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(command(monkeypatch, "run", lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_second_signal_ends_at_once(tmp_path):
    code = (
        "import time; from dnr_recbole.signals import interruptible\n"
        "with interruptible():\n"
        "    try:\n        print('ready', flush=True); time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        print('cleaning up', flush=True); time.sleep(60)"
    )
    process = start(["-c", code], tmp_path)
    for word in ("ready", "cleaning up"):
        assert word in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM


def test_a_signal_within_a_block_restores_handlers():
    started_with = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), interruptible() as received:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        assert received.number == signal.SIGINT and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, started_with)


# ---------------------------------------------------------------------- paths

KEYS = ("log_dir", "tensorboard_dir", "cache_dir", "checkpoint_dir", "result_file")


@pytest.mark.parametrize("key", KEYS)
def test_what_cannot_be_written_is_named_before_the_data_are_read(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quick_start, "prepare", lambda config: pytest.fail("the data were read"))
    (tmp_path / "file").write_text("kept")
    wrong = ["file/below"] + (["."] if key == "result_file" else ["file"])
    wrong += ["/proc/nothing/here"] if sys.platform == "linux" else []  # not even root can
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{key}={value}: ") as error:
            quick_start.run_dnr(argv=[*SMALL, f"--{key}={value}"])
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_missing_folders_are_made_and_leftovers_swept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(config_dict={key: str(tmp_path / "new" / key / "a") for key in KEYS}, argv=SMALL)
    check_paths(config)
    folders = [tmp_path / "new" / key / "a" for key in KEYS[:-1]] + [tmp_path / "new" / "result_file"]
    assert all(folder.is_dir() and not list(folder.iterdir()) for folder in folders)
    child = "import sys; from dnr_recbole.files import temporary_name; print(temporary_name(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", child, "x"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    for folder in folders:
        (folder / Path(made).name).write_text("left by a dead process")
        Path(temporary_name(folder / "y")).write_text("being written")
    check_paths(config, outputs={"output_file": str(tmp_path / "z.json")})
    for folder in folders:
        assert [path.name.split(".")[1] for path in folder.iterdir()] == ["y"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_a_cache_that_only_others_may_write_is_used(tmp_path, monkeypatch):
    config = Config(config_dict={key: str(tmp_path / key) for key in KEYS}, argv=SMALL)
    (tmp_path / "cache_dir").mkdir()
    real = open

    def read_only(path, *arguments, **keys):
        if str(path).startswith(str(tmp_path / "cache_dir")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **keys)

    monkeypatch.setattr("builtins.open", read_only)
    check_paths(config)
