"""The lines of a results file: JSON, one per finished run, appended whole by any number of processes."""

from __future__ import annotations

import json
import os
from logging import getLogger
from typing import Any, Dict, List, Optional

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from dnr_recbole.errors import ConfigError
from dnr_recbole.locks import hold

Line = Dict[str, Any]


class _Row(BaseModel):
    """What a line must have to be used."""

    model_config = ConfigDict(extra="allow", strict=True)

    setting: str
    row: str
    seed: int
    searched: Dict[str, Any]
    identity: Optional[str] = None
    keys: Optional[Dict[str, Any]] = None


class _Finished(_Row):
    best_valid_score: FiniteFloat
    test: Dict[str, float]
    probes: Dict[str, Dict[str, float]]
    seconds_per_epoch: Optional[float] = None
    ms_per_request: float


class _Failed(_Row):
    error: str


def read_rows(path: str) -> List[Line]:
    """Lines of a results file; none if it does not exist. What is no result is named in a warning and left out.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not os.path.exists(path):
        return []
    rows, bad = [], []
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            for number, text in enumerate(f, 1):
                if not text.strip():
                    continue
                line = _parse(text)
                if line is None:
                    bad.append(number)
                else:
                    rows.append(line)
    except OSError as error:
        raise ConfigError(f"results {path} cannot be read: {error.strerror}") from None
    if bad:
        shown = ", ".join(map(str, bad[:10])) + ", …" * (len(bad) > 10)
        getLogger(__name__).warning(f"{path}: {len(bad)} lines are no results and are left out: {shown}")
    return rows


def append(path: str, line: Line) -> None:
    """Add a line, whole.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with hold(lock_path(path), wait=True, waiting_for=path), open(path, "a+b") as f:
            if f.tell() > 0:
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":  # keep a half-written line of a killed process apart
                    f.write(b"\n")
            f.write(json.dumps(line).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise ConfigError(f"results {path} cannot be written: {error.strerror}") from None


def lock_path(path: str, name: str = "file") -> str:
    """A lock that belongs to a results file."""
    folder, base = os.path.split(os.path.abspath(path))
    return os.path.join(folder, f".{base}.locks", f"{name}.lock")


def _parse(text: str) -> Optional[Line]:
    try:
        line = json.loads(text)
        kind = _Failed if isinstance(line, dict) and "error" in line else _Finished
        kind.model_validate(line)
    except (ValueError, ValidationError, RecursionError):
        return None
    return line
