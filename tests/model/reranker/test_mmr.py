"""MMR: the greedy rule."""

from __future__ import annotations

import pytest
import torch

from dnr_recbole.model.reranker.mmr import mmr
from dnr_recbole.testing import random_slate


def example(seed=0, width=6):
    g = torch.Generator().manual_seed(seed)
    slate = random_slate(seed)
    vectors = torch.nn.functional.normalize(torch.randn(*slate.mask.shape, width, generator=g), dim=-1)
    return torch.rand(slate.mask.shape, generator=g), vectors, slate.mask


def test_lambda_1_sorts_by_relevance():
    relevance, vectors, mask = example()
    expected = relevance.masked_fill(~mask, -1).topk(6).indices
    assert torch.equal(mmr(relevance, vectors, mask, 6, 1.0), expected)


def test_lambda_0_takes_the_farthest_after_the_first():
    relevance, vectors, mask = example()
    for b, shown in enumerate(mmr(relevance, vectors, mask, 4, 0.0).tolist()):
        assert shown[0] == int(relevance[b].masked_fill(~mask[b], -1).argmax())
        for t in range(1, 4):
            cosine = vectors[b] @ vectors[b, shown[:t]].T
            nearest = cosine.max(1).values.masked_fill(~mask[b], 9.0)
            nearest[shown[:t]] = 9.0
            assert shown[t] == int(nearest.argmin())


@pytest.mark.parametrize("trade_off", [0.3, 0.7])
def test_each_step_maximises_the_criterion(trade_off):
    relevance, vectors, mask = example(1)
    for b, shown in enumerate(mmr(relevance, vectors, mask, 5, trade_off).tolist()):
        for t in range(1, 5):
            similarity = ((1 + vectors[b] @ vectors[b, shown[:t]].T) / 2).max(1).values
            value = (trade_off * relevance[b] - (1 - trade_off) * similarity).masked_fill(~mask[b], -9)
            value[shown[:t]] = -9
            assert shown[t] == int(value.argmax())


def test_a_duplicate_is_postponed():
    relevance = torch.tensor([[1.0, 0.99, 0.5]])
    vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert mmr(relevance, vectors, torch.ones(1, 3, dtype=torch.bool), 3, 0.4).tolist() == [[0, 2, 1]]
