"""The candidate table: every request with its candidates, scores and labels, compact in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.data.ranges import blocks
from dnr_recbole.data.slate import Slate


@dataclass(frozen=True)
class CandidateTable:
    """R requests with n candidates each, compact in memory; sorted by (user, time of the request).

    Histories of the requests of a user overlap, so they are kept once, as ranges of one flat array.

    Attributes:
        users: int32 [R].
        candidates: int32 [R, n], 0 at padding.
        mask: bool [R, n], True = real candidate.
        scores: float32 [R, n], the retriever's, in [0, 1]; 0 at padding; [R, n, S] of several retrievers.
        labels: bool [R, n].
        split: int8 [R], 0 train, 1 valid, 2 test.
        n_positives: int32 [R], all positives of the request, including those that were not retrieved.
        history_items: int32 [M], items in (user, time) order; the last element is 0 (what padding points at).
        history_begin, history_end: int64 [R], range of ``history_items`` that lies before the request.
        history_length: H, how many of them (the newest) a reranker sees.
        fold: int16 [R], see :attr:`~dnr_recbole.data.slate.Slate.fold`; None = 0 everywhere.
        features: float32 [R, n, P], see :attr:`~dnr_recbole.data.slate.Slate.features`, or None.
        shown: bool [R, n], see :attr:`~dnr_recbole.data.slate.Slate.shown`, or None.
        targets, weights: float32 [R, n], see :class:`~dnr_recbole.data.slate.Slate`, or None.
        objectives: float32 [R, n, T], see :attr:`~dnr_recbole.data.slate.Slate.objectives`, or None.
        position: int16 [R, n], where a candidate was shown, −1 = nowhere; None = not known or not asked for.
        intended: int16 [R, n], where the old system would have put it, had nothing been moved at random, or None.
        propensity: float32 [R, n], the probability that it was shown at its position, or None.
        examination: float32 [R, n], the probability that a user looks there, or None.
        randomised: bool [R, n], whether chance alone put it there, or None.
    """

    users: Tensor
    candidates: Tensor
    mask: Tensor
    scores: Tensor
    labels: Tensor
    split: Tensor
    n_positives: Tensor
    history_items: Tensor
    history_begin: Tensor
    history_end: Tensor
    history_length: int
    fold: Optional[Tensor] = None
    features: Optional[Tensor] = None
    shown: Optional[Tensor] = None
    targets: Optional[Tensor] = None
    objectives: Optional[Tensor] = None
    weights: Optional[Tensor] = None
    position: Optional[Tensor] = None
    intended: Optional[Tensor] = None
    propensity: Optional[Tensor] = None
    examination: Optional[Tensor] = None
    randomised: Optional[Tensor] = None

    def __len__(self) -> int:
        return len(self.users)

    def gather_history(self, rows: Tensor) -> Tuple[Tensor, Tensor]:
        """Histories of ``rows`` [B]: items (LongTensor [B, H], oldest first, 0 behind them) and mask."""
        end = self.history_end[rows]
        length = (end - self.history_begin[rows]).clamp(max=self.history_length)
        step = torch.arange(self.history_length)
        mask = step < length[:, None]
        position = torch.where(mask, (end - length)[:, None] + step, len(self.history_items) - 1)
        return self.history_items[position].long(), mask

    @property
    def history(self) -> Tensor:
        """All histories, LongTensor [R, H]: large; batches use :meth:`gather_history`."""
        return self.gather_history(torch.arange(len(self)))[0]

    @property
    def history_mask(self) -> Tensor:
        """BoolTensor [R, H]."""
        return self.gather_history(torch.arange(len(self)))[1]

    def slate(self, rows: Tensor) -> Slate:
        """The requests ``rows`` (LongTensor [B]) as a batch."""
        history, history_mask = self.gather_history(rows)
        return Slate(
            users=self.users[rows].long(),
            history=history,
            history_mask=history_mask,
            candidates=self.candidates[rows].long(),
            mask=self.mask[rows],
            scores=self.scores[rows],
            labels=self.labels[rows].float(),
            fold=None if self.fold is None else self.fold[rows].long(),
            features=None if self.features is None else self.features[rows],
            shown=None if self.shown is None else self.shown[rows],
            targets=None if self.targets is None else self.targets[rows],
            objectives=None if self.objectives is None else self.objectives[rows],
            weights=None if self.weights is None else self.weights[rows],
            position=None if self.position is None else self.position[rows].long(),
        )

    def to_tensors(self) -> Dict[str, Tensor]:
        """Everything as tensors, for the cache; inverse of :meth:`from_tensors`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: torch.as_tensor(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Dict[str, Tensor]) -> CandidateTable:
        values: Dict[str, Any] = {**tensors, "history_length": int(tensors["history_length"])}
        return cls(**values)


def shuffle_candidates(table: CandidateTable, seed: int) -> CandidateTable:
    """Candidates of each request in random, seeded order: storage order then says nothing about labels."""
    generator = np.random.default_rng(seed)
    out: Dict[str, Any] = {
        name: torch.empty_like(getattr(table, name)) for name in ("candidates", "mask", "scores", "labels")
    }
    n = table.candidates.shape[1]
    for low, high in blocks(len(table), n):
        order = torch.from_numpy(generator.random((high - low, n), dtype=np.float32).argsort(1))
        for name, target in out.items():
            target[low:high] = getattr(table, name)[low:high].gather(1, order)
    return dataclasses.replace(table, **out)
