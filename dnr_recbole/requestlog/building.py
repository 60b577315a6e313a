"""A log, ready for training: read, checked, converted, and kept in the cache or mapped from files where it is large."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from typing import TYPE_CHECKING, Optional

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from dnr_recbole.data.dataset import RerankData
from dnr_recbole.identity import digest, foreign_code
from dnr_recbole.requestlog.columns import plain
from dnr_recbole.requestlog.held_out import sample_frame, sample_rows
from dnr_recbole.requestlog.maker import Maker
from dnr_recbole.requestlog.preprocessor import Preprocessor
from dnr_recbole.requestlog.request_log import RequestLog
from dnr_recbole.requestlog.scan import Scan
from dnr_recbole.requestlog.split import EMPTY, KNOWLEDGE, choose_split
from dnr_recbole.requestlog.storage import cached, scratch

if TYPE_CHECKING:
    from dnr_recbole.config import Config

__all__ = ["EMPTY", "IN_MEMORY", "KNOWLEDGE", "Built", "Maker", "build", "choose_split"]

IN_MEMORY = 20_000_000  # candidates; the tensors of a larger log are mapped from files
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
                items = self.preprocessor.items.rows(requests.item.take(part).texts())
                place = part.start + (table.candidates[rows[at]].numpy()[:, None] == items).argmax(1)
                scores[at] = requests.scores[place]
                for name, values in features.items():
                    for column, value in enumerate(plain(requests.features[name]).take(pa.array(place)).to_pylist()):
                        values[at, column] = value
            before += len(requests)
        return sample_frame(self.preprocessor, test, torch.from_numpy(scores), features)


def build(config: Config, log: RequestLog, start: Optional[Preprocessor] = None) -> Built:
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
        arrays = cached(config["cache_dir"], key, partial(maker.arrays, preprocessor))
    else:
        arrays = maker.arrays(preprocessor, scratch() if found.rows > IN_MEMORY else None)
    data = dataclasses.replace(maker.data(preprocessor, arrays), files=files)
    return Built(data, preprocessor, found, maker)
