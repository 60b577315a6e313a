"""What each candidate counts in training: inverse propensities and sample weights, once for a whole candidate table."""

from __future__ import annotations

import dataclasses
from logging import getLogger
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.bias.propensities import Logged, examination_curve, known_propensity
from dnr_recbole.bias.weights import effective_sample_size, inverse_weights, normalised
from dnr_recbole.config_schema import Keys
from dnr_recbole.data.candidate_table import CandidateTable
from dnr_recbole.data.splits import TRAIN
from dnr_recbole.errors import ConfigError, DataError
from dnr_recbole.lists import first_score

_SHOWN_PLACES = 10  # of a curve in the log


def reads_exposure(config: Keys) -> bool:
    """Whether a run reads where candidates were shown."""
    position_bias = "gbdt_position_bias" in config and config["gbdt_position_bias"]
    return config["propensity"] != "none" or config["position_input"] != "none" or position_bias


def weighted(config: Keys, table: CandidateTable) -> CandidateTable:
    """The table with ``weights`` and ``targets`` as the key ``propensity`` wants them; without it, the table itself.

    A click counts 1 / propensity, at most 1 / ``propensity_clip``; with ``propensity_normalise`` the clicks of the
    training requests count 1 on average. Under ``propensity_form: corrected`` that weight becomes the click's target,
    so that what is taken for a non-click is taken back as well.

    Raises:
        DataError: the log lacks what the estimator needs.
        ConfigError: the run has no exposures at all.
    """
    table = _with_sample_weights(table)
    if not reads_exposure(config):
        return table
    if table.position is None:
        raise ConfigError(
            "propensity, position_input and gbdt_position_bias need positions: a request log with a column position, "
            "or a generated world with synthetic_clicks"
        )
    if config["propensity"] == "none":
        return table
    propensity = propensities(config, table)
    clicked = table.labels & table.mask & _shown(table)
    trained = clicked & (table.split == TRAIN).unsqueeze(1)
    inverse = inverse_weights(propensity.numpy(), config["propensity_clip"])
    if config["propensity_normalise"]:
        inverse = normalised(inverse, trained.numpy())
    inverse = torch.from_numpy(inverse).float()
    _report(config, table, propensity, inverse[trained].numpy())
    nowhere = int((trained & (table.position < 0)).sum())
    if nowhere:
        getLogger(__name__).warning(
            f"propensity={config['propensity']}: {nowhere:,} of {int(trained.sum()):,} training clicks have no "
            "position and count as if everybody had looked there"
        )
    ones = torch.ones_like(inverse)
    factor, before = torch.where(clicked, inverse, ones), ones if table.weights is None else table.weights
    if config["propensity_form"] == "corrected":
        targets = table.labels.float() if table.targets is None else table.targets
        apart = None if table.objectives is None else table.objectives * factor.unsqueeze(-1)
        return dataclasses.replace(table, targets=targets * factor, objectives=apart, weights=before)
    return dataclasses.replace(table, weights=before * factor)


def _with_sample_weights(table: CandidateTable) -> CandidateTable:
    """Sample weights divided by their mean over the training candidates, so that losses keep their scale.

    Raises:
        DataError: no training candidate counts anything.
    """
    if table.weights is None:
        return table
    mean = float(table.weights[(table.split == TRAIN).unsqueeze(1) & table.mask & _shown(table)].double().mean())
    if not mean > 0:
        raise DataError("sample_weight: the weights of all training candidates are 0")
    return dataclasses.replace(table, weights=(table.weights / mean).float())


def propensities(config: Keys, table: CandidateTable) -> Tensor:
    """The probability that a user looked at each candidate, up to a factor: float64 ``[R, n]``; 1 where not shown."""
    assert table.position is not None  # weighted() has seen to that
    shown = table.mask & _shown(table) & (table.position >= 0)
    out = torch.ones(shown.shape, dtype=torch.float64)
    if config["propensity"] == "column":
        values = known_propensity(_logged(table, shown))
        if not (np.isfinite(values) & (values > 0)).all():
            raise DataError("propensity=column: a candidate was shown without a propensity above 0; try propensity=em")
        out[shown] = torch.from_numpy(values).double()
        return out
    trained = shown & (table.split == TRAIN).unsqueeze(1)
    if not trained.any():
        raise DataError("no training request says where its candidates were shown (columns position and exposed)")
    curve = torch.from_numpy(examination_curve(config["propensity"], _logged(table, trained)))
    out[shown] = curve[table.position[shown].long().clamp(max=len(curve) - 1)]
    return out


def _shown(table: CandidateTable) -> Tensor:
    return table.mask if table.shown is None else table.shown


def _logged(table: CandidateTable, chosen: Tensor) -> Logged:
    """The candidates ``chosen`` (bool [R, n]) of a table, one after another."""

    def column(values: Optional[Tensor]) -> Optional[np.ndarray]:
        return None if values is None else values[chosen].numpy()

    intended = column(table.intended)
    assert table.position is not None
    return Logged(
        position=table.position[chosen].long().numpy(),
        click=table.labels[chosen].numpy(),
        score=first_score(table.scores)[chosen].double().numpy(),
        propensity=column(table.propensity),
        examination=column(table.examination),
        intended=None if intended is None else intended.astype(np.int64),
        randomised=column(table.randomised),
    )


def _report(config: Keys, table: CandidateTable, propensity: Tensor, weights: np.ndarray) -> None:
    assert table.position is not None
    places = [
        float(propensity[(table.position == place) & table.mask].mean())
        for place in range(min(int(table.position.max()) + 1, _SHOWN_PLACES))
        if bool(((table.position == place) & table.mask).any())
    ]
    size, clicks = effective_sample_size(weights), len(weights)
    getLogger(__name__).info(
        f"propensity={config['propensity']} by position: {' '.join(f'{value:.3f}' for value in places)}; "
        f"{clicks:,} training clicks weigh as much as {size:,.0f}"
    )
