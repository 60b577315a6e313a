"""Checkpoints: tensors and JSON in one file, written whole or not at all, loaded with ``weights_only=True``."""

from __future__ import annotations

import json
import os
import random
from typing import Any, Dict, Tuple

import numpy as np
import torch

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.errors import CheckpointError
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.registry import get_reranker

FORMAT = 1


class SavedConfig(dict):
    """The config stored in a checkpoint, read as ``config["key"]``; absent keys are None as in RecBole."""

    def __missing__(self, key):
        return None


def save(path: str, meta: Dict[str, Any], **tensors: Any) -> None:
    """Write a checkpoint under a temporary name and rename it.

    Args:
        path: the file.
        meta: JSON-able description.
        tensors: nested dicts and lists of tensors and plain numbers.

    Raises:
        CheckpointError: the file cannot be written, e.g. on a full disk; an older file of that name stays intact.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save({"format": FORMAT, "meta": json.dumps(meta), **tensors}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports failed writes as RuntimeError
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error}; free some disk space or set checkpoint_dir"
        ) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path: str, device="cpu") -> Dict[str, Any]:
    """Read a checkpoint; ``meta`` is decoded.

    Raises:
        CheckpointError: no such file, a damaged one, or one that this package did not write.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        content["meta"] = json.loads(content["meta"])
        known = content["format"] == FORMAT
    except Exception as error:  # torch raises many types on damaged files
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of dnr_recbole ({reason}); delete it and train again"
        ) from error
    if not known:
        raise CheckpointError(f"{path} has checkpoint format {content['format']}, this version reads {FORMAT}")
    return content


def load_state(model: AbstractReranker, content: Dict[str, Any], path: str) -> None:
    """Put a checkpoint's weights into ``model``.

    Raises:
        CheckpointError: the weights are of another model, or of the same with other sizes.
    """
    name = content["meta"]["model"]
    if name != type(model).__name__:
        raise CheckpointError(f"{path} holds a {name}, not a {type(model).__name__}")
    try:
        model.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        detail = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(f"{path} does not fit this {name}: {detail}") from error


def load_reranker(path: str, device="cpu") -> Tuple[AbstractReranker, SavedConfig]:
    """Rebuild a trained reranker from its checkpoint alone, in eval mode."""
    content = load(path, device)
    meta = content["meta"]
    config = SavedConfig(meta["config"])
    model = get_reranker(meta["model"])(config, Catalogue.blank(meta["catalogue"]))
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
