"""A command ends the same way whether Ctrl-C, a batch system or a closed terminal asks it to."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any, Dict, Iterator, Optional


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by the signal ``number``."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Received:
    """The signal that came during :func:`interruptible`, if any: libraries turn an interrupt into errors of theirs."""

    number: Optional[int] = None


@contextlib.contextmanager
def interruptible() -> Iterator[Received]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`; a second one ends the process at once.

    A signal that the process was started to ignore, as under nohup, stays ignored. Outside the main thread, where no
    handler can be set, nothing changes.
    """
    received, owner = Received(), os.getpid()
    before: Dict[int, Any] = {}

    def handle(number, frame):
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked child has inherited the handler
            os.kill(os.getpid(), number)
            return
        received.number = number
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():
        for number, handler in _handlers().items():
            if handler is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """After the block signals are handled as before it, whatever handlers a library sets inside without being asked."""
    before = _handlers()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _handlers() -> Dict[int, Any]:
    """What is done about each signal that asks for an end; those whose handlers Python cannot see are left out."""
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]  # SIGHUP: not on Windows
    found = {number: signal.getsignal(number) for number in numbers if number is not None}
    return {number: handler for number, handler in found.items() if handler is not None}
