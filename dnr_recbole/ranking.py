"""Ranking requests with a trained model: tables in, tables out."""

from __future__ import annotations

from dataclasses import dataclass
from logging import getLogger
from typing import Callable, Dict, Iterator, NamedTuple, Optional

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from dnr_recbole.artefact import Artefact
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import DataError
from dnr_recbole.log_names import ITEM, ITEMS, REQUEST, USER
from dnr_recbole.requestlog.columns import is_list, tokens
from dnr_recbole.requestlog.decoding import Requests, check_header, decode
from dnr_recbole.requestlog.problems import Problems
from dnr_recbole.requestlog.reading import Source, read_batches, regrouped, starts_of
from dnr_recbole.requestlog.row_ranges import must_stand_together

SORTED_BYTES = 1 << 30  # a smaller file is read whole, so that rows of a request may stand apart
_REQUESTS = 2048  # scored at a time
Scorer = Callable[[Slate], np.ndarray]
OUTPUT = ("request_id", "user_id", "item_id", "rank", "rerank_score", "incoming_rank")


def requests_of(artefact: Artefact, source: Source, problems: Problems) -> Iterator[Requests]:
    """The requests of a table, checked.

    Raises:
        DataError: a column that the model reads is missing, or rows of one request stand apart.
    """
    names, columns = source.names, artefact.preprocessor.columns
    check_header(names, f"'{source.name}'", labelled=False, list_form_needs_request=not source.list_form)
    missing = [name for name in columns.scores if name not in names]
    if missing:
        have = ", ".join(names)
        raise DataError(f"'{source.name}' has no column '{missing[0]}', a score that the model reads (it has {have})")
    columns = type(columns)(columns.scores, [name for name in columns.features if name in names])
    absent = [name for name in artefact.preprocessor.columns.features if name not in names]
    if absent:
        getLogger(__name__).warning(
            f"'{source.name}' lacks features that the model reads: {', '.join(absent)} count as missing"
        )
    bounded = all(calibration.kind == "identity" for calibration in artefact.preprocessor.calibrations)
    for batch in read_batches(source, columns.all(source.schema.names)):
        yield decode(batch, columns, problems, labelled=False, bounded=bounded)


def together(source: Source) -> Source:
    """The table itself, or the same in memory with the rows of each request together.

    Raises:
        DataError: rows of a request stand apart in a file that is too large to be put in order.
    """
    if REQUEST not in source.names or source.list_form:
        return source
    if source.path is not None and source.path.stat().st_size >= SORTED_BYTES:
        must_stand_together(
            source, f"a file of {SORTED_BYTES >> 20:,} MiB or more is not put in order, write them one after another"
        )
        return source
    if source.table is None:
        source.table = source.read()
    codes = tokens(source.table[REQUEST]).codes
    return source if len(np.unique(codes)) == len(starts_of(codes)) else regrouped(source)


@torch.inference_mode()
def predict(artefact: Artefact, slate: Slate) -> np.ndarray:
    """Ranking scores float32 [R, n] of a batch of any size."""
    if artefact.scorer is not None:
        return artefact.scorer(slate)
    device = artefact.device
    parts = [slate.select(slice(start, start + _REQUESTS)).to(device) for start in range(0, len(slate), _REQUESTS)]
    return torch.cat([artefact.model.predict(part).float().cpu() for part in parts]).numpy()


class Ranked(NamedTuple):
    """The candidates of some requests, ranked: M values each, request by request, best first.

    Attributes:
        candidate: which candidate of the batch.
        owner: its request.
        rank: its place, from 0.
        score: the reranker's; NaN behind ``n_candidates``.
        incoming: its place in the incoming order.
    """

    candidate: np.ndarray
    owner: np.ndarray
    rank: np.ndarray
    score: np.ndarray
    incoming: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """Requests as arrays and a slate, made once however often they are scored.

    Attributes:
        found: the requests.
        arrays: of :meth:`~dnr_recbole.requestlog.preprocessor.Preprocessor.arrays`.
        some: int64, the requests that have a candidate.
        slate: of these; None if there is none.
    """

    found: Requests
    arrays: Dict[str, np.ndarray]
    some: np.ndarray
    slate: Optional[Slate]

    def ranked(self, scorer: Scorer) -> Ranked:
        """All candidates in the order of a scorer: slate → ranking scores float32 [R, n].

        Candidates behind ``n_candidates``, which the model does not read, follow in the incoming order without a score.
        """
        ptr, owner = self.found.batch.ptr, self.found.batch.owner
        place = np.arange(len(owner)) - np.repeat(ptr[:-1], np.diff(ptr))
        incoming = np.empty(len(owner), dtype=np.int64)
        incoming[self.found.incoming_order()] = place
        score = np.full(len(owner), np.nan, dtype=np.float32)
        if self.slate is not None:
            real = self.arrays["mask"][self.some]
            score[self.arrays["origin"][self.some][real]] = scorer(self.slate)[real]
        order = np.lexsort((incoming, -np.where(np.isnan(score), -np.inf, score), owner))
        return Ranked(order, owner[order], place, score[order], incoming[order])


def prepare(artefact: Artefact, found: Requests) -> Prepared:
    """Requests ready to be scored."""
    arrays, slate = artefact.preprocessor.arrays(found), None
    some = np.flatnonzero(arrays["mask"].any(1))
    if len(some):
        slate = artefact.preprocessor.slate(found, arrays)
        slate = slate if len(some) == len(found) else slate.select(torch.from_numpy(some))
    return Prepared(found, arrays, some, slate)


def rank_requests(artefact: Artefact, found: Requests, k: Optional[int] = None) -> pd.DataFrame:
    """The candidates of some requests in their new order; columns :data:`OUTPUT`.

    Args:
        k: the first k of each request; None = all. A request of fewer has fewer.
    """
    ranked = prepare(artefact, found).ranked(lambda slate: predict(artefact, slate))
    if k is not None:
        ranked = Ranked(*(values[ranked.rank < k] for values in ranked))
    ids = _original(found, len(found))
    return pd.DataFrame({
        "request_id": ids["request_id"][ranked.owner],
        "user_id": ids["user_id"][ranked.owner],
        "item_id": found.batch.per_candidate[ITEM].take(pa.array(ranked.candidate)).to_pandas(),
        "rank": ranked.rank,
        "rerank_score": ranked.score,
        "incoming_rank": ranked.incoming,
    })  # fmt: skip


def _original(found: Requests, n: int) -> Dict[str, np.ndarray]:
    """Ids of requests and users as they came: numbers stay numbers."""
    out = {}
    for name, texts in ((REQUEST, found.batch.request), (USER, found.user)):
        column = found.batch.per_request.get(name)
        out[name] = texts.texts() if column is None else column.to_pandas().to_numpy()
        assert len(out[name]) == n
    return out


def rank_table(
    artefact: Artefact, source: Source, k: Optional[int] = None, problems: Optional[Problems] = None
) -> Iterator[pd.DataFrame]:
    """All requests of a table, batch by batch.

    Args:
        problems: gets what was treated, as requests without a candidate, and how often.

    Raises:
        DataError: the table has a problem that makes its requests unreadable.
    """
    problems = Problems() if problems is None else problems
    for found in requests_of(artefact, source, problems):
        problems.raise_fatal(source.name)
        yield rank_requests(artefact, found, k)


def empty_ranking() -> pd.DataFrame:
    """No request."""
    return pd.DataFrame({name: [] for name in OUTPUT})


def output_schema(source: Source) -> pa.Schema:
    """Types of a ranking's columns in a file: ids as in the table, however many of a batch are missing."""
    schema = source.schema
    kinds = {"rank": pa.int64(), "rerank_score": pa.float32(), "incoming_rank": pa.int64()}
    for name in (REQUEST, USER, ITEM):
        kinds[name] = _id_type(schema.field(name).type) if name in schema.names else pa.null()
    if REQUEST not in schema.names:  # requests are numbered
        kinds[REQUEST] = pa.string()
    if ITEMS in schema.names and is_list(schema.field(ITEMS).type):
        inside = {field.name: field.type for field in schema.field(ITEMS).type.value_type}
        kinds[ITEM] = _id_type(inside.get(ITEM, pa.null()))
    return pa.schema([(name, kinds[name]) for name in OUTPUT])


def _id_type(kind: pa.DataType) -> pa.DataType:
    """The type of ids in a file, of those that pandas gives back."""
    if is_list(kind) or pa.types.is_dictionary(kind):
        return _id_type(kind.value_type)
    return pa.string() if pa.types.is_large_string(kind) else kind


def as_table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """A ranking with the columns' types in a file."""
    return pa.Table.from_pandas(frame, preserve_index=False).cast(schema)
