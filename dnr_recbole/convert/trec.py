"""TREC: a run ``qid Q0 doc rank score tag`` and its judgements ``qid 0 doc grade``."""

from __future__ import annotations

from typing import Dict

from dnr_recbole.convert import Option, Request, converter
from dnr_recbole.convert.lines import read_lines, refuse
from dnr_recbole.errors import ConfigError


@converter("trec", "RUN QRELS", [Option("threshold", 1.0, "grades from this on are relevant")])
def trec(inputs, options, counts):
    """A query is a request; a document that nobody judged counts as not relevant, and is counted."""
    if len(inputs) != 2:
        raise ConfigError(f"trec needs a run and a qrels file, not {len(inputs)} files")
    run, qrels = inputs
    grades: Dict[tuple, float] = {}
    for number, line in read_lines(qrels):
        parts = line.split()
        try:
            query, _, document, grade = parts
            grades[query, document] = float(grade)
        except ValueError:
            refuse(qrels, number, "a line of qrels must look like '301 0 DOC-1 1'", line)
    query, rows, done = None, [], set()
    for number, line in read_lines(run):
        parts = line.split()
        try:
            name, _, document, _, score, _ = parts
            score = float(score)
        except ValueError:
            refuse(run, number, "a line of a run must look like '301 Q0 DOC-1 1 14.9 tag'", line)
        if name != query:
            if name in done:
                refuse(run, number, f"query {name} stands in two places: sort the run by query")
            if rows:
                yield _request(query, rows, grades, options["threshold"], counts)
            done.add(name)
            query, rows = name, []
        rows.append((document, score))
    if rows:
        yield _request(query, rows, grades, options["threshold"], counts)


def _request(query, rows, grades, threshold, counts) -> Request:
    found = [grades.get((query, document)) for document, _ in rows]
    unjudged = sum(grade is None for grade in found)
    if unjudged:
        counts.skip("documents without a judgement, taken as not relevant", unjudged)
    columns = {
        "item_id": [document for document, _ in rows],
        "score": [score for _, score in rows],
        "label": [int(grade is not None and grade >= threshold) for grade in found],
    }
    return Request(query, columns)
