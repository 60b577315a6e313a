"""The retriever never learns an answer: where its part ends, and the guard that says so."""

from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import CONFIG, as_lists, make_interactions, make_retrieval, random_interactions

from dnr_recbole.config import Config
from dnr_recbole.data import candidates as module
from dnr_recbole.data.cut import check_cut, retriever_end
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.loading import load_recbole_dataset
from dnr_recbole.data.requests import make_requests, retriever_part
from dnr_recbole.data.splits import TEST, TRAIN, VALID
from dnr_recbole.errors import ConfigError, DataError
from dnr_recbole.retriever.training import FIT, split_codes


def contaminated(data, requests, end, split):
    """Share of the requests of ``split`` with an interaction in the retriever's part."""
    part = retriever_part(data, end)
    rows = np.flatnonzero(requests.split == split)
    return np.mean([part[requests.start[r] : requests.end[r]].any() for r in rows])


def clicks(*flags):
    return [(1 + i, bool(f)) for i, f in enumerate(flags)]


def test_where_the_part_ends_by_hand():
    users = [
        clicks(*[1] * 10),  # 5 lists: validation begins at 6
        clicks(1, 1, 1, 1, 0, 0, 0, 0, 1, 1),  # lists with a click at 0, 2, 8: validation begins at 2
        clicks(0, 0, 0, 0, 1, 1),  # test alone, at 4
        clicks(1, 1, 1),  # its only list begins at 0: unknown to the retriever
        clicks(1),  # no list: nothing to guard
        clicks(0, 0, 0, 0),  # no click: no list
    ]
    data = make_interactions(users, n_items=10)

    def ends(fraction, **changes):
        return (retriever_end({**CONFIG, "retriever_fraction": fraction, **changes}, data) - data.ptr[:-1]).tolist()

    assert ends(0.8) == [0, 6, 2, 4, 0, 1, 3]
    assert ends(0.5) == [0, 5, 2, 3, 0, 1, 2]
    assert ends(0.8, split="user") == ends(0.8, protocol="retrieved") == [0, 8, 8, 4, 2, 1, 3]


def test_held_out_users_ask_after_the_retrievers_part():
    data = random_interactions(4, n_users=80, longest=40)
    config = {**CONFIG, "split": "user"}
    end = retriever_end(config, data)
    requests = make_requests(config, data, end)
    held_out = requests.split != TRAIN
    assert held_out.any() and (requests.start >= end[requests.user])[held_out].all()
    assert (requests.start < end[requests.user])[~held_out].any()  # training users ask as before
    able = {u for u in np.unique(requests.user[requests.start >= end[requests.user]])}
    drawn = [len(np.unique(requests.user[requests.split == code])) for code in (VALID, TEST)]
    assert abs(drawn[0] - len(able) / 10) <= 1 and abs(drawn[1] - len(able) / 10) <= 1
    assert not set(requests.user[held_out]) & set(requests.user[~held_out])


@pytest.mark.parametrize("seed", range(4))
def test_no_evaluated_label_is_in_the_retrievers_part(seed):
    """It was: 80 % of a user cut through his last lists."""
    data = random_interactions(seed, n_users=60, longest=30)
    config = {**CONFIG, "retriever_fraction": 0.8}
    requests = make_requests(config, data, retriever_end(config, data))
    for split in (VALID, TEST):
        assert contaminated(data, requests, data.split_positions(0.8), split) > 0
        assert contaminated(data, requests, retriever_end(config, data), split) == 0


def test_ml_100k_was_contaminated_and_is_not():
    config = Config(model="PRM", dataset="ml-100k", config_dict={"state": "ERROR", "protocol": "exposed"})
    data = Interactions.from_recbole(load_recbole_dataset(config), config)
    requests = make_requests(config, data, retriever_end(config, data))
    assert contaminated(data, requests, data.split_positions(0.8), TEST) == pytest.approx(0.297, abs=5e-4)
    assert contaminated(data, requests, data.split_positions(0.8), VALID) == pytest.approx(0.519, abs=5e-4)
    fitted = split_codes(config, data) <= 1
    for split in (VALID, TEST):
        assert contaminated(data, requests, retriever_end(config, data), split) == 0
    assert 0.7 < fitted.mean() < 0.8


@pytest.mark.parametrize(
    "protocol, split, shown",
    [("exposed", "last", "valid"), ("exposed", "user", "valid"), ("retrieved", "last", "train"),
     ("retrieved", "user", "train")],
)  # fmt: skip
def test_a_retriever_that_knows_labels_is_refused(protocol, split, shown):
    data = random_interactions(1, n_users=40, longest=40)
    config = {**CONFIG, "protocol": protocol, "split": split}
    retrieval = make_retrieval(data)
    retrieval.split = split_codes(config, data)
    assert len(module.PROTOCOLS[protocol](config, data, retrieval))
    retrieval.split = np.where(np.arange(len(data)) < data.split_positions(0.95)[data.user], 0, 2)
    with pytest.raises(DataError, match=f"fitted on labels: .* {shown} requests"):
        module.PROTOCOLS[protocol](config, data, retrieval)


@pytest.mark.parametrize("protocol", ["exposed", "retrieved"])
@pytest.mark.parametrize("code", [TRAIN, VALID, TEST])
def test_the_guard_sees_a_single_label(protocol, code):
    for parts in (False, True):
        data = random_interactions(2, n_users=40, longest=40, parts=parts)
        config = {**CONFIG, "protocol": protocol, "label_window": 2}
        end = retriever_end(config, data)
        requests, fitted = make_requests(config, data, end), retriever_part(data, end)
        check_cut(protocol, data, requests, fitted)
        row = np.flatnonzero(requests.split == code)[-1]
        for position in (requests.start[row], requests.end[row] - 1):
            wrong = fitted.copy()
            wrong[position] = True
            if protocol == "exposed" and code == TRAIN:
                check_cut(protocol, data, requests, wrong)  # training lists may lie in the retriever's part
                continue
            with pytest.raises(DataError, match="fitted on labels"):
                check_cut(protocol, data, requests, wrong)


# ---------------------------------------------------------------- files of the user's own


def own(text):
    """ "a10 b02": item a, clicked, train file; item b, not clicked, test file."""
    return [("abcdefghij".index(i) + 1, c == "1", p) for i, c, p in ((w[0], w[1], int(w[2])) for w in text.split())]


def test_own_files_by_hand():
    """Test lines that lie before train lines in time stay test."""
    data = make_interactions([own("a10 b10 c12 d10 e11 f10 g10 h12 i11 j12")], n_items=10)
    config = {**CONFIG, "protocol": "retrieved", "label_window": 2, "request_stride": 2, "retriever_fraction": 0.4}
    end = retriever_end(config, data)
    assert end.tolist() == [0, 2] and np.flatnonzero(retriever_part(data, end)).tolist() == [0, 1]
    requests = make_requests(config, data, end)
    found = list(zip(requests.split.tolist(), requests.start.tolist(), requests.end.tolist(), requests.n_positives))
    # test lines 2, 7, 9; training lines 3, 5, 6; validation lines 4, 8
    assert found == [(TEST, 2, 8, 2), (TRAIN, 3, 6, 2), (VALID, 4, 9, 2)]
    retrieval = make_retrieval(data)
    retrieval.split = split_codes(config, data)
    table = module.build_retrieved({**config, "n_candidates": 8, "history_length": 9}, data, retrieval)

    def letters(items, mask):
        return ["".join(sorted("abcdefghij"[i - 1] for i in row[m].tolist())) for row, m in zip(items, mask)]

    assert letters(table.history, table.history_mask) == ["ab", "ab", "abd"]  # training does not know test line c
    assert letters(table.candidates, table.labels) == ["ch", "df", "ei"]


@pytest.mark.parametrize("protocol", ["exposed", "retrieved"])
def test_own_files_stay_apart(protocol):
    data = random_interactions(7, n_users=60, n_items=60, longest=40, parts=True)
    config = {**CONFIG, "protocol": protocol, "label_window": 3}
    codes = split_codes(config, data)
    assert (data.part[codes < 2] == TRAIN).all()
    for user, events in enumerate(as_lists(data), 1):  # the older half of his train lines
        train = [data.ptr[user] + p for p, event in enumerate(events) if event[2] == 0]
        assert [p for p in train if codes[p] < 2] == train[: max(1, len(train) // 2)]
    # What the validation and test files hold changes no training request.
    other = Interactions(
        **{**vars(data), "item": np.where(data.part == TRAIN, data.item, data.item % 60 + 1),
           "click": data.click ^ (data.part != TRAIN)}
    )  # fmt: skip
    tables = []
    for d in (data, other):
        retrieval = make_retrieval(d)
        retrieval.split = split_codes(config, d)
        tables.append(module.PROTOCOLS[protocol](config, d, retrieval))
    first, second = ((t.candidates[t.split == 0], t.labels[t.split == 0], t.history[t.split == 0]) for t in tables)
    assert len(first[0]) and all((a == b).all() for a, b in zip(first, second))


def test_own_files_make_another_digest():
    data = random_interactions(7, parts=True)
    other = Interactions(**{**vars(data), "part": 2 - data.part})
    assert len({x.digest() for x in (data, other, Interactions(**{**vars(data), "part": None}))}) == 3


@pytest.mark.parametrize(
    "source, value, refused",
    [("the command line", "last", True), ("config_dict", "user", True), ("config_dict", "last", False)],
)
def test_split_is_refused_beside_own_files(source, value, refused):
    """A whole config that is fed back in names every key, so its default there is no wish."""

    class Given(SimpleNamespace):
        def __getitem__(self, key):
            return {**CONFIG, "benchmark_filename": ["train", "valid", "test"]}[key]

    config = Given(
        external_config_dict={"split": value}, internal_config_dict={"split": "last"}, _sources={"split": source}
    )
    data = random_interactions(7, parts=True)
    if refused:
        with pytest.raises(ConfigError, match=rf"split='{value}' \(from {source}\): benchmark_filename="):
            retriever_end(config, data)
    else:
        retriever_end(config, data)
    retriever_end(CONFIG, data)


def test_validation_is_the_last_tenth_of_the_part():
    data = random_interactions(3, n_users=40, longest=60, parts=True)
    for d, protocol in ((data, "exposed"), (Interactions(**{**vars(data), "part": None}), "retrieved")):
        codes = split_codes({**CONFIG, "protocol": protocol}, d)
        for user in range(1, d.n_users):
            mine = codes[d.ptr[user] : d.ptr[user + 1]]
            mine = mine[mine < 2]
            assert (mine == FIT).sum() == min(max(int(len(mine) * 0.9 + 1e-9), 1), len(mine))
            assert (np.diff(mine) >= 0).all()
