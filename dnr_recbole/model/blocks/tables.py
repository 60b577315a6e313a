"""Vectors of items and users from ids, features, popularity and factors."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.catalogue import Catalogue


class SideTable(nn.Module):
    """Representations of ids: a learned embedding plus projections of static columns.

    Args:
        n: number of ids, padding row 0 included.
        dim: width d.
        columns: static features ``[n, f]`` or None, kept as a buffer and not trained.
        init: ``[n, f]`` from which the embedding starts (through a fixed random projection where f ≠ d), or None.
        learn_ids: False leaves the embedding out (ids of test users unseen in training).
        id_dropout: share of occurrences whose embedding is replaced in training by one learned vector, "unknown".
        trained: BoolTensor ``[n]``, the ids that training holds, or None = all. With ``id_dropout``, the others are
            unknown, too: their own embedding would be as it was drawn.
    """

    columns: Any  # tensors or None
    trained: Any

    def __init__(
        self,
        n: int,
        dim: int,
        columns: Optional[Tensor] = None,
        init: Optional[Tensor] = None,
        learn_ids: bool = True,
        id_dropout: float = 0.0,
        trained: Optional[Tensor] = None,
    ):
        super().__init__()
        self.n, self.dim = n, dim
        self.embedding = nn.Embedding(n, dim, padding_idx=0) if learn_ids else None
        if self.embedding is not None:
            with torch.no_grad():
                weight = torch.randn(n, dim) * 0.05
                if init is not None:
                    # An orthogonal map keeps the inner products of the retriever's space where it can.
                    start = init.float()
                    start = start / start[1:].std().clamp(min=1e-6) * 0.05
                    if start.shape[1] != dim:
                        basis = torch.empty(start.shape[1], dim)
                        start = start @ nn.init.orthogonal_(basis)
                    weight = start.clone()
                weight[0] = 0
                self.embedding.weight.copy_(weight)
        self.id_dropout = id_dropout if learn_ids else 0.0
        self.unknown: Any = nn.Parameter(torch.zeros(dim)) if self.id_dropout else None
        known = torch.ones(n) if trained is None else trained.float()
        self.register_buffer("trained", known if self.id_dropout else None)
        if columns is not None and columns.shape[1] == 0:
            columns = None
        self.register_buffer("columns", None if columns is None else columns.float().clone())
        self.project = None if columns is None else nn.Linear(columns.shape[1], dim)
        if self.project is not None:
            nn.init.normal_(self.project.weight, std=0.05 / self.project.in_features**0.5)
            nn.init.zeros_(self.project.bias)

    def _rows(self, ids: Tensor, known: Optional[Tensor] = None) -> Tensor:
        """``known`` bool, the shape of ``ids``: False takes the unknown vector for the embedding; None = all True."""
        parts = []
        if self.embedding is not None:
            own = self.embedding(ids)
            if known is not None:
                own = torch.where(known.unsqueeze(-1), own, self.unknown * (ids > 0).unsqueeze(-1))
            parts.append(own)
        if self.project is not None:
            # The padding row must stay zero although the projection has a bias.
            parts.append(self.project(self.columns[ids]) * (ids > 0).unsqueeze(-1))
        if not parts:  # neither ids nor columns: the table knows nothing
            return torch.zeros(*ids.shape, self.dim, device=ids.device)
        return sum(parts[1:], parts[0])

    def forward(self, *ids: Tensor):
        """Representations ``[..., d]`` of one or several id tensors.

        With projected columns and more ids than rows, the whole table is projected once and then indexed; not in an
        exported graph, which takes one way for all sizes and would hold the table twice.
        """
        whole = not torch.onnx.is_in_onnx_export() and sum(i.numel() for i in ids) > self.n
        known = [None if self.unknown is None else self._known(i) for i in ids]
        if self.project is not None and whole:
            everything = torch.arange(self.n, device=ids[0].device)
            table = self._rows(everything)
            if self.unknown is not None:  # its second half holds each id as an unknown one
                table = torch.cat([table, self._rows(everything, torch.zeros_like(everything, dtype=torch.bool))])
            out = [F.embedding(i if k is None else i + self.n * ~k, table) for i, k in zip(ids, known)]
        else:
            out = [self._rows(i, k) for i, k in zip(ids, known)]
        return out[0] if len(out) == 1 else out

    def _known(self, ids: Tensor) -> Tensor:
        """Which of the ids keep their own embedding: in training a random part, else those that training held."""
        if self.training:
            return torch.rand(ids.shape, device=ids.device) >= self.id_dropout
        return self.trained[ids] > 0


def _join(*columns: Optional[Tensor]) -> Optional[Tensor]:
    present = [c if c.dim() == 2 else c.unsqueeze(1) for c in columns if c is not None and c.numel() > 0]
    return torch.cat(present, dim=1) if present else None


def item_table(config, catalogue: Catalogue) -> SideTable:
    """Item representations as the config asks: ids, retriever's factors, popularity, features."""
    factors = catalogue.item_factors
    return SideTable(
        catalogue.n_items,
        config["embedding_size"],
        columns=_join(
            factors if config["use_retriever_factors"] else None,
            catalogue.item_popularity if config["use_popularity"] else None,
            catalogue.item_features if config["use_features"] else None,
        ),
        init=factors if config["item_init"] == "retriever" else None,
        id_dropout=config["id_dropout"],
        trained=catalogue.items_trained,
    )


def user_table(config, catalogue: Catalogue) -> SideTable:
    """User representations; the id is left out where test users do not occur in training."""
    return SideTable(
        catalogue.n_users,
        config["embedding_size"],
        columns=_join(
            catalogue.user_factors if config["use_retriever_factors"] else None,
            catalogue.user_features if config["use_features"] else None,
        ),
        learn_ids=bool(catalogue.user_ids_known),
        id_dropout=config["id_dropout"],
        trained=catalogue.users_trained,
    )


class MeanHistory(nn.Module):
    """Mean of the history's item vectors; a learned vector where the history is empty."""

    def __init__(self, dim: int):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(dim))

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        """items ``[B, H, d]``, mask ``[B, H]`` → ``[B, d]``."""
        weight = mask.to(items.dtype).unsqueeze(1)
        count = weight.sum(-1)
        mean = torch.bmm(weight, items).squeeze(1) / count.clamp(min=1)
        return torch.where(count > 0, mean, self.empty.to(mean.dtype))
