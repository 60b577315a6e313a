"""Markdown tables from the lines of :mod:`dnr_recbole.experiment.compare`."""

from __future__ import annotations

import statistics
from typing import Any, Dict, List, Optional, Sequence

from dnr_recbole.experiment.compare import chosen, place, read_plan, read_rows

_SHOWN = ("ndcg", "map", "precision", "f1", "recall", "gauc", "pooledauc", "coverage")


def table(plan_file: str, results: str, metrics: Sequence[str] = _SHOWN) -> str:
    """One table per setting: mean ± standard deviation over seeds, probes, training and prediction time.

    Values are percentages. A row in italics is a probe: a ranking without any learning. A row marked † has a
    lower mean NDCG than one of the probes.
    """
    plan, lines = read_plan(plan_file), read_rows(results)
    done = {place(**r): r for r in lines}  # of several lines of a run the last counts
    text: List[str] = []
    for setting in plan["settings"]:
        rows = {row: _runs(plan, done, setting, row) for row in plan["rows"]}
        finished = [run for runs in rows.values() for run in runs]
        failed = {place(**r): r for r in lines if r["setting"] == setting and "error" in r}
        errors = [f"- {r['row']}, seed {r['seed']}: {r['error']}" for at, r in failed.items() if done[at] is r]
        if not finished:
            text += [f"## {setting}", "", *errors, ""] if errors else []
            continue
        # Of metrics with a cut-off, the deepest.
        found = [[m for m in finished[0]["test"] if m.split("@")[0] == name] for name in metrics]
        shown = [max(group, key=_cut) for group in found if group]
        judge = next((m for m in shown if m.startswith("ndcg")), shown[0])
        keys = ", ".join(f"{k}={v}" for k, v in plan["settings"][setting].items())
        seeds = f"seeds {', '.join(str(s) for s in plan['seeds'])}."
        text += [f"## {setting}", "", f"{keys}; {seeds}" if keys else seeds, ""]
        head = ["", *shown, "s / epoch", "ms / request", *plan["search"], "seeds"]
        text += [_line(head), _line(["---"] * len(head))]
        probes = {
            name: {m: [run["probes"][name][m] for run in _one_per_seed(finished)] for m in shown}
            for name in finished[0]["probes"]
        }
        for name, values in probes.items():
            text.append(_line([f"*{name}*", *(_cell(values[m]) for m in shown), *[""] * (2 + len(plan["search"])), ""]))
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
            found = [str(runs[0]["searched"].get(k, "")) for k in plan["search"]]
            text.append(_line([row + mark, *cells, *cost, *found, str(len(runs))]))
        text += ["", *errors, *[""] * bool(errors)]
    return "\n".join(text)


def _runs(plan, done, setting: str, row: str) -> List[Dict[str, Any]]:
    """The runs of a row with the keys chosen on validation, one per seed."""
    searched: Optional[Dict[str, Any]] = chosen(plan, done, setting, row)
    if searched is None:
        return []
    found = [done.get(place(setting, row, seed, searched)) for seed in plan["seeds"]]
    return [run for run in found if run and "error" not in run]


def _one_per_seed(runs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    return list({run["seed"]: run for run in runs}.values())


def _cut(metric: str) -> int:
    return int(metric.partition("@")[2] or 0)


def _cell(values: List[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
