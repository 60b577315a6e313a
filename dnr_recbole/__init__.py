"""Neural re-ranking for two-stage recommender systems on top of RecBole.

The names in ``__all__`` are the public promise. They are imported when they are first used, so that ``import
dnr_recbole`` costs nothing and changes nothing in other libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

from dnr_recbole import _deprecated
from dnr_recbole._version import __version__

_deprecated.install()

_HOMES = {
    "DnrError": "dnr_recbole.errors",
    "RequestLog": "dnr_recbole.requestlog.request_log",
    "Reranker": "dnr_recbole.reranker",
    "run_dnr": "dnr_recbole.quick_start",
}
__all__ = ["DnrError", "RequestLog", "Reranker", "__version__", "run_dnr"]

if TYPE_CHECKING:
    from dnr_recbole.errors import DnrError
    from dnr_recbole.quick_start import run_dnr
    from dnr_recbole.requestlog.request_log import RequestLog
    from dnr_recbole.reranker import Reranker


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dnr_recbole' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> List[str]:
    return sorted([*globals(), *__all__])
