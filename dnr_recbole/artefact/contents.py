"""What an artefact holds, in memory and as `config.json`; and that of a finished run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Union

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict

from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import DnrError
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.growth import grown
from dnr_recbole.requestlog.preprocessor import Preprocessor
from dnr_recbole.retriever.lists import RetrievedLists
from dnr_recbole.trainer.checkpoint import SavedConfig, load_reranker

if TYPE_CHECKING:
    from dnr_recbole.sources import Prepared

FORMAT = 1
_METRICS = ("test", "probes", "baselines", "best_valid", "statistics", "retriever", "command", "git_commit", "versions",
            "seed", "identity", "data", "files", "dataset", "seconds", "epochs")  # fmt: skip


class Content(BaseModel):
    """``config.json``."""

    model_config = ConfigDict(extra="allow")

    format: int
    written_by: str
    model: str
    config: Dict[str, Any]
    catalogue: Dict[str, Any]
    sha256: Dict[str, str]


@dataclass
class Artefact:
    """A model ready to rank, and what belongs to it.

    Attributes:
        model: in eval mode.
        config: its keys.
        catalogue: shapes of its tables.
        preprocessor: turns requests into slates.
        metrics: what was measured when it was trained.
        sample: held-out requests in the canonical long form, or None.
        retrieved: candidates of each user, or None.
        scorer: ranks in the place of the model, slate → scores float32 ``[R, n]``; None = the model itself.
    """

    model: AbstractReranker
    config: SavedConfig
    catalogue: Dict[str, Any]
    preprocessor: Preprocessor
    metrics: Dict[str, Any] = field(default_factory=dict)
    sample: Optional[pd.DataFrame] = None
    retrieved: Optional[RetrievedLists] = None
    scorer: Optional[Callable[[Slate], np.ndarray]] = None

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.model.state_dict().values())).device


def artefact_of_run(row: Dict[str, Any], prepared: Prepared, device: Union[str, torch.device] = "cpu") -> Artefact:
    """The artefact of a finished run.

    Args:
        row: its result row; names the checkpoint.
        prepared: data of the run.
        device: where the model is to be.

    Raises:
        DnrError: the source's requests cannot be described to others, as those of a generated world.
    """
    if prepared.preprocessor is None:
        raise DnrError("a generated world has no ids of its own: nothing could be ranked with an artefact of it")
    model, config = load_reranker(row["checkpoint"], device)
    catalogue = prepared.data.catalogue.shapes()
    n_users, n_items = len(prepared.preprocessor.users), len(prepared.preprocessor.items)
    if (n_users, n_items) != (catalogue["n_users"], catalogue["n_items"]):  # RecBole has no row for unknown ids
        model, catalogue = grown(model, config, catalogue, n_users, n_items)
    return Artefact(
        model=model,
        config=config,
        catalogue=catalogue,
        preprocessor=prepared.preprocessor,
        metrics={**{name: row[name] for name in _METRICS if name in row}, "notes": prepared.notes},
        sample=None if prepared.sample is None else prepared.sample(),
        retrieved=None if prepared.retrieved is None else prepared.retrieved(),
    )
