"""DLCM: the direction of the scan and what the loss ignores."""

import dataclasses

import pytest
import torch

from dnr_recbole.lists import put_back, take, worst_first
from dnr_recbole.testing import build, random_slate


@pytest.mark.parametrize("scoring", ["additive", "multiplicative"])
def test_shuffled_input_gives_the_same_scores_after_unshuffling(scoring):
    model, slate = build("DLCM", scoring=scoring), random_slate()
    order = torch.rand(slate.candidates.shape).argsort(1)
    a, b = model(slate).gather(1, order), model(slate.shuffled(order))
    mask = slate.mask.gather(1, order)
    torch.testing.assert_close(a[mask], b[mask])


def swap_item(slate, best: bool):
    """The same slate with another item in place of each request's best or worst, and its position."""
    end = (1 if best else -1) * slate.scores.masked_fill(~slate.mask, -9.0 if best else 9.0)
    position = end.argmax(1, keepdim=True)
    item = slate.candidates.gather(1, position) % 59 + 1
    return dataclasses.replace(slate, candidates=slate.candidates.scatter(1, position, item)), position


def changed(model, slate, other):
    read = lambda s: model.read(model.encode(s).tokens, s, s.scores)[0]  # noqa: E731
    return (read(slate) - read(other)).abs().amax(-1) > 1e-7


def test_the_scan_runs_from_the_last_rank_to_the_first():
    model, slate = build("DLCM", history_interaction="none"), random_slate()
    with torch.no_grad():
        worst, _ = swap_item(slate, best=False)
        assert changed(model, slate, worst)[slate.mask].all(), "all outputs above the last rank know it"
        best, position = swap_item(slate, best=True)
        moved = changed(model, slate, best) & slate.mask
    assert torch.equal(moved.nonzero()[:, 1:], position), "nothing below the first rank knows it"


def test_a_common_shift_does_not_change_the_loss():
    model, slate = build("DLCM"), random_slate()
    logits = model(slate)
    shifted = logits - logits.masked_fill(~slate.mask, 9.0).amin(1, keepdim=True)
    torch.testing.assert_close(model.criterion(logits, slate), model.criterion(shifted, slate))


def test_sorting_is_undone():
    slate = random_slate()
    order = worst_first(slate.scores, slate.mask)
    ascending = slate.scores.gather(1, order)
    for row, n in zip(ascending, slate.mask.sum(1)):
        assert (row[:n].diff() > 0).all()
    torch.testing.assert_close(put_back(ascending, order), slate.scores)
    values = torch.randn(*slate.mask.shape, 4)
    torch.testing.assert_close(put_back(take(values, order), order), values)
