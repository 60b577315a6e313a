"""What a run leaves behind: one JSON-able row with all that is needed to read, trust and repeat it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections import OrderedDict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Dict, Optional

from dnr_recbole._version import __version__
from dnr_recbole.data.dataset import RerankData
from dnr_recbole.identity import CODE_VERSIONS, FileDigests, digest, identity


def result_identity(config, files: Optional[FileDigests]) -> str:
    """Names the numbers of a run: equal for every run that must give the same ones."""
    return digest(identity(config, "evaluation", files))


def result_row(config, data: RerankData, retriever_metrics, result, probe_results, trainer, seconds) -> Dict[str, Any]:
    """All that is needed to read, trust and repeat a result, as one JSON-able object."""
    train_seconds = trainer.epoch_seconds
    return {
        "identity": result_identity(config, data.files),
        "files": data.files,
        "code": CODE_VERSIONS,
        "data": data.digest(),
        "model": config["model"],
        "backbone": config["backbone"] if config.model_class.wraps_backbone else None,
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
        "baselines": {name: _floats(values) for name, values in result["baselines"].items()},
        "oracle": result["oracle"],
        "epochs": len(train_seconds),
        "best_phase": trainer.best_phase,
        "seconds_per_epoch": sum(train_seconds) / len(train_seconds) if train_seconds else None,
        "seconds": seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (2**20 if sys.platform == "darwin" else 2**10),
        "history": trainer.history,
        "checkpoint": trainer.saved_model_file,
    }


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
    found = {"python": platform.python_version(), "dnr_recbole": __version__}
    for package in ("torch", "recbole", "numpy", "pandas", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
