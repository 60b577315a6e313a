"""Idle threads sleep, unless the user decided otherwise."""

import os
import subprocess
import sys

import pytest

from dnr_recbole import threads
from dnr_recbole.threads import be_a_good_neighbour


def test_a_command_sets_the_wait_policy_before_torch_is_imported():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    program = (
        "import os, sys; from dnr_recbole.cli import main; assert 'torch' not in sys.modules;"
        "main(['models']); assert 'torch' in sys.modules; assert int(os.environ['GOMP_SPINCOUNT']) < 10_000;"
        "print('policy', os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "policy PASSIVE"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_set_stays(name):
    environment = {name: "ACTIVE"}
    be_a_good_neighbour(environment)
    assert environment[name] == "ACTIVE"
    assert list(environment) == [name]


@pytest.mark.parametrize(
    "text, cores, chosen",
    [("max 100000", 8, None), ("150000 100000", 8, "2"), ("50000 100000", 8, "1"), ("800000 100000", 8, None)],
)
def test_threads_follow_the_quota_of_the_control_group(tmp_path, monkeypatch, text, cores, chosen):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(threads, "_QUOTA", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    environment = {}
    be_a_good_neighbour(environment)
    assert environment.get("OMP_NUM_THREADS") == chosen
    environment = {"OMP_NUM_THREADS": "5"}
    be_a_good_neighbour(environment)
    assert environment["OMP_NUM_THREADS"] == "5"


def test_the_older_control_groups_are_read(tmp_path, monkeypatch):
    quota, period = tmp_path / "quota", tmp_path / "period"
    quota.write_text("300000")
    period.write_text("100000")
    monkeypatch.setattr(threads, "_QUOTA", str(tmp_path / "none"))
    monkeypatch.setattr(threads, "_QUOTA_V1", (str(quota), str(period)))
    assert threads._quota() == 3.0
    quota.write_text("-1")
    assert threads._quota() is None
