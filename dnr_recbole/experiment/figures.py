"""The plots of a report, as SVG with texts that are texts."""

from __future__ import annotations

import io
import re
import statistics
from collections import defaultdict
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import matplotlib

matplotlib.use("Agg")
import numpy as np  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402
from scipy import stats  # noqa: E402

from dnr_recbole.errors import ConfigError  # noqa: E402
from dnr_recbole.experiment.table import Finished  # noqa: E402

_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "dnr", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
Point = Tuple[float, float]  # mean, half of the 95 % t-interval


def draw_runs(figure, found: Finished) -> str:
    """A figure of kind ``rows``, ``curve`` or ``cost``."""
    return {"rows": _rows, "curve": _curve, "cost": _cost}[figure.kind](figure, found)


def draw_lines(figure, lines: Sequence[Dict[str, Any]]) -> str:
    """A figure of kind ``groups``, ``densities`` or ``points``, of JSON lines."""
    return {"groups": _groups, "densities": _densities, "points": _points}[figure.kind](figure, lines)


def _point(values: Sequence[float]) -> Point:
    values = [100 * value for value in values]
    if len(values) < 2:
        return values[0], 0.0
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def _rows(figure, found: Finished) -> str:
    """A panel for each setting: rows and probes from best to worst."""
    return _svg(rows_canvas(found, figure.metric))


def rows_canvas(
    found: Finished, metric: str, colours: Optional[Mapping[str, str]] = None, values: bool = False
) -> Canvas:
    """Rows and probes of each setting from best to worst, with 95 % t-intervals over the runs of a row.

    Args:
        found: what is drawn.
        metric: of which.
        colours: of rows and probes that shall not look like the others.
        values: whether the means stand beside the marks.
    """
    panels = {
        setting: {
            **{row: ("C0", _point([run["test"][metric] for run in runs])) for row, runs in rows.items() if runs},
            **{name: ("C7", _point([values[metric]])) for name, values in found.probes[setting].items()},
        }
        for setting, rows in found.rows.items()
        if any(rows.values())
    }
    height = 0.6 + 0.19 * max(len(panel) for panel in panels.values())
    canvas, axes = _canvas(len(panels), height)
    for axis, (setting, panel) in zip(axes, panels.items()):
        ranked = sorted(panel.items(), key=lambda item: item[1][1][0])
        for place, (name, (colour, (mean, half))) in enumerate(ranked):
            colour = (colours or {}).get(name, colour)
            axis.errorbar(mean, place, xerr=half, fmt="o", color=colour, markersize=4, capsize=2)
            if values:  # left of the interval: the best would leave the panel on the right
                axis.text(mean - half - 0.4, place, f"{mean:.1f}", ha="right", va="center", fontsize=7, color=colour)
        axis.set_yticks(range(len(ranked)), [name for name, _ in ranked])
        axis.set_title(setting)
        axis.set_xlabel(f"{metric}, %")
        axis.grid(axis="x", alpha=0.3)
    return canvas


def _curve(figure, found: Finished) -> str:
    """Lines over settings or over rows, whose names hold a number each."""
    canvas, axes = _canvas(1, 3.6)
    series: Dict[str, List[Tuple[float, Point]]] = defaultdict(list)
    for setting, rows in found.rows.items():
        for row, runs in rows.items():
            name = setting if figure.x == "settings" else row
            number = re.search(r"-?\d+(?:\.\d+)?", name.replace(",", ""))
            if runs and number:
                line = row if figure.x == "settings" else name[: number.start()].strip() or setting
                series[line].append((float(number[0]), _point([run["test"][figure.metric] for run in runs])))
    for name, points in series.items():
        points.sort()
        x, means, halves = [p[0] for p in points], [p[1][0] for p in points], [p[1][1] for p in points]
        axes[0].errorbar(x, means, yerr=halves, marker="o", markersize=3, capsize=2, label=name)
    spread = [value for points in series.values() for value, _ in points]
    if not spread:
        raise ConfigError(f"a curve over {figure.x} needs names with numbers in them")
    if min(spread) > 0 and max(spread) / min(spread) > 20:
        axes[0].set_xscale("log")
    _finish(axes[0], figure, figure.label or figure.x)
    return _svg(canvas)


def _cost(figure, found: Finished) -> str:
    """The metric against milliseconds per request."""
    canvas, axes = _canvas(1, 4.4)
    points = sorted(
        (
            statistics.median(run["ms_per_request"] for run in runs),
            row,
            _point([run["test"][figure.metric] for run in runs]),
        )
        for rows in found.rows.values()
        for row, runs in rows.items()
        if runs
    )
    for number, (cost, row, (mean, half)) in enumerate(points, 1):  # names beside the marks would cover each other
        axes[0].errorbar(
            cost, mean, yerr=half, fmt="o", markersize=3, capsize=2, color=f"C{number % 10}", label=f"{number}  {row}"
        )
        axes[0].annotate(str(number), (cost, mean), xytext=(3, 3), textcoords="offset points", fontsize=7)
    axes[0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(points) // 24)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("ms per request, in batches, on the machine of the run")
    axes[0].set_ylabel(f"{figure.metric}, %")
    axes[0].grid(alpha=0.3)
    return _svg(canvas)


def _groups(figure, lines: Sequence[Dict[str, Any]]) -> str:
    """One line of marks for each method over the settings in their order."""
    canvas, axes = _canvas(1, 3.6)
    settings = list(dict.fromkeys(line["setting"] for line in lines))
    for number, method in enumerate(dict.fromkeys(line["method"] for line in lines)):
        values = {
            place: [line[figure.metric] for line in lines if (line["method"], line["setting"]) == (method, setting)]
            for place, setting in enumerate(settings)
        }
        points = [_point(each) for each in values.values() if each]
        x = np.array([place for place, each in values.items() if each]) + 0.06 * number
        axes[0].errorbar(
            x, [p[0] for p in points], yerr=[p[1] for p in points], marker="o", markersize=3, capsize=2, label=method
        )
    axes[0].set_xticks(range(len(settings)), settings)
    _finish(axes[0], figure, figure.label)
    return _svg(canvas)


def _densities(figure, lines: Sequence[Dict[str, Any]]) -> str:
    """Densities by name, a panel for each label."""
    labels = sorted({line["label"] for line in lines})
    canvas, axes = _canvas(len(labels), 3.2)
    for axis, label in zip(axes, labels):
        for line in lines:
            if line["label"] == label:
                style = {"color": "black", "linewidth": 2} if line["name"] == "true" else {}
                axis.plot(line["x"], line["density"], label=line["name"], **style)
        axis.set_title(f"z = {label}")
        axis.set_xlabel("x")
        axis.set_ylim(0, min(axis.get_ylim()[1], 12))
        axis.legend(fontsize=7)
    return _svg(canvas)


def _points(figure, lines: Sequence[Dict[str, Any]]) -> str:
    """Points by name, in a panel for each ``panel``."""
    panels = list(dict.fromkeys(line["panel"] for line in lines))
    canvas, axes = _canvas(len(panels), 3.2)
    for axis, panel in zip(axes, panels):
        for line in lines:
            if line["panel"] == panel:
                axis.scatter(line["x"], line["y"], s=6, alpha=0.5, linewidths=0, label=line["name"])
        axis.set_title(panel)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.legend(fontsize=7)
    return _svg(canvas)


def _finish(axis, figure, label: str) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel(f"{figure.metric}, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _canvas(panels: int, height: float):
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(min(4.2 * panels + 2.5, 12), height * (1 + (panels - 1) // 3)), layout="constrained")
        grid = canvas.subplots((panels + 2) // 3 if panels > 3 else 1, min(panels, 3), squeeze=False)
    axes = list(grid.flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return canvas, axes[:panels]


def _svg(canvas: Canvas) -> str:
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
