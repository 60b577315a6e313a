"""What a run says while it goes: console, log file, progress bars, TensorBoard.

A run configures the loggers of this package, of RecBole and of the plugins, and puts them back when it ends. Handlers
and levels of everybody else, the root logger's first of all, are left alone: a record reaches them by the usual rules.
"""

from __future__ import annotations

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

import contextlib
import functools
import hashlib
import logging
import os
import re
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import colorlog
from colorama import AnsiToWin32
from recbole.utils.logger import log_colors_config
from recbole.utils.utils import get_local_time
from torch.utils.tensorboard import SummaryWriter

from dnr_recbole.errors import ConfigError

_NAMES = ("dnr_recbole", "recbole")
_ANSI = re.compile(r"\x1B(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")


def start_logger(config, quiet: bool = False, path: Optional[str] = None) -> None:
    """Log to the console and, with ``log_dir``, to a file of this run; in place of what an earlier call set up.

    Args:
        config: its ``state`` is the level.
        quiet: errors only, and no file; so it is in all processes of a run but the first, too.
        path: the log file to continue, :func:`log_file` of another process; default: a new one.

    Raises:
        ConfigError: the log file cannot be created.
    """
    setup = _Setup(config, quiet or bool(config["rank"]), path)
    if len(_setups) > _floor[-1]:
        _pop()
    elif _setups:
        _setups[-1].detach()
    _setups.append(setup)
    setup.attach()


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Loggers are after the block, or a function decorated with ``@restored()``, as they were before."""
    _floor.append(len(_setups))
    try:
        yield
    finally:
        while len(_setups) > _floor[-1]:
            _pop()
        _floor.pop()
        if _setups:
            _setups[-1].attach()


def log_file() -> Optional[str]:
    """Path of the current run's log file, if it writes one."""
    return _setups[-1].path if _setups else None


def shows_progress(config) -> bool:
    """Whether to draw progress bars: nobody watches them in a file."""
    return bool(config["show_progress"]) and sys.stderr is not None and sys.stderr.isatty()


def log_name(config) -> str:
    """Stem of the files about a run: the model, the dataset, when it began and a digest of the keys."""
    keys = "".join(map(str, config.final_config_dict.values()))
    digest = hashlib.md5(keys.encode("utf-8")).hexdigest()[:6]
    return f"{config['model']}-{config['dataset']}-{get_local_time()}-{digest}"


class TensorBoard:
    """A SummaryWriter that opens its folder when the first value arrives, and says once if it cannot be written.

    Args:
        folder: where the event files go; None drops all values.
    """

    def __init__(self, folder: Optional[str] = None):
        self._folder = folder
        self._writer: Optional[SummaryWriter] = None

    @classmethod
    def of(cls, config) -> TensorBoard:
        """The one of a run, below ``tensorboard_dir``; stage 1 has a folder of its own in it."""
        if not config["tensorboard_dir"] or config["rank"]:
            return cls()
        # Named as the log file of the run, when there is one.
        path = log_file() or log_name(config)
        name = os.path.splitext(os.path.basename(path))[0]
        return cls(os.path.join(config["tensorboard_dir"], name, "retriever" if config.is_retriever else ""))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # copy and pickle ask for hooks
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def _call(self, name: str, *args, **kwargs) -> Any:
        if self._folder is None:
            return None
        try:
            self._writer = self._writer or SummaryWriter(self._folder)
            return getattr(self._writer, name)(*args, **kwargs)
        except OSError as error:
            logging.getLogger(__name__).warning(
                f"TensorBoard's files in {self._folder} cannot be written ({error.strerror or error}); going on without"
            )
            self._folder = None
            return None

    def close(self) -> None:
        """Write what is pending and end the writer's thread; a later value opens a new file."""
        if self._writer is not None:
            self._call("close")
            self._writer = None


# ---------------------------------------------------------------------- how


class _Setup:
    """The handlers of one run, and what the loggers were like without them."""

    def __init__(self, config, quiet: bool, path: Optional[str]):
        self.level = logging.ERROR if quiet else getattr(logging, (config["state"] or "info").upper())
        self.path: Optional[str] = None
        self.before: Dict[str, Tuple[int, bool]] = {}
        self.names: List[str] = []
        for name in (*_NAMES, *(config["plugins"] or ())):
            if not any(name == known or name.startswith(known + ".") for known in self.names):
                self.names.append(name)
        self.handlers: List[logging.Handler] = [_Console(), _Forward()]
        if config["log_dir"] and not quiet:
            try:
                self.path = path or _new_file(os.path.join(config["log_dir"], config["model"]), log_name(config))
                self.handlers.append(_File(self.path, encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"log_dir={config['log_dir']}: cannot be written: {error.strerror}") from error

    def attach(self) -> None:
        for logger in map(logging.getLogger, self.names):
            self.before.setdefault(logger.name, (logger.level, logger.propagate))
            logger.setLevel(self.level)
            logger.propagate = False  # _Forward does it, and asks the root's level first
            for handler in self.handlers:
                logger.addHandler(handler)

    def detach(self) -> None:
        for logger in map(logging.getLogger, self.names):
            level, propagate = self.before.pop(logger.name, (logger.level, logger.propagate))
            logger.setLevel(level)
            logger.propagate = propagate
            for handler in self.handlers:
                logger.removeHandler(handler)


def _new_file(folder: str, stem: str) -> str:
    """Make an empty ``<stem>.log`` that no other run writes to, although several may begin within a second."""
    os.makedirs(folder, exist_ok=True)
    number = 1
    while True:
        path = os.path.join(folder, f"{stem}.log" if number == 1 else f"{stem}-{number}.log")
        with contextlib.suppress(FileExistsError), open(path, "x"):
            return path
        number += 1


_setups: List[_Setup] = []  # the last one is attached
_floor = [0]  # how many of them belong to callers of the current function


def _pop() -> None:
    setup = _setups.pop()
    setup.detach()
    for handler in setup.handlers:
        handler.close()


class _Console(logging.StreamHandler):
    """Coloured lines on stderr, plain ones where that is no terminal; none that the host's own handlers print there."""

    def __init__(self):
        super().__init__(AnsiToWin32(sys.stderr).stream)
        pattern = "%(log_color)s%(asctime)-15s %(levelname)s  %(message)s"
        self.setFormatter(colorlog.ColoredFormatter(pattern, "%d %b %H:%M", log_colors=log_colors_config))

    def filter(self, record: logging.LogRecord) -> bool:
        return super().filter(record) and not _printed_by_root(record)


class _File(logging.FileHandler):
    """The log file: no colours, and one line instead of a traceback per record when the disk is full."""

    broken = False

    def __init__(self, path: str, encoding: str):
        super().__init__(path, encoding=encoding)
        self.setFormatter(logging.Formatter("%(asctime)-15s %(levelname)s  %(message)s", "%a %d %b %Y %H:%M:%S"))

    def format(self, record: logging.LogRecord) -> str:
        return _ANSI.sub("", super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        if not self.broken:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        self.broken = True
        logging.getLogger(__name__).warning(
            f"the log file {self.baseFilename} cannot be written ({error.strerror or error}); going on without it"
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is tried once more
            super().close()


class _Forward(logging.Handler):
    """Hands records to the root logger's handlers if its level admits them, as if they came from an unset logger."""

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if root.handlers and record.levelno >= root.getEffectiveLevel():
            root.callHandlers(record)


def _printed_by_root(record: logging.LogRecord) -> bool:
    root = logging.getLogger()
    if record.levelno < root.getEffectiveLevel():
        return False
    consoles = [sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__]
    for handler in root.handlers:
        # Rich's handler has a `console` in place of a `stream`.
        stream = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)
        if record.levelno >= handler.level and any(stream is console for console in consoles if console):
            return True
    return False
