"""Monotone maps from a retriever's raw scores to x in [0, 1].

BPR, EASE, LightGCN… emit numbers on a scale of their own. One global map, fitted on held-out positives
against sampled unseen items, puts them on the probability scale of "an unseen item that the user will
interact with". It is the same for every user, so it never changes the order of items inside a user. It cannot
repair a scale that differs *between* users (a per-user map could, but would need held-out positives of every
user, and would leak who has many of them).
"""

from __future__ import annotations

from logging import getLogger
from typing import Any, Callable, Optional, Type

import numpy as np
import torch

from dnr_recbole.names import Names

_MIN_SLOPE = 1e-3  # per standard deviation of the raw scores
_TILT = 0.01


class Calibration:
    """Base class: the identity, for retrievers that emit probabilities themselves."""

    kind = "identity"

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """raw: any shape -> x: same shape, float32 in [0, 1], rising with raw as far as float32 tells it."""
        return raw.clamp(0.0, 1.0)

    def to_dict(self) -> dict:
        """A JSON-able description, the inverse of :func:`calibration_from_dict`."""
        return {"kind": self.kind, **self.__dict__}


CALIBRATIONS: Names[Type[Any]] = Names("calibration", "calibration", "score_calibration")


def register_calibration(kind: str) -> Callable[[Type[Any]], Type[Any]]:
    """Class decorator: the class, a :class:`Calibration` with a ``fit(positive, negative)``, gets this name."""

    def register(cls: Type[Any]) -> Type[Any]:
        cls.kind = kind
        return CALIBRATIONS.register(kind)(cls)

    return register


@register_calibration("logistic")
class PlattCalibration(Calibration):
    """x = sigmoid(slope * (raw - center) / scale + bias) with slope > 0: strictly increasing."""

    def __init__(self, center: float, scale: float, slope: float, bias: float):
        self.center, self.scale = float(center), float(scale)
        self.slope, self.bias = float(slope), float(bias)
        if not (np.isfinite([self.center, self.bias]).all() and 0 < self.scale < np.inf and 0 < self.slope < np.inf):
            raise ValueError("a logistic calibration needs finite numbers, scale > 0 and slope > 0")

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((raw - self.center) * (self.slope / self.scale) + self.bias)

    @classmethod
    def fit(cls, positive: np.ndarray, negative: np.ndarray, steps: int = 50) -> "PlattCalibration":
        """Newton's method on the logistic likelihood; positive [P] and negative [N] raw scores."""
        raw = np.concatenate([positive, negative]).astype(np.float64)
        label = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
        center, scale = raw.mean(), raw.std()
        scale = scale if scale > 0 else 1.0
        z = (raw - center) / scale
        base_rate = np.log(len(positive) / len(negative))
        slope, bias = 0.0, base_rate
        for _ in range(steps):
            p = _sigmoid(slope * z + bias)
            weight = p * (1 - p)
            gradient = np.array([np.mean((label - p) * z), np.mean(label - p)])
            hessian = np.array([[np.mean(weight * z * z), np.mean(weight * z)], [np.mean(weight * z), np.mean(weight)]])
            # The ridge keeps perfectly separable (or constant) scores from running to infinity.
            gradient[0] -= 1e-4 * slope
            hessian += np.diag([1e-4, 1e-9])
            step = np.linalg.solve(hessian, gradient)
            step *= min(1.0, 4.0 / (np.abs(step).max() + 1e-12))
            slope, bias = slope + step[0], bias + step[1]
            if np.abs(step).max() < 1e-8:
                break
        if slope < _MIN_SLOPE:
            getLogger(__name__).warning(
                "the retriever ranks held-out items no better than random ones: "
                "its calibrated scores are nearly constant"
            )
            slope, bias = _MIN_SLOPE, base_rate
        return cls(center, scale, slope, bias)


@register_calibration("isotonic")
class IsotonicCalibration(Calibration):
    """Piecewise-linear interpolation of an isotonic regression, tilted by a hundredth so that it rises strictly.

    An isotonic regression is flat in places and beyond the fitted range; there candidates would tie and the order of
    the scores be lost. So x is 0.99 of it and 0.01 of a logistic curve over all raw scores.

    Args:
        knots, values: of the regression.
        center, scale: mean and standard deviation of the raw scores; without them (models stored by earlier versions)
            nothing is tilted.
    """

    def __init__(self, knots, values, center: Optional[float] = None, scale: Optional[float] = None):
        self.knots = [float(k) for k in knots]
        self.values = [float(v) for v in values]
        self.center, self.scale = center, scale
        rising = np.all(np.diff(self.knots) > 0) and np.all(np.diff(self.values) >= 0)
        inside = self.values and 0 <= self.values[0] and self.values[-1] <= 1
        if not (rising and inside and len(self.knots) == len(self.values)):
            raise ValueError("an isotonic calibration needs rising knots and as many rising values in [0, 1]")
        if center is not None and not (scale is not None and np.isfinite(center) and 0 < scale < np.inf):
            raise ValueError("an isotonic calibration needs a finite center and a scale > 0")

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        flat = self._regression(raw.float())
        if self.center is None or self.scale is None:
            return flat
        # In float64: over the center, a hundredth of the curve has no digits left for close scores otherwise.
        curve = torch.sigmoid((raw.double() - self.center) / self.scale)
        return torch.lerp(flat.double(), curve, _TILT).float()

    def _regression(self, raw: torch.Tensor) -> torch.Tensor:
        knots = torch.tensor(self.knots, dtype=torch.float32, device=raw.device)
        values = torch.tensor(self.values, dtype=torch.float32, device=raw.device)
        if len(knots) == 1:
            return values.expand(raw.shape).clone()
        raw = raw.clamp(self.knots[0], self.knots[-1])
        right = torch.searchsorted(knots, raw.contiguous()).clamp(1, len(knots) - 1)
        left = right - 1
        gap = (knots[right] - knots[left]).clamp_min(torch.finfo(torch.float32).tiny)
        share = ((raw - knots[left]) / gap).clamp(0.0, 1.0)
        return torch.lerp(values[left], values[right], share)

    @classmethod
    def fit(cls, positive: np.ndarray, negative: np.ndarray) -> "IsotonicCalibration":
        from sklearn.isotonic import IsotonicRegression  # a dependency of RecBole; slow to import

        raw = np.concatenate([positive, negative]).astype(np.float32)
        label = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
        model = IsotonicRegression(y_min=0.0, y_max=1.0).fit(raw, label)
        center, scale = float(raw.mean(dtype=np.float64)), float(raw.std(dtype=np.float64))
        return cls(model.X_thresholds_, model.y_thresholds_, center, scale if scale > 0 else 1.0)


def fit_calibration(kind: str, positive: np.ndarray, negative: np.ndarray) -> Calibration:
    """A calibration by name, fitted to raw scores: positive [P], of held-out items; negative [N], of unseen ones.

    Raises:
        UnknownNameError: nobody registered it.
    """
    return CALIBRATIONS.find(kind).fit(positive, negative)


def calibration_from_dict(description: dict) -> Calibration:
    """Rebuild a calibration from :meth:`Calibration.to_dict`.

    Raises:
        KeyError, TypeError, ValueError: it describes none that is monotone.
    """
    arguments = dict(description)
    kind = arguments.pop("kind")
    return (Calibration if kind == Calibration.kind else CALIBRATIONS[kind])(**arguments)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * z))  # does not overflow
