"""Measured numbers in the docs, computed anew from ``results/``: what ``results/claims/*.yaml`` say of them.

A file of claims names a page and, for each number that is quoted there, where it comes from::

    page: README.md
    claims:
      - text: "the retriever's order has NDCG@6 {score:.1f}, a PRM {prm:.1f}"    # as the page says it
        values:
          score: {of: rerankers, row: score_desc}                                # a row or probe of a plan
          prm: {of: rerankers, row: PRM}
    no_results:
      - {text: "Python 3.9 to 3.11", why: versions}                              # numbers that nobody measured

A value is one of

* ``{of: NAME, setting:, row:, metric:, take:}``: runs of plan_NAME.yaml in NAME.jsonl, unless ``results`` names
  another file, of all seeds or of one ``seed:``. ``take``: ``mean`` (default) or ``sd`` over seeds, ``min``, ``max``,
  ``median``, ``low`` and ``high`` (95 % t-interval); ``requests`` and ``users`` count. ``valid: true``: of the
  validation score. ``part:`` another part of a line than ``test``; ``field:`` of a line instead of a metric, in its own
  unit. ``against: ROW``: of the difference to it over users (``mean``, ``low``, ``high``, ``n_users``), or with
  ``over: seeds`` of the differences seed by seed. Metrics are in percent;
* ``{lines: FILE, where: {…}, metric:, take:}``: the same of plain JSON lines;
* ``{csv: FILE, where: {…}, column:}``: one cell;
* ``{file: FILE, path: [keys]}``: of a JSON or YAML file; ``percent: true`` multiplies by 100;
* ``{do: "a - b"}``: arithmetic with the values above it, ``min``, ``max``, ``abs`` and ``round``.

A page that has no such file is made by a command and compared with its output, or has no number that looks measured.
"""

from __future__ import annotations

import csv
import functools
import json
import re
import statistics
import string
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import yaml
from places import ROOT
from scipy import stats

from dnr_recbole.experiment.differences import difference
from dnr_recbole.experiment.request_files import load_entry
from dnr_recbole.experiment.table import finished_runs

RESULTS = ROOT / "results"
Span = Tuple[int, int]
# What would be taken for a measurement: decimals, thousands, and whole numbers before a unit.
NUMBER = re.compile(
    r"(?<![\w.,@])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+"
    r"|\d+(?=(?: |-)(?:points?|%|times|ms|s|MiB|KiB|GiB|[kMG]B|requests|users|seconds|minutes|hours)\b| %))"
    r"(?![\w]|\.\d)"
)
HIDDEN = (r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)", r"<!--.*?-->")  # code, links' targets, comments


def files() -> List[Path]:
    return sorted((RESULTS / "claims").glob("*.yaml"))


def read(path: Path) -> Dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def page_text(page: str) -> str:
    """A page with single blanks and plain minus signs; of a report, its texts."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".yaml"):
        content = yaml.safe_load(text)
        text = "\n\n".join([content["text"], *(section.get("text", "") for section in content["sections"])])
    return text.replace("−", "-")


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("−", "-")).strip()


# ---------------------------------------------------------------------- values


def values_of(wanted: Dict[str, Dict[str, Any]]) -> Dict[str, Any]:
    """All values of a claim, in their order, since some are computed from others."""
    out: Dict[str, Any] = {}
    for name, query in wanted.items():
        out[name] = value(query, out)
    return out


def value(query: Dict[str, Any], known: Dict[str, Any]) -> Any:
    if "do" in query:
        return eval(query["do"], {"__builtins__": {}, "min": min, "max": max, "abs": abs, "round": round}, dict(known))
    if "file" in query:
        found = _content(query["file"])
        for key in query["path"]:
            found = found[key]
        return 100 * found if query.get("percent") else found
    if "csv" in query:
        with open(RESULTS / query["csv"], encoding="utf-8", newline="") as file:
            (cell,) = [row[query.get("column", "value")] for row in csv.DictReader(file) if _fits(row, query["where"])]
        return float(cell)
    if "lines" in query:
        lines = [json.loads(line) for line in (RESULTS / query["lines"]).read_text(encoding="utf-8").splitlines()]
        unit = 100 if query.get("percent", True) else 1
        found = [unit * line[query.get("metric", "ndcg@6")] for line in lines if _fits(line, query["where"])]
        return _take(found, query.get("take", "mean"))
    return _of_plan(**query)


def _of_plan(of: str, row: str, setting: str = "", take: str = "mean", against: str = "", over: str = "users", **more):
    """A value of runs; ``more`` says of what in a line: ``metric``, ``part``, ``valid``, ``field``, ``seed``."""
    of_file = (of, more.pop("results", of))
    setting = setting or next(iter(_finished(*of_file).rows))
    if take in ("requests", "users"):  # how many were evaluated, with and without a positive
        each = next(iter(_values(*of_file, setting, row).values())).identity
        return len(each) if take == "requests" else len(set(each[:, 1]))
    if against and over == "users":
        found = getattr(_difference(*of_file, setting, row, against, more.get("metric", "ndcg@6")), take)
        return found if take.startswith("n_") else 100 * found
    runs = _by_seed(*of_file, setting, row, **more)
    if against:
        other = _by_seed(*of_file, setting, against, **more)
        runs = {seed: runs[seed] - other[seed] for seed in runs if seed in other}
    return _take(list(runs.values()), take)


def _by_seed(plan, results, setting, row, metric="ndcg@6", part="test", valid=False, field="", seed=None):
    """A row's or a probe's value by seed."""
    rows = _finished(plan, results).rows[setting]
    lines = rows[row] if row in rows else [line for each in rows.values() for line in each]
    lines = [line for line in lines if seed is None or line["seed"] == seed]
    if row not in rows:
        return {line["seed"]: 100 * line["probes"][row][metric] for line in lines}
    if field:
        return {line["seed"]: line[field] for line in lines}
    return {line["seed"]: 100 * (line["best_valid_score"] if valid else line[part][metric]) for line in lines}


def _take(values: Sequence[float], take: str) -> float:
    assert values, "no row fits"
    if take in ("low", "high"):
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        return statistics.mean(values) + (half if take == "high" else -half)
    functions = {"mean": statistics.mean, "sd": statistics.stdev, "min": min, "max": max, "median": statistics.median}
    return functions[take](values)


def _fits(line: Dict[str, Any], where: Dict[str, Any]) -> bool:
    return all(str(line[key]) == str(wanted) for key, wanted in where.items())


@functools.lru_cache(maxsize=None)
def _content(name: str) -> Any:
    text = (RESULTS / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)


@functools.lru_cache(maxsize=None)
def _finished(plan: str, results: str):
    return finished_runs(str(RESULTS / f"plan_{plan}.yaml"), str(RESULTS / f"{results}.jsonl"))


@functools.lru_cache(maxsize=None)
def _difference(plan: str, results: str, setting: str, row: str, against: str, metric: str):
    return difference(*(_values(plan, results, setting, each) for each in (row, against)), metric)


@functools.lru_cache(maxsize=None)
def _values(plan: str, results: str, setting: str, row: str):
    """Per seed, the values per request of a row or of a probe."""
    rows = _finished(plan, results).rows[setting]
    if row in rows:
        entries = {line["seed"]: line["requests"] for line in rows[row]}
    else:
        entries = {line["seed"]: line["probe_requests"][row] for lines in rows.values() for line in lines}
    return {seed: load_entry(str(RESULTS / f"{results}.jsonl"), entry) for seed, entry in entries.items()}


# ---------------------------------------------------------------------- pages


def rendered(claim: Dict[str, Any]) -> Tuple[str, List[Span]]:
    """The text that the page must have, and where its numbers stand in it."""
    known, out, spans = values_of(claim["values"]), "", []
    for before, name, form, _ in string.Formatter().parse(flat(claim["text"])):
        out += before
        if name is not None:
            shown = format(string.Formatter().get_field(name, (), known)[0], form or "")
            spans.append((len(out), len(out) + len(shown)))
            out += shown
    return out, spans


def places(text: str, page: str) -> Iterator[int]:
    """Where a text stands in a page."""
    start = page.find(text)
    while start >= 0:
        yield start
        start = page.find(text, start + 1)


def uncovered(content: Dict[str, Any]) -> List[str]:
    """Numbers of a page that no claim computes and nothing excuses, with what stands around them."""
    text = page_text(content["page"])
    for each in content.get("elsewhere", []):
        text = re.sub(each["lines"], lambda found: "·" * len(found[0]), text, flags=re.M)
    page = flat(_hidden(text))
    covered: List[Span] = []
    for claim in content["claims"]:
        shown, spans = rendered(claim)
        shown = _hidden(shown)
        covered += [(at + start, at + end) for at in places(shown, page) for start, end in spans]
    for each in content.get("no_results", []):
        shown = _hidden(flat(each["text"]))
        covered += [(at, at + len(shown)) for at in places(shown, page)]
    return [
        page[max(0, found.start() - 40) : found.end() + 30]
        for found in NUMBER.finditer(page)
        if not any(start <= found.start() and found.end() <= end for start, end in covered)
    ]


def _hidden(text: str) -> str:
    for pattern in HIDDEN:
        text = re.sub(pattern, lambda found: re.sub(r"\S", "·", found[0]), text, flags=re.S)
    return text
