"""A directory into an artefact: files are checked before anything parses them, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Dict, Union

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dnr_recbole._version import __version__
from dnr_recbole.artefact.contents import FORMAT, Artefact, Content
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.errors import CheckpointError, DnrError
from dnr_recbole.identity import file_digest
from dnr_recbole.registry import get_reranker, missing_package
from dnr_recbole.requestlog.preprocessor import Histories, Preprocessor
from dnr_recbole.retriever.lists import RetrievedLists
from dnr_recbole.trainer.checkpoint import SavedConfig

_OPTIONAL = ("histories.safetensors", "sample.parquet", "retrieved.safetensors", "README.md", "metrics.json")
_READ_BY_PEOPLE = ("README.md",)
_READ = re.compile(r".*\.(safetensors|parquet|json)|model\..*\.txt")  # what a reader here may open
_LONGEST = 1_000_000  # lists that anybody means


def artefact_folder(path: str) -> Path:
    """The folder of an artefact.

    Raises:
        CheckpointError: it is none.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        hint = "it has no config.json" if not folder.is_file() else (
            "it is a file; of a checkpoint, run again with --artefact_dir, or use trainer.checkpoint.load_reranker"
        )  # fmt: skip
        raise CheckpointError(f"no artefact at '{path}': {hint}")
    return folder


def artefact_digest(path: str) -> str:
    """sha256 of what says the sha256 of everything in an artefact.

    Raises:
        CheckpointError: there is no artefact.
    """
    return file_digest(artefact_folder(path) / "config.json")


def load_artefact(path: str, device: Union[str, torch.device] = "cpu") -> Artefact:
    """Read an artefact; nothing in it is executed.

    Raises:
        CheckpointError: it is missing or damaged, another format, or describes no model that can be built here.
    """
    folder = artefact_folder(path)
    raw = _read_json(folder / "config.json")
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"'{path}' has artefact format {raw.get('format')} (written by version {raw.get('written_by')}), this "
            f"version {__version__} reads {FORMAT}"
        )
    try:
        content = Content.model_validate(raw)
        _check_files(folder, content.sha256)
        return _loaded(folder, content, device)
    except DnrError:
        raise
    except Exception as error:  # whatever damaged files make constructors and readers raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise CheckpointError(f"'{path}' is damaged: {reason}") from error


def _loaded(folder: Path, content: Content, device: Union[str, torch.device]) -> Artefact:
    """The artefact of a folder whose files are what was written; any exception = they fit neither it nor each other."""
    cls = get_reranker(content.model)
    if missing_package(cls):
        raise CheckpointError(f"'{folder}' holds a {content.model}{missing_package(cls)}")
    config = SavedConfig(cls, content.config)
    preprocessor = _preprocessor(folder, content)  # before anything of the sizes that are claimed is made
    model = cls(config, Catalogue.blank(content.catalogue))
    state = _read_tensors(folder / "model.safetensors")
    for name in model.text_parts:
        text = (folder / f"model.{name}.txt").read_bytes()
        state[name] = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
        )
    model.load_state_dict(state)
    has = {name: folder / name for name in _OPTIONAL if (folder / name).is_file()}
    return Artefact(
        model.to(device).eval(), config, content.catalogue, preprocessor,
        _read_json(has["metrics.json"]) if "metrics.json" in has else {},
        pd.read_parquet(has["sample.parquet"]) if "sample.parquet" in has else None,
        RetrievedLists(**_read_tensors(has["retrieved.safetensors"])) if "retrieved.safetensors" in has else None,
    )  # fmt: skip


def _preprocessor(folder: Path, content: Content) -> Preprocessor:
    ids = pd.read_parquet(folder / "vocabulary.parquet")
    users, items = (ids["id"][ids["side"] == side].tolist() for side in ("user", "item"))
    histories = None
    if (folder / "histories.safetensors").is_file():
        histories = _histories(_read_tensors(folder / "histories.safetensors"), len(items) + 2)
    out = Preprocessor.from_dict(_read_json(folder / "preprocessor.json"), users, items, histories)
    if (len(out.users), len(out.items)) != (content.catalogue["n_users"], content.catalogue["n_items"]):
        raise ValueError("the vocabulary does not fit the model")
    sizes = {
        "n_candidates": (out.n_candidates, 1, _LONGEST), "history_length": (out.history_length, 1, _LONGEST),
        "trained_users": (out.users.trained, 0, len(users)), "trained_items": (out.items.trained, 0, len(items)),
    }  # fmt: skip
    for name, (size, least, most) in sizes.items():
        if type(size) is not int or not least <= size <= most:
            raise ValueError(f"{name} of the preprocessor is {size!r}")
    return out


def _check_files(folder: Path, expected: Dict[str, str]) -> None:
    """Before anything is parsed: other libraries may end the whole process over a damaged text.

    Raises:
        CheckpointError: a file is missing, but for those that may be left out, is not what was written, or has no
            checksum.
    """
    for name, digest in expected.items():
        path = folder / name
        if os.path.basename(name) != name:
            raise CheckpointError(f"'{folder}' is damaged: config.json names '{name[:100]}', which is no file in it")
        if not path.is_file():
            if name in _OPTIONAL:
                continue
            raise CheckpointError(f"'{path}' is missing")
        if name not in _READ_BY_PEOPLE and file_digest(path) != digest:
            raise CheckpointError(f"'{path}' is damaged: its content does not match its checksum")
    for path in folder.iterdir():
        if path.name not in expected and path.name != "config.json" and _READ.fullmatch(path.name):
            raise CheckpointError(f"'{path}' is damaged: config.json has no checksum for it")


def _histories(tensors: Dict[str, Tensor], n_items: int) -> Histories:
    ptr, items = tensors["ptr"].numpy(), tensors["items"].numpy()
    fits = ptr.ndim == 1 and len(ptr) and ptr[0] == 0 and ptr[-1] == len(items) and (np.diff(ptr) >= 0).all()
    if not fits or (len(items) and not (0 <= items.min() and items.max() < n_items)):
        raise ValueError("the stored histories do not fit the vocabulary")
    return Histories(ptr, items)


def _read_tensors(path: Path) -> Dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is missing or damaged: {error}") from error


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is missing or damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is damaged: it holds no mapping")
    return content
