"""The whole story on one page: config → retriever → candidates → reranker → result."""

from __future__ import annotations

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

import contextlib
import time
from logging import getLogger
from typing import Any, Callable, Dict, List, Optional

from recbole.utils import init_seed
from torch import Tensor

from dnr_recbole.artefact import artefact_of_run, save_artefact
from dnr_recbole.baselines import baseline_results
from dnr_recbole.compat import require_packages
from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.dataset import RerankData
from dnr_recbole.data.statistics import format_statistics
from dnr_recbole.errors import ConfigError
from dnr_recbole.evaluator import format_probe_table, probe_warnings, probes
from dnr_recbole.evaluator.per_request import save_per_request
from dnr_recbole.files import write_json
from dnr_recbole.logs import log_file, restored, shows_progress, start_logger
from dnr_recbole.paths import check_paths
from dnr_recbole.registry import get_reranker
from dnr_recbole.results import result_row
from dnr_recbole.sources import Prepared, get_source
from dnr_recbole.trainer import RerankTrainer
from dnr_recbole.trainer.run_files import RunFiles
from dnr_recbole.workers import run_processes

Weights = Dict[str, Tensor]


@restored()
def run_dnr(
    model: Optional[str] = None,
    dataset: Optional[str] = None,
    config_file_list: Optional[List[str]] = None,
    config_dict: Optional[Dict[str, Any]] = None,
    argv: Optional[List[str]] = None,
    saved: bool = True,
    callback_fn: Optional[Callable[[int, float], None]] = None,
) -> Dict[str, Any]:
    """Train a retriever, build candidates, train and evaluate a reranker.

    Args:
        model, dataset: names; default as configured.
        config_file_list, config_dict, argv: as in :class:`~dnr_recbole.config.Config`.
        saved: write checkpoints; without them the last epoch's model is evaluated.
        callback_fn: called with (epoch, valid_score) after each validation, e.g. to report to a tuner.

    Returns:
        the result: RecBole's four entries, and ``row`` with all that
        :func:`~dnr_recbole.results.result_row` lists.

    Raises:
        DnrError: anything a user can cause or repair, in one line.
    """
    started = time.time()
    config = Config(model, dataset, config_file_list, config_dict, argv)
    get_source(config).check(config)
    check_paths(config, saved)
    init_seed(config["seed"], config["reproducibility"])
    start_logger(config)
    getLogger(__name__).info(config)
    prepared = prepare(config)
    getLogger(__name__).info("\n" + format_statistics(prepared.data.statistics))
    result = train(config, prepared.data, prepared.retriever_metrics, saved, callback_fn, started)
    if config["artefact_dir"]:
        save_artefact(config["artefact_dir"], artefact_of_run(result["row"], prepared))
        getLogger(__name__).info(f"written to {config['artefact_dir']}: Reranker.load, `dnr-recbole rank`")
    return result


def prepare(config: Config) -> Prepared:
    """All data of a run, from its source."""
    require_packages(config)
    source = get_source(config)
    return source.prepare(config, source.shared(config))


def train(
    config: Config,
    data: RerankData,
    retriever_metrics: Dict[str, float],
    saved: bool = True,
    callback_fn: Optional[Callable[[int, float], None]] = None,
    started: Optional[float] = None,
    start: Optional[Weights] = None,
) -> Dict[str, Any]:
    """Stage 2, in as many processes as ``nproc`` says; arguments and result as in :func:`run_dnr`.

    ``start``: the state of a model of the same shapes from which training goes on, in the place of a fresh one.
    """
    if config["nproc"] > 1 and callback_fn is not None:
        raise ConfigError("nproc > 1 cannot report to a callback, e.g. of a tuner: use nproc=1")
    files = RunFiles.of(config, data) if saved else None
    with files.owned() if files else contextlib.nullcontext():
        if config["nproc"] > 1:
            return _run_processes(config, data, retriever_metrics, files, started, start)
        return train_and_evaluate(config, data, retriever_metrics, files, callback_fn, started, start)


def train_and_evaluate(
    config: Config,
    data: RerankData,
    retriever_metrics: Dict[str, float],
    files: Optional[RunFiles] = None,
    callback_fn: Optional[Callable[[int, float], None]] = None,
    started: Optional[float] = None,
    start: Optional[Weights] = None,
) -> Dict[str, Any]:
    """Stage 2 in this process, which may be one of several; see :func:`run_dnr`.

    ``files`` must be owned by the caller; None writes no checkpoint and evaluates the last epoch's model.
    """
    logger = getLogger(__name__)
    seed = config["seed"] if config["init_seed"] is None else config["init_seed"]
    # Seeded anew: the reranker must not depend on whether stage 1 was trained or came from the cache.
    init_seed(seed + (config["local_rank"] or 0), config["reproducibility"])
    reranker = get_reranker(config["model"])(config, data.catalogue).to(config["device"])
    logger.info(reranker)
    item_counter = data.catalogue.item_counts
    if start is not None:
        reranker.load_state_dict(start)
    trainer = RerankTrainer(config, reranker, data.catalogue, item_counter, files, warm=start is not None)
    shard = {"rank": config["rank"], "world_size": trainer.world_size}
    batch_size = max(1, config["train_batch_size"] // trainer.world_size)
    train = SlateLoader(data.train, batch_size, shuffle=True, seed=seed, **shard)
    valid, test = (SlateLoader(part, config["eval_batch_size"], **shard) for part in (data.valid, data.test))
    progress = shows_progress(config)
    with trainer.wandblogger:
        if config["resume"] and files:
            trainer.resume_checkpoint()
        best_valid_score, best_valid_result = trainer.fit(
            train, valid, saved=files is not None, show_progress=progress, callback_fn=callback_fn
        )
        test_result = trainer.evaluate(test, load_best_model=files is not None, show_progress=progress)
    result = {
        "best_valid_score": best_valid_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid_result,
        "test_result": test_result,
    }
    baselines = baseline_results(config, data)  # all processes take part
    if trainer.is_main:
        probe_results = probes(config, data.test, data.catalogue, item_counter, truth=data.truth)
        shown = [m for m in test_result if not m.endswith("@1") or m.startswith("coverage")]
        table = format_probe_table(test_result, {**baselines, **probe_results}, shown, config["model"])
        logger.info("test result, baselines and model-free probes\n" + table)
        for warning in probe_warnings(test_result, {**baselines, **probe_results}, config["valid_metric"].lower()):
            logger.warning(warning)
        oracle = trainer.oracle(SlateLoader(data.test, config["eval_batch_size"]))
        for name, share in oracle.items():
            logger.info(f"{config['model']} chooses among few {name}: the best choice has {share:.4f} of the hits")
        result["oracle"] = oracle
        result["baselines"] = baselines
        seconds = time.time() - (started or time.time())
        result["row"] = result_row(config, data, retriever_metrics, result, probe_results, trainer, seconds)
        if config["per_request_file"]:
            assert trainer.evaluation is not None  # the test set was evaluated above
            save_per_request(config["per_request_file"], trainer.evaluation, config, data.test.users)
        if config["result_file"]:
            write_json(config["result_file"], result["row"])
    return result


def _run_processes(
    config: Config,
    data: RerankData,
    retriever_metrics,
    files: Optional[RunFiles],
    started: Optional[float],
    start: Optional[Weights],
) -> Dict[str, Any]:
    """Stage 2 in ``nproc`` processes on this machine; they share the candidate tensors of this one."""
    settings = {**config.as_dict(), "world_size": config["nproc"], "offset": 0}
    arguments = (settings, log_file(), data, retriever_metrics, files, started, start)
    return run_processes(_train_as_one_of_many, arguments, config["nproc"], config["device"])


def _train_as_one_of_many(local_rank: int, settings, log, data, retriever_metrics, files, started, start):
    config = Config(config_dict={**settings, "local_rank": local_rank})
    start_logger(config, path=log)
    return train_and_evaluate(config, data, retriever_metrics, files, None, started, start)


def objective_function(config_dict=None, config_file_list=None, saved=True) -> Dict[str, Any]:
    """What RecBole's HyperTuning calls for a trial; selection is on validation, stage 1 comes from the shared cache."""
    keys = {**(config_dict or {}), "baselines": []}
    result = run_dnr(config_dict=keys, config_file_list=config_file_list, saved=saved)
    return {
        "model": result["row"]["model"],
        "best_valid_score": result["best_valid_score"],
        "valid_score_bigger": result["valid_score_bigger"],
        "best_valid_result": result["best_valid_result"],
        "test_result": result["test_result"],
    }
