"""Run what is missing of a plan (:mod:`dnr_recbole.experiment.plan`) and append it to a file of results.

Every finished run is one line, known by its identity: keys by scope, digests of the data, versions of the code. A run
that stands there is not repeated, so an interrupted plan goes on where it stopped; one whose keys, data or code have
changed is run again. Any number of processes may work on one file: each run is made by one of them. Test numbers play
no part in any choice. The values per request of each run and probe stand in files beside
(:mod:`dnr_recbole.experiment.request_files`); a line is written after its files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from typing import Any, Dict, List, Optional, Tuple

import torch

from dnr_recbole.compat import require_packages
from dnr_recbole.config import Config
from dnr_recbole.data.dataset import RerankData
from dnr_recbole.errors import DnrError
from dnr_recbole.evaluator.per_request import parquet_modules
from dnr_recbole.experiment.plan import Plan, Run, read_plan
from dnr_recbole.experiment.request_files import file_entry, keep_probes, request_file
from dnr_recbole.experiment.rows import Line, append, lock_path, read_rows
from dnr_recbole.files import sweep, temporary_name
from dnr_recbole.identity import FileDigests, digest, identity
from dnr_recbole.locks import hold
from dnr_recbole.logs import restored, start_logger
from dnr_recbole.paths import check_paths
from dnr_recbole.quick_start import train
from dnr_recbole.results import result_identity
from dnr_recbole.sources import get_source
from dnr_recbole.trainer.checkpoint import load_reranker

# What a run writes into its line, from the result row.
_KEPT = ("identity", "files", "code", "data", "best_valid_score", "test", "probes", "oracle", "seconds_per_epoch",
         "epochs", "peak_memory_mib", "retriever", "git_commit", "versions", "cpu", "device")  # fmt: skip
_TIMED_REQUESTS, _TIMED_BATCH = 1024, 256
_PATIENCE = 1.0  # seconds between two looks at what other processes work on


@restored()
def compare(plan_file: str, output: str) -> None:
    """Run what is missing of a plan and append it to ``output`` (JSON lines).

    Raises:
        ConfigError: the plan or one of its keys cannot be used; checked for all rows before the first run.
        DnrError: runs failed; the others were made.
    """
    plan = read_plan(plan_file)
    parquet_modules()
    outputs = {"results": output, "per_request_file": request_file(output, "values")}
    for config in list(plan.configs()):  # all keys are looked at before anything is written
        check_paths(config, outputs=outputs)
    _Comparison(plan, output).work()


class _Comparison:
    """One process's work on a plan, perhaps beside others."""

    def __init__(self, plan: Plan, output: str):
        self.plan, self.output, self.started = plan, output, time.time()
        self.files: Dict[str, FileDigests] = {}  # per set of source keys
        self.identities: Dict[str, str] = {}  # of runs, by their place
        self.shared: Tuple[Optional[str], Any] = (None, None)  # what the last run has in common with others
        self.lines: Dict[str, Line] = {}
        self.failures: List[str] = []

    def work(self) -> None:
        self.read()
        self.name_stale_lines()
        while True:
            made, busy = 0, 0
            for setting, seed, row in self.plan.places():
                for run in self.runs(setting, seed, row):
                    outcome = "busy" if run is None else self.make(run)
                    made, busy = made + (outcome == "made"), busy + (outcome == "busy")
            if not busy:
                break
            if not made:
                time.sleep(_PATIENCE)
        with contextlib.suppress(OSError):
            os.unlink(lock_path(self.output))
            os.rmdir(os.path.dirname(lock_path(self.output)))
        if self.failures:
            first = f"{len(self.failures)} runs failed, the first because: {self.failures[0]}"
            raise DnrError(f"{first}; the same command tries them again")

    def runs(self, setting: str, seed: int, row: str) -> List[Optional[Run]]:
        """The runs at a place; [None] where they are not known before other processes have finished theirs."""
        trials = self.plan.trials(setting, row)
        if seed == self.plan.seeds[0]:
            return trials
        if any(self.line_of(run) is None for run in trials):
            return [None]
        searched = self.plan.chosen(setting, row, self.line_of)
        return [] if searched is None else [self.plan.run(setting, row, seed, searched)]

    def make(self, run: Run) -> str:
        """Make a run unless it is there: "done", "made", or "busy" if another process is at it."""
        if self.line_of(run) is not None:
            return "done"
        name = self.identity_of(run)
        with hold(lock_path(self.output, name), wait=False, remove=True) as held:
            if not held:
                return "busy"
            self.read()
            if self.line_of(run) is not None:
                return "done"
            try:
                result = self.train(run, request_file(self.output, name))
            except DnrError as error:
                result = {"identity": name, "error": str(error)}
                self.failures.append(str(error))
            place = {"setting": run.setting, "row": run.row, "seed": run.seed, "searched": run.searched}
            append(self.output, {**place, "keys": run.keys, **result, "finished": time.time()})
            self.read()
        shown = result.get("error") or f"valid {result['best_valid_score']:.4f}, test ndcg {_ndcg(result):.4f}"
        print(f"{run}: {shown}", flush=True)
        return "made"

    def train(self, run: Run, values: str) -> Dict[str, Any]:
        """What a run's line says; its values per request are in the file ``values`` before there is a line."""
        started, config = time.time(), Config(config_dict=run.keys)
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

    # ------------------------------------------------------------------ what is there

    def read(self) -> None:
        """The lines of the file by identity. A failure counts only if it happened since this process began."""
        self.lines = {
            line["identity"]: line
            for line in read_rows(self.output)
            if line.get("identity") and ("error" not in line or line.get("finished", 0) >= self.started)
        }

    def line_of(self, run: Run) -> Optional[Line]:
        return self.lines.get(self.identity_of(run))

    def identity_of(self, run: Run) -> str:
        if run.place not in self.identities:
            config = Config(config_dict=run.keys)
            self.identities[run.place] = result_identity(config, self.files_of(config))
        return self.identities[run.place]

    def files_of(self, config: Config) -> FileDigests:
        """Digests of the data's files, taken once."""
        names = "data_path", "use_features", "retriever", "requests", "users_file", "items_file", "item_vectors"
        key = digest([*(config[name] for name in names), config.of_scope("source")])
        if key not in self.files:
            self.files[key] = get_source(config).files(config)
        return self.files[key]

    def name_stale_lines(self) -> None:
        """Say which lines of the file belong to no run of the plan as it is now."""
        known = {self.identity_of(run) for run in self.plan.all_runs()}
        stale = [line for line in read_rows(self.output) if "error" not in line and line.get("identity") not in known]
        if stale:
            shown = "; ".join(sorted({f"{line['setting']} | {line['row']}" for line in stale})[:10])
            print(
                f"{self.output}: {len(stale)} lines belong to no run of this plan (other keys, data or code) and are "
                f"not used: {shown}",
                flush=True,
            )


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


def _ndcg(result: Dict[str, Any]) -> float:
    return next((v for k, v in reversed(list(result["test"].items())) if k.startswith("ndcg")), float("nan"))
