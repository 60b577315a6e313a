"""Plans of many runs: an equal search on validation, no repeated run, tables that say what they show."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from places import ROOT

from dnr_recbole.cli import main
from dnr_recbole.config import Config
from dnr_recbole.experiment.compare import compare
from dnr_recbole.experiment.plan import Plan
from dnr_recbole.experiment.request_files import load_entry
from dnr_recbole.experiment.rows import read_rows
from dnr_recbole.experiment.table import table

PLAN = {
    "fixed": {
        "dataset": "synthetic", "synthetic_users": 60, "synthetic_items": 60, "n_candidates": 12, "embedding_size": 8,
        "epochs": 1, "use_gpu": False,
    },
    "search": {"learning_rate": [0.001, 0.01]},
    "seeds": [1, 2],
    "rows": {"PRM": {"model": "PRM"}, "PRM at 0.005": {"model": "PRM", "learning_rate": 0.005}},
}  # fmt: skip


@pytest.fixture
def plan_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    return str(path)


def test_a_plan_is_run_once_and_goes_on_after_an_interruption(plan_file, tmp_path, capsys):
    results = str(tmp_path / "rows.jsonl")
    compare(plan_file, results)
    rows = read_rows(results)
    assert [(r["row"], r["seed"]) for r in rows] == [
        ("PRM", 1), ("PRM", 1), ("PRM at 0.005", 1), ("PRM", 2), ("PRM at 0.005", 2)
    ]  # fmt: skip
    best = max(rows[:2], key=lambda r: r["best_valid_score"])["searched"]
    assert rows[3]["searched"] == best and rows[4]["searched"] == {}
    assert set(os.listdir(tmp_path)) <= {"log", "log_tensorboard", "plan.yaml", "rows.jsonl", "rows.requests", "saved"}
    assert set(os.listdir("saved")) <= {"cache"}

    text = table(plan_file, results)
    for word in ("PRM at 0.005", "*popularity_desc*", "ndcg@6", " ± "):
        assert word in text

    lines = open(results).read().splitlines()
    with open(results, "w") as f:  # killed while it wrote the last line
        f.write("\n".join(lines[:-1]) + "\n" + lines[-1][:50])
    capsys.readouterr()
    compare(plan_file, results)
    assert len(capsys.readouterr().out.splitlines()) == 1, "only the missing run is made"
    again = read_rows(results)
    assert len(again) == 5 and again[-1]["test"] == rows[-1]["test"]


def test_an_edited_plan_runs_what_changed_and_names_what_is_stale(plan_file, tmp_path, capsys):
    results = str(tmp_path / "rows.jsonl")
    plan = {**PLAN, "search": {}, "seeds": [1]}
    write = lambda rows, **more: Path(plan_file).write_text(yaml.safe_dump({**plan, **more, "rows": rows}))  # noqa: E731
    write({"A": {"model": "PRM"}, "B": {"model": "MiDNN"}})
    compare(plan_file, results)
    capsys.readouterr()

    write({"A": {"model": "PRM", "learning_rate": 0.01}, "B again": {"model": "MiDNN"}})
    compare(plan_file, results)
    said = capsys.readouterr().out.splitlines()
    assert "1 lines belong to no run of this plan" in said[0] and "default | A" in said[0]
    assert [line.split(" | ")[1] for line in said[1:]] == ["A"], "a row that only has another name is not run again"
    text = table(plan_file, results)
    assert "| A" in text and "| B again" in text and "1 lines of the results belong to no run of this plan" in text

    fixed = {**PLAN["fixed"], "cache_dir": "c", "log_dir": None}
    write({"A": {"model": "PRM", "learning_rate": 0.01}}, fixed=fixed)
    compare(plan_file, results)
    assert "| A |" not in capsys.readouterr().out.replace("default | A", ""), "keys that change no number run nothing"


def test_each_row_has_its_own_data(plan_file, tmp_path):
    """Two rows that differ in a key of the data alone must not share it."""
    rows = {f"noise {n}": {"model": "PRM", "synthetic_noise": n} for n in (0.2, 0.9)}
    Path(plan_file).write_text(yaml.safe_dump({**PLAN, "search": {}, "seeds": [1], "rows": rows}))
    results = str(tmp_path / "rows.jsonl")
    compare(plan_file, results)
    low, high = read_rows(results)
    assert low["data"] != high["data"]
    assert low["probes"]["score_desc"]["ndcg@6"] > high["probes"]["score_desc"]["ndcg@6"] + 0.2


def test_processes_share_a_plan(plan_file, tmp_path):
    """Started four times at once, each run is made once, with the numbers of a single process."""
    alone, together = str(tmp_path / "alone.jsonl"), str(tmp_path / "together.jsonl")
    compare(plan_file, alone)
    command = [sys.executable, "-m", "dnr_recbole", "compare", plan_file, together]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for _ in range(4)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    numbers = lambda path: {r["identity"]: (r["row"], r["seed"], r["test"]) for r in read_rows(path)}  # noqa: E731
    assert len(read_rows(together)) == 5 and numbers(together) == numbers(alone)
    assert sum(len(out.splitlines()) for out, _ in said) == 5


def command(*arguments, folder, code=None):
    """A process of the command line, or of ``code``, in ``folder``."""
    start = ["-c", code] if code else ["-m", "dnr_recbole"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *start, *arguments], cwd=folder, env=environment, **pipes)


def test_runs_and_probes_keep_their_values_per_request(plan_file, tmp_path):
    """Two rows, two seeds, from the command line: what the files say is what the lines say, and the table tests it."""
    content = {**PLAN, "search": {}, "rows": {"PRM": {"model": "PRM"}, "MiDNN": {"model": "MiDNN"}}}
    Path(plan_file).write_text(yaml.safe_dump({**content, "reference": "score_desc"}))
    done = command("compare", "plan.yaml", "rows.jsonl", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows, folder = read_rows("rows.jsonl"), tmp_path / "rows.requests"
    assert len(rows) == 4 and len(list(folder.iterdir())) == 4 + 2 * 6, "probes: once per data, not per run"
    for row in rows:
        for entry, said in [(row["requests"], row["test"])] + [
            (row["probe_requests"][probe], row["probes"][probe]) for probe in row["probes"]
        ]:
            metrics = load_entry("rows.jsonl", entry).metrics
            means = {name: np.nanmean(of) for name, of in metrics.items() if name != "gauc"}  # weighs requests
            assert len(means) > 10 and means == pytest.approx({name: said[name] for name in means}, abs=1e-6)
        assert row["requests"]["file"] == f"rows.requests/{row['identity']}.parquet"

    shown = command("table", "plan.yaml", "rows.jsonl", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    cells = {line.split(" | ")[0]: line.split(" | ") for line in shown.stdout.splitlines() if line.startswith("|")}
    column = cells["| "].index("ndcg@6 − score_desc")
    assert cells["| *score_desc*"][column] == "reference"
    # The mean over users, pooled over the seeds that evaluate them.
    own, bars = ([load_entry("rows.jsonl", entry) for entry in of] for of in (
        [row["requests"] for row in rows if row["row"] == "PRM"],
        [row["probe_requests"]["score_desc"] for row in rows if row["row"] == "PRM"],
    ))  # fmt: skip
    frame = pandas.concat(
        pandas.DataFrame({"seed": i, "user": a.identity[:, 1], "d": a.metrics["ndcg@6"] - b.metrics["ndcg@6"]})
        for i, (a, b) in enumerate(zip(own, bars))
    ).dropna()
    by_user = frame.groupby(["seed", "user"])["d"].mean().groupby("user").mean()
    (row,) = (line for name, line in cells.items() if name.startswith("| PRM"))
    assert row[column].startswith(f"{100 * by_user.mean():+.2f} [") and row[column + 1][-1] in "▲▼≈◆"
    assert f"{len(by_user)} of them with {len(frame)} evaluated requests in 2 seed(s)" in shown.stdout
    pair = [row["requests"]["file"] for row in rows[:2]]
    assert "ndcg@6" in command("significance", *pair, folder=tmp_path).stdout

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    probe = rows[0]["probe_requests"]["random"]["file"]
    (tmp_path / probe).write_text("damaged")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert command("compare", "plan.yaml", "rows.jsonl", folder=tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "made again to the byte"


KILLED = """
import os, signal
from dnr_recbole.experiment import compare
from dnr_recbole.files import temporary_name

def killed(*_):
    open(temporary_name("rows.requests/half.parquet"), "w").close()
    os.kill(os.getpid(), signal.SIGKILL)

compare.append = killed
compare.compare("plan.yaml", "rows.jsonl")
"""


def test_a_run_killed_between_its_values_and_its_line(plan_file, tmp_path):
    Path(plan_file).write_text(yaml.safe_dump({**PLAN, "search": {}, "seeds": [1]}))
    assert command(folder=tmp_path, code=KILLED).returncode == -signal.SIGKILL
    folder = tmp_path / "rows.requests"
    assert len(list(folder.iterdir())) == 1 + 6 + 1 and not (tmp_path / "rows.jsonl").exists()
    (folder / next(iter(folder.glob("*.random.parquet"))).name).write_bytes(b"PAR1")  # that one half-written, too
    assert command("compare", "plan.yaml", "rows.jsonl", folder=tmp_path).returncode == 0
    rows = read_rows("rows.jsonl")
    assert len(rows) == 2 and len(list(folder.iterdir())) == 2 + 6
    for row in rows:
        assert all(load_entry("rows.jsonl", entry) for entry in (row["requests"], *row["probe_requests"].values()))
    text = table(plan_file, "rows.jsonl")
    assert "| ndcg@6 − PRM" in text and "tested" not in text, "nothing that could not be"


def test_a_results_file_with_the_name_of_the_folder_is_refused(plan_file, capsys):
    assert main(["compare", plan_file, "rows.requests"]) == 2
    assert "choose one such as rows.requests.jsonl" in capsys.readouterr().err and not os.path.exists("rows.requests")


def test_the_choice_is_made_on_validation_alone():
    plan = Plan.model_validate(PLAN)
    lines = {
        0.001: {"best_valid_score": 0.3, "test": {"ndcg@6": 0.9}},
        0.01: {"best_valid_score": 0.4, "test": {"ndcg@6": 0.1}},
    }
    assert plan.chosen("default", "PRM", lambda run: lines[run.searched["learning_rate"]]) == {"learning_rate": 0.01}
    assert plan.chosen("default", "PRM", lambda run: None) is None
    assert [run.searched for run in plan.trials("default", "PRM at 0.005")] == [{}]


@pytest.mark.parametrize(
    "content, message",
    [
        ("rows: [a]", "rows"),
        ("nothing: 1", "nothing|rows"),
        ("rows: {a: {}}\nseeds: 3", "seeds"),
        ("rows: {a: {}}\nseeds: []", "seeds"),
        ("rows: {a: {}}\nseeds: [x]", "seeds"),
        ("rows: {a: {}}\nseeds: [1, 2, 1]", "seeds: Value error, 1 stands twice"),
        ("rows: {a: 3}", "rows"),
        ("rows: {a: {}}\nsearch: {learning_rate: []}", "no values"),
        ("rows: {a: {}}\nsearch: {learning_rate: 3}", "search"),
        ("rows: {a: {seed: 3}}", "'seed' cannot be given in a plan: use `seeds`"),
        ("rows: {a: {resume: true}}", "'resume' cannot be given"),
        ("rows: {a: {per_request_file: x}}", "'per_request_file' cannot be given"),
        ("rows: {a: {}}\nreference: b", "reference 'b' is neither a row nor one of score_desc, "),
        ("rows: {a: {}}\nalpha: 1", "alpha"),
        ("rows: {a: {}}\ntest_metric: [ndcg@6]", "test_metric"),
        ("rows: {a: {}, a: {}}", "'a' is given twice"),
        (": :", "plan"),
        ("", "rows"),
        ("[]", "mapping|lines"),
        ("rows: {a: {model: PRN}}", "row 'a' in 'default': unknown reranker"),
        ("rows: {a: {epochs: [1]}}", "row 'a' in 'default': epochs"),
        ("[" * 5000, "plan"),
        ("rows: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_unusable_plans_are_refused_in_one_line(tmp_path, content, message, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    assert main(["compare", str(path), str(tmp_path / "rows.jsonl")]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said) and said.startswith("error: ") and "\n" not in said
    assert not (tmp_path / "rows.jsonl").exists()


GOOD = {
    "setting": "s", "row": "r", "seed": 1, "searched": {}, "probes": {}, "test": {"ndcg@6": 0.5},
    "best_valid_score": 0.5, "seconds_per_epoch": None, "ms_per_request": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", "null", '"x"', "{}", "{", "\x00\x01", "[" * 100000, json.dumps({**GOOD, "seed": "1"}),
        json.dumps({**GOOD, "searched": []}), json.dumps({**GOOD, "test": {"ndcg@6": "high"}}),
        json.dumps({**GOOD, "test": None}),
        json.dumps({**GOOD, "best_valid_score": float("nan")}), json.dumps({**GOOD, "probes": [1]}),
        json.dumps({**GOOD, "error": 3}), json.dumps({k: v for k, v in GOOD.items() if k != "ms_per_request"}),
    ],
)  # fmt: skip
def test_lines_that_are_no_results_are_named_and_left_out(tmp_path, text, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{text}\n{json.dumps(GOOD)}\n")
    with caplog.at_level("WARNING"):
        assert len(read_rows(str(path))) == 2
    assert "1 lines are no results and are left out: 2" in caplog.text


def line(setting, row, seed, ndcg, **more):
    probes = {"score_desc": {"ndcg@6": 0.45}, "random": {"ndcg@6": 0.1}}
    found = {"test": {"ndcg@1": 0.9, "ndcg@6": ndcg}, "probes": probes, "best_valid_score": ndcg}
    costs = {"seconds_per_epoch": 1.5, "ms_per_request": 0.25}
    return {"setting": setting, "row": row, "seed": seed, "searched": {}, **found, **costs, **more}


def test_a_table_by_hand(tmp_path, capsys):
    plan, results = tmp_path / "plan.yaml", tmp_path / "rows.jsonl"
    settings = {"one": {"split": "user"}, "two": {}, "three": {}}
    content = {"settings": settings, "seeds": [1, 2], "rows": {"A": {}, "B": {}}}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    failed = {"searched": {}, "seed": 2, "error": "boom"}
    lines = [
        {"setting": "one", "row": "B", **failed},
        line("one", "A", 1, 0.4), line("one", "A", 2, 0.6), line("one", "B", 1, 0.2), line("one", "B", 2, 0.3),
        line("two", "A", 1, 0.5), {"setting": "two", "row": "A", **failed}, {"setting": "three", "row": "B", **failed},
    ]  # fmt: skip
    results.write_text("".join(json.dumps(item) + "\n" for item in lines))
    assert main(["table", str(plan), str(results)]) == 0
    assert [text for text in capsys.readouterr().out.splitlines() if text][:-2] == [
        "## one", "split=user; seeds 1, 2.",
        "|  | ndcg@6 | s / epoch | ms / request | seeds |", "| --- | --- | --- | --- | --- |",
        "| *score_desc* | 45.00 ± 0.00 |  |  |  |", "| *random* | 10.00 ± 0.00 |  |  |  |",
        "| A | 50.00 ± 14.14 | 1.50 | 0.25 | 2 |", "| B † | 25.00 ± 7.07 | 1.50 | 0.25 | 2 |",
        "## two", "seeds 1, 2.",
        "|  | ndcg@6 | s / epoch | ms / request | seeds |", "| --- | --- | --- | --- | --- |",
        "| *score_desc* | 45.00 |  |  |  |", "| *random* | 10.00 |  |  |  |",
        "| A | 50.00 | 1.50 | 0.25 | 1 |", "- A, seed 2: boom",
        "## three", "- B, seed 2: boom",
    ]  # fmt: skip


PAGES = ["ml-100k", "ml-1m", "rerankers", "inputs", "core", "control", "control_large", "strong"]
OF_A_TABLE = ("|", "▲ / ▼", "p (users)", "p (seeds)")
PAGE_OF = {**{name: f"results_{name}.md" for name in PAGES}, "first": "run.md"}


@pytest.mark.parametrize("name", PAGE_OF)
def test_the_published_tables_are_those_of_the_results(name):
    folder = ROOT
    shown = table(str(folder / f"results/plan_{name}.yaml"), str(folder / f"results/{name}.jsonl"))
    page = (folder / "docs" / PAGE_OF[name]).read_text()
    # Both ways: nothing of the command's output is missing, and the page has no rows of its own.
    told = [{line for line in text.splitlines() if line.startswith(OF_A_TABLE)} for text in (shown, page)]
    assert told[0] and told[0] ^ told[1] == set()


def test_the_plan_in_the_documentation_is_one():
    page = (ROOT / "docs/compare.md").read_text()
    plan = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    assert Plan.model_validate(plan)
    for row in plan["rows"].values():
        Config(config_dict={**plan["fixed"], **plan["settings"]["retrieved"], **row})
