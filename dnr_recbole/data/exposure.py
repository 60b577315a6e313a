"""A biased log of a generated world: an old system shows some candidates in an order, users click what they look at.

Training and validation requests become such a log; test requests keep the truth of all candidates, so that what a
model has learned is measured without bias, and the optimum stays what it was.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, Tuple

import torch
from torch import Tensor

from dnr_recbole.bias.clicks import make_click_model
from dnr_recbole.config_schema import Keys
from dnr_recbole.data.candidate_table import CandidateTable
from dnr_recbole.data.splits import TEST
from dnr_recbole.errors import ConfigError
from dnr_recbole.lists import first_score, score_ranks, take


def biased_log(config: Keys, table: CandidateTable, attraction: Tensor, generator: torch.Generator) -> CandidateTable:
    """The table as an old system's log, by the keys ``synthetic_clicks`` and following.

    Args:
        table: with the true labels: whether each candidate is clicked if it is examined.
        attraction: ``[R, n]``, the probability of that given user and item.

    Returns:
        the table with clicks as labels, and ``shown``, ``position``, ``intended``, ``randomised``, and with
        ``synthetic_known_propensities`` ``propensity`` and ``examination``.
    """
    n = table.candidates.shape[1]
    k = min(config["synthetic_shown"], n)
    intended = score_ranks(_old_scores(config, table, generator), torch.ones_like(table.mask))
    position, randomised = _displayed(config, intended, k, generator)
    order = position.argsort(1)[:, :k]  # which candidate stands at each shown position
    clicks = make_click_model(config["synthetic_clicks"], config["synthetic_click_bias"])
    listed = clicks.examined(take(table.labels, order), generator)
    shown = position < k
    examined = torch.zeros_like(shown).scatter_(1, order, listed)
    examination = torch.ones(shown.shape).scatter_(1, order, clicks.examination(take(attraction, order)))
    test = (table.split == TEST).unsqueeze(1)
    labels = table.labels & (examined | test)
    known: Dict[str, Any] = {}
    if config["synthetic_known_propensities"]:
        chance = display_probability(intended, position, k, config["synthetic_random_exposures"], _swaps(config, k))
        known = {
            "propensity": torch.where(shown & ~test, chance, torch.ones_like(chance)),
            "examination": torch.where(shown & ~test, examination, torch.ones_like(examination)),
        }
    nowhere = ~shown | test
    return dataclasses.replace(
        table,
        labels=labels,
        n_positives=labels.sum(1).int(),
        shown=shown | test,
        position=position.masked_fill(nowhere, -1).short(),
        intended=intended.masked_fill(nowhere, -1).short(),
        randomised=randomised.unsqueeze(1) & ~nowhere,
        **known,
    )


def display_probability(intended: Tensor, position: Tensor, k: int, random_share: float, swap_share: float) -> Tensor:
    """The probability that the old system shows a candidate at ``position``, ``[R, n]`` FloatTensor.

    A request is in random order with probability ``random_share``. Else, with probability ``swap_share``, one of the
    k − 1 neighbouring pairs of shown positions is swapped, each as likely as the others.
    """
    n = intended.shape[1]
    pairs = max(k - 1, 1)
    touching = (intended > 0).float() * (intended < k) + (intended < k - 1)  # pairs that the intended place is part of
    stays = 1 - swap_share * touching / pairs * (k > 1)
    moves = torch.full_like(stays, swap_share / pairs * (k > 1))
    moves = moves * ((position - intended).abs() == 1) * (intended < k) * (position < k)
    ordered = torch.where(position == intended, stays, moves)
    return (1 - random_share) * ordered + random_share / n


def _old_scores(config: Keys, table: CandidateTable, generator: torch.Generator) -> Tensor:
    """By what the old system orders, ``[R, n]``."""
    order = config["synthetic_shown_order"]
    if order == "random":
        return torch.rand(table.mask.shape, generator=generator)
    return first_score(table.scores)


def _swaps(config: Keys, k: int) -> float:
    if config["synthetic_swaps"] and k < 2:
        raise ConfigError("synthetic_swaps needs synthetic_shown of at least 2: there are no two positions to swap")
    return float(config["synthetic_swaps"])


def _displayed(config: Keys, intended: Tensor, k: int, generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    """Positions ``[R, n]`` as displayed, and which requests ``[R]`` are in random order."""
    rows, n = intended.shape
    randomised = torch.rand(rows, generator=generator) < config["synthetic_random_exposures"]
    swapped = torch.rand(rows, generator=generator) < _swaps(config, k)
    upper = (torch.rand(rows, generator=generator) * max(k - 1, 1)).long().unsqueeze(1)
    moved = torch.where(intended == upper, intended + 1, torch.where(intended == upper + 1, upper, intended))
    position = torch.where(swapped.unsqueeze(1), moved, intended)
    draws = torch.rand(rows, n, generator=generator)
    chance = score_ranks(draws, torch.ones_like(draws, dtype=torch.bool))
    return torch.where(randomised.unsqueeze(1), chance, position), randomised
