"""LambdaMART: columns, trees, what it starts from, its text in a checkpoint, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from dnr_recbole.cli import main
from dnr_recbole.errors import CheckpointError, ConfigError
from dnr_recbole.model.inputs.score_fusion import log_odds
from dnr_recbole.model.reranker.lambdamart import evenly
from dnr_recbole.quick_start import run_dnr
from dnr_recbole.testing import build, random_catalogue, random_slate
from dnr_recbole.trainer.checkpoint import load_reranker

pytest.importorskip("lightgbm")

FINE = {"min_data_in_leaf": 1, "lambda_l2": 0.0, "feature_fraction": 1.0, "bagging_fraction": 1.0}
WORLD = {
    "model": "LambdaMART", "dataset": "synthetic", "synthetic_users": 150, "synthetic_items": 60, "n_candidates": 12,
    "use_gpu": False,
}  # fmt: skip


def requests(seed: int, n: int = 64):
    return random_slate(seed, batch=n, ragged=False)


def labelled(slate, values, threshold):
    """Positive where ``values`` ``[B, n]`` are above ``threshold``."""
    return dataclasses.replace(slate, labels=(values > threshold).float())


def fitted(train, valid, **keys):
    model = build("LambdaMART", **{**FINE, **keys})
    model.fit([train], [valid])
    return model


def test_it_learns_a_threshold_of_one_column_and_says_which(caplog):
    caplog.set_level("INFO")
    names = build("LambdaMART").columns
    column = next(number for number, name in enumerate(names) if name.endswith(".last5"))
    sets = [requests(seed) for seed in (1, 2, 3)]
    values = [build("LambdaMART").encode(slate).candidates[..., column] for slate in sets]
    train, valid, test = (labelled(slate, v, 0.2) for slate, v in zip(sets, values))
    model = fitted(train, valid)
    right = (model.predict(test) > 0) == test.labels.bool()
    assert 0.1 < test.labels.mean() < 0.9 and right.float().mean() > 0.99
    assert f"gain: {names[column]} " in caplog.text


def test_columns_are_those_of_the_shared_inputs():
    catalogue = random_catalogue()
    model = build("LambdaMART", catalogue=catalogue, use_features=True, score_fusion="rank+concat")
    slate = random_slate()
    matrix = model.matrix(model.encode(slate), slate, slate.scores)
    assert matrix.shape == (int(slate.mask.sum()), len(model.columns)) and matrix.dtype == np.float32
    by_name = dict(zip(model.columns, matrix.T))
    assert len(by_name) == len(model.columns), "no name stands for two columns"
    expected = {
        "popularity": catalogue.item_popularity[slate.candidates],
        "score": slate.scores,
        "history_length": slate.history_mask.sum(1, keepdim=True).expand_as(slate.mask),
        "item_feature.1": catalogue.item_features[slate.candidates][..., 1],
        "user_feature.0": catalogue.user_features[slate.users][:, :1].expand_as(slate.mask),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(by_name[name], values[slate.mask].numpy(), rtol=1e-6, err_msg=name)
    first = by_name["score.rank"][: int(slate.mask[0].sum())]
    np.testing.assert_array_equal(first, np.argsort(np.argsort(-slate.scores[0][slate.mask[0]].numpy())))


def test_few_columns():
    names = build("LambdaMART", gbdt_columns="similarities", affinity_spaces=["svd"]).columns
    assert names[-3:] == ["popularity", "score.rank", "score"] and not any("standard" in name for name in names)
    alone = {"score_fusion": "none", "history_interaction": "none", "gbdt_columns": "similarities"}
    assert build("LambdaMART", **alone).columns == ["popularity"]


def test_equal_requests_give_equal_trees():
    train, valid = requests(1), requests(2)
    first, second = fitted(train, valid), fitted(train, valid)
    assert len(first.trees) and torch.equal(first.trees, second.trees)
    assert not torch.equal(first.trees, fitted(requests(3), valid).trees)


def test_a_residual_is_where_the_trees_start():
    """Labels that the score alone explains, and a slope that says so: trees find nothing to add."""
    keys = {"score_fusion": "residual", "gbdt_columns": "similarities", "early_stopping_trees": 1}
    train = requests(1)
    train = labelled(train, train.scores, 0.7)
    model = build("LambdaMART", **FINE, **keys)
    with torch.no_grad():
        model.fusion.slope.fill_(50.0)
    model.fit([train], [train])
    own = model.score(model.encode(train), train, train.scores)
    torch.testing.assert_close(model(train), own + 50 * log_odds(train.scores))
    order = model.predict(train).argsort(1, descending=True)
    assert torch.equal(order, train.scores.argsort(1, descending=True))


def test_only_so_many_requests_are_read():
    slates = [requests(seed, n) for seed, n in ((1, 7), (2, 5), (3, 8))]
    for most, step in ((20, 1), (19, 2), (7, 3), (1, 20)):
        read = torch.cat([slate.candidates[:, 0] for slate in evenly(slates, most)])
        assert torch.equal(read, torch.cat([slate.candidates[:, 0] for slate in slates])[::step]) and len(read) <= most


def test_what_it_refuses(monkeypatch):
    with pytest.raises(ConfigError, match="LambdaMART can use none or affinity"):
        build("LambdaMART", history_interaction="both")
    with pytest.raises(ConfigError, match="no column"):
        nothing = {"history_interaction": "none", "score_fusion": "none", "use_popularity": False}
        build("LambdaMART", gbdt_columns="similarities", **nothing)
    with pytest.raises(ConfigError, match="LambdaMART cannot be a generator"):
        build("MGE", generators=["LambdaMART"])


def test_without_its_package_it_is_listed_with_what_it_needs(monkeypatch, capsys):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "lightgbm" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert main(["models"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LambdaMART")]
    assert line.endswith("(needs lightgbm: pip install 'dnr_recbole[gbdt]')")
    with pytest.raises(ConfigError, match=r"model=LambdaMART needs the package .*gbdt"):
        run_dnr(config_dict=WORLD, saved=False)


def test_a_run_its_checkpoint_and_going_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = run_dnr(config_dict=WORLD)["row"]
    assert row["epochs"] == 1 and row["test"]["ndcg@6"] > row["probes"]["random"]["ndcg@6"] + 0.05
    model, config = load_reranker(row["checkpoint"])
    assert config["model"] == "LambdaMART" and len(model.trees)
    again = run_dnr(config_dict={**WORLD, "resume": True})["row"]
    assert again["test"] == row["test"] and again["identity"] == row["identity"]
    assert run_dnr(config_dict=WORLD, saved=False)["row"]["test"] == row["test"]


def test_two_processes_give_the_same_trees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = run_dnr(config_dict=WORLD)["row"]
    assert run_dnr(config_dict={**WORLD, "nproc": 2})["row"]["test"] == alone["test"]


def test_a_text_that_is_no_model_is_named():
    model = build("LambdaMART")
    model.load_state_dict({**model.state_dict(), "trees": torch.tensor([1, 2, 3], dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="text of its trees"):
        model.predict(random_slate())
