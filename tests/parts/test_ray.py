"""Two Ray nodes on this machine: nothing is lost and nothing is twice, whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from log_helpers import as_lists, world
from places import ROOT

from dnr_recbole import cluster
from dnr_recbole.cli import main
from dnr_recbole.errors import DnrError
from dnr_recbole.experiment.compare import _OnCluster
from dnr_recbole.experiment.plan import Plan
from dnr_recbole.experiment.rows import read_rows
from dnr_recbole.locks import hold
from dnr_recbole.parts import inputs

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 12), reason="RecBole's Ray exists up to Python 3.11")
PATIENCE = 120  # seconds for what takes a few on an idle machine
KEYS = ["--model=PRM", "--epochs=1", "--embedding_size=16", "--baselines=[]", "--use_gpu=False"]
PLAN = {
    "fixed": {
        "dataset": "synthetic", "synthetic_users": 60, "synthetic_items": 60, "n_candidates": 12, "embedding_size": 8,
        "epochs": 1, "use_gpu": False,
    },
    "seeds": [1, 2],
    "rows": {"PRM": {"model": "PRM"}, "one request": {"model": "PRM", "synthetic_requests_per_user": 1}},
}  # fmt: skip


# ---------------------------------------------------------------------- without a cluster


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a model, requests in one file and in several that cut requests, and the ranking of the one."""
    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        world(120).to_parquet("log.parquet")
        assert main(["fit", "log.parquet", "--out=m", *KEYS]) == 0
        requests = world(2000, seed=1).drop(columns="label")
        requests.to_parquet("one.parquet")
        assert main(["rank", "m", "one.parquet", "expected.parquet"]) == 0
        os.mkdir("in")
        table, cuts = pa.Table.from_pandas(requests, preserve_index=False), [0, 5003, 5005, 16000]
        for start, stop in zip(cuts, cuts[1:]):
            pq.write_table(table.slice(start, stop - start), f"in/{start:05}.parquet", row_group_size=1001)
    return folder


def one_line(capsys, arguments, code):
    capsys.readouterr()
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_ray_is_missing(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    (tmp_path / "plan.yaml").write_text("fixed: {dataset: synthetic}\nrows: {PRM: {model: PRM}}\n")
    monkeypatch.chdir(tmp_path)
    rank = ["rank", str(here / "m"), str(here / "in"), "out", "--ray"]
    for arguments in (rank, ["compare", "plan.yaml", "rows.jsonl", "--ray"]):
        assert f"{arguments[0]} --ray needs ray" in one_line(capsys, arguments, 2)


def test_nobody_who_knows_ray_is_at_the_address(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "_ANSWER", 1.0)
    rank = ["rank", str(here / "m"), str(here / "in"), str(tmp_path / "out")]
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        busy, free = (f"127.0.0.1:{each.getsockname()[1]}" for each in (silent, closed))
        closed.close()
        reasons = {"head": "must be host:port", free: "refused", f"ray://{free}": "refused", busy: "no head node"}
        for address, reason in reasons.items():
            err = one_line(capsys, [*rank, f"--ray={address}"], 2)
            assert f"--ray={address}: no Ray cluster to use there" in err and reason in err


def test_what_has_no_part_in_it(here, tmp_path, capsys):
    model, folder = str(here / "m"), str(here / "in")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "numbers.parquet").touch()
    assert "holds 'numbers.parquet'" in one_line(capsys, ["rank", model, folder, str(tmp_path / "mine"), "--ray"], 1)
    assert "lies in the folder that is read" in one_line(capsys, ["rank", model, folder, f"{folder}/out", "--ray"], 1)
    with hold(str(tmp_path / "ours" / ".rank.lock"), wait=False):
        err = one_line(capsys, ["rank", model, folder, str(tmp_path / "ours"), "--ray"], 1)
        assert "another process ranks into" in err
    assert "is a folder" in one_line(capsys, ["rank", model, folder, str(tmp_path / "x.parquet")], 2)
    for shares, reason in (
        (["--cpus_per_run=2"], "on a Ray cluster only"), (["--ray", "--cpus_per_run=0"], "--cpus_per_run=0: must be"),
        (["--ray", "--cpus_per_run=1.5"], "must be a whole number"), (["--ray", "--gpus_per_run=nan"], "must be a"),
    ):  # fmt: skip
        assert reason in one_line(capsys, ["compare", "plan.yaml", "rows.jsonl", *shares], 2)
    assert "on a Ray cluster only" in one_line(capsys, ["tune", "--model=PRM", "--gpus_per_trial=1"], 2)
    assert "--tool=ray only" in one_line(capsys, ["tune", "--model=PRM", "--tool=hyperopt", "--ray=head:1"], 2)


def test_what_goes_wrong_on_a_machine_is_said_with_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = cluster._answer("os:remove", str(tmp_path), ("gone",))
    assert str(error) == f"on {socket.gethostname()}: FileNotFoundError: [Errno 2] No such file or directory: 'gone'"
    error = cluster._answer("dnr_recbole.cluster:n_cpus", str(tmp_path / "not here"), ())
    assert isinstance(error, DnrError) and f"no folder {tmp_path}/not here, where the command was given" in str(error)


class Elsewhere:
    """A cluster whose machines have other data."""

    def __init__(self):
        self.names = []

    def __len__(self):
        return len(self.names)

    def submit(self, name, *arguments):
        self.names.append(name)

    def next(self, timeout):
        return self.names.pop(), {"identity": "of other data"}


def test_a_run_on_other_data_is_none_of_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = Plan(**{**PLAN, "rows": {"PRM": {"model": "PRM"}}})
    with pytest.raises(DnrError, match="1 runs failed, the first because: the machine that made it has other data"):
        _OnCluster(plan, "rows.jsonl", Elsewhere(), 2).work()
    assert [row["error"][:11] for row in read_rows("rows.jsonl")] == ["the machine"]


def test_no_more_runs_are_handed_over_than_a_cluster_can_begin(tmp_path, monkeypatch):
    """Each holds a lock: the others are left for who else works on the file, and for the number of open files."""
    monkeypatch.chdir(tmp_path)
    rows = {f"PRM {size}": {"model": "PRM", "embedding_size": size} for size in (4, 8, 12, 16, 20)}
    calls, most = Elsewhere(), []
    submit = calls.submit
    monkeypatch.setattr(calls, "submit", lambda *given: (submit(*given), most.append(len(calls))))
    with pytest.raises(DnrError, match="5 runs failed"):
        _OnCluster(Plan(**{**PLAN, "seeds": [1], "rows": rows}), "rows.jsonl", calls, 2).work()
    assert max(most) == 2 and len(most) == len(read_rows("rows.jsonl")) == 5


# ---------------------------------------------------------------------- two nodes


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    both = Cluster(initialize_head=True, head_node_args=node)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # RecBole has set it
            both.add_node(**node, num_gpus=1)  # whether it is there or not: Ray takes our word for it
        yield both.address
    finally:
        both.shutdown()


@pytest.fixture(scope="module")
def connected(address):
    """This process connected for several commands, whose processes then live on as well."""
    with cluster.connected(address, "these tests"):
        assert cluster.n_cpus() == 2
        yield address


@pytest.fixture
def small_parts(monkeypatch):
    """A part for each row group."""
    monkeypatch.setattr(inputs, "_PART_BYTES", 0)


def same(output, expected):
    """Rows, their order and their ids; a score may differ in its last digits with the size of the batch."""
    found, wanted = pd.read_parquet(output), pd.read_parquet(expected)
    scores = [frame.pop("rerank_score") for frame in (found, wanted)]
    pd.testing.assert_frame_equal(found, wanted)
    np.testing.assert_allclose(*scores, atol=1e-5)


def manifest(output):
    return json.loads((output / "_manifest.json").read_text())


def part_files(output):
    return {path.name: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}


def test_a_folder_is_ranked_as_one_file_is(here, tmp_path, connected, small_parts, capsys):
    out = tmp_path / "out"
    rank = ["rank", str(here / "m"), str(here / "in"), str(out), f"--ray={connected}"]
    assert main(rank) == 0
    assert f"2,000 requests, 16,000 rows -> {out}" in capsys.readouterr().out
    same(out, here / "expected.parquet")
    said, made = manifest(out), part_files(out)
    assert said["total"] == {"rows": 16000, "requests": 2000, "ranked": 16000}
    assert [part["file"] for part in said["parts"]] == sorted(made) and len(made) == 16
    assert [file["name"] for file in said["inputs"]] == ["00000.parquet", "05003.parquet", "05005.parquet"]

    (out / sorted(made)[3]).write_bytes(b"half of it")
    assert main(rank) == 0
    assert "(16 parts, 15 of them were there)" in capsys.readouterr().out
    same(out, here / "expected.parquet")
    assert len(made.items() & part_files(out).items()) == 15

    assert main([*rank, "--k=2"]) == 0
    assert "16 parts were removed: of other requests, another model" in capsys.readouterr().out
    assert len(pd.read_parquet(out)) == 4000 and not made.keys() & part_files(out).keys()


def test_lists_and_a_folder_without_a_request(here, tmp_path, connected, small_parts):
    lists = as_lists(world(60, seed=2).drop(columns="label"))
    pq.write_table(pa.Table.from_pandas(lists), tmp_path / "lists.parquet", row_group_size=25)
    assert main(["rank", str(here / "m"), str(tmp_path / "lists.parquet"), str(tmp_path / "expected.parquet")]) == 0
    for name, table in (("in", lists), ("none", lists[:0])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pandas(table), tmp_path / name / "lists.parquet", row_group_size=25)
        arguments = ["rank", str(here / "m"), str(tmp_path / name), str(tmp_path / f"{name}-ranked")]
        assert main([*arguments, f"--ray={connected}"]) == 0
    same(tmp_path / "in-ranked", tmp_path / "expected.parquet")
    assert len(part_files(tmp_path / "in-ranked")) == 3 and manifest(tmp_path / "in-ranked")["total"]["rows"] == 60
    empty = pd.read_parquet(tmp_path / "none-ranked")
    assert len(empty) == 0 and list(empty) == list(pd.read_parquet(tmp_path / "expected.parquet"))


def test_a_bad_row_is_named_and_the_parts_before_it_are_kept(here, tmp_path, connected, small_parts, capsys):
    requests = world(100, seed=4).drop(columns="label")
    requests.loc[700, "score"] = 5.0
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pandas(requests), tmp_path / "in" / "a.parquet", row_group_size=200)
    rank = ["rank", str(here / "m"), str(tmp_path / "in"), str(tmp_path / "out"), f"--ray={connected}"]
    err = one_line(capsys, rank, 1)
    assert "rows 601 to 800 of 'a.parquet'" in err and "row 701: '5'" in err
    assert not (tmp_path / "out" / "_manifest.json").exists()
    requests.loc[700, "score"] = 0.5
    pq.write_table(pa.Table.from_pandas(requests), tmp_path / "in" / "a.parquet", row_group_size=200)
    assert main(rank) == 0
    assert manifest(tmp_path / "out")["total"]["requests"] == 100


def test_the_runs_of_a_plan_are_made_once(tmp_path, monkeypatch, connected, capsys):
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN))
    compare = ["compare", "plan.yaml", "rows.jsonl", f"--ray={connected}"]
    assert "1 runs failed, the first because: no train request is left" in one_line(capsys, compare, 1)
    rows = read_rows("rows.jsonl")
    assert [(row["row"], row["seed"]) for row in rows if "error" not in row] == [("PRM", 1), ("PRM", 2)]
    assert len(rows) == 3 and all(0 < row["test"]["ndcg@6"] < 1 for row in rows if "error" not in row)
    assert all(Path(row["requests"]["file"]).is_file() for row in rows if "error" not in row)
    assert not Path(".rows.jsonl.locks").exists()

    assert "the cluster has 2 CPUs" in one_line(capsys, [*compare, "--cpus_per_run=3"], 2)
    one_line(capsys, compare, 1)
    again = read_rows("rows.jsonl")
    assert again[:3] == rows and [row["row"] for row in again[3:]] == ["one request"]


@pytest.mark.parametrize("gpus, keys", [(0, {}), (1, {"gpu_id": "0"})])
def test_a_call_uses_the_gpus_that_it_was_given(connected, gpus, keys):
    with cluster.Calls(cluster.device_keys, gpus=gpus) as calls:
        calls.submit("its keys")
        assert calls.next() == ("its keys", keys)


def test_trials_run_on_the_cluster(tmp_path, monkeypatch, connected):
    monkeypatch.chdir(tmp_path)
    keys = [f"--{name}={value}" for name, value in PLAN["fixed"].items()]
    search = ["--search=learning_rate", "--max_evals=1", "--tool=ray", f"--ray={connected}"]
    assert main(["tune", "--model=PRM", *keys, *search]) == 0
    assert len(json.loads(Path("hyper_result.json").read_text())["trials"]) == 1


# ---------------------------------------------------------------------- somebody is killed


@pytest.fixture
def large(here, tmp_path):
    """Requests whose 12 parts take a while, and their ranking."""
    one = pq.read_table(here / "one.parquet")
    number = np.arange(len(one))
    (tmp_path / "in").mkdir()
    for day in range(12):
        ids = pa.array([f"{day}-{row // 8}" for row in number])
        pq.write_table(one.set_column(0, "request_id", ids), tmp_path / "in" / f"{day:02}.parquet")
    pq.write_table(pa.concat_tables(map(pq.read_table, sorted((tmp_path / "in").iterdir()))), tmp_path / "one.parquet")
    assert main(["rank", str(here / "m"), str(tmp_path / "one.parquet"), str(tmp_path / "expected.parquet")]) == 0
    return tmp_path


@contextlib.contextmanager
def driver(*arguments):
    """The command as a process of its own, killed if it outlives the block."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dnr_recbole", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(look, process=None):
    """The first thing found, while the command is at work."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = look()
        if found:
            return found
        assert process is None or process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def writers(output):
    """Living processes that are writing a part: its temporary name says who."""
    found = [re.search(r"\.[0-9a-f]{8}-(\d+)-\d+-[0-9a-f]{8}\.tmp$", path.name) for path in output.glob(".part-*")]
    return [int(each[1]) for each in found if each and Path(f"/proc/{each[1]}").exists()]


def test_a_killed_worker_costs_no_row(here, large, connected, capsys):
    out, killed = large / "out", []

    def kill():
        killed.append(wait_for(lambda: writers(out))[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert main(["rank", str(here / "m"), str(large / "in"), str(out), f"--ray={connected}"]) == 0
    killer.join()
    assert killed and not Path(f"/proc/{killed[0]}").exists()
    assert "24,000 requests, 192,000 rows" in capsys.readouterr().out
    same(out, large / "expected.parquet")
    assert len(part_files(out)) == 12 and manifest(out)["total"]["ranked"] == 192_000


def test_a_killed_driver_is_gone_on_from(here, large, connected, capsys):
    out = large / "out"
    rank = ["rank", str(here / "m"), str(large / "in"), str(out), f"--ray={connected}"]
    with driver(*rank) as process:
        wait_for(lambda: len(part_files(out)) >= 3, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "_manifest.json").exists()
    wait_for(lambda: not writers(out))  # the cluster ends what the driver had begun
    there = part_files(out)
    assert 3 <= len(there) < 12
    capsys.readouterr()
    assert main(rank) == 0
    assert f"(12 parts, {len(there)} of them were there)" in capsys.readouterr().out
    assert there.items() <= part_files(out).items()
    same(out, large / "expected.parquet")
    assert not list(out.glob(".*"))
