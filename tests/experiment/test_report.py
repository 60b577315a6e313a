"""`dnr-recbole report`: tables and plots of several plans in one Markdown file and one page."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from browser import browser
from places import ROOT

from dnr_recbole.cli import main
from dnr_recbole.experiment.table import finished_runs

RESULTS = ROOT / "results"
PAGE = ROOT / "docs"


def made(tmp_path, content):
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(content))
    done = main(["report", str(spec), str(tmp_path / "r.md"), str(tmp_path / "r.html")])
    return done, tmp_path / "r.md", tmp_path / "r.html"


def section(**keys):
    return {"title": "T", "sections": [{"title": "S", **keys}]}


def absolute(name):
    return {"plan": str(RESULTS / f"plan_{name}.yaml"), "results": str(RESULTS / f"{name}.jsonl")}


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert main(["report", str(RESULTS / "report.yaml"), str(folder / "results.md"), str(folder / "results.html")]) == 0
    return folder


def numbers(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_committed_report_is_that_of_the_committed_results(committed):
    # Beside how it was made: the test names the plans by their whole paths.
    texts = ((folder / "results.md").read_text().replace(f"{ROOT}/", "") for folder in (committed, PAGE))
    made, page = (text.splitlines() for text in texts)
    assert [line for line in made if "*Made by" not in line] == [line for line in page if "*Made by" not in line]


def test_each_plot_of_the_page_shows_its_data(committed):
    with browser(committed) as driver:
        driver.get((committed / "results.html").as_uri())
        plots = driver.execute_script(
            """return [...document.querySelectorAll('figure')].map(f => ({
                 marks: [...f.querySelectorAll('svg [id^=line2d] path, svg [id^=LineCollection] path, svg use')].filter(
                     e => { const b = e.getBoundingClientRect(); return b.width + b.height > 0 }).length,
                 texts: [...f.querySelectorAll('svg text')].filter(e => e.textContent.trim()).length,
                 width: f.querySelector('svg').getBoundingClientRect().width}))"""
        )
        wanted = sum(
            len(each.get("figures", [])) for each in yaml.safe_load((RESULTS / "report.yaml").read_text())["sections"]
        )
        assert len(plots) == wanted > 5
        assert all(plot["marks"] >= 8 and plot["texts"] >= 6 and plot["width"] > 300 for plot in plots), plots
        assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0  # no other file
        assert [line for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []


def test_a_curve_goes_through_the_means(tmp_path):
    content = section(
        **absolute("control"), figures=[{"kind": "curve", "only": ["300", "1437", "6000", "PRM, concat"]}]
    )
    done, _, page = made(tmp_path, content)
    found = finished_runs(absolute("control")["plan"], absolute("control")["results"]).rows
    assert (
        done == 0
        and "PRM, concat" in page.read_text()
        and "PRM, residual" not in page.read_text().split("<details>")[0]
    )
    assert len(found["300"]["PRM, concat"]) == 10


def test_a_section_may_draw_runs_and_lines(tmp_path):
    (tmp_path / "l.jsonl").write_text(json.dumps({"method": "lone", "setting": "b", "seed": 1, "ndcg@6": 0.1}) + "\n")
    figures = [{"kind": "rows", "caption": "first"}, {"kind": "groups", "caption": "second"}]
    done, _, page = made(tmp_path, section(**absolute("rerankers"), lines="l.jsonl", figures=figures))
    drawn = page.read_text().split("<figure>")[1:]
    assert done == 0 and ["first" in each for each in drawn] == [True, False]
    assert ">GRU4Rec<" in drawn[0] and ">lone<" in drawn[1]


def test_the_papers_value_stands_beside_ours(tmp_path):
    (tmp_path / "paper.csv").write_text(
        "table,method,dataset,metric,value\n7,reranker,X,ndcg@6,12.5\n7,other,X,ndcg@6,1\n"
    )
    content = section(**absolute("rerankers"), paper={"table": "7", "dataset": "X", "rows": {"PRM": "reranker"}})
    done, text, _ = made(tmp_path, {**content, "paper": "paper.csv"})
    rows = [line for line in numbers(text.read_text()) if line.endswith("| 12.50 |")]
    assert done == 0 and len(rows) == 1
    runs = finished_runs(absolute("rerankers")["plan"], absolute("rerankers")["results"]).rows["MF"]["PRM"]
    mean = 100 * sum(run["test"]["ndcg@6"] for run in runs) / len(runs)
    assert re.split(r" *\| *", rows[0])[1:3] == ["PRM", f"{mean:.2f}"]


def test_what_the_paper_tells_of_a_run_stands_beside_ours_in_its_own_unit(tmp_path):
    (tmp_path / "paper.csv").write_text(
        "table,method,dataset,metric,value\n15,PRM,X,seconds per epoch,61\n8,PRM,X,retriever's auc,79.2\n"
    )
    runs = finished_runs(absolute("rerankers")["plan"], absolute("rerankers")["results"]).rows["MF"]["PRM"]
    for table, value, ours in (
        ("15", "61.00", sum(run["seconds_per_epoch"] for run in runs) / len(runs)),
        ("8", "79.20", 100 * sum(run["retriever"]["auc"] for run in runs) / len(runs)),
    ):
        content = section(**absolute("rerankers"), paper={"table": table, "dataset": "X"}, tables=False)
        done, text, _ = made(tmp_path, {**content, "paper": "paper.csv"})
        rows = [line for line in text.read_text().splitlines() if line.startswith("| PRM")]
        assert done == 0 and len(rows) == 1, "no table of the plan"
        assert re.split(r" *\| *", rows[0])[1:4] == ["PRM", f"{ours:.2f}", value]


def test_points_are_drawn_in_a_panel_each(tmp_path):
    lines = [{"panel": panel, "name": name, "x": [0.0, 1.0], "y": [1.0, 0.0]} for panel in "AB" for name in ("c", "d")]
    (tmp_path / "points.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, _, page = made(tmp_path, section(lines="points.jsonl", figures=[{"kind": "points"}]))
    drawn = page.read_text()
    assert done == 0 and drawn.count(">c<") == drawn.count(">d<") == 2 and ">A<" in drawn and ">B<" in drawn


@pytest.mark.parametrize(
    "content, message",
    [
        (["no", "mapping"], "content"),
        ({"title": "T", "sections": []}, "sections"),
        (section(plan="plan.yaml"), "plan and results belong together"),
        (section(figures=[{"kind": "groups"}]), "needs lines"),
        (section(figures=[{"kind": "pie"}]), "sections.0.figures.0.kind"),
        (section(plan="none.yaml", results="none.jsonl"), "none.yaml' cannot be read"),
        (
            section(**absolute("core"), figures=[{"kind": "rows", "metric": "ndgc@6"}]),
            "metric: not all have 'ndgc@6': did",
        ),
        (section(**absolute("core"), figures=[{"kind": "rows", "only": ["EASE", "PMR"]}]), "'PMR': did you mean PRM"),
        (section(**absolute("core"), figures=[{"kind": "curve", "x": "rows", "only": ["PRM"]}]), "names with numbers"),
        (section(**absolute("core"), paper={"table": "1", "dataset": "X"}), "no values of table 1, X; there are: none"),
        (section(paper={"table": "1", "dataset": "X"}), "stand beside those of plan and results"),
        (
            section(lines="x.jsonl", figures=[{"kind": "groups", "only": ["a"]}]),
            "only: a figure of kind groups draws all",
        ),
    ],
)
def test_a_wrong_report_is_refused_in_one_line(tmp_path, capsys, content, message):
    done, text, page = made(tmp_path, content)
    error = capsys.readouterr().err
    assert done != 0 and message in error and len(error.splitlines()) == 1
    assert not text.exists() and not page.exists()


def test_lines_that_are_no_json_are_named(tmp_path, capsys):
    (tmp_path / "shift.jsonl").write_text(
        json.dumps({"method": "a", "setting": "b", "seed": 1, "ndcg@6": 0.1}) + "\nhalf"
    )
    done, text, _ = made(tmp_path, section(lines="shift.jsonl", figures=[{"kind": "groups"}]))
    assert done != 0 and "shift.jsonl, line 2" in capsys.readouterr().err and not text.exists()


@pytest.mark.parametrize(
    "kind, line, message",
    [
        ("groups", {"method": "a", "setting": "b"}, "line 2: a figure of kind groups needs 'ndcg@6'"),
        ("groups", ["a"], "line 2: no JSON object"),
        ("densities", {"name": "a", "x": [1], "density": [1]}, "line 1: a figure of kind densities needs 'name'"),
    ],
)
def test_lines_that_lack_something_are_named(tmp_path, capsys, kind, line, message):
    lines = [{"method": "a", "setting": "b", "ndcg@6": 0.1}, line]
    (tmp_path / "shift.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done, text, _ = made(tmp_path, section(lines="shift.jsonl", figures=[{"kind": kind}]))
    error = capsys.readouterr().err
    assert done != 0 and message in error and error.count("\n") == 1 and not text.exists()


def test_a_method_need_not_be_in_all_settings(tmp_path):
    lines = [{"method": m, "setting": s, "ndcg@6": 0.1} for m, s in (("a", "one"), ("a", "two"), ("b", "two"))]
    (tmp_path / "shift.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done, _, page = made(tmp_path, section(lines="shift.jsonl", figures=[{"kind": "groups"}]))
    assert done == 0 and "two" in page.read_text()
