"""DPP: the greedy log-determinant rule."""

from __future__ import annotations

import pytest
import torch

from dnr_recbole.model.reranker.dpp import dpp
from dnr_recbole.testing import random_slate


def example(seed=0, width=8):
    g = torch.Generator().manual_seed(seed)
    slate = random_slate(seed)
    vectors = torch.nn.functional.normalize(torch.randn(*slate.mask.shape, width, generator=g), dim=-1)
    return torch.rand(slate.mask.shape, generator=g), vectors, slate.mask


@pytest.mark.parametrize("alpha, epsilon, width", [(1.0, 1e-3, 8), (0.0, 1e-3, 16), (3.0, 0.1, 4), (0.5, 0.05, 2)])
def test_greedy_equals_brute_force_log_det(alpha, epsilon, width):
    relevance, vectors, mask = example(width=width)
    picked = dpp(relevance, vectors, mask, 5, alpha, epsilon)
    for b in range(len(mask)):
        v, q = vectors[b].double(), (alpha * relevance[b].double()).exp()
        gram = v @ v.T
        gram.fill_diagonal_(1.0)
        kernel = q[:, None] * (gram + epsilon * torch.eye(len(q), dtype=torch.float64)) * q[None, :]
        shown = []
        for _ in range(5):
            value = torch.full((len(q),), -torch.inf, dtype=torch.float64)
            for i in mask[b].nonzero().squeeze(1).tolist():
                if i not in shown:
                    chosen = torch.tensor([*shown, i])
                    value[i] = torch.logdet(kernel[chosen][:, chosen])
            shown.append(int(value.argmax()))
        assert picked[b].tolist() == shown


def test_orthogonal_items_are_sorted_by_quality():
    relevance, _, mask = example()
    vectors = torch.eye(mask.shape[1]).expand(len(mask), -1, -1)
    expected = relevance.masked_fill(~mask, -1).topk(6).indices
    assert torch.equal(dpp(relevance, vectors, mask, 6, 2.0, 1e-3), expected)


def test_a_duplicate_is_postponed():
    relevance = torch.tensor([[1.0, 1.0, 0.3, 0.2]])
    vectors = torch.tensor([[[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert dpp(relevance, vectors, mask, 4, 1.0, 1e-3).tolist()[0][1:] == [2, 3, 1]


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_a_kernel_of_low_rank_still_gives_a_full_list(epsilon):
    relevance, vectors, mask = example(width=2)
    picked = dpp(relevance, vectors, mask, 6, 1.0, epsilon)
    for row, valid in zip(picked.tolist(), mask):
        assert len(set(row)) == 6 and all(valid[i] for i in row)


def test_exhausted_items_come_by_relevance():
    """One direction only and ε = 0: after the first item nothing adds volume."""
    relevance, _, mask = example()
    vectors = torch.ones(*mask.shape, 1)
    expected = relevance.masked_fill(~mask, -1).topk(6).indices
    assert torch.equal(dpp(relevance, vectors, mask, 6, 1.0, 0.0), expected)


def test_what_exceeds_the_rank_comes_by_relevance():
    """Two dimensions and ε = 0: two picks by volume, the others sorted."""
    relevance, vectors, mask = example(width=2)
    picked = dpp(relevance, vectors, mask, 6, 0.5, 0.0)
    rest = relevance.gather(1, picked)[:, 2:]
    assert torch.equal(rest, rest.sort(1, descending=True).values)


def test_no_relevance_lifts_an_item_without_volume():
    relevance, mask = torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert dpp(relevance, vectors, mask, 3, 50.0, 0.0).tolist()[0][1] == 2


def test_items_without_a_vector_count_as_unlike_all_others():
    relevance, _, mask = example()
    picked = dpp(relevance, torch.zeros(*mask.shape, 3), mask, 6, 1.0, 1e-3)
    assert torch.equal(picked, relevance.masked_fill(~mask, -1).topk(6).indices)
