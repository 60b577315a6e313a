"""Requests → tensors, the same way in training and in serving."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Tuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dnr_recbole.data.normalization import normalize_scores
from dnr_recbole.data.slate import MISSING, Slate
from dnr_recbole.requestlog.columns import Tokens
from dnr_recbole.requestlog.decoding import Columns, Requests
from dnr_recbole.requestlog.encoders import Encoders
from dnr_recbole.requestlog.feedback import EXPOSURE
from dnr_recbole.requestlog.scan import Ids
from dnr_recbole.retriever.calibration import Calibration, calibration_from_dict

NOTHING = {name: nothing for name, _, nothing in EXPOSURE.values()}  # at padding


class Vocabulary:
    """Ids ↔ rows of the model's tables. Row 0 is padding and "nobody"; one row stands for every id that is unknown.

    Rows 1 … ``trained`` belong to the ids that the model was made with, the next one to unknown ids, and those that
    were added later follow.
    """

    def __init__(self, ids: List[str], trained: Optional[int] = None):
        self.ids = Ids(ids)
        self.trained = len(self.ids) if trained is None else trained

    def __len__(self) -> int:
        """Rows in all, those of padding and of the unknown included."""
        return len(self.ids) + 2

    @property
    def unknown(self) -> int:
        """The row of an id that is not known."""
        return self.trained + 1

    def rows(self, texts: Iterable[str]) -> np.ndarray:
        """int64: rows of some ids; :attr:`unknown` for those that are not there."""
        number = self.ids.find(texts)
        return np.where(number < 0, self.unknown, self._row(number))

    def of(self, found: Tokens, nothing: int = 0) -> np.ndarray:
        """int64: rows of a column of ids; ``nothing`` where the id is missing."""
        return np.append(self.rows(found.values), nothing).astype(np.int64)[found.codes]

    def with_ids(self, texts: Iterable[str]) -> Vocabulary:
        """The same with further ids; each new one has a row behind all others."""
        return Vocabulary([*self.ids.number, *texts], self.trained)

    def texts(self) -> List[Optional[str]]:
        """The id of each row; None for padding and the unknown."""
        known: List[Optional[str]] = list(self.ids.list())
        return [None, *known[: self.trained], None, *known[self.trained :]]

    def _row(self, number: np.ndarray) -> np.ndarray:
        return number + 1 + (number >= self.trained)


@dataclass
class Histories:
    """What each user did last: ptr int64 [users + 1] into items int32, oldest first; by the vocabulary's rows."""

    ptr: np.ndarray
    items: np.ndarray

    def of(self, users: np.ndarray, length: int) -> Tuple[np.ndarray, np.ndarray]:
        """int64 [r, length] item rows, valid first, and how many are valid [r]; unknown users have none."""
        known = np.where(users < len(self.ptr) - 1, users, 0)
        end = self.ptr[known + 1]
        count = np.minimum(end - self.ptr[known], length)
        step = np.arange(length)
        valid = step < count[:, None]
        place = np.where(valid, (end - count)[:, None] + step, 0)
        items = self.items[place] if len(self.items) else np.zeros_like(place)
        return np.where(valid, items, 0).astype(np.int64), count


@dataclass
class Preprocessor:
    """All that turns requests into tensors.

    Attributes:
        columns: which columns are read as scores and features.
        users, items: ids and their rows.
        calibrations: of each score; the identity where scores are in [0, 1] already.
        normalization: how scores are rescaled within a request (``score_normalization``).
        n_candidates: longest list that is reranked; of a longer one, the best by the incoming order.
        history_length: newest items of the history that are read.
        user_features, item_features, log_features: encoders of the side tables and of the log's own columns.
        histories: of known users, for requests that bring none; None = not kept.
        until: time of the newest request that they know, or None.
    """

    columns: Columns
    users: Vocabulary
    items: Vocabulary
    calibrations: List[Calibration]
    normalization: str
    n_candidates: int
    history_length: int
    user_features: Encoders = field(default_factory=lambda: Encoders({}))
    item_features: Encoders = field(default_factory=lambda: Encoders({}))
    log_features: Encoders = field(default_factory=lambda: Encoders({}))
    histories: Optional[Histories] = None
    until: Optional[float] = None

    # ------------------------------------------------------------------ requests → arrays

    def arrays(
        self, found: Requests, width: Optional[int] = None, shuffle: Optional[np.random.Generator] = None
    ) -> Dict[str, np.ndarray]:
        """Padded arrays of some requests.

        Args:
            width: n; default: the longest list, at most ``n_candidates``.
            shuffle: puts the candidates of each request in random order, so that no tie broken by place tells a label.

        Returns:
            name → array with leading dimension R: users, candidates [R, n], mask, scores ([R, n] or [R, n, S]),
            features [R, n, P], shown, labels, n_positives, and origin int64 [R, n], which candidate of the batch
            stands there, −1 at padding.
        """
        place, kept, width = self._places(found, width, shuffle)
        owner, n_requests = found.batch.owner[kept], len(found)

        def padded(values: np.ndarray, fill: Any = 0) -> np.ndarray:
            out = np.full((n_requests, width, *values.shape[1:]), fill, dtype=values.dtype)
            out[owner, place] = values[kept]
            return out

        origin = padded(np.arange(len(found.item.codes)), -1)
        mask = origin >= 0
        out = {
            "users": self.users.of(found.user).astype(np.int32),
            "candidates": padded(self.items.of(found.item).astype(np.int32)),
            "mask": mask,
            "scores": self._scores(padded(found.scores, np.nan), mask),
            "shown": padded(found.shown),
            "origin": origin,
        }
        if self.log_features.width:
            out["features"] = padded(self.log_features.transform(found.features, len(found.item.codes)))
        if found.label is not None:
            out.update((name, padded(values, NOTHING.get(name, 0))) for name, values in found.extra.items())
            out["labels"] = padded(found.label).astype(bool)
            out["n_positives"] = found.sums(found.label)
        return out

    def _places(
        self, found: Requests, width: Optional[int], shuffle: Optional[np.random.Generator]
    ) -> Tuple[np.ndarray, np.ndarray, int]:
        """-> column of each kept candidate, the kept candidates (indices), and the number of columns."""
        ptr, owner = found.batch.ptr, found.batch.owner
        length = np.diff(ptr)
        kept = np.arange(len(owner))
        if length.max(initial=0) > self.n_candidates:
            kept = found.incoming_order()
            kept = kept[np.arange(len(kept)) - np.repeat(ptr[:-1], length) < self.n_candidates]
            kept.sort()
        if shuffle is not None:
            kept = kept[np.lexsort((shuffle.random(len(kept)), owner[kept]))]
        count = np.bincount(owner[kept], minlength=len(found))
        place = np.arange(len(kept)) - np.repeat(np.cumsum(count) - count, count)
        return place, kept, max(int(count.max(initial=1)), 1) if width is None else width

    def _scores(self, raw: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """float32 [r, n], or [r, n, S] with :data:`MISSING` where a score is not there; raw [r, n, S], NaN there."""
        real, out = torch.from_numpy(mask), []
        for number, calibration in enumerate(self.calibrations):
            values = torch.from_numpy(np.ascontiguousarray(raw[:, :, number]))
            known = real & ~values.isnan()
            # In float64: raw scores of any scale keep their order as far as float32 can tell them apart afterwards.
            x = calibration(values.nan_to_num(0.0)).float().masked_fill(~known, 0.0)
            x = normalize_scores(x, known, self.normalization)
            out.append(x if len(self.calibrations) == 1 else x.masked_fill(real & ~known, MISSING))
        return (out[0] if len(out) == 1 else torch.stack(out, -1)).numpy()

    # ------------------------------------------------------------------ arrays → slates

    def slate(self, found: Requests, arrays: Optional[Dict[str, np.ndarray]] = None) -> Slate:
        """Requests as a batch for a model, without labels."""
        arrays = self.arrays(found) if arrays is None else arrays
        history, count = self._history(found, arrays["users"])
        as_tensor = lambda name, kind: torch.from_numpy(arrays[name]).to(kind)  # noqa: E731
        return Slate(
            users=as_tensor("users", torch.long),
            history=torch.from_numpy(history),
            history_mask=torch.arange(self.history_length) < torch.from_numpy(count)[:, None],
            candidates=as_tensor("candidates", torch.long),
            mask=torch.from_numpy(arrays["mask"]),
            scores=as_tensor("scores", torch.float32),
            features=as_tensor("features", torch.float32) if "features" in arrays else None,
        )

    def given_history(self, found: Requests) -> Tuple[np.ndarray, np.ndarray]:
        """The requests' own histories: ptr int64 [R + 1] and item rows int32, known items only, the newest ones."""
        assert found.history is not None  # who asks has looked
        ptr, items = found.history
        rows = self.items.of(items)
        known = (rows != self.items.unknown) & (rows > 0)
        owner = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))[known]
        rows, count = rows[known], np.bincount(owner, minlength=len(ptr) - 1)
        end = np.cumsum(count)
        new = end[owner] - np.arange(len(rows)) <= self.history_length
        count = np.bincount(owner[new], minlength=len(count))
        return np.concatenate([[0], np.cumsum(count)]), rows[new].astype(np.int32)

    def _history(self, found: Requests, users: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        if found.history is not None:
            ptr, items = self.given_history(found)
            return Histories(ptr, items).of(np.arange(len(found)), self.history_length)
        if self.histories is None:
            return np.zeros((len(found), self.history_length), dtype=np.int64), np.zeros(len(found), dtype=np.int64)
        return self.histories.of(users.astype(np.int64), self.history_length)

    # ------------------------------------------------------------------ saved

    def to_dict(self) -> Dict[str, Any]:
        """JSON-able, but for ids and histories."""
        return {
            "scores": self.columns.scores,
            "features": self.columns.features,
            "calibrations": [calibration.to_dict() for calibration in self.calibrations],
            "normalization": self.normalization,
            "n_candidates": self.n_candidates,
            "history_length": self.history_length,
            "user_features": self.user_features.to_dict(),
            "item_features": self.item_features.to_dict(),
            "log_features": self.log_features.to_dict(),
            "until": self.until,
            "trained_users": self.users.trained,
            "trained_items": self.items.trained,
        }

    @classmethod
    def from_dict(
        cls, content: Dict[str, Any], users: List[str], items: List[str], histories: Optional[Histories] = None
    ) -> Preprocessor:
        """Undo of :meth:`to_dict`."""
        return cls(
            columns=Columns(list(content["scores"]), list(content["features"])),
            users=Vocabulary(users, content["trained_users"]),
            items=Vocabulary(items, content["trained_items"]),
            calibrations=[calibration_from_dict(each) for each in content["calibrations"]],
            normalization=content["normalization"],
            n_candidates=content["n_candidates"],
            history_length=content["history_length"],
            user_features=Encoders.from_dict(content["user_features"]),
            item_features=Encoders.from_dict(content["item_features"]),
            log_features=Encoders.from_dict(content["log_features"]),
            histories=histories,
            until=content["until"],
        )

    def side_rows(self, side: str, table: Dict[str, pa.Array], ids: Tokens) -> Tuple[np.ndarray, np.ndarray]:
        """Rows and feature vectors float32 [m, F] of a side table's lines; ``side`` is "user" or "item"."""
        encoders = self.item_features if side == "item" else self.user_features
        vocabulary = self.items if side == "item" else self.users
        return vocabulary.of(ids), encoders.transform(table, len(ids.codes))


def feature_table(n_rows: int, rows: np.ndarray, values: np.ndarray) -> Tensor:
    """FloatTensor [n_rows, F]: ``values`` at ``rows``, zeros elsewhere."""
    table = torch.zeros(n_rows, values.shape[1])
    table[torch.from_numpy(rows)] = torch.from_numpy(values)
    table[0] = 0.0
    return table
