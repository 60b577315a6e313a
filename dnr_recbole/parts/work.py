"""What a process of the cluster does: look at the request ids of a block, rank a part."""

from __future__ import annotations

import functools
import json
import os
import socket
from dataclasses import dataclass
from typing import Any, Dict, NamedTuple, Optional

import pyarrow as pa
import pyarrow.parquet as pq

from dnr_recbole._version import __version__
from dnr_recbole.artefact import Artefact, artefact_digest, load_artefact
from dnr_recbole.errors import CheckpointError, DataError, DnrError
from dnr_recbole.files import atomic_write
from dnr_recbole.identity import CODE_VERSIONS
from dnr_recbole.parts.inputs import Part
from dnr_recbole.ranking import as_table, output_schema, rank_requests, requests_of
from dnr_recbole.requestlog.problems import Problems
from dnr_recbole.requestlog.row_ranges import Runs, runs_of

_KEY = b"dnr_recbole"  # of what a part file says of itself


@dataclass(frozen=True)
class Job:
    """What all parts have in common.

    Attributes:
        root: folder of the inputs.
        artefact: folder of the model.
        model: digest of it.
        k: candidates per request; None = all.
        output: folder of the part files.
    """

    root: str
    artefact: str
    model: str
    k: Optional[int]
    output: str

    @property
    def made_with(self) -> Dict[str, Any]:
        """What a part's content depends on beside its rows."""
        code = {stage: CODE_VERSIONS[stage] for stage in ("source", "reranker")}
        return {"model": self.model, "k": self.k, "code": code}


class Counts(NamedTuple):
    """What went into a part file and what came out.

    Attributes:
        rows: of the inputs.
        requests: of the inputs, those without a candidate included.
        ranked: rows of the file.
    """

    rows: int
    requests: int
    ranked: int


def look_at(job: Job, part: Part) -> Runs:
    """The runs of request ids in a block."""
    return runs_of(part.source(job.root))


def rank_part(job: Job, part: Part, name: str) -> Counts:
    """Write the part file ``name``, whole or not at all, unless it is there.

    Raises:
        DataError: its requests cannot be read, or a file has changed.
        CheckpointError: the model has changed.
        DnrError: the code here is another one than the command's.
    """
    path, identity = os.path.join(job.output, name), part.identity(job.made_with)
    if identity not in name:
        raise DnrError(f"{socket.gethostname()} has another version of dnr_recbole ({__version__}) than the command")
    there = counts_of(path, identity)  # made by a process that died before it could say so
    if there is not None:
        return there
    model, source, problems = _model(job.artefact, job.model), part.source(job.root), Problems()
    list_form, rows, requests, ranked = source.list_form, 0, 0, 0
    with atomic_write(path) as file, pq.ParquetWriter(file, output_schema(source)) as writer:
        for found in requests_of(model, source, problems):
            problems.raise_fatal(source.name)
            frame = rank_requests(model, found, job.k)
            writer.write_table(as_table(frame, writer.schema))
            rows += len(found) if list_form else len(found.batch.row)
            requests, ranked = requests + len(found), ranked + len(frame)
        if rows != part.rows:
            raise DataError(f"{part}: {rows:,} rows were read instead of {part.rows:,}: has the file changed?")
        counts = Counts(rows, requests, ranked)
        writer.add_key_value_metadata({_KEY: json.dumps({"identity": identity, **counts._asdict()})})
    return counts


def counts_of(path: str, identity: str) -> Optional[Counts]:
    """What a part file says of itself; None if it is not there, damaged, or of another part."""
    try:
        with pq.ParquetFile(path) as file:
            said = json.loads((file.metadata.metadata or {})[_KEY])
            whole = said.pop("identity") == identity and file.metadata.num_rows == said["ranked"]
            return Counts(**said) if whole else None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


@functools.lru_cache(maxsize=1)
def _model(path: str, digest: str) -> Artefact:
    """The model, read once in a process."""
    found = load_artefact(path)
    if artefact_digest(path) != digest:  # afterwards, so that it is this one that was read
        raise CheckpointError(f"'{path}' was replaced since the command began: give it again")
    return found
