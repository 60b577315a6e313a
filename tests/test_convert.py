"""Every foreign format: a small invented file in exactly that form, and the rows that must come of it."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dnr_recbole.convert as conversion
from dnr_recbole.cli import main
from dnr_recbole.convert import CONVERTERS, convert, convert_command, get_converter
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
    assert "score" not in rows("mind", "behaviors.tsv", score="none")[0]
    write("test.tsv", "1\tU1\t11/15/2019 10:00:00 AM\t\tN1 N2\n2\tU1\t11/15/2019 10:00:00 AM\t\tN1-1 N2-0\n")
    assert rows("mind", "test.tsv")[1].skipped == {"impressions without clicks (a test file)": 1}


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
    with pytest.raises(ConfigError, match="name the feature.*0 … 3"):
        convert("letor", ["a.txt"], "out2.parquet")


def test_trec():
    write("run", "q1 Q0 d1 0 9.5 bm25\nq1 Q0 d2 1 8 bm25\nq2 Q0 d1 1 3 bm25\n")
    write("qrels", "q1 0 d1 2\nq1 0 d7 1\nq2 0 d1 0\n")
    frame, counts = rows("trec", "run", "qrels")
    assert frame.label.tolist() == [1, 0, 0] and frame.score.tolist() == [9.5, 8, 3]
    assert counts.skipped == {"documents without a judgement, taken as not relevant": 1}
    write("run", "q1 Q0 d1 0 9 x\nq2 Q0 d2 1 8 x\nq1 Q0 d3 1 3 x\n")
    with pytest.raises(DataError, match="line 3: query q1 stands in two places"):
        convert("trec", ["run", "qrels"], "out2.parquet")


def test_recflow():
    day = pd.DataFrame({
        "request_id": [7, 7, 7, 5, 5], "request_timestamp": [2_000_000] * 3 + [1_000_000] * 2, "user_id": [1] * 5,
        "video_id": [11, 12, 13, 14, 15], "realshow": [1, 0, 0, 1, 1], "rank_index": [0, 1, -1, 1, 0],
        "effective_view": [1, 0, 0, 0, 1], "like": [0] * 5,
    })  # fmt: skip
    pyarrow.feather.write_feather(day, "day.feather")
    frame, _ = rows("recflow", "day.feather")
    assert frame.request_id.tolist() == ["5", "5", "7", "7", "7"], "in the order of time"
    assert frame.timestamp.tolist() == [1000, 1000, 2000, 2000, 2000]
    np.testing.assert_allclose(frame.score, [0.5, 1, 1, 0.5, np.nan])
    assert frame.exposed.tolist() == [True, True, True, False, False] and frame.label.tolist() == [0, 1, 1, 0, 0]
    assert [list(h) for h in frame.history] == [[], []] + [["14", "15"]] * 3
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
    assert counts.skipped == {"items shown again in the same request": 1}
    assert frame.random.tolist() == [False, True, False, False, False] and frame.position.tolist() == [0, 1, 0, 0, 0]
    later = frame[frame.user_id == "2"].score.item()
    assert later == pytest.approx(1.0), "two clicks before, both on this item"
    assert rows("kuairand", "log.csv", gap=60.0)[1].requests == 3


def test_librerank():
    line = "7\t[1, 2]\t[[3, 9], [4, 9], [0, 0]]\t[[0.5], [null], [0.0]]\t[1, 0, 0]\n"
    write("a.tsv", line)
    frame, counts = rows("librerank", "a.tsv")
    assert (
        frame.item_id.tolist() == ["3", "4"] and frame.score.tolist() == [1.0, 0.5] and frame.label.tolist() == [1, 0]
    )
    assert (
        frame.c0.tolist() == [9, 9]
        and frame.d0.isna().tolist() == [False, True]
        and frame.user_id.tolist() == ["7"] * 2
    )
    assert counts.skipped == {"padding items": 1}
    assert rows("librerank", "a.tsv", score=0)[0].score.isna().tolist() == [False, True]
    for bad in (
        "__import__('os').system('touch hacked')\t[]\t[]\t[]\t[]\n",
        "7\t[]\t[[1]]\t[[1]]\t[1, 0]\n",
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
    assert counts.skipped == {"interactions without a ranking in the window": 1}
    write("broken.jsonl", text + "{oops\n")
    with pytest.raises(DataError, match="'broken.jsonl', line 6: no JSON object"):
        convert("metarank", ["broken.jsonl"], "out2.parquet")
    assert not (here / "out2.parquet").exists()


def test_open_bandit():
    pd.DataFrame({
        "timestamp": ["2019-11-24 00:00:07+00:00"] * 3 + ["2019-11-24 00:01:00+00:00"], "item_id": [3, 1, 3, 2],
        "position": [1, 2, 1, 3], "click": [0, 1, 0, 0], "propensity_score": [0.1, 0.2, 0.3, 0.4],
        "user_feature_0": ["a", "a", "a", "b"], **{f"user-item_affinity_{i}": [i, i, i, i] for i in range(4)},
    }).to_csv("all.csv")  # fmt: skip
    frame, _ = rows("obd", "all.csv")
    assert [part.item_id.tolist() for _, part in frame.groupby("request_id", sort=False)] == [["3", "1"], ["3"], ["2"]]
    assert frame.position.tolist() == [0, 1, 0, 0] and frame.propensity.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert frame.score.tolist() == [3, 1, 3, 2] and frame.user_feature_0.tolist() == ["a", "a", "a", "b"]
    assert frame.timestamp.iloc[0] == 1574553607


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
    assert counts.skipped == {"positives that were not recommended": 2}


def test_lenskit():
    native = [
        {"user_id": 1, "items": [{"item_id": 5, "score": 2.0, "rank": 1}, {"item_id": 6, "score": 1.0, "rank": 2}]},
        {"user_id": 2, "items": []},
    ]
    pq.write_table(pa.Table.from_pylist(native), "recs.parquet")
    pq.write_table(pa.Table.from_pylist([{"user_id": 1, "items": [{"item_id": 6}]}]), "truth.parquet")
    a, _ = rows("lenskit", "recs.parquet", "truth.parquet")
    flat = pd.DataFrame({"user_id": [1, 1], "item_id": [5, 6], "score": [2.0, 1.0], "label": [0, 1]})
    flat.to_parquet("flat.parquet")
    b, _ = rows("lenskit", "flat.parquet")
    assert a.label.tolist() == b.label.tolist() == [0, 1] and a.score.tolist() == b.score.tolist() == [2.0, 1.0]
    with pytest.raises(ConfigError, match="no column 'label'"):
        convert("lenskit", ["recs.parquet"], "out2.parquet")


def test_every_format_says_what_it_is_and_what_is_wrong(here):
    get_converter("mind")
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
        assert found.read.__doc__ or name in ("obd",), name
        write("bad", "\x00 nonsense \u2026\n" * 3)
        options = {"score": 1} if name == "letor" else {}
        with pytest.raises(DnrError) as error:
            convert(name, ["bad", "bad"], "never.parquet", **options)
        assert "\n" not in str(error.value)
        with pytest.raises(DnrError, match="nowhere|needs"):
            convert(name, ["nowhere"], "never.parquet", **options)
        assert not (here / "never.parquet").exists()


def test_the_command(capsys):
    write("run", "q1 Q0 d1 0 9.5 bm25\n")
    write("qrels", "q1 0 d1 2\n")
    assert main(["convert", "trec", "run", "qrels", "out.parquet", "--threshold=3"]) == 0
    assert capsys.readouterr().out == "1 requests, 1 candidates, 0 positives -> out.parquet\n"
    assert "letor" in convert_command([]) and "--threshold=1.0" in convert_command(["trec", "--help"])
    for arguments, message in (
        (["trek", "a", "b"], "did you mean trec"),
        (["trec", "run", "qrels", "o.parquet", "--treshold=1"], "did you mean threshold"),
        (["trec", "run", "qrels", "o.parquet", "--threshold=high"], "must be a number"),
        (["trec", "run"], "needs RUN QRELS"),
        (["mind", "a", "b.parquet", "--score=bm25"], "one of popularity, none"),
        (["trec", "run", "qrels", "o.csv"], "end in .parquet"),
    ):  # fmt: skip
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_many_row_groups_hold_what_one_holds(monkeypatch):
    write("a.txt", "".join(f"{n % 3} qid:{n // 4} 1:{n} 2:{n * n}\n" for n in range(50)))
    whole, _ = rows("letor", "a.txt", score=1)
    monkeypatch.setattr(conversion, "_ROWS", 7)
    parts, _ = rows("letor", "a.txt", score=1)
    pd.testing.assert_frame_equal(whole, parts)
    assert pq.ParquetFile("out.parquet").num_row_groups > 4


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
