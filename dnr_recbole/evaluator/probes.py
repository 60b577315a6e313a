"""Model-free rankings, evaluated exactly like a model: what a result has to be compared with.

A protocol can hand out the answer. Where exposed items are added to the retriever's best, for instance, they
are the ones that the retriever ranked low, and sorting by its score *ascending* finds them without any model.
So every result table carries these probes, and a run warns when one of them beats the model.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Callable

import torch
from recbole.evaluator.register import smaller_metrics
from torch import Tensor

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import ConfigError
from dnr_recbole.evaluator.evaluator import CandidateEvaluator
from dnr_recbole.lists import first_score
from dnr_recbole.names import Names

MEANING = {
    "score_desc": "the retriever's own order is better than the reranked one, so reranking does harm here",
    "score_asc": "what the retriever scores low tends to be positive, so the scores betray the labels: the "
    "candidates are not what the retriever alone would return (as under `protocol: exposed`), and the result "
    "says little about reranking",
    "popularity_desc": "popularity alone ranks better, so the model is under-trained, over-fitted or lacks "
    "popularity as an input",
    "popularity_asc": "unpopular candidates tend to be positive, so the choice of candidates betrays the "
    "labels (as under `protocol: exposed`), and the result says little about reranking",
    "random": "the model is no better than chance",
}
PROBES = tuple(MEANING)
Ranking = Callable[[Slate, Catalogue], Tensor]  # -> [B, n], higher is better; must not read the labels
FURTHER: Names[Ranking] = Names("probe")
BEST = "bayes_optimal"  # no model can be expected to be better


def register_probe(name: str) -> Callable[[Ranking], Ranking]:
    """Decorator: ``rank(slate, catalogue)`` is evaluated beside every model; its docstring says what it means if it is
    the better one."""
    return FURTHER.register(name)


def probes(config, dataset, catalogue, item_counter=None, batch_size: int = 8192, truth=None) -> dict[str, OrderedDict]:
    """Metrics of every probe on one split, by probe name; arguments as of :func:`probe_evaluators`."""
    evaluators = probe_evaluators(config, dataset, catalogue, item_counter, batch_size, truth)
    return {name: evaluator.result() for name, evaluator in evaluators.items()}


def probe_names(dataset, truth=None) -> list[str]:
    """The probes of a split: one per score where there are several, and :data:`BEST` where the truth is known."""
    scores = dataset.slate(torch.arange(min(1, len(dataset)))).scores
    further = [f"score{number}_desc" for number in range(2, 1 + (scores.shape[2] if scores.dim() == 3 else 1))]
    return [*([] if truth is None else [BEST]), PROBES[0], *further, *PROBES[1:], *FURTHER]


def probe_evaluators(
    config, dataset, catalogue, item_counter=None, batch_size: int = 8192, truth=None
) -> dict[str, CandidateEvaluator]:
    """An evaluator of every probe that was given one split, by probe name; one per score where there are several.

    Args:
        config: as for CandidateEvaluator; ``seed`` fixes the random probe (default 0).
        dataset: has ``len()``, ``slate(rows) -> Slate`` and ``n_positives`` ``[R]``.
        catalogue: has ``n_items`` and ``item_popularity`` ``[n_items]``.
        item_counter: as for CandidateEvaluator.
        batch_size: requests scored at a time; does not change the result.
        truth: of a generated world: the best possible ranking becomes the probe :data:`BEST`.
    """
    best = None if truth is None else truth.probabilities(dataset)
    names = probe_names(dataset, truth)
    evaluators = {name: CandidateEvaluator(config, catalogue.n_items, item_counter) for name in names}
    generator = torch.Generator().manual_seed(int(config["seed"] or 0))
    n_positives = dataset.n_positives
    for start in range(0, len(dataset), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(dataset)))
        slate = dataset.slate(rows)
        popularity = catalogue.item_popularity.to(slate.candidates.device)[slate.candidates]
        rankings = {
            "score_desc": first_score(slate.scores),
            "score_asc": -first_score(slate.scores),
            **{name: slate.scores[..., int(name[5:-5]) - 1] for name in names if name[5:6].isdigit()},
            "popularity_desc": popularity,
            "popularity_asc": -popularity,
            **({} if best is None else {BEST: best[rows]}),
            "random": torch.rand(slate.candidates.shape, generator=generator),
            **{name: rank(slate, catalogue) for name, rank in FURTHER.items()},
        }
        for name, scores in rankings.items():
            evaluators[name].add_slate(scores, slate, n_positives[rows], rows)
    return evaluators


def beats(probe: Mapping, model: Mapping, metric: str) -> bool:
    """Whether a probe is better than the model on ``metric``."""
    for result, owner in ((model, "the model's result"), (probe, "the probe's result")):
        if metric not in result:
            raise ConfigError(f"metric {metric!r} is not in {owner}; it has: {', '.join(result)}")
    if metric.split("@")[0] in smaller_metrics:
        return probe[metric] < model[metric]
    return probe[metric] > model[metric]


def format_probe_table(
    model_result: Mapping,
    probe_results: Mapping[str, Mapping],
    metrics: Sequence[str] | None = None,
    model_name: str = "model",
) -> str:
    """Aligned plain text: one line for the model, one per probe or baseline; ``*`` marks values that beat the model's.

    Args:
        metrics: columns; default all that the model and the probes share.
    """
    if metrics is None:
        metrics = [m for m in model_result if all(m in result for result in probe_results.values())]
    lines = [["ranking by", *metrics], [model_name, *(f"{model_result[m]:.4f} " for m in metrics)]]
    for name, result in probe_results.items():
        lines.append([name, *(f"{result[m]:.4f}{'*' if beats(result, model_result, m) else ' '}" for m in metrics)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(metrics) + 1)]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    if any("*" in row for row in rows):
        rows.append("* better than the model")
    return "\n".join(row.rstrip() for row in rows)


def probe_warnings(model_result: Mapping, probe_results: Mapping[str, Mapping], metric: str) -> list[str]:
    """One sentence per probe or baseline that beats the model on ``metric``: by how much, and what that means."""
    return [
        f"WARNING: {f'no model, just {name},' if name in (*MEANING, *FURTHER) else name} gets {metric} "
        f"{result[metric]:.4f} against {model_result[metric]:.4f}: {_meaning(name)}."
        for name, result in probe_results.items()
        if name != BEST and beats(result, model_result, metric)
    ]


def _meaning(name: str) -> str:
    """What it says if this ranking is better than the model."""
    if name in FURTHER:
        return (inspect.getdoc(FURTHER[name]) or "a ranking without a model is better").split("\n")[0].rstrip(".")
    return MEANING.get(name, "trained on the same requests, it is the better choice")
