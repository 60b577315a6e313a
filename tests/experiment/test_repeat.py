"""A row of the published results, made again by today's code: the same keys give the same numbers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import yaml
from places import ROOT

from dnr_recbole.experiment.compare import compare
from dnr_recbole.experiment.request_files import load_entry
from dnr_recbole.experiment.rows import read_rows
from dnr_recbole.identity import CODE_VERSIONS

RESULTS = ROOT / "results"


def committed(name: str, row: str, seed: int):
    (line,) = [line for line in read_rows(str(RESULTS / f"{name}.jsonl")) if (line["row"], line["seed"]) == (row, seed)]
    return line


def repeated(name: str, row: str, seed: int):
    """The row in a plan of its own, run by ``compare`` into the working directory."""
    plan = yaml.safe_load((RESULTS / f"plan_{name}.yaml").read_text(encoding="utf-8"))
    plan.update(rows={row: plan["rows"][row]}, seeds=[seed], reference=None)
    Path("plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    compare("plan.yaml", "again.jsonl")
    (line,) = read_rows("again.jsonl")
    return line


def shown(line):
    """All metrics as tables show them."""
    found = {"test": line["test"], **line["probes"]}
    return {name: {key: f"{100 * value:.2f}" for key, value in each.items()} for name, each in found.items()}


def test_a_published_row_of_trees_is_made_again(tmp_path, monkeypatch):
    """LambdaMART in the biased world: few float operations whose last bits differ between kinds of CPU."""
    monkeypatch.chdir(tmp_path)
    old, new = committed("bias", "LambdaMART, as clicked", 1), repeated("bias", "LambdaMART, as clicked", 1)
    assert old["code"] == CODE_VERSIONS and new["identity"] == old["identity"] and new["keys"] == old["keys"]
    assert shown(new) == shown(old)
    values = load_entry("again.jsonl", new["requests"]), load_entry(str(RESULTS / "bias.jsonl"), old["requests"])
    assert (values[0].identity == values[1].identity).all() and len(values[0].identity) > 1000


@pytest.mark.slow
def test_a_published_row_of_a_network_is_made_again(tmp_path, monkeypatch):
    """A whole training of PRM. Rounding differs between kinds of CPU and adds up over the steps, so what is demanded is
    less than the standard deviation over initialisations, and not the last decimal."""
    monkeypatch.chdir(tmp_path)
    old, new = committed("bias", "PRM, IPS em", 1), repeated("bias", "PRM, IPS em", 1)
    assert old["code"] == CODE_VERSIONS and new["identity"] == old["identity"]
    assert {k: v for k, v in shown(new).items() if k != "test"} == {k: v for k, v in shown(old).items() if k != "test"}
    rows = [line for line in read_rows(str(RESULTS / "bias.jsonl")) if line["row"] == "PRM, IPS em"]
    for metric, value in old["test"].items():
        spread = statistics.stdev(line["test"][metric] for line in rows)
        assert new["test"][metric] == pytest.approx(value, abs=spread / 2), metric


def test_other_keys_would_be_noticed(tmp_path, monkeypatch):
    """The comparison can fail: with smaller trees the row is another, by its identity and by its numbers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    plan = yaml.safe_load((RESULTS / "plan_bias.yaml").read_text(encoding="utf-8"))
    plan["rows"]["LambdaMART, as clicked"]["num_leaves"] = 4
    (tmp_path / "other" / "plan_bias.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    old = committed("bias", "LambdaMART, as clicked", 1)
    monkeypatch.setattr(f"{__name__}.RESULTS", tmp_path / "other")
    new = repeated("bias", "LambdaMART, as clicked", 1)
    assert new["identity"] != old["identity"] and shown(new)["test"] != shown(old)["test"]
    assert json.dumps(shown(new)["score_desc"]) == json.dumps(shown(old)["score_desc"])  # the same world
