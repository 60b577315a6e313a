"""Normalisation of values over the candidates of a request."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-8  # a range below it counts as constant


def min_max(values: Tensor, mask: Tensor) -> Tensor:
    """Each feature mapped to [0, 1] over the valid candidates of its request; a constant feature becomes 0.

    Where a feature is constant the gradient is 0 too: dividing by a tiny range would make it explode.

    Args:
        values: ``[B, n]`` or ``[B, n, F]``.
        mask: ``[B, n]`` bool, at least one True per row.

    Returns:
        The shape of ``values``, translation- and scale-invariant in it; values at padding are arbitrary.
    """
    valid = mask if values.dim() == 2 else mask.unsqueeze(-1)
    low = values.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    scale = torch.where(spread > EPSILON, 1 / spread.clamp(min=EPSILON), torch.zeros_like(spread))
    return (values - low) * scale
