"""The pictures of README.md: `python docs/images/make.py` writes them beside this file, or into a folder it is given.

Each picture carries, as the text "Description" of the PNG, all that is written in it, so that a test can tell whether
the committed one shows today's results without comparing pixels, which differ between versions of matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Optional

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from dnr_recbole.experiment.figures import rows_canvas
from dnr_recbole.experiment.table import Finished, finished_runs

RESULTS = Path(__file__).resolve().parents[2] / "results"
INK, GREY, BLUE, ORANGE = "#222222", "#777777", "#1f5fa8", "#c2570c"
PROBES = {"score_desc": "order by score (no model)", "popularity_desc": "popularity (no model)", "random": "random"}
STYLE = {"font.family": "DejaVu Sans", "svg.hashsalt": "dnr"}  # matplotlib brings this font along


def results() -> Figure:
    """NDCG@6 of every reranker, LambdaMART and three rankings without a model."""
    found = finished_runs(str(RESULTS / "plan_rerankers.yaml"), str(RESULTS / "rerankers.jsonl"))
    probes = {PROBES[name]: values for name, values in found.probes["MF"].items() if name in PROBES}
    trees = [row for row in found.rows["MF"] if row.startswith("LambdaMART")]
    colours = {**dict.fromkeys(trees, ORANGE), **dict.fromkeys(probes, GREY)}
    canvas = rows_canvas(Finished(found.rows, {"MF": probes}), "ndcg@6", colours, values=True)
    axis = canvas.axes[0]
    axis.set_xlim(7, 33)
    axis.set_title(
        "MovieLens-1M, users held out, 50 candidates of an MF;\nthe same inputs for all unless a name says less",
        fontsize=9,
    )
    axis.set_xlabel("NDCG@6, %, with 95 % intervals over initialisations where there are several\n"
                    "blue: neural; orange: LightGBM; grey: no model", fontsize=8)  # fmt: skip
    canvas.set_size_inches(7.2, 5.2)
    return canvas


def pipeline() -> Figure:
    """The two stages, and where DNR's noise enters in training."""
    canvas = Figure(figsize=(9.2, 4.3))
    axis = canvas.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 92), ylim=(0, 43))
    axis.axis("off")

    def box(x, y, width, height, text, colour=INK, fill="#ffffff", size=9.0):
        axis.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=1", fc=fill, ec=colour, lw=1.3))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=colour, fontsize=size)

    def arrow(start, end, colour=INK, style="-", bend=0.0):
        axis.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", mutation_scale=12, color=colour, linestyle=style, lw=1.3,
                connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip

    def note(x, y, text, colour=GREY, size=8.0, ha="center"):
        axis.text(x, y, text, ha=ha, va="center", color=colour, fontsize=size)

    axis.add_patch(FancyBboxPatch((1, 1), 90, 16.5, "round,pad=0,rounding_size=1", fc="#fdf1e7", ec="none"))
    note(2, 41, "when it ranks", INK, 9, "left")
    note(2, 15.8, "only in training (DNR)", ORANGE, 9, "left")

    box(2, 26, 13, 9, "user, history,\nall items")
    arrow((15, 30.5), (19, 30.5))
    box(19, 26, 13, 9, "retriever", BLUE, "#eaf1fa")
    note(25.5, 24, "stage 1")
    arrow((32, 30.5), (36, 30.5))
    box(36, 21, 16, 18.5, "", INK)
    note(44, 38, "candidates, scores x", INK, 8)
    for place, score in enumerate((0.92, 0.88, 0.71, 0.55, 0.31)):
        y = 35 - 2.7 * place
        note(38.6, y, f"item {'abcde'[place]}", INK, 7.5)
        axis.barh(y, 7.5 * score, height=1.4, left=41.5, color="#9db9dc")
        note(50.4, y, f"{score:.2f}", INK, 7)
    arrow((52, 30.5), (58, 30.5))
    note(55, 32.2, "x", INK, 9)
    box(58, 25, 14, 11, "reranker\nq(z | x, u)", BLUE, "#eaf1fa")
    note(65, 37.6, "stage 2: reads the list")
    arrow((72, 30.5), (77, 30.5))
    box(77, 21, 13, 18.5, "", INK)
    note(83.5, 38, "slate", INK, 8)
    for place, item in enumerate("cabed"):
        note(83.5, 35 - 2.7 * place, f"{place + 1}.  item {item}", INK, 7.5)

    box(3, 4.5, 12, 7, "clicks z", ORANGE)
    box(19, 4.5, 30, 7, "noise: x' = (1 − λc) z + λc ε\nthen learned: x' = f(u, z, noise)", ORANGE, size=8.5)
    arrow((15, 8), (19, 8), ORANGE)
    arrow((44, 21), (36, 11.5), ORANGE, "--")
    note(37, 19, "x' shall look like x (L_x)", ORANGE, 7.5, "right")
    arrow((49, 8), (61, 25), ORANGE, bend=0.25)
    note(56, 18, "x'", ORANGE, 9)
    arrow((67.5, 25), (67.5, 11.5), ORANGE)
    box(60, 4.5, 29, 7, "learns from x and from x':\nL_direct + λm L_z", ORANGE, size=8.5)
    arrow((60, 6), (49, 6), ORANGE, "--")
    note(54.5, 3.2, "adversary: L_adv", ORANGE, 7.5)
    return canvas


def save(canvas: Figure, path: Path) -> None:
    """Write a picture with its texts; the same for the same drawing, whenever it is made."""
    canvas.draw_without_rendering()  # tick labels have their texts then
    texts = [text.get_text() for text in canvas.findobj(Text) if text.get_text()]
    canvas.savefig(path, dpi=130, facecolor="white", metadata={"Description": json.dumps(texts), "Software": None})


def make(folder: Optional[Path] = None) -> None:
    """Write all pictures into ``folder``."""
    folder = folder or Path(__file__).parent
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}):
        for draw in (pipeline, results):
            save(draw(), folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
