"""Markdown tables from the lines of :mod:`dnr_recbole.experiment.compare`."""

from __future__ import annotations

import json
import statistics
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from dnr_recbole.experiment.plan import Plan, Run, place, read_plan
from dnr_recbole.experiment.rows import Line, read_rows
from dnr_recbole.experiment.tested import Tests, entries_of, run_tests

_SHOWN = ("ndcg", "map", "precision", "f1", "recall", "gauc", "pooledauc", "coverage")


def table(plan_file: str, results: str, metrics: Sequence[str] = _SHOWN) -> str:
    """One table per setting: mean ± standard deviation over seeds, probes, tests, training and prediction time.

    Values are percentages. A row in italics is a probe: a ranking without any learning. A row marked † has a
    lower mean NDCG than one of the probes. Rows and probes are tested against a reference where their values per
    request were kept (:mod:`dnr_recbole.experiment.tested`); footnotes say what could not be tested, and why. Lines
    whose keys are not those that the plan gives now are left out, and counted below the tables.
    """
    plan, lines = read_plan(plan_file), read_rows(results)
    found = _Found(plan, lines)
    text: List[str] = []
    for setting in plan.settings:
        text += _setting(plan, found, setting, metrics, results)
    return "\n".join([*text, *found.notes()])


class Finished(NamedTuple):
    """What the runs of a plan came to.

    Attributes:
        rows: setting → row → its lines with the keys chosen on validation, one per seed; maybe none.
        probes: setting → probe → metric → value, of the first seed.
    """

    rows: Dict[str, Dict[str, List[Line]]]
    probes: Dict[str, Dict[str, Dict[str, float]]]


def finished_runs(plan_file: str, results: str) -> Finished:
    """The finished runs of a plan."""
    plan = read_plan(plan_file)
    found = _Found(plan, read_rows(results))
    rows = {setting: {row: _runs(plan, found, setting, row) for row in plan.rows} for setting in plan.settings}
    probes = {
        setting: next((run["probes"] for runs in each.values() for run in runs), {}) for setting, each in rows.items()
    }
    return Finished(rows, probes)


class _Found:
    """The line of each run: the last one with the run's keys, whatever the row was called when it was made."""

    def __init__(self, plan: Plan, lines: List[Line]):
        self.lines: Dict[str, Line] = {}
        self.named: Dict[str, Line] = {}  # by their place: written before lines carried their keys
        self.stale = 0
        runs = list(plan.all_runs())
        keys, places = {_text(run.keys) for run in runs}, {run.place for run in runs}
        for line in lines:
            table, name, known = self.named, place(**line), places
            if line.get("keys"):
                table, name, known = self.lines, _text(line["keys"]), keys
            if name in known:
                table[name] = line
            else:
                self.stale += 1

    def __call__(self, run: Run) -> Optional[Line]:
        return self.lines.get(_text(run.keys)) or self.named.get(run.place)

    def notes(self) -> List[str]:
        out = []
        if self.stale:
            out.append(f"{self.stale} lines of the results belong to no run of this plan and are left out.")
        if self.named:
            out.append(f"{len(self.named)} lines do not say which keys they were made with: they stand by their names.")
        finished = [line for line in (*self.lines.values(), *self.named.values()) if "error" not in line]
        old = sum("requests" not in line for line in finished)
        if old:
            out.append(f"{old} lines were made before values per request were kept: differences are not tested there.")
        for what, noun in (("files", "data"), ("code", "versions of the code")):
            kinds: Dict[str, set] = {}  # settings may well read other files
            for line in self.lines.values():
                if line.get(what):
                    kinds.setdefault(line.get("setting") if what == "files" else None, set()).add(str(line[what]))
            most = max(map(len, kinds.values()), default=0)
            if most > 1:
                out.append(f"Lines were made from {most} different {noun}: run `compare` again.")
        return [item for note in out for item in (note, "")]


def _setting(plan: Plan, found: _Found, setting: str, metrics: Sequence[str], results: str) -> List[str]:
    rows = {row: _runs(plan, found, setting, row) for row in plan.rows}
    finished = [run for runs in rows.values() for run in runs]
    runs = {str(run): (run, found(run)) for run in plan.all_runs() if run.setting == setting}.values()
    errors = [f"- {run.row}, seed {run.seed}: {line['error']}" for run, line in runs if line and "error" in line]
    if not finished:
        return [f"## {setting}", "", *errors, ""] if errors else []
    # Of metrics with a cut-off, the deepest.
    names = [[m for m in finished[0]["test"] if m.split("@")[0] == name] for name in metrics]
    shown = [max(group, key=_cut) for group in names if group]
    judge = next((m for m in shown if m.startswith("ndcg")), shown[0])
    keys = ", ".join(f"{k}={v}" for k, v in plan.settings[setting].items())
    seeds = f"seeds {', '.join(str(s) for s in plan.seeds)}."
    text = [f"## {setting}", "", f"{keys}; {seeds}" if keys else seeds, ""]
    tests = _tests(plan, results, rows, finished)
    head = ["", *shown, *tests.head, "s / epoch", "ms / request", *plan.search, "seeds"]
    text += [_line(head), _line(["---"] * len(head))]
    probes = {
        name: {m: [run["probes"][name][m] for run in _one_per_seed(finished)] for m in shown}
        for name in finished[0]["probes"]
    }
    for name, values in probes.items():
        cells = [*(_cell(values[m]) for m in shown), *tests.of("probe", name)]
        text.append(_line([f"*{name}*", *cells, *[""] * (2 + len(plan.search)), ""]))
    bar = max(statistics.mean(values[judge]) for values in probes.values())
    for row, runs in rows.items():
        if not runs:
            continue
        mark = " †" if statistics.mean(r["test"][judge] for r in runs) < bar else ""
        cells = [*(_cell([r["test"][m] for r in runs]) for m in shown), *tests.of("row", row)]
        cost = [
            f"{statistics.median(r.get('seconds_per_epoch') or 0 for r in runs):.2f}",
            f"{statistics.median(r['ms_per_request'] for r in runs):.2f}",
        ]
        searched = [str(runs[0]["searched"].get(k, "")) for k in plan.search]
        text.append(_line([row + mark, *cells, *cost, *searched, str(len(runs))]))
    notes = [item for note in tests.notes for item in (note, "")]
    return [*text, "", *notes, *errors, *[""] * bool(errors)]


def _tests(plan: Plan, results: str, rows: Dict[str, List[Line]], finished: List[Line]) -> Tests:
    """Tests of a setting; none, without a word for it alone, where all lines are older than files of values."""
    if not any("requests" in line for line in finished):
        return Tests([], {}, [])
    metric = plan.test_metric or max((m for m in finished[0]["test"] if m.startswith("ndcg@")), key=_cut, default=None)
    if metric is None:
        return Tests([], {}, ["No differences are tested: there is no NDCG, so the plan must name a `test_metric`."])
    return run_tests(plan, results, rows, entries_of(rows, _one_per_seed(finished)), metric.lower())


def _runs(plan: Plan, found: _Found, setting: str, row: str) -> List[Dict[str, Any]]:
    """The runs of a row with the keys chosen on validation, one per seed."""
    searched = plan.chosen(setting, row, found)
    if searched is None:
        return []
    lines = [found(plan.run(setting, row, seed, searched)) for seed in plan.seeds]
    return [line for line in lines if line and "error" not in line]


def _text(keys: Dict[str, Any]) -> str:
    return json.dumps(keys, sort_keys=True)


def _one_per_seed(runs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    return list({run["seed"]: run for run in runs}.values())


def _cut(metric: str) -> int:
    return int(metric.partition("@")[2] or 0)


def _cell(values: List[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
