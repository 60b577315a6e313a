"""Files of per-request values, and the comparison of two of them."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from dnr_recbole.errors import DataError, DnrError, UnknownNameError
from dnr_recbole.evaluator import CandidateEvaluator, paired_test
from dnr_recbole.evaluator.per_request import compare_files, read_per_request, report_files, save_per_request
from dnr_recbole.evaluator.significance import holm

USERS = [7, 7, 8, 9, 9]
METRICS = ["Recall", "NDCG", "GAUC", "ItemCoverage"]


class FakeConfig(dict):
    def __missing__(self, key):
        return None


def config(**keys):
    base = {"eval_args": {"mode": "full"}, "device": torch.device("cpu"), "LABEL_FIELD": "label"}
    return FakeConfig(base, metrics=METRICS, topk=[1], metric_decimal_place=4, **keys)


def save(path, places, missed=(0, 1, 0, 0, 0), users=USERS, rows=None, **keys):
    """A run in which the only positive of request r stands at place ``places[r]`` of three; None = not retrieved."""
    keys = {"dataset": "made-up", "model": "PRM", "seed": 3, **keys}
    scores = torch.tensor([[3.0, 2.0, 1.0]]).expand(len(places), -1)
    labels = torch.zeros(len(places), 3)
    for row, place in enumerate(places):
        if place is not None:
            labels[row, place] = 1.0
    candidates = torch.arange(1, 4).expand(len(places), -1)
    evaluator = CandidateEvaluator(config(**keys), n_items=4)
    n_positives = labels.sum(1).long() + torch.tensor(missed)
    rows = torch.arange(len(places)) if rows is None else rows
    evaluator.add(scores, candidates, candidates > 0, labels, n_positives, rows)
    assert save_per_request(str(path), evaluator, config(**keys), torch.tensor(users)) == len(places)
    return str(path)


def test_a_file_holds_what_the_run_reports(tmp_path):
    path = save(tmp_path / "new" / "a.parquet", [0, 1, 2, None, 0], missed=[0, 1, 0, 1, 0])
    columns = pyarrow.parquet.read_table(path).to_pydict()
    assert columns["request"] == [0, 1, 2, 3, 4] and columns["user"] == USERS
    assert columns["positives"] == [1, 2, 1, 1, 1]
    assert columns["recall@1"] == [1, 0, 0, None, 1]  # request 3 has no positive to rank
    assert columns["gauc"] == [1, 0.5, 0, None, 1]
    assert columns["e2e_recall@1"] == [1, 0, 0, 0, 1]
    assert "itemcoverage@1" not in columns  # all requests at once
    file = read_per_request(path)
    assert file.meta == {"format": 1, "dataset": "made-up", "model": "PRM", "seed": "3"}
    assert np.isnan(file.metrics["recall@1"]).tolist() == [False, False, False, True, False]
    assert str(file) == f"{path} (dataset=made-up, model=PRM, seed=3)"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.parquet"]


def test_comparison_by_hand(tmp_path):
    """recall@1 of a: 1 1 0 1 0, of b: 0 1 0 0 0. By user: (1, .5), (0, 0), (.5, 0); differences .5, 0, .5."""
    a, b = save(tmp_path / "a", [0, 0, 1, 0, 1]), save(tmp_path / "b", [1, 0, 1, 2, 1])
    (row,) = compare_files(a, b, "Recall@1")
    assert (row.metric, row.n_requests, row.t.n) == ("recall@1", 5, 3)
    assert (row.t.mean_a, row.t.mean_b) == (pytest.approx(0.5), pytest.approx(0.5 / 3))
    assert row.t.difference == pytest.approx(1 / 3)
    assert row.t.statistic == pytest.approx(2.0)  # mean 1/3, deviation √(1/12)
    assert repr(row.wilcoxon) == repr(paired_test([1, 0, 0.5], [0.5, 0, 0], "wilcoxon"))  # a NaN is no NaN
    assert (row.bootstrap.low, row.bootstrap.high) == (0.0, 0.5)
    assert row.p_holm == row.t.p_value
    (row,) = compare_files(a, b, ["recall@1"], over="requests")
    assert row.t.n == 5 and row.t.difference == pytest.approx(0.4)
    rows = compare_files(a, b)
    assert [row.metric for row in rows] == ["recall@1", "ndcg@1", "gauc", "e2e_recall@1", "e2e_ndcg@1"] + [
        f"e2e_{name}@1" for name in ("hit", "precision")
    ]
    assert [row.p_holm for row in rows] == holm([row.t.p_value for row in rows])


def test_requests_without_a_user_are_no_single_one(tmp_path):
    a = save(tmp_path / "a", [0, 0, 1, 0, 1], users=[0, 0, 8, 8, 0])
    b = save(tmp_path / "b", [1, 0, 1, 2, 1], users=[0, 0, 8, 8, 0])
    (row,) = compare_files(a, b, "Recall@1")
    assert row.t.n == 4 and row.t.difference == pytest.approx((1 + 0 + 0.5 + 0) / 4)


def test_order_of_evaluation_does_not_matter(tmp_path):
    a = save(tmp_path / "a", [0, 0, 1, 0, 1])
    b = save(tmp_path / "b", [1, 0, 1, 0, 0], rows=torch.tensor([4, 3, 2, 1, 0]), missed=[0, 0, 0, 1, 0])
    assert (read_per_request(a).identity == read_per_request(b).identity).all()
    assert all(row.t.p_value == 1 for row in compare_files(a, b))


def test_report(tmp_path):
    a, b = save(tmp_path / "a", [0, 0, 1, 0, 1]), save(tmp_path / "b", [1, 0, 1, 2, 1], missed=[0, 1, 0, 0, 0], seed=4)
    text = report_files(a, b, ["ndcg@1", "recall@1"])
    lines = text.splitlines()
    assert lines[0] == f"a: {a} (dataset=made-up, model=PRM, seed=3)" and "seed=4" in lines[1]
    assert lines[2].split()[:3] == ["metric", "requests", "pairs"]
    assert lines[3].split()[:6] == ["ndcg@1", "5", "3", "0.5000", "0.1667", "+0.3333"]
    assert "[+0.0000, +0.5000]" in lines[3] and "adjusted for 2 metric(s)" in lines[-1]
    c = save(tmp_path / "c", [0, 0, 1, 0, 1], missed=[0] * 5)
    d = save(tmp_path / "d", [0, 0, 1, 0, 1], missed=[0] * 5)
    assert "e2e" not in report_files(c, d) and "only in" not in report_files(c, d)


def test_different_requests_are_refused(tmp_path):
    a = save(tmp_path / "a", [0, 0, 1, 0, 1])
    for name, other, message in (
        ("fewer", dict(places=[0, 0, 1, 0], missed=[0, 1, 0, 0], users=USERS[:4]), "5 requests .* 4; request 4 is"),
        ("users", dict(places=[0, 0, 1, 0, 1], users=[7, 7, 8, 8, 9]), "request 3 is of user 9 .* of user 8 .*1 of 5"),
        ("positives", dict(places=[0, 0, 1, 0, 1], missed=[0, 1, 1, 0, 0]), "request 2 .* with 1 positives"),
        ("dataset", dict(places=[0, 0, 1, 0, 1], dataset="other"), "made-up .* other"),
        ("candidates", dict(places=[0, 0, 1, None, 1], missed=[0, 1, 0, 1, 0]), "candidates differ, .* e2e_"),
    ):
        b = save(tmp_path / name, **other)
        with pytest.raises(DataError, match=message) as error:
            compare_files(a, b)
        assert "\n" not in str(error.value)
    assert compare_files(a, save(tmp_path / "candidates", [0, 0, 1, None, 1], missed=[0, 1, 0, 1, 0]), "e2e_recall@1")


def test_refusals(tmp_path):
    a = save(tmp_path / "a", [0, 0, 1, 0, 1])
    with pytest.raises(UnknownNameError, match="no metric 'mrr@1'; both files have recall@1"):
        compare_files(a, a, "MRR@1")
    with pytest.raises(UnknownNameError, match="users, requests"):
        compare_files(a, a, over="seeds")
    with pytest.raises(DataError, match="there is no file .*: a run writes it"):
        compare_files(a, str(tmp_path / "missing"))
    with pytest.raises(DataError, match="rows"):
        save(tmp_path / "b", [0, 1], [0, 0], rows=torch.tensor([-1, -1]))
    evaluator = CandidateEvaluator(config(), n_items=4)
    with pytest.raises(DataError, match="no request was added"):
        save_per_request(str(tmp_path / "b"), evaluator, config(), USERS)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DnrError, match="cannot write per_request_file"):
        save(tmp_path / "file" / "b", [0, 1], [0, 0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file"]


DAMAGES = ["text", "empty", "pages", "half", "foreign", "no number", "another value", "twice", "later format"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_in_one_line(tmp_path, damage):
    a = save(tmp_path / "a", [0, 0, 1, 0, 1])
    path, content = tmp_path / "b", (tmp_path / "a").read_bytes()
    table = pyarrow.parquet.read_table(a)
    if damage == "text":
        path.write_text("request,user\n")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pages":
        path.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "foreign":
        pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), path)
    elif damage == "no number":
        numbers = pyarrow.array([0, 1, None, 3, 4])
        pyarrow.parquet.write_table(table.set_column(0, "request", numbers), path)
    elif damage == "another value":
        at = table.column_names.index("recall@1")
        values = pyarrow.array([1.0, 1.0, 0.0, 1.0, 1.0])
        pyarrow.parquet.write_table(table.set_column(at, "recall@1", values), path)
    elif damage == "twice":
        twice = pyarrow.concat_tables([table, table])
        pyarrow.parquet.write_table(twice.replace_schema_metadata({"dnr_recbole": '{"format": 1}'}), path)
    else:
        pyarrow.parquet.write_table(table.replace_schema_metadata({"dnr_recbole": '{"format": 99}'}), path)
    with pytest.raises(DataError, match="make it") as error:
        compare_files(a, str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
