"""Load a RecBole dataset, and say in one line what is wrong with it if that fails.

RecBole fills missing ratings and times with the column's mean and drops what it cannot use, so damage to a
file goes unnoticed or surfaces as a pandas traceback. Hence the interactions are checked before RecBole reads
them.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Dict
from urllib.error import URLError

import numpy as np
import pandas as pd
from recbole.data.utils import create_dataset
from recbole.utils import FeatureType

from dnr_recbole.config_schema import closest, read_yaml, recbole_properties_dir
from dnr_recbole.errors import DataError
from dnr_recbole.identity import file_digest

_TYPES = [kind.value for kind in FeatureType]


def load_recbole_dataset(config):
    """The RecBole dataset of `config`, read, filtered and checked, its `inter_feat` still a pandas frame.

    Raises:
        DataError: it is missing, damaged, lacks a needed column, or nothing is left after filtering.
    """
    name, folder = config["dataset"], Path(config["data_path"])
    if folder.is_dir():
        _check_files(config, name, folder)
    else:
        _check_downloadable(name, folder)
    try:
        dataset = create_dataset(config)
    except URLError as error:
        why = f"{_absent(name, folder)} and cannot be downloaded ({error.reason})"
        raise DataError(f"{why}: {_remedy(name, folder)}") from None
    except (EOFError, SystemExit):
        why = f"{_absent(name, folder)} and the download was declined"
        raise DataError(f"{why}: {_remedy(name, folder)}") from None
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "feat is empty" in reason:
            raise DataError(_nothing_left(config)) from error
        raise DataError(f"dataset '{name}' in '{folder}' cannot be read: {reason}") from error
    _check_loaded(config, dataset)
    return dataset


# ---------------------------------------------------------------------- before loading


def _check_downloadable(name: str, folder: Path) -> None:
    known = read_yaml(recbole_properties_dir() / "dataset" / "url.yaml")
    if name in known:
        return
    others = [entry.name for entry in folder.parent.glob("*") if entry.is_dir()]
    hint = closest(name, ["ml-100k", "ml-1m", "amazon-books", "kuaivideo", "synthetic", *others])
    raise DataError(f"{_absent(name, folder)}: {hint + ' Otherwise ' if hint else ''}{_remedy(name, folder)}")


def _absent(name: str, folder: Path) -> str:
    return f"dataset '{name}' is not in '{folder}'"


def _remedy(name: str, folder: Path) -> str:
    return (
        f"put the atomic file '{folder / (name + '.inter')}' there, "
        "tab-separated with the header 'user_id:token item_id:token rating:float timestamp:float'"
    )


def _check_files(config, name: str, folder: Path) -> None:
    parts = config["benchmark_filename"]
    suffixes = [f"{part}.inter" for part in parts] if parts else ["inter"]
    for suffix in suffixes:
        path = folder / f"{name}.{suffix}"
        if not path.is_file():
            found = ", ".join(sorted(os.listdir(folder))) or "nothing"
            raise DataError(f"'{path}' does not exist ('{folder}' holds {found}): {_remedy(name, folder)}")
        _check_interactions(config, path)
    for suffix in ("user", "item"):
        path = folder / f"{name}.{suffix}"
        if path.is_file():
            _header(config, path)


def _header(config, path: Path) -> Dict[str, str]:
    """Field name -> type of an atomic file."""
    separator = config["field_separator"]
    try:
        with open(path, encoding=config["encoding"]) as file:
            line = file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError, LookupError) as error:
        raise DataError(f"'{path}' cannot be read: {error}") from None
    if not line:
        raise DataError(f"'{path}' is empty: its first line must name the columns, such as user_id:token")
    fields = {}
    for column in line.split(separator):
        field, _, kind = column.partition(":")
        if kind not in _TYPES:
            raise DataError(
                f"'{path}', line 1: column '{_shorten(column)}' must be written name:type with type one of "
                f"{', '.join(_TYPES)}, columns separated by {separator!r}"
            )
        fields[field] = kind
    return fields


def _needed(config) -> Dict[str, str]:
    """Columns without which there are no requests, and the types they must have."""
    needed = {config["USER_ID_FIELD"]: "token", config["ITEM_ID_FIELD"]: "token"}
    # A null name is the user's word that there is no such column.
    needed.update({config[key]: "float" for key in ("RATING_FIELD", "TIME_FIELD") if config[key] is not None})
    return needed


def _check_interactions(config, path: Path) -> None:
    fields, needed = _header(config, path), _needed(config)
    keys = {config[key]: key for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "RATING_FIELD", "TIME_FIELD")}
    for field, kind in needed.items():
        if field not in fields:
            also = " or to null if there is none" if kind == "float" else ""
            has = f"'{path}' has no column '{field}' (it has {', '.join(fields)})"
            raise DataError(f"{has}: set {keys[field]} to the right one{also}")
        if fields[field] != kind:
            raise DataError(f"'{path}', line 1: column '{field}' must have type {kind}, not {fields[field]}")

    separator = config["field_separator"]
    columns = [f"{field}:{kind}" for field, kind in fields.items()]
    try:
        # Text only, so that a bad number can be shown with its line; the fast parser, unlike RecBole's.
        frame = pd.read_csv(path, sep=separator, dtype=str, encoding=config["encoding"], index_col=False)
    except pd.errors.ParserError as error:
        raise DataError(f"'{path}' has lines with too many columns: {' '.join(str(error).split())}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from None
    if frame.empty:
        raise DataError(f"'{path}' has a header, but no interactions")
    frame.columns = list(fields) if len(frame.columns) == len(columns) else frame.columns
    for field, kind in needed.items():
        values = frame[field]
        bad = values.isna()
        _refuse_line(path, bad, f"'{field}' is missing (is the file truncated?)")
        if kind == "float":
            numbers = pd.to_numeric(values, errors="coerce")
            bad = ~np.isfinite(numbers)
            shown = _shorten(values[bad].iloc[0]) if bad.any() else ""
            _refuse_line(path, bad, f"'{field}' is no number: '{shown}'")


def _refuse_line(path: Path, bad: pd.Series, what: str) -> None:
    if bad.any():
        first, count = int(np.argmax(bad.to_numpy())) + 2, int(bad.sum())
        more = f" (and on {count - 1} further lines)" if count > 1 else ""
        raise DataError(f"'{path}', line {first}: {what}{more}; repair or remove it")


# ---------------------------------------------------------------------- after loading


def _check_loaded(config, dataset) -> None:
    if len(dataset.inter_feat) == 0 or dataset.user_num <= 1:
        raise DataError(_nothing_left(config))
    name, n, items = config["dataset"], config["n_candidates"], dataset.item_num - 1
    lost = [field for field in _needed(config) if field not in dataset.inter_feat]
    if lost:
        raise DataError(f"dataset '{name}': load_col.inter must also name {', '.join(lost)}")
    if config["normalize_all"] or config["RATING_FIELD"] in (config["normalize_field"] or []):
        raise DataError(
            "normalize_all and normalize_field would rescale the ratings that label_threshold is for"
        )
    if items < n:
        raise DataError(
            f"dataset '{name}' has {items} items, fewer than n_candidates={n}: lower n_candidates"
        )


def _nothing_left(config) -> str:
    names = ("user_inter_num_interval", "item_inter_num_interval", "val_interval")
    filters = ", ".join(f"{name}={config[name]}" for name in names if config[name] not in (None, "[0,inf)"))
    return f"dataset '{config['dataset']}': no user is left after filtering ({filters or 'no filter is set'})"


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def data_files(config) -> Dict[str, list]:
    folder, name = Path(config["data_path"]), config["dataset"]
    return {"source": sorted(p for p in folder.glob(f"{name}.*") if p.is_file())}


def file_digests(config) -> Dict[str, Dict[str, str]]:
    """Stage → file name → sha256 of the files that its numbers depend on; none for generated data.

    Raises:
        DataError: a file is missing.
    """
    if config["dataset"] == "synthetic":
        return {}
    return {
        stage: {path.name: file_digest(path) for path in paths} for stage, paths in data_files(config).items() if paths
    }
