"""Interactions: order, labels, and cutting every user by time."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from dnr_recbole.data.interactions import PART_FIELD, Interactions
from dnr_recbole.errors import DataError

CONFIG = {"RATING_FIELD": "rating", "label_threshold": 3}


def dataset(frame, time_field="timestamp"):
    frame = pd.DataFrame(frame)
    return SimpleNamespace(
        inter_feat=frame, dataset_name="toy", uid_field="user_id", iid_field="item_id", time_field=time_field,
        user_num=int(frame["user_id"].max()) + 1 if len(frame) else 1,
        item_num=int(frame["item_id"].max()) + 1 if len(frame) else 1,
    )  # fmt: skip


def random_interactions(n=500, users=20, seed=0):
    rng = np.random.default_rng(seed)
    frame = {
        "user_id": rng.integers(1, users + 1, n),
        "item_id": rng.integers(1, 50, n),
        "rating": rng.integers(1, 6, n).astype(float),
        "timestamp": rng.integers(0, 40, n).astype(float),  # many ties
    }
    return Interactions.from_recbole(dataset(frame), CONFIG), pd.DataFrame(frame)


def test_order_is_user_time_file():
    data, frame = random_interactions()
    expected = frame.sort_values(["user_id", "timestamp"], kind="stable")
    assert np.array_equal(data.row, expected.index)
    assert np.array_equal(data.user, expected["user_id"])
    assert np.array_equal(data.item, expected["item_id"])
    assert np.array_equal(data.click, expected["rating"] >= 3)
    for user in range(data.n_users):
        assert (data.user[data.ptr[user] : data.ptr[user + 1]] == user).all()
    assert data.ptr[-1] == len(data) == 500


def test_seconds_that_tie_in_float32_keep_their_order():
    start = 1_600_000_000.0
    assert np.float32(start) == np.float32(start + 1)
    frame = {
        "user_id": [1, 1, 1],
        "item_id": [1, 2, 3],
        "rating": [5.0] * 3,
        "timestamp": [start + 2, start + 1, start],
    }
    assert Interactions.from_recbole(dataset(frame), CONFIG).item.tolist() == [3, 2, 1]


def test_own_files_order_equal_times():
    frame = {"user_id": [1] * 4, "item_id": [1, 2, 3, 4], "timestamp": [5.0, 5.0, 5.0, 4.0], PART_FIELD: [2, 0, 1, 2]}
    data = Interactions.from_recbole(dataset({**frame, "rating": [5.0] * 4}), CONFIG)
    assert data.item.tolist() == [4, 2, 3, 1] and data.part.tolist() == [2, 0, 1, 2] and data.part.dtype == np.int8


def test_without_rating_everything_is_a_click():
    data = Interactions.from_recbole(dataset({"user_id": [1, 2], "item_id": [1, 1], "timestamp": [1.0, 2.0]}), CONFIG)
    assert data.rating is None and data.click.all()


def test_without_time_the_file_order_counts():
    frame = {"user_id": [2, 1, 2], "item_id": [5, 4, 3]}
    assert Interactions.from_recbole(dataset(frame, time_field=None), CONFIG).item.tolist() == [4, 5, 3]


def test_errors_name_the_cause():
    built = dataset({"user_id": [1], "item_id": [1]})
    built.inter_feat = object()
    with pytest.raises(DataError, match="right after create_dataset"):
        Interactions.from_recbole(built, CONFIG)
    with pytest.raises(DataError, match="no interaction left"):
        Interactions.from_recbole(dataset({"user_id": [], "item_id": []}), CONFIG)
    with pytest.raises(DataError, match="not numeric"):
        Interactions.from_recbole(dataset({"user_id": [1], "item_id": [1], "timestamp": ["May"]}), CONFIG)


@pytest.mark.parametrize(
    "length, fraction, earlier", [(1, 0.8, 1), (2, 0.4, 1), (5, 0.8, 4), (10, 0.7, 7), (100, 0.29, 29)]
)
def test_split_position_is_the_floor_but_at_least_one(length, fraction, earlier):
    frame = {"user_id": [1] * length, "item_id": [1] * length, "timestamp": np.arange(length)}
    data = Interactions.from_recbole(dataset(frame), CONFIG)
    assert data.split_positions(fraction)[1] == earlier
    assert data.split_positions(fraction)[0] == 0  # the padding user has none
