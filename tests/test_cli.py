"""The real commands, as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from places import ROOT

# The generated world needs no retriever: a run takes seconds.
SMALL = [
    "--dataset=synthetic", "--synthetic_users=120", "--synthetic_items=90", "--synthetic_requests_per_user=5",
    "--n_candidates=12", "--embedding_size=16", "--train_batch_size=64", "--show_progress=False", "--topk=[1,6]",
]  # fmt: skip


def environment():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(folder, *arguments, timeout=600):
    command = [sys.executable, str(ROOT / "run_dnr.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout)


def row(folder, *arguments, name="row.json"):
    result = run(folder, *arguments, f"--result_file={name}")
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / name).read_text())


def test_the_main_command_on_ml_100k(tmp_path):
    result = run(
        tmp_path, "--model=DNR", "--dataset=ml-100k", "--epochs=2", "--lambda_e=1", "--embedding_size=32",
        "--retriever_args.epochs=2", "--retriever_args.embedding_size=16", "--result_file=row.json",
        "--max_requests_per_user=4",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for word in ("requests", "score_asc", "popularity_desc", "L_adv", "L_x", "L_z", "score_distance", "ndcg@6"):
        assert word in result.stdout + result.stderr, word
    found = json.loads((tmp_path / "row.json").read_text())
    assert found["statistics"]["dataset"] == {**found["statistics"]["dataset"], "users": 943, "items": 1682}
    assert set(found["probes"]) == {"score_desc", "score_asc", "popularity_desc", "popularity_asc", "random"}
    assert 0 < found["test"]["ndcg@6"] < 1 and 0.5 < found["retriever"]["auc"] < 1
    for key in ("command", "git_commit", "versions", "seed", "protocol", "best_valid", "seconds_per_epoch"):
        assert key in found
    assert found["peak_memory_mib"] > 100
    assert [sorted(set(h) & {"L_z", "L_adv"}) for h in found["history"]] == [["L_z"], ["L_adv", "L_z"]]


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    arguments = ["--model=DNR", "--epochs=6", "--lambda_e=2", "--stopping_step=99", *SMALL]
    expected = row(tmp_path / "whole", *arguments)
    command = [sys.executable, str(ROOT / "run_dnr.py"), *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path / "killed", env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 300
    while process.poll() is None and not list((tmp_path / "killed").glob("saved/*-last.pth")):
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = row(tmp_path / "killed", *arguments, "--resume")
    assert found["test"] == expected["test"] and found["best_valid"] == expected["best_valid"]
    assert found["epochs"] == 6
    again = row(tmp_path / "killed", *arguments, "--resume")  # nothing left to do
    assert again["test"] == expected["test"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_agree_with_one_up_to_the_batch_split(tmp_path):
    arguments = ["--model=PRM", "--epochs=4", "--dropout=0.0", "--learning_rate=0.01", *SMALL]
    one = row(tmp_path, *arguments, name="one.json")
    two = row(tmp_path, *arguments, "--nproc=2", name="two.json")
    assert two["nproc"] == 2
    # Evaluation is exact: model-free numbers of the same requests are equal to the last digit.
    assert two["probes"] == one["probes"]
    assert two["test"]["ndcg@6"] == pytest.approx(one["test"]["ndcg@6"], abs=0.05)
    assert two["history"][-1]["loss"] == pytest.approx(one["history"][-1]["loss"], rel=0.1)


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--model=PRN"], 2, ["PRN", "PRM"]),
        (["--model=PRM", "--retriever=LightGNC"], 2, ["LightGNC", "LightGCN"]),
        (["--model=PRM", "--dataset=no-such-set"], 1, ["no-such-set", "dataset/"]),
        (["--model=PRM", "--learning_rat=0.1"], 2, ["learning_rat", "learning_rate"]),
        (["--model=PRM", "--learning_rate=fast"], 2, ["learning_rate", "fast"]),
        (["--model=DNR", "--lambda_c=1.4"], 2, ["lambda_c", "1.4"]),
        (["--model=PRM", "--slate_size=60"], 2, ["slate_size", "n_candidates"]),
        (["--model=PRM", "--n_candidates=200", "--dataset=synthetic", "--synthetic_items=90"], 1, ["200", "90"]),
        (["--model=DNR", "--backbone=MMR"], 2, ["MMR"]),
        (["PRM"], 2, ["PRM"]),
    ],
)
def test_bad_input_gives_one_line_and_an_exit_code(tmp_path, arguments, code, words):
    result = run(tmp_path, *arguments, "--show_progress=False")
    assert result.returncode == code, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]
    assert not list(tmp_path.rglob("*.pth"))


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    command = [sys.executable, str(ROOT / "run_dnr.py"), "--model=PRM", "--epochs=5000", "--stopping_step=9999", *SMALL]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # Shells start background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.time() + 300
    while not list(tmp_path.glob("saved/*-last.pth")) and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130 and "--resume" in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    arguments = ["--model=PRM", "--epochs=1", *SMALL]
    row(tmp_path, *arguments)
    last = next(tmp_path.glob("saved/*-last.pth"))
    last.write_bytes(last.read_bytes()[:1000])
    result = run(tmp_path, *arguments, "--resume")
    assert result.returncode == 1 and last.name in result.stderr and "Traceback" not in result.stderr


def test_lists_models_and_keys(tmp_path):
    def dnr(*arguments):
        command = [sys.executable, "-m", "dnr_recbole", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)

    models = dnr("models").stdout
    for name in ("DNR", "PRM", "PIER", "MF", "DualTower"):
        assert any(line.split()[0] == name for line in models.splitlines())
    keys = dnr("keys", "--model=DNR").stdout
    assert "lambda_c = " in keys and "Eq. 4" in keys


def test_two_runs_are_compared_request_by_request(tmp_path):
    for name, keys in {"a": ["--model=PRM"], "b": ["--model=PRM", "--init_seed=7"]}.items():
        assert run(tmp_path, *SMALL, *keys, "--epochs=2", f"--per_request_file={name}.parquet").returncode == 0
    command = [sys.executable, "-m", "dnr_recbole", "significance", "a.parquet", "b.parquet", "--metrics=ndcg@6,map@6"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "ndcg@6" in done.stdout and "map@6" in done.stdout and "recall@6" not in done.stdout
    other = run(tmp_path, *SMALL, "--model=PRM", "--seed=3", "--epochs=1", "--per_request_file=b.parquet")
    assert other.returncode == 0
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
