"""Propensities → what each candidate counts."""

from __future__ import annotations

import numpy as np


def inverse_weights(propensity: np.ndarray, clip: float) -> np.ndarray:
    """1 / propensity, the propensity being at least ``clip``: same shape."""
    return 1 / np.maximum(propensity, clip)


def normalised(weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """``weights`` divided by their mean over ``chosen``, so that losses keep their scale."""
    mean = weights[chosen].mean() if chosen.any() else 1.0
    return weights / max(float(mean), 1e-12)


def effective_sample_size(weights: np.ndarray) -> float:
    """(Σ w)² / Σ w²: how many equally weighted ones are worth as much."""
    total = float(np.square(weights).sum())
    return float(weights.sum() ** 2 / total) if total > 0 else 0.0
