"""The whole story on one page: config → retriever → candidates → reranker → result."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from importlib.metadata import PackageNotFoundError, version
from logging import getLogger
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from recbole.utils import init_logger, init_seed

import dnr_recbole
from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.dataset import RerankData, build_rerank_data
from dnr_recbole.data.feasibility import check_feasible
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.loading import load_recbole_dataset
from dnr_recbole.data.statistics import format_statistics
from dnr_recbole.data.synthetic import synthetic_rerank_data
from dnr_recbole.errors import ConfigError, DnrError
from dnr_recbole.evaluator import format_probe_table, probe_warnings, probes
from dnr_recbole.registry import get_reranker
from dnr_recbole.retriever.training import train_retriever
from dnr_recbole.trainer import RerankTrainer

# Keys that change how a run goes, but not what it computes; they do not distinguish checkpoints.
_INCIDENTAL = {
    "resume", "result_file", "show_progress", "state", "checkpoint_dir", "cache_dir", "use_cache", "epochs", "gpu_id",
    "use_gpu", "device", "worker", "log_wandb", "wandb_project", "data_path", "local_rank", "world_size", "ip", "port",
    "offset", "nproc", "single_spec", "rank", "plugins", "train_neg_sample_args", "valid_neg_sample_args",
    "test_neg_sample_args",
}  # fmt: skip


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
        the result: RecBole's four entries and all that :func:`result_row` lists.

    Raises:
        DnrError: anything a user can cause or repair, in one line.
    """
    started = time.time()
    config = Config(model, dataset, config_file_list, config_dict, argv)
    init_seed(config["seed"], config["reproducibility"])
    start_logger(config)
    getLogger().info(config)
    data, retriever_metrics = prepare_data(config)
    getLogger().info("\n" + format_statistics(data.statistics))
    if config["nproc"] > 1:
        if callback_fn is not None:
            raise ConfigError("nproc > 1 cannot report to a callback, e.g. of a tuner: use nproc=1")
        return _run_processes(config, data, retriever_metrics, saved, started)
    return train_and_evaluate(config, data, retriever_metrics, saved, callback_fn, started)


def prepare_data(config: Config) -> Tuple[RerankData, Dict[str, float]]:
    """Stage 1 and the candidates; the second value holds the retriever's metrics."""
    if config["dataset"] == "synthetic":
        return synthetic_rerank_data(config), {}
    dataset = load_recbole_dataset(config)
    interactions = Interactions.from_recbole(dataset, config)
    check_feasible(config, interactions)
    retrieval = train_retriever(config, dataset, interactions)
    return build_rerank_data(config, dataset, interactions, retrieval), retrieval.metrics


def train_and_evaluate(
    config: Config,
    data: RerankData,
    retriever_metrics: Dict[str, float],
    saved: bool = True,
    callback_fn: Optional[Callable[[int, float], None]] = None,
    started: Optional[float] = None,
    name: Optional[str] = None,
) -> Dict[str, Any]:
    """Stage 2 in this process, which may be one of several; see :func:`run_dnr`.

    ``name`` is the stem of the checkpoint files, by default :func:`run_name`.
    """
    logger = getLogger()
    # Seeded anew: the reranker must not depend on whether stage 1 was trained or came from the cache.
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    reranker = get_reranker(config["model"])(config, data.catalogue).to(config["device"])
    logger.info(reranker)
    item_counter = data.catalogue.item_counts
    trainer = RerankTrainer(config, reranker, data.catalogue, item_counter, name or run_name(config))
    shard = {"rank": config["rank"], "world_size": trainer.world_size}
    batch_size = max(1, config["train_batch_size"] // trainer.world_size)
    train = SlateLoader(data.train, batch_size, shuffle=True, seed=config["seed"], **shard)
    valid, test = (SlateLoader(part, config["eval_batch_size"], **shard) for part in (data.valid, data.test))
    if config["resume"]:
        trainer.resume_checkpoint()

    best_valid_score, best_valid_result = trainer.fit(
        train, valid, saved=saved, show_progress=config["show_progress"], callback_fn=callback_fn
    )
    test_result = trainer.evaluate(test, load_best_model=saved, show_progress=config["show_progress"])
    result = {
        "best_valid_score": best_valid_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid_result,
        "test_result": test_result,
    }
    if trainer.is_main:
        probe_results = probes(config, data.test, data.catalogue, item_counter)
        shown = [m for m in test_result if not m.endswith("@1") or m.startswith("coverage")]
        table = format_probe_table(test_result, probe_results, shown, config["model"])
        logger.info("test result and model-free probes\n" + table)
        for warning in probe_warnings(test_result, probe_results, config["valid_metric"].lower()):
            logger.warning(warning)
        seconds = time.time() - (started or time.time())
        result["row"] = result_row(config, data, retriever_metrics, result, probe_results, trainer, seconds)
        if config["result_file"]:
            write_json(config["result_file"], result["row"])
    return result


def _run_processes(config: Config, data: RerankData, retriever_metrics, saved: bool, started: float) -> Dict[str, Any]:
    """Stage 2 in ``nproc`` processes on this machine; they share the candidate tensors of this one."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    settings = {**config.as_dict(), "world_size": config["nproc"], "offset": 0, "ip": "localhost", "port": port}
    queue = mp.get_context("spawn").SimpleQueue()
    arguments = (settings, data, retriever_metrics, saved, started, run_name(config), queue)
    context = mp.spawn(_worker, args=arguments, nprocs=config["nproc"], join=False)
    messages: List[Any] = []
    try:
        while not context.join(timeout=0.2):
            if not queue.empty():  # read while they run: a full pipe would block the writer
                messages.append(queue.get())
    except mp.ProcessExitedException:
        if queue.empty() and not messages:
            raise
    while not queue.empty():
        messages.append(queue.get())
    for message in messages:
        if isinstance(message, DnrError):
            raise message
    return messages[0]


def _worker(local_rank: int, settings, data, retriever_metrics, saved, started, name, queue) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // settings["world_size"]))
    config = Config(config_dict={**settings, "local_rank": local_rank})
    start_logger(config)
    try:
        result = train_and_evaluate(config, data, retriever_metrics, saved, None, started, name)
    except DnrError as error:
        queue.put(error)
        raise SystemExit(1) from None  # ends the others, too: they may be waiting for this one
    if local_rank == 0:
        queue.put(result)
    dist.barrier()  # the first to leave takes the store with it
    dist.destroy_process_group()


def objective_function(config_dict=None, config_file_list=None, saved=True) -> Dict[str, Any]:
    """What RecBole's HyperTuning calls for a trial; selection is on validation, stage 1 comes from the shared cache."""
    result = run_dnr(config_dict=dict(config_dict or {}), config_file_list=config_file_list, saved=saved)
    return {
        "model": result["row"]["model"],
        "best_valid_score": result["best_valid_score"],
        "valid_score_bigger": result["valid_score_bigger"],
        "best_valid_result": result["best_valid_result"],
        "test_result": result["test_result"],
    }


def run_name(config: Config) -> str:
    """Stem of a run's checkpoint files: model, dataset and a hash of every key that determines the numbers."""
    keys = {k: v for k, v in config.as_dict().items() if k not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True, default=str).encode()).hexdigest()[:10]
    return f"{config['model']}-{config['dataset']}-{digest}"


def result_row(config, data: RerankData, retriever_metrics, result, probe_results, trainer, seconds) -> Dict[str, Any]:
    """All that is needed to read, trust and repeat a result, as one JSON-able object."""
    train_seconds = trainer.epoch_seconds
    return {
        "model": config["model"],
        "backbone": config["backbone"] if config["model"] == "DNR" else None,
        "dataset": config["dataset"],
        "protocol": config["protocol"],
        "split": config["split"],
        "seed": config["seed"],
        "command": " ".join([os.path.basename(sys.executable), *sys.argv]),
        "config": config.as_dict(),
        "git_commit": _git_commit(),
        "versions": _versions(),
        "cpu": platform.processor() or platform.machine(),
        "device": str(config["device"]),
        "nproc": trainer.world_size,
        "statistics": data.statistics,
        "retriever": {"name": config["retriever"], **retriever_metrics},
        "best_valid_score": float(result["best_valid_score"]),
        "best_valid": _floats(result["best_valid_result"]),
        "test": _floats(result["test_result"]),
        "probes": {name: _floats(values) for name, values in probe_results.items()},
        "epochs": len(train_seconds),
        "seconds_per_epoch": sum(train_seconds) / len(train_seconds) if train_seconds else None,
        "seconds": seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (2**20 if sys.platform == "darwin" else 2**10),
        "history": trainer.history,
        "checkpoint": trainer.saved_model_file,
    }


def write_json(path: str, row: Dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all.

    Raises:
        DnrError: the file cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as f:
                json.dump(row, f, indent=2, default=str)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise DnrError(f"cannot write result_file {path}: {error}") from error


def start_logger(config: Config) -> None:
    """RecBole's logger, once per run: its basicConfig ignores all calls but the first in a process."""
    root = getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    init_logger(config)


def _floats(metrics: Optional[Dict[str, Any]]) -> Dict[str, float]:
    return OrderedDict((k, float(v)) for k, v in (metrics or {}).items())


def _git_commit() -> Optional[str]:
    """Commit of the source tree this package runs from, with "+" where files were changed; None outside git."""
    folder = os.path.dirname(os.path.abspath(__file__))

    def git(*args):
        return subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> Dict[str, str]:
    found = {"python": platform.python_version(), "dnr_recbole": dnr_recbole.__version__}
    for package in ("torch", "recbole", "numpy", "pandas", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
