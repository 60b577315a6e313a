"""How users click a list: which positions they look at, given what they would click.

A click is attraction times examination: c = z · e, and z is what a reranker should learn. Strength 0 means that
everything is examined. A model of your own is registered by name, for the key ``synthetic_clicks``.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from dnr_recbole.names import Names

CLICK_MODELS: Names[type] = Names("click model", "synthetic_clicks")


def register_click_model(name: str) -> Callable[[type], type]:
    """Class decorator: the class becomes a click model of that name."""
    return CLICK_MODELS.register(name)


def make_click_model(name: str, strength: float) -> ClickModel:
    """The click model of a name.

    Raises:
        UnknownNameError: nobody registered it.
    """
    return CLICK_MODELS.find(name)(strength)


class ClickModel:
    """Which positions of a list are examined.

    Args:
        strength: of the bias, ≥ 0; 0 = every position is examined.
    """

    def __init__(self, strength: float):
        self.strength = float(strength)

    def examination(self, attraction: Tensor) -> Tensor:
        """The probability that each position is examined, ``[R, K]``.

        Args:
            attraction: ``[R, K]``, the probability that the item shown at each position is clicked if it is examined.
        """
        raise NotImplementedError

    def examined(self, attracted: Tensor, generator: torch.Generator) -> Tensor:
        """Which positions are examined, drawn: bool ``[R, K]``.

        Args:
            attracted: bool ``[R, K]``, which items are clicked if they are examined.
        """
        raise NotImplementedError


@register_click_model("position")
class PositionBased(ClickModel):
    """Position k, from 0, is examined with probability (k + 1)^−strength, whatever happens at the others."""

    def examination(self, attraction: Tensor) -> Tensor:
        place = torch.arange(1, attraction.shape[1] + 1, dtype=torch.float64)
        return (place**-self.strength).float().expand(attraction.shape)

    def examined(self, attracted: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(attracted.shape, generator=generator) < self.examination(attracted)


@register_click_model("even")
class Even(ClickModel):
    """A control: as much attention as in the position-based model of that strength, the same at every position."""

    def examination(self, attraction: Tensor) -> Tensor:
        seen = make_click_model("position", self.strength).examination(attraction)
        return seen.mean(1, keepdim=True).expand(attraction.shape)

    def examined(self, attracted: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(attracted.shape, generator=generator) < self.examination(attracted)


@register_click_model("cascade")
class Cascade(ClickModel):
    """Users go down the list and leave after a click with probability min(1, strength)."""

    def __init__(self, strength: float):
        super().__init__(min(1.0, strength))

    def examination(self, attraction: Tensor) -> Tensor:
        stays = 1 - self.strength * attraction.double()
        before = torch.cat([torch.ones_like(stays[:, :1]), stays[:, :-1]], dim=1)
        return before.cumprod(1).float()

    def examined(self, attracted: Tensor, generator: torch.Generator) -> Tensor:
        leaves = attracted & (torch.rand(attracted.shape, generator=generator) < self.strength)
        return leaves.long().cumsum(1) - leaves.long() == 0
