"""The code of the documentation, run as a reader would."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from places import ROOT

from dnr_recbole.cli import main
from dnr_recbole.config import Config
from dnr_recbole.registry import list_models

DOCS = ROOT / "docs"
README = DOCS.parent / "README.md"


def blocks(path, kind):
    return re.findall(rf"```{kind}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def run_python(name: str, count: int) -> None:
    """All Python of a page, one block after another; so many there are."""
    parts, names = blocks(DOCS / name, "python"), {}
    assert len(parts) == count
    for code in parts:
        exec(compile(code, name, "exec"), names)


def test_your_own_logs_in_ten_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_python("logs.md", 7)
    out = capsys.readouterr().out
    for word in ("score_desc", "rerank_score", "incoming order", "over 60 users"):
        assert word in out
    assert (tmp_path / "my_model" / "config.json").is_file()
    commands = [line for block in blocks(DOCS / "logs.md", "bash") for line in block.splitlines() if line]
    assert len(commands) == 4
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "dnr-recbole" and main(arguments) == 0, command
    assert (tmp_path / "top.parquet").is_file()


def test_your_log_is_biased(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_python("bias.md", 2)
    out = capsys.readouterr().out
    assert "clicks per request" in out and "as shown" in out and "snips" in out


def test_six_lines_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(
        compile(blocks(DOCS / "logs.md", "python")[0] + blocks(DOCS / "logs.md", "python")[1], "logs.md", "exec"), names
    )
    log = names["invented_log"](600)
    log.assign(score=1 / (1 + 2.718**-log.score)).to_parquet("requests.parquet")
    log.head(16).drop(columns="label").assign(score=0.5).to_parquet("new_requests.parquet")
    code = next(code for code in blocks(README, "python") if "RequestLog" in code)
    exec(
        compile(
            code.replace('"DNR", variant="fitted"', '"DNR", variant="fitted", epochs=2, embedding_size=16'),
            "README.md",
            "exec",
        ),
        names,
    )
    assert len(names["top"]) == 12


def test_the_readme_is_a_screen_for_each_reader():
    opening, *parts = README.read_text(encoding="utf-8").split("\n## ")
    assert [part.splitlines()[0] for part in parts] == ["For researchers", "For engineers"]
    assert all(len(part.splitlines()) <= 45 for part in [opening, *parts])
    lines = blocks(README, "bash")[0].splitlines()
    assert (
        lines[0].startswith("pip install -e . && python run_dnr.py")
        and lines[1] == "pip install -e '.[dev]' && pytest -n 2"
    )
    assert {"pipeline.png", "results.png", "page.png"} == set(
        re.findall(r"!\[[^]]+\]\(docs/images/(\S+)\)", opening + "".join(parts))
    )


def test_a_space_and_a_statistic_from_outside(tmp_path, monkeypatch):
    (code,) = blocks(DOCS / "inputs.md", "python")
    (tmp_path / "my_inputs.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [
        "run", "--plugins=my_inputs", "--affinity_spaces=[svd,recent]", "--affinity_statistics=[mean,second]",
        "--dataset=synthetic", "--model=PRM", "--synthetic_users=60", "--synthetic_items=80", "--n_candidates=12",
        "--embedding_size=16", "--epochs=1", "--baselines=[]", "--use_gpu=False",
    ]  # fmt: skip
    assert main(arguments) == 0


@pytest.mark.parametrize("page", sorted([*DOCS.rglob("*.md"), README]), ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def places(name: str):
    """Every `file: name` of a page, below dnr_recbole/."""
    return re.findall(r"`([\w/]+\.py): ([\w.]+)`", (DOCS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["architecture.md", "method.md"])
def test_places_in_the_code_exist(name):
    assert len(places(name)) > 5
    for file, wanted in places(name):
        tree, found = ast.parse((DOCS.parent / "dnr_recbole" / file).read_text(encoding="utf-8")), []
        for part in wanted.split("."):
            found = [node for node in ast.walk(found[0] if found else tree) if getattr(node, "name", "") == part]
            assert found, f"{name}: {file} has no {wanted}"


def told_defaults(page):
    """Of the tables of keys of a page: the model whose section it is, or None, a key and its default as it is told."""
    models = {model.name for model in list_models("reranker")}
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M):
        title = section.splitlines()[0].replace("-", "")
        for row in re.findall(r"^\| key \| default \| meaning \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", section, re.M):
            for _, keys, told, *_ in (line.split("|") for line in row.splitlines()):
                values = re.split(r", (?![^\[{]*[\]}])", told.strip())
                names = re.findall(r"`(\w+)`", keys)
                assert len(names) == len(values), (title, keys, told)
                yield from ((title if title in models else None, *pair) for pair in zip(names, values))


@pytest.mark.parametrize("page", sorted((DOCS / "rerankers").glob("*.md")), ids=lambda path: path.stem)
def test_defaults_of_rerankers_are_those_of_their_files(page):
    told, wrong = list(told_defaults(page)), []
    assert told or page.stem == "trees"
    own = sorted({model for model, _, _ in told if model}) or ["PRM"]
    for model, key, value in told:
        for each in [model] if model else own:  # what a page says of all its models
            default = Config(each, config_dict={"dataset": "none"})[key]
            wrong += [(each, key, value, default)] * (yaml.safe_load(value) != default)
    assert wrong == []


def test_the_table_of_retriever_shift_is_that_of_its_results(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))
    import retriever_shift

    settings = ["A", *(f"noise {size}" for size in retriever_shift.NOISE), *retriever_shift.OTHERS]
    retriever_shift.summary(str(DOCS.parent / "results" / "shift.jsonl"), settings)
    rows = capsys.readouterr().out.splitlines()
    page = (DOCS / "method.md").read_text(encoding="utf-8")
    assert len(rows) > 2 + len(retriever_shift.METHODS) and all(row in page for row in rows)


def test_the_table_of_equal_quality_is_that_of_its_results(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))
    import speed_quality

    speed_quality.summary(str(DOCS.parent / "results" / "speed_quality.jsonl"))
    rows = capsys.readouterr().out.splitlines()
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    assert len(rows) > 2 and all(row in page for row in rows)


def test_the_tables_of_the_device_are_those_of_its_results():
    root = DOCS.parent
    command = [sys.executable, str(root / "benchmarks" / "device_report.py"), str(root / "results" / "device")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=root).stdout
    page = (DOCS / "speed.md").read_text(encoding="utf-8").split("## Numbers", 1)[1]
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(lines) > 60 and [line for line in lines if line not in page] == []
    assert [line for line in page.splitlines() if line.startswith("|") and line not in printed] == []
