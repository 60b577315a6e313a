"""Checkpoints: tensors and JSON in one file, written whole or not at all, loaded with ``weights_only=True``.

A file carries a checksum over its content, so that damage is noticed wherever it is; the version that wrote it; and,
for runs, the digest of the data it was trained on and the name of the training that wrote it. The best model of a
training and the full state of its last epoch are two files that name the same training.
"""

from __future__ import annotations

import json
import math
import os
import random
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from dnr_recbole._version import __version__
from dnr_recbole.config_schema import Definitions
from dnr_recbole.config_sources import define_for_all, define_model
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.errors import CheckpointError, ConfigError, DnrError
from dnr_recbole.files import atomic_write
from dnr_recbole.identity import content_digest
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.registry import get_reranker

FORMAT = 2
_READABLE = (1, FORMAT)  # 1 had no checksum, no data digest and no name of its training


class Meta(BaseModel):
    """What a checkpoint says about itself.

    Attributes:
        model: class name of the reranker.
        config: every key of the run.
        catalogue: :meth:`~dnr_recbole.data.catalogue.Catalogue.shapes` of the data.
        written_by: version of this package; None before versions were stored.
        training: random name of the training that wrote the file; its best and last file share it.
        run: model, dataset and digest of the keys of the run, without its number of epochs.
        data: digest of the data that were trained on.
        phase, best_phase: the part of the training that the last epoch, and the best one, belong to.
        epoch, best_epoch, cur_step, best_valid_score, best_valid_result, epoch_seconds, history: as in the trainer.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    config: Dict[str, Any]
    catalogue: Dict[str, Any]
    written_by: Optional[str] = None
    training: Optional[str] = None
    run: Optional[str] = None
    data: Optional[str] = None
    epoch: NonNegativeInt = 0
    best_epoch: Optional[NonNegativeInt] = None
    phase: str = ""
    best_phase: str = ""
    cur_step: int = 0
    best_valid_score: float = -math.inf
    best_valid_result: Dict[str, float] = {}
    epoch_seconds: List[float] = []
    history: List[Dict[str, Union[int, float]]] = []


class SavedConfig:
    """The config stored in a checkpoint, read as ``config["key"]``.

    A key that is younger than the checkpoint has the value that its definition declares for earlier versions.

    Raises:
        ConfigError: nobody defines such a key.
    """

    def __init__(self, model: type, stored: Dict[str, Any]):
        definitions = Definitions()
        define_for_all(definitions, str(stored.get("dataset")))
        define_model(definitions, model, stored.get("backbone"))
        self.model, self.values = model, dict(stored)
        for name, key in definitions.keys.items():
            if name in stored or key.origin != "user":
                continue
            former = next((old for old in key.was if old in stored), None)
            earlier = "earlier" in key.model_fields_set
            self.values[name] = stored[former] if former else key.earlier if earlier else definitions.defaults.get(name)

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise ConfigError(f"key '{name}' is read, but no property file of {self.model.__name__} defines it")
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def as_dict(self) -> Dict[str, Any]:
        """All keys."""
        return dict(self.values)


def save(path: str, meta: Dict[str, Any], **tensors: Any) -> None:
    """Write a checkpoint under a temporary name and rename it.

    Args:
        path: the file.
        meta: the fields of :class:`Meta`.
        tensors: nested dicts and lists of tensors and plain numbers.

    Raises:
        CheckpointError: the file cannot be written, e.g. on a full disk; an older file of that name stays intact.
    """
    content = {"format": FORMAT, "meta": json.dumps({"written_by": __version__, **meta}), **tensors}
    try:
        with atomic_write(path) as file:
            torch.save({**content, "checksum": content_digest(content)}, file)
    except (OSError, RuntimeError) as error:  # torch reports failed writes as RuntimeError
        why = getattr(error, "strerror", None) or "the disk is full or failing"
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {why}; free some disk space or set checkpoint_dir"
        ) from error


def load(path: str, device="cpu") -> Dict[str, Any]:
    """Read a checkpoint; ``meta`` is a :class:`Meta`.

    Raises:
        CheckpointError: no such file, a damaged one, or one that this package did not write.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        version = content["format"]
        if version in _READABLE and version > 1 and content.pop("checksum") != content_digest(content):
            raise ValueError("its content does not match its checksum")
        content["meta"] = Meta.model_validate(json.loads(content["meta"])) if version in _READABLE else None
    except Exception as error:  # torch raises many types on damaged files
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of dnr_recbole ({_reason(error)}); delete it and train again"
        ) from error
    if content["meta"] is None:
        known = " and ".join(map(str, _READABLE))
        raise CheckpointError(f"{path} has checkpoint format {version}, this version reads {known}")
    return content


def load_state(model: AbstractReranker, content: Dict[str, Any], path: str) -> None:
    """Put a checkpoint's weights into ``model``.

    Raises:
        CheckpointError: the weights are of another model, or of the same with other sizes.
    """
    name = content["meta"].model
    if name != type(model).__name__:
        raise CheckpointError(f"{path} holds a {name}, not a {type(model).__name__}")
    try:
        model.load_state_dict(content["state_dict"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        detail = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or _reason(error)
        raise CheckpointError(f"{path} does not fit this {name}: {detail}") from error


def load_reranker(path: str, device="cpu") -> Tuple[AbstractReranker, SavedConfig]:
    """Rebuild a trained reranker from its checkpoint alone, in eval mode.

    Raises:
        CheckpointError: it is missing, damaged, or describes no model that can be built.
    """
    content = load(path, device)
    meta: Meta = content["meta"]
    cls = get_reranker(meta.model)
    try:
        config = SavedConfig(cls, meta.config)
        model = cls(config, Catalogue.blank(meta.catalogue))
    except DnrError:
        raise
    except Exception as error:  # whatever a constructor makes of sizes and names that make no sense
        raise CheckpointError(f"{path} describes no {meta.model} that can be built: {_reason(error)}") from error
    load_state(model, content, path)
    return model.to(device).eval(), config


def rng_state() -> Dict[str, Any]:
    """State of every random generator that training draws from."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(keys.astype(np.int64)),
        "other": json.dumps({"numpy": [name, position, has_gauss, cached], "python": random.getstate()}),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Dict[str, Any]) -> None:
    """Undo of :func:`rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    other = json.loads(state["other"])
    name, position, has_gauss, cached = other["numpy"]
    np.random.set_state((name, state["numpy_keys"].cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = other["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
