"""TREC: a run ``qid Q0 doc rank score tag`` and its judgements ``qid 0 doc grade``."""

from __future__ import annotations

import math
from typing import Dict, List, Tuple

from dnr_recbole.convert.lines import place, read_lines, refuse
from dnr_recbole.convert.registry import Counts, Option, Request, converter

Grades = Dict[str, Dict[str, float]]  # query -> document -> grade


@converter("trec", "RUN QRELS", [Option("threshold", 1.0, "grades from this on are relevant")], least=2, most=2)
def trec(inputs, options, counts):
    """A query is a request; a document that nobody judged counts as not relevant, and is counted. The score of the run
    is the incoming order: ranks, from 0 or 1, are not used. The judgements are held in memory."""
    run, qrels = inputs
    grades = _grades(qrels, counts)
    rows: List[Tuple[str, float]] = []
    begin, query = 0, ""
    for number, line in read_lines(run, counts):
        try:
            name, _, document, rank, text, _ = line.split()
            int(rank)
            score = float(text)
            if not math.isfinite(score):
                raise ValueError
        except ValueError:
            refuse(run, number, "a line of a run must look like '301 Q0 DOC-1 1 14.9 tag'", line)
        if rows and name != query:
            yield _request(query, rows, grades, options["threshold"], counts, place(run, begin))
            rows = []
        if not rows:
            begin, query = number, name
        rows.append((document, score))
    if rows:
        yield _request(query, rows, grades, options["threshold"], counts, place(run, begin))
    # What is left of the judgements belongs to queries that the run does not have.
    counts.skip("judged queries that are not in the run", len(grades))


def _grades(path: str, counts: Counts) -> Grades:
    grades: Grades = {}
    for number, line in read_lines(path, counts):
        try:
            query, _, document, text = line.split()
            grade = float(text)
        except ValueError:
            refuse(path, number, "a line of qrels must look like '301 0 DOC-1 1'", line)
        if grades.setdefault(query, {}).setdefault(document, grade) != grade:
            refuse(path, number, f"document {document} of query {query} has another grade before", line)
    return grades


def _request(query: str, rows, grades: Grades, threshold: float, counts: Counts, where: str) -> Request:
    judged = grades.pop(query, {})
    documents = [document for document, _ in rows]
    found = [judged.get(document) for document in documents]
    counts.take("documents without a judgement, taken as not relevant", sum(grade is None for grade in found))
    relevant = {document for document, grade in judged.items() if grade >= threshold}
    counts.skip("relevant documents that the run does not have", len(relevant.difference(documents)))
    columns = {
        "item_id": documents,
        "score": [score for _, score in rows],
        "label": [int(document in relevant) for document in documents],
    }
    return Request(query, columns, place=where)
