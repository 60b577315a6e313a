"""Errors a user can cause or repair. Each message is one line: what is wrong, where, what to do."""


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
