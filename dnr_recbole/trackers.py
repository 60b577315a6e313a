"""Where a training's numbers go beside the log: TensorBoard, Weights & Biases (`log_wandb`), MLflow (`log_mlflow`).

RecBole's trainers report to two attributes of theirs, ``tensorboard`` and ``wandblogger``; the same :class:`Trackers`
stands behind both, for a retriever's training and for a reranker's.
"""

from __future__ import annotations

import contextlib
import os
import time
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Type

from dnr_recbole.compat import plain
from dnr_recbole.errors import ConfigError
from dnr_recbole.logs import TensorBoard, log_name

FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
_SECRET = ("mlflow_tracking_uri",)  # may hold a password
_AT_ONCE = 100  # parameters that an MLflow server takes together


class Tracker:
    """A run of one training in somebody's system; the constructor begins it.

    One that the caller has begun is used and left open.

    Attributes:
        errors: what it raises when it cannot be reached.
    """

    errors: Tuple[Type[Exception], ...] = (OSError,)

    def metrics(self, values: Mapping[str, float], head: str, step: Optional[int]) -> None:
        """Values of an epoch or of a validation (``head``: train, valid) by ``head/name``."""
        raise NotImplementedError

    def summary(self, values: Mapping[str, float]) -> None:
        """What the training came to, by ``eval/name``."""
        raise NotImplementedError

    def end(self, status: str) -> None:
        """The training is over: finished, failed or interrupted."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _ended_if_it_fails(self) -> Iterator[None]:
        """What else the constructor does once there is a run: nobody but itself could end it."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(*self.errors):
                self.end(FAILED)
            raise


class WandbTracker(Tracker):
    """Weights & Biases, with its files below ``log_dir``; without a network where W&B's own settings say offline."""

    def __init__(self, config, kind: str):
        import wandb

        self._wandb, self._begun, self.errors = wandb, None, (wandb.Error, OSError)
        if wandb.run is None:
            where = {"project": config["wandb_project"], "dir": config["log_dir"], "job_type": kind}
            self._begun = wandb.init(config=_keys(config), **where)
        with self._ended_if_it_fails():
            for head in ("train", "valid"):
                wandb.define_metric(f"{head}/*", step_metric=f"{head}_step")

    def metrics(self, values, head, step):
        self._wandb.log({**values, f"{head}_step": step})

    def summary(self, values):
        for name, value in values.items():
            self._wandb.run.summary[name] = value

    def end(self, status):
        if self._begun is not None:
            self._begun.finish(exit_code=0 if status == FINISHED else 1)


class MlflowTracker(Tracker):
    """MLflow: keys as parameters, the stage as a tag; ``@`` of a metric's name is ``_at_``, as it allows none.

    The address is ``mlflow_tracking_uri``, else MLflow's environment variable, else a database below ``log_dir``.
    """

    _STATUS = {FINISHED: "FINISHED", FAILED: "FAILED", INTERRUPTED: "KILLED"}

    def __init__(self, config, kind: str):
        import mlflow
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self._entities, self.errors = mlflow.entities, (MlflowException, OSError)
        active = mlflow.active_run()
        self._begun = active is None
        if active is None:
            uri, files = _mlflow_store(config)
            self._client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = self._experiment(config["mlflow_experiment"], files)
            run = self._client.create_run(experiment, run_name=log_name(config), tags={"stage": kind})
        else:
            self._client, run = mlflow.MlflowClient(), active
        self._run = run.info.run_id
        if self._begun:
            keys = [Param(name, str(value)) for name, value in _keys(config).items()]
            with self._ended_if_it_fails():
                for start in range(0, len(keys), _AT_ONCE):
                    self._client.log_batch(self._run, params=keys[start : start + _AT_ONCE])

    def _experiment(self, name: str, files: Optional[str]) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, artifact_location=files)
            except self.errors:  # another process was quicker
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def metrics(self, values, head, step):
        now = int(1000 * time.time())
        found = [
            self._entities.Metric(name.replace("@", "_at_"), float(value), now, step or 0)
            for name, value in values.items()
        ]
        self._client.log_batch(self._run, metrics=found)

    def summary(self, values):
        self.metrics(values, "", 0)

    def end(self, status):
        if self._begun:
            self._client.set_terminated(self._run, self._STATUS[status])


TRACKERS: Dict[str, Callable[[Any, str], Tracker]] = {
    "log_wandb": WandbTracker,
    "log_mlflow": MlflowTracker,
}  # key → what it switches on


class Trackers:
    """All of one training: begun when its block begins, in the first process only, and ended with how it went.

    What cannot be reached any more later is said once, and the training goes on.
    """

    def __init__(self, config):
        self.config, self.tensorboard = config, TensorBoard.of(config)
        self._runs: List[Tuple[str, Tracker]] = []
        self._lost: List[str] = []

    def __enter__(self) -> Trackers:
        kind = "retriever" if self.config.is_retriever else "reranker"
        for key, tracker in TRACKERS.items():
            if not self.config[key] or self.config["rank"]:
                continue
            try:
                self._runs.append((key, tracker(self.config, kind)))
            except Exception as error:  # each has errors of its own, and none of them is worth a training's traceback
                self.__exit__(type(error), error, None)
                raise ConfigError(f"{key}=True: {_line(error)}") from error
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.tensorboard.close()
        status = FINISHED if kind is None else FAILED if issubclass(kind, Exception) else INTERRUPTED
        self._tell("end", status)
        self._runs.clear()

    # ------------------------------------------------------------------ what RecBole's trainers call

    def log_metrics(self, metrics: Mapping[str, Any], head: str = "train", commit: bool = True) -> None:
        """Values of an epoch; ``<head>_step`` among them says which."""
        step = metrics.get(f"{head}_step")
        values = {f"{head}/{name}": _number(value) for name, value in metrics.items() if not name.endswith("_step")}
        self._tell("metrics", values, head, step)

    def log_eval_metrics(self, metrics: Mapping[str, Any], head: str = "eval") -> None:
        """Test metrics."""
        self._tell("summary", {f"{head}/{name}": _number(value) for name, value in metrics.items()})

    def _tell(self, what: str, *arguments: Any) -> None:
        for key, run in self._runs:
            if key in self._lost and what != "end":
                continue
            try:
                getattr(run, what)(*arguments)
            except run.errors as error:
                if key not in self._lost:
                    self._lost.append(key)
                    getLogger(__name__).warning(f"{key}: {_line(error)}; going on without")


def _mlflow_store(config) -> Tuple[Optional[str], Optional[str]]:
    """-> the address (None: MLflow's own default), and where files of runs go (None: the store decides)."""
    given = config["mlflow_tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
    if given or not config["log_dir"]:
        return given, None
    folder = Path(config["log_dir"]).absolute()
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow").as_uri()


def _keys(config) -> Dict[str, Any]:
    return {name: plain(value) for name, value in config.as_dict().items() if name not in _SECRET}


def _number(value: Any) -> float:
    """RecBole's loss may be a tuple of terms."""
    return float(sum(value)) if isinstance(value, (tuple, list)) else float(value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
