"""fit, rank, evaluate and validate as a user types them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from log_helpers import as_lists, world

from dnr_recbole import Reranker
from dnr_recbole.cli import main
from dnr_recbole.errors import DataError
from dnr_recbole.requestlog import row_ranges

KEYS = ["--epochs=1", "--embedding_size=16", "--baselines=[]", "--use_gpu=False", "--train_batch_size=64"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world(200).to_csv("pages.csv", index=False)
    (tmp_path / "here").mkdir()
    return tmp_path


def test_from_a_log_to_rankings(here, capsys):
    assert main(["validate", "pages.csv"]) == 0
    shown = capsys.readouterr().out
    for text in ("requests       200 of 30 users", "NDCG@6", "click rate", "no error"):
        assert text in shown
    assert main(["fit", "pages.csv", "--out=m", "--model=PRM", *KEYS]) == 0
    assert "written to m" in capsys.readouterr().err
    assert main(["rank", "m", "pages.csv", "top.csv", "--k=2"]) == 0
    assert "200 requests, 400 rows -> top.csv" in capsys.readouterr().out
    assert main(["rank", "m", "pages.csv", "top.parquet", "--k=2"]) == 0
    a, b = pd.read_csv("top.csv"), pd.read_parquet("top.parquet")
    assert len(a) == 400 and a.item_id.tolist() == b.item_id.tolist()
    capsys.readouterr()
    world(60, seed=2).assign(timestamp=lambda f: f.timestamp + 10**6).to_parquet("new.parquet")
    assert main(["evaluate", "m", "new.parquet", "--against=m"]) == 0
    assert "no difference seen" in capsys.readouterr().out
    assert main(["fit", "new.parquet", "--out=m2", "--model=PRM", "--start_from=m", *KEYS]) == 0
    assert (here / "m2" / "config.json").is_file()


def test_run_reads_a_log_as_well(here):
    assert main(["run", "--requests=pages.csv", "--model=MiDNN", "--artefact_dir=m", *KEYS]) == 0
    assert (here / "m" / "config.json").is_file()


def test_validate_says_all_and_fails(here, capsys):
    frame = world(50)
    frame.loc[3, "label"] = 7
    frame.loc[5, "score"] = -1
    frame.to_csv("bad.csv", index=False)
    assert main(["validate", "bad.csv"]) == 1
    out = capsys.readouterr()
    assert "ERROR  score: a score is outside [0, 1]" in out.out and "line 7: '-1" in out.out
    assert "ERROR  label: a label is neither 0 nor 1 (1): line 5: '7'" in out.out
    assert out.err.strip() == "error: 'bad.csv' has 2 kinds of errors, training would refuse it"
    assert main(["fit", "bad.csv", "--out=m", *KEYS]) == 1
    assert not (here / "m").exists()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["rank", "nowhere", "pages.csv", "out.csv"], 1, "no artefact at 'nowhere'"),
        (["rank", "m", "pages.csv", "out.txt"], 2, "must end in .parquet or .csv"),
        (["rank", "m", "pages.csv", "out.csv", "--k=0"], 2, "--k=0"),
        (["validate", "none.csv"], 1, "does not exist"),
        (["validate", "pages.csv", "--order_by=bm25"], 1, "no column 'bm25'"),
        (["fit", "pages.csv", "--out=m", "--epoch=1"], 2, "unknown key 'epoch'"),
        (["run", "--requests=pages.csv", "--artefact_dir=here"], 2, "artefact_dir=here: exists and is no artefact"),
        (["run", "--requests=pages.csv", "--artefact_dir=/proc/x/m"], 2, "artefact_dir=/proc/x/m"),
        (["run", "--requests=pages.csv", "--protocol=exposed"], 2, "means something with source=recbole only"),
        (["run", "--dataset=ml-100k", "--order_by=bm25"], 2, "means something with source=log only"),
        (["run", "--source=log"], 2, "source=log needs the key requests"),
        (["run", "--source=synthetic", "--dataset=ml-100k"], 2, "needs dataset=synthetic"),
    ],
)
def test_mistakes_are_said_in_a_line(here, capsys, arguments, code, message):
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_bad_row_in_the_middle_leaves_no_output(here, capsys, monkeypatch):
    assert main(["fit", "pages.csv", "--out=m", "--model=MiDNN", *KEYS]) == 0
    frame = world(200)
    frame.loc[1000, "score"] = 5.0
    frame.to_csv("bad.csv", index=False)
    monkeypatch.setattr("dnr_recbole.requestlog.reading.ROWS", 100)
    assert main(["rank", "m", "bad.csv", "out.csv"]) == 1
    assert "line 1002" in capsys.readouterr().err
    assert not (here / "out.csv").exists()


def test_ids_keep_their_type_whatever_is_missing_first(here, monkeypatch):
    assert main(["fit", "pages.csv", "--out=m", "--model=MiDNN", *KEYS]) == 0
    frame = world(30)
    frame["user_id"] = pd.Series([None] * 120 + [7] * 120, dtype="Int64")
    frame.to_parquet("gaps.parquet")
    monkeypatch.setattr("dnr_recbole.requestlog.reading.ROWS", 48)
    assert main(["rank", "m", "gaps.parquet", "out.parquet"]) == 0
    assert pq.read_schema("out.parquet").field("user_id").type == pa.int64()
    assert pd.read_parquet("out.parquet").user_id.isna().sum() == 120


def scattered(frame, seed=0):
    """The same rows in another order, those of no request together."""
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_rows_of_a_request_may_stand_apart_in_a_small_file_and_are_refused_in_a_large_one(
    here, capsys, monkeypatch, ending
):
    assert main(["fit", "pages.csv", "--out=m", "--model=MiDNN", *KEYS]) == 0
    frame = world(40, seed=1)

    def write(frame, name):
        frame.to_parquet(name) if ending == "parquet" else frame.to_csv(name, index=False)

    write(frame, f"good.{ending}")
    write(scattered(frame), f"apart.{ending}")
    model = Reranker.load("m")
    expected = model.rank(frame).sort_values(["request_id", "rank"], ignore_index=True)
    monkeypatch.setattr("dnr_recbole.requestlog.reading.ROWS", 50)
    found = model.rank(f"apart.{ending}").sort_values(["request_id", "rank"], ignore_index=True)
    assert found[["request_id", "item_id", "rank"]].equals(expected[["request_id", "item_id", "rank"]])

    monkeypatch.setattr("dnr_recbole.ranking.SORTED_BYTES", 0)
    assert main(["rank", "m", f"good.{ending}", "out.csv"]) == 0
    assert pd.read_csv("out.csv").groupby("request_id").size().eq(8).all()
    (here / "out.csv").unlink()
    capsys.readouterr()
    other = frame.request_id[3 * 8]
    frame.loc[[3 * 8 + 7, 30 * 8]] = frame.loc[[30 * 8, 3 * 8 + 7]].to_numpy()  # the last of one, the first of another
    write(frame, f"two.{ending}")
    at = (26, 242) if ending == "csv" else (25, 241)
    kind = "line" if ending == "csv" else "row"
    for name, says in (
        (f"apart.{ending}", "stand apart"),
        (f"two.{ending}", f"request '{other}' stand apart, from {kind} {at[0]} and from {kind} {at[1]} on"),
    ):
        assert main(["rank", "m", name, "out.csv"]) == 1
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
        assert not (here / "out.csv").exists()
        with pytest.raises(DataError, match="stand apart"):
            model.rank(name)
    monkeypatch.setattr(row_ranges.pd.util, "hash_array", lambda ids, categorize: np.zeros(len(ids), np.uint64))
    assert main(["rank", "m", f"good.{ending}", "out.csv"]) == 0, "equal hashes of other requests are no reason"


def test_what_is_wrong_is_named_by_its_row_in_the_file_also_where_rows_were_put_in_order(here, capsys):
    assert main(["fit", "pages.csv", "--out=m", "--model=MiDNN", *KEYS]) == 0
    frame = scattered(world(40, seed=1))
    frame.loc[77, "score"] = 5.0
    frame.to_csv("bad.csv", index=False)
    assert main(["rank", "m", "bad.csv", "out.csv"]) == 1
    assert "line 79: '5" in capsys.readouterr().err
    frame.to_parquet("bad.parquet")
    assert main(["validate", "bad.parquet"]) == 1
    assert "row 78: '5'" in capsys.readouterr().out
    with pytest.raises(DataError, match="row 78: '5'"):
        Reranker.load("m").rank(frame)


def test_what_rank_treats_is_said(here, capsys):
    assert main(["fit", "pages.csv", "--out=m", "--model=MiDNN", *KEYS]) == 0
    frame = as_lists(world(30, seed=1))
    frame.at[3, "item_id"] = frame.at[3, "score"] = frame.at[3, "label"] = []
    frame.at[5, "score"] = [None, *frame.at[5, "score"][1:]]
    frame.to_parquet("lists.PARQUET")
    capsys.readouterr()
    assert main(["rank", "m", "lists.PARQUET", "out.csv"]) == 0
    said = capsys.readouterr().out
    assert "29 requests, 232 rows" in said
    assert "requests without a candidate, left out (1): row 4" in said and "count as the lowest (1)" in said
