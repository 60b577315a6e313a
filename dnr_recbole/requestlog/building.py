"""A log as tensors: split, candidate table, histories, side tables and item spaces; memory-mapped where it is large."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from dnr_recbole.data.candidates import CandidateTable
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.dataset import RerankData, assemble
from dnr_recbole.data.features import popularity
from dnr_recbole.data.requests import TEST, TRAIN, VALID, ranges
from dnr_recbole.data.spaces import FACTORS, USING, Known, build_spaces, unit_rows
from dnr_recbole.errors import CacheError, DataError
from dnr_recbole.files import temporary_name
from dnr_recbole.identity import digest, foreign_code
from dnr_recbole.requestlog.columns import plain
from dnr_recbole.requestlog.decoding import Requests
from dnr_recbole.requestlog.encoders import Encoders
from dnr_recbole.requestlog.held_out import sample_frame, sample_rows
from dnr_recbole.requestlog.preprocessor import Histories, Preprocessor, Vocabulary, feature_table
from dnr_recbole.requestlog.request_log import RequestLog, side_table, vectors
from dnr_recbole.requestlog.scan import Scan
from dnr_recbole.retriever.calibration import Calibration, fit_calibration

EMPTY = 4  # split code of requests without a candidate
KNOWLEDGE = 3  # split code of the requests that item spaces and popularity are made of, and no reranker learns from
IN_MEMORY = 20_000_000  # candidates; the tensors of a larger log are mapped from files
SAMPLE = 1_000_000  # candidates that calibrations and encoders are fitted on
_ROWS = 1 << 16  # requests at a time
VECTORS = "vectors"
_CACHED = 1  # version of the cached tensors


@dataclass
class Built:
    """A log, ready for training, and what turns further requests into the same tensors."""

    data: RerankData
    preprocessor: Preprocessor
    scan: Scan
    maker: Maker

    def sample(self) -> pd.DataFrame:
        """Some test requests as they came, see :func:`~dnr_recbole.requestlog.held_out.sample_frame`."""
        test, table = self.data.test, self.data.test.table
        rows = sample_rows(test).numpy()
        shape = len(rows), table.candidates.shape[1]
        scores = np.full((*shape, len(self.preprocessor.calibrations)), np.nan)
        features = {name: np.full(shape, None, dtype=object) for name in self.preprocessor.columns.features}
        before = 0
        for requests in self.maker.decoded():
            here = np.flatnonzero((rows >= before) & (rows < before + len(requests)))
            for at in here:
                number = rows[at] - before
                part = slice(requests.batch.ptr[number], requests.batch.ptr[number + 1])
                items = self.preprocessor.items.rows(requests.item[part].texts())
                place = part.start + (table.candidates[rows[at]].numpy()[:, None] == items).argmax(1)
                scores[at] = requests.scores[place]
                for name, values in features.items():
                    for column, value in enumerate(plain(requests.features[name]).take(pa.array(place)).to_pylist()):
                        values[at, column] = value
            before += len(requests)
        return sample_frame(self.preprocessor, test, torch.from_numpy(scores), features)


class _Store:
    """Arrays in a folder, mapped into memory; without a folder, in memory."""

    def __init__(self, folder: Optional[str]):
        self.folder = folder

    def make(self, name: str, shape, kind) -> np.ndarray:
        """An array of zeros."""
        if self.folder is None:
            return np.zeros(shape, dtype=kind)
        return open_memmap(os.path.join(self.folder, f"{name}.npy"), mode="w+", dtype=kind, shape=tuple(shape))

    def keep(self, **arrays: np.ndarray) -> Dict[str, np.ndarray]:
        """Arrays that are there already."""
        out = {name: self.make(name, values.shape, values.dtype) for name, values in arrays.items()}
        for name, values in arrays.items():
            out[name][...] = values
        return out


def build(config, log: RequestLog, start: Optional[Preprocessor] = None) -> Built:
    """Read, check and convert a log.

    Args:
        config: the run's keys.
        log: the requests.
        start: the preprocessor of an earlier model that this one goes on from: its ids keep their rows, and scores and
            features are treated as it did.

    Raises:
        DataError: the log has a fatal problem, or nothing can be learned from it.
    """
    found, source = log.scan(config)
    found.problems.raise_fatal(log.name)
    getLogger(__name__).info(f"{log.name}\n{found.summary()}")
    split = choose_split(config, found)
    maker = Maker(config, log, found, source, split, None if start is None else start.histories)
    files = log.digests()
    for note in found.problems.notes:
        maker.note(str(note))
    preprocessor = maker.preprocessor(start)
    key = {
        "kind": "log", "version": _CACHED, "files": files, "keys": config.of_scope("source", "candidates"),
        "preprocessor": preprocessor.to_dict(), "split": digest(split.tolist()) if len(split) < 1e6 else len(split),
        "seed": config["seed"], "n_candidates": config["n_candidates"],
    }  # fmt: skip
    code = foreign_code({"score_normalization": config["score_normalization"], **key["keys"]})
    if code:
        key["code"] = code
    feedback = found.columns.feedback
    if feedback.kinds:
        key["feedback"] = {**dataclasses.asdict(feedback), "exposure": list(feedback.exposure)}
    if log.requests.path is not None and config["use_cache"]:
        arrays = _cached(config["cache_dir"], key, maker, preprocessor)
    else:
        arrays = maker.arrays(preprocessor, _scratch() if found.rows > IN_MEMORY else None)
    data = dataclasses.replace(maker.data(preprocessor, arrays), files=files)
    return Built(data, preprocessor, found, maker)


def choose_split(config, found: Scan) -> np.ndarray:
    """int8 [R]: the log's own column, or the newest requests as test and those before as validation.

    A request without a candidate is :data:`EMPTY`. Of the training requests, the oldest ``knowledge_share`` becomes
    :data:`KNOWLEDGE` under ``knowledge: oldest``.
    """
    n = len(found)
    time = np.arange(n) if found.time is None else found.time
    order = np.argsort(time, kind="stable")
    if (found.split >= 0).all() and n:
        split = found.split.copy()
    else:
        n_test, n_valid = (max(1, round(config[key] * n)) for key in ("test_share", "valid_share"))
        if n < 3 or n_test + n_valid >= n:
            raise DataError(f"{n} requests are too few to be divided into training, validation and test")
        split = np.full(n, TRAIN, dtype=np.int8)
        split[order[n - n_test :]] = TEST
        split[order[n - n_test - n_valid : n - n_test]] = VALID
    split[found.candidates == 0] = EMPTY
    if config["knowledge"] == "oldest":
        trained = order[split[order] == TRAIN]
        split[trained[: int(config["knowledge_share"] * len(trained))]] = KNOWLEDGE
    return split


def _cached(cache_dir: str, key: dict, maker: Maker, preprocessor: Preprocessor) -> Dict[str, np.ndarray]:
    """The arrays from the cache, mapped into memory; made and put there first if they are not."""
    folder = Path(cache_dir) / f"log-{digest(key)}"
    if not (folder / "done.json").is_file():
        making = temporary_name(str(folder))
        os.makedirs(making)
        try:
            names = list(maker.arrays(preprocessor, making))
            done = json.dumps({"arrays": names, "key": key}, default=str)
            (Path(making) / "done.json").write_text(done, encoding="utf-8")
            try:
                os.replace(making, folder)
            except OSError:  # another process was faster
                if not (folder / "done.json").is_file():
                    raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    else:
        getLogger(__name__).info(f"tensors of the log read from {folder}")
    try:
        names = json.loads((folder / "done.json").read_text(encoding="utf-8"))["arrays"]
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise CacheError(f"{folder} is damaged ({error}): delete it") from error


def _scratch() -> str:
    """A folder for the tensors of a large log that no cache keeps; it goes with the process."""
    folder = tempfile.mkdtemp(prefix="dnr_recbole-log-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


Stored = Optional[Histories]


class Maker:
    """The steps of :func:`build` over one log."""

    def __init__(self, config, log: RequestLog, found: Scan, source, split: np.ndarray, stored: Stored = None):
        self.config, self.log, self.found, self.source, self.split = config, log, found, source, split
        self.stored = stored  # what users did before this log
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

    # ------------------------------------------------------------------ what is fitted

    def preprocessor(self, start: Optional[Preprocessor]) -> Preprocessor:
        """Ids of the log and the side tables; calibrations and encoders fitted on training requests."""
        config, found = self.config, self.found
        texts = {side: ids.texts() for side, (ids, _) in self.sides.items()}
        if start is not None:
            users = start.users.with_ids([*found.users.list(), *texts["user"]])
            items = start.items.with_ids([*found.items.list(), *texts["item"]])
            return dataclasses.replace(start, users=users, items=items, histories=None, until=self._until())
        for ids, side in ((found.users, "user"), (found.items, "item")):
            ids.add(texts[side])
        sample = self._sample()
        features = Encoders.fit(sample.features, config["max_feature_vocabulary"]) if sample.features else Encoders({})
        out = Preprocessor(
            columns=found.columns,
            users=Vocabulary(found.users.list()),
            items=Vocabulary(found.items.list()),
            calibrations=[self._calibration(sample, number) for number in range(len(found.columns.scores))],
            normalization=config["score_normalization"],
            n_candidates=config["n_candidates"],
            history_length=config["history_length"],
            user_features=self._encoders("user"),
            item_features=self._encoders("item"),
            log_features=features,
            until=self._until(),
        )
        left_out = [name for name in found.columns.features if name not in features.names]
        if left_out:
            self.note(f"features with too many values, left out: {', '.join(left_out)}")
        return out

    def _until(self) -> Optional[float]:
        return None if self.found.time is None else float(self.found.time.max())

    def _encoders(self, side: str) -> Encoders:
        if not self.config["use_features"]:
            return Encoders({})
        return Encoders.fit(self.sides[side][1], self.config["max_feature_vocabulary"])

    def _sample(self) -> _Sample:
        """Candidates of training requests, at most about :data:`SAMPLE`, evenly over the log."""
        names = self.found.columns.features
        if self.config["score_calibration"] == "none" and not names:
            return _Sample(np.zeros((0, 1)), np.zeros(0), {})
        every = max(1, self.found.rows // SAMPLE)
        scores, labels, columns = [], [], {name: [] for name in names}
        before = 0
        for requests in self.decoded():
            number = before + np.arange(len(requests))
            before += len(requests)
            chosen = (self.split[number] == TRAIN) & (number % every == 0)
            rows = np.flatnonzero(chosen[requests.batch.owner] & requests.shown)
            scores.append(requests.scores[rows])
            labels.append(requests.label[rows])
            for name, parts in columns.items():
                parts.append(requests.features[name].take(pa.array(rows)))
        joined = {name: plain(pa.chunked_array(parts)) for name, parts in columns.items()}
        return _Sample(np.concatenate(scores), np.concatenate(labels), joined)

    def _calibration(self, sample: _Sample, number: int) -> Calibration:
        kind = self.config["score_calibration"]
        if kind == "none":
            return Calibration()
        values, name = sample.scores[:, number], self.found.columns.scores[number]
        known = ~np.isnan(values)
        positive, negative = (values[known & (sample.labels == z)] for z in (1, 0))
        if not len(positive) or not len(negative):
            raise DataError(
                f"score_calibration={kind}: '{name}' has no positive or no negative in the training requests"
            )
        return fit_calibration(kind, positive, negative)

    # ------------------------------------------------------------------ the arrays

    def arrays(self, preprocessor: Preprocessor, folder: Optional[str]) -> Dict[str, np.ndarray]:
        """All requests as padded arrays; see :class:`~dnr_recbole.data.candidates.CandidateTable`."""
        found, store = self.found, _Store(folder)
        n, width = len(found), max(2, min(found.longest, preprocessor.n_candidates))
        scores = (n, width) if len(preprocessor.calibrations) == 1 else (n, width, len(preprocessor.calibrations))
        kinds = {
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
        before, given = 0, []
        for requests in self.decoded():
            rows = slice(before, before + len(requests))
            before += len(requests)
            part = preprocessor.arrays(requests, width, rng)
            for name, target in out.items():
                target[rows] = part[name]
            if requests.history is not None:
                given.append(preprocessor.given_history(requests))
        out.update(self._histories(preprocessor, out, given, store))
        return out

    def _histories(
        self, preprocessor: Preprocessor, arrays: Dict[str, np.ndarray], given, store: _Store
    ) -> Dict[str, np.ndarray]:
        """Flat history items and each request's range of them, from the log or from each user's earlier clicks (and,
        in front of them, what he is known to have done before the log)."""
        if given:
            length = np.concatenate([np.diff(ptr) for ptr, _ in given])
            items = store.make("history_items", (int(length.sum()) + 1,), np.int32)
            place = 0
            for _, part in given:
                items[place : place + len(part)] = part
                place += len(part)
            end = np.cumsum(length)
            return {"history_items": items, **store.keep(history_begin=end - length, history_end=end)}
        request, item = _clicks(arrays, np.arange(len(self.found)))
        when = self._time_rank()
        span = int(when.max(initial=0)) + 1
        user = self.found.user.astype(np.int64)  # by the log's own numbers: unknown users are different people
        known = user[request] >= 0
        owner, time, item = user[request][known], when[request][known] + 1, item[known]
        if self.stored is not None:
            before, items = self._stored(preprocessor.users.rows(self.found.users.list()))
            owner, time, item = np.append(before, owner), np.append(np.zeros_like(before), time), np.append(items, item)
        key = owner * (span + 1) + time
        order = np.argsort(key, kind="stable")
        key = key[order]
        begin = np.searchsorted(key, user * (span + 1))
        end = np.where(user >= 0, np.searchsorted(key, user * (span + 1) + when + 1), begin)
        items = store.make("history_items", (len(item) + 1,), np.int32)
        items[:-1] = item[order]
        return {"history_items": items, **store.keep(history_begin=begin, history_end=end)}

    def _stored(self, rows: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """The histories of some users (rows of the tables) from before the log: number of the user, item row."""
        rows = np.where(rows < len(self.stored.ptr) - 1, rows, 0)
        place, owner = ranges(self.stored.ptr[rows], self.stored.ptr[rows + 1])
        return owner, self.stored.items[place].astype(np.int64)

    def _time_rank(self) -> np.ndarray:
        """int64 [R]: requests in the order of time; those at the same time share a number."""
        if self.found.time is None:
            return np.arange(len(self.found))
        return np.unique(self.found.time, return_inverse=True)[1].astype(np.int64)

    # ------------------------------------------------------------------ tensors, side tables, spaces

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
        data = assemble(config, table, catalogue, scaled=True, order=np.lexsort((self._time_rank(), arrays["users"])))
        preprocessor.histories = self._last_histories(preprocessor, arrays)
        longer = int((self.found.candidates > preprocessor.n_candidates).sum())
        if longer:
            lost = int(arrays["n_positives"].sum()) - sum(int(block.sum()) for block in _blocks(arrays["labels"]))
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
        config, split = self.config, self.split
        n_users, n_items = len(preprocessor.users), len(preprocessor.items)
        features = {
            side: feature_table(n, *preprocessor.side_rows(side, columns, ids))
            for (side, (ids, columns)), n in zip(self.sides.items(), (n_users, n_items))
        }
        knowing = {"oldest": KNOWLEDGE, "folds": TRAIN}.get(config["knowledge"])
        counted = np.flatnonzero(split == KNOWLEDGE)
        counts = np.bincount(_clicks(arrays, counted)[1], minlength=n_items)
        held_out, trained = (np.unique(arrays["users"][split == code]) for code in (TEST, TRAIN))
        spaces: Dict[str, Tensor] = {}
        if config["history_interaction"] in USING:
            if knowing is not None and (split == knowing).any():
                rows = np.flatnonzero(split == knowing)
                folds = config["affinity_folds"] if knowing == TRAIN else 0
                names = [name for name in config["affinity_spaces"] if name not in (FACTORS, VECTORS)]
                spaces = build_spaces(names, self._known(arrays, rows, n_users, n_items), folds)
            if self.log.item_vectors is not None:
                ids, values = vectors(self.log.item_vectors)
                spaces[VECTORS] = unit_rows([feature_table(n_items, preprocessor.items.of(ids), values)])
        return Catalogue(
            n_users=n_users,
            n_items=n_items,
            item_popularity=popularity(counts),
            item_features=features["item"],
            user_features=features["user"],
            item_counts=torch.from_numpy(
                np.bincount(_clicks(arrays, np.flatnonzero(split == TRAIN))[1], minlength=n_items)
            ),
            user_ids_known=bool(np.isin(held_out, trained).mean() >= 0.5) if len(held_out) else True,
            spaces=spaces,
            n_scores=len(preprocessor.calibrations),
            n_features=preprocessor.log_features.width,
        )

    def _known(self, arrays: Dict[str, np.ndarray], rows: np.ndarray, n_users: int, n_items: int) -> Known:
        """What the requests ``rows`` show of who liked what, in each user's order.

        The clicks of each user, and before them the history that his first request brought with it. A request without a
        user counts as a user of its own.
        """
        request, item = _clicks(arrays, rows)
        when, user = self._time_rank(), arrays["users"].astype(np.int64)
        nobody = np.flatnonzero(user == 0)
        # Numbers in the fold of user 0, which is what such a request reads.
        step = self.config["affinity_folds"]
        first = -(-n_users // step)
        user[nobody] = (first + np.arange(len(nobody))) * step
        parts = [(user[request], when[request], item)]
        if self.found.has_history:
            order = rows[np.lexsort((when[rows], user[rows]))]
            first = order[np.unique(user[order], return_index=True)[1]]
            begin, end = arrays["history_begin"][first], arrays["history_end"][first]
            place, owner = ranges(begin, end)
            parts.append((user[first][owner], np.full(len(owner), -1), arrays["history_items"][place]))
        users, times, items = (np.concatenate(each) for each in zip(*parts))
        order = np.lexsort((times, users))
        return Known(
            user=users[order], item=items[order].astype(np.int64),
            n_users=int(max(n_users, user.max(initial=0) + 1)), n_items=n_items, dim=self.config["affinity_dim"],
        )  # fmt: skip

    def _last_histories(self, preprocessor: Preprocessor, arrays: Dict[str, np.ndarray]) -> Histories:
        """The newest items of every user, as a request right after the log would find them."""
        user, when, length = arrays["users"].astype(np.int64), self._time_rank(), preprocessor.history_length
        parts: List[Tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        request, item = _clicks(arrays, np.arange(len(user)))
        since = np.full(len(preprocessor.users), -1)
        if self.found.has_history:
            order = np.lexsort((when, user))
            last = np.append(np.flatnonzero(np.diff(user[order])), len(order) - 1)
            last = order[last]
            since[user[last]] = when[last]
            begin, end = arrays["history_begin"][last], arrays["history_end"][last]
            place, owner = ranges(begin, end)
            parts.append((user[last][owner], np.full(len(owner), -1), arrays["history_items"][place]))
        elif self.stored is not None:
            before, items = self._stored(np.arange(len(preprocessor.users)))
            parts.append((before, np.full(len(before), -1), items))
        later = when[request] >= since[user[request]]
        parts.append((user[request][later], when[request][later], item[later]))
        users, times, items = (np.concatenate(each) for each in zip(*parts))
        known = users > 0
        users, times, items = users[known], times[known], items[known]
        order = np.lexsort((times, users))
        users, items = users[order], items[order]
        count = np.bincount(users, minlength=len(preprocessor.users))
        end = np.cumsum(count)
        new = end[users] - np.arange(len(users)) <= length
        count = np.bincount(users[new], minlength=len(count))
        return Histories(np.concatenate([[0], np.cumsum(count)]), items[new].astype(np.int32))


@dataclass
class _Sample:
    """scores float64 [m, S], labels [m], and columns of features."""

    scores: np.ndarray
    labels: np.ndarray
    features: Dict[str, pa.Array]


def _blocks(values: np.ndarray):
    for start in range(0, len(values), _ROWS):
        yield values[start : start + _ROWS]


def _clicks(arrays: Dict[str, np.ndarray], rows: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The request (int64) and the item row (int64) of every positive among the requests ``rows``."""
    requests, items = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for part in _blocks(rows):
        row, column = np.nonzero(arrays["labels"][part])
        requests.append(part[row])
        items.append(arrays["candidates"][part[row], column].astype(np.int64))
    return np.concatenate(requests), np.concatenate(items)
