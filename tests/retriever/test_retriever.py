"""Stage 1 on a tiny dataset: probabilities, exact search, no look into the later part, caching, RecBole's
models."""

import math

import numpy as np
import pytest
import torch
from data_helpers import make_interactions, make_retrieval
from recbole.data.interaction import Interaction
from recbole.data.utils import create_dataset

from dnr_recbole.config import Config
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.errors import DataError
from dnr_recbole.retriever import training
from dnr_recbole.retriever.calibration import (
    IsotonicCalibration,
    PlattCalibration,
    calibration_from_dict,
    fit_calibration,
)
from dnr_recbole.retriever.metrics import auc, contains, evaluate_retrieval, sample_unseen
from dnr_recbole.retriever.search import best_items
from dnr_recbole.retriever.training import LATER, VALID, split_codes, train_retriever

N_USERS, N_ITEMS, LENGTH = 60, 80, 20


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """Users of two tastes: each takes most items from one half of the catalogue."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data") / "toy"
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(N_USERS):
        weight = np.where((np.arange(N_ITEMS) < N_ITEMS // 2) == (user % 2 == 0), 49.0, 1.0)
        items = rng.choice(N_ITEMS, LENGTH, replace=False, p=weight / weight.sum())
        lines += [f"u{user}\ti{item}\t{rng.integers(1, 6)}\t{1_600_000_000 + t}" for t, item in enumerate(items)]
    (folder / "toy.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder.parent)


@pytest.fixture
def config(data_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # RecBole writes its logs below the working directory

    def make(retriever="MF", arguments=None, **keys):
        arguments = {"epochs": 2, "show_progress": False, **(arguments or {})}
        defaults = {"data_path": data_path, "n_candidates": 10, "topk": [1, 6], "use_cache": False}
        defaults["protocol"] = "retrieved"  # the plainest cut
        defaults.update(cache_dir=str(tmp_path / "cache"), retriever=retriever, retriever_args=arguments)
        return Config(dataset="toy", config_dict={**defaults, **keys})

    return make


def users_of(retrieval):
    return torch.arange(1, retrieval.n_users)


@pytest.mark.parametrize("name", ["MF", "DualTower", "BPR", "EASE", "Pop", "ItemKNN", "LightGCN", "NeuMF", "MultiVAE"])
def test_every_kind_of_retriever(config, name):
    cfg = config(name)
    retrieval = train_retriever(cfg, create_dataset(cfg))
    x = retrieval.score_chunks(users_of(retrieval))
    assert x.shape == (N_USERS, N_ITEMS + 1) and x.dtype == torch.float32
    assert (x >= 0).all() and (x <= 1).all() and (x[:, 0] == 0).all()
    assert retrieval.model.training is False
    assert 0 <= retrieval.metrics["auc"] <= 1 and 0 <= retrieval.metrics["recall@10"] <= 1
    items, scores = retrieval.top_n([1, 2], 10)
    assert torch.allclose(scores, retrieval.score_items([1, 2], items))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    has_factors = name in ("MF", "DualTower", "BPR", "LightGCN")
    assert (retrieval.item_factors is not None) == has_factors
    if has_factors:
        for factors, rows in ((retrieval.item_factors, N_ITEMS + 1), (retrieval.user_factors, N_USERS + 1)):
            assert factors.shape[0] == rows and (factors[0] == 0).all()
            assert abs(factors[1:].std().item() - 1) < 0.05 and factors[1:].mean(0).abs().max() < 1e-4


def test_the_retriever_learns(config):
    cfg = config(
        "MF",
        {
            "epochs": 20,
            "train_batch_size": 512,
            "learning_rate": 0.01,
            "stopping_step": 20,
            "embedding_size": 8,
        },
    )
    retrieval = train_retriever(cfg, create_dataset(cfg))
    assert retrieval.metrics["auc"] > 0.7  # the best possible is about 0.79
    x = retrieval.score_chunks(users_of(retrieval))[:, 1:]
    assert x.max() - x.min() > 0.3


def test_split_and_popularity(config):
    cfg = config()
    dataset = create_dataset(cfg)
    interactions = Interactions.from_recbole(dataset, cfg)
    split = split_codes(cfg, interactions)
    assert [np.bincount(interactions.user[split == code])[1:].tolist() for code in range(3)] == [
        [14] * N_USERS, [2] * N_USERS, [4] * N_USERS,
    ]  # fmt: skip
    assert (np.diff(split.reshape(N_USERS, LENGTH), axis=1) >= 0).all()  # in time order
    frame = dataset.inter_feat.copy()
    retrieval = train_retriever(cfg, dataset, interactions)
    assert np.array_equal(retrieval.split, split)
    assert retrieval.train_count.sum() == 16 * N_USERS
    assert dataset.inter_feat.equals(frame) and "label" not in dataset.field2type  # left as it was


@pytest.mark.parametrize("name", ["MF", "DualTower", "BPR", "EASE", "Pop", "MultiVAE"])
def test_the_later_part_does_not_leak(config, name):
    cfg = config(name)
    dataset = create_dataset(cfg)
    first = train_retriever(cfg, dataset)
    interactions = Interactions.from_recbole(dataset, cfg)
    later = interactions.row[first.split == LATER]
    items = dataset.inter_feat["item_id"].to_numpy().copy()
    items[later] = items[later] % N_ITEMS + 1
    dataset.inter_feat = dataset.inter_feat.assign(item_id=items)
    second = train_retriever(cfg, dataset)
    users = users_of(first)
    assert torch.equal(first.score_chunks(users), second.score_chunks(users))
    assert first.metrics != second.metrics


@pytest.mark.parametrize("name", ["MF", "BPR"])
def test_the_fitted_part_and_the_seed_do_matter(config, name):
    def scores(cfg, change=False):
        dataset = create_dataset(cfg)
        if change:
            dataset.inter_feat = dataset.inter_feat.assign(item_id=dataset.inter_feat["item_id"] % N_ITEMS + 1)
        return train_retriever(cfg, dataset).score_chunks([1, 2, 3])

    reference = scores(config(name))
    assert not torch.equal(reference, scores(config(name), change=True))
    assert not torch.equal(reference, scores(config(name, seed=1)))


def test_positive_click_ignores_low_ratings(config):
    cfg = config("MF", {"positive": "click"}, label_threshold=6)
    with pytest.raises(DataError, match="label_threshold"):
        train_retriever(cfg, create_dataset(cfg))
    cfg = config("MF", {"positive": "click"})
    assert train_retriever(cfg, create_dataset(cfg)).train_count.sum() == 16 * N_USERS


def test_global_random_state_is_untouched(config):
    cfg = config()
    dataset = create_dataset(cfg)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    train_retriever(cfg, dataset)
    assert (torch.rand(1), np.random.rand()) == before


# ---- search


def brute_force(scores, n, exclude):
    scores = scores.clone()
    scores[:, 0] = -torch.inf
    for row, (begin, end) in enumerate(zip(exclude[0], exclude[1])):
        scores[row, exclude[2][begin:end]] = -torch.inf
    best = scores.sort(dim=1, descending=True, stable=True)
    return best.indices[:, :n], best.values[:, :n]


@pytest.mark.parametrize("byte_budget", [1, 10_000, 2**28])
def test_best_items_equal_brute_force(byte_budget):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 101, generator=generator)
    rows = torch.randint(0, 40, (64,), generator=generator)
    rng = np.random.default_rng(0)
    begin = rng.integers(0, 500, 64)
    exclude = (begin, begin + rng.integers(0, 30, 64), rng.integers(0, 101, 600))
    items, values = best_items(lambda users: scores[users], rows, 20, 101, exclude, byte_budget)
    expected_items, expected_values = brute_force(scores[rows], 20, exclude)
    assert torch.equal(items, expected_items) and torch.equal(values, expected_values)
    assert (items > 0).all()
    for row in range(64):
        assert not np.isin(items[row], exclude[2][exclude[0][row] : exclude[1][row]]).any()

    ptr = np.concatenate([[0], np.cumsum(exclude[1] - exclude[0])])
    flat = np.concatenate([exclude[2][b:e] for b, e in zip(exclude[0], exclude[1])])
    again, _ = best_items(lambda users: scores[users], rows, 20, 101, (ptr, flat), byte_budget)
    assert torch.equal(items, again)


def test_search_leaves_the_scores_alone_and_pads():
    scores = torch.rand(2, 6)
    kept = scores.clone()
    items, values = best_items(
        lambda users: scores, [0, 1], 5, 6, (np.array([0, 3]), np.array([3, 3]), np.array([1, 2, 3]))
    )
    assert torch.equal(scores, kept)
    assert (items[0, 2:] == 0).all() and torch.isneginf(values[0, 2:]).all() and (items[1] > 0).all()


def test_more_candidates_than_items(config):
    cfg = config()
    retrieval = train_retriever(cfg, create_dataset(cfg))
    assert retrieval.top_n([1], N_ITEMS)[0].shape == (1, N_ITEMS)
    with pytest.raises(DataError, match="n_candidates"):
        retrieval.top_n([1], N_ITEMS + 1)


def test_padding_has_score_zero(config):
    cfg = config()
    retrieval = train_retriever(cfg, create_dataset(cfg))
    everything = np.arange(N_ITEMS + 1)
    items, x = retrieval.top_n([1], 5, (np.array([0]), np.array([N_ITEMS - 1]), everything))
    assert items[0, 0] > 0 and (items[0, 2:] == 0).all() and (x[0, 2:] == 0).all()
    assert (retrieval.score_items([1], [[0, 3]])[0] > 0).tolist() == [False, True]


def test_scores_that_are_not_finite_name_the_retriever(config):
    cfg = config("BPR")
    retrieval = train_retriever(cfg, create_dataset(cfg))
    retrieval.model.item_embedding.weight.data[3] = float("nan")
    with pytest.raises(DataError, match="BPR.*not finite"):
        retrieval.score_chunks([1])


# ---- users without a part


@pytest.mark.parametrize("name", ["MF", "DualTower", "BPR", "EASE", "Pop", "ItemKNN", "LightGCN", "NeuMF", "MultiVAE"])
def test_users_may_be_unknown_to_the_retriever(config, name):
    """Half of the users have two lists only: validation begins with their first interaction."""
    cfg = config(name, protocol="exposed")
    dataset = create_dataset(cfg)
    frame = dataset.inter_feat
    dataset.inter_feat = frame[(frame["user_id"] % 2 == 0) | (frame.groupby("user_id").cumcount() < 12)]
    retrieval = train_retriever(cfg, dataset)
    interactions = Interactions.from_recbole(dataset, cfg)
    known = np.unique(interactions.user[retrieval.split < LATER])
    assert (known % 2 == 0).all() and len(known) == N_USERS // 2
    x = retrieval.score_chunks(users_of(retrieval))
    assert torch.isfinite(x).all() and 0 <= retrieval.metrics["recall@10"] <= 1


def test_nothing_to_learn_from_is_said(config):
    cfg = config(protocol="exposed", slate_size=10)
    with pytest.raises(DataError, match="nothing is left for the retriever.*lower slate_size"):
        train_retriever(cfg, create_dataset(cfg))


# ---- repeats


@pytest.mark.parametrize("repeatable", [False, True])
def test_metrics_count_repeats_only_where_they_can_be_retrieved(repeatable):
    """User 1 comes back to item 1, user 2 does not; the later part holds items 1, 3 and 4, 5."""
    data = make_interactions([[(i, True) for i in (1, 2, 1, 3)], [(i, True) for i in (1, 2, 4, 5)]], n_items=6)
    scores = torch.tensor([[0.0] * 7, [0, 0.9, 0.8, 0.5, 0.2, 0.3, 0.4], [0, 0.7, 0.6, 0.1, 0.9, 0.5, 0.3]])
    retrieval = make_retrieval(data, table=scores)
    retrieval.split = np.int8([0, 0, 2, 2, 0, 0, 2, 2])
    # Top 2: of all items 1, 2 | 4, 1; of the new ones 3, 6 | 4, 5.
    result = evaluate_retrieval(retrieval, data, 2, 0, repeatable)
    assert result["recall@2"] == (0.5 if repeatable else 1.0)


def test_calibration_counts_repeats_if_they_are_candidates(monkeypatch):
    """The user knows all items; his validation part holds item 1 again."""
    data = make_interactions([[(i, True) for i in (1, 2, 3, 1)]], n_items=3)
    retrieval = make_retrieval(data, table=torch.tensor([[0.0] * 4, [0.0, 0.1, 0.2, 0.3]]))
    retrieval.split = np.int8([0, 0, 0, 1])
    monkeypatch.setattr(training, "fit_calibration", lambda kind, *scores: [set(s.round(1).tolist()) for s in scores])
    settings = {"seed": 0, "positive": "any", "calibration": None}
    positive, negative = training._calibrate(settings, retrieval, data, repeatable=True)
    assert positive == set(np.float32([0.1]).tolist()) and negative <= set(np.float32([0.2, 0.3]).tolist())
    with pytest.raises(DataError, match="nothing left to retrieve"):
        training._calibrate(settings, retrieval, data, repeatable=False)


# ---- calibration


@pytest.mark.parametrize("kind", ["logistic", "isotonic"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_calibration_is_monotone_and_calibrated(kind, scale):
    rng = np.random.default_rng(0)
    positive, negative = scale * rng.normal(1, 1, 4000), scale * rng.normal(0, 1, 16000)
    calibration = fit_calibration(kind, positive, negative)
    grid = torch.linspace(-3 * scale, 4 * scale, 500)
    x = calibration(grid)
    steps = x.diff()
    assert (steps > 0).all()
    assert (x >= 0).all() and (x <= 1).all()
    mean = calibration(torch.from_numpy(np.concatenate([positive, negative])).float()).mean()
    assert abs(mean - 0.2) < 0.01  # the base rate
    restored = calibration_from_dict(calibration.to_dict())
    assert torch.equal(restored(grid), x)


def test_logistic_calibration_survives_degenerate_scores():
    for positive, negative in [
        (np.ones(50), np.ones(200)),  # constant
        (np.full(50, 2.0), np.zeros(200)),  # separable
        (np.zeros(50), np.ones(200)),  # the wrong way round
    ]:
        calibration = PlattCalibration.fit(positive, negative)
        x = calibration(torch.tensor([-5.0, 0.0, 1.0, 5.0]))
        assert calibration.slope > 0 and torch.isfinite(x).all() and (x.diff() > 0).all()


def test_isotonic_calibration_with_one_knot():
    calibration = IsotonicCalibration.fit(np.ones(5), np.ones(20))
    x = calibration(torch.tensor([0.0, 1.0, 2.0]))
    assert torch.allclose(x, torch.tensor([0.99 * 0.2 + 0.01 / (1 + math.exp(d)) for d in (1, 0, -1)]))


def test_isotonic_calibration_keeps_the_order_in_flat_pieces_and_beyond_its_range():
    rng = np.random.default_rng(1)
    calibration = IsotonicCalibration.fit(rng.normal(0.3, 1, 30), rng.normal(0, 1, 100))  # few: large flat pieces
    raw = torch.from_numpy(rng.permutation(np.linspace(-5, 5, 5000))).float()
    assert torch.equal(calibration(raw).argsort(), raw.argsort())
    old = calibration.to_dict()
    del old["center"], old["scale"]  # as versions before 0.2.1 stored it
    assert calibration_from_dict(old)(raw).unique().numel() < 3000
    assert (calibration_from_dict(old)(raw) - calibration(raw)).abs().max() < 0.01


# ---- metrics


def test_auc_counts_ties_half():
    assert auc(np.array([1.0, 2.0]), np.array([0.0, 1.0])) == (0.5 + 1 + 1 + 1) / 4


def test_unseen_items_are_unseen():
    rng = np.random.default_rng(0)
    seen = np.unique(np.concatenate([np.arange(1, 10) + 10, np.arange(1, 9) + 20]))  # user 1: all, user 2: all but 9
    users, items = sample_unseen(np.array([1, 2, 3]), 4, seen, 10, rng)
    assert not contains(seen, users * 10 + items).any()
    assert set(users) == {2, 3} and (items[users == 2] == 9).all() and (items > 0).all()


# ---- cache


@pytest.mark.parametrize(
    "name, stored", [("MF", True), ("DualTower", True), ("LightGCN", True), ("Pop", True), ("EASE", False)]
)
def test_a_cached_retriever_scores_the_same(config, name, stored, monkeypatch):
    cfg = config(name, use_cache=True)
    first = train_retriever(cfg, create_dataset(cfg))
    if stored:
        monkeypatch.setattr(training, "_fit", lambda *a: pytest.fail("fitted although cached"))
    second = train_retriever(cfg, create_dataset(cfg))
    users = users_of(first)
    assert first.key == second.key and first.metrics == second.metrics
    assert torch.equal(first.score_chunks(users), second.score_chunks(users))
    if first.item_factors is not None:
        assert torch.equal(first.item_factors, second.item_factors)


def test_what_the_key_depends_on(config):
    def key(**keys):
        arguments = keys.pop("arguments", None)
        cfg = config("BPR", arguments, **keys)
        return train_retriever(cfg, create_dataset(cfg)).key

    reference = key()
    # Stage 2 only; without lists that are held out, the cut is the plain fraction, whatever their size.
    assert key(exclude_seen=False, label_window=5, learning_rate=0.5, result_file="x", slate_size=3) == reference
    assert key(protocol="exposed", split="user", slate_size=3) == reference
    for change in ({"protocol": "exposed"}, {"protocol": "exposed", "slate_size": 3}, {"repeatable": True}):
        assert key(**change) != reference
    assert key(protocol="exposed") != key(protocol="exposed", slate_size=3)
    for change in ({"seed": 1}, {"retriever_fraction": 0.5}, {"arguments": {"learning_rate": 0.5}}):
        assert key(**change) != reference


def test_changed_interactions_miss_the_cache(config):
    """Also when the files are the same and a caller changed the frame in memory."""
    cfg = config("BPR", use_cache=True)
    dataset = create_dataset(cfg)
    first = train_retriever(cfg, dataset)
    dataset.inter_feat = dataset.inter_feat.assign(item_id=dataset.inter_feat["item_id"] % N_ITEMS + 1)
    assert train_retriever(cfg, dataset).key != first.key


def test_valid_part_is_disjoint_from_later(config):
    cfg = config(retriever_fraction=0.5)
    interactions = Interactions.from_recbole(create_dataset(cfg), cfg)
    split = split_codes(cfg, interactions)
    assert np.bincount(split).tolist() == [9 * N_USERS, N_USERS, 10 * N_USERS]
    assert (interactions.time[split == VALID].max()) < interactions.time[split == LATER].max()


def test_dual_tower_has_unit_vectors_and_wide_scores(config):
    arguments = {"epochs": 30, "learning_rate": 0.01, "train_batch_size": 128, "embedding_size": 8, "stopping_step": 30}
    cfg = config("DualTower", arguments)
    retrieval = train_retriever(cfg, create_dataset(cfg))
    for vectors in (retrieval.model.user_factors()[1:], retrieval.model.item_factors()):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    x = retrieval.score_chunks(users_of(retrieval))[:, 1:]
    assert x.max() - x.min() > 0.5  # a cosine alone would leave sigmoid(1) - sigmoid(-1) = 0.46


def test_dual_tower_corrects_for_popularity_in_its_batches(config):
    cfg = config("DualTower", {"epochs": 1})
    model = train_retriever(cfg, create_dataset(cfg)).model.eval()
    user, item = torch.arange(1, 7), torch.arange(1, 7)
    batch = Interaction({model.USER_ID: user, model.ITEM_ID: item})
    with torch.no_grad():
        logits = model.encode_users(user, target=item) @ model.encode_items(item).T / model.temperature
        frequency = model.log_frequency[item]
        expected = torch.nn.functional.cross_entropy(logits - frequency, torch.arange(6))
        torch.testing.assert_close(model.calculate_loss(batch), expected)
        model.log_frequency += torch.linspace(0, 3, len(model.log_frequency))
        assert abs(float(model.calculate_loss(batch) - expected)) > 1e-3
