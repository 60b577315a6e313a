"""What is in the data: the tables a paper prints, and the numbers that show whether the task is learnable."""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch
from torch import Tensor

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.lists import first_score

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MAX_SAMPLE = 2_000_000  # torch.quantile is limited to 16 M elements; a stride through more is as good


_MAX_REQUESTS = 500_000  # of a split; more are described by evenly spaced ones


def describe(splits: Dict[str, Any], catalogue: Catalogue, interactions: Optional[Interactions] = None) -> dict:
    """JSON-able statistics of the splits (name → RerankDataset), of raw retriever scores."""
    return {
        "dataset": _dataset(catalogue, interactions),
        **{name: _split(data) for name, data in splits.items()},
    }


def _dataset(catalogue: Catalogue, interactions: Optional[Interactions]) -> dict:
    table: Dict[str, float] = {"users": catalogue.n_users - 1, "items": catalogue.n_items - 1}
    if interactions is not None:
        table["interactions"] = len(interactions)
        table["clicks"] = int(interactions.click.sum())
        table["density"] = len(interactions) / max(1, table["users"] * table["items"])
    return table


def _split(data: Any) -> dict:
    table, rows = data.table, data.rows[:: max(1, len(data.rows) // _MAX_REQUESTS)]
    scores, mask, labels = first_score(table.scores[rows]), table.mask[rows], table.labels[rows]
    mask = mask & (scores >= 0)  # of several scores, the first may be missing
    scores = scores * mask
    retrieved = labels.sum(1)
    positives = table.n_positives[rows].long()
    spread = _spread(scores, mask)
    return {
        "requests": len(data),
        "requests_before_filter": int((table.split == table.split[rows[0]]).sum()) if len(rows) else 0,
        "users": len(torch.unique(table.users[data.rows])),
        "candidates_per_request": _mean(mask.sum(1)),
        "positives_per_request": _mean(positives),
        "retrieved_positives_per_request": _mean(retrieved),
        "share_with_retrieved_positive": _mean(retrieved > 0),
        "candidates_recall": float(retrieved.sum() / positives.sum().clamp(min=1)),
        "history_length": _mean((table.history_end - table.history_begin)[rows].clamp(max=table.history_length)),
        "score_spread_in_request": _mean(spread),
        "scores_of_positives": _distribution(scores[mask & labels]),
        "scores_of_negatives": _distribution(scores[mask & ~labels]),
    }


def _spread(scores: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of the scores inside each request, [R]."""
    count = mask.sum(1).clamp(min=1)
    mean = scores.sum(1) / count  # scores are 0 at padding
    return (((scores - mean[:, None]) * mask).square().sum(1) / count).sqrt()


def _distribution(values: Tensor) -> Optional[dict]:
    if not len(values):
        return None
    sample = values[:: -(-len(values) // _MAX_SAMPLE)]
    quantiles = torch.quantile(sample, torch.tensor(QUANTILES)).tolist()
    out = {"mean": _mean(values), "std": float(values.std(unbiased=False))}
    out.update({f"q{round(100 * q):02d}": value for q, value in zip(QUANTILES, quantiles)})
    return out


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


def format_statistics(statistics: dict) -> str:
    """The statistics as an aligned text table, one column per split."""
    lines = ["  ".join(f"{name} {_number(value)}" for name, value in statistics["dataset"].items())]
    splits = {name: _flat(table) for name, table in statistics.items() if name != "dataset"}
    names = list(next(iter(splits.values())))
    width = max(map(len, names))
    lines.append(" " * width + "".join(f"{name:>12}" for name in splits))
    for name in names:
        lines.append(f"{name:<{width}}" + "".join(f"{_number(table.get(name)):>12}" for table in splits.values()))
    return "\n".join(lines)


def _flat(table: dict) -> dict:
    """Nested distributions in one level; their keys follow the name of the distribution."""
    out = {}
    for name, value in table.items():
        if isinstance(value, dict):
            out.update({f"{name} {key}": v for key, v in value.items()})
        else:
            out[name] = value
    return out


def _number(value: Optional[float]) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
