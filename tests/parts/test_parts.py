"""Files in parts: every row once, no request cut, and the same parts when other files come or go."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_helpers import world
from serving_helpers import FAST

from dnr_recbole import Reranker
from dnr_recbole.artefact import artefact_digest
from dnr_recbole.errors import DataError, DnrError
from dnr_recbole.parts import inputs as reading
from dnr_recbole.parts import job as jobs
from dnr_recbole.parts import work
from dnr_recbole.parts.inputs import Part, find_inputs, parts_of
from dnr_recbole.parts.work import Job, rank_part
from dnr_recbole.requestlog import row_ranges
from dnr_recbole.requestlog.reading import Source, read_batches
from dnr_recbole.requestlog.row_ranges import runs_of


def write(folder, sizes, cuts, group=3, ids=None):
    """A folder of files that cut requests of these sizes after these rows; rows are numbered over all files."""
    folder.mkdir(parents=True, exist_ok=True)
    request = np.repeat(np.arange(len(sizes)) if ids is None else ids, sizes)
    table = pa.table({"request_id": [f"r{i}" for i in request], "item_id": np.arange(len(request))})
    bounds = [0, *sorted(cuts), len(request)]
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        pq.write_table(table.slice(start, stop - start), folder / f"{number:03}.parquet", row_group_size=group)
    return request


def parts(folder):
    found = find_inputs(str(folder))
    blocks = [Part([block]) for block in found.blocks]
    return found, parts_of(found, [runs_of(block.source(found.root)) for block in blocks])


def rows_of(found, part):
    source = part.source(found.root)
    rows = pa.Table.from_batches(list(source.batches(["item_id"])), pa.schema([("item_id", pa.int64())]))
    assert rows.num_rows == source.n_rows == part.rows
    return rows["item_id"].to_pylist()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_row_once_and_no_request_cut(base, data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    cuts = data.draw(st.lists(st.integers(0, sum(sizes)), max_size=4))  # files may be empty
    group, batch = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    folder = base / str(len(os.listdir(base)))
    request = write(folder, sizes, cuts, group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_PART_BYTES", data.draw(st.sampled_from([0, 300, 1 << 24])))
        patch.setattr(row_ranges, "ROWS", batch)
        found, made = parts(folder)
        rows = [rows_of(found, part) for part in made]
    assert sum(rows, []) == list(range(len(request))) and all(rows)
    for before, after in zip(rows, rows[1:]):
        assert request[before[-1]] != request[after[0]]


def test_a_file_that_comes_or_changes_leaves_the_other_parts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_PART_BYTES", 0)
    write(tmp_path / "in", [3, 3, 3, 3], [6], group=3)
    _, before = parts(tmp_path / "in")
    write(tmp_path / "more", [3, 3], [], ids=np.array([8, 9]))
    os.replace(tmp_path / "more" / "000.parquet", tmp_path / "in" / "0005.parquet")  # between the two
    made_with = {"model": "m", "k": None}
    identities = [part.identity(made_with) for part in before]
    _, after = parts(tmp_path / "in")
    assert len(after) == 6 and len({part.identity(made_with) for part in after}) == 6
    assert set(identities) < {part.identity(made_with) for part in after}
    assert not {part.identity({**made_with, "k": 3}) for part in after} & set(identities)
    os.utime(tmp_path / "in" / "001.parquet", ns=(1, 1))
    _, touched = parts(tmp_path / "in")
    assert sum(part.identity(made_with) in identities for part in touched) == 2
    with pytest.raises(DataError, match="001.parquet' has changed"):
        after[-1].source(str(tmp_path / "in"))


def test_a_request_in_files_that_order_their_columns_differently(tmp_path):
    request = write(tmp_path, [2, 4, 2], [3])
    last = tmp_path / "001.parquet"
    pq.write_table(pq.read_table(last).select(["item_id", "request_id"]), last)
    found, made = parts(tmp_path)
    batches = [batch for part in made for batch in read_batches(part.source(found.root), ["request_id", "item_id"])]
    assert [len(batch.row) for batch in batches] == [2, 4, 2]
    assert [item.as_py() for batch in batches for item in batch.per_candidate["item_id"]] == list(range(len(request)))


def test_endings_in_capitals_are_files_as_well(tmp_path):
    write(tmp_path, [2, 4, 2], [3])
    os.rename(tmp_path / "001.parquet", tmp_path / "001.PARQUET")
    found, made = parts(tmp_path)
    assert sum(part.rows for part in made) == 8
    assert [file.name for file in found.files] == ["000.parquet", "001.PARQUET"]
    assert Source(tmp_path / "001.PARQUET").n_rows == 5


def test_rows_that_stand_apart_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_PART_BYTES", 0)
    write(tmp_path, [2, 3, 2, 4], [5], ids=np.array([0, 1, 2, 1]))
    with pytest.raises(DataError, match="request 'r1' stand apart, among rows .* of '000.parquet' and .* of '001.p"):
        parts(tmp_path)
    monkeypatch.setattr(row_ranges.pd.util, "hash_array", lambda ids, categorize: np.zeros(len(ids), np.uint64))
    write(tmp_path, [2, 3, 2, 4], [5])  # equal hashes of other requests are no reason
    _, made = parts(tmp_path)
    assert sum(part.rows for part in made) == 11


def test_what_cannot_be_ranked_is_said_in_a_line(tmp_path):
    def refused(match, name):
        with pytest.raises(DataError, match=match) as error:
            parts(tmp_path / name)
        assert "\n" not in str(error.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_other.parquet").touch()
    refused("no file that ends in .parquet", "empty")
    refused("reads parquet", "requests.csv")
    refused("'.*none.parquet' does not exist", "none.parquet")
    (tmp_path / "empty" / "bad.parquet").write_bytes(b"PAR1 and no more")
    refused("bad.parquet' cannot be read", "empty")
    write(tmp_path / "gap", [2, 2], [])
    table = pq.read_table(tmp_path / "gap" / "000.parquet")
    pq.write_table(table.set_column(0, "request_id", pa.array(["a", "a", None, "b"])), tmp_path / "gap" / "000.parquet")
    refused("000.parquet', row 3: a request id is missing", "gap")
    pq.write_table(table.set_column(0, "request_id", pa.array([1, 1, 2, 2])), tmp_path / "gap" / "001.parquet")
    refused("001.parquet': column 'request_id' is int64, in the first file string", "gap")
    pq.write_table(table.drop_columns(["request_id"]), tmp_path / "rows.parquet")
    refused("rows.parquet' has no column 'request_id'", "rows.parquet")
    lists = pa.table({"item_id": [["a", "b"]], "score": [[0.1, 0.2]]})
    (tmp_path / "lists").mkdir()
    pq.write_table(lists, tmp_path / "lists" / "0.parquet")
    found = find_inputs(str(tmp_path / "lists"))
    assert found.list_form and parts_of(found, []) == [Part([(found.files[0], 0, 1)])]
    pq.write_table(lists, tmp_path / "lists" / "1.parquet")
    refused("several files of lists need the column 'request_id'", "lists")


@pytest.fixture(scope="module")
def job(base):
    Reranker("MiDNN", **FAST).fit(world(60)).save(base / "model")
    world(30, seed=1).drop(columns="label").to_parquet(base / "requests.parquet", row_group_size=80)
    model = str(base / "model")
    return Job(str(base), model, artefact_digest(model), 3, str(base / "out"))


@pytest.fixture
def wanted(job, base, monkeypatch):
    """Names of the parts, all of which stand in the output folder."""
    monkeypatch.setattr(reading, "_PART_BYTES", 0)
    found = find_inputs(str(base / "requests.parquet"))
    blocks = [Part([block]) for block in found.blocks]
    names = jobs._names(job, parts_of(found, [runs_of(block.source(found.root)) for block in blocks]))
    (base / "out").mkdir(exist_ok=True)
    for name in os.listdir(base / "out"):
        (base / "out" / name).unlink()
    for name, part in names.items():
        assert rank_part(job, part, name).rows == part.rows
    return names


def test_a_part_that_is_there_under_two_names_is_kept_once(job, wanted, base):
    folder, name = base / "out", list(wanted)[1]
    for other in (name.replace("000001", "000000"), name.replace("000001", "000009")):
        (folder / other).write_bytes((folder / name).read_bytes())
    assert set(jobs._tidy(job, wanted)) == set(wanted) == set(os.listdir(folder))


def test_a_folder_is_called_complete_with_all_parts_and_no_others(job, wanted, base):
    folder, name = base / "out", list(wanted)[1]
    late = folder / name.replace("000001", "000009")
    late.write_bytes((folder / name).read_bytes())
    jobs._must_be_complete(job, wanted)
    assert set(os.listdir(folder)) == set(wanted)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"1 parts are gone, the first is {name}"):
        jobs._must_be_complete(job, wanted)


def test_other_code_makes_other_parts(job, wanted, monkeypatch):
    monkeypatch.setattr(work, "CODE_VERSIONS", {**work.CODE_VERSIONS, "reranker": 99})
    assert not set(jobs._names(job, list(wanted.values()))) & set(wanted)
    (name, part), *_ = wanted.items()
    with pytest.raises(DnrError, match="another version of dnr_recbole"):
        rank_part(job, part, name)
