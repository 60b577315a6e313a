"""Values per request of a plan's runs and probes: Parquet files in a folder beside the results file.

Beside ``ml-100k.jsonl`` stands ``ml-100k.requests/`` with ``<identity of the run>.parquet`` for each finished run and
``<identity of the data>.<probe>.parquet`` for each probe, once for all runs on the same test lists. Each is written
whole before the line that names it, so a line's files are there; a file without a line is of a run that was killed
between the two, and the run that is made again replaces it.
"""

from __future__ import annotations

import os
from typing import Any, Dict

from dnr_recbole.data.dataset import RerankData
from dnr_recbole.errors import ConfigError, DataError
from dnr_recbole.evaluator.per_request import PerRequest, read_per_request, save_per_request
from dnr_recbole.evaluator.probes import probe_evaluators, probe_names
from dnr_recbole.identity import CODE_VERSIONS, digest, file_digest

Entry = Dict[str, str]  # file: its path from the folder of the results file; sha256: of its content


def request_file(results: str, name: str) -> str:
    """Path of a file of values per request.

    Raises:
        ConfigError: the results file itself has the name of the folder.
    """
    folder = os.path.splitext(os.path.abspath(results))[0] + ".requests"
    if folder == os.path.abspath(results):
        raise ConfigError(f"results {results}: values per request need that name: choose one such as {results}.jsonl")
    return os.path.join(folder, f"{name}.parquet")


def file_entry(results: str, path: str) -> Entry:
    """What a line says of a file that was written."""
    name = os.path.relpath(path, os.path.dirname(os.path.abspath(results)))
    return {"file": name.replace(os.sep, "/"), "sha256": file_digest(path)}


def load_entry(results: str, entry: Any) -> PerRequest:
    """The values of a run or probe.

    Args:
        results: path of the results file.
        entry: what its line says of the file; None in lines that were made before there were such files.

    Raises:
        DataError: there is no such file, or not with this content; the text says why, in a few words.
    """
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file", "sha256")):
        raise DataError("its line names no file of values per request")
    path = os.path.join(os.path.dirname(results), entry["file"])
    try:
        same = file_digest(path) == entry["sha256"]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        missing = isinstance(error, FileNotFoundError)
        raise DataError(f"{path} is missing" if missing else f"{path} cannot be read: {reason}") from None
    if not same:
        raise DataError(f"{path} is not as it was written")
    return read_per_request(path)


def keep_probes(results: str, config, data: RerankData, data_digest: str) -> Dict[str, Entry]:
    """Write the probes' values of a run's test lists unless they are there; what its line says of them.

    Args:
        results: path of the results file.
        config: the run's.
        data: the run's.
        data_digest: of ``data``.
    """
    made_of = {"data": data_digest, "seed": config["seed"], "keys": config.of_scope("evaluation")}
    name = digest({**made_of, "version": CODE_VERSIONS["evaluation"]})
    paths = {probe: request_file(results, f"{name}.{probe}") for probe in probe_names(data.test, data.truth)}
    if not all(map(_readable, paths.values())):
        evaluators = probe_evaluators(config, data.test, data.catalogue, data.catalogue.item_counts, truth=data.truth)
        for probe, evaluator in evaluators.items():
            # Not the keys of the run that happened to be first: the file must not depend on it.
            said = {"dataset": config["dataset"], "model": probe, "seed": config["seed"]}
            save_per_request(paths[probe], evaluator, said, data.test.users)
    return {probe: file_entry(results, path) for probe, path in paths.items()}


def _readable(path: str) -> bool:
    try:
        read_per_request(path)
    except DataError:
        return False
    return True
