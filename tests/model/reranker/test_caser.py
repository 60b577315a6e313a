"""Caser: only the newest L items, and the two halves of its second item table."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dnr_recbole.testing import build, random_slate


@pytest.mark.parametrize("window", [1, 3, 5])
def test_items_older_than_the_window_do_not_matter(window):
    model, slate = build("Caser", window=window, history_interaction="none"), random_slate(ragged=False)
    slate = dataclasses.replace(slate, history=slate.history.clamp(min=1), history_mask=slate.history_mask | True)
    old, new = slate.history.clone(), slate.history.clone()
    old[:, : 7 - window] = 42
    new[:, 7 - window] = 42
    with torch.no_grad():
        scores = model(slate)
        torch.testing.assert_close(model(dataclasses.replace(slate, history=old)), scores, rtol=0, atol=0)
        assert (model(dataclasses.replace(slate, history=new)) - scores).abs().max() > 1e-6


def test_window_is_the_newest_items_behind_zero_rows():
    model = build("Caser", window=3)
    history = torch.arange(1.0, 6.0).view(1, 5, 1).expand(3, 5, 16)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    assert model.newest(history, mask)[..., 0].tolist() == [[3, 4, 5], [0, 1, 2], [0, 0, 0]]


def test_order_in_the_window_matters():
    model, slate = build("Caser", window=5), random_slate(ragged=False)
    slate = dataclasses.replace(slate, history=slate.history.clamp(min=1), history_mask=slate.history_mask | True)
    with torch.no_grad():
        flipped = model(dataclasses.replace(slate, history=slate.history.flip(1)[:, [2, 3, 4, 5, 6, 0, 1]]))
        assert (flipped - model(slate)).abs().max() > 1e-6


def test_the_second_table_is_separate_from_the_first():
    model, slate = build("Caser", score_fusion="none"), random_slate()
    slate = dataclasses.replace(slate, history_mask=slate.history_mask & False)
    with torch.no_grad():
        before = model(slate)
        model.embedder.items.embedding.weight.add_(1)
        torch.testing.assert_close(model(slate), before)
    context = model.encode(slate)
    assert context.user.shape == (len(slate), 16) and context.candidates.shape == (*slate.mask.shape, 16)
