"""Static knowledge about users and items: all that a reranker needs, besides its config, to be built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, Optional

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
        spaces: name → FloatTensor ``[roles, folds + 1, n_items, f]``, unit rows (zero for unknown items) whose inner
            product says how alike two items are (:mod:`dnr_recbole.data.spaces`). With two roles the first is an
            item as a candidate, the second as a part of a history. Table 0 knows the retriever's whole training part,
            table k > 0 none of the users of :attr:`~dnr_recbole.data.slate.Slate.fold` k.
        items_trained, users_trained: BoolTensor ``[n_items]``, ``[n_users]``, which ids occur in the training
            requests; None = all.
        n_scores: retriever scores per candidate (S).
        n_features: what the log says of a request and a candidate, in numbers (P).
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
    spaces: Dict[str, Tensor] = field(default_factory=dict)
    items_trained: Optional[Tensor] = None
    users_trained: Optional[Tensor] = None
    n_scores: int = 1
    n_features: int = 0

    def shapes(self) -> Dict[str, object]:
        """JSON-able description from which :meth:`blank` rebuilds a catalogue of the same shapes."""
        return {each.name: _shapes(getattr(self, each.name)) for each in dataclasses.fields(self)}

    @classmethod
    def blank(cls, shapes: Dict[str, object]) -> Catalogue:
        """A catalogue of zeros: a checkpoint's buffers fill the model built from it."""
        return cls(**{name: _zeros(shape) for name, shape in shapes.items()})


def _shapes(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shapes(each) for name, each in value.items()}
    return list(value.shape) if isinstance(value, Tensor) else value


def _zeros(shape: Any) -> Any:
    if isinstance(shape, dict):
        return {name: _zeros(each) for name, each in shape.items()}
    return torch.zeros(shape) if isinstance(shape, list) else shape
