"""Datasets, loaders, features and statistics, on tiny data and on RecBole's ml-100k."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from data_helpers import CONFIG, make_retrieval, random_interactions
from recbole.utils import FeatureType

from dnr_recbole.config import Config
from dnr_recbole.data.candidates import build_candidates
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.dataset import (
    RerankDataset,
    assemble,
    build_rerank_data,
    load_candidates,
    training_rows,
)
from dnr_recbole.data.features import encode_features, popularity
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.loading import load_recbole_dataset
from dnr_recbole.data.statistics import format_statistics
from dnr_recbole.errors import DataError
from dnr_recbole.identity import CODE_VERSIONS


@pytest.fixture(scope="module")
def interactions():
    return random_interactions(0, n_users=60, n_items=30, longest=40)


@pytest.fixture(scope="module")
def table(interactions):
    return build_candidates(CONFIG, interactions, make_retrieval(interactions))


def blank_catalogue(data, **changes):
    sizes = {
        "item_popularity": (data.n_items,),
        "item_features": (data.n_items, 0),
        "user_features": (data.n_users, 0),
    }
    tables = {name: torch.zeros(size) for name, size in sizes.items()}
    return Catalogue(n_users=data.n_users, n_items=data.n_items, **tables, **changes)


# ---------------------------------------------------------------- dataset


def test_slate_is_a_view_of_the_table(table):
    data = RerankDataset(table, torch.nonzero(table.split == 2).flatten())
    rows = torch.tensor([3, 0, 3])
    slate, where = data.slate(rows), data.rows[rows]
    assert slate.users.tolist() == table.users[where].tolist()
    assert torch.equal(slate.history, table.history[where])
    assert torch.equal(slate.history_mask, table.history_mask[where])
    assert torch.equal(slate.candidates, table.candidates[where].long())
    types = [
        slate.users.dtype,
        slate.candidates.dtype,
        slate.history.dtype,
        slate.scores.dtype,
        slate.labels.dtype,
    ]
    assert types == [torch.long] * 3 + [torch.float32] * 2
    assert data.n_positives.dtype == torch.long and len(data.n_positives) == len(data)


def test_training_rows(interactions):
    config = {**CONFIG, "protocol": "retrieved", "split": "user", "label_window": 3, "request_stride": 1}
    table = build_candidates(config, interactions, make_retrieval(interactions))
    everything = training_rows(table, keep_empty=True)
    useful = training_rows(table)
    assert 0 < len(useful) < len(everything) == (table.split == 0).sum()
    assert table.labels[useful].any(1).all()
    newest = training_rows(table, max_per_user=2)
    for user in table.users[useful].unique():
        mine = useful[table.users[useful] == user]
        assert newest[table.users[newest] == user].tolist() == mine[-2:].tolist()


def test_a_split_without_requests_is_an_error(interactions):
    scores = torch.rand(interactions.n_users, interactions.n_items)
    scores[torch.from_numpy(interactions.user), torch.from_numpy(interactions.item)] = 0.0
    config = {**CONFIG, "protocol": "retrieved", "n_candidates": 2, "label_window": 3}
    table = build_candidates(config, interactions, make_retrieval(interactions, table=scores))
    with pytest.raises(DataError, match="no train request is left: none of [1-9]"):
        assemble(config, table, blank_catalogue(interactions))


def test_normalisation_changes_scores_only(interactions, table):
    data = assemble({**CONFIG, "score_normalization": "rank"}, table, blank_catalogue(interactions), interactions)
    raw, slate = table.slate(data.train.rows), data.train.slate(slice(None))
    assert torch.equal(raw.candidates, slate.candidates)
    assert torch.equal(raw.scores.argsort(1), slate.scores.argsort(1))
    assert set(slate.scores.flatten().tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert data.statistics["train"]["scores_of_positives"]["mean"] == pytest.approx(
        float(raw.scores[raw.labels > 0].mean()), abs=1e-6
    )


def test_cache_never_serves_another_setting(tmp_path, interactions):
    keys = {**CONFIG, "use_cache": True, "cache_dir": str(tmp_path), "topk": [1, 2], "valid_metric": "NDCG@2"}
    make = lambda **changed: Config("PRM", "ml-100k", config_dict={**keys, **changed})  # noqa: E731
    first = load_candidates(make(), interactions, make_retrieval(interactions, 1))
    assert len(list(tmp_path.iterdir())) == 1
    # A retrieval that can only be looked up: what is not in the cache cannot be made.
    found = key_only(make_retrieval(interactions, 1))
    for same in ({}, {"learning_rate": 0.5}, {"score_normalization": "rank"}, {"log_dir": None}, {"epochs": 3}):
        hit = load_candidates(make(**same), interactions, found)
        assert torch.equal(first.candidates, hit.candidates) and torch.equal(first.labels, hit.labels)
    for changed in ({"slate_size": 3}, {"history_feedback": "positive"}, {"split": "user"}):
        with pytest.raises(AttributeError):
            load_candidates(make(**changed), interactions, found)
    with pytest.raises(AttributeError):
        load_candidates(make(), interactions, key_only(make_retrieval(interactions, 2)))
    with pytest.MonkeyPatch.context() as patch:  # the package's code for this stage has changed
        patch.setitem(CODE_VERSIONS, "candidates", CODE_VERSIONS["candidates"] + 1)
        with pytest.raises(AttributeError):
            load_candidates(make(), interactions, found)


def key_only(retrieval):
    return SimpleNamespace(key=retrieval.key)


# ---------------------------------------------------------------- loader


def test_shuffled_order_depends_on_seed_and_epoch_alone(table):
    data = RerankDataset(table, torch.arange(len(table)))
    loader, other = SlateLoader(data, 16, shuffle=True, seed=7), SlateLoader(data, 16, shuffle=True, seed=7)
    list(loader), list(loader)
    loader.set_epoch(4), other.set_epoch(4)
    torch.manual_seed(0)
    for a, b in zip(loader, other):
        assert torch.equal(a.candidates, b.candidates)
    first = loader.rows()
    loader.set_epoch(5)
    assert not torch.equal(first, loader.rows()) and torch.equal(first.sort().values, loader.rows().sort().values)


@pytest.mark.parametrize("n_rows", [7, 32, 33, 65])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_cover_everything_once(table, n_rows, world_size, shuffle):
    data = RerankDataset(table, torch.arange(n_rows))
    loaders = [SlateLoader(data, 16, shuffle, 1, rank, world_size) for rank in range(world_size)]
    batches = [loader.batches() for loader in loaders]
    assert [len(b) for b in batches] == [len(loader) for loader in loaders]
    assert all(0 < len(rows) <= 16 for b in batches for rows in b)
    seen = torch.cat([rows for b in batches for rows in b])
    assert seen.sort().values.tolist() == list(range(n_rows))
    if shuffle:
        assert len({len(b) for b in batches}) == 1
        sizes = {len(rows) for b in batches for rows in b}
        assert max(sizes) - min(sizes) <= 1 + (world_size > 1)
    else:
        assert seen.tolist() == list(range(n_rows))


def test_loader_refuses_what_cannot_be_shared(table):
    data = RerankDataset(table, torch.arange(2))
    for shuffle in (True, False):
        with pytest.raises(DataError, match="nproc"):
            SlateLoader(data, 4, shuffle=shuffle, rank=0, world_size=3)
    assert [len(SlateLoader(data, 4, rank=r, world_size=2)) for r in range(2)] == [1, 1]


# ---------------------------------------------------------------- features


KINDS = {
    "colour": FeatureType.TOKEN,
    "year": FeatureType.TOKEN,
    "zip": FeatureType.TOKEN,
    "genre": FeatureType.TOKEN_SEQ,
    "title": FeatureType.TOKEN_SEQ,
    "price": FeatureType.FLOAT,
    "vector": FeatureType.FLOAT_SEQ,
}


def side_table():
    """Four items, of ids 1 to 4, with one column of each kind."""
    return pd.DataFrame(
        {
            "colour": ["red", "blue", "red", np.nan],
            "year": ["1990", "1995", "2000", "2005"],
            "zip": ["02139", "1", "2", "3"],
            "genre": [np.array(v, dtype=object) for v in (["a", "b"], ["c"], [], ["b"])],
            "title": [np.array([v], dtype=object) for v in "uvwx"],
            "price": [1.0, 3.0, np.nan, np.nan],
            "vector": [np.array(v, dtype=float) for v in ([0, 5], [4, 5], [], [2, 5])],
        }
    )


def test_features_by_hand(caplog):
    caplog.set_level("INFO")
    row = np.array([1, 2, 3, 5])
    out = encode_features(side_table(), KINDS, row, 6, max_vocabulary=3)
    year = np.array([1990, 1995, 2000, 2005])
    year = (year - year.mean()) / year.std()
    spread = np.sqrt(8 / 3)  # of 0, 4 and 2
    expected = np.column_stack(
        [[1, 0, 1, 0], [0, 1, 0, 0], year, [1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [-1, 1, 0, 0],
         [-2 / spread, 2 / spread, 0, 0], [0, 0, 0, 0]]
    )  # fmt: skip
    assert torch.allclose(out[row], torch.tensor(expected, dtype=torch.float32))
    assert not out[[0, 4]].any()  # the padding row, and an item that the file does not list
    assert "zip, title" in caplog.text
    assert encode_features(side_table()[[]], {}, row, 6, 3).shape == (6, 0)


def test_popularity():
    assert torch.allclose(popularity(torch.tensor([9, 0, 1, 3])), torch.tensor([0, 0, 0.5, 1]))
    assert not popularity(torch.zeros(3)).any()


# ---------------------------------------------------------------- ml-100k


@pytest.mark.parametrize("protocol, split", [("exposed", "last"), ("retrieved", "last"), ("retrieved", "user")])
def test_ml_100k(protocol, split):
    changes = {"protocol": protocol, "split": split, "use_cache": False, "state": "ERROR", "use_features": True}
    config = Config(model="PRM", dataset="ml-100k", config_dict=changes)
    dataset = load_recbole_dataset(config)
    interactions = Interactions.from_recbole(dataset, config)
    data = build_rerank_data(config, dataset, interactions, make_retrieval(interactions))
    assert data.statistics["dataset"]["interactions"] == 100_000
    assert data.statistics["dataset"]["clicks"] == 82_520  # ratings of 3, 4 and 5
    if protocol == "exposed":
        assert data.statistics["train"]["candidates_recall"] == 1.0
        assert len(data.test) == 943  # every user has a list with a click
    users = [set(data[name].users.tolist()) for name in ("train", "valid", "test")]
    assert bool(users[0] & users[2]) == (split == "last") == data.catalogue.user_ids_known
    # gender 2, occupation 21, age 61 / genres 19 and the release year as one number (two films have none)
    assert data.catalogue.user_features.shape == (944, 84) and data.catalogue.item_features.shape == (
        1683,
        20,
    )
    assert torch.isfinite(data.catalogue.item_features).all()
    slate = next(iter(SlateLoader(data.train, 64, shuffle=True)))
    assert slate.candidates.shape[1:] == slate.history.shape[1:] == (50,) and 0 < len(slate) <= 64
    assert slate.labels.sum(1).min() >= 1
    assert "candidates_recall" in format_statistics(data.statistics)
    json.dumps(data.statistics)
