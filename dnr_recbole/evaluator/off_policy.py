"""Off-policy values of rankings of a logged table: batches of scored requests in, clicks per request out."""

from __future__ import annotations

from typing import Dict, List

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.bias.off_policy import PolicyValue, modelled_clicks, policy_value
from dnr_recbole.data.slate import Slate
from dnr_recbole.lists import best_first, first_score, inverse

AS_SHOWN = "as shown"


class OffPolicy:
    """Collects requests and their scores by rankings, and estimates what each ranking would have got.

    Args:
        positions: K, how many positions the log shows.
    """

    def __init__(self, positions: int):
        self.k = positions
        self._parts: Dict[str, List[Dict[str, np.ndarray]]] = {}

    def add(self, name: str, scores: Tensor, slate: Slate, propensity: Tensor) -> None:
        """A batch of a ranking.

        Args:
            scores: ``[B, n]``, of the ranking.
            slate: with labels and ``position``.
            propensity: ``[B, n]``, the probability that each candidate was shown at its position.
        """
        n, k, position = slate.mask.shape[1], self.k, slate.position
        assert position is not None  # of a log that says where candidates were shown
        place = torch.where((position >= 0) & (position < k) & slate.mask, position, k)
        rows = torch.arange(len(slate)).unsqueeze(1).expand_as(place)
        at = torch.full((len(slate), k + 1), -1, dtype=torch.long)
        at[rows, place] = torch.arange(n).expand_as(place)
        old = at[:, :k]
        order = best_first(scores, slate.mask)
        new = torch.nn.functional.pad(order, (0, max(0, k - n)), value=-1)[:, :k]
        new = new.masked_fill(torch.arange(k) >= slate.mask.sum(1, keepdim=True), -1)
        shown = old >= 0
        take = lambda values, where: values.gather(1, where.clamp(min=0)).numpy()  # noqa: E731
        features = {
            "incoming": first_score(slate.scores),
            "score": scores,
            "rank": inverse(order).float().add(1).log(),
        }
        known = torch.from_numpy(take(propensity.float(), old)).masked_fill(~shown, 1.0)
        weights = ((new == old) & shown) / known
        self._parts.setdefault(name, []).append({
            "clicks": take(slate.labels, old) * shown.numpy(),
            "weights": weights.numpy(),
            "shown": shown.numpy(),
            "filled": ((new >= 0) & shown).numpy(),  # where nothing was shown, no ranking gets a click
            "old": np.stack([take(values, old) for values in features.values()], -1),
            "new": np.stack([take(values, new) for values in features.values()], -1),
        })  # fmt: skip

    def result(self, users: np.ndarray) -> Dict[str, PolicyValue]:
        """The value of each ranking, and of what was shown; ``users`` ``[R]`` in the order in which requests came."""
        out = {}
        for name, parts in self._parts.items():
            found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            new, old = self._modelled(found, users)
            out[name] = policy_value(found["clicks"], found["weights"], found["shown"], users, new, old)
        if self._parts:
            ones = np.ones_like(found["clicks"])
            out[AS_SHOWN] = policy_value(found["clicks"], ones, found["shown"], users)
        return out

    def _modelled(self, found: Dict[str, np.ndarray], users: np.ndarray):
        """Modelled clicks ``[R, K]`` of new and shown items, of each user without his own requests."""
        fold = np.unique(users, return_inverse=True)[1] % 2
        place = np.broadcast_to(np.arange(self.k), found["shown"].shape)
        folds = np.broadcast_to(fold[:, None], place.shape)
        shown, filled = found["shown"], found["filled"]
        old, new = np.zeros(place.shape), np.zeros(place.shape)
        old[shown], new[filled] = modelled_clicks(
            place[shown], found["old"][shown], found["clicks"][shown], folds[shown],
            found["new"][filled], place[filled], folds[filled],
        )  # fmt: skip
        return new, old
