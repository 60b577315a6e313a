"""Plans of many runs: an equal search on validation, no repeated run, tables that say what they show."""

from __future__ import annotations

import json

import pytest
import yaml

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
