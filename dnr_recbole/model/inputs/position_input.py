"""What the position did to a click, learned beside what the candidate did, and held constant when the model ranks."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.errors import ConfigError

POSITION_INPUTS = ("logit", "vector")


def make_position_input(config, model: Any) -> Optional[PositionInput]:
    """The module of the key ``position_input``; None for ``none``.

    Raises:
        ConfigError: the training of ``model``, a reranker class, would not read it.
    """
    kind = config["position_input"]
    if kind == "none":
        return None
    if kind not in model.position_inputs:
        usable = " or ".join(model.position_inputs)
        raise ConfigError(f"position_input={kind}: {model.__name__} can use {usable}")
    return PositionInput(kind, config["n_candidates"], config["embedding_size"])


class PositionInput(nn.Module):
    """A table of positions. It starts at zero, so that a model begins as it would without it.

    Args:
        kind: ``logit``: a number for each position, added to the logits in the likelihood; ``vector``: a vector, added
            to the candidate's.
        n: positions.
        dim: width of a candidate's vector.
    """

    def __init__(self, kind: str, n: int, dim: int):
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(n + 1, 1 if kind == "logit" else dim)  # the last row: not shown
        nn.init.zeros_(self.table.weight)

    def on_logits(self, logits: Tensor, slate: UnscoredSlate) -> Tensor:
        """``[B, n]`` (or ``[B, n, T]``): the logits of a click at the candidate's own position; those that rank know
        nothing of it."""
        if self.kind != "logit" or slate.position is None:
            return logits
        term = self.table(self._rows(slate.position))
        return logits + (term if logits.dim() == 3 else term.squeeze(-1))

    def on_vectors(self, candidates: Tensor, slate: UnscoredSlate) -> Tensor:
        """``[B, n, d]`` with the position: in training the candidate's own, when ranking the first for all."""
        if self.kind != "vector":
            return candidates
        if self.training and slate.position is not None:
            return candidates + self.table(self._rows(slate.position)).to(candidates.dtype)
        return candidates + self.table.weight[0].to(candidates.dtype)

    def _rows(self, position: Tensor) -> Tensor:
        last = self.table.num_embeddings - 1
        return torch.where(position < 0, last, position.clamp(max=last))
