"""RecBole's Dataset on top of our reader: what is read is what the files say, and every filter reports its effect.

Nothing else of RecBole's way to a dataset is used: its `create_dataset` unpickles files that happen to lie in the
checkpoint folder, and its reader loses lines and lets side files decide which interactions remain.
"""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource, FeatureType
from torch import Tensor

from dnr_recbole.data.atomic import AtomicFile, Format
from dnr_recbole.data.columns import (
    SIDES,
    Interval,
    check_side_header,
    chosen_columns,
    drop_repeated_ids,
    id_field,
    inter_paths,
    needed_columns,
    parse_intervals,
    side_path,
    side_uses,
)
from dnr_recbole.data.interactions import PART_FIELD
from dnr_recbole.errors import DataError

# Keys that filter, in the order in which they do, and the method that does it.
FILTERS = (
    (("rm_dup_inter",), "_remove_duplication"),
    (("val_interval",), "_filter_by_field_value"),
    (("filter_inter_by_user_or_item",), "_filter_inter_by_user_or_item"),
    (("user_inter_num_interval", "item_inter_num_interval"), "_filter_by_inter_num"),
)
_OFF: Tuple[Any, ...] = (None, False, "[0,inf)", {})


class Counts(NamedTuple):
    """How much of a log there is."""

    interactions: int
    users: int
    items: int

    def __str__(self) -> str:
        return f"{self.interactions:,} interactions, {self.users:,} users, {self.items:,} items"


class AtomicDataset(Dataset):
    """The interactions of a run. Users and items are those of the log, in the order in which it names them.

    .user and .item are read if `filter_inter_by_user_or_item` is on, or if the retriever's class says
    ``uses_features = True``; only then ``user_feat`` and ``item_feat`` exist. The reranker's features never go through
    here, see :mod:`dnr_recbole.data.features`.

    Attributes:
        features: tables that were made of the side files for rerankers, so that each is made once.
    """

    def _get_preset(self) -> None:
        super()._get_preset()
        self.features: Dict[Tuple[str, int], Tensor] = {}
        # RecBole would split by these files and switch all filters off; here a column says which file a line is from.
        self.benchmark_filename_list = None

    # ------------------------------------------------------------------ reading

    def _load_data(self, token: str, dataset_path: str) -> None:
        self._form = Format.of(self.config)
        paths = inter_paths(self.config)
        frames = [self._read_interactions(path) for path in paths]
        for path, frame in zip(paths[1:], frames[1:]):
            if set(frame) != set(frames[0]):
                differ = ", ".join(sorted(map(str, set(frame) ^ set(frames[0]))))
                raise DataError(f"'{path}' and '{paths[0]}' differ in the columns {differ}: load_col chooses columns")
        if len(frames) > 1:
            for part, frame in enumerate(frames):
                frame[PART_FIELD] = np.full(len(frame), part, dtype=np.int8)
            getLogger(__name__).info(f"together: {self._counts(pd.concat(frames))}")
        self.inter_feat = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
        self.user_feat = self.item_feat = None
        self._side_types: Dict[str, FeatureType] = {}  # of columns that RecBole does not know of
        sides = {source: self._read_side(source) for source in SIDES}
        self._sides = {source: frame for source, frame in sides.items() if frame is not None}
        for field, source in ((self.uid_field, FeatureSource.USER_ID), (self.iid_field, FeatureSource.ITEM_ID)):
            self.field2source[field] = source

    def _read_interactions(self, path: Path) -> pd.DataFrame:
        file, needed = AtomicFile(path, self._form), needed_columns(self.config)
        for field, key in needed.items():
            kind = "token" if key in ("USER_ID_FIELD", "ITEM_ID_FIELD") else "float"
            if field not in file.fields:
                also = " or to null if there is none" if kind == "float" else ""
                has = f"'{path}' has no column '{field}' (it has {', '.join(file.fields)})"
                raise DataError(f"{has}: set {key} to the right one{also}")
            if file.fields[field].value != kind:
                found = file.fields[field].value
                raise DataError(f"'{path}', line 1: column '{field}' must have type {kind}, not {found}")
        columns = chosen_columns(self.config, "inter", file, [*needed, *(self.config["val_interval"] or {})])
        frame = file.frame(columns, required=list(needed))
        if frame.empty:
            raise DataError(f"'{path}' has a header, but no interactions")
        getLogger(__name__).info(f"'{path}': {self._counts(frame)}")
        self._register(file, frame, FeatureSource.INTERACTION)
        return frame

    def _read_side(self, source: str) -> Optional[pd.DataFrame]:
        uses = side_uses(self.config)
        path = side_path(self.config, source, uses.filters)
        if path is None or not (uses.filters or uses.retriever):
            return None
        file, field = AtomicFile(path, self._form), id_field(self.config, source)
        check_side_header(file, field, source)
        filtering = [field, *(self.config["val_interval"] or {})] if uses.filters else [field]
        columns = chosen_columns(self.config, source, file, filtering)
        if not uses.retriever:
            columns = [name for name in columns if name in filtering]
        frame = drop_repeated_ids(file.frame(columns, required=[field]), field, file)
        if uses.retriever:
            taken = [name for name in frame if name != field and name in self.field2type]
            if taken:
                raise DataError(
                    f"'{path}': RecBole, and so retriever '{self.config['retriever']}', can hold one column named "
                    f"'{taken[0]}', and another file has one: rename it, or leave it out with unload_col.{source}"
                )
            self._register(file, frame, FeatureSource(source))
        else:
            self._side_types.update({name: file.fields[name] for name in map(str, frame)})
        return frame

    def _register(self, file: AtomicFile, frame: pd.DataFrame, source: FeatureSource) -> None:
        for name in map(str, frame):
            kind, known = file.fields[name], self.field2type.get(name)
            if known not in (None, kind):
                raise DataError(f"'{file.path}', line 1: column '{name}' has type {known.value} in another file")
            self.field2source[name], self.field2type[name] = source, kind
            length = int(frame[name].map(len).max()) if kind.value.endswith("seq") else 1
            self.field2seqlen[name] = max(length, self.field2seqlen.get(name, 1))
            if kind.value.startswith("float"):
                self.field2bucketnum[name] = 2

    # ------------------------------------------------------------------ filtering

    def _data_filtering(self) -> None:
        for keys, method in FILTERS:
            asked = [f"{key}={self.config[key]}" for key in keys if self.config[key] not in _OFF]
            if not asked:
                continue
            before = self._counts(self.inter_feat)
            getattr(self, method)()
            after = self._counts(self.inter_feat)
            getLogger(__name__).info(f"{', '.join(asked)}: {before} -> {after}")
            if not after.interactions:
                raise DataError(f"dataset '{self.dataset_name}': no user is left after filtering ({', '.join(asked)})")
        part = self.inter_feat.pop(PART_FIELD) if PART_FIELD in self.inter_feat else None
        self._part = None if part is None else part.to_numpy()
        if side_uses(self.config).retriever:
            self._keep_side_features()
        del self._sides
        self.feat_name_list = self._build_feat_name_list()
        self._reset_index()

    def _data_processing(self) -> None:
        super()._data_processing()
        if self._part is not None:
            self.inter_feat[PART_FIELD] = self._part  # last, as it is no field of RecBole's
        del self._part

    def _counts(self, frame: pd.DataFrame) -> Counts:
        users, items = (frame[str(field)].nunique() for field in (self.uid_field, self.iid_field))
        return Counts(len(frame), users, items)

    def _remove_duplication(self) -> None:
        """RecBole's, but equal times stay in the order of the file, so that "first" is well defined."""
        frame, time = self.inter_feat, self.time_field
        if time in frame:
            frame = frame.sort_values(time, kind="stable")
        self.inter_feat = frame.drop_duplicates([self.uid_field, self.iid_field], keep=self.config["rm_dup_inter"])

    def _filter_by_field_value(self) -> None:
        sides = self._sides if side_uses(self.config).filters else {}
        frames = {"inter": self.inter_feat, **sides}
        for field, wanted in self.config["val_interval"].items():
            found = [source for source, frame in frames.items() if field in frame]
            if not found:
                known = sorted({str(name) for frame in frames.values() for name in frame} - {PART_FIELD})
                raise DataError(
                    f"val_interval.{field}: no such column in the .inter file, and none of .user and .item unless "
                    f"filter_inter_by_user_or_item is on (there are {', '.join(known)})"
                )
            for source in found:
                kind = self.field2type.get(field) or self._side_types[field]
                frames[source] = frames[source][self._within(frames[source][field], kind, wanted)]
        self.inter_feat = frames.pop("inter").copy()
        self._sides = {**self._sides, **frames}

    def _within(self, column: pd.Series, kind: FeatureType, wanted: Any) -> np.ndarray:
        name = f"val_interval.{column.name}"
        if kind == FeatureType.FLOAT:
            return np.asarray(self._within_intervals(column.to_numpy(), parse_intervals(wanted, name)))
        if kind != FeatureType.TOKEN:
            raise DataError(f"{name}: the column has type {kind.value}; only token and float columns can filter")
        if not isinstance(wanted, (list, tuple)):
            raise DataError(f"{name}={wanted!r}: the column has type token, so write a list of the values to keep")
        return column.isin([str(value) for value in wanted]).to_numpy()

    def _filter_inter_by_user_or_item(self) -> None:
        keep = np.ones(len(self.inter_feat), dtype=bool)
        for source, frame in self._sides.items():
            field = id_field(self.config, source)
            keep &= self.inter_feat[field].isin(frame[field]).to_numpy()
        self.inter_feat = self.inter_feat[keep].copy()

    def _parse_intervals_str(self, intervals_str: Any) -> Optional[List[Interval]]:
        return parse_intervals(intervals_str, "interval")

    def _keep_side_features(self) -> None:
        """user_feat and item_feat for the retriever: rows of other users and items would get ids of their own."""
        for source, frame in self._sides.items():
            field = id_field(self.config, source)
            rows = frame[frame[field].isin(self.inter_feat[field])]
            if rows.empty:
                raise DataError(f"no id of the .{source} file is in the log: do both write ids in the same way?")
            setattr(self, f"{source}_feat", rows.copy())
