"""Hyper-parameter search by the real command, on ml-100k."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import ROOT

from dnr_recbole.errors import ConfigError
from dnr_recbole.hyper import _best, _recbole_space, tune
from dnr_recbole.search_space import read_params_file

TINY = [
    "--model=DNR", "--dataset=ml-100k", "--epochs=2", "--lambda_e=1", "--embedding_size=8", "--max_requests_per_user=2",
    "--retriever_args.epochs=1", "--retriever_args.embedding_size=8",
]  # fmt: skip


def search(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(ROOT / "run_hyper.py"), *TINY, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    output = result.stdout + result.stderr
    return json.loads((folder / "hyper_result.json").read_text()), output


@pytest.fixture
def params_file(tmp_path):
    path = tmp_path / "hyper.test"
    path.write_text("lambda_m choice [0.2,0.6]\nlearning_rate choice [0.001,0.01]\n")
    return path


def test_hyperopt_tries_every_combination_and_selects_on_validation(tmp_path, params_file):
    pytest.importorskip("hyperopt")
    result, output = search(tmp_path, "--tool=Hyperopt", "--algo=exhaustive", f"--params_file={params_file}")
    trials = result["trials"]
    assert sorted((t["params"]["lambda_m"], t["params"]["learning_rate"]) for t in trials) == [
        (0.2, 0.001), (0.2, 0.01), (0.6, 0.001), (0.6, 0.01)
    ]  # fmt: skip
    best = max(trials, key=lambda t: t["best_valid_score"])
    assert result["best_params"] == best["params"]
    assert 0 < result["test"]["ndcg@6"] < 1 and not any("test" in trial for trial in trials)
    assert len(list((tmp_path / "saved" / "cache").iterdir())) <= 3  # one retriever, its spaces, one candidate table
    assert output.count("retriever MF fitted") == 1


def test_ray_reports_every_epoch_and_selects_on_validation(tmp_path):
    pytest.importorskip("ray.tune")
    result, _ = search(tmp_path, "--tool=ray", "--search=lambda_m", "--max_evals=2", "--cpus_per_trial=1")
    assert len(result["trials"]) == 2
    finished = [t for t in result["trials"] if not t.get("pruned")]
    assert finished and result["best_valid_score"] == max(t["best_valid_score"] for t in finished)
    reports = [len(list(open(p))) for p in tmp_path.glob("saved/ray-*/*/result.json")]
    assert sum(reports) >= 2 and max(reports) >= 2  # one line per epoch: a scheduler can prune


def test_parameter_files_and_ranges(tmp_path):
    path = tmp_path / "p"
    path.write_text("# ranges\na choice [1,2]\nb uniform 0,1\nc loguniform -2,0\n")
    space = read_params_file(str(path))
    assert space["a"] == [1, 2] and space["b"] == {"uniform": [0.0, 1.0]}
    assert space["c"]["loguniform"] == pytest.approx([0.1353, 1.0], abs=1e-4)
    assert _recbole_space(space)["loguniform"]["c"] == pytest.approx([-2, 0])
    path.write_text("a choose [1,2]\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_params_file(str(path))
    with pytest.raises(ConfigError, match="params_file"):
        read_params_file(str(tmp_path / "nothing"))


def test_only_finished_trials_can_win():
    trials = [
        {"params": {"a": 1}, "best_valid_score": 0.9, "pruned": True},
        {"params": {"a": 2}, "best_valid_score": 0.5, "best_valid": {}, "test": {}},
    ]
    assert _best(trials, outcome_bigger=True)["best_params"] == {"a": 2}
    with pytest.raises(ConfigError, match="no trial finished"):
        _best(trials[:1], outcome_bigger=True)


@pytest.mark.parametrize("tool, module", [("hyperopt", "hyperopt"), ("ray", "ray.tune")])
def test_a_missing_tool_is_one_line(tool, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=f"--tool={tool} needs {module} .*pip install ") as error:
        tune(TINY, tool=tool)
    assert "\n" not in str(error.value)
