"""Where the arrays of a log lie: in memory, in files of the process, or in the cache."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Optional, Sequence

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike

from dnr_recbole.errors import CacheError
from dnr_recbole.files import temporary_name
from dnr_recbole.identity import digest


class Store:
    """Arrays in a folder, mapped into memory; without a folder, in memory."""

    def __init__(self, folder: Optional[str]) -> None:
        self.folder = folder

    def make(self, name: str, shape: Sequence[int], kind: DTypeLike) -> np.ndarray:
        """An array of zeros."""
        if self.folder is None:
            return np.zeros(shape, dtype=kind)
        return open_memmap(os.path.join(self.folder, f"{name}.npy"), mode="w+", dtype=kind, shape=tuple(shape))

    def keep(self, **arrays: np.ndarray) -> Dict[str, np.ndarray]:
        """Arrays that are there already."""
        out = {name: self.make(name, values.shape, values.dtype) for name, values in arrays.items()}
        for name, values in arrays.items():
            out[name][...] = values
        return out


def cached(cache_dir: str, key: Dict[str, Any], make: Callable[[str], Iterable[str]]) -> Dict[str, np.ndarray]:
    """The arrays from the cache, mapped into memory; made and put there first if they are not.

    Args:
        cache_dir: where entries of the cache lie.
        key: what the arrays follow from.
        make: writes them as files into a folder, and gives their names.

    Raises:
        CacheError: the entry cannot be read.
    """
    folder = Path(cache_dir) / f"log-{digest(key)}"
    if not (folder / "done.json").is_file():
        making = temporary_name(str(folder))
        os.makedirs(making)
        try:
            names = list(make(making))
            done = json.dumps({"arrays": names, "key": key}, default=str)
            (Path(making) / "done.json").write_text(done, encoding="utf-8")
            try:
                os.replace(making, folder)
            except OSError:  # another process was faster
                if not (folder / "done.json").is_file():
                    raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    else:
        getLogger(__name__).info(f"tensors of the log read from {folder}")
    try:
        names = json.loads((folder / "done.json").read_text(encoding="utf-8"))["arrays"]
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise CacheError(f"{folder} is damaged ({error}): delete it") from error


def scratch() -> str:
    """A folder for the tensors of a large log that no cache keeps; it goes with the process."""
    folder = tempfile.mkdtemp(prefix="dnr_recbole-log-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
