"""What the pieces of ``device.sh`` share: their files, the machine's name, and timing."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from dnr_recbole.registry import get_reranker, list_models

# What is trained by steps; trees are fitted on the CPU.
RERANKERS = [m.name for m in list_models("reranker") if not get_reranker(m.name).fits_itself]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict:
    """What numbers have to be read beside."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def finished(path: Path) -> bool:
    return bool(read(path).get("done"))


def write(path: Path, content: dict, done: bool = False) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**content, "done": done}, indent=1))
    temporary.replace(path)
