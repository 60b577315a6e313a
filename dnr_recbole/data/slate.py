"""The one batch type that flows from the candidate table through every reranker to the evaluator."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slate:
    """A batch of ``B`` reranking requests with ``n`` candidates and ``H`` history items each.

    Masks are inputs of their own: they are never derived from ids or labels.

    Attributes:
        users: LongTensor ``[B]``; 0 is the unknown user.
        history: LongTensor ``[B, H]``; item ids, oldest first, the valid part first, 0 behind it.
        history_mask: BoolTensor ``[B, H]``; True where ``history`` is real. A row may be empty.
        candidates: LongTensor ``[B, n]``; item ids, 0 at padding, stored in random order.
        mask: BoolTensor ``[B, n]``; True where a candidate is real. Every row has at least one.
        scores: FloatTensor ``[B, n]``; the retriever's scores in [0, 1], 0 at padding.
        labels: FloatTensor ``[B, n]`` of 0/1, or None when serving.
    """

    users: Tensor
    history: Tensor
    history_mask: Tensor
    candidates: Tensor
    mask: Tensor
    scores: Tensor
    labels: Optional[Tensor] = None

    def __len__(self) -> int:
        return self.candidates.shape[0]

    @property
    def device(self) -> torch.device:
        return self.candidates.device

    def _map(self, fn) -> Slate:
        changed = {
            field.name: fn(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **changed)

    def to(self, device, non_blocking: bool = False) -> Slate:
        """The same slate on ``device``."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def select(self, rows) -> Slate:
        """The requests ``rows`` (LongTensor, bool mask or slice) of this slate."""
        return self._map(lambda t: t[rows])

    def with_scores(self, scores: Tensor) -> Slate:
        """The same requests as another retriever would have scored them; ``scores`` is ``[B, n]``."""
        return dataclasses.replace(self, scores=scores)

    def without_labels(self) -> Slate:
        """What a reranker sees when it serves."""
        return dataclasses.replace(self, labels=None)

    def shuffled(self, order: Tensor) -> Slate:
        """Candidates in another order; ``order`` is a LongTensor ``[B, n]`` of positions."""
        moved = {
            name: getattr(self, name).gather(1, order)
            for name in ("candidates", "mask", "scores", "labels")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **moved)
