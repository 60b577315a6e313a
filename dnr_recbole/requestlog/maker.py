"""The steps from a scanned log to tensors: what is fitted, padded arrays, and what a reranker is trained on."""

from __future__ import annotations

import dataclasses
from logging import getLogger
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.candidate_table import CandidateTable
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.dataset import RerankData, assemble
from dnr_recbole.data.features import popularity
from dnr_recbole.data.spaces import FACTORS, USING, build_spaces, unit_rows
from dnr_recbole.data.splits import TEST, TRAIN
from dnr_recbole.requestlog.decoding import Requests
from dnr_recbole.requestlog.fitting import continue_preprocessor, fit_preprocessor, take_sample
from dnr_recbole.requestlog.preprocessor import Histories, Preprocessor, feature_table
from dnr_recbole.requestlog.reading import Source
from dnr_recbole.requestlog.request_log import RequestLog, side_table, vectors
from dnr_recbole.requestlog.scan import Scan
from dnr_recbole.requestlog.split import KNOWLEDGE
from dnr_recbole.requestlog.storage import Store
from dnr_recbole.requestlog.timeline import Timeline, given_histories

VECTORS = "vectors"


class Maker:
    """The steps of :func:`~dnr_recbole.requestlog.building.build` over one log.

    Args:
        config: the run's keys.
        log: the requests.
        found: what the scan has found in them.
        source: where they are read.
        split: int8 [R], what each request is for.
        stored: what users did before the log.
    """

    def __init__(
        self,
        config: Keys,
        log: RequestLog,
        found: Scan,
        source: Source,
        split: np.ndarray,
        stored: Optional[Histories] = None,
    ) -> None:
        self.config, self.log, self.found, self.source, self.split = config, log, found, source, split
        self.timeline = Timeline(found, stored)
        self.notes: List[str] = []  # how the log was treated
        wanted = config["load_col"] or {}
        self.sides = {
            side: side_table(table, side, wanted.get(side, "*"))
            for side, table in (("user", log.users), ("item", log.items))
        }

    def note(self, text: str) -> None:
        """Say how the log is treated, in the log file and in the report."""
        self.notes.append(text)
        getLogger(__name__).info(f"{self.log.name}: {text}")

    def decoded(self) -> Iterator[Requests]:
        """The log's requests, batch by batch."""
        return self.log.decoded(self.source, self.found, self.config)

    def preprocessor(self, start: Optional[Preprocessor]) -> Preprocessor:
        """What turns requests into arrays; that of an earlier model (``start``) keeps what it was fitted to."""
        if start is not None:
            return continue_preprocessor(start, self.found, self.sides)
        sample = take_sample(self.config, self.found, self.decoded(), self.split)
        out = fit_preprocessor(self.config, self.found, self.sides, sample)
        left_out = [name for name in self.found.columns.features if name not in out.log_features.names]
        if left_out:
            self.note(f"features with too many values, left out: {', '.join(left_out)}")
        return out

    def arrays(self, preprocessor: Preprocessor, folder: Optional[str]) -> Dict[str, np.ndarray]:
        """All requests as padded arrays; see :class:`~dnr_recbole.data.candidates.CandidateTable`."""
        found, store = self.found, Store(folder)
        n, width = len(found), max(2, min(found.longest, preprocessor.n_candidates))
        scores: Tuple[int, ...] = (
            (n, width) if len(preprocessor.calibrations) == 1 else (n, width, len(preprocessor.calibrations))
        )
        kinds: Dict[str, Tuple[Tuple[int, ...], DTypeLike]] = {
            "users": ((n,), np.int32), "candidates": ((n, width), np.int32), "mask": ((n, width), bool),
            "scores": (scores, np.float32), "labels": ((n, width), bool), "n_positives": ((n,), np.int32),
        }  # fmt: skip
        if preprocessor.log_features.width:
            kinds["features"] = ((n, width, preprocessor.log_features.width), np.float32)
        if found.has_shown:
            kinds["shown"] = ((n, width), bool)
        kinds.update((name, ((n, width, *shape), kind)) for name, (shape, kind) in found.columns.feedback.kinds.items())
        out = {name: store.make(name, shape, kind) for name, (shape, kind) in kinds.items()}
        rng = np.random.default_rng(self.config["seed"])
        before = 0
        given: List[Tuple[np.ndarray, np.ndarray]] = []
        for requests in self.decoded():
            rows = slice(before, before + len(requests))
            before += len(requests)
            part = preprocessor.arrays(requests, width, rng)
            for name, target in out.items():
                target[rows] = part[name]
            if requests.history is not None:
                given.append(preprocessor.given_history(requests))
        if given:
            out.update(given_histories(given, store))
        else:
            out.update(self.timeline.histories(preprocessor, out, store))
        return out

    def data(self, preprocessor: Preprocessor, arrays: Dict[str, np.ndarray]) -> RerankData:
        """What a reranker is trained and evaluated on; keeps each user's history in the preprocessor."""
        config, split = self.config, self.split
        table = CandidateTable(
            **{name: torch.from_numpy(values) for name, values in arrays.items()},
            split=torch.from_numpy(split),
            history_length=config["history_length"],
        )
        catalogue = self._catalogue(preprocessor, arrays)
        if table.shown is not None and config["unshown"] == "negative":
            table = dataclasses.replace(table, shown=None)
        data = assemble(config, table, catalogue, scaled=True, order=np.lexsort((self.timeline.when, arrays["users"])))
        preprocessor.histories = self.timeline.last_histories(preprocessor, arrays)
        longer = int((self.found.candidates > preprocessor.n_candidates).sum())
        if longer:
            lost = int(arrays["n_positives"].sum()) - len(self.timeline.clicks(arrays).item)
            self.note(
                f"{longer:,} requests have more than n_candidates={preprocessor.n_candidates} candidates: the best by "
                f"{self.found.columns.scores[0]} are kept, and with them all but {lost:,} positives"
            )
        kinds = ("training", "validation", "test", "kept for item spaces and popularity", "without a candidate")
        counts = [(int((split == code).sum()), kind) for code, kind in enumerate(kinds)]
        self.note("requests " + ", ".join(f"{count:,} {kind}" for count, kind in counts if count))
        used, whole = len(data.train), int((split == TRAIN).sum())
        if used < whole:
            self.note(f"{whole - used:,} of the training requests are not learned from: no positive, or nothing shown")
        return data

    def _catalogue(self, preprocessor: Preprocessor, arrays: Dict[str, np.ndarray]) -> Catalogue:
        split = self.split
        n_users, n_items = len(preprocessor.users), len(preprocessor.items)
        features = {
            side: feature_table(n, *preprocessor.side_rows(side, columns, ids))
            for (side, (ids, columns)), n in zip(self.sides.items(), (n_users, n_items))
        }
        clicks = self.timeline.clicks(arrays)
        held_out, trained = (np.unique(arrays["users"][split == code]) for code in (TEST, TRAIN))
        return Catalogue(
            n_users=n_users,
            n_items=n_items,
            item_popularity=popularity(clicks.per_item(split == KNOWLEDGE, n_items)),
            item_features=features["item"],
            user_features=features["user"],
            item_counts=torch.from_numpy(clicks.per_item(split == TRAIN, n_items)),
            user_ids_known=bool(np.isin(held_out, trained).mean() >= 0.5) if len(held_out) else True,
            spaces=self._spaces(preprocessor, arrays),
            n_scores=len(preprocessor.calibrations),
            n_features=preprocessor.log_features.width,
        )

    def _spaces(self, preprocessor: Preprocessor, arrays: Dict[str, np.ndarray]) -> Dict[str, Tensor]:
        """Item spaces of the requests that ``knowledge`` names, and of vectors that came with the log."""
        config = self.config
        spaces: Dict[str, Tensor] = {}
        if config["history_interaction"] not in USING:
            return spaces
        n_users, n_items = len(preprocessor.users), len(preprocessor.items)
        knowing = {"oldest": KNOWLEDGE, "folds": TRAIN}.get(config["knowledge"])
        chosen = self.split == knowing
        if knowing is not None and chosen.any():
            folds = config["affinity_folds"]
            names = [name for name in config["affinity_spaces"] if name not in (FACTORS, VECTORS)]
            known = self.timeline.known(arrays, chosen, n_users, n_items, config["affinity_dim"], folds)
            spaces = build_spaces(names, known, folds if knowing == TRAIN else 0)
        if self.log.item_vectors is not None:
            ids, values = vectors(self.log.item_vectors)
            spaces[VECTORS] = unit_rows([feature_table(n_items, preprocessor.items.of(ids), values)])
        return spaces
