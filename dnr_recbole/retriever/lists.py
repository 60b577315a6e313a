"""What a retriever gives each user as of now, kept as lists: small, and the same for every kind of retriever."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.data.interactions import Interactions
from dnr_recbole.retriever.retrieval import Retrieval

_USERS = 4096  # at a time


@dataclass(frozen=True)
class RetrievedLists:
    """items int32 [U, n], best first, 0 = none; scores float32 [U, n], the calibrated x."""

    items: Tensor
    scores: Tensor


def retrieve_now(retrieval: Retrieval, interactions: Interactions, n: int, repeatable: bool) -> RetrievedLists:
    """Every user's best n items that he has not met anywhere in the log; with ``repeatable``, any."""
    n = min(n, interactions.n_items - 1)
    items = torch.zeros(interactions.n_users, n, dtype=torch.int32)
    scores = torch.zeros(interactions.n_users, n)
    for start in range(1, interactions.n_users, _USERS):
        users = np.arange(start, min(start + _USERS, interactions.n_users))
        exclude = None if repeatable else (interactions.ptr[users], interactions.ptr[users + 1], interactions.item)
        top, x = retrieval.top_n(users, n, exclude=exclude)
        items[start : start + len(users)] = top.int()
        scores[start : start + len(users)] = x * (top > 0)
    return RetrievedLists(items, scores)
