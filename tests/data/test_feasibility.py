"""Data without requests is refused before anything is trained, with the reason in words."""

import logging

import numpy as np
import pytest
from data_helpers import CONFIG, make_interactions, random_interactions

from dnr_recbole import quick_start
from dnr_recbole.config import Config
from dnr_recbole.data.feasibility import check_feasible
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.errors import DataError, UnknownNameError
from dnr_recbole.sources import recbole as recbole_source

DEFAULTS = {**CONFIG, "slate_size": 6, "label_window": 24, "request_stride": 6, "retriever_fraction": 0.8}


def log(lengths, n_items=100, favourites=0, seed=0, click=1.0, parts=None):
    """Users with that many interactions; with ``favourites``, each only ever takes one of so many items."""
    rng = np.random.default_rng(seed)
    users = []
    for n in lengths:
        pool = rng.permutation(n_items)[: favourites or n_items] + 1
        items = rng.choice(pool, n, replace=bool(favourites))
        events = [(int(i), bool(rng.random() < click)) for i in items]
        if parts is not None:
            events = [(*event, part) for event, part in zip(events, parts(n))]
        users.append(events)
    return make_interactions(users, n_items)


def refusal(data, **changes):
    with pytest.raises(DataError) as caught:
        check_feasible({**DEFAULTS, **changes}, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", ["exposed", "retrieved"])
def test_ratings_below_the_threshold(protocol):
    data = log([40] * 30, click=0.0)
    data = Interactions(**{**vars(data), "rating": (np.arange(len(data)) % 2).astype(np.float32)})
    text = refusal(data, protocol=protocol)
    assert "highest rating is 1, so nothing reaches label_threshold=3: set label_threshold=1 (or RATING_FIELD" in text


def test_short_users_under_exposed():
    data = log([1, 2, 3, 4, 5, 6] * 20 + [13] * 4)
    assert "needs 3 x slate_size = 18 interactions" in refusal(data) and "0 of 124 users have them" in refusal(data)
    assert "no request for train from" in refusal(data)
    check_feasible(DEFAULTS, log([18]))
    assert "slate_size = 6 after the retriever's part" in refusal(log([20] * 50), split="user")
    assert "0 of 50 users" in refusal(log([20] * 50), split="user")


def test_short_users_under_retrieved():
    text = refusal(log([100] * 30), protocol="retrieved")
    assert "makes no request for train, valid from" in text
    assert "a user needs 72 interactions after the retriever's part" in text and "about 360 in all" in text
    assert "0 of 30 users have them" in text
    check_feasible({**DEFAULTS, "protocol": "retrieved"}, log([360] * 3, n_items=400))
    changes = {"protocol": "retrieved", "request_stride": 7}  # windows begin at 0, 28 and 56
    assert "a user needs 80 interactions" in refusal(log([395] * 3, n_items=400), **changes)
    check_feasible({**DEFAULTS, **changes}, log([400] * 3, n_items=400))
    text = refusal(log([20] * 50), protocol="retrieved", split="user")
    assert "needs 6 interactions after the retriever's part" in text and "0 of 50 users" in text
    assert "3 of 3 users" in refusal(log([100] * 3), protocol="retrieved", split="user")


def test_repeats_are_the_reason_and_repeatable_the_remedy(caplog):
    data = log([70] * 60, favourites=8)
    for split in ("last", "user"):
        text = refusal(data, protocol="retrieved", split=split)
        assert "99.8% of the clicks after the retriever's part are repeats: set repeatable=True" in text
    assert "a user needs 72" in refusal(data, protocol="retrieved", split="last")  # the second reason
    check_feasible({**DEFAULTS, "protocol": "retrieved", "split": "user", "repeatable": True}, data)
    caplog.set_level(logging.INFO)
    check_feasible({**DEFAULTS, "protocol": "retrieved", "split": "user"}, log([70] * 60, favourites=40))
    assert "% of the clicks after the retriever's part are repeats" in caplog.text
    caplog.clear()
    check_feasible({**DEFAULTS, "protocol": "retrieved", "split": "user"}, log([70] * 60))
    assert "repeats" not in caplog.text


def test_few_clicks():
    text = refusal(log([40] * 5, click=0.005, seed=4))
    assert "are clicks at label_threshold=3" in text


def test_own_files_that_are_too_short():
    def leave_one_out(n):
        return [0] * (n - 2) + [1, 2]

    data = log([40] * 20, parts=leave_one_out)
    text = refusal(data)
    assert "a user needs at least 6 interactions in the valid file (slate_size=6) and 0 of 20 users have them" in text
    assert "in the test file" in text
    check_feasible({**DEFAULTS, "protocol": "retrieved"}, data)  # one line of a file is a request there
    text = refusal(log([10] * 20, parts=leave_one_out), protocol="retrieved")
    assert "6 interactions in the train file after the retriever's part" in text


def test_repeatable_says_that_exclude_seen_has_no_effect(caplog):
    caplog.set_level(logging.INFO)
    data = random_interactions(0, n_users=40, longest=40)
    check_feasible({**CONFIG, "exclude_seen": True}, data)
    assert "exclude_seen" not in caplog.text
    check_feasible({**CONFIG, "exclude_seen": True, "repeatable": True}, data)
    assert "exclude_seen has no effect" in caplog.text


def test_unknown_split_is_named():
    with pytest.raises(UnknownNameError, match="'other' is unknown; choose one of .*user"):
        check_feasible({**CONFIG, "split": "other"}, random_interactions(0))


def test_nothing_is_trained_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "zero"
    folder.mkdir()
    rows = [f"u{u}\ti{(u + 3 * t) % 60}\t{t % 2}\t{t}" for u in range(40) for t in range(30)]
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "zero.inter").write_text("\n".join([head, *rows]) + "\n")
    monkeypatch.setattr(recbole_source, "train_retriever", lambda *a: pytest.fail("trained"))
    config = Config("PRM", "zero", config_dict={"data_path": str(tmp_path), "n_candidates": 20, "state": "ERROR"})
    with pytest.raises(DataError, match="highest rating is 1"):
        quick_start.prepare(config)
