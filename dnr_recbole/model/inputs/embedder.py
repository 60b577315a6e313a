"""Vectors of a request: what every reranker starts from."""

from __future__ import annotations

from typing import Any, Tuple

from torch import Tensor, nn

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.model.blocks.tables import MeanHistory, SideTable, item_table, user_table
from dnr_recbole.model.inputs.interaction import HistoryInteraction

TABLES = ("items", "users", "mean_history")
PARTS = (*TABLES, "interaction")


class Embedder(nn.Module):
    """Items, users, histories, and what a candidate has to do with the history.

    Args:
        parts: which of :data:`PARTS` the reranker reads; the others are None. All are drawn, so that what is
            initialised after them does not depend on what a reranker leaves out.
        independent: the reranker declares that a candidate's score does not depend on the other candidates.
    """

    # None where the reranker does not read it, which is for the reranker to know.
    items: SideTable
    users: SideTable
    mean_history: MeanHistory
    interaction: HistoryInteraction

    def __init__(
        self, config: Any, catalogue: Catalogue, parts: Tuple[str, ...] = PARTS, independent: bool = False
    ) -> None:
        super().__init__()
        drawn = {
            "items": item_table(config, catalogue),
            "users": user_table(config, catalogue),
            "mean_history": MeanHistory(config["embedding_size"]),
            "interaction": HistoryInteraction(config, catalogue, independent),
        }
        for name in PARTS:
            self.add_module(name, drawn[name] if name in parts else None)

    @property
    def interacts(self) -> bool:
        """Whether there is anything to say of candidate and history."""
        return self.interaction is not None and self.interaction.active

    def forward(self, slate: UnscoredSlate) -> Tuple[Tensor, Tensor]:
        """Vectors of the candidates ``[B, n, d]``, with what they have to do with the history, and of the history
        ``[B, H, d]``."""
        candidates, history = self.items(slate.candidates, slate.history)
        if self.interacts:
            candidates = candidates + self.interaction(candidates, history, slate)
        return candidates, history

    def user(self, slate: UnscoredSlate, history: Tensor) -> Tensor:
        """``[B, d]``: the user's vector plus the mean of the history's vectors ``[B, H, d]``."""
        return self.users(slate.users) + self.mean_history(history, slate.history_mask)

    def share(self, other: Embedder) -> Tuple[str, ...]:
        """Take the tables of ``other`` in the place of the own; what this one does without, it is not given either.

        Returns:
            names of the tables that are shared now.
        """
        shared = tuple(name for name in TABLES if getattr(self, name) is not None)
        for name in shared:
            setattr(self, name, getattr(other, name))
        return shared
