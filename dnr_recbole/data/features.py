"""Side tables of users and items, from RecBole's .user and .item fields and the retriever."""

from __future__ import annotations

from logging import getLogger
from typing import List, Optional

import numpy as np
import pandas as pd
import torch
from recbole.utils import FeatureType
from torch import Tensor

from dnr_recbole.data.catalogue import Catalogue

_NUMERIC_SHARE = 0.95  # of the values of a field; the odd one ("unknown") counts as missing
_NUMBER = r"[+-]?(?:0|[1-9]\d*)(?:\.\d+)?"  # 1995, -0.5; not 02139, which is a code


def build_catalogue(config, dataset, retrieval) -> Catalogue:
    """All a reranker may read of users and items; counts and factors know the retriever's training part."""
    limit = config["max_feature_vocabulary"]
    return Catalogue(
        n_users=dataset.user_num,
        n_items=dataset.item_num,
        item_popularity=popularity(retrieval.train_count),
        item_features=encode_features(dataset, dataset.item_feat, dataset.iid_field, dataset.item_num, limit),
        user_features=encode_features(dataset, dataset.user_feat, dataset.uid_field, dataset.user_num, limit),
        item_factors=retrieval.item_factors,
        user_factors=retrieval.user_factors,
        item_counts=torch.as_tensor(retrieval.train_count).long(),
        user_ids_known=config["split"] != "user",
    )


def popularity(counts) -> Tensor:
    """log(1 + count) / max, float32 [I]; counts [I]."""
    logs = torch.log1p(torch.as_tensor(counts).float())
    logs[0] = 0.0
    return logs / logs.max().clamp(min=1e-12)


def encode_features(dataset, feat, id_field: str, n_rows: int, max_vocabulary: int) -> Tensor:
    """One row per id, FloatTensor [n_rows, F]: multi-hot categories and standardised numbers; row 0 is zero.

    Categories with more than ``max_vocabulary`` values are left out, unless they are
    numbers
    (years). ``feat`` is RecBole's user_feat or item_feat, as pandas frame or as Interaction, or None.
    """
    blocks: List[np.ndarray] = []
    skipped: List[str] = []
    for field in [] if feat is None else feat.columns:
        if field == id_field:
            continue
        block = _encode_field(dataset, field, feat[field], n_rows, max_vocabulary)
        if block is None:
            skipped.append(field)
        else:
            blocks.append(block)
    if skipped:
        getLogger(__name__).info(
            f"fields of '{id_field}' left out of the features (too many values): {', '.join(skipped)}"
        )
    table = np.concatenate(blocks, axis=1) if blocks else np.zeros((n_rows, 0))
    table[0] = 0.0
    return torch.from_numpy(table.astype(np.float32))


def _encode_field(dataset, field: str, column, n_rows: int, max_vocabulary: int) -> Optional[np.ndarray]:
    """[n_rows, width], or None if the field cannot be a feature."""
    kind = dataset.field2type[field]
    if kind == FeatureType.FLOAT:
        return _standardise(np.asarray(column, dtype=np.float64))
    if kind not in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ):
        return None
    tokens = np.asarray(dataset.field2id_token[field], dtype=str)  # [V], 0 = [PAD]
    if len(tokens) - 1 <= max_vocabulary:
        row, value = _pairs(column, kind == FeatureType.TOKEN_SEQ)
        block = np.zeros((n_rows, len(tokens)))
        block[row, value] = 1.0
        return block[:, 1:]
    if kind == FeatureType.TOKEN:
        is_number = pd.Series(tokens).str.fullmatch(_NUMBER).to_numpy(dtype=bool)
        if is_number.sum() >= _NUMERIC_SHARE * (len(tokens) - 1):
            numbers = np.full(len(tokens), np.nan)
            numbers[is_number] = tokens[is_number].astype(np.float64)
            return _standardise(numbers[np.asarray(column, dtype=np.int64)])
    return None


def _pairs(column, is_sequence: bool):
    """(row, token id) of every value of a column: ids, arrays (pandas) or a padded tensor (Interaction)."""
    if not is_sequence:
        values = np.asarray(column, dtype=np.int64)
        return np.arange(len(values)), values
    if isinstance(column, Tensor):
        values = column.numpy()
        return np.repeat(np.arange(len(values)), values.shape[1]), values.reshape(-1)
    lengths = column.str.len().to_numpy()
    values = np.concatenate([np.zeros(0, dtype=np.int64), *column.to_numpy()])
    return np.repeat(np.arange(len(lengths)), lengths), values.astype(np.int64)


def _standardise(values: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the finite values of real rows; missing ones become 0: [n] → [n, 1]."""
    known = np.isfinite(values)
    known[0] = False
    real = values[known]
    mean, std = (real.mean(), real.std()) if len(real) else (0.0, 0.0)
    return np.where(known, (values - mean) / (std if std > 0 else 1.0), 0.0)[:, None]
