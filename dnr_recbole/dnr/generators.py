"""Generators f_φ of synthetic scores (Eq. 4 with λ_c = 1), each registered by name for the key ``generator``.

======== ===========================================================================================================
pooled   the paper's: a 2-layer MLP of user, label and noise of each candidate for itself
list     noise of the request, too, and the candidate (with its affinity) as inputs: lists differ as a whole
residual x' = σ(log-odds(x) + g): what x knows of user and item beside the label stays
======== ===========================================================================================================
"""

from __future__ import annotations

from typing import Callable, Tuple

import torch
from torch import Tensor, nn

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.slate import Slate
from dnr_recbole.dnr.noise import NoiseGenerator, feedback, signed
from dnr_recbole.model.context import Context
from dnr_recbole.model.inputs.score_fusion import log_odds
from dnr_recbole.names import Names

GENERATORS: Names[Callable] = Names("generator", "generator")


def register_generator(name: str) -> Callable[[Callable], Callable]:
    """Decorator: ``make(config, dim, n_scores)``, a module with ``draw(context, slate)``, is ``generator: name``."""
    return GENERATORS.register(name)


def make_generator(config: Keys, dim: int, n_scores: int) -> nn.Module:
    """The generator of the key ``generator``.

    Raises:
        UnknownNameError: nobody registered it.
    """
    return GENERATORS.find(config["generator"])(config, dim, n_scores)


@register_generator("pooled")
def pooled(config: Keys, dim: int, n_scores: int) -> nn.Module:
    """The paper's generator."""
    hidden, noise = config["generator_hidden"], config["generator_noise_dim"]
    return NoiseGenerator(dim, hidden, noise, config["generator_use_item"], n_scores, _n_objectives(config))


class ListGenerator(nn.Module):
    """A 2-layer MLP whose noise has a part of the request and a part of each candidate.

    Args:
        dim: width of user states and candidate vectors.
        hidden: hidden width.
        noise_dim: Gaussian inputs of the request, and as many of each candidate.
        n_scores: S.
        n_objectives: T.
    """

    def __init__(self, dim: int, hidden: int, noise_dim: int, n_scores: int, n_objectives: int = 1) -> None:
        super().__init__()
        self.noise_dim = noise_dim
        self.from_user, self.from_item = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.from_label = nn.Linear(n_objectives, hidden, bias=False)
        self.from_request = nn.Linear(noise_dim, hidden, bias=False)
        self.from_candidate = nn.Linear(noise_dim, hidden, bias=False)
        self.out = nn.Linear(hidden, n_scores)

    def raw(self, context: Context, labels: Tensor) -> Tensor:
        """``[B, n, S]`` before squashing, of labels ``[B, n]`` or ``[B, n, T]``; gradients reach φ only."""
        batch, n = labels.shape[:2]
        request = torch.randn(batch, 1, self.noise_dim, device=labels.device)
        candidate = torch.randn(batch, n, self.noise_dim, device=labels.device)
        hidden = self.from_user(context.user.detach()).unsqueeze(1) + self.from_request(request)
        hidden = hidden + self.from_item(context.candidates.detach()) + self.from_candidate(candidate)
        hidden = hidden + self.from_label(signed(labels))
        return self.out(torch.relu(hidden)).float()

    def draw(self, context: Context, slate: Slate) -> Tensor:
        """x' of the shape of the slate's scores, in (0, 1)."""
        return _shaped(torch.sigmoid(self.raw(context, feedback(slate))), slate)


@register_generator("list")
def of_lists(config: Keys, dim: int, n_scores: int) -> nn.Module:
    """:class:`ListGenerator`."""
    return ListGenerator(*_sizes(config, dim, n_scores))


class ResidualGenerator(ListGenerator):
    """Moves the real scores on the scale of their log-odds, so that x' stays in (0, 1) with a gradient everywhere."""

    def draw(self, context: Context, slate: Slate) -> Tensor:
        real = slate.all_logged_scores.clamp(min=0.0)
        real = real if real.dim() == 3 else real.unsqueeze(-1)
        return _shaped(torch.sigmoid(log_odds(real) + self.raw(context, feedback(slate))), slate)


@register_generator("residual")
def residual(config: Keys, dim: int, n_scores: int) -> nn.Module:
    """:class:`ResidualGenerator`."""
    return ResidualGenerator(*_sizes(config, dim, n_scores))


def _sizes(config: Keys, dim: int, n_scores: int) -> Tuple[int, ...]:
    return dim, config["generator_hidden"], config["generator_noise_dim"], n_scores, _n_objectives(config)


def _n_objectives(config: Keys) -> int:
    """Kinds of feedback that z has."""
    return len(config["objectives"]) if config["objective_outputs"] == "apart" else 1


def _shaped(x: Tensor, slate: Slate) -> Tensor:
    return x if slate.all_logged_scores.dim() == 3 else x.squeeze(-1)
