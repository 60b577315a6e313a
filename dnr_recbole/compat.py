"""The only place that knows what RecBole 1.2.1 breaks on today's numpy, scipy, pandas and torch.

Every patch states its reason and does nothing where it is not needed. `apply` needs neither recbole nor torch and runs
when this module is imported, which whatever imports recbole does first; `apply_recbole` imports recbole and runs with
the module `config`.
Ray is never imported here: `recbole.quick_start` does that, so this package does not import it either.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from enum import Enum
from typing import Any, Callable

from dnr_recbole.errors import ConfigError

# Names that recbole's metrics, data and configurator and Ray's loggers still use.
_NUMPY_ALIASES = {
    # removed in numpy 1.24
    "bool": "bool_", "int": "int_", "float": "float64", "complex": "complex128",
    "object": "object_", "str": "str_", "long": "int_", "unicode": "str_",
    # removed in numpy 2.0
    "float_": "float64", "complex_": "complex128", "unicode_": "str_", "bool8": "bool_",
}  # fmt: skip

# Keys that RecBole's classes read although no property file of theirs defines them; absent means None there.
OPTIONAL_KEYS = frozenset({"reg_weight", "double_tower", "norm"})


# Retriever -> (module, package on PyPI) that it imports while it trains.
_RETRIEVER_PACKAGES = {
    "NCL": [("faiss", "faiss-cpu")],
    "NNCF": [("networkx", "networkx"), ("community", "python-louvain")],
}


# Key -> module of a tracker, and the name of the extra that brings it.
_TRACKER_PACKAGES = {"log_wandb": "wandb", "log_mlflow": "mlflow"}


def apply() -> None:
    """Repair numpy and scipy before the first import of recbole; calling it again changes nothing."""
    _require_recbole()
    _refuse_pandas_3()
    _restore_numpy_aliases()
    _restore_dok_update()


def apply_recbole() -> None:
    """Repair recbole's own classes; calling it again changes nothing."""
    # Warnings about pandas 3, which is refused, addressed to recbole's authors and repeated for every column.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"recbole\.")
    _make_checkpoints_loadable()
    _download_without_process_group()
    _name_the_logger()
    _open_tensorboard_late()
    _begin_wandb_runs_late()
    _keep_tensorboard_threads_quiet()


def require_packages(config) -> None:
    """Refuse a run that would end in an ImportError after minutes: RecBole imports some packages where it uses them.

    Raises:
        ConfigError: a package that a tracker, the retriever or the reranker needs is not installed.
    """
    needed = [(f"{key}=True", module, module) for key, module in _TRACKER_PACKAGES.items() if config[key]]
    retriever = config["retriever"] if config["source"] == "recbole" else ""
    needed += [(f"retriever={retriever}", *package) for package in _RETRIEVER_PACKAGES.get(retriever, [])]
    if retriever == "LDiffRec" and config.retriever_config()["n_cate"] > 1:
        needed.append(("retriever=LDiffRec with n_cate > 1", "kmeans_pytorch", "kmeans-pytorch"))
    if config.model_class.needs:
        needed.append((f"model={config.model}", *config.model_class.needs))
    for what, module, package in needed:
        if importlib.util.find_spec(module) is None:
            wish = f"dnr_recbole[{module}]" if module in _TRACKER_PACKAGES.values() else package
            raise ConfigError(f"{what} needs the package {package}, which is not installed: pip install '{wish}'")


def plain(value: Any) -> Any:
    """`value` made of None, bool, int, float, str, list and dict only, as JSON and `torch.load` need."""
    if value is None or isinstance(value, (bool, int, float, str)):
        # Subclasses such as numpy.float64 or a str-Enum would need their class when loaded.
        for kind in (bool, int, float, str):
            if isinstance(value, kind) and not isinstance(value, Enum):
                return kind(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist())
    return None if value is None else str(value)


def _require_recbole() -> None:
    """Above Python 3.11 no installer can fetch recbole 1.2.1 by its metadata, which asks for ray<=2.6.3."""
    if importlib.util.find_spec("recbole") is None:
        raise ImportError("recbole is not installed: pip install --no-deps recbole==1.2.1")


def require(module: str, purpose: str, remedy: str) -> None:
    """Refuse in one line what needs an optional package that cannot be imported.

    Raises:
        ConfigError: `module` is not installed, or not for this Python.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {module} ({error}): {remedy}") from error


def _refuse_pandas_3() -> None:
    """RecBole fills missing values by `frame[column].fillna(inplace=True)`, a silent no-op since pandas 3."""
    version = importlib.metadata.version("pandas")
    if int(version.split(".")[0]) >= 3:
        raise ImportError(f"pandas {version} silently breaks recbole 1.2.1: pip install 'pandas<3'")


def _restore_numpy_aliases() -> None:
    """RecBole sets some itself, but only once a Config was built, and from names that numpy 2 lacks."""
    import numpy as np

    for alias, target in _NUMPY_ALIASES.items():
        if alias not in vars(np):  # hasattr would trigger numpy's deprecation warnings
            setattr(np, alias, getattr(np, target))


def _restore_dok_update() -> None:
    """LightGCN, NGCF, NCL, GCMC, SpectralCF call the private `dok_matrix._update`, gone since scipy 1.13."""
    from scipy.sparse import dok_matrix

    # Before 1.13 dok_matrix was itself a dict; hasattr keeps whatever a version brings.
    if not hasattr(dok_matrix, "_update"):

        def _update(self, data):
            self._dict.update(data)

        dok_matrix._update = _update


def _make_checkpoints_loadable() -> None:
    """Since torch 2.6 `torch.load` refuses pickled classes, so RecBole cannot read back its own checkpoints.

    Its `_save_checkpoint` stores the Config object and a numpy score with pickle protocol 4; the same content
    as plain values with torch's default protocol is readable by every version. Models without gradients, such
    as EASE, also keep numpy arrays and scipy matrices in the checkpoint: their few classes are allowed.
    """
    import torch
    from recbole.trainer import Trainer

    if _is_marked(Trainer._save_checkpoint):
        return

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        if not self.config["single_spec"] and self.config["local_rank"] != 0:
            return
        path = kwargs.pop("saved_model_file", self.saved_model_file)
        state = {
            "config": plain(self.config.final_config_dict),
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "state_dict": self.model.state_dict(),
            "other_parameter": self.model.other_parameter(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, path)
        if verbose:
            self.logger.info(f"Saving current: {path}")

    _mark(_save_checkpoint)
    Trainer._save_checkpoint = _save_checkpoint

    if hasattr(torch.serialization, "add_safe_globals"):  # torch >= 2.4
        torch.serialization.add_safe_globals(_array_classes())


def _array_classes() -> list:
    """What a pickled numpy array or scipy matrix refers to; none of it can run code of the file's choice."""
    import numpy as np
    import scipy.sparse as sp

    # The rebuilding functions moved between numpy versions; their pickles name them.
    rebuild = [np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    dtypes = {type(np.dtype(kind)) for kind in ("?", "i1", "i4", "i8", "u1", "f4", "f8", "O")}
    sparse = [sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, sp.lil_matrix]
    return [*rebuild, np.ndarray, np.matrix, np.dtype, *dtypes, *sparse]


def _download_without_process_group() -> None:
    """After a download RecBole calls `torch.distributed.barrier()` even in a single process, which fails."""
    import torch.distributed
    from recbole.data.dataset import Dataset

    original = Dataset._download
    if _is_marked(original):
        return

    @functools.wraps(original)
    def _download(self):
        try:
            original(self)
        except (ValueError, RuntimeError):
            complete = os.path.isfile(os.path.join(self.dataset_path, f"{self.dataset_name}.inter"))
            if not complete or (torch.distributed.is_available() and torch.distributed.is_initialized()):
                raise

    _mark(_download)
    Dataset._download = _download


def _name_the_logger() -> None:
    """RecBole logs on the root logger, so nobody can configure its messages without configuring everybody's.

    Its modules get the logger "recbole", from which records still reach the root's handlers.
    """
    import recbole.data
    import recbole.trainer  # noqa: F401

    def get_logger(name: str = "recbole") -> logging.Logger:
        return logging.getLogger(name)

    for name, module in list(sys.modules.items()):
        if name.startswith("recbole.") and getattr(module, "getLogger", None) is logging.getLogger:
            vars(module)["getLogger"] = get_logger


def _open_tensorboard_late() -> None:
    """RecBole's trainers open ./log_tensorboard in their constructor, before a subclass can say where to write.

    The writer is opened when the first value arrives; until then a subclass may put another in its place.
    """
    from recbole.trainer import trainer

    original = trainer.get_tensorboard
    if _is_marked(original):
        return

    def get_tensorboard(logger):
        # The folder is called after the log file of the root logger, as before the logger had a name.
        return LateWriter(lambda: original(logging.getLogger()))

    _mark(get_tensorboard)
    trainer.get_tensorboard = get_tensorboard


def _begin_wandb_runs_late() -> None:
    """RecBole's trainers begin a W&B run in their constructor, in every process, in ./wandb, and never end it.

    The next training would go on in it. With a config of this package they begin none; this package's trainers put
    :class:`~dnr_recbole.trackers.Trackers` in its place.
    """
    from recbole.trainer import trainer
    from recbole.utils import WandbLogger

    class Silent(WandbLogger):
        def setup(self):
            self.log_wandb = False

    original = trainer.WandbLogger
    if _is_marked(original):
        return

    def wandb_logger(config):
        return Silent(config) if hasattr(config, "is_retriever") else original(config)

    _mark(wandb_logger)
    trainer.WandbLogger = wandb_logger


class LateWriter:
    """A TensorBoard SummaryWriter that is opened by its first use."""

    def __init__(self, open_writer: Callable[[], Any]):
        self._open_writer = open_writer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for hooks
            raise AttributeError(name)
        self._writer = self.__dict__.get("_writer") or self._open_writer()
        return getattr(self._writer, name)

    def close(self) -> None:
        """Close what was opened."""
        if "_writer" in self.__dict__:
            self._writer.close()


def _keep_tensorboard_threads_quiet() -> None:
    """On a full disk TensorBoard's thread prints a traceback, although the next call raises the error anyway."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    original = _AsyncWriterThread.run
    if _is_marked(original):
        return

    def run(self):
        with contextlib.suppress(OSError):
            original(self)

    _mark(run)
    _AsyncWriterThread.run = run


def _mark(function: Callable[..., Any]) -> None:
    """Say that a function stands in the place of RecBole's, so that it is not replaced again."""
    vars(function)["_dnr_patch"] = True


def _is_marked(function: Any) -> bool:
    return getattr(function, "_dnr_patch", False)


apply()
