"""SetRank: equivariance with and without the ordinal embedding, and induced attention on short lists."""

import dataclasses

import pytest
import torch

from dnr_recbole.testing import build, random_slate

VARIANTS = ["msab", "imsab"]


def moved_together(slate):
    order = torch.rand(slate.candidates.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    return order, slate.shuffled(order)


@pytest.mark.parametrize("attention", VARIANTS)
def test_scores_ignore_the_retriever_without_ordinal_embedding(attention):
    model, slate = build("SetRank", attention=attention), random_slate()
    order, moved = moved_together(slate)
    moved = moved.with_scores(slate.scores)  # the items move, the scores stay: nothing but the items may matter
    mask = moved.mask
    torch.testing.assert_close(model(slate).gather(1, order)[mask], model(moved)[mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("every_block", [False, True])
def test_item_and_rank_move_together(attention, every_block):
    model = build("SetRank", attention=attention, score_fusion="rank", fuse_every_block=every_block, n_layers=2)
    torch.nn.init.normal_(model.fusion.rank_embedding.weight)
    slate = random_slate()
    order, moved = moved_together(slate)
    scores = model(slate)
    torch.testing.assert_close(scores.gather(1, order)[moved.mask], model(moved)[moved.mask], atol=1e-5, rtol=1e-4)
    alone = model(slate.with_scores(1 - slate.scores))
    assert (scores - alone)[slate.mask].abs().max() > 1e-3, "the rank must matter"


def test_imsab_with_fewer_candidates_than_points():
    model = build("SetRank", attention="imsab", n_points=20).train()
    slate = random_slate(n=12)
    first = torch.zeros_like(slate.mask)
    first[:, :2] = True
    slate = dataclasses.replace(slate, mask=slate.mask & first | first, labels=slate.labels * first)
    assert torch.isfinite(model(slate)).all()
    model.calculate_loss(slate).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_imsab_reads_real_candidates_only():
    model, slate = build("SetRank", attention="imsab"), random_slate()
    model.blocks[0].read.gamma1.data.fill_(1.0)
    tokens = torch.randn(*slate.mask.shape, model.dim)
    dirty = tokens.masked_fill(~slate.mask.unsqueeze(-1), 7.0)
    a, b = model.blocks[0](tokens, slate.mask), model.blocks[0](dirty, slate.mask)
    torch.testing.assert_close(a[slate.mask], b[slate.mask])
