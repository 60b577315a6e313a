"""From a list to n scores, by hand."""

import torch

from dnr_recbole.lists import NEG_INF, list_scores, top_positions

BASE = torch.tensor([[0.1, 0.9, 0.5, 0.3]])


def test_the_list_comes_first_and_the_rest_by_the_base_score():
    scores = list_scores(torch.tensor([[2, 0]]), BASE, torch.ones(1, 4, dtype=torch.bool))
    assert scores.tolist() == [[3.0, 2.0, 4.0, 1.0]]


def test_an_empty_slot_is_no_candidate():
    scores = list_scores(torch.tensor([[2, -1]]), BASE, torch.ones(1, 4, dtype=torch.bool))
    assert scores.tolist() == [[1.0, 3.0, 4.0, 2.0]]


def test_padding_is_last_whatever_its_base_score():
    scores = list_scores(torch.tensor([[2, 0]]), BASE, torch.tensor([[True, False, True, True]]))
    assert scores.tolist() == [[3.0, NEG_INF, 4.0, 2.0]]


def test_top_positions_pad_short_lists():
    mask = torch.tensor([[True, False, False, True]])
    assert top_positions(BASE, mask, 3).tolist() == [[3, 0, -1]]
    assert top_positions(BASE, mask, 6).tolist() == [[3, 0, -1, -1, -1, -1]]
