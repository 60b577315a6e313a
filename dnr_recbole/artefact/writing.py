"""An artefact into a directory, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor

from dnr_recbole._version import __version__
from dnr_recbole.artefact.card import model_card
from dnr_recbole.artefact.contents import FORMAT, Artefact
from dnr_recbole.errors import CheckpointError
from dnr_recbole.files import temporary_name
from dnr_recbole.identity import file_digest
from dnr_recbole.model.abstract_reranker import AbstractReranker


def save_artefact(path: str, artefact: Artefact, with_users: bool = True) -> None:
    """Write an artefact under a temporary name and rename it; one that stands there is replaced.

    Args:
        path: the directory.
        with_users: whether histories and the held-out sample, which are personal data, are kept.

    Raises:
        CheckpointError: it cannot be written, or something else stands there.
    """
    target = Path(path)
    if target.exists() and not (target / "config.json").is_file():
        raise CheckpointError(f"'{path}' exists and is no artefact: choose another name")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        making = Path(temporary_name(str(target.absolute())))
        making.mkdir()
        try:
            _write(making, artefact, with_users)
            old = None
            if target.exists():
                old = Path(temporary_name(str(target.absolute())))
                os.replace(target, old)
            os.replace(making, target)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error.strerror or error}") from error


def weights_digest(model: AbstractReranker) -> str:
    """sha256 of what ``model.safetensors`` holds, as ``config.json`` has it of a saved artefact."""
    state = {name: value for name, value in _state(model).items() if name not in model.text_parts}
    return hashlib.sha256(_stored(state)).hexdigest()


def _state(model: AbstractReranker) -> Dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def _write(folder: Path, artefact: Artefact, with_users: bool) -> None:
    state = _state(artefact.model)
    for name in artefact.model.text_parts:
        (folder / f"model.{name}.txt").write_bytes(bytes(state.pop(name).numpy()))
    _tensors(folder / "model.safetensors", state)
    content = {
        "format": FORMAT, "written_by": __version__, "model": type(artefact.model).__name__,
        "config": artefact.config.as_dict(), "catalogue": artefact.catalogue,
    }  # fmt: skip
    _json(folder / "preprocessor.json", artefact.preprocessor.to_dict())
    sides = {"user": artefact.preprocessor.users.ids.list(), "item": artefact.preprocessor.items.ids.list()}
    side = [name for name, ids in sides.items() for _ in ids]
    pd.DataFrame({"side": side, "id": [text for ids in sides.values() for text in ids]}, dtype="string").to_parquet(
        folder / "vocabulary.parquet"
    )
    histories = artefact.preprocessor.histories
    if with_users and histories is not None:
        tensors = {
            "ptr": torch.from_numpy(histories.ptr.astype(np.int64)),
            "items": torch.from_numpy(np.array(histories.items)),
        }
        _tensors(folder / "histories.safetensors", tensors)
    if with_users and artefact.sample is not None:
        artefact.sample.to_parquet(folder / "sample.parquet")
    if artefact.retrieved is not None:
        _tensors(
            folder / "retrieved.safetensors", {"items": artefact.retrieved.items, "scores": artefact.retrieved.scores}
        )
    _json(folder / "metrics.json", artefact.metrics)
    (folder / "README.md").write_text(model_card(artefact), encoding="utf-8")
    _json(folder / "config.json", {**content, "sha256": {path.name: file_digest(path) for path in folder.iterdir()}})


def _tensors(path: Path, tensors: Dict[str, Tensor]) -> None:
    path.write_bytes(_stored(tensors))


def _stored(tensors: Dict[str, Tensor]) -> bytes:
    # Tables that a model shares under two names are written once for each: the format knows no sharing.
    return save({name: value.contiguous().clone() for name, value in tensors.items()})


def _json(path: Path, content: Dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
