"""How near is a candidate to the history: similarities in item spaces, the input that all rerankers share.

The user state of a reranker is a mean of item vectors that it learns itself; how a candidate relates to single items of
the history is lost in it. The similarities here are computed, not learned: for each space and each statistic
one number per candidate, as it is and standardised within the request.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.errors import UnknownNameError
from dnr_recbole.names import Names

# history mask [B, H] → weights [B, H] of the similarities to each history item: the statistic is their weighted sum.
Weights = Callable[[Tensor], Tensor]
# similarities [B, n, H] (0 at padding), history mask [B, H] → [B, n].
Statistic = Callable[[Tensor, Tensor], Tensor]
LINEAR: Names[Weights] = Names("affinity statistic", "affinity_statistics")
STATISTICS: Names[Statistic] = Names("affinity statistic", "affinity_statistics")


def register_weights(name: str) -> Callable[[Weights], Weights]:
    """Decorator: the function becomes a statistic of ``affinity_statistics`` that is linear in the similarities."""
    return LINEAR.register(name)


def register_statistic(name: str) -> Callable[[Statistic], Statistic]:
    """Decorator: the function becomes any other statistic of ``affinity_statistics``."""
    return STATISTICS.register(name)


@register_weights("mean")
def mean(mask: Tensor) -> Tensor:
    """The mean over the history."""
    return newest(mask, mask.shape[1])


@register_weights("last1")
def last1(mask: Tensor) -> Tensor:
    """The newest item."""
    return newest(mask, 1)


@register_weights("last5")
def last5(mask: Tensor) -> Tensor:
    """The mean over the newest 5 items."""
    return newest(mask, 5)


@register_weights("last10")
def last10(mask: Tensor) -> Tensor:
    """The mean over the newest 10 items."""
    return newest(mask, 10)


@register_statistic("max")
def maximum(similarities: Tensor, mask: Tensor) -> Tensor:
    """The nearest item of the history."""
    best = similarities.masked_fill(~mask.unsqueeze(1), -torch.inf).amax(-1)
    return best.masked_fill(~mask.any(1, keepdim=True), 0.0)


def newest(mask: Tensor, count: int) -> Tensor:
    """Equal weights of the newest ``count`` items, summing to 1 (0 if there are none); mask ``[B, H]``, valid first."""
    length = mask.sum(1, keepdim=True)
    chosen = mask & (torch.arange(mask.shape[1], device=mask.device) >= length - count)
    return chosen / chosen.sum(1, keepdim=True).clamp(min=1)


class Affinity(nn.Module):
    """Similarities of candidates to the history; nothing in it is trained.

    Args:
        spaces: see :attr:`~dnr_recbole.data.catalogue.Catalogue.spaces`.
        statistics: names out of :data:`LINEAR` and :data:`STATISTICS`.
        standardised: whether each column follows once more, standardised within the request.

    Raises:
        UnknownNameError: nobody registered such a statistic.
    """

    def __init__(self, spaces: Dict[str, Tensor], statistics: List[str], standardised: bool = True):
        super().__init__()
        statistics = list(dict.fromkeys(statistics))
        unknown = [name for name in statistics if name not in LINEAR and name not in STATISTICS]
        if unknown:
            known = ", ".join([*LINEAR, *STATISTICS])
            raise UnknownNameError(
                f"affinity_statistics: '{unknown[0]}' is unknown; choose from {known}, or name the module that "
                "registers it in plugins"
            )
        self.names = list(spaces)
        for number, table in enumerate(spaces.values()):
            self.register_buffer(f"space{number}", table)
        self.linear = [name for name in statistics if name in LINEAR]
        self.other = [name for name in statistics if name not in LINEAR]
        self.standardised = standardised

    @property
    def columns(self) -> List[str]:
        """What :meth:`forward` returns, by column."""
        raw = [f"{space}.{statistic}" for space in self.names for statistic in (*self.linear, *self.other)]
        return raw + [f"{name}.standardised" for name in raw] if self.standardised else raw

    @torch.no_grad()
    def forward(self, slate: UnscoredSlate) -> Tensor:
        """FloatTensor ``[B, n, len(columns)]``, 0 at padding and where the history is empty."""
        with torch.autocast(slate.device.type, enabled=False):
            out = []
            weights = [LINEAR[name](slate.history_mask) for name in self.linear]
            weights = torch.stack(weights, dim=-1).float() if weights else None  # [B, H, w]
            for number in range(len(self.names)):
                alike = self._similarities(getattr(self, f"space{number}"), slate)
                if weights is not None:
                    out.append(torch.bmm(alike, weights))
                out += [STATISTICS[name](alike, slate.history_mask).unsqueeze(-1) for name in self.other]
            raw = torch.cat(out, dim=-1)
            return torch.cat([raw, standardise(raw, slate.mask)], dim=-1) if self.standardised else raw

    @staticmethod
    def _similarities(table: Tensor, slate: UnscoredSlate) -> Tensor:
        """``[B, n, H]``; 0 at padding."""
        n_items = table.shape[2]
        candidates, history = slate.candidates * slate.mask, slate.history * slate.history_mask
        if slate.fold is not None:
            shift = (slate.fold * n_items).unsqueeze(1)
            candidates, history = candidates + shift, history + shift
        rows = table.flatten(1, 2)
        return torch.bmm(F.embedding(candidates, rows[0]), F.embedding(history, rows[-1]).transpose(1, 2))


def standardise(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the valid candidates of each request; values ``[B, n, C]``, mask ``[B, n]``; 0 at
    padding and where all are alike."""
    weight = mask.unsqueeze(-1).to(values.dtype)
    count = weight.sum(1, keepdim=True).clamp(min=1)
    centred = (values - (values * weight).sum(1, keepdim=True) / count) * weight
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * (variance + _LEAST_VARIANCE).rsqrt()


_LEAST_VARIANCE = 1e-8  # below this a column says nothing about the request


def make_affinity(config, catalogue: Catalogue, independent: bool) -> Optional[Affinity]:
    """The similarities that the config asks for; None without a space or a statistic."""
    if not catalogue.spaces or not config["affinity_statistics"]:
        return None
    return Affinity(catalogue.spaces, config["affinity_statistics"], standardised=not independent)
