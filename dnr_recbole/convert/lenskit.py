"""LensKit's collections of item lists in parquet: native (a list of structs per row) or flat (a row per item)."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Tuple

import pyarrow as pa
import pyarrow.parquet as pq

from dnr_recbole.convert.lines import unreadable
from dnr_recbole.convert.recommendations import NO_FEATURES, Positives, flat_lists, label_lists, positives_of
from dnr_recbole.convert.registry import Counts, converter, feature_names
from dnr_recbole.convert.tables import ROW, UNREADABLE, Group, Source
from dnr_recbole.errors import ConfigError, DataError

_LISTS = 256  # rows of a native file that are read at once


@converter("lenskit", "RECOMMENDATIONS.parquet [TRUTH.parquet]", most=2)
def lenskit(inputs, options, counts):
    """A list is a request. Labels are in the file (column or field label), or come from a second file of either form,
    whose items are all positive; it is held in memory. A flat file cannot hold an empty list."""
    recommended, *truth = map(_Lists, inputs)
    if not truth and not recommended.has("label"):
        raise ConfigError(f"lenskit: '{recommended.path}' has no 'label': give the held-out items as a second file")
    if not recommended.has("score") and not recommended.has("rank"):
        raise DataError(f"'{recommended.path}' has neither score nor rank: there is no incoming order")
    positives = truth[0].positives(counts) if truth else None
    yield from label_lists(recommended.lists(counts), positives, counts, recommended.place)


class _Lists:
    """A file of either form; a list is known by its key columns, of which one must be there.

    Raises:
        DataError: it cannot be read, or has no lists.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            schema = pq.read_schema(path)
            names = schema.names
        except UNREADABLE as error:
            raise unreadable(path, error) from None
        self.native = "items" in names
        if not self.native:
            self.source = Source(path)
            self.source.need(["user_id", "item_id"])
            return
        kind = schema.field("items").type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
            raise DataError(f"'{path}': items must be lists of structs, not {kind}")
        self.fields = [field.name for field in kind.value_type]
        self.keys = [name for name in schema.names if name != "items"]
        if "item_id" not in self.fields or not self.keys:
            raise DataError(f"'{path}' needs a key column beside items, and item_id in them")

    def has(self, name: str) -> bool:
        """Whether there is such a column or field of items."""
        return name in (self.fields if self.native else self.source.names)

    def place(self, group: Group) -> str:
        """Where a list begins."""
        return f"'{self.path}', row {group[ROW][0]}"

    def positives(self, counts: Counts) -> Positives:
        """All items of all lists."""
        if not self.native:
            return positives_of(self.source, "user_id", counts)
        return {name: set(group["item_id"]) for name, group, _ in self.lists(counts)}

    def lists(self, counts: Counts) -> Iterator[Tuple[str, Group, Dict[str, str]]]:
        """(key, columns, features: name in the file -> column)."""
        if not self.native:
            yield from flat_lists(self.source, "user_id", counts)
            return
        extra = [name for name in self.fields if name not in NO_FEATURES]
        renamed = feature_names(extra, counts)
        for number, record in enumerate(self._records(), 1):
            items: List[Dict[str, Any]] = record.pop("items") or []
            counts.rows += 1
            group: Group = {name: [item[name] for item in items] for name in self.fields}
            group["item_id"] = [self._id(value, number) for value in group["item_id"]]
            for name in ("score", "rank", "label", *(name for name in extra if name.startswith("score_"))):
                if name in group:
                    group[name] = [_number(value) for value in group[name]]
            if "user_id" in record:
                group["user_id"] = [self._id(record["user_id"], number)]
            group[ROW] = [number]
            yield "|".join(self._id(record[key], number) for key in self.keys), group, renamed

    def _records(self) -> Iterator[Dict[str, Any]]:
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=_LISTS):
                    yield from batch.to_pylist()
        except UNREADABLE as error:
            raise unreadable(self.path, error) from None

    def _id(self, value: Any, row: int) -> str:
        if value is None or value == "" or value != value:
            raise DataError(f"'{self.path}', row {row}: an id is missing")
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _number(value: Any) -> Optional[float]:
    return None if value is None or value != value else float(value)
