"""Errors a user can cause or repair. Each message is one line: what is wrong, where, what to do."""

import difflib
from typing import Iterable


class DnrError(Exception):
    """Base of all expected failures; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(DnrError):
    """A key, a value or a file of the configuration cannot be used."""

    exit_code = 2


class UnknownNameError(DnrError):
    """A model, retriever or metric name that nobody registered."""

    exit_code = 2


class DataError(DnrError):
    """The dataset is missing, damaged, or lacks what the task needs."""


class CacheError(DnrError):
    """A cache entry cannot be read or written."""


class CheckpointError(DnrError):
    """A checkpoint is missing, damaged, or belongs to another model."""


def closest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known names nearest to ``name``, whatever their case, or nothing."""
    by_lower = {each.lower(): each for each in known}
    close = [by_lower[each] for each in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    return f"did you mean {' or '.join(close)}?" if close else ""
