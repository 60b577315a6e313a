"""One report of several plans: Markdown for the docs, and a page with plots that needs no other file and no network.

``dnr-recbole report results/report.yaml docs/results.md docs/report.html``; the YAML names plans, their results, what
to draw, and what to say::

    title: What the experiments say
    text: Markdown that opens the page.
    paper: paper_values.csv                # columns table, method, dataset, metric, value
    sections:
      - title: Every reranker under the paper's protocol
        plan: plan_main.yaml
        results: paper.jsonl
        text: Markdown above the table.
        paper: {table: "1", dataset: ML-1M}          # adds the paper's value beside ours, by the name of the row
        figures: [{kind: rows}, {kind: cost}]

Kinds of figures: ``rows`` (a mark and an interval for each row and probe), ``curve`` (``x: settings`` or ``rows``: one
line for each row over the settings, or one over rows whose names end in numbers), ``cost`` (the metric against
milliseconds a request), and, of a section with ``lines`` in the place of plan and results, ``groups``, ``densities``
and ``points``.
``only`` names the settings and rows that are drawn.
"""

from __future__ import annotations

import csv
import html
import json
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, Literal, Optional, Sequence, Tuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dnr_recbole.errors import ConfigError, closest
from dnr_recbole.experiment.table import Finished, finished_runs, table
from dnr_recbole.files import atomic_write

# Kinds of figures that are drawn of JSON lines, and what each of these must have beside the metric of groups.
_OF_LINES: Dict[str, Tuple[str, ...]] = {
    "groups": ("method", "setting"),
    "densities": ("name", "label", "x", "density"),
    "points": ("panel", "name", "x", "y"),
}
_PAPER_NAMES = {"auc": "pooledauc"}  # the paper's name of a metric → ours
_OF_RUNS: Dict[str, Callable[[Dict[str, Any]], float]] = {  # what the paper tells of a run beside its metrics
    "seconds per epoch": lambda run: run["seconds_per_epoch"],
    "retriever's auc": lambda run: 100 * run["retriever"]["auc"],
}
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--line:#d0d7de;--soft:#57606a}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--line:#30363d;--soft:#9198a1}}
body{margin:2rem auto;max-width:72rem;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}
body{color:var(--ink);background:var(--paper)}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{border:1px solid var(--line);padding:.2rem .5rem;text-align:left;white-space:nowrap}
figure{margin:1.5rem 0}figure svg{max-width:100%;height:auto;background:#fff;border:1px solid var(--line)}
figcaption{color:var(--soft);font-size:14px}summary{cursor:pointer}nav li{display:inline-block;margin-right:1rem}
"""


class Figure(BaseModel):
    """What to draw of a section."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["rows", "curve", "cost", "groups", "densities", "points"]
    metric: str = "ndcg@6"
    x: Literal["settings", "rows"] = "settings"
    only: List[str] = Field(default_factory=list)  # settings and rows to draw; [] = all
    label: str = ""  # of the x axis of a curve
    caption: str = ""


class PaperTable(BaseModel):
    """Which of the paper's values stand beside ours."""

    model_config = ConfigDict(extra="forbid")

    table: str
    dataset: str
    rows: Dict[str, str] = Field(default_factory=dict)  # our "row" or "row, setting" → the paper's, where they differ


class Section(BaseModel):
    """A part of the report."""

    model_config = ConfigDict(extra="forbid")

    title: str
    text: str = ""
    plan: Optional[str] = None
    results: Optional[str] = None
    tables: bool = True  # of the plan
    lines: Optional[str] = (
        None  # JSON lines with method, setting, seed, …; name, label, x, density; or panel, name, x, y
    )
    paper: Optional[PaperTable] = None
    figures: List[Figure] = Field(default_factory=list)

    @model_validator(mode="after")
    def _something_to_read(self) -> Section:
        if (self.plan is None) != (self.results is None):
            raise ValueError(f"section '{self.title}': plan and results belong together")
        if self.paper is not None and self.plan is None:
            raise ValueError(f"section '{self.title}': paper's values stand beside those of plan and results")
        for figure in self.figures:
            of_lines = figure.kind in _OF_LINES
            if (self.lines if of_lines else self.plan) is None:
                needed = "lines" if of_lines else "plan and results"
                raise ValueError(f"section '{self.title}': a figure of kind {figure.kind} needs {needed}")
            if of_lines and figure.only:
                raise ValueError(f"section '{self.title}': only: a figure of kind {figure.kind} draws all lines")
        return self


class Report(BaseModel):
    """The content of a report's YAML; see the module."""

    model_config = ConfigDict(extra="forbid")

    title: str
    text: str = ""
    paper: Optional[str] = None
    sections: List[Section] = Field(min_length=1)


def report(spec: str, markdown: str, page: str) -> None:
    """Write the Markdown and the HTML of a report, each whole or not at all.

    Raises:
        ConfigError: the YAML cannot be used, or the extra ``report`` is not installed.
    """
    try:
        import markdown as to_html  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"report needs {error.name}: pip install 'dnr_recbole[report]'") from None
    content, folder = _read(spec), Path(spec).parent
    values = _paper_values(folder / content.paper) if content.paper else {}
    parts = [(section, *_section(section, folder, values)) for section in content.sections]
    note = f"*Made by `dnr-recbole report {spec} {markdown} {page}`; do not edit.*"
    text = [f"# {content.title}", "", note, "", content.text.strip(), ""]
    for section, body, _ in parts:
        text += [f"## {section.title}", "", *body]
    _write(markdown, "\n".join(text).rstrip() + "\n")
    _write(page, _html(content, parts))


def _read(path: str) -> Report:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return Report.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"report {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"report {path} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(each) for each in first["loc"])
        raise ConfigError(f"report {path}, {where or 'content'}: {first['msg']}") from None


def _write(path: str, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


# ---------------------------------------------------------------------- a section


def _json_lines(path: Path) -> List[Dict[str, Any]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    lines: List[Dict[str, Any]] = []
    for text in texts:
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError):
            raise ConfigError(f"{path}, line {len(lines) + 1}: no JSON object") from None
    return lines


Values = Dict[Tuple[str, str, str, str], float]


def _section(section: Section, folder: Path, values: Values) -> Tuple[List[str], List[Tuple[Figure, str]]]:
    """Markdown lines, and the figures as SVG."""
    from dnr_recbole.experiment import figures

    body, drawn = [section.text.strip(), ""], []
    if section.plan is not None:
        plan, results = str(folder / section.plan), str(folder / section.results)
        found = finished_runs(plan, results)
        of_runs = [figure for figure in section.figures if figure.kind not in _OF_LINES]
        if of_runs and not any(runs for rows in found.rows.values() for runs in rows.values()):
            raise ConfigError(f"section '{section.title}': {results} has no finished run of {plan} to draw")
        if section.paper is not None:
            if not any(key[:2] == (section.paper.table, section.paper.dataset) for key in values):
                there = ", ".join(sorted({f"{key[0]} {key[1]}" for key in values})) or "none, for lack of the key paper"
                raise ConfigError(
                    f"section '{section.title}': there are no values of table {section.paper.table}, "
                    f"{section.paper.dataset}; there are: {there}"
                )
            body += [*beside_the_paper(found, section.paper, values), ""]
        if section.tables:
            body += [table(plan, results).replace("\n## ", "\n### ").replace("## ", "### ", 1).strip(), ""]
        for figure in of_runs:
            part = _part(section, found, figure)
            drawn.append((figure, figures.draw_runs(figure, part)))
    if section.lines is not None:
        lines = _json_lines(folder / section.lines)
        for figure in section.figures:
            if figure.kind in _OF_LINES:
                _check_lines(figure, lines, folder / section.lines)
                drawn.append((figure, figures.draw_lines(figure, lines)))
    return body, drawn


def _check_lines(figure: Figure, lines: Sequence[Dict[str, Any]], path: Path) -> None:
    """Raises:
    ConfigError: a line lacks what the figure draws.
    """
    needed = (*_OF_LINES[figure.kind], *((figure.metric,) if figure.kind == "groups" else ()))
    if not lines:
        raise ConfigError(f"{path} has no lines to draw")
    for number, line in enumerate(lines, 1):
        lacking = next((name for name in needed if name not in line), None)
        if lacking is not None:
            raise ConfigError(f"{path}, line {number}: a figure of kind {figure.kind} needs '{lacking}'")


def _part(section: Section, found: Finished, figure: Figure) -> Finished:
    """The settings and the rows that a figure wants.

    Raises:
        ConfigError: the plan has none of that name, or their runs have no such metric.
    """
    only, known = figure.only, {*found.rows, *(row for rows in found.rows.values() for row in rows)}
    unknown = next((name for name in only if name not in known), None)
    if unknown is not None:
        hint = closest(unknown, sorted(known)) or f"there are {', '.join(sorted(known))}"
        raise ConfigError(f"section '{section.title}': only: no setting and no row is called '{unknown}': {hint}")
    part = _chosen(found, only)
    values = [run["test"] for rows in part.rows.values() for runs in rows.values() for run in runs]
    if figure.kind == "rows":
        values += [each for setting in part.rows for each in part.probes[setting].values()]
    if not values:
        raise ConfigError(f"section '{section.title}': no run of {', '.join(only)} is finished")
    lacking = next((each for each in values if figure.metric not in each), None)
    if lacking is not None:
        hint = closest(figure.metric, lacking) or f"there are {', '.join(lacking)}"
        raise ConfigError(f"section '{section.title}': metric: not all have '{figure.metric}': {hint}")
    return part


def _chosen(found: Finished, only: List[str]) -> Finished:
    settings = [name for name in found.rows if name in only] or list(found.rows)
    return Finished(
        {
            setting: {row: runs for row, runs in found.rows[setting].items() if row in only}
            if set(found.rows[setting]) & set(only)
            else found.rows[setting]
            for setting in settings
        },
        found.probes,
    )


def _paper_values(path: Path) -> Values:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {
                (row["table"], row["dataset"], row["method"], row["metric"]): float(row["value"])
                for row in csv.DictReader(file)
            }
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} has no columns table, dataset, method, metric, value: {error}") from None


def beside_the_paper(found: Finished, chosen: PaperTable, values: Values) -> List[str]:
    """A Markdown table of our mean and the paper's value, for every row that the paper has; metrics in percent."""
    metrics = [name for t, d, _, name in values if (t, d) == (chosen.table, chosen.dataset)]
    metrics = list(dict.fromkeys(metrics))
    head = ["", *[f"{_PAPER_NAMES.get(name, name)}: here | paper" for name in metrics]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (2 * len(metrics) + 1)]
    for setting, rows in found.rows.items():
        for row, runs in rows.items():
            method = chosen.rows.get(f"{row}, {setting}", chosen.rows.get(row, row))
            theirs = [values.get((chosen.table, chosen.dataset, method, name)) for name in metrics]
            if not runs or all(value is None for value in theirs):
                continue
            cells = [row if len(found.rows) == 1 else f"{row}, {setting}"]
            for name, value in zip(metrics, theirs):
                ours = [_ours(run, name) for run in runs]
                cells.append("" if None in ours else f"{statistics.mean(ours):.2f}")
                cells.append("" if value is None else f"{value:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ours(run: Dict[str, Any], name: str) -> Optional[float]:
    if name in _OF_RUNS:
        return _OF_RUNS[name](run)
    value = run["test"].get(_PAPER_NAMES.get(name, name))
    return None if value is None else 100 * value


# ---------------------------------------------------------------------- the page


def _html(content: Report, parts: List[Any]) -> str:
    from markdown import markdown

    to_html = lambda text: markdown(text, extensions=["tables"])  # noqa: E731
    links = "".join(
        f'<li><a href="#part-{number}">{html.escape(section.title)}</a></li>'
        for number, (section, _, _) in enumerate(parts)
    )
    out = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(content.title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><main>',
        f"<h1>{html.escape(content.title)}</h1>{to_html(content.text)}<nav><ul>{links}</ul></nav>",
    ]
    for number, (section, body, drawn) in enumerate(parts):
        out.append(f'<section id="part-{number}"><h2>{html.escape(section.title)}</h2>{to_html(section.text)}')
        for figure, svg in drawn:
            caption = figure.caption or f"{section.title}: {figure.metric}"
            out.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")
        tables = "\n".join(body[1:]).strip()
        if tables:
            out.append(f"<details><summary>Tables</summary>{to_html(tables)}</details>")
        out.append("</section>")
    return "\n".join([*out, "</main></html>"]) + "\n"
