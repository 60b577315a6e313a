"""A trained reranker as a directory: all that ranking needs, tensors and texts only, no pickle.

================================  ==========================================================================
``config.json``                   the model's name, every key, the shapes of its tables, versions, checksums
``model.safetensors``             weights, item spaces, popularity and features of known ids
``model.<part>.txt``              what a model keeps as text: LightGBM's trees
``preprocessor.json``             scores and their calibration, encoders of features, list and history lengths
``vocabulary.parquet``            ids of users and items
``histories.safetensors``         the newest items of each known user (can be left out: personal data)
``sample.parquet``                some held-out requests in the canonical form (can be left out: personal data)
``retrieved.safetensors``         what the retriever gives each user now (where there is a retriever)
``metrics.json``                  test metrics, probes, baselines, command, commit, versions, seed
``README.md``                     a model card made from these
================================  ==========================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dnr_recbole._version import __version__
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import CheckpointError, DnrError
from dnr_recbole.files import temporary_name
from dnr_recbole.identity import file_digest
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.growth import grown
from dnr_recbole.registry import get_reranker, missing_package
from dnr_recbole.requestlog.preprocessor import Histories, Preprocessor
from dnr_recbole.retriever.lists import RetrievedLists
from dnr_recbole.trainer.checkpoint import SavedConfig, load_reranker

FORMAT = 1
_OPTIONAL = ("histories.safetensors", "sample.parquet", "retrieved.safetensors", "README.md", "metrics.json")
_READ_BY_PEOPLE = ("README.md",)
_READ = re.compile(r".*\.(safetensors|parquet|json)|model\..*\.txt")  # what a reader here may open
_LONGEST = 1_000_000  # lists that anybody means
_METRICS = ("test", "probes", "baselines", "best_valid", "statistics", "retriever", "command", "git_commit", "versions",
            "seed", "identity", "data", "files", "dataset", "seconds", "epochs")  # fmt: skip


class Content(BaseModel):
    """``config.json``."""

    model_config = ConfigDict(extra="allow")

    format: int
    written_by: str
    model: str
    config: Dict[str, Any]
    catalogue: Dict[str, Any]
    sha256: Dict[str, str]


@dataclass
class Artefact:
    """A model ready to rank, and what belongs to it.

    Attributes:
        model: in eval mode.
        config: its keys.
        catalogue: shapes of its tables.
        preprocessor: turns requests into slates.
        metrics: what was measured when it was trained.
        sample: held-out requests in the canonical long form, or None.
        retrieved: candidates of each user, or None.
        scorer: ranks in the place of the model, slate → scores float32 ``[R, n]``; None = the model itself.
    """

    model: AbstractReranker
    config: SavedConfig
    catalogue: Dict[str, Any]
    preprocessor: Preprocessor
    metrics: Dict[str, Any] = field(default_factory=dict)
    sample: Optional[pd.DataFrame] = None
    retrieved: Optional[RetrievedLists] = None
    scorer: Optional[Callable[[Slate], np.ndarray]] = None

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.model.state_dict().values())).device


def artefact_of_run(row: Dict[str, Any], prepared, device="cpu") -> Artefact:
    """The artefact of a finished run.

    Args:
        row: its result row; names the checkpoint.
        prepared: :class:`~dnr_recbole.sources.Prepared` data of the run.

    Raises:
        DnrError: the source's requests cannot be described to others, as those of a generated world.
    """
    if prepared.preprocessor is None:
        raise DnrError("a generated world has no ids of its own: nothing could be ranked with an artefact of it")
    model, config = load_reranker(row["checkpoint"], device)
    catalogue = prepared.data.catalogue.shapes()
    n_users, n_items = len(prepared.preprocessor.users), len(prepared.preprocessor.items)
    if (n_users, n_items) != (catalogue["n_users"], catalogue["n_items"]):  # RecBole has no row for unknown ids
        model, catalogue = grown(model, config, catalogue, n_users, n_items)
    return Artefact(
        model=model,
        config=config,
        catalogue=catalogue,
        preprocessor=prepared.preprocessor,
        metrics={**{name: row[name] for name in _METRICS if name in row}, "notes": prepared.notes},
        sample=None if prepared.sample is None else prepared.sample(),
        retrieved=None if prepared.retrieved is None else prepared.retrieved(),
    )


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


def load_artefact(path: str, device="cpu") -> Artefact:
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


def _loaded(folder: Path, content: Content, device) -> Artefact:
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


def model_card(artefact: Artefact) -> str:
    """README.md of an artefact."""
    metrics, config = artefact.metrics, artefact.config
    name = type(artefact.model).__name__
    backbone = f" around {config['backbone']}" if getattr(type(artefact.model), "wraps_backbone", False) else ""
    lines = [
        f"# {name}{backbone}",
        "",
        f"A reranker of dnr_recbole {__version__}, trained on `{metrics.get('dataset', '?')}`: "
        f"{len(artefact.preprocessor.items.ids):,} items, {len(artefact.preprocessor.users.ids):,} users; scores read: "
        f"{', '.join(artefact.preprocessor.columns.scores)}; lists of up to {artefact.preprocessor.n_candidates}.",
        "",
        "```python",
        "from dnr_recbole import Reranker",
        "",
        'top = Reranker.load("this/folder").rank(requests, k=6)   # a DataFrame: request_id, user_id, item_id, score',
        "```",
        "",
    ]
    test: Dict[str, float] = metrics.get("test") or {}
    if test:
        rows = {name: test, **(metrics.get("baselines") or {}), **(metrics.get("probes") or {})}
        shown = [m for m in test if not m.endswith("@1")][:8]
        lines += ["| test | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
        for row, values in rows.items():
            lines.append(f"| {row} | " + " | ".join(f"{values[m]:.4f}" if m in values else "–" for m in shown) + " |")
        lines.append("")
    for key in ("command", "git_commit", "seed"):
        if metrics.get(key) is not None:
            lines.append(f"- {key}: `{metrics[key]}`")
    lines.append("- `histories.safetensors`, `sample.parquet` and the users in `vocabulary.parquet` are personal data")
    return "\n".join(lines) + "\n"


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


def _tensors(path: Path, tensors: Dict[str, Tensor]) -> None:
    path.write_bytes(_stored(tensors))


def _stored(tensors: Dict[str, Tensor]) -> bytes:
    # Tables that a model shares under two names are written once for each: the format knows no sharing.
    return save({name: value.contiguous().clone() for name, value in tensors.items()})


def _read_tensors(path: Path) -> Dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is missing or damaged: {error}") from error


def _json(path: Path, content: Dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is missing or damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is damaged: it holds no mapping")
    return content
