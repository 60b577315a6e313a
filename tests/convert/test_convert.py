"""Every foreign format: a small invented file in exactly that form, and the rows that must come of it."""

from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import ROOT

from dnr_recbole.cli import main
from dnr_recbole.convert import (
    CONVERTERS,
    Option,
    Request,
    convert,
    convert_command,
    converter,
    get_converter,
    options_of,
    tables,
    writing,
)
from dnr_recbole.errors import ConfigError, DataError, DnrError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(name, *inputs, **options):
    counts = convert(name, list(inputs), "out.parquet", **options)
    frame = pd.read_parquet("out.parquet")
    assert counts.candidates == len(frame) and counts.requests == frame.request_id.nunique()
    assert counts.positives == frame.label.sum()
    schema = pq.read_schema("out.parquet")
    assert {"request_id", "user_id", "item_id", "label"} <= set(schema.names)
    for field in schema:
        if field.name in writing._TYPES:
            assert field.type == writing._TYPES[field.name], field
    begins = frame.request_id.ne(frame.request_id.shift()).sum()
    assert begins == counts.requests, "the rows of a request stand together"
    assert not frame.duplicated(["request_id", "item_id"]).any()
    return frame, counts


def write(name, text):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def test_mind():
    write("behaviors.tsv", (
        "1\tU1\t11/15/2019 10:00:00 AM\t\tN1-0 N2-1\n"
        "2\tU2\t11/15/2019 11:00:00 AM\tN9 N8\tN2-0 N3-1\n"
        "3\tU1\t11/15/2019 9:00:00 AM\tN7\tN2-1\n"
    ))  # fmt: skip
    write("news.tsv", 'N1\tsports\tnba\tTitle "quoted\tAbs\turl\t[]\t[]\nN2\tnews\tworld\tT\tA\tu\t[]\t[]\n')
    frame, counts = rows("mind", "behaviors.tsv", "news.tsv")
    assert frame.item_id.tolist() == ["N1", "N2", "N2", "N3", "N2"] and frame.label.tolist() == [0, 1, 0, 1, 1]
    assert frame.user_id.tolist() == ["U1", "U1", "U2", "U2", "U1"]
    assert frame.timestamp.iloc[0] == 1573812000 and frame.timestamp.iloc[4] == 1573808400
    assert [list(h) if h is not None else [] for h in frame.history] == [[], [], ["N9", "N8"], ["N9", "N8"], ["N7"]]
    assert frame.category.tolist()[:2] == ["sports", "news"] and frame.category.isna()[3]
    # Before 10:00 there was one click (on N2 at 9:00, later in the file); before 11:00 two, both on N2.
    np.testing.assert_allclose(frame.score, [0, 1, 1, 0, 0])
    assert counts.rows == 5 and counts.taken == {"candidates that news.tsv does not have": 1}
    assert "score: clicks before the impression" in str(counts), "the log has a score that the format has not"
    assert "score" not in rows("mind", "behaviors.tsv", score="none")[0]
    write("test.tsv", "1\tU1\t11/15/2019 10:00:00 AM\t\tN1 N2\n2\tU1\t11/15/2019 10:00:00 AM\t\tN1-1 N2-0\n")
    assert rows("mind", "test.tsv")[1].skipped == {"impressions without clicks or their absence (a test file)": 1}


@pytest.mark.parametrize("line, message", [
    ("9\tU1\t11/15/2019 10:00:00 AM\tN1-0", "needs 5 columns separated by tabs, not 4"),
    ("9\tU1\t15/11/2019 10:00\t\tN1-0", "the time must look like"),
    ("9\tU1\t11/15/2019 10:00:00 AM\t\tN1-0 N2-2", "an impression must look like N1234-1: 'N2-2'"),
    ("9\tU1\t11/15/2019 10:00:00 AM\t\tN1-0 N2", "some impressions have -0 or -1 and some have none"),
    ("1\tU1\t11/15/2019 10:00:00 AM\t\tN1-0", "request '1' was there before"),
])  # fmt: skip
def test_a_damaged_line_of_mind(here, line, message):
    write("b.tsv", f"1\tU1\t11/15/2019 10:00:00 AM\t\tN1-0 N2-1\n\n{line}\n")
    write("old.parquet", "old")
    for score in ("popularity", "none"):
        with pytest.raises(DataError, match=f"'b.tsv', line 3: .*{message}"):
            convert("mind", ["b.tsv"], "old.parquet", score=score)
    assert sorted(os.listdir(here)) == ["b.tsv", "old.parquet"] and (here / "old.parquet").read_text() == "old"


def test_letor():
    write("a.txt", "2 qid:10 1:0.5 3:7 # docid = D-1 inc = 1\n0 qid:10 1:0.25\n1 qid:11 0:1 1:3\n")
    frame, _ = rows("letor", "a.txt", score=1)
    assert frame.request_id.tolist() == ["10", "10", "11"] and frame.item_id.tolist() == ["D-1", "10-1", "11-0"]
    assert (
        frame.score.tolist() == [0.5, 0.25, 3]
        and frame.label.tolist() == [1, 0, 1]
        and frame.grade.tolist() == [2, 0, 1]
    )
    assert frame.f0.tolist() == [0, 0, 1] and frame.f3.tolist() == [7, 0, 0] and "f1" not in frame
    assert rows("letor", "a.txt", score=1, threshold=2.0)[0].label.tolist() == [1, 0, 0]
    with pytest.raises(ConfigError, match="--score is needed; name the feature.*0 … 3"):
        convert("letor", ["a.txt"], "out2.parquet")
    with pytest.raises(ConfigError, match="--score=2: there is no such feature"):
        convert("letor", ["a.txt"], "out2.parquet", score=2)
    base_0 = write("b.txt", "1 qid:1 0:4 1:0\n0 qid:1 0:2\n")
    assert rows("letor", base_0, score=0)[0].score.tolist() == [4, 2], "metarank numbers features from 0"


@pytest.mark.parametrize("line, message", [
    ("2 qid:10 1:0.5", "request '10' was there before"),
    ("2 1:0.5", "a line must look like"),
    ("2 qid: 1:0.5", "a line must look like"),
    ("x qid:9 1:0.5", "a line must look like"),
    ("2 qid:9 1:nan", "a line must look like"),
    ("2 qid:9 1:2 1:3", "each feature once"),
])  # fmt: skip
def test_a_damaged_line_of_letor(here, line, message):
    write("a.txt", f"2 qid:10 1:0.5\n1 qid:11 1:3\n{line}\n")
    with pytest.raises(DataError, match=f"'a.txt', line 3: .*{message}"):
        convert("letor", ["a.txt"], "out.parquet", score=1)
    assert not (here / "out.parquet").exists()


def test_trec():
    write("run", "q1 Q0 d1 0 9.5 bm25\nq1 Q0 d2 1 8 bm25\nq2 Q0 d1 1 3 bm25\n")
    write("qrels", "q1 0 d1 2\nq1 0 d7 1\nq2 0 d1 0\n")
    frame, counts = rows("trec", "run", "qrels")
    assert frame.label.tolist() == [1, 0, 0] and frame.score.tolist() == [9.5, 8, 3]
    assert counts.taken == {"documents without a judgement, taken as not relevant": 1}
    assert counts.skipped == {"relevant documents that the run does not have": 1} and counts.rows == 6
    from_one = write("run1", "q1 Q0 d1 1 9.5 bm25\nq1 Q0 d2 2 8 bm25\nq2 Q0 d1 2 3 bm25\n")
    pd.testing.assert_frame_equal(rows("trec", from_one, "qrels")[0], frame)
    write("more", "q1 0 d1 2\nq1 0 d7 1\nq2 0 d1 0\nq9 0 d1 1\n")
    assert rows("trec", "run", "more")[1].skipped["judged queries that are not in the run"] == 1
    write("run", "q1 Q0 d1 0 9 x\nq2 Q0 d2 1 8 x\nq1 Q0 d3 1 3 x\n")
    with pytest.raises(DataError, match="line 3: request 'q1' was there before; its rows must stand"):
        convert("trec", ["run", "qrels"], "out2.parquet")
    write("run", "q1 Q0 d1 first 9 x\n")
    with pytest.raises(DataError, match="'run', line 1: a line of a run must look like"):
        convert("trec", ["run", "qrels"], "out2.parquet")
    write("qrels", "q1 0 d1 2\nq1 0 d1\n")
    with pytest.raises(DataError, match="'qrels', line 2: a line of qrels must look like"):
        convert("trec", ["run", "qrels"], "out2.parquet")


def test_recflow():
    day = pd.DataFrame({
        "request_id": [7, 7, 7, 5, 5], "request_timestamp": [2_000_000] * 3 + [1_000_000] * 2, "user_id": [1] * 5,
        "video_id": [11, 12, 13, 14, 15], "realshow": [1, 0, 0, 1, 1], "rank_index": [0, 1, -1, 1, 0],
        "effective_view": [1, 0, 0, 0, 1], "like": [0] * 5,
    })  # fmt: skip
    pyarrow.feather.write_feather(day, "day.feather")
    frame, counts = rows("recflow", "day.feather")
    assert frame.request_id.tolist() == ["5", "5", "7", "7", "7"], "in the order of time"
    assert frame.timestamp.tolist() == [1000, 1000, 2000, 2000, 2000]
    np.testing.assert_allclose(frame.score, [0.5, 1, 1, 0.5, np.nan])
    assert frame.exposed.tolist() == [True, True, True, False, False] and frame.label.tolist() == [0, 1, 1, 0, 0]
    assert [list(h) for h in frame.history] == [[], []] + [["14", "15"]] * 3
    assert counts.notes == ["columns left out: like"] and list(counts.taken.values()) == [1]
    later = day.assign(request_id=[9] * 3 + [8] * 2, request_timestamp=[3_000_000] * 3 + [2_000_000] * 2)
    later["coarse_neg"] = [0, 0, 0, 0, 1]
    later["author_id"], later["duration"] = [4, 4, 4, 5, 5], 900
    pyarrow.feather.write_feather(later, "later.feather")
    frame, _ = rows("recflow", "day.feather", "later.feather")
    assert [list(h) for h in frame.history[[5, 7]]] == [["14", "15"], ["14", "15", "11", "14", "15"]], (
        "a request of the same time is not earlier, one of an earlier day is"
    )
    np.testing.assert_allclose(frame.score[5:7], [1, np.nan])  # rank_index 1 is the best one left; 0 came to no ranking
    assert frame.author_id.tolist() == [None] * 5 + ["5"] * 2 + ["4"] * 3, "codes have no order, so they are texts"
    assert frame.duration.tolist()[5:] == [900.0] * 5
    with pytest.raises(DataError, match="'day.feather' begins before the file in front of it"):
        convert("recflow", ["later.feather", "day.feather"], "out2.parquet")
    with open("day.feather", "rb") as file:
        damaged = file.read().replace(b"realshow", b"realsh\xff\xff")
    with open("names.feather", "wb") as file:
        file.write(damaged)
    with pytest.raises(DataError, match="'names.feather' cannot be read: 'utf-8'"):
        convert("recflow", ["names.feather"], "out2.parquet")
    with pytest.raises(DataError, match="no column 'likes': did you mean like"):
        convert("recflow", ["day.feather"], "out2.parquet", label="likes")


def test_kuairand():
    minute = 60_000
    pd.DataFrame({
        "user_id": [1, 1, 1, 1, 2, 1], "video_id": [5, 6, 5, 7, 5, 6], "tab": [0, 0, 0, 0, 0, 1],
        "time_ms": [0, minute, 2 * minute, 30 * minute, 3 * minute, minute], "is_click": [1, 0, 1, 1, 0, 0],
        "is_rand": [0, 1, 0, 0, 0, 0],
    }).to_csv("log.csv", index=False)  # fmt: skip
    frame, counts = rows("kuairand", "log.csv")
    sessions = [(u, part.item_id.tolist()) for (u, _), part in frame.groupby(["user_id", "request_id"], sort=False)]
    assert sessions == [("1", ["5", "6"]), ("1", ["7"]), ("1", ["6"]), ("2", ["5"])]
    assert counts.skipped == {"repetitions of an item in its request": 1}
    assert frame.random.tolist() == [False, True, False, False, False] and frame.position.tolist() == [0, 1, 0, 0, 0]
    later = frame[frame.user_id == "2"].score.item()
    assert later == pytest.approx(1.0), "two clicks before, both on this item"
    assert frame.exposed.all() and frame.label.tolist() == [1, 0, 1, 0, 0] and frame.tab.tolist()[3] == "1"
    assert frame.timestamp.tolist() == [0, 0, 1800, 60, 180]
    assert rows("kuairand", "log.csv", gap=60)[1].requests == 3
    assert "score" not in rows("kuairand", "log.csv", score="none")[0]
    write("bad.csv", "user_id,video_id,time_ms,is_click,tab\n1,2,3,0,0\n1,2,soon,0,0\n")
    with pytest.raises(DataError, match="'bad.csv', line 3: time_ms is no number: 'soon'"):
        convert("kuairand", ["bad.csv"], "out2.parquet")


def test_librerank():
    line = "7\t[1, 2]\t[[3, 9], [4, 9], [0, 0]]\t[[0.5], [null], [0.0]]\t[1, 0, 0]\n"
    write("a.tsv", line)
    frame, counts = rows("librerank", "a.tsv")
    assert (
        frame.item_id.tolist() == ["3", "4"] and frame.score.tolist() == [1.0, 0.5] and frame.label.tolist() == [1, 0]
    )
    assert (
        frame.c0.tolist() == ["9", "9"]
        and frame.d0.isna().tolist() == [False, True]
        and frame.user_id.tolist() == ["7"] * 2
    )
    assert counts.skipped == {"padding items": 1}
    assert frame.u0.tolist() == ["1", "1"] and frame.u1.tolist() == ["2", "2"] and "d1" not in frame
    scored, _ = rows("librerank", "a.tsv", score=0)
    assert scored.score.isna().tolist() == [False, True] and "d0" not in scored
    with pytest.raises(DataError, match="line 1: --score=1: there are 1 dense features"):
        convert("librerank", ["a.tsv"], "out2.parquet", score=1)
    for bad in (
        "__import__('os').system('touch hacked')\t[]\t[]\t[]\t[]\n",
        "7\t[]\t[[1]]\t[[1]]\t[1, 0]\n",
        "7\t[]\t[[1]]\t[5]\t[1]\n",
        "7\t[]\t[[1]]\t[[5]]\t[2]\n",
        "7\t[]\t[[1]]\t[['x']]\t[1]\n",
        "7\t[]\t[[null]]\t[[5]]\t[1]\n",
        "[" * 9999 + "\n",
    ):
        write("bad.tsv", line + bad)
        with pytest.raises(DataError, match="'bad.tsv', line 2: a line needs five Python literals"):
            convert("librerank", ["bad.tsv"], "out2.parquet")


def test_metarank(here):
    minute = 60_000
    events = [
        {"event": "item", "id": "i", "item": "p1", "timestamp": 0, "fields": []},
        {"event": "ranking", "id": "r1", "timestamp": str(minute), "user": "u1", "session": "s",
         "fields": [{"name": "query", "value": "cat"}],
         "items": [{"id": "p1", "fields": [{"name": "bm25", "value": 2.5}]}, {"id": "p2"}, {"id": "p3"}]},
        {"event": "interaction", "id": "c1", "ranking": "r1", "timestamp": 2 * minute, "item": "p2", "type": "click"},
        {"event": "interaction", "id": "c2", "ranking": "r1", "timestamp": 90 * minute, "item": "p3", "type": "click"},
        {"event": "ranking", "id": "r2", "timestamp": 91 * minute, "items": [{"id": "p1", "relevancy": 1.0}]},
    ]  # fmt: skip
    text = "".join(json.dumps(event) + "\n" for event in events)
    with gzip.open("events.jsonl.gz", "wt") as file:
        file.write(text)
    frame, counts = rows("metarank", "events.jsonl.gz", score="bm25")
    assert frame.request_id.tolist() == ["r1"] * 3 + ["r2"] and frame.label.tolist() == [0, 1, 0, 0]
    assert frame.exposed.tolist() == [True, True, False, False], "behind the last click nothing was examined"
    assert frame.score.iloc[0] == 2.5 and frame.score.isna().tolist()[1:] == [True] * 3
    assert frame.request_query.tolist()[:3] == ["cat"] * 3 and frame.timestamp.tolist() == [60] * 3 + [91 * 60]
    assert counts.skipped == {
        "item and user events, whose fields are not joined": 1, "interactions without a ranking in the window": 1,
    }  # fmt: skip
    assert frame.user_id.tolist() == ["u1"] * 3 + [None] and frame.relevancy.tolist()[3] == 1
    assert rows("metarank", "events.jsonl.gz", window=120)[0].label.tolist() == [0, 1, 1, 0]
    write("broken.jsonl", text + "{oops\n")
    with pytest.raises(DataError, match="'broken.jsonl', line 6: no JSON object"):
        convert("metarank", ["broken.jsonl"], "out2.parquet")
    assert not (here / "out2.parquet").exists()


def ranking(**more):
    return {"event": "ranking", "id": "r", "timestamp": 0, "items": [{"id": "a"}, {"id": "b"}], **more}


def field(name, value):
    return {"fields": [{"name": name, "value": value}]}


def test_metarank_fields_and_times():
    first = ranking(items=[{"id": "a", **field("label", 1)}, {"id": "b", **field("tags", ["x", "y"])}])
    second = ranking(id="s", timestamp="2022-06-22T11:21:39Z", items=[{"id": "c", "relevancy": 1}])
    write("e.jsonl", json.dumps(first) + "\n" + json.dumps(second) + "\n")
    frame, counts = rows("metarank", "e.jsonl")
    assert frame.label.tolist() == [0, 0, 0], "a field named label is no label"
    assert frame.item_label.tolist()[0] == 1 and list(frame.tags[1]) == ["x", "y"]
    assert frame.timestamp.tolist() == [0, 0, 1655896899] and frame.score.tolist()[2] == 1.0
    assert counts.notes == ["field 'label' became column 'item_label'"]
    assert counts.taken == {"candidates without the score": 2}


@pytest.mark.parametrize("event, message", [
    ({"event": "ranking", "timestamp": 1, "items": []}, "ranking: 'id' is missing"),
    (ranking(id="q", items=[{}]), "ranking, an item: 'id' is missing"),
    (ranking(id="q", items="a"), "ranking: 'items' must be a list of objects"),
    (ranking(), "ranking 'r' was there before"),
    (ranking(id="q", timestamp=10**9, fields=["x"]), "fields must be a list of objects"),
    (ranking(id="q", items=[{"id": "a", **field("price", "much")}]), "'price' holds text here, and number before"),
    (ranking(id="q", items=[{"id": "a", **field("price", {})}]), "'price' holds an object"),
    (ranking(id="q", items=[{"id": "a", **field("price", [1, "x"])}]), "'price' holds a mixed list"),
    (ranking(id="q", items=[{"id": "a", **field("relevancy", "x")}]), "'relevancy' is no number"),
    ({"event": "interaction", "timestamp": 1, "ranking": "r"}, "interaction: 'item' is missing"),
    ({"event": "ranking", "id": "q", "items": []}, "and a timestamp"),
    ([1], "no JSON object"),
])  # fmt: skip
def test_a_damaged_event(here, event, message):
    first = ranking(items=[{"id": "a", **field("price", 5)}])
    write("e.jsonl", json.dumps(first) + "\n" + json.dumps(event) + "\n")
    with pytest.raises(DataError, match=f"'e.jsonl', line 2: .*{message}"):
        convert("metarank", ["e.jsonl"], "out.parquet")
    assert not (here / "out.parquet").exists()


def test_packed_files():
    write("e.jsonl", json.dumps(ranking()) + "\n")
    with open("e.jsonl", "rb") as file:
        packed = gzip.compress(file.read())
    with open("cut.jsonl.gz", "wb") as file:
        file.write(packed[:-6])
    with pytest.raises(DataError, match="'cut.jsonl.gz' cannot be read"):
        convert("metarank", ["cut.jsonl.gz"], "out.parquet")
    write("e.jsonl.zst", "x")
    with pytest.raises(DataError, match="'e.jsonl.zst' (needs the package zstandard: pip install|cannot be read)"):
        convert("metarank", ["e.jsonl.zst"], "out.parquet")


def test_zst():
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps(ranking(id=str(i), timestamp=i * 10**7)).encode() + b"\n" for i in range(3000)]
    frames = [zstandard.ZstdCompressor().compress(b"".join(part)) for part in (lines[:1000], lines[1000:])]
    with open("e.jsonl.zst", "wb") as file:
        file.write(b"".join(frames))
    assert rows("metarank", "e.jsonl.zst")[1].requests == 3000, "of both frames"
    stream = zstandard.ZstdCompressor().compressobj()
    with open("cut.jsonl.zst", "wb") as file:  # ends at the end of a line, but not of a frame
        file.write(stream.compress(b"".join(lines)) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    with pytest.raises(DataError, match="'cut.jsonl.zst' cannot be read: it is cut off"):
        convert("metarank", ["cut.jsonl.zst"], "out2.parquet")


def test_open_bandit():
    pd.DataFrame({
        "timestamp": ["2019-11-24 00:00:07+00:00"] * 3 + ["2019-11-24 00:01:00+00:00"], "item_id": [3, 1, 3, 2],
        "position": [1, 2, 1, 3], "click": [0, 1, 0, 0], "propensity_score": [0.1, 0.2, 0.3, 0.4],
        "user_feature_0": ["a", "a", "a", "b"], **{f"user-item_affinity_{i}": [i, i, i, i] for i in range(4)},
    }).to_csv("all.csv")  # fmt: skip
    frame, _ = rows("obd", "all.csv")
    assert [part.item_id.tolist() for _, part in frame.groupby("request_id", sort=False)] == [["3", "1"], ["3"], ["2"]]
    assert frame.position.tolist() == [0, 1, 0, 2] and frame.propensity.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert frame.score.tolist() == [3, 1, 3, 2] and frame.user_feature_0.tolist() == ["a", "a", "a", "b"]
    assert frame.timestamp.iloc[0] == 1574553607 and frame.exposed.all()
    header = "timestamp,item_id,position,click,propensity_score\n"
    write("b.csv", header + "2019-11-24 00:00:07.5+09:00,7,1,0,0.5\n" * 2 + "2019-11-24 00:00:07.5+09:00,7,2,0,0.5\n")
    frame, counts = rows("obd", "b.csv")
    assert frame.request_id.tolist() == ["1"] and frame.timestamp.tolist() == [1574553607 - 9 * 3600]
    assert counts.skipped == {"requests that show an item twice": 1} and "score" not in frame
    for line, message in (
        ("yesterday,7,1,0,0.5", "line 2: the timestamp must look like"),
        ("2019-11-24 00:00:07+00:00,7,0,0,0.5", "line 2: position must be a slot from 1 on: 0"),
        ("2019-11-24 00:00:07+00:00,7,1,0", "line 2: 4 cells under 5 names"),
        ("2019-11-24 00:00:07+00:00,,1,0,1", "line 2: item_id is missing"),
        ("2019-11-24 00:00:07+00:00,7,1,0,inf", "line 2: propensity_score is no finite number"),
    ):
        write("bad.csv", header + line + "\n")
        with pytest.raises(DataError, match=f"'bad.csv', {message}"):
            convert("obd", ["bad.csv"], "out2.parquet")


def test_rectools():
    pd.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 6, 5], "score": [0.9, 0.1, 0.5], "rank": [1, 2, 1]}).to_parquet(
        "r.parquet"
    )
    pd.DataFrame({"user_id": [1, 1, 2], "item_id": [6, 9, 7], "weight": 1, "datetime": "2024-01-01"}).to_csv(
        "i.csv", index=False
    )
    frame, counts = rows("rectools", "r.parquet", "i.csv")
    assert (
        frame.user_id.tolist() == ["1", "1", "2"] and frame.label.tolist() == [0, 1, 0] and frame.score.iloc[0] == 0.9
    )
    assert counts.skipped == {"positives that were not recommended": 2} and counts.rows == 6
    write("r.csv", "user_id,item_id,rank,score_als,price,kind\n007,NA,0,.5,3,x\n8,1,0,,2,y\n007,01,1,.25,,\n")
    write("i.csv", "user_id,item_id\n007,01\n9,1\n7,NA\n")
    frame, counts = rows("rectools", "r.csv", "i.csv")
    assert frame.user_id.tolist() == ["007", "007", "8"] and frame.item_id.tolist() == ["NA", "01", "1"]
    assert frame.label.tolist() == [0, 1, 0], "an id is text: 007 is not 7, and 01 is not 1"
    np.testing.assert_allclose(frame.score, [1, 0.5, 1])  # ranks from 0
    np.testing.assert_allclose(frame.score_als, [0.5, 0.25, np.nan])
    np.testing.assert_allclose(frame.price, [3, np.nan, 2])
    assert frame.kind.tolist() == ["x", None, "y"]
    assert counts.skipped == {"positives of lists that were not recommended": 2}
    assert counts.taken == {"lists without a held-out item": 1}
    write("r.csv", "user_id,item_id\n1,2\n")
    with pytest.raises(DataError, match="neither score nor rank"):
        convert("rectools", ["r.csv", "i.csv"], "out2.parquet")


def test_lenskit():
    native = [
        {"user_id": 1, "items": [{"item_id": 5, "score": 2.0, "rank": 1}, {"item_id": 6, "score": 1.0, "rank": 2}]},
        {"user_id": 2, "items": []},
    ]
    pq.write_table(pa.Table.from_pylist(native), "recs.parquet")
    pq.write_table(pa.Table.from_pylist([{"user_id": 1, "items": [{"item_id": 6}]}]), "truth.parquet")
    a, counts = rows("lenskit", "recs.parquet", "truth.parquet")
    assert counts.skipped == {"requests without a candidate": 1} and counts.rows == 3
    lists = [
        {"user_id": 1, "day": "x", "items": [{"item_id": 5, "score": None, "label": 1, "position": 4.0, "rank": 1}]},
        {"user_id": 1, "day": "y", "items": None},
        {"user_id": 1, "day": "z", "items": [{"item_id": 5, "score": 3.0, "label": 0, "position": 2.0, "rank": 1}]},
    ]
    pq.write_table(pa.Table.from_pylist(lists), "days.parquet")
    days, counts = rows("lenskit", "days.parquet")
    assert days.request_id.tolist() == ["1|x", "1|z"] and days.user_id.tolist() == ["1", "1"]
    assert days.label.tolist() == [1, 0] and days.score.isna().tolist() == [True, False]
    assert days.item_position.tolist() == [4, 2] and "position" not in days and "rank" not in days
    assert counts.skipped == {"requests without a candidate": 1}
    flat = pd.DataFrame({"user_id": [1, 1], "item_id": [5, 6], "score": [2.0, 1.0], "label": [0, 1]})
    flat.to_parquet("flat.parquet")
    b, _ = rows("lenskit", "flat.parquet")
    assert a.label.tolist() == b.label.tolist() == [0, 1] and a.score.tolist() == b.score.tolist() == [2.0, 1.0]
    with pytest.raises(ConfigError, match="'recs.parquet' has no 'label': give the held-out"):
        convert("lenskit", ["recs.parquet"], "out2.parquet")


def test_every_format_says_what_it_is_and_what_is_wrong(here):
    assert set(CONVERTERS) >= {
        "mind",
        "letor",
        "trec",
        "recflow",
        "kuairand",
        "librerank",
        "metarank",
        "obd",
        "rectools",
        "lenskit",
    }
    for name, found in CONVERTERS.items():
        assert found.read.__doc__ and found == get_converter(name), name
        for option in options_of(name).values():
            assert option.help and option.check(option.default) == option.default
        write("bad", "\x00 nonsense \u2026\n" * 3)
        options = {"score": 1} if name == "letor" else {}
        with pytest.raises(DnrError) as error:
            convert(name, ["bad", "bad"], "never.parquet", **options)
        assert "\n" not in str(error.value)
        with pytest.raises(DnrError, match="nowhere|needs"):
            convert(name, ["nowhere"], "never.parquet", **options)
        assert not (here / "never.parquet").exists()


def test_the_page_has_every_format_and_option():
    page = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    commands = [line.split() for line in page.splitlines() if line.startswith("dnr-recbole convert ")]
    assert sorted(words[2] for words in commands) == sorted(CONVERTERS)
    for _, _, name, *words in commands:
        for flag in (word for word in words if word.startswith("--")):
            option, _, text = flag[2:].partition("=")
            options_of(name)[option].parse(text)
    section = page[page.index("## Options") : page.index("## What becomes of what")]
    told, name = {format: set() for format in CONVERTERS}, ""
    for cells in (line.split("|") for line in section.splitlines() if line.startswith("|")):
        name = cells[1].strip() or name
        for format in name.replace("`", "").split(", "):
            if format in told:
                told[format].add(cells[2].strip(" `"))
    assert told == {format: set(options_of(format)) for format in CONVERTERS}


def test_the_command(capsys):
    write("run", "q1 Q0 d1 0 9.5 bm25\n")
    write("qrels", "q1 0 d1 2\n")
    assert main(["convert", "trec", "run", "qrels", "out.parquet", "--threshold=3"]) == 0
    assert capsys.readouterr().out == "2 rows read; 1 requests, 1 candidates, 0 positives -> out.parquet\n"
    assert "letor" in convert_command([]) and "--threshold=1.0" in convert_command(["trec", "--help"])
    for arguments, message in (
        (["trek", "a", "b"], "did you mean trec"),
        (["trec", "run", "qrels", "o.parquet", "--treshold=1"], "did you mean threshold"),
        (["trec", "run", "qrels", "o.parquet", "--threshold=high"], "must be a number"),
        (["trec", "run"], "needs RUN QRELS"),
        (["trec", "run", "o.parquet"], "needs RUN QRELS, not 1 file"),
        (["trec", "run", "qrels", "o.parquet", "--threshold"], "needs a value"),
        (["trec", "run", "qrels", "o.parquet", "--threshold=nan"], "must be a number"),
        (["trec", "run", "qrels", "o.parquet", "--threshold=1", "--threshold=2"], "given twice"),
        (["letor", "run", "o.parquet", "--score=1.5"], "must be a whole number"),
        (["metarank", "run", "o.parquet", "--window=-1"], "must be a number from 0 on"),
        (["trec", "out.parquet", "qrels", "out.parquet"], "is an input"),
        (["mind", "a", "b.parquet", "--score=bm25"], "one of popularity, none"),
        (["trec", "run", "qrels", "o.csv"], "end in .parquet"),
    ):  # fmt: skip
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_options_of_the_function_are_checked_too():
    write("b.tsv", "1\tU1\t11/15/2019 10:00:00 AM\t\tN1-0\n")
    with pytest.raises(ConfigError, match="--score=bm25: must be one of popularity, none"):
        convert("mind", ["b.tsv"], "out.parquet", score="bm25")
    with pytest.raises(ConfigError, match="--threshold=True: must be a number"):
        convert("letor", ["b.tsv"], "out.parquet", threshold=True)
    option = options_of("metarank")["window"]
    assert option.type is float and option.parse("5") == 5.0 and option.default == 30.0


def long_inputs():
    """Of every format that reads rows: inputs of many rows, and options."""
    rng = np.random.default_rng(0)
    n = 60
    users, items = rng.integers(0, 5, n), rng.permutation(n)
    write("letor", "".join(f"{i % 3} qid:{i // 4} 1:{i} 2:{i * i}\n" for i in range(n)))
    write("mind", "".join(f"{i}\tU{i % 3}\t11/15/2019 10:{i:02}:00 AM\tN1 N2\tN{i % 7}-1 N8-0\n" for i in range(n)))
    events = [ranking(id=str(i), timestamp=i * 60_000) for i in range(n)]
    write("metarank", "".join(json.dumps(event) + "\n" for event in events))
    write("librerank", "7\t[1]\t[[3, 9], [4, 9]]\t[[0.5], [null]]\t[1, 0]\n" * n)
    log = pd.DataFrame({"user_id": users, "video_id": items, "tab": 0, "is_click": items % 2, "is_rand": 0})
    log["time_ms"] = rng.integers(0, 10**7, n)
    log.to_csv("kuairand.csv", index=False)
    day = pd.DataFrame({"request_id": np.arange(n) // 4, "user_id": np.arange(n) // 4 % 3, "video_id": items})
    day["request_timestamp"] = rng.permutation(n)[day.request_id] * 1000
    day = day.assign(realshow=items % 2, rank_index=np.arange(n) % 4, effective_view=items % 3 == 0)
    pyarrow.feather.write_feather(day, "recflow.feather", chunksize=5)
    recommended = pd.DataFrame({"user_id": users, "item_id": items, "score": rng.random(n), "price": items * 1.0})
    recommended.to_csv("recs.csv", index=False)
    recommended.to_parquet("flat.parquet")
    recommended[::3].to_parquet("truth.parquet")
    shop = pd.DataFrame({"timestamp": [f"2019-11-24 00:{i // 3:02}:07+00:00" for i in range(n)], "item_id": items})
    shop.assign(position=np.arange(n) % 3 + 1, click=0, propensity_score=0.5).to_csv("obd.csv", index=False)
    return {
        "letor": (["letor"], {"score": 1}), "mind": (["mind"], {}), "metarank": (["metarank"], {}),
        "librerank": (["librerank"], {}), "kuairand": (["kuairand.csv"], {}), "recflow": (["recflow.feather"], {}),
        "rectools": (["recs.csv", "truth.parquet"], {}), "lenskit": (["flat.parquet", "truth.parquet"], {}),
        "obd": (["obd.csv"], {}),
    }  # fmt: skip


@pytest.mark.parametrize("name", [
    "letor", "mind", "metarank", "librerank", "kuairand", "recflow", "rectools", "lenskit", "obd",
])  # fmt: skip
def test_many_batches_give_what_one_gives(here, monkeypatch, name):
    inputs, options = long_inputs()[name]
    whole, counts = rows(name, *inputs, **options)
    monkeypatch.setattr(writing, "ROWS", 7)
    monkeypatch.setattr(tables, "BATCH", 4)
    monkeypatch.setattr(tables, "RUN", 11)
    before = sorted(os.listdir(here))
    parts, same = rows(name, *inputs, **options)
    pd.testing.assert_frame_equal(whole, parts)
    assert same == counts and sorted(os.listdir(here)) == before
    assert pq.ParquetFile("out.parquet").num_row_groups > 4


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40), st.integers(1, 9), st.integers(1, 9))
def test_sorting_on_disk_is_stable(keys, run, batch):
    rows_of = [{"a": str(a), "b": float(b), "n": n} for n, (a, b) in enumerate(keys)]
    batches = [pa.Table.from_pylist(rows_of[low : low + 3]) for low in range(0, len(rows_of), 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "RUN", run)
        patch.setattr(tables, "BATCH", batch)
        found = [row for table in tables.in_order(batches, ["a", "b"]) for row in table.to_pylist()]
        assert found == sorted(rows_of, key=lambda row: (row["a"], row["b"]))
        grouped = list(tables.by_first_row(batches, "a"))
    assert [group["a"][0] for group in grouped] == list(dict.fromkeys(row["a"] for row in rows_of))
    for group in grouped:
        assert group["n"] == [row["n"] for row in rows_of if row["a"] == group["a"][0]]


@pytest.fixture
def invented():
    """A format of its own: yields the requests that the test puts into the list."""
    requests = []

    @converter("invented", "FILE", [Option("shift", 0, "added to labels")])
    def read(inputs, options, counts):
        """Nothing is read."""
        yield from requests

    yield requests
    CONVERTERS.pop("invented")


def test_columns_that_come_late_and_wider_types(here, monkeypatch, invented):
    monkeypatch.setattr(writing, "ROWS", 2)
    late = [
        {}, {"x": [1, 2]}, {"x": [1.5, None]}, {"t": [["a"], []], "score": [1, 2]}, {"x": [7, 7], "s_": [True, None]},
    ]  # fmt: skip
    invented += [Request(str(i), {"item_id": ["a", "b"], "label": [0, 1], **more}) for i, more in enumerate(late)]
    frame, _ = rows("invented", "none")
    assert list(frame) == ["request_id", "user_id", "item_id", "score", "label", "x", "t", "s_"]
    np.testing.assert_allclose(frame.x, [np.nan] * 2 + [1, 2, 1.5] + [np.nan] * 3 + [7, 7])
    assert frame.score.tolist()[6:8] == [1, 2] and list(frame.t[6]) == ["a"] and frame.s_[8]
    assert os.listdir(here) == ["out.parquet"], "parts are gone"
    invented.append(Request("9", {"item_id": ["a", "b"], "label": [0, 1], "x": ["text", "text"]}))
    with pytest.raises(DataError, match="column 'x' have no common type: double first, string later"):
        convert("invented", ["none"], "new.parquet")
    assert os.listdir(here) == ["out.parquet"]


def test_a_repeated_item_is_counted_and_its_click_kept(invented):
    invented.append(Request("1", {"item_id": ["a", "b", "a"], "label": [0, 0, 1], "score": [3, 2, 1]}))
    frame, counts = rows("invented", "none")
    assert frame.item_id.tolist() == ["a", "b"] and frame.label.tolist() == [1, 0] and frame.score.tolist() == [3, 2]
    assert counts.skipped == {"repetitions of an item in its request": 1}


def test_tables_of_text():
    """What a CSV can hold."""
    head = "user_id,item_id,score\n"
    truth = write("i.csv", "user_id,item_id\n1,2\n")
    write("r.csv", '\ufeffuser_id,item_id,score\r\n1,"a, ""b""\nc",5\r\n\r\n1,2,4\r\n')
    frame, _ = rows("rectools", "r.csv", truth)
    assert frame.item_id.tolist() == ['a, "b"\nc', "2"] and frame.label.tolist() == [0, 1]
    with gzip.open("r.tsv.gz", "wt") as file:
        file.write(head.replace(",", "\t") + "1\t2\t5\n")
    assert rows("rectools", "r.tsv.gz", truth)[0].score.tolist() == [5]
    pd.DataFrame({"user_id": [1.0, 2.0], "item_id": [2, 3], "score": [1.0, None]}).to_parquet("r.parquet")
    frame, _ = rows("rectools", "r.parquet", truth)
    assert frame.user_id.tolist() == ["1", "2"] and frame.label.tolist() == [1, 0] and frame.score.isna()[1]
    for text, message in (
        ("", "'r.csv' is empty"),
        ("user_id,user_id\n", "two columns 'user_id'"),
        (head + '1,"a\n', "'r.csv', line 2: unexpected end of data"),
        (head + "1,a,4\n\n1,b\n", "'r.csv', line 4: 2 cells under 3 names"),
        (head + "1,a,4\n\n1,b,high\n", "'r.csv', line 4: score is no number: 'high'"),
        (head + "1,a,4\n,b,3\n", "'r.csv', line 3: user_id is missing"),
    ):
        write("r.csv", text)
        with pytest.raises(DataError, match=message):
            convert("rectools", ["r.csv", truth], "out2.parquet")
    with open("r.csv", "wb") as file:
        file.write(head.encode() + b"1,caf\xe9,3\n")
    with pytest.raises(DataError, match="'r.csv', line .: not UTF-8"):
        convert("rectools", ["r.csv", truth], "out2.parquet")
    with open("run", "wb") as file:
        file.write(b"q1 Q0 d1 0 9 x\nq1 Q0 caf\xe9 1 8 x\n")
    with pytest.raises(DataError, match="'run', line 2: byte 10 is not UTF-8"):
        convert("trec", ["run", write("qrels", "q1 0 d1 1\n")], "out2.parquet")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.integers(0, 99),
        st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5, width=32)), min_size=1, max_size=5),
        min_size=1,
    )
)
def test_letor_round_trip(queries):
    write("a.txt", "".join(f"{grade} qid:{q} 1:{value!r}\n" for q, found in queries.items() for grade, value in found))
    frame, _ = rows("letor", "a.txt", score=1)
    got = {int(q): list(zip(part.grade, part.score)) for q, part in frame.groupby("request_id")}
    assert got == {q: [(float(g), float(v)) for g, v in found] for q, found in queries.items()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True), st.sets(st.sampled_from("abcdef"))
        ),
        min_size=1,
    )
)
def test_metarank_round_trip(rankings):
    events = []
    for number, (items, clicked) in enumerate(rankings):
        events.append({"event": "ranking", "id": str(number), "timestamp": number, "items": [{"id": i} for i in items]})
        events += [
            {"event": "interaction", "ranking": str(number), "timestamp": number, "item": i} for i in sorted(clicked)
        ]
    write("e.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    frame, counts = rows("metarank", "e.jsonl")
    got = [
        (part.item_id.tolist(), set(part.item_id[part.label == 1]))
        for _, part in frame.groupby("request_id", sort=False)
    ]
    assert got == [(items, clicked & set(items)) for items, clicked in rankings]
    strangers = sum(len(clicked - set(items)) for items, clicked in rankings)
    assert counts.skipped == ({"clicks on items that are not in their ranking": strangers} if strangers else {})
