"""A request has one answer, whatever else is scored with it, and what goes wrong belongs to those who asked for it."""

from __future__ import annotations

import asyncio

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_helpers import FAST, rich

from dnr_recbole import Reranker
from dnr_recbole.artefact import load_artefact
from dnr_recbole.serving.batching import Batcher
from dnr_recbole.serving.models import Models, ServedModel
from dnr_recbole.serving.schema import RankRequest
from dnr_recbole.serving.scoring import rank

FEATURES = ["price", "device", "embedding", "tags", "category"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("batches")
    Reranker("PRM", **{**FAST, "log_features": FEATURES, "score_calibration": "logistic"}).fit(rich(150)).save(
        path / "m"
    )
    return path / "m"


@pytest.fixture(scope="module")
def artefact(folder):
    return load_artefact(folder)


single = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(-1e4, 1e4), st.text(max_size=5),
    st.sampled_from(["7", "7.0", "web", "1e3", " 2 ", "True", "x", 7, 7.0, 2**53 + 1, 10**18, "9" * 30, 1e300]),
)  # fmt: skip
value = st.one_of(single, st.lists(single, max_size=4), st.lists(st.floats(-3, 3), min_size=3, max_size=3))


@st.composite
def one_request(draw):
    names = draw(st.lists(st.integers(0, 45), min_size=1, max_size=9, unique=True))
    numbered = draw(st.booleans())
    features = st.dictionaries(st.sampled_from(FEATURES[:-1]), value)
    items = [
        {"score": draw(st.floats(0, 1)), "category": draw(single), **draw(features),
         "item_id": number if numbered else f"i{number}"}
        for number in names
    ]  # fmt: skip
    if draw(st.booleans()):
        items[0]["score_2"] = draw(st.one_of(st.none(), st.floats(-1e5, 1e5)))
    out = {"items": items, "user_id": draw(st.sampled_from([None, "u3", 3, "stranger"]))}
    if draw(st.booleans()):
        out["history"] = draw(st.lists(st.sampled_from(["i1", "i2", 3, "nothing"]), max_size=5))
    return out


@settings(derandomize=True, database=None, deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
@given(contents=st.lists(one_request(), min_size=2, max_size=5))
def test_a_request_has_the_same_answer_alone_and_beside_others(artefact, contents):
    requests = [RankRequest.model_validate(content) for content in contents]
    for request, beside in zip(requests, rank(artefact, requests)):
        (alone,) = rank(artefact, [request])
        scores = np.empty((2, len(request.items)))
        for row, one in zip(scores, (alone, beside)):
            row[one.candidate] = one.score
        # Similarities that hardly differ are standardised, which makes more of rounding (1e-4 was met); what another
        # request says would move a score by more.
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3, atol=1e-3)
        assert (
            alone.incoming[np.argsort(alone.candidate)].tolist()
            == beside.incoming[np.argsort(beside.candidate)].tolist()
        )


def test_features_are_read_as_offline(folder, artefact):
    frame = rich(6, seed=4).drop(columns=["label", "timestamp"])
    offline = Reranker.load(folder).rank(frame).set_index(["request_id", "item_id"]).rerank_score
    for name, rows in frame.groupby("request_id", sort=False):
        items = rows.drop(columns=["request_id", "user_id"]).to_dict("records")
        items = [
            {**item, "embedding": [float(x) for x in item["embedding"]], "tags": list(item["tags"])} for item in items
        ]
        request = RankRequest.model_validate({"user_id": rows.user_id.iloc[0], "items": items})
        (found,) = rank(artefact, [request])
        expected = offline[[(name, items[number]["item_id"]) for number in found.candidate]]
        np.testing.assert_allclose(found.score, expected, rtol=1e-5, atol=1e-6)
        for feature in FEATURES:
            less = [{**item, feature: None} for item in items]
            (without,) = rank(artefact, [RankRequest.model_validate({"user_id": rows.user_id.iloc[0], "items": less})])
            assert not np.allclose(np.sort(found.score), np.sort(without.score)), f"{feature} is read"


def test_held_out_requests_bring_their_features(folder, artefact):
    frame = rich(150).set_index(["user_id", "item_id", "score"])
    for sample in ServedModel.load("m", str(folder)).samples[:10]:
        request = RankRequest.model_validate(sample["request"])
        for item in request.items:
            found = frame.loc[[(request.user_id, item.item_id, item.given["score"])]].iloc[0]
            for name in FEATURES:
                assert np.array_equal(np.asarray(item.given[name]), np.asarray(found[name])), name
        ranked = Reranker.load(folder).rank(
            pd.DataFrame(
                [
                    {"request_id": "r", "user_id": request.user_id, "item_id": i.item_id, **i.given}
                    for i in request.items
                ]
            )
        )
        stored = RankRequest.model_validate({**sample["request"], "history": None})
        (online,) = rank(artefact, [stored])
        np.testing.assert_allclose(np.sort(ranked.rerank_score), np.sort(online.score), atol=1e-5)


# ------------------------------------------------------------------ what goes wrong


def test_who_brings_a_model_down_is_told_alone(folder):
    models = Models({"m": str(folder)})
    good, bad = (RankRequest.model_validate({"items": [{"item_id": name, "score": 0.5}]}) for name in ("good", "bad"))

    def fails(served, requests, explain):
        if bad in requests:
            raise RuntimeError("the model does not like it")
        return rank(served.artefact, requests)

    batcher = Batcher(models, rank=fails)

    async def together():
        return await asyncio.gather(
            *(batcher.rank("m", [one], False, 30) for one in (good, bad, good)), return_exceptions=True
        )

    for _ in range(20):  # whatever waits together
        first, second, third = asyncio.run(together())
        assert first.ranked and third.ranked and isinstance(second, RuntimeError)
    assert batcher.alive and batcher.waiting == 0
    batcher.stop()
