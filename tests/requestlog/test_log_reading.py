"""Every form and file of a log gives the same requests; whatever is wrong is named with its place."""

from __future__ import annotations

import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_helpers import as_lists, world

from dnr_recbole.config import Config
from dnr_recbole.errors import DataError
from dnr_recbole.requestlog import reading
from dnr_recbole.requestlog.columns import flags, numbers, text_lists, times, token, tokens
from dnr_recbole.requestlog.reading import Source, read_batches
from dnr_recbole.requestlog.request_log import RequestLog, describe_problems
from dnr_recbole.requestlog.scan import scan

CONFIG = Config("PRM", config_dict={"source": "log", "use_gpu": False})


def found_in(table, **keys):
    config = Config("PRM", config_dict={"source": "log", "use_gpu": False, **keys})
    return RequestLog.read(table, encoding=config["encoding"] or "utf-8").scan(config)[0]


def content(source: Source):
    """Everything in a log, request by request."""
    out = []
    for batch in read_batches(source):
        names, users = batch.request.texts(), tokens(batch.per_request["user_id"]).texts()
        items = tokens(batch.per_candidate["item_id"]).texts()
        score, label = (numbers(batch.per_candidate[name]).values for name in ("score", "label"))
        for r in range(len(batch)):
            part = slice(batch.ptr[r], batch.ptr[r + 1])
            out.append((names[r], users[r], tuple(items[part]), tuple(score[part]), tuple(label[part])))
    return out


def written(frame, path):
    name = path.name
    if name.endswith(".parquet"):
        frame.to_parquet(path, row_group_size=7)
    elif name.endswith((".feather", ".arrow")):
        pyarrow.feather.write_feather(pa.Table.from_pandas(frame), str(path), chunksize=5)
    else:
        text = frame.to_csv(index=False, sep="\t" if ".tsv" in name else ",").encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow", "a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz"])
@pytest.mark.parametrize("rows", [3, 10, 1 << 16])
def test_every_file_holds_the_same_requests(tmp_path, monkeypatch, name, rows):
    monkeypatch.setattr(reading, "ROWS", rows)  # requests of 8 rows then lie across batches
    frame = world(9)
    expected = content(Source(frame))
    assert len(expected) == 9 and all(len(request[2]) == 8 for request in expected)
    assert content(Source(written(frame, tmp_path / name))) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_lists_hold_the_same_requests(tmp_path, name):
    frame = world(9)
    expected = content(Source(frame))
    assert content(Source(as_lists(frame))) == expected
    assert content(Source(written(as_lists(frame), tmp_path / name))) == expected


def test_a_list_of_structs_holds_the_same_requests(tmp_path):
    frame = world(5)
    rows = [
        {"request_id": name, "user_id": part.user_id.iloc[0],
         "items": part[["item_id", "score", "label"]].to_dict("records")}
        for name, part in frame.groupby("request_id", sort=False)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert content(Source(tmp_path / "a.parquet")) == content(Source(frame))
    assert found_in(tmp_path / "a.parquet").rows == len(frame)


def test_rows_of_a_request_that_stand_apart_are_put_together():
    frame = world(20)
    mixed = frame.sample(frac=1, random_state=1)
    found, source = RequestLog.read(mixed).scan(CONFIG)
    assert len(found) == 20 and (found.candidates == 8).all()
    assert any("do not stand together" in str(problem) for problem in found.problems.notes)
    by_name = {request[0]: set(zip(*request[2:])) for request in content(Source(frame))}
    assert {request[0]: set(zip(*request[2:])) for request in content(source)} == by_name


@pytest.mark.parametrize(
    "value, expected",
    [(7, "7"), (7.0, "7"), ("7", "7"), (7.5, "7.5"), ("", None), (None, None), (float("nan"), None), (b"x", "x"),
     (np.int64(3), "3"), (True, "True"), ("ü ", "ü ")],
)  # fmt: skip
def test_ids_are_the_same_whatever_type_a_file_gives_them(value, expected):
    assert token(value) == expected


def test_ids_of_one_text_are_one():
    found = tokens(pa.array([1.0, 2.0, None, 1.0]))
    assert found.texts().tolist() == ["1", "2", None, "1"] and found.values.tolist() == ["1", "2"]
    assert tokens(pa.array(["1", "", "1"])).codes.tolist() == [0, -1, 0]
    assert tokens(pa.array([None, None])).codes.tolist() == [-1, -1]


def test_columns_of_texts_are_read_as_what_they_say():
    found = numbers(pa.array([" 1.5", "x", "", None, "nan", "1e3"]))
    np.testing.assert_array_equal(found.missing, [False, False, True, True, False, False])
    np.testing.assert_array_equal(found.wrong, [False, True, False, False, False, False])
    np.testing.assert_array_equal(found.values[[0, 5]], [1.5, 1000])
    yes = flags(pa.array(["true", "0", "Yes", "maybe", None]))
    np.testing.assert_array_equal(yes.values[:3], [1, 0, 1])
    assert yes.wrong.tolist() == [False, False, False, True, False] and yes.missing.tolist() == [False] * 4 + [True]
    assert flags(pa.array([0, 1, 2])).wrong.tolist() == [False, False, True]
    clock = times(pa.array(["2024-01-01 00:00:00", "17", "soon"]))
    assert clock.values[:2].tolist() == [1704067200.0, 17.0] and clock.wrong.tolist() == [False, False, True]
    assert times(pa.array([pd.Timestamp("2024-01-01")])).values.tolist() == [1704067200.0]
    ptr, values = text_lists(pa.array(["a b", "", None, " c  a "]))
    assert ptr.tolist() == [0, 2, 2, 2, 4] and values.texts().tolist() == ["a", "b", "c", "a"]


# ---------------------------------------------------------------------- what is wrong

BAD = {
    "score nan": ("score", float("inf"), "a score is NaN or infinite"),
    "score word": ("score", "high", "not a number"),
    "score range": ("score", 1.5, "outside [0, 1]"),
    "label two": ("label", 2, "neither 0 nor 1"),
    "label none": ("label", None, "a label is missing"),
    "item none": ("item_id", None, "an item id is missing"),
    "time none": ("timestamp", None, "a time is missing"),
    "time word": ("timestamp", "yesterday", "no number and no time"),
    "split": ("split", "dev", "must be train, valid or test"),
    "exposed": ("exposed", "perhaps", "neither true nor false"),
    "propensity": ("propensity", -0.5, "outside (0, 1]"),
    "position": ("position", -1, "no number from 0 on"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", ["frame", "csv"])
def test_every_problem_is_named_with_its_place(tmp_path, case, kind):
    column, value, what = BAD[case]
    frame = world(12)
    frame["split"], frame["exposed"], frame["propensity"] = "train", True, 0.5
    frame["position"] = np.tile(np.arange(8), 12)
    frame["split"] = np.repeat(["train"] * 6 + ["valid"] * 3 + ["test"] * 3, 8)
    rows = [24, 25] if column not in ("timestamp", "split") else list(range(24, 32))
    frame[column] = frame[column].astype(object)
    frame.loc[rows, column] = value
    table = frame
    if kind == "csv":
        table = tmp_path / "log.csv"
        frame.to_csv(table, index=False)
    found = found_in(table)
    assert len(found.problems.fatal) == 1, describe_problems(found)
    problem = found.problems.fatal[0]
    assert problem.column == column and what in problem.what
    assert problem.count == (2 if column not in ("timestamp", "split") else 1)
    assert problem.examples[0].startswith("line 26" if kind == "csv" else "row 25")
    if value is not None:
        assert str(value) in problem.examples[0]
    with pytest.raises(DataError, match="dnr-recbole validate"):
        found.problems.raise_fatal("log")


@pytest.mark.parametrize("positions", [[1, 2, 3], [0, 1, 3], [0, 0, 2], [0, None, None], [2, 0, 1], [None, 1, 0]])
def test_positions_that_are_shared_or_left_out_are_noted(positions):
    known = sorted(place for place in positions if place is not None)
    places = [*range(3), *range(3), *positions, None, None, None]
    frame = world(4, n=3).assign(position=pd.Series(places, dtype="Int64"))
    notes = [problem for problem in found_in(frame).problems.notes if "positions" in problem.what]
    if known == list(range(len(known))):
        assert not notes
    else:
        assert [problem.count for problem in notes] == [1] and "request r2" in notes[0].examples[0]


def test_a_duplicate_and_rows_that_differ_are_named():
    frame = world(6)
    frame.loc[3, "item_id"] = frame.loc[2, "item_id"]
    frame.loc[9, "user_id"] = "somebody else"
    shown = [str(problem) for problem in found_in(frame).problems.fatal]
    assert len(shown) == 2
    assert any("a candidate occurs twice in a request (1)" in text and "row 4" in text for text in shown)
    assert any("rows of one request differ" in text and "row 10" in text for text in shown)


def test_what_is_treated_is_counted():
    frame = world(30)
    frame.loc[frame.request_id == "r3", "user_id"] = None
    frame.loc[[0, 1], "score"] = None
    frame["extra"] = 1
    frame.loc[frame.request_id == "r9", "timestamp"] = 0
    notes = [str(problem) for problem in found_in(frame).problems.notes]
    for text in ("requests without a user are anonymous (1)", "scores are missing and count as the lowest (2)",
                 "extra: columns that no key names, not read (1)", "time goes backwards"):  # fmt: skip
        assert any(text in note for note in notes), (text, notes)
    assert not found_in(frame).problems.fatal


@pytest.mark.parametrize("missing", ["request_id", "item_id", "score", "label"])
def test_a_missing_column_is_named(missing):
    frame = world(5).rename(columns={missing: missing + "s"})
    with pytest.raises(DataError, match=f"no column '{missing}'.*did you mean {missing}s"):
        found_in(frame)


def test_files_that_cannot_be_read(tmp_path):
    frame = world(4)
    with pytest.raises(DataError, match="does not exist: did you mean requests.csv"):
        written(frame, tmp_path / "requests.csv")
        Source(tmp_path / "request.csv")
    with pytest.raises(DataError, match="must end in one of"):
        (tmp_path / "a.xlsx").write_bytes(b"x")
        Source(tmp_path / "a.xlsx")
    for name in ("a.parquet", "a.feather"):
        (tmp_path / name).write_bytes(b"garbage" * 100)
        with pytest.raises(DataError, match="cannot be read"):
            scan(Source(tmp_path / name), CONFIG)
    (tmp_path / "more.csv").write_text("request_id,item_id,score,label\nr,1,0.5,1\nr,2,0.5,1,9\n")
    with pytest.raises(DataError, match="more.csv.*Expected 4 columns, got 5"):
        scan(Source(tmp_path / "more.csv"), CONFIG)
    (tmp_path / "twice.csv").write_text("request_id,item_id,score,score\nr,1,0.5,1\n")
    with pytest.raises(DataError, match="two columns are called 'score'"):
        scan(Source(tmp_path / "twice.csv"), CONFIG)
    (tmp_path / "latin.csv").write_bytes("request_id,item_id,score,label\nr,é,0.5,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="set the key encoding"):
        scan(Source(tmp_path / "latin.csv"), CONFIG)
    assert "é" in found_in(tmp_path / "latin.csv", encoding="latin-1").items.list()
    (tmp_path / "bom.csv").write_bytes("\ufeffrequest_id,item_id,score,label\nr,1,0.5,1\n".encode())
    assert len(found_in(tmp_path / "bom.csv")) == 1
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="empty.csv"):
        scan(Source(tmp_path / "empty.csv"), CONFIG)
    (tmp_path / "header.csv").write_text("request_id,item_id,score,label\n")
    with pytest.raises(DataError, match="there is no request|is empty"):
        found_in(tmp_path / "header.csv").problems.raise_fatal("header.csv")


def test_a_field_of_50_mb_is_refused_in_a_line(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text('request_id,item_id,score,label\nr,"' + "x" * 50_000_000 + '",0.5,1\n')
    with pytest.raises(DataError, match="longer than 16 MiB|cannot be read") as error:
        scan(Source(path), CONFIG)
    assert len(str(error.value)) < 600


def test_mixed_types_and_two_columns_of_a_frame():
    frame = world(5)
    frame["item_id"] = [i if n % 2 else int(i[1:]) for n, i in enumerate(frame.item_id)]
    assert found_in(frame).rows == len(frame)
    with pytest.raises(DataError, match="two columns 'score'"):
        RequestLog.read(pd.concat([frame, frame[["score"]]], axis=1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.sampled_from([".csv", ".tsv", ".csv.gz", ".parquet", ".feather"]))
def test_no_file_crashes_the_reader(tmp_path, data, ending):
    header = b"request_id,item_id,score,label\n" if ending == ".csv" else b""
    path = tmp_path / f"any{ending}"
    path.write_bytes(header + data)
    try:
        found_in(path)
    except DataError as error:
        assert "\n" not in str(error)


_cell = st.one_of(
    st.none(), st.integers(-5, 5), st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=4), st.booleans()
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(_cell, _cell, _cell, _cell, _cell, _cell), min_size=1, max_size=12))
def test_no_frame_crashes_the_reader_and_nothing_vanishes(rows):
    names = ["request_id", "user_id", "item_id", "score", "label", "timestamp"]
    frame = pd.DataFrame(rows, columns=names, dtype=object)
    try:
        found = found_in(frame)
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert found.rows == len(frame) == found.candidates.sum()
