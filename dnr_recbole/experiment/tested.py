"""The tests of a table: every row and probe of a setting against the setting's reference, and what is said of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Tuple

from dnr_recbole.errors import DataError
from dnr_recbole.evaluator.per_request import format_p
from dnr_recbole.evaluator.significance import holm
from dnr_recbole.experiment.differences import MIN_SEEDS, Difference, Runs, difference
from dnr_recbole.experiment.plan import Plan
from dnr_recbole.experiment.request_files import load_entry
from dnr_recbole.experiment.rows import Line

ABOVE, BELOW, SPLIT, NONE = "▲", "▼", "◆", "≈"
Entries = Dict[int, Any]  # by seed: what a line says of its file, see request_files


@dataclass(frozen=True)
class Tests:
    """What a table shows of its tests.

    Attributes:
        head: titles of the columns; none if nothing was tested.
        cells: of these columns, by (kind, name) as in ``entries`` of :func:`run_tests`.
        notes: footnotes, one line of Markdown each.
    """

    head: List[str]
    cells: Dict[Tuple[str, str], List[str]]
    notes: List[str]

    def of(self, kind: str, name: str) -> List[str]:
        return self.cells.get((kind, name), ["" for _ in self.head])


def entries_of(rows: Dict[str, List[Line]], shown: List[Line]) -> Dict[Tuple[str, str], Entries]:
    """What the lines of a table say of their files, by ("probe" or "row", name); ``shown``: whose probes it shows."""
    probes = list(shown[0]["probes"]) if shown else []
    said: Dict[Tuple[str, str], Entries] = {
        ("probe", name): {line["seed"]: _get(line.get("probe_requests"), name) for line in shown} for name in probes
    }
    said.update({("row", name): {r["seed"]: r.get("requests") for r in lines} for name, lines in rows.items() if lines})
    return said


def run_tests(
    plan: Plan, results: str, rows: Dict[str, List[Line]], entries: Dict[Tuple[str, str], Entries], metric: str
) -> Tests:
    """Test everything in ``entries`` against the plan's reference, or the row that is best on validation.

    Args:
        plan: its ``reference``, ``alpha`` and ``seed_key``.
        results: path of the results file.
        rows: lines of the runs of a setting, one per seed, by row.
        entries: of :func:`entries_of`.
        metric: what is tested; its values lie in the files.
    """
    reference = _reference(plan, rows)
    if reference is None:
        why = "rows choose by different metrics on validation, so the plan must name a `reference`"
        return Tests([], {}, [f"No differences are tested: {why}."])
    if reference not in entries:
        return Tests([], {}, [f"No differences are tested: the reference {plan.reference} has no finished run here."])
    own, lost = _load(results, entries[reference])
    if not own:
        why = f"No differences are tested: the reference {reference[1]} has no values per request"
        return Tests([], {}, [f"{why}: {_reasons(lost)}."])
    found: Dict[Tuple[str, str], Difference] = {}
    failed: Dict[str, List[str]] = defaultdict(list)  # reason → names
    partly = []
    for key, said in entries.items():
        if key == reference:
            continue
        runs, missing = _load(results, said)
        try:
            if not runs:
                raise DataError(_reasons(missing))
            found[key] = difference(runs, own, metric, 1 - plan.alpha, plan.seed_key == "init_seed")
        except DataError as error:
            failed[str(error)].append(key[1])
            continue
        absent = {**lost, **missing, **{s: "no run" for s in set(own) ^ set(runs) if s not in {**lost, **missing}}}
        if absent:
            partly.append(f"{key[1]} is tested on {_seeds(found[key].seeds)} only: {_reasons(absent)}.")
    notes = [f"Not tested: {', '.join(names)}, because {reason}." for reason, names in failed.items()]
    if not found:
        return Tests([], {}, [*notes, *partly])
    return _shown(plan, reference, metric, found, [*notes, *partly], entries)


def _shown(plan: Plan, reference, metric: str, found: Dict[Tuple[str, str], Difference], notes, entries) -> Tests:
    adjusted = dict(zip(found, holm([test.p_users for test in found.values()])))
    trained = {key: test for key, test in found.items() if test.p_seeds is not None}
    trained_p = dict(zip(trained, holm([test.p_seeds for test in trained.values()])))
    head = [f"{metric} − {reference[1]}", "p (users)", *["p (seeds)"] * bool(trained)]
    cells = {key: ["not tested", "", *[""] * bool(trained)] for key in entries}
    cells[reference] = ["reference", "", *[""] * bool(trained)]
    marks = set()
    for key, test in found.items():
        mark = _mark(adjusted[key], plan.alpha, test.mean, 1 if test.ranks_above else -1)
        interval = f"{100 * test.mean:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}]"
        cells[key] = [interval, f"{format_p(adjusted[key])} {mark}"]
        marks.add(mark)
        if trained:
            cells[key].append("")
        if key in trained:
            mark = _mark(trained_p[key], plan.alpha, test.mean_seeds, test.mean_seeds)
            cells[key][2] = f"{format_p(trained_p[key])} {mark}"
    return Tests(head, cells, [*_legend(plan, reference, metric, found, trained, SPLIT in marks), *notes])


def _legend(plan: Plan, reference, metric: str, found, trained, split: bool) -> List[str]:
    level = f"{100 * (1 - plan.alpha):g} %"
    chosen = "named in the plan" if plan.reference else "the best row on validation"
    users = _range(test.n_users for test in found.values())
    requests = _range(test.n_requests for test in found.values())
    seeds = _range(len(test.seeds) for test in found.values())
    text = [
        f"{ABOVE} / {BELOW}: significantly above / below the reference {reference[1]} ({chosen}) in {metric}; "
        f"{NONE}: no difference seen. Level {plan.alpha:g}, p by Holm's method for {len(found)} comparisons.",
        f"p (users): Wilcoxon's signed-rank test. Unit: users, {users} of them with {requests} evaluated requests in "
        f"{seeds} seed(s); values are averaged over a user's requests, then over the seeds that evaluate the user. "
        f"Difference: mean over users in percentage points [{level} bootstrap interval over users, of each difference "
        "alone]; the columns before it are means over requests.",
    ]
    if split:
        text.append(f"{SPLIT}: significant, but most users lie on one side of the reference and the mean on the other.")
    if trained:
        n = _range(len(test.seeds) for test in trained.values())
        text.append(f"p (seeds): paired t-test over {n} seeds, by Holm's method for {len(trained)} comparisons.")
    elif plan.seed_key == "init_seed":
        text.append(f"No test over seeds: it needs {MIN_SEEDS}.")
    return text


def _mark(p: float, alpha: float, mean: float, ranks: float) -> str:
    if p >= alpha:
        return NONE
    if mean * ranks <= 0:
        return SPLIT
    return ABOVE if mean > 0 else BELOW


def _reference(plan: Plan, rows: Dict[str, List[Line]]) -> Optional[Tuple[str, str]]:
    if plan.reference is not None:
        return ("row" if plan.reference in plan.rows else "probe", plan.reference)
    chosen_by = {str((r.get("keys") or {}).get("valid_metric")) for runs in rows.values() for r in runs}
    if len(chosen_by) > 1:
        return None
    scores = {row: statistics.mean(r["best_valid_score"] for r in runs) for row, runs in rows.items() if runs}
    bigger = next(r.get("valid_score_bigger", True) for runs in rows.values() for r in runs)
    return "row", (max if bigger else min)(scores, key=scores.get)


def _load(results: str, entries: Entries) -> Tuple[Runs, Dict[int, str]]:
    """The values that can be used, and why the others cannot, by seed."""
    runs, lost = {}, {}
    for seed, entry in entries.items():
        try:
            runs[seed] = load_entry(results, entry)
        except DataError as error:
            lost[seed] = str(error)
    return runs, lost


def _get(entries: Any, name: str) -> Any:
    return entries.get(name) if isinstance(entries, dict) else None


def _reasons(lost: Dict[int, str]) -> str:
    seeds = defaultdict(list)
    for seed, reason in lost.items():
        seeds[reason].append(seed)
    return "; ".join(f"{_seeds(of)}: {reason}" for reason, of in seeds.items())


def _seeds(seeds: List[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"


def _range(values: Iterable[int]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
