"""The pictures of README.md: the script runs, and the committed ones say what it writes today."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from places import ROOT

from dnr_recbole.experiment.table import finished_runs

FOLDER = ROOT / "docs" / "images"


def texts(path: Path):
    """All that is written in a picture, as the script put it beside the pixels."""
    with Image.open(path) as picture:
        return json.loads(picture.info["Description"])


def made(root: Path, out: Path):
    out.mkdir()
    command = [sys.executable, str(root / "docs" / "images" / "make.py"), str(out)]
    subprocess.run(command, check=True, timeout=300)
    return sorted(path.name for path in out.iterdir())


def test_the_committed_pictures_are_those_of_the_script_and_the_results(tmp_path):
    names = made(ROOT, tmp_path / "out")
    assert names == ["pipeline.png", "results.png"]
    for name in names:
        assert texts(FOLDER / name) == texts(tmp_path / "out" / name), f"{name}: run python docs/images/make.py"
        with Image.open(FOLDER / name) as picture:
            assert picture.getpixel((1, 1))[:3] == (255, 255, 255)  # readable on a dark page as well
            assert min(picture.size) > 400 and len(picture.getcolors(2**20)) > 50


def test_the_picture_of_results_shows_their_means():
    shown = texts(FOLDER / "results.png")
    found = finished_runs(str(ROOT / "results/plan_rerankers.yaml"), str(ROOT / "results/rerankers.jsonl"))
    means = [100 * sum(run["test"]["ndcg@6"] for run in runs) / len(runs) for runs in found.rows["MF"].values()]
    means += [100 * found.probes["MF"][name]["ndcg@6"] for name in ("score_desc", "popularity_desc", "random")]
    values = [text for text in shown if re.fullmatch(r"\d+\.\d", text)]
    assert sorted(values) == sorted(f"{mean:.1f}" for mean in means) and len(values) > 20
    assert set(found.rows["MF"]) <= set(shown)


@pytest.mark.slow
def test_other_results_make_another_picture(tmp_path):
    for name in ("docs/images/make.py", "results/plan_rerankers.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    lines = [json.loads(line) for line in (ROOT / "results/rerankers.jsonl").read_text().splitlines()]
    for line in lines:
        line["test"]["ndcg@6"] /= 2 if line["row"] == "PRM" else 1
    (tmp_path / "results/rerankers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made(tmp_path, tmp_path / "out")
    assert texts(tmp_path / "out" / "results.png") != texts(FOLDER / "results.png")
    assert texts(tmp_path / "out" / "pipeline.png") == texts(FOLDER / "pipeline.png")
