"""Where x' comes from while no generator is trained (Eq. 4), each kind registered by name for the key ``noise_type``.

========== =========================================================================================================
gaussian   x' = (1 − λ_c) z + λ_c ε, ε Gaussian (DNR-G of the paper)
beta       the same with ε ~ Beta(a, b) (DNR-B, DNR-BL)
fitted     x' ~ Beta(a_z, b_z) with the moments of p(x | z) in the training requests, per score; λ_c = 1
empirical  x' redrawn from the training x of the same label of *another request*, so that a list's own level stays
residual   x' = clip(x + s (e₁ − e₂)), e₁ and e₂ redrawn as above: what x knows of the item beside the label stays
========== =========================================================================================================

The last three are fitted on the training requests, after normalisation, before anything is trained. One of your own::

    @register_noise("mine")
    class Mine(Noise):
        def draw(self, slate): ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Iterator, Tuple

import torch
from torch import Tensor, nn

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import Slate
from dnr_recbole.dnr.noise import HeuristicNoise
from dnr_recbole.names import Names

if TYPE_CHECKING:
    from dnr_recbole.data.dataset import RerankDataset

_REQUESTS = 200_000  # at most, evenly spaced, that a noise is fitted on
_ROWS = 1 << 14
_LEAST_VARIANCE, _SHAPES = 1e-6, (0.02, 500.0)

NOISES: Names[type] = Names("noise_type", "noise_type")


def register_noise(name: str) -> Callable[[type], type]:
    """Class decorator: the class becomes ``noise_type: name``."""
    return NOISES.register(name)


def make_noise(config: Keys, catalogue: Catalogue) -> Noise:
    """The noise of ``noise_type``.

    Raises:
        UnknownNameError: nobody registered it.
    """
    return NOISES.find(config["noise_type"])(config, catalogue)


class Noise(nn.Module):
    """Synthetic scores of requests, without gradient.

    Args:
        config: the run's keys.
        catalogue: sizes; ``n_scores`` retriever scores per candidate.
    """

    def __init__(self, config: Keys, catalogue: Catalogue) -> None:
        super().__init__()
        self.n_scores: int = catalogue.n_scores

    def fit(self, train: RerankDataset) -> None:
        """Learn from the training requests (a RerankDataset); what is set must be in buffers. Default: nothing."""

    def draw(self, slate: Slate) -> Tensor:
        """x' of the shape of the slate's scores, in [0, 1]; values at padding do not matter."""
        raise NotImplementedError


class _Formula(Noise):
    kind = ""

    def __init__(self, config: Keys, catalogue: Catalogue) -> None:
        super().__init__(config, catalogue)
        self.formula = HeuristicNoise(
            self.kind, config["lambda_c"], config["beta_a"], config["beta_b"], config["gaussian_mean"],
            config["gaussian_std"],
        )  # fmt: skip

    def draw(self, slate: Slate) -> Tensor:
        real, labels = slate.all_logged_scores, slate.labels
        return self.formula(labels if real.dim() == 2 else labels.unsqueeze(-1).expand_as(real))


@register_noise("gaussian")
class Gaussian(_Formula):
    """Eq. 4 with Gaussian noise."""

    kind = "gaussian"


@register_noise("beta")
class BetaNoise(_Formula):
    """Eq. 4 with Beta noise."""

    kind = "beta"


@register_noise("fitted")
class Fitted(Noise):
    """Beta distributions with the moments of p(x | z)."""

    shapes: Tensor

    def __init__(self, config: Keys, catalogue: Catalogue) -> None:
        super().__init__(config, catalogue)
        self.register_buffer("shapes", torch.ones(2, self.n_scores, 2))  # label, score, (a, b)

    def fit(self, train: RerankDataset) -> None:
        sums = torch.zeros(2, self.n_scores, 3, dtype=torch.float64)
        for slate in _blocks(train):
            x, there = _columns(slate)
            weights = slate.label_weights  # clicks that are seldom seen stand for those that were not
            for label in (0, 1):
                mine = (there & (slate.labels == label).unsqueeze(-1)).double()
                mine = mine if weights is None else mine * weights.unsqueeze(-1).double()
                for power in range(3):
                    sums[label, :, power] += (x.double() ** power * mine).sum((0, 1))
        mean = sums[..., 1] / sums[..., 0].clamp(min=1)
        variance = (sums[..., 2] / sums[..., 0].clamp(min=1) - mean.square()).clamp(min=_LEAST_VARIANCE)
        mean = mean.clamp(1e-3, 1 - 1e-3)
        weight = (mean * (1 - mean) / variance - 1).clamp(min=1e-3)
        shapes = torch.stack([mean * weight, (1 - mean) * weight], -1).clamp(*_SHAPES)
        self.shapes.copy_(shapes.float())

    def draw(self, slate: Slate) -> Tensor:
        shape = self.shapes[slate.labels.long()]  # [B, n, S, 2]
        gamma = torch._standard_gamma(shape)
        x = gamma[..., 0] / gamma.sum(-1).clamp(min=torch.finfo(gamma.dtype).tiny)
        return x if slate.all_logged_scores.dim() == 3 else x.squeeze(-1)


class _Bank(Noise):
    """Scores of training requests, positives first, from which others are redrawn."""

    bank: Tensor
    count: Tensor

    def __init__(self, config: Keys, catalogue: Catalogue) -> None:
        super().__init__(config, catalogue)
        size, n = config["noise_bank"], config["n_candidates"]
        self.register_buffer("bank", torch.zeros(size, n, self.n_scores))
        self.register_buffer("count", torch.ones(size, 2, dtype=torch.long))  # candidates with z = 0, z = 1

    def fit(self, train: RerankDataset) -> None:
        """Requests that have positives and negatives, as many as fit, drawn with a fixed seed."""
        usable = torch.cat([((s.labels > 0) & s.mask).any(1) & ((s.labels == 0) & s.mask).any(1) for s in _all(train)])
        rows = torch.nonzero(usable).flatten()
        if not len(rows):
            rows = torch.arange(len(train))
        generator = torch.Generator().manual_seed(0)
        chosen = self._chosen(train, rows, generator)
        slate = train.slate(chosen)
        x, _ = _columns(slate)
        # Positives, then negatives, then padding.
        order = torch.where(slate.mask, 1 - slate.labels, torch.full_like(slate.labels, 2)).argsort(dim=1, stable=True)
        ordered = x.gather(1, order.unsqueeze(-1).expand_as(x))
        n = min(self.bank.shape[1], ordered.shape[1])
        self.bank[:, :n] = ordered[:, :n].to(self.bank)
        positives = (slate.labels * slate.mask).sum(1).long()
        counts = torch.stack([slate.mask.sum(1) - positives, positives], -1).clamp(min=0, max=n)
        self.count.copy_(counts.to(self.count))

    def _chosen(self, train: RerankDataset, rows: Tensor, generator: torch.Generator) -> Tensor:
        """As many of ``rows`` as the bank holds, each as likely as its positives weigh."""
        if train.slate(rows[:1]).label_weights is not None:
            found = (train.slate(part).request_weights for part in rows.split(_ROWS))
            cumulative = torch.cat([weights for weights in found if weights is not None]).double().cumsum(0)
            drawn = torch.rand(len(self.bank), generator=generator, dtype=torch.float64) * cumulative[-1]
            return rows[torch.searchsorted(cumulative, drawn).clamp(max=len(rows) - 1)]
        chosen = rows[torch.randperm(len(rows), generator=generator)]
        return chosen[torch.arange(len(self.bank)) % len(chosen)]

    def redraw(self, slate: Slate) -> Tensor:
        """Scores ``[B, n, S]`` of the same label out of another request, one request for each list."""
        labels = slate.labels.long()
        donor = torch.randint(len(self.bank), (len(slate), 1), device=labels.device)
        positives = self.count[donor, 1]  # [B, 1]
        size = self.count[donor.expand_as(labels), labels].clamp(min=1)  # [B, n]
        place = (torch.rand(labels.shape, device=labels.device) * size).long()
        place = torch.where(labels > 0, place, place + positives).clamp(max=self.bank.shape[1] - 1)
        return self.bank[donor, place]


@register_noise("empirical")
class Empirical(_Bank):
    """Scores redrawn list-wise."""

    def draw(self, slate: Slate) -> Tensor:
        x = self.redraw(slate).clamp(min=0.0)
        return x if slate.all_logged_scores.dim() == 3 else x.squeeze(-1)


@register_noise("residual")
class Residual(_Bank):
    """The real score, moved by the difference of two redrawn ones."""

    def __init__(self, config: Keys, catalogue: Catalogue) -> None:
        super().__init__(config, catalogue)
        self.scale: float = config["residual_scale"]

    def draw(self, slate: Slate) -> Tensor:
        real = slate.all_logged_scores
        shift = self.scale * (self.redraw(slate) - self.redraw(slate))
        return (real + (shift if real.dim() == 3 else shift.squeeze(-1))).clamp(0.0, 1.0)


def _columns(slate: Slate) -> Tuple[Tensor, Tensor]:
    """Scores ``[B, n, S]`` and which of them are there."""
    x = slate.all_logged_scores
    x = x if x.dim() == 3 else x.unsqueeze(-1)
    return x.clamp(min=0.0), slate.mask.unsqueeze(-1) & (x >= 0)


def _blocks(train: RerankDataset) -> Iterator[Slate]:
    """Evenly spaced training requests."""
    for rows in torch.arange(len(train))[:: -(-len(train) // _REQUESTS)].split(_ROWS):
        yield train.slate(rows)


def _all(train: RerankDataset) -> Iterator[Slate]:
    for rows in torch.arange(len(train)).split(_ROWS):
        yield train.slate(rows)
