"""The one batch type that flows from the candidate table through every reranker to the evaluator."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Optional, Protocol, Union, cast

import torch
from torch import Tensor

from dnr_recbole.lists import first_score, take

MISSING = -1.0  # in the place of one of several scores that a candidate has not


def _each(emptied: bool = True, **options: Any) -> Any:
    """A field with a value per candidate; ``emptied``: 0 stands where the candidate becomes padding."""
    return field(metadata={"per_candidate": True, "emptied": emptied}, **options)


class UnscoredSlate(Protocol):
    """What a reranker may read of a :class:`Slate` beside the scores x that it is given, which can be made of labels.

    :meth:`Slate.unscored` gives one in which nothing else is there.
    """

    @property
    def users(self) -> Tensor: ...
    @property
    def history(self) -> Tensor: ...
    @property
    def history_mask(self) -> Tensor: ...
    @property
    def candidates(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def fold(self) -> Optional[Tensor]: ...
    @property
    def features(self) -> Optional[Tensor]: ...
    @property
    def position(self) -> Optional[Tensor]: ...
    @property
    def logged_scores(self) -> Tensor: ...
    @property
    def all_logged_scores(self) -> Tensor: ...
    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def unscored(self) -> UnscoredSlate: ...


class _Unscored:
    """A slate whose scores and labels are out of sight."""

    _READABLE = frozenset(name for name in vars(UnscoredSlate) if not name.startswith("_"))
    __slots__ = ("_slate",)

    def __init__(self, slate: Slate):
        self._slate = slate

    def __len__(self) -> int:
        return len(self._slate)

    def __getattr__(self, name: str) -> Any:
        if name not in self._READABLE:
            raise AttributeError(
                f"a reranker's encode and score must not read {name} of a slate: the scores that they may read are x, "
                "and labels are what they are to predict"
            )
        return getattr(self._slate, name)

    def unscored(self) -> UnscoredSlate:
        return cast(UnscoredSlate, self)


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
        scores: FloatTensor ``[B, n]`` in [0, 1], 0 at padding: the retriever scores that a model reads as its input.
            A training framework may have put others into their place (:meth:`with_scores`), even such that are made
            of labels. Of several retrievers ``[B, n, S]``: the first gives the incoming order, and a score that a
            candidate has not is :data:`MISSING`.
        labels: FloatTensor ``[B, n]`` of 0/1, or None when serving.
        fold: LongTensor ``[B]``, which of the catalogue's item spaces this request may read; None = 0, the whole one.
        features: FloatTensor ``[B, n, P]``, what the log says of the request and the candidate; None = nothing.
        shown: BoolTensor ``[B, n]``, which candidates the user saw, so that their labels mean something; None = all.
        targets: FloatTensor ``[B, n]``, what losses learn in the place of the labels: grades, several objectives,
            clicks corrected for bias (then also above 1); None = the labels.
        objectives: FloatTensor ``[B, n, T]``, feedback of several kinds, each to be learned for itself; None = what
            ``targets`` or the labels say is all.
        weights: FloatTensor ``[B, n]`` ≥ 0, what each candidate counts in a loss; None = 1.
        position: LongTensor ``[B, n]``, where the candidate was shown, from 0; −1 = nowhere; None = not known.
    """

    users: Tensor
    history: Tensor
    history_mask: Tensor
    candidates: Tensor = _each()
    mask: Tensor = _each(emptied=False)
    scores: Tensor = _each()
    labels: Tensor = _each(default=None)  # not Optional: whoever reads them trains or evaluates
    fold: Optional[Tensor] = None
    features: Optional[Tensor] = _each(default=None)
    shown: Optional[Tensor] = _each(emptied=False, default=None)
    targets: Optional[Tensor] = _each(default=None)
    objectives: Optional[Tensor] = _each(default=None)
    weights: Optional[Tensor] = _each(default=None)
    position: Optional[Tensor] = _each(emptied=False, default=None)
    # The retriever's own scores, held only where `scores` are not these.
    _logged: Optional[Tensor] = _each(default=None)

    @property
    def logged_scores(self) -> Tensor:
        """FloatTensor ``[B, n]``: the retriever's own scores, whatever :meth:`with_scores` made of ``scores``; of
        several, the one that gives the incoming order, with −1 where it is missing.

        They say how the retriever ordered the candidates. Every list that stands for what was shown, every target and
        every list that a model's evaluator or discriminator learns on is ordered by them, never by ``scores``.
        Without :meth:`with_scores` they are ``scores``, the same tensor.
        """
        return first_score(self.all_logged_scores)

    @property
    def all_logged_scores(self) -> Tensor:
        """The same of all retrievers: the shape of ``scores``."""
        return self.scores if self._logged is None else self._logged

    @property
    def feedback(self) -> Tensor:
        """FloatTensor ``[B, n]`` that losses learn: ``targets``, or else ``labels``."""
        return self.labels if self.targets is None else self.targets

    @property
    def gains(self) -> Tensor:
        """FloatTensor ``[B, n]``: what ranking the candidate is worth in weighted metrics and rewards."""
        return self.feedback if self.weights is None else self.feedback * self.weights

    @property
    def label_weights(self) -> Optional[Tensor]:
        """FloatTensor ``[B, n]``, for losses that need to know positives from others: what each label counts, a
        positive's target being a part of that. None = 1 each."""
        if self.weights is None and self.targets is None:
            return None
        weights = torch.ones_like(self.labels) if self.weights is None else self.weights
        return weights if self.targets is None else torch.where(self.labels > 0, weights * self.targets, weights)

    @property
    def request_weights(self) -> Optional[Tensor]:
        """FloatTensor ``[B]``, for losses about a whole list: the mean of :attr:`label_weights` over a request's
        positives, over all its candidates if it has none. None = 1 each."""
        weights = self.label_weights
        if weights is None:
            return None
        positive = (self.labels > 0) & self.mask
        part = torch.where(positive.any(1, keepdim=True), positive, self.mask).to(weights.dtype)
        return (weights * part).sum(1) / part.sum(1).clamp(min=1)

    def __len__(self) -> int:
        return self.candidates.shape[0]

    @property
    def device(self) -> torch.device:
        return self.candidates.device

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Slate:
        changed: Dict[str, Any] = {
            field.name: fn(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **changed)

    def to(self, device: Union[str, torch.device], non_blocking: bool = False) -> Slate:
        """The same slate on ``device``."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def select(self, rows: Any) -> Slate:
        """The requests ``rows`` (LongTensor, bool mask or slice) of this slate."""
        return self._map(lambda t: t[rows])

    def with_scores(self, scores: Tensor) -> Slate:
        """The same requests with other scores ``[B, n]`` to read; :attr:`logged_scores` stay.

        For requests of another retriever, whose lists change as well, use ``dataclasses.replace(slate, scores=…)`` on
        a slate as it came from the table.
        """
        return dataclasses.replace(self, scores=scores, _logged=self.all_logged_scores)

    def without_labels(self) -> Slate:
        """What a reranker sees when it serves."""
        nothing: Any = None
        return dataclasses.replace(self, labels=nothing, targets=None, objectives=None, weights=None)

    def unscored(self) -> UnscoredSlate:
        """The requests without scores to read and without labels; to read one of them raises an AttributeError."""
        return cast(UnscoredSlate, _Unscored(self))

    def only_shown(self) -> Slate:
        """Without the candidates that the user did not see: padding stands in their place."""
        if self.shown is None:
            return self
        mask = self.mask & self.shown
        hidden: Dict[str, Any] = {
            each.name: value.masked_fill(~(mask if value.dim() == 2 else mask.unsqueeze(-1)), 0)
            for each in dataclasses.fields(self)
            if each.metadata.get("emptied") and (value := getattr(self, each.name)) is not None
        }
        return dataclasses.replace(self, mask=mask, shown=None, **hidden)

    def shuffled(self, order: Tensor) -> Slate:
        """Candidates in another order; ``order`` is a LongTensor ``[B, n]`` of positions."""
        moved: Dict[str, Any] = {
            each.name: take(value, order)
            for each in dataclasses.fields(self)
            if each.metadata.get("per_candidate") and (value := getattr(self, each.name)) is not None
        }
        return dataclasses.replace(self, **moved)
