"""RecBole's atomic files, through a retriever and a protocol."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from dnr_recbole.data.candidate_table import CandidateTable
from dnr_recbole.data.dataset import build_rerank_data, load_candidates
from dnr_recbole.data.feasibility import check_feasible
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.loading import file_digests, load_recbole_dataset
from dnr_recbole.identity import FileDigests
from dnr_recbole.requestlog.decoding import SCORE, Columns
from dnr_recbole.requestlog.held_out import sample_frame, sample_rows
from dnr_recbole.requestlog.preprocessor import Histories, Preprocessor, Vocabulary
from dnr_recbole.retriever.calibration import Calibration
from dnr_recbole.retriever.lists import retrieve_now
from dnr_recbole.retriever.retrieval import Retrieval
from dnr_recbole.retriever.training import train_retriever
from dnr_recbole.sources import Prepared, Source, register_source


@dataclass(frozen=True)
class Candidates:
    """Stage 1 and what it retrieved: all that does not depend on the reranker."""

    dataset: Any
    interactions: Interactions
    retrieval: Retrieval
    table: CandidateTable
    files: FileDigests


@register_source("recbole")
class RecBole(Source):
    """A dataset by name; the retriever is fitted on its part of the log, the protocol makes requests of the rest."""

    def files(self, config) -> FileDigests:
        return file_digests(config)

    def shared(self, config, files: Optional[FileDigests] = None) -> Candidates:
        files = file_digests(config) if files is None else files
        dataset = load_recbole_dataset(config)
        interactions = Interactions.from_recbole(dataset, config)
        check_feasible(config, interactions)
        retrieval = train_retriever(config, dataset, interactions, files)
        return Candidates(dataset, interactions, retrieval, load_candidates(config, interactions, retrieval), files)

    def prepare(self, config, shared: Candidates, files: Optional[FileDigests] = None) -> Prepared:
        made = shared
        data = build_rerank_data(config, made.dataset, made.interactions, made.retrieval, made.table)
        ids = preprocessor(config, made.dataset, made.interactions)
        return Prepared(
            dataclasses.replace(data, files=made.files if files is None else files),
            made.retrieval.metrics,
            ids,
            lambda: retrieve_now(made.retrieval, made.interactions, config["n_candidates"], config["repeatable"]),
            lambda: sample_frame(ids, data.test, made.table.scores[sample_rows(data.test)].unsqueeze(-1)),
        )


def preprocessor(config, dataset, interactions: Interactions) -> Preprocessor:
    """For requests in the dataset's own ids, with the retriever's x as their score; histories end with the log."""
    fields = dataset.uid_field, dataset.iid_field
    ids = {field: [str(token) for token in dataset.field2id_token[field][1:]] for field in fields}
    kept = np.ones(len(interactions), dtype=bool)
    if config["history_feedback"] == "positive":
        kept = interactions.click
    count = np.bincount(interactions.user[kept], minlength=interactions.n_users)
    return Preprocessor(
        columns=Columns([SCORE], []),
        users=Vocabulary(ids[dataset.uid_field]),
        items=Vocabulary(ids[dataset.iid_field]),
        calibrations=[Calibration()],
        normalization=config["score_normalization"],
        n_candidates=config["n_candidates"],
        history_length=config["history_length"],
        histories=Histories(np.concatenate([[0], np.cumsum(count)]), interactions.item[kept].astype(np.int32)),
    )
