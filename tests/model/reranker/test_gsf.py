"""GSF: groups, exact and sampled."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dnr_recbole.testing import build, random_slate


def pieces(model, slate):
    """The tensors that both ways of averaging over groups start from."""
    context = model.encode(slate)
    first = model.slots(model.fusion(context.candidates, slate.scores, slate.mask)).unflatten(
        -1, (model.m, model.width)
    )
    return first, model.from_user(context.user).unsqueeze(1)


def brute_force(model, slate):
    """Mean over all ordered groups of m distinct valid candidates, one group at a time."""
    first, user = pieces(model, slate)
    scores = torch.zeros(slate.mask.shape)
    for b, mask in enumerate(slate.mask):
        positions = mask.nonzero().squeeze(1).tolist()
        count = torch.zeros(len(mask))
        for group in itertools.permutations(positions, min(model.m, len(positions))):
            out = model.net(sum(first[b, i, k] for k, i in enumerate(group)) + user[b, 0])
            for k, i in enumerate(group):
                scores[b, i] += out[k]
                count[i] += 1
        scores[b] /= count.clamp(min=1)
    return scores


def test_m_1_is_a_pointwise_net():
    model, slate = build("GSF", group_size=1, history_interaction="none"), random_slate(ragged=False)
    first, user = pieces(model, slate)
    keep = torch.arange(slate.mask.shape[1]) != 4
    fewer = dataclasses.replace(
        slate,
        candidates=slate.candidates[:, keep],
        mask=slate.mask[:, keep],
        scores=slate.scores[:, keep],
        labels=None,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(slate), model.net(first[:, :, 0] + user).squeeze(-1))
        torch.testing.assert_close(model(slate)[:, keep], model(fewer))


def test_prediction_is_the_mean_over_all_pairs(monkeypatch):
    model, slate = build("GSF"), random_slate(batch=3, n=5)
    with torch.no_grad():
        expected = brute_force(model, slate)
        torch.testing.assert_close(model(slate)[slate.mask], expected[slate.mask])
        monkeypatch.setattr("dnr_recbole.model.reranker.gsf._CHUNK", 2 * model.width * slate.mask.numel())
        torch.testing.assert_close(model(slate)[slate.mask], expected[slate.mask])


@pytest.mark.parametrize("m", [2, 3])
def test_sampled_estimate_is_unbiased(m):
    model, slate = build("GSF", group_size=m), random_slate(batch=2, n=5)
    with torch.no_grad():
        first, user = pieces(model, slate)
        keys = torch.rand(*slate.mask.shape, 4000, generator=torch.Generator().manual_seed(0))
        chunks = [model.shuffled(first, user, slate.mask, part) for part in keys.split(100, dim=-1)]
        expected = brute_force(model, slate)
    error = torch.stack(chunks).mean(0) - expected
    standard_error = torch.stack(chunks).std(0) / len(chunks) ** 0.5
    assert (error.abs() <= 4.5 * standard_error + 1e-6)[slate.mask].all()
    assert standard_error[slate.mask].max() > 0


def test_one_shuffle_has_each_candidate_once_in_every_slot():
    """With slot outputs 1, 10, 100, every candidate gets their mean."""
    model, slate = build("GSF", group_size=3), random_slate(ragged=False)
    seen = []

    class Constant(torch.nn.Module):
        def forward(self, hidden):
            seen.append(hidden)
            return torch.tensor([1.0, 10.0, 100.0]).expand(*hidden.shape[:2], 3)

    model.net = Constant()
    first, user = pieces(model, slate)
    out = model.shuffled(first, user, slate.mask, torch.rand(*slate.mask.shape, 1))
    torch.testing.assert_close(out, torch.full_like(out, 37.0))
    expected = first.sum((1, 2)) + user[:, 0] * slate.mask.shape[1]
    torch.testing.assert_close(seen[0].sum(1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("m, valid", [(2, 1), (4, 1), (4, 3)])
def test_lists_shorter_than_a_group(m, valid):
    model, slate = build("GSF", group_size=m, eval_shuffles=200), random_slate(batch=2, n=5, ragged=False)
    mask = torch.arange(5).expand(2, -1) < valid
    slate = dataclasses.replace(slate, mask=mask, labels=slate.labels * mask)
    with torch.no_grad():
        expected = brute_force(model, slate)
        torch.testing.assert_close(model(slate)[mask], expected[mask], atol=0.02 * (valid > 1) + 1e-5, rtol=0)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_equivariance(m):
    model, slate = build("GSF", group_size=m), random_slate()
    order = torch.rand(slate.mask.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    with torch.no_grad():
        moved, scores = model(slate.shuffled(order)), model(slate)
    mask = slate.mask.gather(1, order)
    torch.testing.assert_close(moved[mask], scores.gather(1, order)[mask], atol=1e-5, rtol=1e-4)
