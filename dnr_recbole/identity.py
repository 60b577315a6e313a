"""What determines a stored thing: its keys by scope, the files it was made from, and the code that made it.

A retriever, a candidate table, a checkpoint and a result row are each the outcome of a stage. The identity of a stage
holds, for it and every stage before it,

* the keys of its scope (see :data:`dnr_recbole.config_schema.STAGES`),
* the digests of the files that are read for it,
* the version of this package's code for it, and the digests of the user's own models.

So equal identities mean equal numbers, wherever the files lie and however often the code was rearranged since.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch

from dnr_recbole import registry
from dnr_recbole.compat import plain
from dnr_recbole.config import Config
from dnr_recbole.config_schema import STAGES, recbole_keys
from dnr_recbole.names import foreign, is_foreign, module_of

# Raised by hand when the results of a stage change; tests/test_golden.py notices if that is forgotten. The commit is
# recorded in results, but is no part of the identity.
CODE_VERSIONS = {
    "source": 1,
    "retriever": 1,
    "candidates": 1,
    "reranker": 2,
    "training": 1,
    "evaluation": 1,
}

# The same of what stands behind one value of a key, so that runs with other values keep their identity.
VALUE_VERSIONS = {
    ("calibration", "isotonic"): 2,
    ("score_calibration", "isotonic"): 2,
}

FileDigests = Dict[str, Dict[str, str]]  # stage → file name → sha256


def identity(config: Config, stage: str, files: Optional[FileDigests] = None) -> Dict[str, Any]:
    """The identity of the outcome of ``stage``, in clear: of each stage up to it version, keys, files, code, values."""
    parts = STAGES[: STAGES.index(stage) + 1]
    return {part: _part(config, part, (files or {}).get(part, {})) for part in parts}


def digest(content: Any, length: int = 24) -> str:
    """Hex digits over any JSON-able content; the order of mappings does not matter."""
    text = json.dumps(plain(content), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:length]


def retriever_keys(config: Config) -> Dict[str, Any]:
    """The keys that determine how stage 1 is fitted, whichever way they were given.

    Training and evaluation mean the retriever's own there, since it stops early by its own metrics.
    """
    stage1 = config.retriever_config()
    theirs = {name for name in recbole_keys() if stage1.schema[name].scope in ("retriever", "training", "evaluation")}
    ours = set(config.of_scope("retriever")) - {"retriever_args"}  # spread over the others
    return {name: value for name, value in stage1.as_dict().items() if name in theirs | ours | stage1.own_keys}


def file_digest(path: Union[str, Path]) -> str:
    """sha256 of a file, streamed."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            found.update(block)
    return found.hexdigest()


def content_digest(content: Any) -> str:
    """sha256 over nested dicts and lists of tensors, numbers and texts, whatever file format they are in."""
    found = hashlib.sha256()
    _feed(found, content)
    return found.hexdigest()


def _part(config: Config, part: str, files: Dict[str, str]) -> Dict[str, Any]:
    keys = retriever_keys(config) if part == "retriever" else config.of_scope(part)
    classes = []
    if part == "retriever":
        classes = [registry.get_retriever(config["retriever"])]
    elif part == "reranker":
        classes = [config.model_class]
        if config.model_class.wraps_backbone:
            classes.append(registry.get_reranker(config["backbone"]))
        else:
            keys.pop("backbone", None)
    keys = {name: value for name, value in keys.items() if not _neutral(config, name, value)}
    out: Dict[str, Any] = {"version": CODE_VERSIONS[part], "keys": keys}
    values = {f"{key}={value}": raised for (key, value), raised in VALUE_VERSIONS.items() if keys.get(key) == value}
    code = {cls.__name__: _source_digest(cls) for cls in classes if is_foreign(cls)}
    code.update(foreign_code(keys))
    for name, content in (("files", files), ("code", code), ("values", values)):
        if content:
            out[name] = content
    return out


def _neutral(config: Config, name: str, value: Any) -> bool:
    key = config.definition(name)
    return key is not None and value in key.neutral


def foreign_code(keys: Dict[str, Any]) -> Dict[str, str]:
    """What the values of some keys name of the user's own, and the digest of the file that defines it."""
    return {
        f"{key}={name}": _source_digest(thing)
        for key, value in sorted(keys.items())
        for name, thing in foreign(key, value).items()
    }


def _source_digest(thing: Any) -> str:
    """sha256 of the module that defines a class or a function: its helpers count, too."""
    try:
        return file_digest(Path(inspect.getfile(inspect.unwrap(thing))))
    except (OSError, TypeError):  # defined at a prompt
        return f"{module_of(thing)}.{thing.__qualname__}"


def _feed(found: Any, content: Any) -> None:
    """Every value with its type and, of containers, its size: no two contents feed the same bytes."""
    if isinstance(content, torch.Tensor):
        data = content.detach().cpu().contiguous()
        found.update(f"T{data.dtype}{tuple(data.shape)}".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(content, dict):
        found.update(f"D{len(content)}".encode())
        for key in sorted(content, key=str):
            _feed(found, key)
            _feed(found, content[key])
    elif isinstance(content, (list, tuple)):
        found.update(f"L{len(content)}".encode())
        for value in content:
            _feed(found, value)
    else:
        text = repr(content)
        found.update(f"{type(content).__name__}{len(text)}:{text}".encode())
