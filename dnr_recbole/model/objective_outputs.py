"""An output for each kind of feedback: z ``[B, n, T]``, which DNR's authors name as future work."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import ConfigError
from dnr_recbole.lists import NEG_INF
from dnr_recbole.model.losses import list_ce


def make_objective_outputs(config, model: Any, likelihood: Callable[..., Tensor]) -> Optional[ObjectiveOutputs]:
    """The module of ``objective_outputs: apart``; None where one output learns the weighted mean.

    Raises:
        ConfigError: ``model``, a reranker class, has one output only.
    """
    if config["objective_outputs"] == "mean":
        return None
    if not model.objective_outputs:
        raise ConfigError(
            f"objective_outputs=apart: {model.__name__} has one output, which learns the weighted mean "
            "(objective_outputs=mean); models with several are named in docs/bias.md"
        )
    return ObjectiveOutputs(list(config["objectives"].values()), likelihood)


class ObjectiveOutputs(nn.Module):
    """How the logits of T objectives are learned and become one ranking.

    Args:
        weights: of the objectives, above 0; their share of the sum is what an objective counts.
        likelihood: of :mod:`dnr_recbole.model.losses`.
    """

    shares: Tensor

    def __init__(self, weights, likelihood: Callable[..., Tensor]):
        super().__init__()
        shares = torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("shares", shares / shares.sum(), persistent=False)
        self.likelihood = likelihood

    def __len__(self) -> int:
        return len(self.shares)

    def loss(self, logits: Tensor, slate: Slate) -> Tensor:
        """Σ_t share_t · −log q(z_t | x) of logits ``[B, n, T]``; the slate must have objectives."""
        assert slate.objectives is not None
        losses = [
            self.likelihood(logits[..., t], slate.objectives[..., t], slate.mask, slate.weights)
            for t in range(len(self))
        ]
        return (torch.stack(losses) * self.shares).sum()

    def together(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, n]`` of the weighted mean of what ``[B, n, T]`` say, finite wherever those are.

        Under ``bce`` log-odds of Σ_t share_t · σ(logit_t); under ``listce``, whose logits mean nothing but a share of
        the request's feedback, the logarithm of the weighted mean of the T softmaxes.
        """
        logits, log_share = logits.float(), self.shares.log()
        if self.likelihood is list_ce:
            log_p = torch.log_softmax(logits.masked_fill(~mask.unsqueeze(-1), NEG_INF), dim=1)
            return torch.logsumexp(log_p + log_share, dim=-1)
        yes, no = (torch.logsumexp(F.logsigmoid(sign * logits) + log_share, dim=-1) for sign in (1, -1))
        return yes - no
