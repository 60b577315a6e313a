"""Where requests come from: each source is a class, registered by name, and the key ``source`` chooses.

A source of your own is registered in a module that the key ``plugins`` names::

    @register_source("my_source")
    class MySource(Source):
        def prepare(self, config, shared, files=None): ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional

import pandas as pd

from dnr_recbole.data.dataset import RerankData
from dnr_recbole.identity import FileDigests
from dnr_recbole.names import Names
from dnr_recbole.requestlog.preprocessor import Preprocessor
from dnr_recbole.retriever.lists import RetrievedLists


@dataclass(frozen=True)
class Prepared:
    """All that a source gives.

    Attributes:
        data: requests to train and to evaluate on.
        retriever_metrics: of the retriever, where the source has one.
        preprocessor: turns further requests into the same tensors; None where there can be none (a generated world).
        retrieved: what the retriever would give each user now; None without a retriever.
        notes: how the source's data were treated, in words.
        sample: some held-out requests in the canonical long form, with the scores as they came.
    """

    data: RerankData
    retriever_metrics: Dict[str, float] = field(default_factory=dict)
    preprocessor: Optional[Preprocessor] = None
    retrieved: Optional[Callable[[], RetrievedLists]] = None
    sample: Optional[Callable[[], pd.DataFrame]] = None
    notes: List[str] = field(default_factory=list)


class Source:
    """One way to get requests."""

    def check(self, config) -> None:
        """Raises:
        ConfigError: a key is missing or cannot be honoured; called before anything else happens.
        """

    def files(self, config) -> FileDigests:
        """Digests of the files that the numbers of a run depend on, by stage and name."""
        return {}

    def shared(self, config, files: Optional[FileDigests] = None) -> Any:
        """What does not depend on the reranker, so that several rerankers need it made once only."""
        return None

    def prepare(self, config, shared: Any, files: Optional[FileDigests] = None) -> Prepared:
        """Everything that a run needs; ``files`` are the :meth:`files` of the run, if they are known."""
        raise NotImplementedError


SOURCES: Names[type] = Names("source", "source")


def register_source(name: str) -> Callable[[type], type]:
    """Class decorator: the class becomes ``source: name``."""
    return SOURCES.register(name)


def get_source(config) -> Source:
    """The source of a run.

    Raises:
        UnknownNameError: nobody registered it.
    """
    from dnr_recbole.sources import log, recbole, synthetic  # noqa: F401  (they register themselves)

    return SOURCES.find(config["source"])()
