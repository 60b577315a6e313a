"""Who works on what: one process at a time makes a cache entry or trains a run.

The operating system releases a lock when its owner ends, however that happens, so no lock is ever stale.
"""

from __future__ import annotations

import contextlib
import os
from logging import getLogger
from typing import Iterator

from filelock import FileLock, Timeout


@contextlib.contextmanager
def hold(path: str, wait: bool, waiting_for: str = "", remove: bool = False) -> Iterator[bool]:
    """Hold the lock file ``path`` during the block.

    Args:
        path: of the lock file; it stays behind, empty, unless ``remove``.
        wait: until another owner is done; otherwise the block runs without the lock.
        waiting_for: logged if there is a wait.
        remove: the file afterwards. Who opened it before may then hold it beside somebody who makes it anew, so this is
            for work that is looked up again under the lock and found done.

    Yields:
        whether the lock is held. A file system without locks counts as held, after a warning.

    Raises:
        OSError: the file cannot be made.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                yield False
                return
            getLogger(__name__).info(f"another process is making {waiting_for or path}: waiting for it")
            lock.acquire()
    except NotImplementedError:
        getLogger(__name__).warning(f"{os.path.dirname(path)} has no file locks: run one process at a time there")
        yield True
        return
    try:
        yield True
    finally:
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(path)
        lock.release()
