"""What stage 1 hands to stage 2: a fitted retriever behind calibrated scores, top-n and factors."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender
from torch import nn

from dnr_recbole.errors import DataError
from dnr_recbole.retriever.calibration import Calibration
from dnr_recbole.retriever.search import rows_per_chunk, top_n

_PREDICT_PAIRS = 2**18  # pairs per call of `predict`, for models without `full_sort_predict`


@dataclass
class Retrieval:
    """A fitted retriever. All scores are on the CPU; U users and I items include the padding row 0.

    Attributes:
        name: class name of the retriever.
        model: the RecBole recommender, in eval mode.
        calibration: raw score -> x in [0, 1].
        split: int8 [N], aligned with Interactions: 0 = the retriever was fitted on it, 1 = its validation and
            calibration part, 2 = later, never seen by it.
        train_count: int64 [I], interactions per item in the parts 0 and 1.
        metrics: ``auc`` and ``recall@n`` of part 2, fractions.
        key: everything that determined the fit, in clear (a candidate table is cached under this and its own
            keys).
        item_factors, user_factors: float32 [I, f], [U, f], centred and scaled to unit variance, row 0 zero;
            None if the model has none.
    """

    name: str
    model: GeneralRecommender
    calibration: Calibration
    uid_field: str
    iid_field: str
    n_users: int
    n_items: int
    split: np.ndarray
    train_count: torch.Tensor
    metrics: Dict[str, float] = field(default_factory=dict)
    key: dict = field(default_factory=dict)
    item_factors: Optional[torch.Tensor] = None
    user_factors: Optional[torch.Tensor] = None

    @torch.no_grad()
    def raw_scores(self, users) -> torch.Tensor:
        """users [b] -> the model's own scores float32 [b, I]; column 0 is meaningless."""
        users = torch.as_tensor(users, dtype=torch.long)
        batch = Interaction({self.uid_field: users}).to(self.model.device)
        try:
            scores = self.model.full_sort_predict(batch)
        except NotImplementedError:
            scores = self._predict_all(users)
        scores = torch.as_tensor(scores).detach().reshape(len(users), self.n_items).float().cpu()
        if not torch.isfinite(scores[:, 1:]).all():
            raise DataError(
                f"retriever '{self.name}' produced scores that are not finite; "
                "lower its learning rate or choose another"
            )
        return scores

    def score_chunks(self, users) -> torch.Tensor:
        """users [b] -> x float32 [b, I] in [0, 1]; column 0 is 0. The caller chooses b (see
        search.rows_per_chunk)."""
        scores = self.calibration(self.raw_scores(users))
        scores[:, 0] = 0.0
        return scores

    def top_n(self, users, n: int, exclude=None) -> Tuple[torch.Tensor, torch.Tensor]:
        """The n best items of every row and their x: int64 [R, n], float32 [R, n]; see
        :func:`search.top_n`."""
        return top_n(self, users, n, exclude)

    def score_items(self, users, items) -> torch.Tensor:
        """users [R], items [R, k] -> x float32 [R, k]; 0 where the item is the padding item 0."""
        items = torch.as_tensor(items, dtype=torch.long)
        users = torch.as_tensor(users, dtype=torch.long)
        flat_users = users.unsqueeze(1).expand_as(items).reshape(-1)
        raw = torch.from_numpy(self.raw_pairs(flat_users.numpy(), items.reshape(-1).numpy())).view(items.shape)
        return torch.where(items > 0, self.calibration(raw), torch.zeros_like(raw))

    def raw_pairs(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """users [M], items [M] -> raw scores float32 [M]; every distinct user is scored once. Item 0 gives
        0."""
        out = np.zeros(len(users), dtype=np.float32)
        order = np.argsort(users, kind="stable")
        distinct, begin = np.unique(users[order], return_index=True)
        begin = np.append(begin, len(users))
        step = rows_per_chunk(self.n_items)
        for start in range(0, len(distinct), step):
            chunk = distinct[start : start + step]
            rows = order[begin[start] : begin[start + len(chunk)]]
            scores = self.raw_scores(chunk).numpy()
            out[rows] = scores[np.searchsorted(chunk, users[rows]), items[rows]]
        out[items == 0] = 0.0
        return out

    def _predict_all(self, users: torch.Tensor) -> torch.Tensor:
        """Every item for every user through the pointwise ``predict``."""
        all_users = users.repeat_interleave(self.n_items)
        all_items = torch.arange(self.n_items).repeat(len(users))
        scores = [
            self.model.predict(Interaction({self.uid_field: u, self.iid_field: i}).to(self.model.device)).reshape(-1)
            for u, i in zip(all_users.split(_PREDICT_PAIRS), all_items.split(_PREDICT_PAIRS))
        ]
        return torch.cat(scores)


@torch.no_grad()
def extract_factors(model: GeneralRecommender, n_users: int, n_items: int):
    """-> (user_factors, item_factors), standardised, or (None, None) for models that have no such vectors.

    Looks for the methods ``user_factors()``/``item_factors()`` (ours), a ``forward()`` without arguments that
    returns the propagated vectors of all users and items (LightGCN and other graph models), or two embedding
    tables (BPR).
    """
    pair = None
    if hasattr(model, "item_factors"):
        pair = model.user_factors(), model.item_factors()
    elif type(model).forward is not nn.Module.forward and _takes_no_argument(model.forward):
        out = model.forward()
        pair = out[:2] if isinstance(out, tuple) and len(out) >= 2 else None
    if pair is None:
        users, items = (getattr(model, name, None) for name in ("user_embedding", "item_embedding"))
        if isinstance(users, nn.Embedding) and isinstance(items, nn.Embedding):
            pair = users.weight, items.weight
    if pair is None or any(not torch.is_tensor(t) or t.dim() != 2 for t in pair):
        return None, None
    if pair[0].shape[0] != n_users or pair[1].shape[0] != n_items:
        return None, None
    return _standardise(pair[0]), _standardise(pair[1])


def _standardise(factors: torch.Tensor) -> torch.Tensor:
    """Centre each dimension and scale all by one number: unit variance on average, angles kept, row 0
    zero."""
    factors = factors.detach().float().cpu().clone()
    real = factors[1:]
    real -= real.mean(0, keepdim=True)
    real /= real.pow(2).mean().sqrt().clamp_min(1e-12)
    factors[0] = 0.0
    return factors


def _takes_no_argument(function) -> bool:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(
        p.default is not inspect.Parameter.empty or p.kind in kinds
        for p in inspect.signature(function).parameters.values()
    )
