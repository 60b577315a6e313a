"""Static knowledge about users and items: all that a reranker needs, besides its config, to be built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Dict, Optional

import torch
from torch import Tensor


@dataclass(frozen=True)
class Catalogue:
    """Side tables, indexed by RecBole's internal ids; row 0 is padding.

    Everything is computed from the retriever's training interactions, so no table knows the future.

    Attributes:
        n_users: number of users, padding row included.
        n_items: number of items, padding row included.
        item_popularity: FloatTensor ``[n_items]``; log(1 + count), divided by its maximum.
        item_features: FloatTensor ``[n_items, F]``; multi-hot and standardised numbers; F may be 0.
        user_features: FloatTensor ``[n_users, F']``; F' may be 0.
        item_factors: FloatTensor ``[n_items, f]``; the retriever's item vectors, or None.
        user_factors: FloatTensor ``[n_users, f]``; the retriever's user vectors, or None.
        item_counts: LongTensor ``[n_items]``; interactions per item, for popularity metrics, or None.
        user_ids_known: False if test users do not occur in training; rerankers then learn no user id.
    """

    n_users: int
    n_items: int
    item_popularity: Tensor
    item_features: Tensor
    user_features: Tensor
    item_factors: Optional[Tensor] = None
    user_factors: Optional[Tensor] = None
    item_counts: Optional[Tensor] = None
    user_ids_known: bool = True

    def shapes(self) -> Dict[str, object]:
        """JSON-able description from which :meth:`blank` rebuilds a catalogue of the same shapes."""
        out: Dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            out[field.name] = list(value.shape) if isinstance(value, Tensor) else value
        return out

    @classmethod
    def blank(cls, shapes: Dict[str, object]) -> Catalogue:
        """A catalogue of zeros: a checkpoint's buffers fill the model built from it."""
        return cls(**{k: torch.zeros(v) if isinstance(v, list) else v for k, v in shapes.items()})
