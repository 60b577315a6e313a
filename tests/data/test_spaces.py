"""Item spaces: what they know, what they must not know, and how they are built."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from data_helpers import CONFIG, make_retrieval, random_interactions

from dnr_recbole.data import spaces
from dnr_recbole.data.candidates import build_candidates
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.dataset import assemble
from dnr_recbole.data.spaces import Known, build_spaces, load_spaces, register_space, user_fold
from dnr_recbole.errors import UnknownNameError
from dnr_recbole.model.inputs.affinity import Affinity

KEYS = {
    **CONFIG,
    "history_interaction": "affinity",
    "affinity_spaces": ["factors", "svd", "covisit"],
    "affinity_dim": 6,
    "affinity_folds": 3,
}


def known_of(histories, n_items, dim=4, factors=None):
    """``histories``: the items of each user (from id 1) in time order."""
    user = np.concatenate([np.full(len(items), u) for u, items in enumerate(histories, start=1)])
    return Known(user, np.concatenate(histories), len(histories) + 1, n_items + 1, dim, factors)


def cosine(space, candidate, history, fold=0):
    return float(space[0, fold, candidate] @ space[-1, fold, history])


def test_next_items_lie_near_each_other_in_one_direction():
    known = known_of([[1, 2, 3, 4], [1, 2, 5, 6], [6, 1, 2, 3], [4, 5, 6, 1]] * 5, n_items=6, dim=5)
    space = build_spaces(["covisit"], known)["covisit"]
    assert space.shape == (2, 1, 7, 5)
    assert cosine(space, 2, 1) > cosine(space, 1, 2)  # 2 follows 1, hardly ever the other way round
    assert cosine(space, 2, 1) > max(cosine(space, other, 1) for other in (4, 5, 6))


def test_next_item_counts_by_hand():
    """Full width, so the product of the two sides is the balanced matrix itself."""
    known = known_of([[1, 2, 1], [2, 3]], n_items=9, dim=9)
    # Steps of 1: 1→2, 2→1, 2→3; steps of 2: 1→1, which is left out. No step crosses from one user to the next.
    counts = np.zeros((10, 10))
    for pair in ((1, 2), (2, 1), (2, 3)):
        counts[pair] = 1.0
    counts *= counts / (counts + 2.0)
    rows, columns = counts.sum(1), counts.sum(0)
    balanced = counts / np.sqrt(np.maximum(rows, 1e-12))[:, None] / np.sqrt(np.maximum(columns, 1e-12))
    candidates, histories = spaces.covisitation(known)
    assert np.allclose((histories @ candidates.T).numpy(), balanced, atol=1e-8)


def test_items_of_the_same_users_are_alike_by_svd_and_repetition_counts_once():
    known = known_of([[1, 2, 2, 2], [1, 2], [3, 4], [3, 4, 4]], n_items=5, dim=3)
    space = build_spaces(["svd"], known)["svd"]
    assert cosine(space, 1, 2) > 0.9 and abs(cosine(space, 1, 3)) < 0.1
    assert (space[:, :, 5] == 0).all() and (space[:, :, 0] == 0).all()  # unseen, padding
    once = build_spaces(["svd"], known_of([[1, 2], [1, 2], [3, 4], [3, 4]], n_items=5, dim=3))["svd"]
    assert torch.allclose(space[0, 0] @ space[0, 0].T, once[0, 0] @ once[0, 0].T, atol=1e-6)


def test_rows_are_unit_vectors_and_equal_data_give_equal_bits():
    data = random_interactions(4)
    known = Known(data.user, data.item, data.n_users, data.n_items, 6, torch.randn(data.n_items, 5))
    first, second = (build_spaces(["factors", "svd", "covisit"], known, 2) for _ in range(2))
    assert list(first) == ["svd", "covisit"]  # without a user the factors are gone, so they cannot be read in folds
    for name, table in first.items():
        assert torch.equal(table, second[name])
        length = table.norm(dim=-1)
        assert (torch.isclose(length, torch.ones(())) | (length == 0)).all()
        assert table.shape[1] == 3


def test_a_fold_knows_nothing_of_its_users():
    data = random_interactions(4)
    known = Known(data.user, data.item, data.n_users, data.n_items, 6)
    table = build_spaces(["svd", "covisit"], known, 3)
    for fold in (1, 2, 3):
        others = user_fold(data.user, 3) != fold
        rest = dataclasses.replace(known, user=data.user[others], item=data.item[others])
        alone = build_spaces(["svd", "covisit"], rest)
        for name in table:
            assert torch.equal(table[name][:, fold], alone[name][:, 0])


def later_changed(data, retrieval, seed):
    """The same log up to the retriever's cut of each user; behind it, labels are flipped and items are others."""
    rng = np.random.default_rng(seed)
    future = retrieval.split == 2
    item, click = data.item.copy(), data.click.copy()
    item[future] = rng.integers(1, data.n_items, int(future.sum()))
    click[future] = ~click[future]
    return dataclasses.replace(data, item=item, click=click)


def halved(data):
    """A retriever that learned from the older half of each user's interactions."""
    retrieval = make_retrieval(data)
    place = np.arange(len(data)) - data.ptr[data.user]
    length = np.diff(data.ptr)[data.user]
    retrieval.split[:] = np.where(place < length // 2, 0, 2)
    return retrieval


def test_retrieved_spaces_know_neither_labels_nor_anything_behind_the_retrievers_part():
    data = random_interactions(7, longest=40)
    retrieval = halved(data)
    keys = {**KEYS, "protocol": "retrieved"}
    before = load_spaces(keys, data, retrieval)
    after = load_spaces(keys, later_changed(data, retrieval, 1), retrieval)
    assert before and all(torch.equal(before[name], after[name]) for name in before)


def test_exposed_training_requests_read_tables_that_their_own_user_had_no_share_in():
    """Training requests lie inside the retriever's part: flipping their labels and shuffling everything else that their
    user ever did leaves their inputs as they were."""
    data = random_interactions(7, n_users=15, longest=40)
    retrieval = make_retrieval(data)
    retrieval.split[:] = 0
    keys = {**KEYS, "protocol": "exposed"}
    table = load_spaces(keys, data, retrieval)
    assert list(table) == ["svd", "covisit"]
    user = int(np.bincount(data.user).argmax())
    own = np.flatnonzero(data.user == user)
    rng = np.random.default_rng(0)
    item, click = data.item.copy(), data.click.copy()
    item[own], click[own] = rng.integers(1, data.n_items, len(own)), ~click[own]
    changed = load_spaces(keys, dataclasses.replace(data, item=item, click=click), retrieval)
    fold = int(user_fold(np.array([user]), 3)[0])
    for name in table:
        assert torch.equal(table[name][:, fold], changed[name][:, fold])
        assert not torch.equal(table[name][:, 0], changed[name][:, 0])  # so the test could fail


def test_training_requests_carry_their_fold_and_all_others_read_the_whole_table():
    data = random_interactions(0, n_users=60, n_items=30, longest=40)
    retrieval = make_retrieval(data)
    left = data.ptr[data.user + 1] - np.arange(len(data))
    retrieval.split[:] = np.where(left > 2 * 3 * KEYS["slate_size"], 0, 2)  # neither validation's nor test's lists
    keys = {**KEYS, "protocol": "exposed"}
    tables = load_spaces(keys, data, retrieval)
    sizes = {"item_popularity": (data.n_items,), "item_features": (data.n_items, 0), "user_features": (data.n_users, 0)}
    zeros = {name: torch.zeros(size) for name, size in sizes.items()}
    catalogue = Catalogue(n_users=data.n_users, n_items=data.n_items, **zeros, spaces=tables)
    requests = assemble(keys, build_candidates(keys, data, retrieval), catalogue)
    affinity = Affinity(tables, ["mean"], standardised=False)
    for name in ("train", "valid", "test"):
        slate = next(iter(SlateLoader(requests[name], 500, shuffle=False)))
        expected = user_fold(slate.users, 3) if name == "train" else torch.zeros_like(slate.users)
        assert torch.equal(slate.fold, expected)
        found = affinity(slate)
        for row in range(0, len(slate.users), 7):
            history = slate.history[row][slate.history_mask[row]]
            space = tables["covisit"][:, int(expected[row])]
            mean = (space[0][slate.candidates[row]] @ space[1][history].T).mean(1).nan_to_num()
            assert torch.allclose(found[row, :, 1], torch.where(slate.mask[row], mean, found[row, :, 1]), atol=1e-6)


def test_a_plugin_adds_a_space():
    @register_space("parity")
    def parity(known):
        ids = torch.arange(known.n_items)
        return torch.stack([ids % 2, 1 - ids % 2], dim=1)

    table = build_spaces(["parity", "svd"], known_of([[1, 2], [1, 2, 3]], n_items=4))["parity"]
    assert cosine(table, 1, 3) == 1.0 and cosine(table, 1, 2) == 0.0 and (table[:, :, 0] == 0).all()


def test_an_unknown_space_is_named():
    with pytest.raises(UnknownNameError, match="affinity_spaces: 'bert' is unknown; choose from factors, svd, covisit"):
        build_spaces(["svd", "bert"], known_of([[1, 2]], n_items=2))


def test_a_space_that_cannot_be_built_is_left_out_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, "dnr_recbole"):
        found = build_spaces(["factors", "svd"], known_of([[1, 2], [1, 2, 3]], n_items=3))
    assert list(found) == ["svd"]
    assert "left out, for want of vectors or data: factors" in caplog.text


def test_no_space_is_made_that_nobody_reads():
    data = random_interactions(1)
    for kind, n in {"none": 0, "attention": 0, "affinity": 2, "both": 2}.items():
        found = load_spaces({**KEYS, "history_interaction": kind, "protocol": "retrieved"}, data, halved(data))
        assert len(found) == n


def test_stored_spaces_are_read_again_and_other_settings_make_others(tmp_path):
    data = random_interactions(1)
    keys = {**KEYS, "protocol": "retrieved", "use_cache": True, "cache_dir": str(tmp_path)}
    first = load_spaces(keys, data, halved(data))
    count = len([p for p in tmp_path.iterdir() if p.is_dir()])
    again = load_spaces(keys, data, halved(data))
    assert count == 1 and all(torch.equal(first[name], again[name]) for name in first)
    for changes in ({"affinity_dim": 3}, {"affinity_spaces": ["svd"]}, {"protocol": "exposed"}):
        load_spaces({**keys, **changes}, data, halved(data))
        count += 1
        assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == count


def test_a_log_too_small_for_any_space_gives_none():
    none = np.zeros(0, dtype=np.int64)
    known = Known(none, none, 3, 4, 2)
    assert build_spaces(["svd", "covisit"], known) == {}
