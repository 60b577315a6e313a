"""A log as tensors: against slow references; no request reads its own labels; the past is the past."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from log_helpers import as_lists, earlier_clicks, world

from dnr_recbole.config import Config
from dnr_recbole.errors import DataError
from dnr_recbole.requestlog import reading
from dnr_recbole.requestlog.building import KNOWLEDGE, build
from dnr_recbole.requestlog.encoders import Encoder, Encoders
from dnr_recbole.requestlog.preprocessor import Vocabulary
from dnr_recbole.requestlog.request_log import RequestLog
from dnr_recbole.requestlog.scan import Ids


def built(frame, items=None, users=None, vectors=None, **keys):
    own = {"source": "log", "use_gpu": False, "use_cache": False, "history_length": 5, **keys}
    config = Config("PRM", config_dict=own)
    return build(config, RequestLog.read(frame, users, items, vectors))


def requests(made):
    """Every request of a built log in external ids, by name of its row."""
    table, ids = made.data.train.table, made.preprocessor
    items, users = np.array(ids.items.texts(), dtype=object), np.array(ids.users.texts(), dtype=object)
    slate = table.slate(torch.arange(len(table)))
    out = []
    for row in range(len(table)):
        valid = slate.mask[row]
        names = items[slate.candidates[row, valid].numpy()]
        out.append({
            "user": users[int(slate.users[row])],
            "score": dict(zip(names, slate.scores[row, valid].tolist())),
            "label": dict(zip(names, slate.labels[row, valid].tolist())),
            "history": items[slate.history[row, slate.history_mask[row]].numpy()].tolist(),
            "n_positives": int(table.n_positives[row]),
        })  # fmt: skip
    return out


@pytest.mark.parametrize("rows", [13, 1 << 16])
@pytest.mark.parametrize("form", ["long", "lists"])
def test_tensors_hold_the_log(monkeypatch, rows, form):
    monkeypatch.setattr(reading, "ROWS", rows)
    frame = world(60)
    made = requests(built(frame if form == "long" else as_lists(frame), history_length=200))
    when = frame.set_index(["user_id", "item_id"]).timestamp
    for row, (name, own) in zip(made, frame.groupby("request_id", sort=False)):
        assert row["user"] == own.user_id.iloc[0]
        assert row["score"] == pytest.approx(dict(zip(own.item_id, own.score)), abs=1e-6)
        assert row["label"] == dict(zip(own.item_id, own.label))
        assert sorted(row["history"]) == sorted(earlier_clicks(frame, name))
        first = [when[row["user"], item].min() for item in dict.fromkeys(row["history"])]
        assert len(row["history"]) > len(first) or first == sorted(first), "oldest first"
        assert row["n_positives"] == own.label.sum()


def test_storage_order_says_nothing_about_labels():
    frame = world(200).sort_values(["timestamp", "label"], ascending=[True, False], kind="stable")
    table = built(frame).data.train.table
    place = torch.arange(8).expand_as(table.labels)[table.labels].double().mean()
    assert abs(float(place) - 3.5) < 0.4, "positives came first in the file"


def test_requests_at_the_same_time_are_not_each_others_past():
    frame = world(40)
    frame["timestamp"] = 0
    assert all(not row["history"] for row in requests(built(frame)))


def test_without_times_the_order_of_the_file_is_time():
    frame = world(60)
    a, b = requests(built(frame)), requests(built(frame.drop(columns="timestamp")))
    assert a == b


def test_given_histories_are_read_as_they_are():
    frame = as_lists(world(40))
    frame["history"] = [[f"i{j}" for j in range(n % 8)] for n in range(len(frame))]
    made = built(frame)
    for n, row in enumerate(requests(made)):
        assert row["history"] == [f"i{j}" for j in range(n % 8)][-5:]
    texts = frame.assign(history=[" ".join(each) for each in frame.history])
    assert requests(built(texts)) == requests(made)


def test_somebody_without_an_id_has_no_past_and_is_nobody():
    frame = world(60)
    frame.loc[frame.user_id.isin(["u1", "u2"]), "user_id"] = None
    made = built(frame)
    for row, (_, own) in zip(requests(made), frame.groupby("request_id", sort=False)):
        if own.user_id.isna().all():
            assert row["user"] is None and row["history"] == []
    assert built(frame.drop(columns="user_id")).data.train.table.users.sum() == 0


def test_long_lists_keep_the_best_and_count_the_rest():
    frame = world(60)
    made = built(frame, n_candidates=6)
    for row, (_, own) in zip(requests(made), frame.groupby("request_id", sort=False)):
        best = own.sort_values("score", ascending=False).head(6)
        assert set(row["score"]) == set(best.item_id)
        assert row["n_positives"] == own.label.sum()


def test_the_split_is_by_time_or_the_logs_own():
    frame = world(100)
    made = built(frame, valid_share=0.2, test_share=0.1, knowledge_share=0.5)
    split = made.data.train.table.split.tolist()
    assert split == [KNOWLEDGE] * 35 + [0] * 35 + [1] * 20 + [2] * 10
    backwards = built(frame.assign(timestamp=-frame.timestamp), valid_share=0.2, test_share=0.1, knowledge_share=0.5)
    assert backwards.data.train.table.split.tolist() == split[::-1]
    own = frame.assign(split=np.repeat(["test"] * 30 + ["valid"] * 20 + ["train"] * 50, 8))
    split = built(own, knowledge="none").data.train.table.split.tolist()
    assert split == [2] * 30 + [1] * 20 + [0] * 50
    with pytest.raises(DataError, match="no request is valid"):
        built(own[own.split != "valid"])
    with pytest.raises(DataError, match="too few"):
        built(world(2))


@pytest.mark.parametrize("knowledge", ["oldest", "folds"])
def test_no_training_request_reads_its_own_labels(knowledge):
    """Flipping the labels of a training request, and all that comes after it, leaves what it reads as it was."""
    frame = world(200, n_users=12)
    keys = {"knowledge": knowledge, "affinity_folds": 3, "history_length": 20}
    made = built(frame, **keys)
    train = made.data.train
    row = int(train.rows[len(train) // 2])
    name = frame.request_id.unique()[row]
    changed = frame.copy()
    own = changed.request_id == name
    changed.loc[own, "label"] = 1 - changed.loc[own, "label"]
    later = changed.timestamp > changed[own].timestamp.iloc[0]
    if knowledge == "folds":  # out of fold are the user's own requests, not the future of others
        later &= changed.user_id == changed[own].user_id.iloc[0]
    changed.loc[later, "label"] = np.random.default_rng(0).permutation(changed.loc[later, "label"].to_numpy())
    other = built(changed, **keys)
    slates = [each.data.train.table.slate(torch.tensor([row])) for each in (made, other)]
    for field in ("users", "history", "history_mask", "scores", "mask", "candidates", "fold"):
        a, b = (getattr(slate, field) for slate in slates)
        assert (a is None and b is None) or torch.equal(a, b), field
    assert not torch.equal(slates[0].labels, slates[1].labels)
    fold = 0 if slates[0].fold is None else int(slates[0].fold)
    assert (fold > 0) == (knowledge == "folds")
    for space in ("svd", "covisit"):
        a, b = (each.data.catalogue.spaces[space][:, fold] for each in (made, other))
        assert torch.equal(a, b) and a.any()
    a, b = (each.data.catalogue.item_popularity for each in (made, other))
    assert torch.equal(a, b) and a.any() == (knowledge == "oldest")


def test_a_request_of_nobody_reads_no_table_that_knows_it():
    frame = world(200)
    frame.loc[frame.request_id.isin([f"r{i}" for i in range(0, 200, 3)]), "user_id"] = None
    keys = {"knowledge": "folds", "affinity_folds": 3}
    made = built(frame, **keys)
    row = next(int(r) for r in made.data.train.rows[40:] if int(made.data.train.table.users[r]) == 0)
    changed = frame.copy()
    own = changed.request_id == frame.request_id.unique()[row]
    changed.loc[own, "label"] = 1 - changed.loc[own, "label"]
    other = built(changed, **keys)
    fold = int(made.data.train.table.fold[row])
    for space in ("svd", "covisit"):
        a, b = (each.data.catalogue.spaces[space] for each in (made, other))
        assert torch.equal(a[:, fold], b[:, fold]) and not torch.equal(a[:, 0], b[:, 0])


def test_popularity_counts_the_clicks_of_the_knowledge():
    frame = world(100)
    made = built(frame, knowledge_share=0.5, valid_share=0.1, test_share=0.1)
    known = frame[frame.request_id.isin([f"r{i}" for i in range(40)]) & (frame.label == 1)]
    counts = known.item_id.value_counts()
    popularity = dict(zip(made.preprocessor.items.texts(), made.data.catalogue.item_popularity.tolist()))
    top = np.log1p(counts.max())
    for item in frame.item_id.unique():
        assert popularity[item] == pytest.approx(np.log1p(counts.get(item, 0)) / top, abs=1e-6)


def test_candidates_that_were_not_shown_are_hidden_in_training_or_negatives():
    frame = world(80)
    frame["exposed"] = frame.groupby("request_id").cumcount() < 3
    frame["label"] *= frame.exposed
    made = built(frame)
    slate = made.data.train.slate(torch.arange(len(made.data.train)))
    assert (slate.mask.sum(1) == 3).all() and slate.shown is None
    assert not slate.candidates[~slate.mask].any() and not slate.scores[~slate.mask].any()
    test = made.data.test.slate(torch.arange(len(made.data.test)))
    assert (test.mask.sum(1) == 8).all() and (test.shown.sum(1) == 3).all()
    whole = built(frame, unshown="negative").data.train
    assert whole.slate(torch.arange(4)).mask.all()


# ---------------------------------------------------------------------- scores and features


def test_scores_are_calibrated_rescaled_and_may_be_missing():
    frame = world(150)
    frame["score"] = 30 * frame.score - 9
    frame["score_b"] = np.where(np.arange(len(frame)) % 3 == 0, np.nan, 0.5)
    with pytest.raises(DataError, match="outside .0, 1.: set score_calibration"):
        built(frame)
    for kind in ("logistic", "isotonic"):
        made = built(frame, score_calibration=kind)
        slate = made.data.test.slate(torch.arange(len(made.data.test)))
        assert slate.scores.shape == (*slate.mask.shape, 2) and made.data.catalogue.n_scores == 2
        first = slate.scores[..., 0][slate.mask]
        assert (first >= 0).all() and (first <= 1).all()
        assert (slate.scores[..., 1][slate.mask] == -1).float().mean() == pytest.approx(1 / 3, abs=0.1)
        rows = requests_with_first(made)
        own = dict(list(frame.groupby("request_id", sort=False))[0][1][["item_id", "score"]].to_numpy())
        pairs = sorted((own[item], x) for item, x in rows[0].items())
        assert all(a[1] <= b[1] + 1e-7 for a, b in zip(pairs, pairs[1:])), "the order stays"
    scaled = built(frame.drop(columns="score_b"), score_calibration="logistic", score_normalization="minmax")
    x = scaled.data.train.slate(torch.arange(20)).scores
    assert (x.amin(1) == 0).all() and (x.amax(1) == 1).all()


def requests_with_first(made):
    table, items = made.data.train.table, np.array(made.preprocessor.items.texts(), dtype=object)
    return [
        dict(zip(items[table.candidates[row].numpy()], table.scores[row, :, 0].tolist())) for row in range(len(table))
    ]


def test_the_incoming_order_is_the_key_order_by():
    frame = world(60).rename(columns={"score": "bm25"})
    frame["mf"] = 1 - frame.bm25
    made = built(frame, order_by="mf", score_columns=["bm25"])
    assert made.preprocessor.columns.scores == ["mf", "bm25"]
    slate = made.data.train.slate(torch.arange(5))
    torch.testing.assert_close(slate.logged_scores, 1 - slate.scores[..., 1])
    with pytest.raises(DataError, match="no column 'mff' .key order_by.: did you mean mf"):
        built(frame, order_by="mff")


def test_features_of_items_users_and_the_log():
    frame = world(80, n_items=20)
    frame["device"], frame["price"] = np.where(np.arange(len(frame)) % 2, "phone", "web"), np.arange(len(frame)) % 7
    items = pd.DataFrame({"item_id": [f"i{i}" for i in range(19)], "genre": ["a", "b", None] * 6 + ["a"],
                          "year": np.arange(19), "tags": [["x", "y"], ["x"]] * 9 + [[]]})  # fmt: skip
    users = pd.DataFrame({"user_id": ["u0", "u1", "stranger"], "age": [20.0, None, 40.0]})
    made = built(frame, items, users, log_features=["device", "price"])
    catalogue, ids = made.data.catalogue, made.preprocessor
    assert catalogue.item_features.shape[1] == 2 + 1 + 2 and catalogue.user_features.shape[1] == 1
    row = int(ids.items.rows(["i0"])[0])
    year = (0 - np.arange(19).mean()) / np.arange(19).std()
    np.testing.assert_allclose(catalogue.item_features[row], [1, 0, year, 1, 1], atol=1e-6)
    assert not catalogue.item_features[int(ids.items.rows(["i19"])[0])].any(), "not in the table"
    assert not catalogue.item_features[0].any() and not catalogue.item_features[ids.items.unknown].any()
    np.testing.assert_allclose(catalogue.user_features[ids.users.rows(["u0", "u1", "stranger"])], [[-1], [0], [1]])
    assert catalogue.n_features == 3
    assert built(frame, log_features=["pr*", "dev*"]).preprocessor.columns.features == ["price", "device"]
    slate = made.data.test.slate(torch.arange(3))
    assert slate.features.shape == (3, 8, 3)
    assert (slate.features[..., :2].sum(-1) == 1).all() and slate.features[..., 2].std() > 0.5
    bad = pd.concat([items, items.head(1)])
    with pytest.raises(DataError, match="row 20: item_id 'i0' stands twice"):
        built(frame, bad)
    with pytest.raises(DataError, match="no column 'genres' .load_col.item."):
        built(frame, items, load_col={"item": ["genres"]})


def test_vectors_of_items_are_a_space():
    frame = world(60, n_items=20)
    vectors = pd.DataFrame({"item_id": [f"i{i}" for i in range(20)], "vector": [[float(i), 1.0] for i in range(20)]})
    made = built(frame, vectors=vectors, knowledge="none")
    assert list(made.data.catalogue.spaces) == ["vectors"]
    row = int(made.preprocessor.items.rows(["i3"])[0])
    np.testing.assert_allclose(made.data.catalogue.spaces["vectors"][0, 0, row], np.array([3, 1]) / 10**0.5, atol=1e-6)
    with pytest.raises(DataError, match="same number of finite numbers"):
        built(frame, vectors=vectors.assign(vector=[[1.0]] * 19 + [[1.0, 2.0]]), knowledge="none")


def test_encoders_are_the_same_after_a_trip_through_json():
    columns = {"n": pa.array([1, 2, None]), "t": pa.array(["a", None, "b"]), "v": pa.array([[1.0, 2], None, [3, 5]]),
               "many": pa.array(["p", "q", "r"]), "w": pa.array(["1", "2.5", "3"])}  # fmt: skip
    encoders = Encoders.fit(columns, max_vocabulary=2)
    assert encoders.names == ["n", "t", "v", "w"], "a column of too many categories is left out"
    values = encoders.transform(columns, 3)
    other = Encoders.from_dict(encoders.to_dict())
    np.testing.assert_array_equal(values, other.transform(columns, 3))
    np.testing.assert_allclose(values[:, 0], [-1, 1, 0])
    np.testing.assert_allclose(values[:, 1:3], [[1, 0], [0, 0], [0, 1]])
    np.testing.assert_allclose(values[:, 3:5], [[-1, -1], [0, 0], [1, 1]])
    unseen = encoders.transform({"t": pa.array(["new", "a", None])}, 3)
    np.testing.assert_allclose(unseen[:, 1:3], [[0, 0], [1, 0], [0, 0]])
    assert not unseen[:, [0, 3, 4, 5]].any()
    with pytest.raises(DataError, match="damaged"):
        Encoder("exec")


def test_the_vocabulary_keeps_rows_when_it_grows():
    ids = Vocabulary(["a", "b"])
    assert len(ids) == 4 and ids.unknown == 3 and ids.rows(["b", "x", "a"]).tolist() == [2, 3, 1]
    more = ids.with_ids(["b", "c", "d", "c"])
    assert more.rows(["a", "b", "c", "d", "x"]).tolist() == [1, 2, 4, 5, 3] and more.unknown == 3
    assert more.texts() == [None, "a", "b", None, "c", "d"]
    assert len(ids) == 4, "the other one is as it was"
    assert Ids(["a", "a", "b"]).list() == ["a", "b"]


# ---------------------------------------------------------------------- files and the cache


def test_a_file_is_mapped_and_gives_the_tensors_of_the_frame(tmp_path):
    frame = world(60)
    frame.to_parquet(tmp_path / "log.parquet")
    keys = {"use_cache": True, "cache_dir": str(tmp_path / "cache")}
    a = built(frame)
    for _ in range(2):  # made, then read
        b = built(tmp_path / "log.parquet", **keys)
        assert requests(a) == requests(b)
        assert len(list((tmp_path / "cache").glob("log-*"))) == 1
        assert a.data.digest() == b.data.digest()
    frame.assign(label=1 - frame.label).to_parquet(tmp_path / "log.parquet")
    changed = built(tmp_path / "log.parquet", **keys)
    assert len(list((tmp_path / "cache").glob("log-*"))) == 2 and requests(changed) != requests(a)
    for path in (tmp_path / "cache").glob("log-*/scores.npy"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError.__mro__[1], match="damaged.*delete it"):
        built(tmp_path / "log.parquet", **keys)


def test_a_large_log_without_a_cache_is_mapped_from_files_that_go_with_the_process(monkeypatch):
    a = built(world(60))
    monkeypatch.setattr("dnr_recbole.requestlog.building.IN_MEMORY", 100)
    made = []
    monkeypatch.setattr("dnr_recbole.requestlog.storage.atexit.register", lambda *a, **k: made.append(a))
    b = built(world(60))
    assert requests(a) == requests(b) and a.data.digest() == b.data.digest()
    remove, folder = made[0]
    remove(folder)


def test_the_sample_is_what_a_user_would_send():
    frame = world(300)
    frame["score"] = 5 * frame.score - 2
    made = built(frame, score_calibration="logistic")
    sample = made.sample()
    tests = frame[frame.request_id.isin([f"r{i}" for i in range(270, 300)])]
    each = lambda frame: {  # noqa: E731
        tuple(sorted(zip(part.item_id, part.score.round(6), part.label))) for _, part in frame.groupby("request_id")
    }
    assert each(sample) == each(tests)


def test_requests_without_a_candidate_are_counted_and_left_out():
    frame = as_lists(world(60))
    for row in (5, 30, 57, 59):
        for name in ("item_id", "score", "label"):
            frame.at[row, name] = []
    made = built(frame)
    assert any("4 without a candidate" in note for note in made.maker.notes)
    for part in ("train", "valid", "test"):
        slate = made.data[part].slate(torch.arange(len(made.data[part])))
        assert slate.mask.any(1).all()


def test_how_the_log_was_treated_is_said():
    frame = world(60)
    frame.loc[frame.request_id == "r40", "label"] = 0
    notes = " | ".join(built(frame, n_candidates=6).maker.notes)
    for text in ("60 requests have more than n_candidates=6", "requests 39 training, 6 validation, 6 test, 9 kept for",
                 "of the training requests are not learned from"):  # fmt: skip
        assert text in notes, notes
