"""Run what is missing of a plan (:mod:`dnr_recbole.experiment.plan`) and append it to a file of results.

Every finished run is one line, known by its identity: keys by scope, digests of the data, versions of the code. A run
that stands there is not repeated, so an interrupted plan goes on where it stopped; one whose keys, data or code have
changed is run again. Any number of processes may work on one file: each run is made by one of them. Test numbers play
no part in any choice. The values per request of each run and probe stand in files beside
(:mod:`dnr_recbole.experiment.request_files`); a line is written after its files.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from typing import Any, Dict, List, Optional, Tuple, Union

from dnr_recbole.cluster import Calls, check_shares, connected, must_have, n_cpus
from dnr_recbole.config import Config
from dnr_recbole.errors import DnrError
from dnr_recbole.evaluator.per_request import parquet_modules
from dnr_recbole.experiment.making import Maker, make_run
from dnr_recbole.experiment.plan import Plan, Run, read_plan
from dnr_recbole.experiment.request_files import request_file
from dnr_recbole.experiment.rows import Line, append, lock_path, read_rows
from dnr_recbole.locks import hold
from dnr_recbole.logs import restored
from dnr_recbole.paths import check_paths
from dnr_recbole.results import result_identity

_PATIENCE = 1.0  # seconds between two looks at what other processes work on
_AHEAD = 2  # runs for each that a cluster can make at once, so that none waits for the next
_FEWEST = 16  # a cluster that grows with what waits must see something wait


@restored()
def compare(
    plan_file: str,
    output: str,
    ray: Optional[str] = None,
    cpus_per_run: float = 1.0,
    gpus_per_run: float = 0.0,
) -> None:
    """Run what is missing of a plan and append it to ``output`` (JSON lines).

    Args:
        ray: the address of a cluster whose processes make the runs, see :func:`~dnr_recbole.cluster.connected`.
        cpus_per_run, gpus_per_run: what the cluster gives a run.

    Raises:
        ConfigError: the plan or one of its keys cannot be used; checked for all rows before the first run.
        DnrError: runs failed; the others were made.
    """
    check_shares("run", cpus_per_run, gpus_per_run, ray is not None)
    plan = read_plan(plan_file)
    parquet_modules()
    outputs = {"results": output, "per_request_file": request_file(output, "values")}
    for config in list(plan.configs()):  # all keys are looked at before anything is written
        check_paths(config, outputs=outputs)
    if ray is None:
        _Comparison(plan, output).work()
        return
    with connected(ray, "compare --ray"), Calls(make_run, cpus_per_run, gpus_per_run) as calls:
        must_have("run", cpus_per_run, gpus_per_run)
        most = max(_FEWEST, math.ceil(_AHEAD * n_cpus() / cpus_per_run))
        _OnCluster(plan, output, calls, most).work()


class _Comparison:
    """One process's work on a plan, perhaps beside others."""

    def __init__(self, plan: Plan, output: str):
        self.plan, self.output, self.started = plan, output, time.time()
        self.maker = Maker(output)
        self.identities: Dict[str, str] = {}  # of runs, by their place
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
                self.wait()
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
        with hold(lock_path(self.output, self.identity_of(run)), wait=False, remove=True) as held:
            if not held:
                return "busy"
            self.read()
            if self.line_of(run) is not None:
                return "done"
            result: Union[Dict[str, Any], DnrError]
            try:
                result = self.maker.train(run.keys, self.values_of(run))
            except DnrError as error:
                result = error
            self.keep(run, result)
        return "made"

    def wait(self) -> None:
        """Until it is worth another look at what others work on."""
        time.sleep(_PATIENCE)

    def keep(self, run: Run, result: Union[Dict[str, Any], DnrError]) -> None:
        """Append a run's line, and say so."""
        if isinstance(result, DnrError):
            self.failures.append(str(result))
            result = {"identity": self.identity_of(run), "error": str(result)}
        place = {"setting": run.setting, "row": run.row, "seed": run.seed, "searched": run.searched}
        append(self.output, {**place, "keys": run.keys, **result, "finished": time.time()})
        self.read()
        shown = result.get("error") or f"valid {result['best_valid_score']:.4f}, test ndcg {_ndcg(result):.4f}"
        print(f"{run}: {shown}", flush=True)

    # ------------------------------------------------------------------ what is there

    def read(self) -> None:
        """The lines of the file by identity. A failure counts only if it happened since this process began."""
        self.lines = {
            line["identity"]: line
            for line in read_rows(self.output)
            if line.get("identity") and ("error" not in line or line.get("finished", 0) >= self.started)
        }

    def values_of(self, run: Run) -> str:
        return request_file(self.output, self.identity_of(run))

    def line_of(self, run: Run) -> Optional[Line]:
        return self.lines.get(self.identity_of(run))

    def identity_of(self, run: Run) -> str:
        if run.place not in self.identities:
            config = Config(config_dict=run.keys)
            self.identities[run.place] = result_identity(config, self.maker.files_of(config))
        return self.identities[run.place]

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


class _OnCluster(_Comparison):
    """The same with the runs in processes of a cluster. Their locks and their lines are this process's.

    Args:
        most: runs that are handed over before they end; what is beyond is left for others who work on the file, and
            each takes a lock, which is an open file.
    """

    def __init__(self, plan: Plan, output: str, calls: Calls, most: int):
        super().__init__(plan, output)
        self.calls, self.most = calls, most
        self.running: Dict[str, Tuple[Run, contextlib.ExitStack]] = {}  # by identity, with what holds its lock

    def work(self) -> None:
        try:
            super().work()
        finally:
            for _, lock in self.running.values():
                lock.close()

    def make(self, run: Run) -> str:
        """Have a run made unless it is there: "done", or "busy" if somebody is at it."""
        name = self.identity_of(run)
        if self.line_of(run) is not None:
            return "done"
        if name in self.running or len(self.calls) >= self.most:
            return "busy"
        with contextlib.ExitStack() as lock:
            if not lock.enter_context(hold(lock_path(self.output, name), wait=False, remove=True)):
                return "busy"
            self.read()
            if self.line_of(run) is not None:
                return "done"
            self.calls.submit(name, run.keys, self.output, self.values_of(run))
            self.running[name] = run, lock.pop_all()
        return "busy"

    def wait(self) -> None:
        """Until a run has ended, or it is worth another look at what other processes work on."""
        if not self.calls:
            return super().wait()
        ended = self.calls.next(_PATIENCE)
        if ended is None:
            return
        name, result = ended
        run, lock = self.running.pop(name)
        with lock:
            if not isinstance(result, DnrError) and result["identity"] != name:
                result = DnrError("the machine that made it has other data or another version of the code")
            self.keep(run, result)


def _ndcg(result: Dict[str, Any]) -> float:
    return next((v for k, v in reversed(list(result["test"].items())) if k.startswith("ndcg")), float("nan"))
