"""Side tables of users and items: what .user and .item say of them, and what the retriever's training part shows.

The side files are read here and laid beside the ids of the log, never through RecBole's dataset: there, a user or an
item that only a side file knows would become one of the log. So `use_features` changes what a reranker reads and
nothing else.
"""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import numpy as np
import pandas as pd
import torch
from recbole.utils import FeatureType
from torch import Tensor

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.atomic import AtomicFile, Format, shorten
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.columns import check_side_header, chosen_columns, drop_repeated_ids, id_field, used_side_files
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.spaces import load_spaces
from dnr_recbole.errors import DataError

if TYPE_CHECKING:
    from dnr_recbole.retriever.retrieval import Retrieval

_NUMERIC_SHARE = 0.95  # of the values of a field; the odd one ("unknown") counts as missing
_NUMBER = r"[+-]?(?:0|[1-9]\d*)(?:\.\d+)?"  # 1995, -0.5; not 02139, which is a code
_MATCHING_SHARE = 0.01  # fewer ids in common than this mean that the two files write ids differently


def build_catalogue(config: Keys, dataset: Any, interactions: Interactions, retrieval: Retrieval) -> Catalogue:
    """All a reranker may read of users and items; counts and factors know the retriever's training part."""
    user_features, item_features = side_features(config, dataset)
    return Catalogue(
        n_users=dataset.user_num,
        n_items=dataset.item_num,
        item_popularity=popularity(retrieval.train_count),
        item_features=item_features,
        user_features=user_features,
        item_factors=retrieval.item_factors,
        user_factors=retrieval.user_factors,
        item_counts=torch.as_tensor(retrieval.train_count).long(),
        user_ids_known=config["split"] == "last",
        spaces=load_spaces(config, interactions, retrieval),
    )


def popularity(counts: Any) -> Tensor:
    """log(1 + count) / max, float32 [I]; counts [I]."""
    logs = torch.log1p(torch.as_tensor(counts).float())
    logs[0] = 0.0
    return logs / logs.max().clamp(min=1e-12)


def side_features(config: Keys, dataset: Any) -> Tuple[Tensor, Tensor]:
    """The features of the log's users and items by RecBole's ids, float32 [U, F'] and [I, F].

    Those that a side file does not list have zeros, and the log says how many they are; the width is 0 without a file,
    and without `use_features`. ``dataset`` keeps them for the next run on it, which may ask for others.

    Raises:
        DataError: there is no file, one is damaged, or (nearly) none of its ids is one of the log's.
    """
    sizes = {"user": dataset.user_num, "item": dataset.item_num}
    if not config["use_features"]:
        return torch.zeros(sizes["user"], 0), torch.zeros(sizes["item"], 0)
    paths, limit = used_side_files(config)["reranker"], config["max_feature_vocabulary"]
    for side, n in sizes.items():
        if (side, limit) not in dataset.features:
            path = next((path for path in paths if path.suffix == f".{side}"), None)
            features = torch.zeros(n, 0) if path is None else _read_features(config, dataset, side, path)
            dataset.features[side, limit] = features
    return dataset.features["user", limit], dataset.features["item", limit]


def _read_features(config: Keys, dataset: Any, side: str, path: Path) -> Tensor:
    field = id_field(config, side)
    tokens = dataset.field2id_token[field]  # [n], 0 = [PAD]
    file = AtomicFile(path, Format.of(config))
    check_side_header(file, field, side)
    frame = file.frame(chosen_columns(config, side, file, [field]), required=[field])
    for name in map(str, frame):
        if file.fields[name] == FeatureType.FLOAT_SEQ:
            _check_lengths(file, name, frame[name])
    frame = drop_repeated_ids(frame, field, file)
    row = pd.Index(tokens[1:].astype(object)).get_indexer(frame[field]) + 1  # of each line; 0: not in the log
    found, n_known = int((row > 0).sum()), len(tokens) - 1
    if found == 0 or found < _MATCHING_SHARE * min(n_known, len(frame)):
        ours, theirs = tokens[1], frame[field].iloc[0] if len(frame) else ""
        raise DataError(
            f"'{path}': {100 * found / n_known:.2g} % of the ids match ({found} of the log's {n_known} {side}s are in "
            f"it): write ids in the same way; one of the log is '{shorten(ours)}', one of this file '{shorten(theirs)}'"
        )
    kinds = {name: file.fields[name] for name in map(str, frame) if name != field}
    features = encode_features(frame[row > 0], kinds, row[row > 0], len(tokens), config["max_feature_vocabulary"])
    getLogger(__name__).info(
        f"'{path}': {found:,} of {n_known:,} {side}s have features ({features.shape[1]} numbers from "
        f"{', '.join(kinds) or 'no column'}), the others zeros; {len(frame) - found:,} lines are of {side}s that the "
        "log does not have"
    )
    return features


def _check_lengths(file: AtomicFile, name: str, column: pd.Series) -> None:
    """A vector has as many numbers in every line that has one."""
    lengths = column.str.len().to_numpy(dtype=int)
    known = lengths[lengths > 0]
    bad = (lengths > 0) & (lengths != known[0]) if len(known) else np.zeros(len(lengths), dtype=bool)
    if bad.any():
        found = lengths[np.argmax(bad)]
        file.refuse_rows(bad, f"'{name}' has {found} numbers, and {known[0]} in the first line that has any")


def encode_features(
    frame: pd.DataFrame, kinds: Dict[str, Any], row: np.ndarray, n_rows: int, max_vocabulary: int
) -> Tensor:
    """One row per id, FloatTensor [n_rows, F]: multi-hot categories and standardised numbers; row 0 is zero.

    Categories with more than ``max_vocabulary`` values are left out, unless they are numbers (years).

    Args:
        frame: the known ids' lines, as :meth:`AtomicFile.frame` returns them.
        kinds: the columns to encode -> FeatureType.
        row: int [len(frame)], > 0, the id of each line; every id at most once.
    """
    blocks: List[np.ndarray] = []
    skipped: List[str] = []
    for name, kind in kinds.items():
        block = _encode(frame[name], kind, max_vocabulary)
        if block is None:
            skipped.append(name)
        else:
            blocks.append(block)
    if skipped:
        getLogger(__name__).info(f"columns left out of the features (too many values): {', '.join(skipped)}")
    table = np.zeros((n_rows, sum(block.shape[1] for block in blocks)), dtype=np.float32)
    if blocks:
        table[row] = np.concatenate(blocks, axis=1)
    return torch.from_numpy(table)


def _encode(column: pd.Series, kind: FeatureType, max_vocabulary: int) -> Optional[np.ndarray]:
    """[len(column), width], or None if the column cannot be a feature."""
    if kind == FeatureType.FLOAT:
        return _standardise(column.to_numpy(dtype=np.float64)[:, None])
    if kind == FeatureType.FLOAT_SEQ:
        width = int(column.str.len().max()) if len(column) else 0
        missing = np.full(width, np.nan)
        return _standardise(np.stack([cell if len(cell) else missing for cell in column]))
    if kind == FeatureType.TOKEN_SEQ:
        line = np.repeat(np.arange(len(column)), column.str.len().to_numpy(dtype=int))
        value, vocabulary = pd.factorize(np.concatenate([np.zeros(0, dtype=object), *column]))
    else:
        line = np.arange(len(column))
        value, vocabulary = pd.factorize(column.to_numpy())  # -1: missing
    if len(vocabulary) <= max_vocabulary:
        block = np.zeros((len(column), len(vocabulary)), dtype=np.float32)
        block[line[value >= 0], value[value >= 0]] = 1.0
        return block
    if kind == FeatureType.TOKEN:
        is_number = pd.Series(vocabulary).str.fullmatch(_NUMBER).to_numpy(dtype=bool)
        if is_number.sum() >= _NUMERIC_SHARE * len(vocabulary):
            numbers = np.full(len(vocabulary) + 1, np.nan)  # the last one is what -1 points at
            numbers[:-1][is_number] = np.asarray(vocabulary)[is_number].astype(np.float64)
            return _standardise(numbers[value][:, None])
    return None


def _standardise(values: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance per column over the known values; missing ones (NaN) become 0: [n, w] -> [n, w]."""
    known = np.isfinite(values)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, values, 0.0).sum(0) / count
    centred = np.where(known, values - mean, 0.0)
    std = np.sqrt((centred**2).sum(0) / count)
    return centred / np.where(std > 0, std, 1.0)
