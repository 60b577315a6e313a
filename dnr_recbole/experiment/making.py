"""Make a run of a plan: train it and keep what its line in the results says."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from typing import Any, Dict, Optional, Tuple

import torch

from dnr_recbole.cluster import device_keys
from dnr_recbole.compat import require_packages
from dnr_recbole.config import Config
from dnr_recbole.data.dataset import RerankData
from dnr_recbole.experiment.plan import Keys
from dnr_recbole.experiment.request_files import file_entry, keep_probes
from dnr_recbole.files import sweep, temporary_name
from dnr_recbole.identity import FileDigests, digest, identity
from dnr_recbole.logs import restored, start_logger
from dnr_recbole.quick_start import train
from dnr_recbole.sources import get_source
from dnr_recbole.trainer.checkpoint import load_reranker

# What a run writes into its line, from the result row.
_KEPT = ("identity", "files", "code", "data", "best_valid_score", "test", "probes", "oracle", "seconds_per_epoch",
         "epochs", "peak_memory_mib", "retriever", "git_commit", "versions", "cpu", "device")  # fmt: skip
_TIMED_REQUESTS, _TIMED_BATCH = 1024, 256


class Maker:
    """Makes the runs of a results file, one after another; what they have in common is made once.

    Args:
        output: the results file.
    """

    def __init__(self, output: str):
        self.output = output
        self.files: Dict[str, FileDigests] = {}  # per set of source keys
        self.shared: Tuple[Optional[str], Any] = (None, None)  # what the last run has in common with others

    def train(self, keys: Keys, values: str) -> Dict[str, Any]:
        """What a run's line says; its values per request are in the file ``values`` before there is a line."""
        started, config = time.time(), Config(config_dict=keys)
        start_logger(config, quiet=True)
        files = self.files_of(config)
        stage1 = digest(identity(config, "candidates", files))
        require_packages(config)
        source = get_source(config)
        if self.shared[0] != stage1:
            self.shared = None, None  # let go of the old before the new is made
            self.shared = stage1, source.shared(config, files)
        prepared = source.prepare(config, self.shared[1], files)
        data, retriever_metrics = prepared.data, prepared.retriever_metrics
        with _own_folder(config["checkpoint_dir"]) as folder:
            own = {"checkpoint_dir": folder, "per_request_file": values, "baselines": []}
            config = Config(config_dict={**config.as_dict(), **own})
            row = train(config, data, retriever_metrics)["row"]
            kept = {key: row[key] for key in _KEPT}
            kept["requests"] = file_entry(self.output, values)
            kept["probe_requests"] = keep_probes(self.output, config, data, row["data"])
            kept["valid_score_bigger"] = config["valid_metric_bigger"]
            kept["ms_per_request"] = _milliseconds(row["checkpoint"], config, data)
        return {**kept, "seconds": time.time() - started}

    def files_of(self, config: Config) -> FileDigests:
        """Digests of the data's files, taken once."""
        names = "data_path", "use_features", "retriever", "requests", "users_file", "items_file", "item_vectors"
        key = digest([*(config[name] for name in names), config.of_scope("source")])
        if key not in self.files:
            self.files[key] = get_source(config).files(config)
        return self.files[key]


@restored()
def make_run(keys: Keys, output: str, values: str) -> Dict[str, Any]:
    """:meth:`Maker.train` in a process of a cluster, on the GPUs that this gives it; the process keeps its maker."""
    return _maker(output).train({**keys, **device_keys()}, values)


@functools.lru_cache(maxsize=1)
def _maker(output: str) -> Maker:
    return Maker(output)


@contextlib.contextmanager
def _own_folder(parent: str):
    """A folder below ``checkpoint_dir`` that nobody else uses; gone afterwards, or at the next start if killed."""
    sweep(parent)
    folder = temporary_name(os.path.join(parent, "compare"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def _milliseconds(path: str, config: Config, data: RerankData) -> float:
    """Prediction time per request in batches, after a warm-up; the median of three passes."""
    model, _ = load_reranker(path, config["device"])
    rows = torch.arange(min(_TIMED_REQUESTS, len(data.test)))
    slates = [data.test.slate(part).without_labels().to(config["device"]) for part in rows.split(_TIMED_BATCH)]
    model.predict(slates[0])
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for slate in slates:
            model.predict(slate)
        times.append(time.perf_counter() - started)
    return sorted(times)[1] / len(rows) * 1000
