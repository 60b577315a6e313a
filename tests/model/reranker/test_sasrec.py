"""SASRec: causality."""

from __future__ import annotations

import torch

from dnr_recbole.testing import build


def states(model, history, mask):
    with torch.no_grad():
        return model.states(model.embedder.items(history), mask)


def test_changing_an_item_leaves_earlier_outputs_unchanged():
    model = build("SASRec")
    history, mask = torch.arange(1, 8).repeat(2, 1), torch.ones(2, 7, dtype=torch.bool)
    before = states(model, history, mask)
    for t in range(7):
        changed = history.clone()
        changed[:, t] = 50
        after = states(model, changed, mask)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-6


def test_positions_count_from_the_newest_item():
    """Without blocks a state is item + position: the newest item's is the same after any number of items."""
    model = build("SASRec")
    model.blocks = torch.nn.ModuleList()
    torch.nn.init.normal_(model.position.weight)
    short = states(model, torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.bool))
    long = states(model, torch.tensor([[9, 8, 3, 4, 5]]), torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(long[:, 2:], short)


def test_right_padding_is_inert_and_order_matters():
    model = build("SASRec")
    torch.nn.init.normal_(model.position.weight)
    history = torch.tensor([[3, 4, 5, 0, 0, 0, 0]])
    short = states(model, history[:, :3], torch.ones(1, 3, dtype=torch.bool))
    padded = states(model, history, history > 0)
    torch.testing.assert_close(padded[:, :3], short)
    swapped = states(model, torch.tensor([[4, 3, 5]]), torch.ones(1, 3, dtype=torch.bool))
    assert (swapped[:, -1] - short[:, -1]).abs().max() > 1e-4
