"""Request logs with positions, propensities, grades, several objectives and sample weights."""

from __future__ import annotations

import pandas as pd
import pytest
from feedback_helpers import KEYS, binary, built, log_of

from dnr_recbole import Reranker
from dnr_recbole.data.splits import TRAIN
from dnr_recbole.errors import ConfigError, DataError


def of(data, name, frame):
    """A column of the table in the order of the frame."""
    table, texts = data.data.train.table, data.preprocessor.items.texts()
    column = {text: number for number, text in enumerate(texts)}
    request = frame.request_id.str[1:].astype(int).to_numpy()
    rows = frame.item_id.map(column).to_numpy()
    place = (table.candidates.numpy()[request] == rows[:, None]).argmax(1)
    return getattr(table, name).numpy()[request, place]


def test_without_keys_nothing_of_it_is_read():
    frame = binary(log_of())
    ours, plain = built(frame), built(frame.drop(columns=["examination", "randomised", "intended_position", "watched"]))
    table = ours.data.train.table
    assert table.position is None and table.weights is None and table.targets is None and table.propensity is None
    assert ours.data.digest() == plain.data.digest()


@pytest.mark.parametrize("form", ["parquet", "csv", "lists"])
def test_the_table_holds_where_candidates_were_shown(form, tmp_path):
    frame = binary(log_of(60))
    if form == "lists":
        lists = [name for name in frame if name not in ("request_id", "user_id", "randomised")]
        grouped = frame.groupby("request_id", sort=False)
        source = grouped[lists].agg(list).join(grouped[["user_id", "randomised"]].first()).reset_index()
    else:
        source = str(tmp_path / f"log.{form}")
        getattr(frame, f"to_{form}")(source, index=False)
    found = built(source, propensity="column")
    assert (of(found, "position", frame) == frame.position.fillna(-1)).all()
    assert (of(found, "randomised", frame) == frame.randomised).all()
    assert of(found, "examination", frame) == pytest.approx(frame.examination, rel=1e-5)
    weights = of(found, "weights", frame)
    clicked = (frame.label == 1) & frame.exposed
    trained = clicked & (found.data.train.table.split.numpy()[frame.request_id.str[1:].astype(int)] == TRAIN)
    raw = 1 / frame.examination
    assert weights[trained] == pytest.approx(raw[trained] / raw[trained].mean(), rel=1e-5)
    assert (weights[~clicked] == 1).all()


def test_propensity_is_read_where_there_is_no_examination():
    frame = binary(log_of(80)).drop(columns="examination")
    found = built(frame.assign(propensity=frame.examination if "examination" in frame else 0.5), propensity="column",
                  propensity_normalise=False)  # fmt: skip
    clicked = ((frame.label == 1) & frame.exposed).to_numpy()
    assert of(found, "weights", frame)[clicked] == pytest.approx(2.0)


def test_a_cache_made_without_positions_is_not_taken_for_one_with_them(tmp_path):
    frame = binary(log_of(60))
    frame.to_parquet(tmp_path / "log.parquet")
    keys = {"use_cache": True, "cache_dir": str(tmp_path / "cache")}
    assert built(str(tmp_path / "log.parquet"), **keys).data.train.table.position is None
    assert built(str(tmp_path / "log.parquet"), **keys, propensity="em").data.train.table.position is not None


@pytest.mark.parametrize("name", ["column", "random", "em"])
def test_a_reranker_is_fitted_with_propensities_and_ranks_without_any(name):
    frame = binary(log_of())
    model = Reranker("PRM", **KEYS, propensity=name, position_input="logit").fit(frame)
    requests = frame.head(12)[["request_id", "user_id", "item_id", "score"]]
    assert len(model.rank(requests)) == 12
    pd.testing.assert_frame_equal(model.rank(requests), model.rank(requests.assign(position=0)))


def test_grades_are_targets_and_positives_above_a_threshold():
    frame = log_of()
    found = built(frame, label_grades=4, positive_grade=3)
    assert of(found, "targets", frame) == pytest.approx((2.0**frame.label - 1) / 15, rel=1e-5)
    assert (of(found, "labels", frame) == (frame.label >= 3)).all()
    keys = dict(metrics=["NDCG", "GNDCG"], valid_metric="GNDCG@6", label_grades=4)
    model = Reranker("PRM", **{**KEYS, "epochs": 4}, **keys).fit(frame)
    assert 0 < model.metrics["gndcg@6"] <= 1
    again = model.evaluate(log_of(seed=1))
    assert 0 < again.metrics["PRM"]["gndcg@6"] <= 1


def test_grades_out_of_range_are_named():
    frame = log_of(60)
    frame.loc[7, "label"] = 9
    with pytest.raises(DataError, match="no grade from 0 to 4.*9"):
        built(frame, label_grades=4)
    with pytest.raises(DataError, match="neither 0 nor 1"):
        built(log_of(60))
    with pytest.raises(ConfigError, match="positive_grade=3 is above label_grades=2"):
        built(frame, label_grades=2, positive_grade=3)


def test_several_objectives_are_one_target():
    frame = binary(log_of())
    found = built(frame, objectives={"label": 1, "watched": 3})
    assert of(found, "targets", frame) == pytest.approx((frame.label + 3 * frame.watched) / 4, rel=1e-5)
    model = Reranker("PRM", **KEYS, objectives={"label": 1, "watched": 3}).fit(frame)
    assert model.evaluate(frame.drop(columns="watched")).metrics["PRM"]["ndcg@6"] > 0


def test_wrong_objectives_are_refused():
    frame = binary(log_of(60))
    with pytest.raises(DataError, match="no column 'wached'.*watched"):
        built(frame, objectives={"wached": 1})
    with pytest.raises(ConfigError, match="weight of watched must be a number above 0"):
        built(frame, objectives={"watched": -1})
    with pytest.raises(DataError, match="an objective is missing or outside"):
        built(frame.assign(watched=frame.watched * 60), objectives={"watched": 1})
    with pytest.raises(DataError, match="'watched' is feedback"):
        built(frame, objectives={"watched": 1}, log_features=["watched"])
    assert "watched" not in built(frame, objectives={"watched": 1}, log_features=["w*"]).preprocessor.columns.features


def test_sample_weights_have_mean_one_over_the_training():
    frame = binary(log_of())
    found = built(frame, sample_weight="importance")
    weights = of(found, "weights", frame)
    table = found.data.train.table
    trained = (table.split.numpy()[frame.request_id.str[1:].astype(int)] == TRAIN) & frame.exposed
    assert weights[trained].mean() == pytest.approx(1, rel=1e-4)
    assert weights == pytest.approx(frame.importance.to_numpy() * weights[0] / frame.importance[0], rel=1e-5)
    with pytest.raises(DataError, match="sample weight is missing, negative"):
        built(frame.assign(importance=-1.0), sample_weight="importance")
    with pytest.raises(DataError, match="training candidates are 0"):
        built(frame.assign(importance=0.0), sample_weight="importance")


def test_propensities_and_sample_weights_multiply():
    frame = binary(log_of())
    both = built(frame, sample_weight="importance", propensity="column", propensity_normalise=False)
    one = built(frame, sample_weight="importance")
    clicked = ((frame.label == 1) & frame.exposed).to_numpy()
    factor = of(both, "weights", frame) / of(one, "weights", frame)
    assert factor[clicked] == pytest.approx(1 / frame.examination[clicked], rel=1e-4)
    assert factor[~clicked] == pytest.approx(1.0)


def test_values_that_mean_nothing_are_named():
    frame = binary(log_of(60))
    for column, value, message in (
        ("examination", 1.5, r"examination is outside \(0, 1\]"),
        ("randomised", "perhaps", "neither true nor false"),
        ("intended_position", -2, "no number from 0 on"),
    ):
        wrong = frame.assign(**{column: frame[column].astype(object)})
        wrong.loc[3, column] = value
        with pytest.raises(DataError, match=message):
            built(wrong, propensity="em")
    lacking = frame.assign(examination=frame.examination.where(frame.index != 8))
    with pytest.raises(DataError, match="was shown without a propensity"):
        built(lacking.assign(exposed=True, position=frame.index % 6), propensity="column")
    with pytest.raises(ConfigError, match="need positions"):
        built(frame.drop(columns="position"), propensity="em")
