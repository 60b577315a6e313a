"""Which files a run reads and which of their columns: `load_col`, `unload_col`, the `*_FIELD` keys and filters."""

from __future__ import annotations

import os
import re
from logging import getLogger
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import pandas as pd
from recbole.utils import FeatureType

from dnr_recbole import registry
from dnr_recbole.config_schema import Keys
from dnr_recbole.data.atomic import AtomicFile, Format
from dnr_recbole.errors import ConfigError, DataError, closest

SIDES = ("user", "item")
PARTS = ("train", "valid", "test")
# Names that `load_col` uses for the columns that these keys rename.
FIELD_KEYS = {
    "user_id": "USER_ID_FIELD",
    "item_id": "ITEM_ID_FIELD",
    "rating": "RATING_FIELD",
    "timestamp": "TIME_FIELD",
}
_INTERVAL = re.compile(r"\s*([\[(])\s*([^,;\[\]()]+),\s*([^,;\[\]()]+)([\])])\s*")

Interval = Tuple[str, float, float, str]  # bracket, lower, upper, bracket, as RecBole has them


class Uses(NamedTuple):
    """What .user and .item are read for; if nothing is True, they are not even opened."""

    filters: bool  # filter_inter_by_user_or_item drops interactions of users and items that they lack
    retriever: bool  # the retriever's class says uses_features = True
    reranker: bool  # use_features


def side_uses(config: Any) -> Uses:
    """What the side files of this run are read for."""
    cls = config.model_class if config.is_retriever else registry.get_retriever(config["retriever"])
    return Uses(
        bool(config["filter_inter_by_user_or_item"]),
        bool(getattr(cls, "uses_features", False)),
        bool(config["use_features"]),
    )


def inter_paths(config: Keys) -> List[Path]:
    """The .inter file, or the three of `benchmark_filename`."""
    name, folder = config["dataset"], Path(config["data_path"])
    parts = config["benchmark_filename"]
    return [folder / f"{name}.{suffix}" for suffix in ([f"{p}.inter" for p in parts] if parts else ["inter"])]


def side_path(config: Keys, source: str, filtering: bool = False) -> Optional[Path]:
    """The .user or .item file if it exists and `load_col` has columns of it; filtering needs its ids only."""
    path = Path(config["data_path"]) / f"{config['dataset']}.{source}"
    chosen = config["load_col"]
    wanted = chosen is None or (filtering if chosen.get(source) is None else bool(chosen[source]))
    return path if wanted and path.is_file() else None


def used_side_files(config: Keys) -> Dict[str, List[Path]]:
    """The side files that exist for each of the :class:`Uses`; none for what this run does not ask for.

    Raises:
        DataError: there is none for a use that the run asks for.
    """
    uses, files = side_uses(config), {}
    keys = ("filter_inter_by_user_or_item", f"retriever {config['retriever']}", "use_features")
    for use, key in zip(uses._fields, keys):
        found = [side_path(config, side, use == "filters") for side in SIDES] if getattr(uses, use) else []
        files[use] = [path for path in found if path is not None]
        if getattr(uses, use) and not files[use]:
            folder = Path(config["data_path"])
            raise DataError(
                f"{key} needs '{folder / config['dataset']}.user' or .item with columns that load_col names "
                f"('{folder}' holds {list_folder(folder)}; load_col={config['load_col']})"
            )
    return files


def list_folder(folder: Path) -> str:
    """The names in a folder, for messages."""
    return ", ".join(sorted(os.listdir(folder))) or "nothing"


def id_field(config: Keys, source: str) -> str:
    """The id column of a side file."""
    return config["USER_ID_FIELD" if source == "user" else "ITEM_ID_FIELD"]


def needed_columns(config: Keys) -> Dict[str, str]:
    """Columns of .inter without which there are no requests -> the key that names each."""
    # A null name is the user's word that there is no such column.
    return {config[key]: key for key in FIELD_KEYS.values() if config[key] is not None}


def chosen_columns(config: Keys, source: str, file: AtomicFile, always: Iterable[str]) -> List[str]:
    """The columns of ``file`` to read: those of `load_col`, and those of ``always`` that it has.

    Raises:
        DataError: load_col or unload_col names a column that the file lacks, or unload_col one that is needed.
    """
    load, unload = (config[key] and config[key].get(source) for key in ("load_col", "unload_col"))
    always = set(always) & set(file.fields)
    if config["load_col"] is None or load == "*":
        chosen = set(file.fields)
    else:
        names = [load] if isinstance(load, str) else load or []
        # The standard names stand for whatever the *_FIELD keys say.
        names = [n for n in names if n not in FIELD_KEYS or config[FIELD_KEYS[n]] == n]
        chosen = set(_known("load_col", source, names, file))
    unload = set(_known("unload_col", source, [unload] if isinstance(unload, str) else unload or [], file))
    if unload & always:
        raise DataError(f"unload_col.{source} names {', '.join(sorted(unload & always))}, which this run needs")
    chosen = (chosen | always) - unload
    return [name for name in file.fields if name in chosen]


def _known(key: str, source: str, names: Iterable[str], file: AtomicFile) -> List[str]:
    for name in names:
        if name not in file.fields:
            hint = closest(str(name), file.fields) or f"it has {', '.join(file.fields)}"
            raise DataError(f"{key}.{source}: '{file.path}' has no column '{name}': {hint}")
    return list(names)


def check_side_header(file: AtomicFile, field: str, source: str) -> None:
    """Refuse a side file without its id column, or with one that is no token."""
    kind = file.fields.get(field)
    if kind is None:
        has = f"'{file.path}' has no column '{field}' (it has {', '.join(file.fields)})"
        raise DataError(f"{has}: its ids must be in the column that {FIELD_KEYS[f'{source}_id']} names")
    if kind != FeatureType.TOKEN:
        raise DataError(f"'{file.path}', line 1: column '{field}' must have type token, not {kind.value}")


def drop_repeated_ids(frame: pd.DataFrame, field: str, file: AtomicFile) -> pd.DataFrame:
    """The first row of every id; a warning counts the others."""
    repeated = frame.duplicated(field).to_numpy()
    if repeated.any():
        line = int(np.argmax(repeated)) + 2
        getLogger(__name__).warning(
            f"'{file.path}': ids repeat ({repeated.sum():,} times, first on line {line}); the first line of each counts"
        )
    return frame[~repeated]


# ---------------------------------------------------------------------- keys, before any file is opened


def check_data_keys(config: Keys) -> None:
    """Refuse values of the data keys that RecBole would ignore or misread; no file is opened.

    Raises:
        ConfigError: a separator, an encoding, an interval, a list of files or of columns is not written as it must be.
    """
    Format.of(config)
    for key in ("user_inter_num_interval", "item_inter_num_interval"):
        parse_intervals(config[key], key)
    for name, wanted in (config["val_interval"] or {}).items():
        if not isinstance(wanted, (list, tuple)):
            parse_intervals(wanted, f"val_interval.{name}")
    for key in ("load_col", "unload_col"):
        _check_columns(key, config[key] or {})
    for name, length in (config["seq_len"] or {}).items():
        if not isinstance(length, int) or length < 1:
            raise ConfigError(f"seq_len.{name}={length!r}: must be an integer >= 1")
    parts = config["benchmark_filename"]
    if parts and (len(parts) != 3 or len(set(parts)) != 3 or not all(isinstance(p, str) for p in parts)):
        raise ConfigError(
            f"benchmark_filename={parts!r}: must be three names, of the files to train, validate and test on, such as "
            f"{list(PARTS)} for {config['dataset']}.train.inter, .valid.inter and .test.inter"
        )


def _check_columns(key: str, columns: Mapping[str, Any]) -> None:
    """Refuse `load_col` or `unload_col` of a file that nobody reads, or that is no list of names."""
    for source, names in columns.items():
        if source not in ("inter", *SIDES):
            hint = closest(source, ["inter", *SIDES]) or "files are inter, user and item"
            raise ConfigError(f"{key}.{source}: no such file is read: {hint}")
        listed = [] if names is None else [names] if isinstance(names, str) else names
        if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed):
            raise ConfigError(f"{key}.{source}={names!r}: must be a list of column names, or '*'")


def parse_intervals(value: Any, key: str) -> Optional[List[Interval]]:
    """`[20,inf)` or `(0,1];[3,4)` -> [(bracket, lower, upper, bracket), ...]; None -> None.

    Two numbers [a, b] are the closed interval, which is what YAML makes of it without quotes.

    Raises:
        ConfigError: it is no interval; the message shows the right form.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and len(value) == 2:
        text = f"[{value[0]},{value[1]}]"
    else:
        text = str(value)
    parts = [_parse_interval(part) for part in text.split(";")]
    intervals = [part for part in parts if part is not None]
    if len(intervals) < len(parts):
        number = re.search(r"-?\d+(\.\d+)?", text)
        example = f"[{number.group() if number else 20},inf)"
        raise ConfigError(
            f"{key}={value!r}: is no interval; write {example} for all from there on, or [a,b], [a,b), (a,b], (a,b)"
        )
    return intervals


def _parse_interval(text: str) -> Optional[Interval]:
    match = _INTERVAL.fullmatch(text)
    if not match:
        return None
    left, low, high, right = match.groups()
    try:
        low, high = float(low), float(high)
    except ValueError:
        return None
    holds_one = low < high or (low == high and left + right == "[]")  # False for NaN, too
    return (left, low, high, right) if holds_one else None
