"""What a candidate has to do with the history and the request: one block for all rerankers."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.model.blocks.nets import mlp
from dnr_recbole.model.inputs.affinity import Affinity, make_affinity

INTERACTIONS = ("none", "affinity", "attention", "both")


class TargetAttention(nn.Module):
    """Each candidate looks at the history: softmax attention whose keys know their age.

    As in DIN (Zhou et al., KDD 2018) the history is weighted anew for each candidate; scaled inner products take the
    place of DIN's net on pairs, which would cost n · H · d² per request, and a learned bias per age adds recency.

    Args:
        dim: width d of the vectors.
        length: ages with a bias of their own; older items share the last one.
        n_heads: heads; must divide ``dim``.
    """

    def __init__(self, dim: int, length: int, n_heads: int = 1):
        super().__init__()
        self.n_heads = n_heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.age = nn.Parameter(torch.zeros(n_heads, length))
        self.out = mlp([2 * dim, dim, dim])

    def forward(self, candidates: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """candidates ``[B, n, d]``, history ``[B, H, d]``, mask ``[B, H]``, valid first → ``[B, n, d]``."""
        heads = lambda t: t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # noqa: E731
        query, (key, value) = self.q(candidates), self.kv(history).chunk(2, dim=-1)
        age = mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1], device=mask.device)
        bias = self.age[:, age.clamp(0, self.age.shape[1] - 1)].transpose(0, 1).unsqueeze(2)  # [B, h, 1, H]
        logits = heads(query) @ heads(key).transpose(-1, -2) * (query.shape[-1] // self.n_heads) ** -0.5
        # An empty history would be NaN: its rows look everywhere, and what they see is zeroed.
        seen = mask | ~mask.any(1, keepdim=True)
        weights = (logits.float() + bias).masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        mixed = (weights.to(value.dtype) @ heads(value)).transpose(1, 2).flatten(2)
        mixed = mixed.masked_fill(~mask.any(1)[:, None, None], 0.0)
        return self.out(torch.cat([mixed, mixed * query], dim=-1))


class HistoryInteraction(nn.Module):
    """``history_interaction``: a vector per candidate that says how it relates to the history.

    ``affinity``: similarities (:class:`~dnr_recbole.model.inputs.affinity.Affinity`) through two layers; ``attention``:
    :class:`TargetAttention`; ``both``; ``none``. Where a log has features of request and candidate, a linear map of
    them is added, whatever the key says.

    Args:
        independent: the reranker declares that a candidate's score does not depend on the other candidates, so nothing
            is standardised within the request.
    """

    def __init__(self, config, catalogue: Catalogue, independent: bool = False):
        super().__init__()
        kind, dim = config["history_interaction"], config["embedding_size"]
        self.affinity: Optional[Affinity] = None
        self.attention: Optional[TargetAttention] = None
        if kind in ("affinity", "both"):
            self.affinity = make_affinity(config, catalogue, independent)
        if self.affinity is not None:
            self.project = mlp([len(self.affinity.columns), dim, dim])
        if kind in ("attention", "both"):
            self.attention = TargetAttention(dim, config["history_length"])
        self.features = nn.Linear(catalogue.n_features, dim) if catalogue.n_features else None

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return any(part is not None for part in (self.affinity, self.attention, self.features))

    def forward(self, candidates: Tensor, history: Tensor, slate: UnscoredSlate) -> Tensor:
        """Vectors of the slate's candidates ``[B, n, d]`` and history ``[B, H, d]`` → ``[B, n, d]``.

        Must not be called unless :attr:`active`.
        """
        parts = []
        if self.affinity is not None:
            parts.append(self.project(self.affinity(slate)))
        if self.attention is not None:
            parts.append(self.attention(candidates, history, slate.history_mask))
        if self.features is not None:
            parts.append(self.features(slate.features))
        return sum(parts[1:], parts[0])
