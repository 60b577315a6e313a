"""The code of docs/add_a_reranker.md, run as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from places import ROOT

PAGE = ROOT / "docs" / "add_a_reranker.md"


@pytest.fixture
def project(tmp_path):
    blocks = re.findall(r"```(python|yaml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert [kind for kind, _ in blocks] == ["python", "yaml", "python"]
    for name, (_, code) in zip(("my_reranker.py", "GateRank.yaml", "test_my_reranker.py"), blocks):
        (tmp_path / name).write_text(code, encoding="utf-8")
    return tmp_path


def run(project, *command):
    root = str(PAGE.parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project), root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=project, env=env, capture_output=True, text=True, timeout=600
    )


def test_the_model_passes_the_contract(project):
    result = run(project, "pytest", "-q", "-p", "no:cacheprovider", "test_my_reranker.py")
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"\d+ passed", result.stdout)


@pytest.mark.parametrize("model", [["--model=GateRank"], ["--model=DNR", "--backbone=GateRank", "--lambda_e=1"]])
def test_the_model_runs_from_the_command_line(project, model):
    result = run(
        project, "dnr_recbole", "run", "--plugins=my_reranker", *model, "--dataset=synthetic", "--epochs=2",
        "--synthetic_users=60", "--synthetic_items=80", "--n_candidates=12", "--embedding_size=16",
        "--result_file=row.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert (project / "row.json").is_file()
