"""Make one row of every table again and compare it with the committed one.

    python benchmarks/repeat.py [results/NAME.jsonl …] [--out=results/repeated.jsonl]

Of every plan the row of a network and the row of trees that took least time, each with its committed seed and keys, by
today's code into a folder of its own. A line says how many of the metrics that tables show are the same to the last
displayed decimal, and the largest difference. Rounding differs between kinds of CPU, adds up over training steps, and
is another one after a change of the order of sums; where data, inputs or methods have changed, probes differ too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import tempfile
from pathlib import Path

import torch
import yaml

from dnr_recbole.experiment.compare import compare
from dnr_recbole.experiment.plan import read_plan
from dnr_recbole.experiment.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="default: of all plans")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "repeated.jsonl", help="what is there is not repeated"
    )
    arguments = parser.parse_args()
    files = arguments.results or sorted((ROOT / "results").glob("*.jsonl"))
    known = {(line["results"], line["identity"]) for line in _lines(arguments.out)}
    for path in files:
        plan = path.with_name(f"plan_{path.stem}.yaml")
        for line in _quickest(path.resolve(), plan.resolve()) if plan.is_file() else []:
            if (path.name, line["identity"]) not in known:
                with open(arguments.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(repeated(path.name, plan.resolve(), line), ensure_ascii=False) + "\n")


def repeated(results: str, plan: Path, line: dict) -> dict:
    """What came of making a line again."""
    content = yaml.safe_load(plan.read_text(encoding="utf-8"))
    content.update(
        rows={line["row"]: content["rows"][line["row"]]},
        settings={line["setting"]: (content.get("settings") or {"default": {}})[line["setting"]]},
        fixed={**content["fixed"], **line["searched"]},
        seeds=[line["seed"]], reference=None, search={},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        own = Path(folder) / "plan.yaml"
        own.write_text(yaml.safe_dump(content), encoding="utf-8")
        compare(str(own), str(Path(folder) / "again.jsonl"))
        (new,) = read_rows(str(Path(folder) / "again.jsonl"))
    differences = [100 * abs(new["test"][name] - value) for name, value in line["test"].items()]
    same = [f"{100 * new['test'][name]:.2f}" == f"{100 * value:.2f}" for name, value in line["test"].items()]
    found = {
        "results": results, **{key: line[key] for key in ("setting", "row", "seed", "identity")},
        "identity_is": new["identity"] == line["identity"], "probes_are": new["probes"] == line["probes"],
        "metrics": len(same), "same": sum(same), "largest_difference": round(max(differences), 4),
        "ndcg@6": [round(100 * each["test"]["ndcg@6"], 2) for each in (line, new)],
        "ndcg_difference": round(100 * abs(line["test"]["ndcg@6"] - new["test"]["ndcg@6"]), 4),
        "then": line["versions"], "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    print(
        f"{results} | {line['setting']} | {line['row']} | {line['seed']}: {sum(same)} of {len(same)} metrics the same"
    )
    return found


def _quickest(results: Path, plan: Path) -> list:
    """The committed line of a network and of trees that took least time."""
    places = {(run.setting, run.row, run.seed): run for run in read_plan(str(plan)).all_runs()}
    lines = [
        line
        for line in read_rows(str(results))
        if "identity" in line and "error" not in line and (line["setting"], line["row"], line["seed"]) in places
    ]
    trees = [line for line in lines if line["row"].startswith("LambdaMART")]
    networks = [line for line in lines if line not in trees]
    return [min(some, key=lambda line: line["seconds"]) for some in (networks, trees) if some]


def _lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


if __name__ == "__main__":
    os.chdir(ROOT)  # data and caches lie there
    main()
