"""z [B, n, T]: an output for each kind of feedback (objective_outputs: apart)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from feedback_helpers import KEYS, binary, built, log_of

from dnr_recbole import Reranker
from dnr_recbole.config import Config
from dnr_recbole.errors import ConfigError
from dnr_recbole.model.losses import bce, list_ce
from dnr_recbole.model.objective_outputs import ObjectiveOutputs
from dnr_recbole.registry import get_reranker, list_models
from dnr_recbole.testing import build, model_config, random_catalogue, random_slate

WEIGHTS = {"click": 1.0, "watched": 3.0}
MODELS = [each.name for each in list_models("reranker") if each.cls.objective_outputs]
APART = dict(source="log", objectives=WEIGHTS, objective_outputs="apart")


def config_of(model, **keys):
    plain = model_config(model)
    return Config(model, "log", config_dict={**plain.external_config_dict, **APART, **keys})


def two_kinds(seed=0):
    """A slate whose second objective is a share of the first."""
    slate = random_slate(seed)
    watched = slate.labels * torch.rand(slate.labels.shape, generator=torch.Generator().manual_seed(seed))
    objectives = torch.stack([slate.labels, watched], dim=-1)
    return dataclasses.replace(slate, objectives=objectives, targets=(objectives * torch.tensor([0.25, 0.75])).sum(-1))


def test_there_are_models_with_several_outputs():
    assert {"PRM", "SetRank", "DLCM", "MiDNN", "MIR"} == set(MODELS)


@pytest.mark.parametrize("likelihood", [bce, list_ce])
def test_equal_outputs_are_one(likelihood):
    logits = torch.randn(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    together = ObjectiveOutputs([1, 3], likelihood).together(torch.stack([logits, logits], dim=-1), mask)
    wanted = logits if likelihood is bce else torch.log_softmax(logits.masked_fill(~mask, -1e9), dim=1)
    assert together[mask] == pytest.approx(wanted[mask].numpy(), abs=1e-5)


def test_the_ranking_is_by_the_weighted_mean_of_the_probabilities():
    logits = torch.tensor([[[2.0, -1.0], [0.0, 0.5], [-30.0, 40.0]]])
    together = ObjectiveOutputs([1, 3], bce).together(logits, torch.ones(1, 3, dtype=torch.bool))
    mean = torch.sigmoid(logits) @ torch.tensor([0.25, 0.75])
    assert torch.sigmoid(together) == pytest.approx(mean.numpy(), abs=1e-6)
    # Certain answers stay apart, where a probability in float32 would be 1 for both.
    sure = torch.tensor([[[30.0, 30.0], [40.0, 40.0]]])
    first, second = ObjectiveOutputs([1, 1], bce).together(sure, torch.ones(1, 2, dtype=torch.bool))[0]
    assert second - first == pytest.approx(10, abs=1e-3)


@pytest.mark.parametrize("fusion", ["concat", "residual"])
@pytest.mark.parametrize("name", MODELS)
def test_each_objective_has_an_output_that_learns_it_alone(name, fusion):
    model = build(name, config_of(name, score_fusion=fusion, rerank_loss="bce"))
    slate = two_kinds()
    logits = model.logits(model.encode(slate), slate, slate.scores)
    assert logits.shape == (*slate.mask.shape, 2)
    loss = model.criterion(logits, slate)
    parts = [bce(logits[..., t], slate.objectives[..., t], slate.mask) for t in (0, 1)]
    assert loss.item() == pytest.approx(0.25 * parts[0].item() + 0.75 * parts[1].item(), rel=1e-5)
    gradient = torch.autograd.grad(bce(logits[..., 0], slate.objectives[..., 0], slate.mask), logits)[0]
    assert gradient[..., 0].abs().sum() > 0 and gradient[..., 1].abs().sum() == 0
    ranked = model.predict(slate)
    assert ranked.shape == slate.mask.shape and torch.isfinite(ranked).all()
    assert torch.equal(model.predict(slate.without_labels()), ranked)


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_storage_order_do_not_matter(name):
    model, slate = build(name, config_of(name)), two_kinds()
    order = torch.stack([torch.randperm(slate.mask.shape[1]) for _ in range(len(slate))])
    moved = slate.shuffled(order)
    assert torch.equal(moved.objectives, slate.objectives.gather(1, order.unsqueeze(-1).expand_as(slate.objectives)))
    assert torch.allclose(model.predict(moved), model.predict(slate).gather(1, order), atol=1e-5)
    loss = model.calculate_loss(slate)
    hidden = dataclasses.replace(slate, objectives=slate.objectives.masked_fill(~slate.mask.unsqueeze(-1), 0.9))
    assert model.calculate_loss(hidden).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("generator", ["pooled", "list", "residual"])
@pytest.mark.parametrize("alternation", ["alternate", "reversal"])
def test_dnr_tells_its_generator_of_every_objective(generator, alternation):
    keys = dict(backbone="PRM", lambda_e=0, generator=generator, alternation=alternation, score_fusion="concat")
    model = build("DNR", config_of("DNR", **keys)).train()
    slate = two_kinds()
    for step in model.training_steps(slate):
        assert torch.isfinite(step.loss)
        step.loss.backward()
    assert model.generator.from_label.weight.shape[1] == 2
    assert (model.generator.from_label.weight.grad.abs().sum(0) > 0).all()
    model.eval()
    assert model.forward(slate).shape == slate.mask.shape
    assert torch.equal(model.predict(slate), model.backbone.predict(slate))


def test_a_model_with_one_output_says_so():
    with pytest.raises(ConfigError, match="PIER has one output.*docs/bias.md"):
        get_reranker("PIER")(config_of("PIER"), random_catalogue())
    with pytest.raises(ConfigError, match="PIER has one output"):
        get_reranker("DNR")(config_of("DNR", backbone="PIER"), random_catalogue())


def test_the_log_gives_each_objective():
    frame = binary(log_of())
    found = built(frame, objectives={"label": 1, "watched": 3}, objective_outputs="apart")
    table = found.data.train.table
    assert table.objectives.shape == (*table.mask.shape, 2)
    assert np.allclose(table.objectives @ np.array([0.25, 0.75], dtype=np.float32), table.targets, atol=1e-6)
    assert torch.equal(table.objectives[..., 0] > 0, table.labels)
    hidden = table.slate(torch.arange(4)).only_shown()
    assert (hidden.objectives[~hidden.mask] == 0).all()
    with pytest.raises(ConfigError, match="needs at least two objectives, not 1"):
        built(frame, objectives={"watched": 1}, objective_outputs="apart")


def test_corrected_targets_correct_each_objective():
    keys = dict(objectives={"label": 1, "watched": 3}, propensity="column", propensity_form="corrected")
    frame = binary(log_of())
    table = built(frame, objective_outputs="apart", **keys).data.train.table
    plain = built(frame, objectives={"label": 1, "watched": 3}, objective_outputs="apart").data.train.table
    clicked = table.labels & table.mask
    factor = table.targets[clicked] / plain.targets[clicked]
    assert torch.allclose(table.objectives[clicked], plain.objectives[clicked] * factor.unsqueeze(-1), rtol=1e-4)
    assert factor.std() > 0


def test_what_two_objectives_say_is_learned_apart(tmp_path):
    """Clicks follow one feature and watching another: the weights decide which of them ranks."""
    rng = np.random.default_rng(0)
    frame = log_of(400)
    for name in ("thumbnail", "content"):
        frame[name] = rng.normal(size=len(frame))
    frame["label"] = (frame.thumbnail + 0.3 * rng.normal(size=len(frame)) > 0.8).astype(int)
    frame["watched"] = 1 / (1 + np.exp(-3 * frame.content))
    keys = {**KEYS, "epochs": 8, "log_features": ["thumbnail", "content"], "rerank_loss": "bce"}
    frame = frame.drop(columns=["exposed", "position"])
    taste = {}
    for name, weights in (("clicks", {"label": 50, "watched": 1}), ("watching", {"label": 1, "watched": 50})):
        model = Reranker("PRM", **keys, objectives=weights, objective_outputs="apart").fit(frame)
        ranked = model.rank(frame.drop(columns=["label", "watched"]), k=1)
        joined = ranked.merge(frame[["request_id", "item_id", "thumbnail", "content"]], on=["request_id", "item_id"])
        taste[name] = joined[["thumbnail", "content"]].mean()
    assert taste["clicks"].thumbnail > taste["watching"].thumbnail + 0.3
    assert taste["watching"].content > taste["clicks"].content + 0.3
    model.save(tmp_path / "m")
    again = Reranker.load(tmp_path / "m").rank(frame.drop(columns=["label", "watched"]), k=1)
    assert again.equals(ranked)
