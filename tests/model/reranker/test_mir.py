"""MIR: equivariance, inert padding, and the two limits of the personal decay."""

import dataclasses

import torch

from dnr_recbole.model.reranker.mir import RaggedBiLSTM, ages, decayed
from dnr_recbole.testing import build, random_slate


def test_permuting_candidates_permutes_scores():
    model, slate = build("MIR"), random_slate(ragged=False)
    order = torch.rand(slate.candidates.shape).argsort(1)
    torch.testing.assert_close(model(slate).gather(1, order), model(slate.shuffled(order)), atol=1e-5, rtol=1e-4)


def test_padded_history_is_inert():
    model, slate = build("MIR"), random_slate()
    garbage = slate.history.masked_fill(~slate.history_mask, 9)
    longer = torch.nn.functional.pad(garbage, (0, 5), value=11)
    padded = dataclasses.replace(
        slate, history=longer, history_mask=torch.nn.functional.pad(slate.history_mask, (0, 5))
    )
    a, b = model(slate), model(padded)
    torch.testing.assert_close(a[slate.mask], b[slate.mask], atol=1e-5, rtol=1e-4)


def test_the_order_of_history_matters():
    model, slate = build("MIR"), random_slate(ragged=False)
    mask = torch.ones_like(slate.history_mask)
    slate = dataclasses.replace(slate, history=slate.history.clamp(min=1), history_mask=mask)
    turned = dataclasses.replace(slate, history=slate.history.flip(1))
    assert (model(slate) - model(turned)).abs().max() > 1e-6


def test_no_decay_doubles_the_affinity():
    affinity, age = torch.randn(2, 5, 3), torch.arange(5).flip(0).expand(2, -1)
    torch.testing.assert_close(decayed(affinity, torch.zeros(2, 1), age), 2 * affinity)


def test_old_items_keep_the_undecayed_term():
    affinity = torch.randn(2, 5, 3)
    age = torch.full((2, 5), 10**6)
    torch.testing.assert_close(decayed(affinity, torch.full((2, 1), 0.5), age), affinity)


def test_ages_count_back_from_the_newest_item():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert ages(mask)[0, :3].tolist() == [2, 1, 0]
    assert ages(mask)[1, 0] == 0


def test_both_directions_of_the_lstm_see_their_own_end_of_the_list():
    torch.manual_seed(0)
    lstm, items = RaggedBiLSTM(4, 3), torch.randn(1, 6, 4)
    mask = torch.arange(6).unsqueeze(0) < 4
    alone = lstm(items[:, :4], mask[:, :4])
    torch.testing.assert_close(lstm(items, mask)[:, :4], alone)
    both = torch.nn.LSTM(4, 3, batch_first=True, bidirectional=True)
    state = {f"{k}_reverse": v for k, v in lstm.back.state_dict().items()}
    both.load_state_dict({**lstm.ahead.state_dict(), **state})
    torch.testing.assert_close(alone, both(items[:, :4])[0])


def decaying(bias):
    """A model whose θ is the same for all users, and requests with full histories."""
    model, slate = build("MIR"), random_slate(ragged=False)
    torch.nn.init.zeros_(model.theta[-1].weight)
    torch.nn.init.constant_(model.theta[-1].bias, bias)
    full = torch.ones_like(slate.history_mask)
    return model, dataclasses.replace(slate, history=slate.history.clamp(min=1), history_mask=full)


def test_without_decay_a_model_doubles_its_affinity(monkeypatch):
    model, slate = decaying(-50.0)  # θ = 0
    scores = model(slate)
    monkeypatch.setattr("dnr_recbole.model.reranker.mir.decayed", lambda affinity, theta, age: 2 * affinity)
    torch.testing.assert_close(model(slate), scores)


def test_a_model_reads_ages_from_the_newest_item(monkeypatch):
    """With strong decay only the newest item counts twice."""
    model, slate = decaying(50.0)
    scores = model(slate)
    twice = torch.ones(7)
    twice[-1] = 2
    for weight, same in ((twice, True), (twice.flip(0), False)):
        weight = weight.view(1, -1, 1)
        monkeypatch.setattr("dnr_recbole.model.reranker.mir.decayed", lambda a, *_, weight=weight: a * weight)
        assert torch.allclose(model(slate), scores, atol=1e-7, rtol=0) == same
