"""The front door: train a reranker on request logs, rank with it, save it, load it."""

from __future__ import annotations

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

import os
import tempfile
from logging import getLogger
from typing import Any, Dict, List, Optional, Union

import numpy as np
import pandas as pd
from recbole.utils import init_seed

from dnr_recbole.artefact import Artefact, artefact_of_run, load_artefact, save_artefact
from dnr_recbole.compat import require_packages
from dnr_recbole.config import Config
from dnr_recbole.data.dataset import RerankData
from dnr_recbole.errors import ConfigError, DataError, DnrError
from dnr_recbole.evaluation import Evaluation, evaluate_log
from dnr_recbole.evaluator import format_probe_table
from dnr_recbole.export.onnx_file import Exported, export_artefact, write_export
from dnr_recbole.logs import restored, start_logger
from dnr_recbole.model.growth import grown_state
from dnr_recbole.quick_start import train
from dnr_recbole.ranking import empty_ranking, rank_table, together
from dnr_recbole.registry import get_reranker
from dnr_recbole.requestlog.building import Built, build
from dnr_recbole.requestlog.reading import Source, Table
from dnr_recbole.requestlog.request_log import RequestLog
from dnr_recbole.sources import Prepared

Log = Union[RequestLog, pd.DataFrame, str, "os.PathLike[str]"]
# A library writes no files and no log lines that nobody asked for; any of these can be given.
_QUIET: Dict[str, Any] = {"log_dir": None, "tensorboard_dir": None, "use_cache": False}


class Reranker:
    """A reranker by name, for request logs of your own.

    ::

        log = RequestLog.read("requests.parquet")
        model = Reranker("DNR", backbone="PRM").fit(log)
        print(model.report)
        model.save("my_model/")
        top = Reranker.load("my_model/").rank(new_requests, k=6)

    Args:
        model: a registered name (`dnr-recbole models`).
        keys: any key of the configuration (`dnr-recbole keys --model=…`), e.g. ``epochs=10``.

    Raises:
        UnknownNameError, ConfigError: no such model, key or value.
    """

    def __init__(self, model: str = "PRM", **keys: Any):
        self.model, self.keys = get_reranker(model).__name__, dict(keys)
        self._artefact: Optional[Artefact] = None
        self._config()

    def _config(self, **more: Any) -> Config:
        return Config(self.model, self.keys.get("dataset", "log"), config_dict={
            **_QUIET, "source": "log", **self.keys, **more})  # fmt: skip

    # ------------------------------------------------------------------ training

    def fit(self, log: Log, start_from: Union[Reranker, str, None] = None) -> Reranker:
        """Train on a log; returns itself.

        Args:
            log: a :class:`RequestLog`, a DataFrame, or the path of a file.
            start_from: an earlier model (or its path) to go on from: its weights, its ids and its treatment of scores
                and features are kept, and ids that are new get rows of their own.

        Raises:
            DataError: the log has problems, or nothing can be learned from it.
            ConfigError: the earlier model is another one.
        """
        earlier = None if start_from is None else _artefact(start_from)
        with tempfile.TemporaryDirectory(prefix="dnr_recbole-") as folder:
            config = self._config(**({} if "checkpoint_dir" in self.keys else {"checkpoint_dir": folder}))
            self._artefact = _fit(config, _log(log), earlier)
        return self

    def tune(self, log: Log, search: Dict[str, List[Any]], max_evals: Optional[int] = None) -> Reranker:
        """Fit once for each combination of values and keep the best by ``valid_metric``; returns itself.

        Args:
            search: key → values to try, e.g. ``{"learning_rate": [3e-4, 1e-3]}``.
            max_evals: as many random combinations at most.

        Raises:
            ConfigError: there is nothing to try.
        """
        import itertools

        names, log = list(search), _log(log)
        trials = [dict(zip(names, values)) for values in itertools.product(*search.values())]
        if max_evals is not None and max_evals < len(trials):
            chosen = np.random.default_rng(self.keys.get("seed", 0)).choice(len(trials), max_evals, replace=False)
            trials = [trials[i] for i in sorted(chosen)]
        if not trials:
            empty = next((name for name, values in search.items() if not len(values)), None)
            what = f"max_evals={max_evals}" if empty is None else f"{empty} has no values"
            raise ConfigError(f"tune: nothing to try: {what}")
        best, found = -np.inf, []
        for trial in trials:
            other = Reranker(self.model, **{**self.keys, **trial, "baselines": []}).fit(log)
            config = other._config()
            score = other.artefact.metrics["best_valid"][config["valid_metric"].lower()]
            found.append({**trial, "valid_score": score})
            if (score if config["valid_metric_bigger"] else -score) > best:
                best = score if config["valid_metric_bigger"] else -score
                self._artefact, winner = other.artefact, trial
        self.keys.update(winner)
        self.trials = found
        return self

    # ------------------------------------------------------------------ what it knows

    @property
    def artefact(self) -> Artefact:
        """Raises:
        DnrError: neither fitted nor loaded.
        """
        if self._artefact is None:
            raise DnrError(f"this {self.model} is not fitted: call fit(log), or Reranker.load(path)")
        return self._artefact

    @property
    def metrics(self) -> Dict[str, float]:
        """Test metrics of the training's log."""
        return dict(self.artefact.metrics.get("test") or {})

    @property
    def report(self) -> str:
        """Test metrics beside the incoming order, other model-free rankings and baselines, as a table; below it, how
        the log was treated."""
        metrics = self.artefact.metrics
        others = {**metrics.get("baselines", {}), **metrics.get("probes", {})}
        shown = [m for m in metrics["test"] if not m.endswith("@1") or m.startswith("coverage")]
        table = format_probe_table(metrics["test"], others, shown, self.model)
        return "\n".join([table, *(f"note: {note}" for note in metrics.get("notes") or [])])

    # ------------------------------------------------------------------ ranking

    def rank(self, requests: Table, k: Optional[int] = None) -> pd.DataFrame:
        """Requests in their new order.

        Args:
            requests: a DataFrame or file in the long or the list form, without labels: request_id, user_id, item_id,
                and the score columns of the training; ``history`` if the training's log gave it.
            k: items per request; None = all.

        Returns:
            request_id, user_id, item_id (as they came), rank (from 0), rerank_score (higher is better, comparable
            within a request) and incoming_rank. Unknown users and items are ranked by what else is known of them; a
            request of fewer than k candidates has fewer rows; a candidate without a score counts as the lowest.

        Raises:
            DataError: a column is missing or a value cannot be used; the message names the row.
        """
        if k is not None and k < 1:
            raise ConfigError(f"k={k}: must be at least 1")
        frames = list(rank_table(self.artefact, together(Source(requests)), k))
        return pd.concat(frames, ignore_index=True) if frames else empty_ranking()

    def rank_users(self, users: List[Any], k: int = 10) -> pd.DataFrame:
        """Retrieve and rerank for users of a RecBole dataset, as of the end of its log; columns as of :meth:`rank`.

        Raises:
            DnrError: the model was trained on a request log, which has no retriever.
            DataError: a user is not in the dataset.
        """
        lists, ids = self.artefact.retrieved, self.artefact.preprocessor
        if lists is None:
            raise DnrError("this model has no retriever: it was trained on a request log; use rank(requests)")
        number = ids.users.ids.find([str(user) for user in users])
        if (number < 0).any():
            raise DataError(f"user '{list(users)[int(np.argmax(number < 0))]}' is not in the dataset")
        rows = number + 1
        items, scores = lists.items[rows].numpy(), lists.scores[rows].numpy()
        owner, place = np.nonzero(items > 0)
        texts = np.array(ids.items.texts(), dtype=object)
        frame = pd.DataFrame({
            "request_id": owner, "user_id": np.array([str(user) for user in users], dtype=object)[owner],
            "item_id": texts[items[owner, place]], "score": scores[owner, place].astype(np.float64),
        })  # fmt: skip
        return self.rank(frame, k).drop(columns="request_id")

    def evaluate(self, log: Log, against: Union[Reranker, str, None] = None) -> Evaluation:
        """Metrics on a log with labels, beside the incoming order; with ``against``, a paired test of two models."""
        other = None if against is None else _artefact(against)
        return evaluate_log(self.artefact, _log(log), other)

    # ------------------------------------------------------------------ saved

    def export(self, path: Union[str, os.PathLike], quantise: Optional[str] = None) -> Exported:
        """Write the scoring as one ONNX file, for runtimes without torch (docs/export.md).

        Args:
            quantise: ``int8``: smaller, and no longer torch's scores.

        Raises:
            ConfigError: onnx or onnxruntime is missing, or there is no such quantisation.
            DnrError: the model cannot be exported, or the file not be written.
        """
        exported = export_artefact(self.artefact, quantise)
        write_export(os.fspath(path), exported)
        return exported

    def save(self, path: Union[str, os.PathLike], with_users: bool = True) -> None:
        """Write the directory ``path``; see :mod:`dnr_recbole.artefact`.

        Args:
            with_users: False leaves out stored histories and the held-out sample, which are personal data.
        """
        save_artefact(os.fspath(path), self.artefact, with_users)

    @classmethod
    def load(cls, path: Union[str, os.PathLike], device: str = "cpu") -> Reranker:
        """A saved reranker; nothing that stands in the directory is executed.

        Raises:
            CheckpointError: it is missing, damaged, or of another format.
        """
        artefact = load_artefact(os.fspath(path), device)
        out = cls.__new__(cls)
        out.model, out.keys, out._artefact = type(artefact.model).__name__, {}, artefact
        return out


@restored()
def _fit(config: Config, log: RequestLog, earlier: Optional[Artefact]) -> Artefact:
    start_logger(config, quiet=not config["log_dir"])
    require_packages(config)
    init_seed(config["seed"], config["reproducibility"])
    built = build(config, log, None if earlier is None else earlier.preprocessor)
    start = None if earlier is None else _grown(earlier, built, config)
    row = train(config, built.data, {}, start=start)["row"]
    prepared = Prepared(built.data, preprocessor=built.preprocessor, sample=built.sample, notes=built.maker.notes)
    getLogger(__name__).info(f"{config['model']} fitted in {row['seconds']:.1f} s")
    return artefact_of_run(row, prepared)


def _grown(earlier: Artefact, built: Built, config: Config):
    """The earlier model's state with rows for new ids."""
    name = type(earlier.model).__name__
    if name != config["model"]:
        raise ConfigError(f"start_from is a {name}, not a {config['model']}")
    data: RerankData = built.data
    fresh = get_reranker(config["model"])(config, data.catalogue)
    old, new = earlier.catalogue, data.catalogue
    sizes = (old["n_users"], new.n_users), (old["n_items"], new.n_items)
    state = grown_state(earlier.model, fresh, sizes, new)
    try:
        fresh.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"start_from has other sizes than the keys ask for: {reason}") from error
    return state


def _log(log: Log) -> RequestLog:
    return log if isinstance(log, RequestLog) else RequestLog.read(log)


def _artefact(model: Union[Reranker, str, os.PathLike]) -> Artefact:
    return model.artefact if isinstance(model, Reranker) else load_artefact(os.fspath(model))
