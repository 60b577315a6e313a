"""Files are written whole or not at all, and what a killed process left half-written goes at the next start.

Whatever is being written stands under a temporary name beside its target that says who writes it::

    .<target>.<host>-<pid>-<start of the process>-<random>.tmp

so that anybody who finds it later can tell whether its writer still lives.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from pathlib import Path
from typing import Any, BinaryIO, Iterator, Optional, Union

from dnr_recbole.errors import DnrError

_TEMPORARY = re.compile(r"\..*\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-(?P<start>[0-9]+)-[0-9a-f]{8}\.tmp")
# Processes of another machine that shares the folder cannot be asked; nothing takes this long to write.
_FOREIGN_AGE = 24 * 3600.0  # seconds

PathLike = Union[str, "os.PathLike[str]"]


def temporary_name(path: PathLike) -> str:
    """A new name beside ``path`` for a file or folder that this process will rename to ``path``."""
    folder, name = os.path.split(os.path.abspath(path))
    own = f"{_host()}-{os.getpid()}-{_start_of(os.getpid()) or 0}-{uuid.uuid4().hex[:8]}"
    return os.path.join(folder, f".{name[:120]}.{own}.tmp")


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends, and vanishes when it raises.

    Missing folders are made. A link is followed, and a device or pipe such as /dev/stdout is written directly.

    Raises:
        OSError: as the system raises it; an older ``path`` then stays as it was.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        with open(path, "wb") as file:  # a folder raises IsADirectoryError here
            yield file
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # gone if it was renamed


def write_json(path: PathLike, content: Any, key: str = "result_file") -> None:
    """Write ``content`` as JSON, whole or not at all; ``key`` names the path in the message.

    Raises:
        DnrError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, default=str)
    try:
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise DnrError(f"cannot write {key} {path}: {error.strerror or error}") from error


def sweep(folder: PathLike) -> int:
    """Remove the temporary files and folders directly in ``folder`` whose writer is dead.

    Returns:
        how many were removed; what cannot be looked at or removed stays, without an error.
    """
    removed = 0
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return 0
    for entry in entries:
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None or _may_live(entry, found["host"], int(found["pid"]), int(found["start"])):
            continue
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
            removed += 1
    return removed


def _may_live(entry: os.DirEntry, host: str, pid: int, start: int) -> bool:
    """Whether the process that writes ``entry`` may still be at it."""
    if host != _host():
        try:
            return time.time() - entry.stat(follow_symlinks=False).st_mtime < _FOREIGN_AGE
        except OSError:
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, so it lives
        return True
    now = _start_of(pid)
    return now is None or not start or now == start  # otherwise the number was given to another process


@functools.lru_cache(maxsize=None)
def _host() -> str:
    """8 hex digits for the set of processes that our process numbers are about: machine and, on Linux, container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _start_of(pid: int) -> Optional[int]:
    """When a process began, in ticks since the machine did; None where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
