"""Pages for people, and the held-out requests that they show."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List

import pyarrow as pa

from dnr_recbole._version import __version__
from dnr_recbole.artefact import Artefact
from dnr_recbole.requestlog.columns import numbers

_PAGE = Path(__file__).with_name("page.html")
_SAMPLE = 50  # held-out requests that the page offers


@lru_cache(maxsize=None)
def page() -> str:
    """The page at ``/``."""
    return _PAGE.read_text(encoding="utf-8")


def sample_requests(artefact: Artefact) -> List[Dict[str, Any]]:
    """The first held-out requests: a request's body with the items' labels under ``clicked``."""
    frame = artefact.sample
    if frame is None:
        return []
    preprocessor, out = artefact.preprocessor, []
    read = [*preprocessor.columns.scores, *preprocessor.columns.features]
    encoders = preprocessor.log_features.encoders
    as_numbers = [name for name in encoders if name in frame and encoders[name].kind == "number"]
    frame = frame.assign(**{name: numbers(pa.array(frame[name], from_pandas=True)).values for name in as_numbers})
    for name, rows in frame.groupby("request_id", sort=False):
        first = rows.iloc[0]
        user, history = first.get("user_id"), first.get("history")
        out.append({
            "request": {
                "request_id": str(name),
                "user_id": None if user is None or user != user else str(user),
                "history": None if history is None else [str(item) for item in history],
                "items": [
                    {"item_id": str(row["item_id"]), **{name: json_value(row.get(name)) for name in read}}
                    for row in rows.to_dict("records")
                ],
            },
            "clicked": [str(item) for item, label in zip(rows["item_id"], rows["label"]) if label > 0],
        })  # fmt: skip
        if len(out) == _SAMPLE:
            break
    return out


def json_value(value: Any) -> Any:
    """A score, a feature or a metric as JSON has it; NaN and infinity are missing."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [json_value(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else str(value)


def interface(document: Dict[str, Any]) -> str:
    """The OpenAPI document for people, without the network that the usual viewers load their scripts from."""
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = operation.get("description") or operation.get("summary", "")
            rows.append(f"<tr><td><code>{method.upper()} {path}</code><td>{text}")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Interface</title>"
        "<style>body{font:16px system-ui;margin:2rem;color-scheme:light dark}"
        "td{padding:.3rem 1rem;vertical-align:top}</style>"
        f"<h1>dnr_recbole {__version__}</h1><p>Machine-readable: <a href=openapi.json>openapi.json</a>."
        f"<table>{''.join(rows)}</table></html>"
    )
