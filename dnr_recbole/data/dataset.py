"""The second stage's data: one dataset per split over a shared candidate table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from logging import getLogger
from typing import TYPE_CHECKING, Any, Dict, Optional

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.candidate_table import CandidateTable
from dnr_recbole.data.candidates import build_candidates
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.features import build_catalogue
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.normalization import normalize_scores
from dnr_recbole.data.slate import Slate
from dnr_recbole.data.spaces import user_fold
from dnr_recbole.data.splits import SPLIT_NAMES, TEST, TRAIN, VALID
from dnr_recbole.data.statistics import describe
from dnr_recbole.data.weighting import weighted
from dnr_recbole.errors import CacheError, DataError
from dnr_recbole.identity import FileDigests, content_digest, identity
from dnr_recbole.retriever.cache import Cache

if TYPE_CHECKING:
    from dnr_recbole.retriever.retrieval import Retrieval

_BLOCK = 1 << 16  # requests at a time


@dataclass(frozen=True)
class RerankDataset:
    """Some rows of a candidate table; rows are numbered 0 … len − 1 from here on.

    Attributes:
        table: shared by all splits.
        rows: LongTensor [R'], rows of ``table`` that belong to this split, ascending.
        shown_only: whether candidates that were not shown are left out, since nothing is known of them.
    """

    table: CandidateTable
    rows: Tensor
    shown_only: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def slate(self, rows: Any) -> Slate:
        """The requests ``rows`` (LongTensor, list or slice) as one batch: index arithmetic only."""
        slate = self.table.slate(self.rows[rows])
        return slate.only_shown() if self.shown_only else slate

    @property
    def n_positives(self) -> Tensor:
        """LongTensor [R']: all positives of each request, retrieved or not."""
        return self.table.n_positives[self.rows].long()

    @property
    def users(self) -> Tensor:
        """LongTensor [R']."""
        return self.table.users[self.rows].long()


@dataclass(frozen=True)
class RerankData:
    """All that training and evaluating a reranker needs.

    ``truth`` is known for generated data only; ``files`` are the digests of the files that the data were read from.
    """

    train: RerankDataset
    valid: RerankDataset
    test: RerankDataset
    catalogue: Catalogue
    statistics: dict
    truth: Optional[object] = None
    files: FileDigests = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """sha256 over all that a reranker or an evaluator may read."""
        splits = {name: self[name] for name in SPLIT_NAMES}
        catalogue = {field.name: getattr(self.catalogue, field.name) for field in dataclasses.fields(self.catalogue)}
        for name, usual in (("n_scores", 1), ("n_features", 0)):  # digests are older than these
            if catalogue[name] == usual:
                del catalogue[name]
        tables = {name: data.table.to_tensors() for name, data in splits.items()}
        shared = tables["train"] if all(data.table is self.train.table for data in splits.values()) else tables
        return content_digest([shared, {name: data.rows for name, data in splits.items()}, catalogue])

    def __getitem__(self, split: str) -> RerankDataset:
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]


def build_rerank_data(
    config: Keys,
    recbole_dataset: Any,
    interactions: Interactions,
    retrieval: Retrieval,
    table: Optional[CandidateTable] = None,
) -> RerankData:
    """Candidates (cached, unless the table is given), features and statistics for the protocol of ``config``."""
    table = table or load_candidates(config, interactions, retrieval)
    catalogue = build_catalogue(config, recbole_dataset, interactions, retrieval)
    if interactions.part is not None:  # own files say themselves whether whole users are held out
        held_out, trained = (table.users[rows].unique() for rows in (table.split != TRAIN, table.split == TRAIN))
        known = torch.isin(held_out, trained).double().mean() >= 0.5
        catalogue = dataclasses.replace(catalogue, user_ids_known=bool(known))
    return assemble(config, table, catalogue, interactions)


def load_candidates(config: Keys, interactions: Interactions, retrieval: Retrieval) -> CandidateTable:
    """The candidate table from the cache; built and stored if it is not there."""
    if not config["use_cache"]:
        return build_candidates(config, interactions, retrieval)
    cache = Cache(config["cache_dir"])
    key = candidate_key(config, retrieval)
    with cache.making(key):
        stored = cache.load(key)
        if stored is None:
            table = build_candidates(config, interactions, retrieval)
            cache.store(key, table.to_tensors())
            return table
    getLogger(__name__).info(f"candidate table read from {cache.path(key)}")
    try:
        return CandidateTable.from_tensors(stored)
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"cache entry {cache.path(key)} holds no candidate table ({error!r}); delete it") from error


def candidate_key(config: Any, retrieval: Retrieval) -> dict:
    """Everything that determines the candidate table."""
    return {
        "kind": "candidates",
        "retrieval": retrieval.key,
        "identity": identity(config, "candidates")["candidates"],
    }


def assemble(
    config: Keys,
    table: CandidateTable,
    catalogue: Catalogue,
    interactions: Optional[Interactions] = None,
    truth: Optional[object] = None,
    scaled: bool = False,
    order: Optional[np.ndarray] = None,
) -> RerankData:
    """Split the table, choose the training requests, rescale the scores, describe the result.

    Args:
        scaled: whether the scores are rescaled already.
        order: int64 [R], the rows by user and time, where the table is not sorted by them.
    """
    rows = {
        "train": training_rows(table, config["max_requests_per_user"], config["keep_empty_requests"], order),
        "valid": torch.nonzero(table.split == VALID).flatten(),
        "test": torch.nonzero(table.split == TEST).flatten(),
    }
    for name in SPLIT_NAMES:
        if not len(rows[name]) or not table.labels[rows[name]].any():
            code = SPLIT_NAMES.index(name)
            raise DataError(
                f"no {name} request is left: none of {int((table.split == code).sum())} has a positive among its "
                "candidates; raise n_candidates, train a better retriever, or use more data"
            )
    most = config["max_training_requests"]
    if 0 < most < len(rows["train"]):
        rows["train"] = rows["train"][torch.linspace(0, len(rows["train"]) - 1, most).long()]
    trained: Dict[str, Any] = _trained(table, rows["train"], catalogue)
    catalogue = dataclasses.replace(catalogue, **trained)
    n_folds = max((len(space[0]) - 1 for space in catalogue.spaces.values()), default=0)
    if n_folds:
        fold = torch.where(table.split == TRAIN, user_fold(table.users, n_folds), 0)
        table = dataclasses.replace(table, fold=fold.to(torch.int16))
    table = weighted(config, table)
    raw = {name: RerankDataset(table, r) for name, r in rows.items()}
    statistics = describe(raw, catalogue, interactions)
    if not scaled:
        scores = normalize_scores(table.scores, table.mask, config["score_normalization"])
        table = dataclasses.replace(table, scores=scores)
    return RerankData(
        train=RerankDataset(table, rows["train"], table.shown is not None),
        valid=RerankDataset(table, rows["valid"]),
        test=RerankDataset(table, rows["test"]),
        catalogue=catalogue,
        statistics=statistics,
        truth=truth,
    )


def _trained(table: CandidateTable, rows: Tensor, catalogue: Catalogue) -> Dict[str, Tensor]:
    """Which items (as candidates or in a visible history) and users the training requests ``rows`` hold."""
    begin, end = table.history_begin[rows], table.history_end[rows]
    begin = torch.maximum(begin, end - table.history_length)
    change = torch.zeros(len(table.history_items) + 1, dtype=torch.long)
    change.index_add_(0, begin, torch.ones_like(begin)).index_add_(0, end, -torch.ones_like(end))
    read = table.history_items[change.cumsum(0)[:-1] > 0]
    items, users = torch.zeros(catalogue.n_items, dtype=torch.bool), torch.zeros(catalogue.n_users, dtype=torch.bool)
    for part in rows.split(_BLOCK):
        items[table.candidates[part].flatten().long()] = True
    items[read.long()] = True
    users[table.users[rows].long()] = True
    return {"items_trained": items, "users_trained": users}


def training_rows(
    table: CandidateTable, max_per_user: int = 0, keep_empty: bool = False, order: Optional[np.ndarray] = None
) -> Tensor:
    """Rows to train on: those with a positive candidate, per user the newest ``max_per_user`` (0 = all).

    ``order``: int64 [R], the rows by (user, time); None = the table is sorted by that.
    """
    chosen = table.split == TRAIN
    if not keep_empty:
        chosen &= table.labels.any(1)
    if table.shown is not None:
        chosen &= (table.mask & table.shown).any(1)
    rows = torch.nonzero(chosen).flatten() if order is None else torch.from_numpy(order)[chosen[order]]
    if max_per_user > 0:  # rows are in time order within a user, so the newest are the last ones
        users = table.users[rows].contiguous()
        rows = rows[torch.searchsorted(users, users, right=True) - torch.arange(len(rows)) <= max_per_user]
    return rows.sort().values
