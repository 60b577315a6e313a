"""The log as one object: what :meth:`Reranker.fit` takes, and what ``validate`` reports on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import pyarrow as pa

from dnr_recbole.config_schema import Keys
from dnr_recbole.errors import DataError
from dnr_recbole.identity import FileDigests, file_digest
from dnr_recbole.log_names import ITEM, USER
from dnr_recbole.logs import shows_progress
from dnr_recbole.requestlog.columns import Tokens, is_list, numbers, plain, tokens
from dnr_recbole.requestlog.decoding import Requests, decode
from dnr_recbole.requestlog.problems import Problems, shorten
from dnr_recbole.requestlog.progress import watched
from dnr_recbole.requestlog.reading import Source, Table, read_batches
from dnr_recbole.requestlog.scan import Scan, in_order, scan

VECTOR = "vector"


@dataclass
class RequestLog:
    """Requests of one's own, with what is known of users and items beside them.

    Attributes:
        requests: the log, a :class:`~dnr_recbole.requestlog.reading.Source`.
        users, items: side tables with a column user_id, item_id; None = nothing is known.
        item_vectors: a table item_id, vector (a list of numbers): a space in which items are compared.
    """

    requests: Source
    users: Optional[Source] = None
    items: Optional[Source] = None
    item_vectors: Optional[Source] = None

    @classmethod
    def read(
        cls, requests: Table, users: Optional[Table] = None, items: Optional[Table] = None,
        item_vectors: Optional[Table] = None, encoding: str = "utf-8",
    ) -> RequestLog:  # fmt: skip
        """A log in files: parquet, feather, CSV or TSV (also gzipped). Only headers are read now.

        Args:
            requests: one row per candidate, or one per request with lists; docs/logs.md lists the columns.
            users, items: side tables, one row per user_id, item_id.
            item_vectors: a table item_id, vector.
            encoding: of text files.

        Raises:
            DataError: a file is missing or cannot be read.
        """
        others = (None if table is None else Source(table, encoding) for table in (users, items, item_vectors))
        return cls(Source(requests, encoding), *others)

    from_pandas = read  # the same for DataFrames; any of the tables may be either

    @classmethod
    def of(cls, config: Keys) -> RequestLog:
        """The log that the keys ``requests``, ``users_file``, ``items_file`` and ``item_vectors`` name."""
        return cls.read(
            config["requests"],
            config["users_file"],
            config["items_file"],
            config["item_vectors"],
            config["encoding"] or "utf-8",
        )

    @property
    def name(self) -> str:
        """Of the requests' file, or "DataFrame"."""
        return self.requests.name

    def scan(self, config: Keys, labelled: bool = True) -> Tuple[Scan, Source]:
        """What one pass finds, and the log with the rows of each request together."""
        found = scan(self.requests, config, labelled)
        if found.together:
            return found, self.requests
        source = in_order(self.requests, found)
        if source is not self.requests:
            found = scan(source, config, labelled)
            found.problems.add(
                "the rows of a request do not stand together: put in order in memory",
                "request_id", count=len(found), fatal=False,
            )  # fmt: skip
            if not found.together:
                raise DataError(f"{self.name}: a request id stands for several requests")
        return found, source

    def decoded(self, source: Source, found: Scan, config: Keys, labelled: bool = True) -> Iterator[Requests]:
        """The log's requests, batch by batch; problems have been found by :meth:`scan`."""
        names, problems = found.columns.all(source.schema.names), Problems()
        for batch in watched(read_batches(source, names), len(found), "Convert", shows_progress(config)):
            yield decode(batch, found.columns, problems, labelled, bounded=False, checked=True)

    def digests(self) -> FileDigests:
        """sha256 of each file that is read, by stage and name; none for tables in memory."""
        files = {source.path.name: file_digest(source.path) for source in self._sources() if source.path is not None}
        return {"source": files} if files else {}

    def _sources(self) -> List[Source]:
        return [each for each in (self.requests, self.users, self.items, self.item_vectors) if each is not None]


def side_table(
    source: Optional[Source], side: str, wanted: Union[str, Sequence[str]]
) -> Tuple[Tokens, Dict[str, pa.Array]]:
    """Ids and columns of a side table; ``wanted`` is a list of names or "*".

    Raises:
        DataError: a column is missing, an id is missing or stands twice.
    """
    key = {"user": USER, "item": ITEM}[side]
    if source is None:
        return Tokens(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=object)), {}
    names = source.schema.names
    if key not in names:
        raise DataError(f"'{source.name}' has no column '{key}' (it has {', '.join(names)})")
    chosen = [n for n in names if n != key] if wanted in ("*", None) else [n for n in wanted if n != key]
    missing = [name for name in chosen if name not in names]
    if missing:
        raise DataError(f"'{source.name}' has no column '{missing[0]}' (load_col.{side}): it has {', '.join(names)}")
    table = source.read([key, *chosen])
    ids = tokens(plain(table[key]))
    if (ids.codes < 0).any():
        raise DataError(f"'{source.name}', row {int(np.argmax(ids.codes < 0)) + 1}: the {key} is missing")
    if len(ids.values) < len(ids.codes):
        _, first = np.unique(ids.codes, return_index=True)
        again = int(np.setdiff1d(np.arange(len(ids.codes)), first)[0])
        raise DataError(f"'{source.name}', row {again + 1}: {key} {shorten(ids.values[ids.codes[again]])} stands twice")
    return ids, {name: plain(table[name]) for name in chosen}


def vectors(source: Source) -> Tuple[Tokens, np.ndarray]:
    """Ids and float32 [m, f] of a table of item vectors.

    Raises:
        DataError: there is no column of lists, or the lists differ in length or hold no numbers.
    """
    ids, columns = side_table(source, "item", [VECTOR] if VECTOR in source.schema.names else "*")
    found = [(name, column) for name, column in columns.items() if is_list(column.type)]
    if len(found) != 1:
        raise DataError(f"'{source.name}' needs one column of lists of numbers, called {VECTOR}")
    name, column = found[0]
    width = set(np.unique([len(each) for each in column.to_pylist() if each is not None]))
    values = numbers(plain(column).flatten()).values
    if len(width) != 1 or not np.isfinite(values).all() or column.null_count:
        raise DataError(f"'{source.name}', column {name}: every vector needs the same number of finite numbers")
    return ids, values.reshape(-1, width.pop()).astype(np.float32)


def describe_problems(found: Scan) -> str:
    """All problems, those that training refuses first."""
    lines: List[str] = [f"ERROR  {problem}" for problem in found.problems.fatal]
    lines += [f"note   {problem}" for problem in found.problems.notes]
    return "\n".join(lines)
