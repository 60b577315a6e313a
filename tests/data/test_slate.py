"""A slate carries the scores that a model reads and, beside them, the retriever's own."""

import dataclasses

import pytest
import torch

from dnr_recbole.testing import random_slate


@pytest.fixture
def slate():
    return random_slate()


@pytest.fixture
def synthetic(slate):
    return slate.with_scores(slate.labels)


def test_logged_scores_are_the_scores_and_cost_nothing_until_others_are_put_in_their_place(slate, synthetic):
    assert slate.logged_scores is slate.scores
    assert synthetic.scores is slate.labels and synthetic.logged_scores is slate.scores
    again = synthetic.with_scores(torch.zeros_like(slate.scores))
    assert again.logged_scores is slate.scores
    for same in (slate.select(torch.arange(3)), slate.to("cpu"), slate.without_labels(), slate.shuffled(order(slate))):
        assert same.logged_scores is same.scores


def order(slate):
    return torch.rand(slate.scores.shape, generator=torch.Generator().manual_seed(3)).argsort(1)


def test_every_change_keeps_both_in_step(slate, synthetic):
    rows, places = torch.tensor([3, 1]), order(slate)
    for change in (
        lambda s: s.select(rows),
        lambda s: s.select(slice(2, 5)),
        lambda s: s.to("cpu"),
        lambda s: s.without_labels(),
        lambda s: s.shuffled(places),
        lambda s: s.select(rows).without_labels().to("cpu"),
    ):
        assert torch.equal(change(synthetic).logged_scores, change(slate).scores)
        assert torch.equal(change(synthetic).scores, change(slate.with_scores(slate.labels)).scores)
    assert torch.equal(synthetic.shuffled(places).scores, slate.labels.gather(1, places))


def test_each_tensor_is_moved_once(slate, synthetic):
    for request, tensors in ((slate, 7), (synthetic, 8)):
        seen = []
        request._map(lambda t, seen=seen: seen.append(t) or t)
        assert len(seen) == tensors


def test_another_retriever_replaces_both(slate):
    other = dataclasses.replace(slate, scores=slate.scores.flip(1))
    assert other.logged_scores is other.scores
