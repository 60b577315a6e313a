"""What MMR and DPP share: sources of relevance and similarity, and the refusal of noise."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dnr_recbole.errors import ConfigError
from dnr_recbole.testing import build, model_config, random_catalogue, random_slate, train_one_batch

MODELS = ["MMR", "DPP"]
# Settings under which diversity has no weight.
PURE = {"MMR": {"mmr_lambda": 1.0}, "DPP": {"dpp_alpha": 50.0}}


@pytest.mark.parametrize("name", MODELS)
def test_dnr_refuses_to_wrap_it(name):
    with pytest.raises(ConfigError, match=name):
        build("DNR", backbone=name)


@pytest.mark.parametrize("name", MODELS)
def test_retriever_relevance_ranks_by_score_if_diversity_has_no_weight(name):
    model, slate = build(name, relevance="retriever", **PURE[name]), random_slate()
    scores = model.predict(slate)
    expected = slate.scores.masked_fill(~slate.mask, -1).argsort(1, descending=True)
    valid = slate.mask.gather(1, expected)
    assert torch.equal(scores.argsort(1, descending=True)[valid], expected[valid])


@pytest.mark.parametrize("name", MODELS)
def test_retriever_relevance_has_a_loss_that_leaves_the_list_alone(name):
    model, slate = build(name, relevance="retriever"), random_slate()
    shown = model.generate(slate)
    groups = model.parameter_groups()
    optimizers = {key: torch.optim.Adam(group, lr=0.1) for key, group in groups.items()}
    before = model.calculate_loss(slate).item()
    for _ in range(50):
        train_one_batch(model, slate, optimizers)
    assert model.calculate_loss(slate).item() < before
    assert torch.equal(model.generate(slate), shown)


@pytest.mark.parametrize("name", MODELS)
def test_learned_relevance_is_the_scaled_probability(name, monkeypatch):
    model, slate = build(name), random_slate()
    seen, select = [], model.select
    monkeypatch.setattr(model, "select", lambda r, *rest: seen.append(r) or select(r, *rest))
    with torch.no_grad():
        model.predict(slate)
        p = torch.sigmoid(model(slate))
    for r, probability, mask in zip(seen[0], p, slate.mask):
        valid = probability[mask]
        torch.testing.assert_close(r[mask], (valid - valid.min()) / (valid.max() - valid.min()))


@pytest.mark.parametrize("name", MODELS)
def test_kernel_follows_the_catalogue(name):
    full, slate = random_catalogue(), random_slate()
    bare = dataclasses.replace(full, item_factors=None, user_factors=None)
    nothing = dataclasses.replace(bare, item_features=torch.zeros(full.n_items, 0))
    normal = torch.nn.functional.normalize
    config = model_config(name)
    torch.testing.assert_close(
        build(name, config, full).item_vectors(slate.candidates),
        normal(full.item_factors[slate.candidates], dim=-1),
    )
    torch.testing.assert_close(
        build(name, config, bare).item_vectors(slate.candidates),
        normal(full.item_features[slate.candidates], dim=-1),
    )
    assert build(name, config, nothing).item_vectors(slate.candidates).shape[-1] == 16
    for kernel, catalogue in (("factors", bare), ("features", nothing)):
        with pytest.raises(ConfigError, match=kernel):
            build(name, model_config(name, kernel=kernel), catalogue)


@pytest.mark.parametrize("name", MODELS)
def test_a_list_longer_than_the_candidates_ends_with_nothing(name):
    model, slate = build(name, slate_size=12), random_slate()
    shown = model.generate(slate)
    assert torch.equal((shown >= 0).sum(1), slate.mask.sum(1))
