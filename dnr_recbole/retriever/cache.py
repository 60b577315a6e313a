"""A content-addressed store for what stage 1 produces: fitted retrievers and candidate tables.

The key is a plain dict of everything that determines the value; its hash names a directory::

    <root>/<hash>/manifest.json    the key in clear, a checksum, free metadata
    <root>/<hash>/tensors.pt       loadable with weights_only=True

An entry is written to a temporary directory and renamed into place, so a reader never sees half of one. If
it cannot be written (disk full, read-only) the run goes on without it, after a warning: a cache must not cost
a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import uuid
from logging import getLogger
from pathlib import Path
from typing import Dict, Optional, Tuple

import torch

from dnr_recbole.compat import plain
from dnr_recbole.errors import CacheError

FORMAT_VERSION = 1
_HINT = "delete it or run with --use_cache=False"


class Cache:
    """Maps key dicts to dicts of tensors below one directory."""

    def __init__(self, root):
        self.root = Path(root)

    def path(self, key: dict) -> Path:
        """The directory of an entry, whether it exists or not."""
        return self.root / key_hash(key)

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
            checksum, meta = manifest["sha256"], manifest["meta"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"cache file {manifest_file} is not readable ({error!r}); {_HINT}") from error
        try:
            if file_digest(tensor_file) != checksum:
                raise CacheError(f"cache file {tensor_file} does not match its checksum; {_HINT}")
            return torch.load(tensor_file, map_location="cpu", weights_only=True), meta
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise CacheError(f"cache file {tensor_file} is not readable ({error!r}); {_HINT}") from error

    def store(self, key: dict, tensors: Dict[str, torch.Tensor], meta: Optional[dict] = None) -> bool:
        """Write an entry; ``meta`` must be JSON-able. -> whether it is there; failing is only a warning."""
        folder = self.path(key)
        temporary = self.root / f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            temporary.mkdir(parents=True)
            # clone: a view would drag the whole storage it is a part of into the file
            copies = {name: t.detach().cpu().clone() for name, t in tensors.items()}
            torch.save(copies, temporary / "tensors.pt")
            manifest = {
                "format": FORMAT_VERSION,
                "sha256": file_digest(temporary / "tensors.pt"),
                "meta": meta or {},
                "key": plain(key),
            }
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


def key_hash(key: dict) -> str:
    """24 hex digits over the key (in any order) and the format version."""
    text = json.dumps([FORMAT_VERSION, plain(key)], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:24]


def file_digest(path) -> str:
    """sha256 of a file, streamed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def dataset_digest(dataset) -> Dict[str, str]:
    """file name -> sha256 of the atomic files a RecBole dataset was read from."""
    folder, name = Path(dataset.dataset_path), dataset.dataset_name
    files = sorted(p for p in folder.glob(f"{name}.*") if p.is_file())
    return {p.name: file_digest(p) for p in files}
