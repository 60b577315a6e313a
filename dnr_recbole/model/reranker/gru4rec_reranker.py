"""GRU4Rec as a reranker. (The file is not called gru4rec.py: it must never shadow RecBole's module.)"""

from __future__ import annotations

from torch import Tensor, nn

from dnr_recbole.model.reranker._history_reranker import HistoryReranker, newest_state
from dnr_recbole.registry import register_reranker


@register_reranker
class GRU4Rec(HistoryReranker):
    """User state = W · (GRU state after the newest history item).

    The recurrence never looks ahead, so gathering at the newest item makes right padding inert without
    packing. The paper trains on parallel sessions with sampled ranking losses; here the request's labels take
    their place.
    """

    embeds = ("items", "mean_history", "interaction")  # the paper's state comes from the session alone
    paper = "Hidasi et al., ICLR 2016: Session-based Recommendations with Recurrent Neural Networks"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        layers = config["n_layers"]
        self.gru = nn.GRU(
            self.dim,
            config["gru_size"],
            layers,
            batch_first=True,
            dropout=config["dropout"] if layers > 1 else 0.0,
        )
        for name, weight in self.gru.named_parameters():
            if name.startswith("weight"):
                nn.init.xavier_uniform_(weight)
        self.project = nn.Linear(config["gru_size"], self.dim)

    def states(self, history: Tensor) -> Tensor:
        """State after each item: history ``[B, H, d]`` → ``[B, H, d]``, arbitrary at padding."""
        return self.project(self.gru(history)[0])

    def user_state(self, users: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        return newest_state(self.states(history), mask, self.embedder.mean_history.empty)
