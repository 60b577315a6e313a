"""Plans of many runs: an equal search on validation, no repeated run, tables that say what they show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dnr_recbole.cli import main
from dnr_recbole.config import Config
from dnr_recbole.errors import ConfigError
from dnr_recbole.experiment.compare import chosen, compare, read_plan, read_rows, trials_of
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


def test_a_plan_is_run_once_and_goes_on_after_an_interruption(plan_file, tmp_path):
    results = str(tmp_path / "rows.jsonl")
    compare(plan_file, results)
    rows = read_rows(results)
    assert [(r["row"], r["seed"]) for r in rows] == [
        ("PRM", 1), ("PRM", 1), ("PRM at 0.005", 1), ("PRM", 2), ("PRM at 0.005", 2)
    ]  # fmt: skip
    best = max(rows[:2], key=lambda r: r["best_valid_score"])["searched"]
    assert rows[3]["searched"] == best and rows[4]["searched"] == {}

    text = table(plan_file, results)
    for word in ("PRM at 0.005", "*popularity_desc*", "ndcg@6", " ± "):
        assert word in text

    lines = open(results).read().splitlines()
    with open(results, "w") as f:  # killed while it wrote the last line
        f.write("\n".join(lines[:-1]) + "\n" + lines[-1][:50])
    compare(plan_file, results)
    again = read_rows(results)
    assert len(again) == 5 and again[-1]["test"] == rows[-1]["test"]


def test_the_choice_is_made_on_validation_alone():
    plan = {**PLAN, "settings": {"s": {}}}
    line = lambda rate, valid, test: {"searched": {"learning_rate": rate}, "best_valid_score": valid, "test": test}  # noqa: E731
    done = {
        ("s", "PRM", 1, json.dumps({"learning_rate": 0.001})): line(0.001, 0.3, {"ndcg@6": 0.9}),
        ("s", "PRM", 1, json.dumps({"learning_rate": 0.01})): line(0.01, 0.4, {"ndcg@6": 0.1}),
    }
    assert chosen(plan, done, "s", "PRM") == {"learning_rate": 0.01}
    assert chosen(plan, {}, "s", "PRM") is None
    assert list(trials_of(plan, "s", "PRM at 0.005")) == [{}]


@pytest.mark.parametrize("content", ["rows: [a]", "nothing: 1", "rows: {a: {}}\nseeds: 3", ": :"])
def test_unusable_plans_are_refused(tmp_path, content):
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="plan"):
        read_plan(str(path))


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
    assert [row for row in capsys.readouterr().out.splitlines() if row] == [
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
    for row in plan["rows"].values():
        Config(config_dict={**plan["fixed"], **plan["settings"]["retrieved"], **row})
