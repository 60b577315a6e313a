"""The examples of docs/extend.md, each in a folder of its own, through the real command."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from places import ROOT

from dnr_recbole import Reranker
from dnr_recbole.cli import main
from dnr_recbole.config import Config
from dnr_recbole.convert import CONVERTERS
from dnr_recbole.identity import identity

PAGE = ROOT / "docs" / "extend.md"
FILE = re.compile(r"`(\S+\.(?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)```", re.S)
COMMAND = re.compile(r"```bash\n(.*?)```", re.S)
SMALL = [
    "--n_candidates=12", "--embedding_size=16", "--epochs=2", "--baselines=[]", "--use_gpu=False",
    "--result_file=row.json", "--show_progress=False",
]  # fmt: skip
WORLD = ["--synthetic_users=60", "--synthetic_items=80"]
RATINGS = ["--label_window=6", "--retriever_fraction=0.4", "--retriever_args.epochs=1"]
SECTIONS = {
    part.partition("\n")[0]: part for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:] if FILE.search(part)
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory; modules that are imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if (tmp_path / f"{name}.py").is_file()]:
        del sys.modules[name]
    CONVERTERS.pop("pairs", None)


def ratings(folder: Path) -> None:
    """dataset/tiny: 40 users of two tastes, 60 items."""
    rng, rows = np.random.default_rng(0), ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(40):
        liked = rng.permutation(np.arange(user % 2, 60, 2))[:24]
        other = rng.permutation(np.arange(1 - user % 2, 60, 2))[:6]
        items = rng.permutation(np.concatenate([liked, other]))
        rows += [f"{user}\t{item}\t{5 if item in liked else 2}\t{when}" for when, item in enumerate(items)]
    (folder / "dataset" / "tiny").mkdir(parents=True)
    (folder / "dataset" / "tiny" / "tiny.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")


def database(folder: Path) -> None:
    """shop.db: 300 requests of eight candidates."""
    rng = np.random.default_rng(0)
    rows = [
        (f"r{request}", f"u{request % 30}", f"i{item}", rng.random(), int(rng.random() < 0.2 + 0.02 * item), request)
        for request in range(300)
        for item in rng.permutation(40)[:8]
    ]
    names = ["request_id", "user_id", "item_id", "score", "label", "timestamp"]
    connection = sqlite3.connect(folder / "shop.db")
    pd.DataFrame(rows, columns=names).to_sql("candidates", connection, index=False)
    connection.close()


def follow(title: str, folder: Path):
    """Do what a section says; the result row of its run, if it is one."""
    part = SECTIONS[title]
    for name, code in FILE.findall(part):
        (folder / name).write_text(code, encoding="utf-8")
    (line,) = COMMAND.findall(part)
    program, *arguments = shlex.split(line)
    assert program == "dnr-recbole"
    if arguments[0] == "convert":
        assert main(arguments) == 0
        return None
    if "--dataset=ml-100k" in arguments:
        ratings(folder)
        arguments = ["--dataset=tiny" if word == "--dataset=ml-100k" else word for word in arguments] + RATINGS
    elif "--dataset=synthetic" in arguments:
        arguments += WORLD
    assert main([*arguments, *SMALL]) == 0
    return json.loads((folder / "row.json").read_text(encoding="utf-8"))


def used(row, stage: str) -> set:
    """Parts of the user's own that the identity of a stage holds."""
    return set(identity(Config(config_dict=row["config"]), stage)[stage].get("code", {}))


def test_a_retriever(folder):
    row = follow("A retriever", folder)
    assert row["retriever"]["auc"] > 0.6  # two tastes, and items of the same users


def test_a_metric(folder):
    row = follow("A metric", folder)
    assert 0 < row["test"]["rbp@1"] <= 0.2 and row["test"]["rbp@1"] < row["test"]["rbp@6"] < 1
    assert used(row, "evaluation") == {"metrics=rbp"}


def test_a_probe(folder):
    row = follow("A probe", folder)
    assert set(row["probes"]["score_times_popularity"]) == set(row["probes"]["score_desc"])


@pytest.mark.parametrize(
    "title, stage, names",
    [
        ("A loss", "training", {"rerank_loss=pairs"}),
        ("Noise, with a key of its own", "reranker", {"noise_type=mistakes"}),
        ("A generator", "reranker", {"generator=two_bumps"}),
        ("An estimator of L_x", "reranker", {"lx_estimator=energy"}),
        ("A rescaling of scores", "reranker", {"score_normalization=softmax"}),
        ("A calibration", "retriever", {"calibration=better_than"}),
        ("A protocol", "candidates", {"protocol=sampled"}),
        ("A split", "candidates", {"split=by_number"}),
    ],
)
def test_parts_that_a_key_chooses(folder, title, stage, names):
    row = follow(title, folder)
    assert used(row, stage) == names and 0 < row["test"]["ndcg@6"] < 1


def test_a_key_of_a_plugin_is_in_the_result(folder):
    assert follow("Noise, with a key of its own", folder)["config"]["mistakes"] == 0.1


def test_a_generator_is_trained(folder):
    history = follow("A generator", folder)["history"]
    assert ["L_x" in epoch for epoch in history] == [False, True]  # lambda_e=1


def test_a_source(folder, capsys):
    database(folder)
    row = follow("A source", folder)
    assert used(row, "source") == {"source=sqlite"} and len(row["files"]["source"]["database"]) == 64
    new = pd.DataFrame({"request_id": "new", "user_id": "u3", "item_id": ["i1", "i39"], "score": [0.2, 0.7]})
    assert sorted(Reranker.load("my_model").rank(new)["item_id"]) == ["i1", "i39"]
    (folder / "shop.db").unlink()
    assert main(["run", "--plugins=my_source", "--source=sqlite", "--dataset=shop", "--model=PRM"]) == 2
    assert "needs the key database" in capsys.readouterr().err


def test_a_converter(folder, capsys):
    (folder / "shown.txt").write_text("ann: i1 i2* i3\nbob: i2 i4*\n", encoding="utf-8")
    follow("A converter", folder)
    log = pd.read_parquet("requests.parquet")
    assert log["label"].tolist() == [0, 1, 0, 0, 1]
    assert log["score"].tolist() == pytest.approx([0.9, 0.45, 0.3, 0.9, 0.45])
    (folder / "shown.txt").write_text("ann i1 i2*\n", encoding="utf-8")
    assert main(["convert", "--plugins=my_format", "pairs", "shown.txt", "again.parquet"]) == 1
    assert "shown.txt" in capsys.readouterr().err and not (folder / "again.parquet").exists()


def test_a_click_model_and_an_estimator(folder, caplog):
    row = follow("A click model, and an estimator of propensities", folder)
    assert used(row, "training") == {"propensity=page"} and used(row, "source") == {"synthetic_clicks=page"}


def test_every_example_is_run():
    code = Path(__file__).read_text(encoding="utf-8")
    assert SECTIONS and [title for title in SECTIONS if f'"{title}"' not in code] == []
