"""Markdown tables from the lines of :mod:`dnr_recbole.experiment.compare`."""

from __future__ import annotations

import statistics
from typing import Any, Dict, List, Optional, Sequence

from dnr_recbole.experiment.plan import Plan, Run, place, read_plan
from dnr_recbole.experiment.rows import Line, read_rows

_SHOWN = ("ndcg", "map", "precision", "f1", "recall", "gauc", "pooledauc", "coverage")


def table(plan_file: str, results: str, metrics: Sequence[str] = _SHOWN) -> str:
    """One table per setting: mean ± standard deviation over seeds, probes, training and prediction time.

    Values are percentages. A row in italics is a probe: a ranking without any learning. A row marked † has a
    lower mean NDCG than one of the probes. Lines whose keys are not those that the plan gives now are left out, and
    counted below the tables.
    """
    plan, lines = read_plan(plan_file), read_rows(results)
    found = _Found(plan, lines)
    text: List[str] = []
    for setting in plan.settings:
        text += _setting(plan, found, setting, metrics)
    return "\n".join([*text, *found.notes()])


class _Found:
    """The line of each run: the last one whose keys are the run's."""

    def __init__(self, plan: Plan, lines: List[Line]):
        self.by_place: Dict[str, Line] = {}
        keys = {run.place: run.keys for run in plan.all_runs()}
        self.stale = self.unchecked = 0
        for line in lines:
            at = place(**line)
            if line.get("keys") is None and at in keys:
                self.unchecked += "error" not in line  # written before lines carried their keys
            elif line.get("keys") != keys.get(at):
                self.stale += 1
                continue
            self.by_place[at] = line

    def __call__(self, run: Run) -> Optional[Line]:
        return self.by_place.get(run.place)

    def notes(self) -> List[str]:
        out = []
        if self.stale:
            out.append(f"{self.stale} lines of the results belong to no run of this plan and are left out.")
        if self.unchecked:
            out.append(f"{self.unchecked} lines do not say which keys they were made with: they stand by their names.")
        for what, noun in (("files", "data"), ("code", "versions of the code")):
            kinds = {str(line[what]) for line in self.by_place.values() if line.get(what)}
            if len(kinds) > 1:
                out.append(f"Lines were made from {len(kinds)} different {noun}: run `compare` again.")
        return [item for note in out for item in (note, "")]


def _setting(plan: Plan, found: _Found, setting: str, metrics: Sequence[str]) -> List[str]:
    rows = {row: _runs(plan, found, setting, row) for row in plan.rows}
    finished = [run for runs in rows.values() for run in runs]
    lines = [line for line in found.by_place.values() if line["setting"] == setting and line["row"] in plan.rows]
    errors = [f"- {line['row']}, seed {line['seed']}: {line['error']}" for line in lines if "error" in line]
    if not finished:
        return [f"## {setting}", "", *errors, ""] if errors else []
    # Of metrics with a cut-off, the deepest.
    names = [[m for m in finished[0]["test"] if m.split("@")[0] == name] for name in metrics]
    shown = [max(group, key=_cut) for group in names if group]
    judge = next((m for m in shown if m.startswith("ndcg")), shown[0])
    keys = ", ".join(f"{k}={v}" for k, v in plan.settings[setting].items())
    seeds = f"seeds {', '.join(str(s) for s in plan.seeds)}."
    text = [f"## {setting}", "", f"{keys}; {seeds}" if keys else seeds, ""]
    head = ["", *shown, "s / epoch", "ms / request", *plan.search, "seeds"]
    text += [_line(head), _line(["---"] * len(head))]
    probes = {
        name: {m: [run["probes"][name][m] for run in _one_per_seed(finished)] for m in shown}
        for name in finished[0]["probes"]
    }
    for name, values in probes.items():
        text.append(_line([f"*{name}*", *(_cell(values[m]) for m in shown), *[""] * (2 + len(plan.search)), ""]))
    bar = max(statistics.mean(values[judge]) for values in probes.values())
    for row, runs in rows.items():
        if not runs:
            continue
        mark = " †" if statistics.mean(r["test"][judge] for r in runs) < bar else ""
        cells = [_cell([r["test"][m] for r in runs]) for m in shown]
        cost = [
            f"{statistics.median(r['seconds_per_epoch'] or 0 for r in runs):.2f}",
            f"{statistics.median(r['ms_per_request'] for r in runs):.2f}",
        ]
        searched = [str(runs[0]["searched"].get(k, "")) for k in plan.search]
        text.append(_line([row + mark, *cells, *cost, *searched, str(len(runs))]))
    return [*text, "", *errors, *[""] * bool(errors)]


def _runs(plan: Plan, found: _Found, setting: str, row: str) -> List[Dict[str, Any]]:
    """The runs of a row with the keys chosen on validation, one per seed."""
    searched = plan.chosen(setting, row, found)
    if searched is None:
        return []
    lines = [found(plan.run(setting, row, seed, searched)) for seed in plan.seeds]
    return [line for line in lines if line and "error" not in line]


def _one_per_seed(runs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    return list({run["seed"]: run for run in runs}.values())


def _cut(metric: str) -> int:
    return int(metric.partition("@")[2] or 0)


def _cell(values: List[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
