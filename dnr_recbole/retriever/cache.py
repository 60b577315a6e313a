"""A content-addressed store for what stage 1 produces: fitted retrievers and candidate tables.

The key is a plain dict of everything that determines the value; its hash names a directory::

    <root>/<hash>/manifest.json    the key in clear, metadata, and checksums of both files
    <root>/<hash>/tensors.pt       loadable with weights_only=True

An entry is written to a temporary directory and renamed into place, so a reader never sees half of one. If
it cannot be written (disk full, read-only) the run goes on without it, after a warning: a cache must not cost
a result.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from logging import getLogger
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

import torch

from dnr_recbole import __version__
from dnr_recbole.compat import plain
from dnr_recbole.errors import CacheError
from dnr_recbole.files import sweep, temporary_name
from dnr_recbole.identity import digest, file_digest
from dnr_recbole.locks import hold

FORMAT_VERSION = 2
_HINT = "delete it or run with --use_cache=False"
_SIGNED = ("format", "tensors", "meta", "key")  # parts of a manifest that its checksum covers


class Cache:
    """Maps key dicts to dicts of tensors below one directory."""

    def __init__(self, root):
        self.root = Path(root)
        sweep(self.root)

    def path(self, key: dict) -> Path:
        """The directory of an entry, whether it exists or not."""
        return self.root / digest([FORMAT_VERSION, key])

    @contextlib.contextmanager
    def making(self, key: dict) -> Iterator[None]:
        """Only one process at a time is in this block for a key; others wait, and then find the entry."""
        folder = self.path(key)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # nothing can be written there: `store` will say so
                lock = str(self.root / f".{folder.name}.lock")
                stack.enter_context(hold(lock, wait=True, waiting_for=str(folder), remove=True))
            yield

    def load(self, key: dict) -> Optional[Dict[str, torch.Tensor]]:
        """-> the tensors as stored, or None if there is no such entry. A damaged entry raises CacheError."""
        entry = self.load_entry(key)
        return None if entry is None else entry[0]

    def load_entry(self, key: dict) -> Optional[Tuple[Dict[str, torch.Tensor], dict]]:
        """Like :meth:`load`, with the metadata: (tensors, meta)."""
        folder = self.path(key)
        if not folder.is_dir():
            return None
        manifest_file, tensor_file = folder / "manifest.json", folder / "tensors.pt"
        try:
            manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
            signed = {part: manifest[part] for part in _SIGNED}
            if manifest["checksum"] != _checksum(signed) or manifest["key"] != plain(key):
                raise CacheError(f"cache file {manifest_file} does not match its checksum; {_HINT}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CacheError(f"cache file {manifest_file} is not readable ({_reason(error)}); {_HINT}") from error
        try:
            if file_digest(tensor_file) != manifest["tensors"]:
                raise CacheError(f"cache file {tensor_file} does not match its checksum; {_HINT}")
            return torch.load(tensor_file, map_location="cpu", weights_only=True), manifest["meta"]
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise CacheError(f"cache file {tensor_file} is not readable ({_reason(error)}); {_HINT}") from error

    def store(self, key: dict, tensors: Dict[str, torch.Tensor], meta: Optional[dict] = None) -> bool:
        """Write an entry; ``meta`` must be JSON-able. -> whether it is there; failing is only a warning."""
        folder = self.path(key)
        temporary = Path(temporary_name(folder))
        try:
            temporary.mkdir(parents=True)
            # clone: a view would drag the whole storage it is a part of into the file
            copies = {name: t.detach().cpu().clone() for name, t in tensors.items()}
            torch.save(copies, temporary / "tensors.pt")
            signed = {
                "format": FORMAT_VERSION,
                "tensors": file_digest(temporary / "tensors.pt"),
                "meta": plain(meta or {}),
                "key": plain(key),
            }
            manifest = {**signed, "checksum": _checksum(signed), "written_by": f"dnr_recbole {__version__}"}
            text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
            (temporary / "manifest.json").write_text(text + "\n", encoding="utf-8")
            if folder.is_dir():  # another process was faster; entries of one key are interchangeable
                return True
            os.replace(temporary, folder)
            return True
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            if folder.is_dir():
                return True
            getLogger(__name__).warning(f"could not write the cache entry {folder} ({error}); going on without it")
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _reason(error: Exception) -> str:
    """In a few words: some of these errors quote the whole file."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:120]


def _checksum(signed: dict) -> str:
    return digest(signed, length=64)
