"""Candidate tables against a slow reference, and the leaks that must not exist."""

import dataclasses

import numpy as np
import pytest
import torch
from data_helpers import (
    CONFIG,
    as_lists,
    make_interactions,
    make_retrieval,
    random_interactions,
    reference,
    retriever_positions,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dnr_recbole.data import candidates as module
from dnr_recbole.data import ranges as ranges_module
from dnr_recbole.data.candidate_table import CandidateTable, shuffle_candidates
from dnr_recbole.data.candidates import build_candidates
from dnr_recbole.data.normalization import NORMALIZATIONS, normalize_scores
from dnr_recbole.data.splits import split_users
from dnr_recbole.errors import DataError, UnknownNameError
from dnr_recbole.retriever.training import split_codes


def build(data, seed=0, **changes):
    return module.PROTOCOLS[changes.get("protocol", "exposed")]({**CONFIG, **changes}, data, make_retrieval(data, seed))


def check_against(table, expected, scores):
    assert len(table) == len(expected)
    history, history_mask = table.history, table.history_mask
    for row, request in enumerate(expected):
        mask = table.mask[row]
        items = table.candidates[row][mask].tolist()
        assert table.users[row] == request.user and table.split[row] == request.split
        assert len(items) == len(set(items)) and set(items) == request.candidates
        assert set(table.candidates[row][table.labels[row]].tolist()) == request.positives
        assert table.n_positives[row] == request.n_positives
        assert torch.equal(table.scores[row][mask], scores[request.user, items])
        assert history[row][history_mask[row]].tolist() == request.history
        assert history_mask[row].tolist() == sorted(history_mask[row].tolist(), reverse=True)
        for padded, real in (
            (table.candidates[row], mask),
            (table.scores[row], mask),
            (history[row], history_mask[row]),
        ):
            assert (padded[~real] == 0).all()
        assert not (table.labels[row] & ~mask).any()


def asking_users(data, scores, config):
    """User → split code, for split=user: who is drawn is tested elsewhere, here only what follows from it."""
    everyone = dict.fromkeys(range(1, data.n_users), 0 if config["protocol"] == "retrieved" else 1)
    asking = sorted({r.user for r in reference(as_lists(data), scores, config, everyone)})
    return dict(zip(asking, split_users(np.array(asking), "user", config["seed"]).tolist()))


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("protocol", ["exposed", "retrieved"])
@pytest.mark.parametrize("split", ["last", "user", "own"])
@pytest.mark.parametrize("repeatable", [False, True])
def test_candidates_equal_reference(seed, protocol, split, repeatable, monkeypatch):
    monkeypatch.setattr(ranges_module, "BLOCK_ELEMENTS", (1, 200, 1 << 23)[seed % 3])
    config = {
        **CONFIG,
        "protocol": protocol,
        "split": "last" if split == "own" else split,
        "repeatable": repeatable,
        "exclude_seen": seed % 4 < 3,
        "slate_size": 1 + seed % 4,
        "label_window": 1 + seed % 3,
        "request_stride": 1 + seed // 3 % 3,
        "retriever_fraction": (0.5, 0.7)[seed // 2 % 2],
        "n_candidates": (5, 20)[seed % 2],  # 20 of 25: some users have fewer unseen items left
        "history_feedback": ("all", "positive")[seed // 4 % 2],
    }
    repeats = seed % 4 > 0
    data = random_interactions(seed, n_users=24, longest=45 if repeats else 24, repeats=repeats, parts=split == "own")
    retrieval = make_retrieval(data, seed)
    scores = retrieval.model.table
    retrieval.split = split_codes(config, data)
    codes = asking_users(data, scores, config) if split == "user" else None
    expected = reference(as_lists(data), scores, config, codes)
    users = enumerate(as_lists(data), 1)
    fitted = [data.ptr[u] + p for u, events in users for p in retriever_positions(events, config)]
    assert np.flatnonzero(retrieval.split < 2).tolist() == sorted(fitted)
    assert {r.split for r in expected} == {0, 1, 2}
    table = module.PROTOCOLS[protocol](config, data, retrieval)
    check_against(table, expected, scores)
    for r in expected:  # of the reference itself: nothing evaluated, and no retrieved label, was fitted on
        assert not set(r.lines) & r.fitted or (protocol == "exposed" and r.split == 0)


def test_a_list_is_short_where_the_catalogue_is_exhausted():
    """The user has met 1 … 6 of 8 items when his last list of two begins."""
    events = [(i, True) for i in range(1, 9)]
    data = make_interactions([events], n_items=8)
    config = {**CONFIG, "n_candidates": 6, "exclude_seen": True}
    table = module.build_exposed(config, data, make_retrieval(data))
    assert table.mask.sum(1).tolist() == [6, 6, 4, 2]
    assert set(table.candidates[3][table.mask[3]].tolist()) == {7, 8} and table.labels[3].sum() == 2
    assert module.build_exposed({**config, "repeatable": True}, data, make_retrieval(data)).mask.all()


def test_exposed_by_hand():
    data = make_interactions([[(1, True), (2, False), (3, False), (4, True), (5, True), (1, False)]], n_items=6)
    scores = torch.tensor([[0.0] * 7, [0.0, 0.1, 0.9, 0.8, 0.2, 0.3, 0.5]])
    config = {**CONFIG, "n_candidates": 4}
    table = module.build_exposed(config, data, make_retrieval(data, table=scores))
    assert table.candidates.tolist() == [[1, 2, 3, 6], [3, 4, 2, 6], [5, 1, 2, 3]]
    assert table.labels.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert torch.equal(table.scores, scores[1][table.candidates.long()])
    assert table.split.tolist() == [0, 1, 2]
    assert table.history.tolist() == [[0, 0, 0], [1, 2, 0], [2, 3, 4]]


def test_retrieved_by_hand():
    events = [(1, True), (2, True), (3, True), (4, False), (5, True), (6, True)]
    data = make_interactions([events], n_items=8)
    scores = torch.tensor([[0.0] * 9, [0.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.1, 0.4, 0.3]])
    config = {**CONFIG, "protocol": "retrieved", "n_candidates": 3, "label_window": 2, "request_stride": 1}
    table = module.build_retrieved(config, data, make_retrieval(data, table=scores))
    # Later part: 4, 5, 6. Test starts before 5 (items 1–4 are known); validation would need two interactions
    # before.
    assert table.candidates.tolist() == [[5, 7, 8]]
    assert table.labels.int().tolist() == [[1, 0, 0]]
    assert table.n_positives.tolist() == [2]  # 6 was clicked but not retrieved
    assert table.split.tolist() == [2]


@pytest.mark.parametrize("split", ["last", "user"])
def test_nothing_is_injected_under_retrieved(split):
    """A retriever that ranks all clicked items last must leave all requests without a positive."""
    data = random_interactions(1, n_items=60, longest=40, repeats=False)
    table = torch.rand(data.n_users, data.n_items) * 0.5 + 0.5
    table[torch.from_numpy(data.user), torch.from_numpy(data.item)] = 0.0
    config = {**CONFIG, "protocol": "retrieved", "split": split}
    built = module.build_retrieved(config, data, make_retrieval(data, table=table))
    assert len(built) and not built.labels.any() and built.n_positives.sum() > 0


@pytest.mark.parametrize("protocol", ["exposed", "retrieved"])
def test_labels_and_history_share_no_interaction(protocol):
    data = random_interactions(5, n_users=60, longest=40, n_items=60, repeats=False)
    table = build(data, protocol=protocol, exclude_seen=True)
    history = table.history
    positive = torch.where(table.labels, table.candidates, -1)
    assert not (positive[:, :, None] == history[:, None, :].int()).any()
    # Candidates are new to the user: not only the positives.
    assert not ((table.candidates[:, :, None] == history[:, None, :]) & table.mask[:, :, None]).any()


@pytest.mark.parametrize("protocol", ["exposed", "retrieved"])
def test_storage_order_says_nothing(protocol):
    data = random_interactions(2, n_users=800, n_items=40, longest=36)
    config = {**CONFIG, "protocol": protocol, "n_candidates": 10}
    table = build_candidates(config, data, make_retrieval(data))
    place = np.broadcast_to(np.arange(10), table.candidates.shape)[table.mask.numpy()]
    for values in (table.labels, table.scores):
        correlation = np.corrcoef(place, values[table.mask].float().numpy())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(len(place))
    again = build_candidates(config, data, make_retrieval(data))
    assert torch.equal(table.candidates, again.candidates)
    other = build_candidates({**config, "seed": 4}, data, make_retrieval(data))
    assert not torch.equal(table.candidates, other.candidates)


def test_shuffling_keeps_candidates_together():
    data = random_interactions(3, n_users=30)
    table = build(data)
    shuffled = shuffle_candidates(table, 1)
    for name in ("scores", "labels", "mask"):
        sort = [t.candidates.long().sort(1).indices for t in (table, shuffled)]
        before, after = (getattr(t, name).gather(1, s) for t, s in zip((table, shuffled), sort))
        assert torch.equal(before, after)


def test_table_survives_the_cache_format():
    table = build(random_interactions(3))
    back = CandidateTable.from_tensors(table.to_tensors())
    for f in dataclasses.fields(table):
        a, b = getattr(table, f.name), getattr(back, f.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f.name


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"n_candidates": 26}, DataError, "catalogue of 25"),
        ({"slate_size": 6}, DataError, "slate_size 6"),
        ({"protocol": "other"}, UnknownNameError, "exposed, retrieved"),
        ({"split": "other"}, UnknownNameError, "choose one of user"),
        (
            {"protocol": "retrieved", "label_window": 500, "slate_size": 5, "retriever_fraction": 0.9},
            DataError,
            "no request for train, valid, test from",
        ),
    ],
)
def test_impossible_settings_are_named(changes, error, words):
    data = random_interactions(0)
    with pytest.raises(error, match=words):
        build_candidates({**CONFIG, **changes}, data, make_retrieval(data))


@pytest.mark.parametrize("how", NORMALIZATIONS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_normalisation_is_monotone_and_bounded(how, data):
    rows = st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6)
    scores = torch.tensor(data.draw(st.lists(rows, min_size=2, max_size=2)))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=2)))
    out = normalize_scores(scores, mask, how)
    assert torch.isfinite(out).all() and (out >= 0).all() and (out <= 1).all() and (out[~mask] == 0).all()
    for x, y, real in zip(scores, out, mask):
        x, y = x[real], y[real]
        order = x.argsort()
        assert (y[order].diff() >= -1e-6).all()
        if how != "none" and len(x) and x.min() == x.max():
            assert (y == 0.5).all()


def test_padding_beyond_the_range_of_tiny_scores_has_no_say():
    scores = torch.tensor([[1.0, 0.0, 1e-45]])
    out = normalize_scores(scores, torch.tensor([[False, True, True]]), "zscore")
    assert torch.allclose(out, torch.sigmoid(torch.tensor([[-torch.inf, -1.0, 1.0]])))


def test_normalisation_by_hand():
    scores = torch.tensor([[0.2, 0.9, 0.4, 0.4, 0.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert torch.allclose(normalize_scores(scores, mask, "rank"), torch.tensor([[0, 1, 0.5, 0.5, 0]]))
    assert torch.allclose(normalize_scores(scores, mask, "minmax"), torch.tensor([[0, 1, 2 / 7, 2 / 7, 0]]))
    x = scores[mask]
    expected = torch.sigmoid((x - x.mean()) / x.std(unbiased=False))
    assert torch.allclose(normalize_scores(scores, mask, "zscore")[mask], expected)
    with pytest.raises(UnknownNameError, match="minmax"):
        normalize_scores(scores, mask, "other")
