"""Every measured number in the docs is that of the results: :mod:`claims` says how they are tied."""

from __future__ import annotations

import ast
import re

import claims
import numpy as np
import pytest
import yaml
from scipy import stats

FILES = claims.files()
PAGES = [claims.ROOT / "README.md", *(claims.ROOT / "docs").rglob("*.md")]
MADE = {  # by a command, and the test that compares them with what it prints
    "docs/keys.md": "tests/test_config.py::test_the_page_of_keys_is_made_from_the_definitions",
    "docs/results.md": "tests/experiment/test_report.py::test_the_committed_report_is_that_of_the_committed_results",
}
ALL = [(path, number) for path in FILES for number in range(len(claims.read(path)["claims"]))]


@pytest.mark.parametrize("path, number", ALL, ids=lambda it: it.stem if hasattr(it, "stem") else str(it))
def test_what_a_page_says_is_what_the_results_say(path, number):
    content = claims.read(path)
    text, spans = claims.rendered(content["claims"][number])
    assert spans and text in claims.flat(claims.page_text(content["page"])), f"{content['page']} does not say: {text}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_number_of_a_page_comes_from_nowhere(path):
    content = claims.read(path)
    assert claims.uncovered(content) == []
    for each in content.get("no_results", []):  # an excuse for what is no longer there is dropped
        assert each["why"] and claims.flat(each["text"]) in claims.flat(claims.page_text(content["page"])), each


def test_no_page_has_a_number_that_nothing_ties():
    """A page has claims, or is made by a command whose output a test compares it with, or measures nothing."""
    tied = {claims.read(path)["page"] for path in FILES}
    for page in sorted({path.relative_to(claims.ROOT).as_posix() for path in PAGES} - tied - set(MADE)):
        assert claims.uncovered({"page": page, "claims": []}) == [], f"{page}: results/claims/ has no file for it"


@pytest.mark.parametrize("page", MADE)
def test_a_page_that_is_made_is_compared(page):
    file, name = MADE[page].split("::")
    tree = ast.parse((claims.ROOT / file).read_text(encoding="utf-8"))
    (test,) = [node for node in tree.body if getattr(node, "name", "") == name]
    assert (claims.ROOT / page).is_file() and repr(page.rpartition("/")[2]) in ast.unparse(test)


def test_tests_that_are_named_exist():
    """What another test is said to see, and what repeats a value."""
    texts = [path.read_text(encoding="utf-8") for path in (*FILES, claims.RESULTS / "measured.yaml")]
    named = {file for text in texts for file in re.findall(r"tests/[\w/]+\.py", text)}
    assert named and [file for file in sorted(named) if not (claims.ROOT / file).is_file()] == []


def test_the_report_is_made_of_its_texts():
    page = claims.flat((claims.ROOT / "docs/results.md").read_text(encoding="utf-8"))
    spec = yaml.safe_load((claims.RESULTS / "report.yaml").read_text(encoding="utf-8"))
    for text in [spec["text"], *(section["text"] for section in spec["sections"])]:
        assert claims.flat(text) in page, "docs/results.md: run dnr-recbole report"


def test_what_has_no_row_is_quoted_by_the_page_it_names():
    """Values without a row are tied to a page, or they would be a file that nobody reads."""
    told = yaml.safe_load((claims.RESULTS / "measured.yaml").read_text(encoding="utf-8"))
    quoted = set()
    for path in FILES:
        for claim in claims.read(path)["claims"]:
            for query in claim["values"].values():
                quoted |= {query["path"][0]} if query.get("file") == "measured.yaml" else set()
    assert set(told) == quoted
    for name, entry in told.items():
        assert entry["command"] and entry["machine"] and (claims.ROOT / entry["page"]).is_file(), name


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page of its own, and what is claimed of it."""
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    claim = {"text": "PRM has {prm:.1f} points", "values": {"prm": {"of": "rerankers", "row": "PRM"}}}
    excuses = [{"text": "Python 3.9", "why": "a version"}]
    return tmp_path / "page.md", {"page": "page.md", "claims": [claim], "no_results": excuses}


def said(content):
    return claims.rendered(content["claims"][0])[0] in claims.flat(claims.page_text(content["page"]))


def test_a_true_page_passes(page):
    path, content = page
    path.write_text("PRM\nhas 30.4 points under Python 3.9, `0.5`, [see](x_2.5.md), 1.2.1.\n```\n3.5\n```\n")
    assert said(content) and claims.uncovered(content) == []


def test_a_wrong_number_is_found(page):
    path, content = page
    path.write_text("PRM has 30.5 points under Python 3.9")
    assert not said(content) and len(claims.uncovered(content)) == 1


def test_numbers_from_nowhere_are_found(page):
    path, content = page
    path.write_text(
        "PRM has 30.4 points. And 7 % more, of 1,437 requests, 80 points or .25, −0.3 [1.5](x.md), 2 times."
    )
    found = claims.uncovered(content)
    assert said(content) and len(found) == 7
    assert all(
        any(number in text for text in found) for number in ("7 %", "1,437", "80", ".25", "0.3", "1.5", "2 times")
    )


def test_a_value_is_what_the_lines_say():
    lines = claims._finished("rerankers", "rerankers").rows["MF"]["DNR-B"]
    values = [100 * line["test"]["map@6"] for line in lines]
    query = {"of": "rerankers", "row": "DNR-B", "metric": "map@6"}
    assert claims.value(query, {}) == pytest.approx(np.mean(values))
    assert claims.value({**query, "take": "sd"}, {}) == pytest.approx(np.std(values, ddof=1))
    assert claims.value({**query, "take": "min"}, {}) == min(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert claims.value({**query, "take": "low"}, {}) == pytest.approx(low)
    assert claims.value({**query, "take": "high"}, {}) == pytest.approx(high)
    apart = {**query, "against": "PRM", "over": "seeds"}
    others = {
        line["seed"]: line["test"]["map@6"] for line in claims._finished("rerankers", "rerankers").rows["MF"]["PRM"]
    }
    differences = [100 * (line["test"]["map@6"] - others[line["seed"]]) for line in lines]
    assert claims.value(apart, {}) == pytest.approx(np.mean(differences))
    assert claims.value({**query, "against": "PRM"}, {}) != pytest.approx(np.mean(differences), abs=1e-3)  # over users


def test_the_auc_of_beta_noise_is_what_method_md_says():
    """x' = (1 − λ) z + λ ε with λ = .6: P(x' of a click > x' of another) = P(ε₀ − ε₁ < .4 / .6) for ε ~ Beta(2, 5)."""
    grid = (np.arange(20_000) + 0.5) / 20_000
    auc = np.mean(stats.beta.pdf(grid, 2, 5) * stats.beta.cdf(grid + 0.4 / 0.6, 2, 5))
    assert f"{auc:.3f}"[1:] == ".999"
    assert "Beta(2, 5) at 0.6 has an AUC of .999" in claims.flat(claims.page_text("docs/method.md"))
