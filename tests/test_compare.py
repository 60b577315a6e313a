"""Plans of many runs: an equal search on validation, no repeated run, tables that say what they show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dnr_recbole.cli import main
from dnr_recbole.config import Config
from dnr_recbole.experiment.compare import compare
from dnr_recbole.experiment.plan import Plan
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
    assert set(os.listdir(tmp_path)) <= {"log", "log_tensorboard", "plan.yaml", "rows.jsonl", "saved"}
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for _ in range(4)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    numbers = lambda path: {r["identity"]: (r["row"], r["seed"], r["test"]) for r in read_rows(path)}  # noqa: E731
    assert len(read_rows(together)) == 5 and numbers(together) == numbers(alone)
    assert sum(len(out.splitlines()) for out, _ in said) == 5


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
        ("rows: {a: 3}", "rows"),
        ("rows: {a: {}}\nsearch: {learning_rate: []}", "no values"),
        ("rows: {a: {}}\nsearch: {learning_rate: 3}", "search"),
        ("rows: {a: {seed: 3}}", "'seed' cannot be given in a plan: use `seeds`"),
        ("rows: {a: {resume: true}}", "'resume' cannot be given"),
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
    assert [text for text in capsys.readouterr().out.splitlines() if text][:-1] == [
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


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m"])
def test_the_published_tables_are_those_of_the_results(name):
    folder = Path(__file__).parents[1]
    shown = table(str(folder / f"results/plan_{name}.yaml"), str(folder / f"results/{name}.jsonl"))
    page = (folder / f"docs/results_{name}.md").read_text()
    assert [row for row in shown.splitlines() if row.startswith("|") and row not in page] == []


def test_the_plan_in_the_documentation_is_one():
    page = (Path(__file__).parents[1] / "docs/compare.md").read_text()
    plan = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    assert Plan.model_validate(plan)
    for row in plan["rows"].values():
        Config(config_dict={**plan["fixed"], **plan["settings"]["retrieved"], **row})
