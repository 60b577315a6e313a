"""The model card of an artefact."""

from __future__ import annotations

from typing import Dict

from dnr_recbole._version import __version__
from dnr_recbole.artefact.contents import Artefact


def model_card(artefact: Artefact) -> str:
    """README.md of an artefact."""
    metrics, config = artefact.metrics, artefact.config
    name = type(artefact.model).__name__
    backbone = f" around {config['backbone']}" if getattr(type(artefact.model), "wraps_backbone", False) else ""
    lines = [
        f"# {name}{backbone}",
        "",
        f"A reranker of dnr_recbole {__version__}, trained on `{metrics.get('dataset', '?')}`: "
        f"{len(artefact.preprocessor.items.ids):,} items, {len(artefact.preprocessor.users.ids):,} users; scores read: "
        f"{', '.join(artefact.preprocessor.columns.scores)}; lists of up to {artefact.preprocessor.n_candidates}.",
        "",
        "```python",
        "from dnr_recbole import Reranker",
        "",
        'top = Reranker.load("this/folder").rank(requests, k=6)   # a DataFrame: request_id, user_id, item_id, score',
        "```",
        "",
    ]
    test: Dict[str, float] = metrics.get("test") or {}
    if test:
        rows = {name: test, **(metrics.get("baselines") or {}), **(metrics.get("probes") or {})}
        shown = [m for m in test if not m.endswith("@1")][:8]
        lines += ["| test | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
        for row, values in rows.items():
            lines.append(f"| {row} | " + " | ".join(f"{values[m]:.4f}" if m in values else "–" for m in shown) + " |")
        lines.append("")
    for key in ("command", "git_commit", "seed"):
        if metrics.get(key) is not None:
            lines.append(f"- {key}: `{metrics[key]}`")
    lines.append("- `histories.safetensors`, `sample.parquet` and the users in `vocabulary.parquet` are personal data")
    return "\n".join(lines) + "\n"
