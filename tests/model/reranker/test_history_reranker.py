"""What SASRec, Caser and GRU4Rec share: independent candidates, empty histories, next-item pretraining."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dnr_recbole.testing import build, random_slate

MODELS = ["SASRec", "Caser", "GRU4Rec"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fusion", ["none", "concat", "add", "weight"])
def test_removing_a_candidate_changes_no_other(name, fusion):
    model, slate = build(name, score_fusion=fusion), random_slate(ragged=False)
    keep = torch.arange(slate.mask.shape[1]) != 4
    fewer = dataclasses.replace(
        slate,
        candidates=slate.candidates[:, keep],
        mask=slate.mask[:, keep],
        scores=slate.scores[:, keep],
        labels=None,
    )
    with torch.no_grad():
        torch.testing.assert_close(model.predict(slate)[:, keep], model.predict(fewer))


@pytest.mark.parametrize("name", MODELS)
def test_score_is_state_times_item_plus_bias(name):
    model, slate = build(name, score_fusion="none", history_interaction="none"), random_slate()
    torch.nn.init.normal_(model.item_bias.weight)
    with torch.no_grad():
        history = model.embedder.items(slate.history)
        state = model.user_state(slate.users, history, slate.history_mask)
        items, _ = model.vectors(slate.candidates, slate.history)
        expected = (items * state.unsqueeze(1)).sum(-1) + model.item_bias.weight[slate.candidates, 0]
        torch.testing.assert_close(model(slate)[slate.mask], expected[slate.mask])


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_an_empty_history_gets_the_learned_state(name):
    model, slate = build(name), random_slate()
    torch.nn.init.normal_(model.embedder.mean_history.empty)
    empty = ~slate.history_mask.any(1)
    assert empty.any()
    with torch.no_grad():
        state = model.encode(slate).user
    torch.testing.assert_close(state[empty], model.embedder.mean_history.empty.detach().expand(int(empty.sum()), -1))


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_the_scores(name):
    slate = random_slate()
    for fusion in ("concat", "add", "weight"):
        model = build(name, score_fusion=fusion)
        x = slate.scores.clone().requires_grad_()
        model.loss(model.encode(slate), slate, x).backward()
        assert x.grad[slate.mask].abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_next_item_pretraining_learns_a_cycle(name):
    """Histories that count up 1, 2, 3, …: the next item becomes likelier than a random one."""
    assert build(name).pretraining() == []
    model = build(name, pretrain_epochs=1, dropout=0.0, score_fusion="concat")
    start = torch.randint(1, 50, (64, 1), generator=torch.Generator().manual_seed(0))
    slate = random_slate(batch=64, ragged=False)
    history = start + torch.arange(7)
    slate = dataclasses.replace(slate, history=history, history_mask=torch.ones_like(history, dtype=torch.bool))
    (stage,) = model.pretraining()
    fused = {id(p) for p in model.fusion.parameters()}
    assert not any(id(p) in fused for p in stage.parameters)
    optimizer = torch.optim.Adam(stage.parameters, lr=0.01)
    torch.manual_seed(0)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = stage.loss(slate)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize("name", MODELS)
def test_pretraining_skips_histories_without_a_next_item(name):
    model, slate = build(name, pretrain_epochs=1), random_slate()
    one = dataclasses.replace(slate, history_mask=torch.arange(7).expand(len(slate), -1) < 1)
    assert model.next_item_loss(one).item() == 0.0


def test_pretraining_reads_only_what_came_before_the_target(monkeypatch):
    model, slate = build("GRU4Rec", pretrain_epochs=1), random_slate(batch=64)
    seen = {}
    vectors, user_state = model.vectors, model.user_state
    monkeypatch.setattr(model, "vectors", lambda pair, h: seen.update(pair=pair) or vectors(pair, h))
    monkeypatch.setattr(model, "user_state", lambda u, h, mask: seen.update(mask=mask) or user_state(u, h, mask))
    model.next_item_loss(slate)
    length, before = slate.history_mask.sum(1), seen["mask"].sum(1)
    usable = length > 1
    assert (before[usable] >= 1).all() and (before[usable] < length[usable]).all()
    assert len(before[usable].unique()) > 2
    target = slate.history[torch.arange(64), before.clamp(max=6)]
    assert torch.equal(seen["pair"][usable, 0], target[usable])
    assert (slate.history_mask | ~seen["mask"]).all()
