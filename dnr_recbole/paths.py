"""Every place that a run writes to is tried before the first minute is spent."""

from __future__ import annotations

import errno
import os
import stat
from typing import Dict, Optional

from dnr_recbole.errors import ConfigError
from dnr_recbole.files import sweep, temporary_name


def check_paths(config, saved: bool = True, outputs: Optional[Dict[str, str]] = None) -> None:
    """Make the folders that a run writes to, try them, and remove what killed runs left half-written there.

    Args:
        config: its ``log_dir``, ``tensorboard_dir``, ``cache_dir``, ``checkpoint_dir``, ``artefact_dir`` and
            ``result_file``.
        saved: whether checkpoints will be written.
        outputs: further files, by the name of the option that gives them.

    Raises:
        ConfigError: one of them cannot be written; the line names its key.
    """
    folders = {"log_dir": config["log_dir"], "tensorboard_dir": config["tensorboard_dir"]}
    if saved:
        folders["checkpoint_dir"] = config["checkpoint_dir"]
    for key, folder in folders.items():
        if folder:
            _try(key, folder, folder)
            sweep(folder)
    if config["use_cache"]:
        _try("cache_dir", config["cache_dir"], config["cache_dir"], may_be_read_only=True)
        sweep(config["cache_dir"])
    artefact = config["artefact_dir"]
    if artefact:
        parent = os.path.dirname(os.path.abspath(artefact))
        _try("artefact_dir", artefact, parent)
        sweep(parent)
        if os.path.exists(artefact) and not os.path.isfile(os.path.join(artefact, "config.json")):
            raise ConfigError(f"artefact_dir={artefact}: exists and is no artefact: choose another name")
    for key, path in {**{key: config[key] for key in ("result_file", "per_request_file")}, **(outputs or {})}.items():
        if path:
            _try_file(key, path)


def _try(key: str, value: str, folder: str, may_be_read_only: bool = False) -> None:
    """Make ``folder`` and write to it. A cache that others have filled is of use without writing to it."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}={value}: the folder {folder} cannot be made: {_reason(error)}") from error
    probe = temporary_name(os.path.join(folder, "probe"))
    try:
        try:
            with open(probe, "xb") as file:
                file.write(b"0")
        finally:
            if os.path.lexists(probe):
                os.unlink(probe)
    except OSError as error:
        if may_be_read_only and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return
        raise ConfigError(f"{key}={value}: the folder {folder} cannot be written: {_reason(error)}") from error


def _try_file(key: str, path: str) -> None:
    path = os.fspath(path)
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise ConfigError(f"{key}={path}: is a folder: name a file in it")
    if os.path.exists(target):
        if not os.access(target, os.W_OK):
            raise ConfigError(f"{key}={path}: the file cannot be written: permission denied")
        if not stat.S_ISREG(os.stat(target).st_mode):
            return  # a device or a pipe, written directly
    folder = os.path.dirname(target)
    _try(key, path, folder)
    sweep(folder)


def _reason(error: OSError) -> str:
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"{error.filename} is a file"
    return error.strerror or str(error)
