"""The front door: fit, rank, evaluate, go on, tune, as a user calls them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import recbole
import torch
from log_helpers import as_lists, world

import dnr_recbole
from dnr_recbole import RequestLog, Reranker
from dnr_recbole.config import Config
from dnr_recbole.errors import ConfigError, DataError, DnrError, UnknownNameError
from dnr_recbole.quick_start import prepare, run_dnr, train
from dnr_recbole.requestlog.building import build

FAST = {
    "epochs": 3, "embedding_size": 16, "train_batch_size": 32, "use_gpu": False, "baselines": [],
    "knowledge_share": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def log():
    return world(400)


@pytest.fixture(scope="module")
def model(log):
    return Reranker("PRM", **FAST).fit(log)


def test_importing_the_package_is_light_and_changes_nothing():
    code = (
        "import sys, time; t = time.perf_counter(); import dnr_recbole; s = time.perf_counter() - t;"
        "print(s < 0.5, sorted({'torch', 'recbole', 'numpy', 'pandas'} & set(sys.modules)));"
        "import numpy; print(hasattr(numpy, 'float_') == (numpy.__version__ < '2'), 'bool' in vars(numpy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "True []"
    if np.__version__ < "2":
        assert out[1] == "True False", "numpy 1 has no numpy.bool unless somebody put it there"
    assert set(dnr_recbole.__all__) <= set(dir(dnr_recbole))
    with pytest.raises(AttributeError, match="no attribute 'Rerankers'"):
        dnr_recbole.Rerankers  # noqa: B018


def test_a_fitted_model_reports_itself_beside_what_it_replaces(model, log):
    assert {"ndcg@6", "map@6"} <= set(model.metrics)
    for name in ("PRM", "score_desc", "popularity_desc", "random"):
        assert name in model.report
    assert model.artefact.metrics["statistics"]["test"]["requests"] == 40


def test_ranking_in_the_users_own_ids(model, log):
    new = log.drop(columns=["label"]).tail(80)
    ranked = model.rank(new, k=3)
    assert list(ranked) == ["request_id", "user_id", "item_id", "rank", "rerank_score", "incoming_rank"]
    assert ranked.groupby("request_id").size().eq(3).all() and ranked.request_id.nunique() == 10
    for name, part in ranked.groupby("request_id"):
        own = new[new.request_id == name].sort_values("score", ascending=False).item_id.tolist()
        assert part["rank"].tolist() == [0, 1, 2] and part.rerank_score.is_monotonic_decreasing
        assert [own.index(item) for item in part.item_id] == part.incoming_rank.tolist()
    whole = model.rank(new)
    assert len(whole) == 80 and whole[whole["rank"] < 3].reset_index(drop=True).equals(ranked)
    pd.testing.assert_frame_equal(model.rank(as_lists(new)), whole)
    mixed = new.sample(frac=1, random_state=0)  # rows of a request stand apart
    key = ["request_id", "rank"]
    assert model.rank(mixed).sort_values(key).item_id.tolist() == whole.sort_values(key).item_id.tolist()


def test_ids_that_are_numbers_come_back_as_numbers(log):
    numbered = log.assign(item_id=log.item_id.str[1:].astype(int), user_id=log.user_id.str[1:].astype(int))
    model = Reranker("MiDNN", **{**FAST, "epochs": 1}).fit(numbered)
    ranked = model.rank(numbered.drop(columns="label").tail(16))
    assert ranked.item_id.dtype == numbered.item_id.dtype and ranked.user_id.dtype == numbered.user_id.dtype
    texts = model.rank(log.assign(item_id=log.item_id.str[1:], user_id=log.user_id.str[1:]).tail(16))
    np.testing.assert_allclose(texts.rerank_score, ranked.rerank_score, atol=1e-6)


def test_what_is_not_known_is_ranked_all_the_same(model, log):
    new = log.drop(columns=["label", "timestamp"]).tail(24).copy()
    new.loc[new.index[0], "item_id"] = "never seen"
    new.loc[new.request_id == new.request_id.iloc[8], "user_id"] = "a stranger"
    new.loc[new.request_id == new.request_id.iloc[16], "user_id"] = None
    new.loc[new.index[3], "score"] = None
    ranked = model.rank(new)
    assert len(ranked) == 24 and np.isfinite(ranked.rerank_score).all()
    missing = ranked[(ranked.request_id == new.request_id.iloc[0]) & (ranked.item_id == new.item_id.iloc[3])]
    assert missing.incoming_rank.item() == 7, "a candidate without a score comes last"
    few = model.rank(new.head(2), k=6)
    assert len(few) == 2
    assert len(model.rank(new.head(0))) == 0
    without_user = model.rank(new.drop(columns="user_id"))
    assert len(without_user) == 24 and without_user.user_id.isna().all()


def test_the_stored_history_is_read_where_a_request_brings_none(model, log):
    request = log.drop(columns="label").tail(8)
    ids, stored = model.artefact.preprocessor, model.artefact.preprocessor.histories
    row = int(ids.users.rows([request.user_id.iloc[0]])[0])
    items = np.array(ids.items.texts(), dtype=object)[stored.items[stored.ptr[row] : stored.ptr[row + 1]]]
    clicks = log[(log.user_id == request.user_id.iloc[0]) & (log.label == 1)]
    assert sorted(items) == sorted(clicks.item_id.tolist()[-len(items) :]) and len(items)
    own = as_lists(request)
    given = own.assign(history=[list(items)])
    np.testing.assert_allclose(model.rank(given).rerank_score, model.rank(request).rerank_score, atol=1e-6)
    other = model.rank(own.assign(history=[[]]))
    scores = [found.sort_values("item_id").rerank_score for found in (other, model.rank(request))]
    assert not np.allclose(*scores)


def test_a_feature_that_is_not_there_is_missing_and_said(log, caplog):
    frame = log.assign(price=np.arange(len(log)) % 5)
    model = Reranker("MiDNN", **{**FAST, "epochs": 1, "log_features": ["price"]}).fit(frame)
    assert len(model.rank(frame.tail(8))) == 8 and "lacks features" not in caplog.text
    assert len(model.rank(log.tail(8))) == 8 and "price count as missing" in caplog.text


def test_lists_longer_than_the_model_reads(log):
    model = Reranker("PRM", **{**FAST, "epochs": 1, "n_candidates": 6}).fit(log)
    ranked = model.rank(log.drop(columns="label").tail(8))
    assert ranked["rank"].tolist() == list(range(8))
    assert ranked.rerank_score.isna().tolist() == [False] * 6 + [True] * 2
    assert ranked.incoming_rank.tolist()[6:] == [6, 7], "the rest keeps the incoming order"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.assign(score=2.0), "outside .0, 1."),
        (lambda f: f.assign(score="x"), "not a number"),
        (lambda f: f.drop(columns="score"), "no column 'score', a score that the model reads"),
        (lambda f: f.drop(columns="item_id"), "no column 'item_id'"),
        (lambda f: f.assign(item_id=None), "an item id is missing"),
        (lambda f: pd.concat([f, f]), "occurs twice in a request"),
    ],
)
def test_requests_that_cannot_be_ranked_are_refused_in_a_line(model, log, change, message):
    with pytest.raises(DataError, match=message) as error:
        model.rank(change(log.drop(columns="label").tail(16)))
    assert "\n" not in str(error.value)


def test_ten_thousand_candidates(model):
    n = 10_000
    frame = pd.DataFrame({"request_id": "r", "item_id": np.arange(n), "score": np.linspace(0, 1, n)})
    ranked = model.rank(frame)
    assert len(ranked) == n and ranked.rerank_score.notna().sum() == 50
    assert sorted(ranked.item_id[:50]) == list(range(n - 50, n))


def test_wrong_calls():
    with pytest.raises(UnknownNameError, match="did you mean PRM"):
        Reranker("PRMM")
    with pytest.raises(ConfigError, match="unknown key 'epoch'"):
        Reranker("PRM", epoch=3)
    with pytest.raises(DnrError, match="not fitted"):
        Reranker("PRM").rank(world(2))
    with pytest.raises(ConfigError, match="k=0"):
        Reranker("PRM").rank(world(2), k=0)


def test_evaluation_beside_the_incoming_order_and_another_model(model, log):
    newer = world(150, seed=5).assign(timestamp=lambda f: f.timestamp + 10**6)
    other = Reranker("MiDNN", **FAST).fit(log)
    found = model.evaluate(newer, against=other)
    assert list(found.metrics) == ["A PRM", "B MiDNN", "incoming order"]
    order = newer.sort_values(["timestamp", "score"], ascending=[True, False]).groupby("request_id", sort=False)
    hits = np.stack([part.label.to_numpy() for _, part in order])
    some = hits.any(1)
    gain = (hits[some, :6] / np.log2(np.arange(6) + 2)).sum(1)
    ideal = np.cumsum(1 / np.log2(np.arange(6) + 2))[np.minimum(hits[some].sum(1), 6) - 1]
    assert found.metrics["incoming order"]["ndcg@6"] == pytest.approx((gain / ideal).mean(), abs=1e-6)
    assert found.requests == {"requests": 150, "with a positive": int(some.sum())}
    test = found.tests["B MiDNN"]
    assert test.n <= 30 and test.low <= test.difference <= test.high
    same = model.evaluate(newer, against=model)
    assert same.tests["B PRM"].difference == 0 and same.tests["B PRM"].p_value == 1
    assert "no difference seen" in str(same) and "incoming order" in str(found)


def test_users_that_the_model_does_not_know_are_different_people(model, log):
    newer = world(60, seed=5).assign(timestamp=lambda f: f.timestamp + 10**6)
    known = model.evaluate(newer).tests["incoming order"]
    newer["user_id"] = "new " + newer.user_id
    found = model.evaluate(newer)
    assert found.tests["incoming order"].n == known.n > 10, "a test over users, not over one of them"
    alone = model.evaluate(newer.assign(user_id="newcomer"))
    assert alone.tests == {} and set(alone.metrics) == set(found.metrics)
    nobody = model.evaluate(newer.drop(columns="user_id"))
    assert nobody.tests["incoming order"].n == nobody.requests["with a positive"]


def test_the_incoming_order_is_that_of_the_scores_whatever_the_model_makes_of_them(log):
    newer = world(150, seed=5).assign(timestamp=lambda f: f.timestamp + 10**6)
    found = [
        Reranker("MiDNN", **{**FAST, "epochs": 1}, score_calibration=kind).fit(log).evaluate(newer)
        for kind in ("none", "isotonic", "logistic")
    ]
    assert (
        found[0].metrics["incoming order"] == found[1].metrics["incoming order"] == found[2].metrics["incoming order"]
    )


def test_users_that_were_added_later_are_known(model, log):
    newer = world(150, seed=0).assign(timestamp=lambda f: f.timestamp + 10**6)
    newer.loc[newer.user_id.isin(["u1", "u2", "u3"]), "user_id"] += " new"
    further = Reranker("PRM", **{**FAST, "epochs": 1}).fit(newer, start_from=model)
    assert "unknown user" not in further.evaluate(newer.assign(timestamp=newer.timestamp + 10**6)).slices
    newer.loc[newer.user_id == "u4", "user_id"] = "stranger"
    slices = further.evaluate(newer.assign(timestamp=newer.timestamp + 10**6)).slices
    strange = newer[(newer.user_id == "stranger")].groupby("request_id").label.max().sum()
    assert slices["unknown user"]["requests"] == strange


def test_an_old_log_is_not_ranked_with_what_came_after_it(model, log):
    """Stored histories hold the clicks of the training log: a request of that time must not read them."""
    found = model.evaluate(log)
    hidden = model.artefact.preprocessor.histories
    model.artefact.preprocessor.histories = None
    try:
        assert model.evaluate(log).metrics == found.metrics
    finally:
        model.artefact.preprocessor.histories = hidden
    newer = log.assign(timestamp=log.timestamp + 10**6)
    assert model.evaluate(newer).metrics != found.metrics


def test_going_on_with_newer_days(model, log):
    before = {name: value.clone() for name, value in model.artefact.model.state_dict().items()}
    newer = world(150, seed=0, n_items=45).assign(timestamp=lambda f: f.timestamp + 10**6)
    newer["user_id"] = newer.user_id.replace("u1", "newcomer")
    frozen = Reranker("PRM", **{**FAST, "epochs": 1, "learning_rate": 1e-12}).fit(newer, start_from=model)
    old, new = model.artefact.preprocessor, frozen.artefact.preprocessor
    assert len(new.items) == len(old.items) + 5 and new.items.unknown == old.items.unknown
    assert len(new.users) == len(old.users) + 1
    rows = old.items.rows(old.items.ids.list())
    assert np.array_equal(rows, new.items.rows(old.items.ids.list())), "old ids keep their rows"
    after = frozen.artefact.model.state_dict()
    n = len(old.items)
    torch.testing.assert_close(
        after["embedder.items.embedding.weight"][:n], before["embedder.items.embedding.weight"], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        after["embedder.items.embedding.weight"][n:], before["embedder.items.unknown"].expand(5, -1), atol=1e-6, rtol=0
    )
    assert all(torch.equal(before[name], value) for name, value in model.artefact.model.state_dict().items())
    further = Reranker("PRM", **FAST).fit(newer, start_from=model)
    assert further.rank(newer.drop(columns="label").tail(8)).shape == (8, 6)
    kept = further.artefact.preprocessor.histories
    user = int(new.users.rows(["u2"])[0])
    items = np.array(further.artefact.preprocessor.items.texts(), dtype=object)
    assert len(kept.items[kept.ptr[user] : kept.ptr[user + 1]]) and items is not None
    with pytest.raises(ConfigError, match="start_from is a PRM, not a MiDNN"):
        Reranker("MiDNN", **FAST).fit(newer, start_from=model)
    with pytest.raises(ConfigError, match="other sizes"):
        Reranker("PRM", **{**FAST, "embedding_size": 32}).fit(newer, start_from=model)


@pytest.mark.parametrize(
    "search, most, message", [({"epochs": []}, None, "epochs has no values"), ({"epochs": [1]}, 0, "max_evals=0")]
)
def test_nothing_to_tune_is_said(log, search, most, message):
    with pytest.raises(ConfigError, match=message):
        Reranker("PRM", **FAST).tune(log, search, most)


def test_tuning_keeps_the_best_by_validation(log):
    model = Reranker("MiDNN", **{**FAST, "epochs": 2}).tune(log, {"learning_rate": [1e-9, 3e-3]})
    scores = [trial["valid_score"] for trial in model.trials]
    assert model.artefact.metrics["best_valid"]["ndcg@6"] == max(scores) and len(scores) == 2
    assert model.keys["learning_rate"] == model.trials[int(np.argmax(scores))]["learning_rate"]


@pytest.mark.parametrize("name", ["LambdaMART", "DNR", "PIER", "MMR"])
def test_other_kinds_of_models(log, name, tmp_path):
    if name == "LambdaMART":
        pytest.importorskip("lightgbm")
    vectors = np.random.default_rng(0).normal(size=(40, 3)).tolist()
    items = pd.DataFrame({"item_id": [f"i{i}" for i in range(40)], "vector": vectors})
    more = {"lambda_e": 1} if name == "DNR" else {}
    frame = log.assign(score_other=np.random.default_rng(1).random(len(log)))
    model = Reranker(name, **{**FAST, **more}).fit(RequestLog.from_pandas(frame, item_vectors=items))
    model.save(tmp_path / "m")
    request = frame.drop(columns="label").tail(16)
    pd.testing.assert_frame_equal(Reranker.load(tmp_path / "m").rank(request), model.rank(request))


def test_a_log_of_a_run_gives_the_requests_of_the_run(tmp_path):
    """The front door and `run` are one road: the same requests, the same incoming order, the same metrics of it."""
    keys = {
        "embedding_size": 16, "epochs": 2, "train_batch_size": 64, "history_interaction": "none", "id_dropout": 0.0,
        "use_popularity": False, "use_retriever_factors": False, "use_features": False, "use_gpu": False,
        "baselines": [], "checkpoint_dir": str(tmp_path / "saved"), "log_dir": None, "tensorboard_dir": None,
        "show_progress": False, "cache_dir": str(tmp_path / "cache"), "metrics": ["NDCG", "MAP"],
        "score_fusion": "concat", "n_candidates": 20,
    }  # fmt: skip
    config = Config("PRM", "ml-100k", config_dict={**keys, "split": "user", "retriever_args": {"epochs": 1}})
    data = prepare(config).data
    exported = Config("PRM", "log", config_dict={**keys, "source": "log", "knowledge": "none"})
    made = build(exported, RequestLog.from_pandas(as_log(data)))
    ids = [int(text or 0) for text in made.preprocessor.items.texts()]
    for part in ("train", "valid", "test"):
        assert in_ids(made.data[part], torch.tensor(ids)) == in_ids(data[part], torch.arange(data.catalogue.n_items))
    ours, theirs = (train(c, d, {}, saved=False)["row"] for c, d in ((config, data), (exported, made.data)))
    for row in (ours, theirs):  # the log holds no positives that were not retrieved
        for values in (row["test"], row["probes"]["score_desc"]):
            for metric in [metric for metric in values if metric.startswith("e2e_")]:
                del values[metric]
    assert ours["probes"]["score_desc"] == pytest.approx(theirs["probes"]["score_desc"], abs=1e-6)
    # Ids have other rows, so that a PRM starts from other embeddings: its metrics are near each other, not equal.
    assert ours["test"].keys() == theirs["test"].keys()


def in_ids(dataset, ids: torch.Tensor) -> list:
    """The requests of a split, each as its candidates in the order of their ids, and its history."""
    slate = dataset.slate(torch.arange(len(dataset)))
    out = []
    for row in range(len(slate)):
        valid = slate.mask[row]
        columns = ids[slate.candidates[row, valid]], slate.scores[row, valid], slate.labels[row, valid]
        history = ids[slate.history[row, slate.history_mask[row]]]
        out.append((sorted(zip(*(column.tolist() for column in columns))), history.tolist()))
    return out


def as_log(data) -> pd.DataFrame:
    """The requests of a run in the list form."""
    table = data.train.table
    slate = table.slate(torch.arange(len(table)))
    rows = []
    for row in range(len(table)):
        valid, known = slate.mask[row], slate.history_mask[row]
        rows.append({
            "request_id": row, "user_id": int(slate.users[row]), "timestamp": row,
            "item_id": slate.candidates[row, valid].tolist(), "score": slate.scores[row, valid].double().tolist(),
            "label": slate.labels[row, valid].int().tolist(), "history": slate.history[row, known].tolist(),
            "split": ("train", "valid", "test")[int(table.split[row])],
        })  # fmt: skip
    return pd.DataFrame(rows)


def test_users_of_a_recbole_dataset_get_lists_as_of_now(tmp_path):
    keys = {
        "embedding_size": 16, "epochs": 1, "retriever_args": {"epochs": 1, "embedding_size": 8}, "baselines": [],
        "checkpoint_dir": str(tmp_path / "saved"), "log_dir": None, "tensorboard_dir": None, "show_progress": False,
        "cache_dir": str(tmp_path / "cache"), "artefact_dir": str(tmp_path / "m"), "max_requests_per_user": 2,
    }  # fmt: skip
    run_dnr("PRM", "ml-100k", config_dict=keys)
    model = Reranker.load(tmp_path / "m")
    top = model.rank_users(["196", 22], k=5)
    assert list(top) == ["user_id", "item_id", "rank", "rerank_score", "incoming_rank"]
    assert top.groupby("user_id").size().to_dict() == {"196": 5, "22": 5}
    interactions = f"{recbole.__path__[0]}/dataset_example/ml-100k/ml-100k.inter"
    seen = pd.read_csv(interactions, sep="\t", dtype=str)
    met = set(seen[seen["user_id:token"] == "196"]["item_id:token"])
    assert len(met) and not met & set(top[top.user_id == "196"].item_id)
    with pytest.raises(DataError, match="'nobody' is not in the dataset"):
        model.rank_users(["nobody"])
    sample = model.artefact.sample
    assert len(model.rank(sample.drop(columns="label"))) == len(sample)
    with pytest.raises(DnrError, match="no retriever"):
        Reranker("PRM", **{**FAST, "epochs": 1}).fit(world(100)).rank_users(["u1"])
