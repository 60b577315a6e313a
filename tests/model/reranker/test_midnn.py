"""MiDNN: features normalised over the candidate set."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dnr_recbole.lists import min_max
from dnr_recbole.testing import build, random_slate


def test_min_max_ignores_padding_and_zeroes_constants():
    values = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [2.0, 5.0], [-9.0, 99.0]]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    scaled = min_max(values, mask)
    assert scaled[0, :3].tolist() == [[0, 0], [1, 0], [0.5, 0]]
    torch.testing.assert_close(min_max(values[..., 0], mask)[0, :3], scaled[0, :3, 0])
    scaled[0, :3, 1].sum().backward()
    assert values.grad.abs().max() == 0


@pytest.mark.parametrize("a, b", [(0.5, 0.0), (1.0, 0.3), (0.1, 0.7), (20.0, -3.0)])
def test_normalised_scores_are_affinely_invariant(a, b):
    model, slate = build("MiDNN", score_fusion="concat", raw_features=False), random_slate()
    with torch.no_grad():
        before, after = model(slate), model(slate.with_scores(a * slate.scores + b))
    torch.testing.assert_close(after[slate.mask], before[slate.mask], atol=1e-5, rtol=1e-4)


def test_scores_matter_and_raw_ones_are_not_invariant():
    slate = random_slate()
    with torch.no_grad():
        for raw in (False, True):
            model = build("MiDNN", score_fusion="concat", raw_features=raw)
            assert (model(slate) - model(slate.with_scores(slate.scores.flip(1))))[slate.mask].abs().max() > 1e-4
        assert (model(slate) - model(slate.with_scores(0.1 * slate.scores)))[slate.mask].abs().max() > 1e-4


@pytest.mark.parametrize("fusion", ["none", "concat", "add", "weight", "rank"])
def test_equivariance(fusion):
    model, slate = build("MiDNN", score_fusion=fusion), random_slate()
    order = torch.rand(slate.mask.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    with torch.no_grad():
        moved, scores = model(slate.shuffled(order)), model(slate)
    mask = slate.mask.gather(1, order)
    torch.testing.assert_close(moved[mask], scores.gather(1, order)[mask], atol=1e-5, rtol=1e-4)


def test_depends_on_the_set():
    """Unlike the models that score each candidate alone: without the extreme candidates f' is another."""
    model, slate = build("MiDNN"), random_slate(ragged=False)
    fewer = dataclasses.replace(slate, mask=slate.mask & (torch.arange(slate.mask.shape[1]) < 5))
    with torch.no_grad():
        assert (model(slate) - model(fewer))[:, :5].abs().max() > 1e-3


@pytest.mark.parametrize("fusion", ["concat", "add", "weight"])
def test_gradient_reaches_the_scores(fusion):
    model, slate = build("MiDNN", score_fusion=fusion), random_slate()
    x = slate.scores.clone().requires_grad_()
    model.loss(model.encode(slate), slate, x).backward()
    assert torch.isfinite(x.grad).all() and x.grad[slate.mask].abs().sum() > 0
