"""Caser as a reranker. (The file is not called caser.py: it must never shadow RecBole's module.)"""

from __future__ import annotations

import dataclasses
import math
from typing import Tuple

import torch
from recbole.model.layers import CNNLayers
from torch import Tensor, nn

from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.model.blocks.tables import item_table
from dnr_recbole.model.inputs.score_fusion import ScoreFusion
from dnr_recbole.model.reranker._history_reranker import HistoryContext, HistoryReranker
from dnr_recbole.registry import register_reranker


@register_reranker
class Caser(HistoryReranker):
    """Convolutions over the L newest history items, seen as an image of L × d.

    Horizontal kernels (h × d, h = 1 … L, ReLU, maximum over time) look for runs of h items; vertical kernels
    (L × 1) weigh the L positions. A layer maps both to z (d wide), and the state [z ; user vector] meets a
    *second* item table of width 2d, as in the paper. Shorter histories are padded with zero rows in front, an
    empty one is all zero. The next item alone is the target (T = 1 in the paper's terms).
    """

    bf16_from = {**HistoryReranker.bf16_from, "cuda": math.inf}  # its convolutions are 2 to 4 times slower there
    embeds = ("items", "users", "interaction")
    paper = "Tang & Wang, WSDM 2018: Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.window: int = config["window"]
        n_h, n_v, d = config["n_horizontal"], config["n_vertical"], self.dim
        self.horizontal = nn.ModuleList(
            CNNLayers([1, n_h], [(h, d)], [(1, 1)], "relu") for h in range(1, self.window + 1)
        )
        self.vertical = CNNLayers([1, n_v], [(self.window, 1)], [(1, 1)], "none")
        self.to_state = nn.Linear(n_v * d + n_h * self.window, d)
        # The second table is held as two halves of width d: one meets z, the other the user's vector.
        self.target_of_state = item_table(config, catalogue)
        self.target_of_user = item_table(config, catalogue)
        self.fusion = ScoreFusion(config["score_fusion"], 2 * d, config["n_candidates"], catalogue.n_scores)

    def newest(self, history: Tensor, mask: Tensor) -> Tensor:
        """The L newest items, oldest first, zero rows in front: ``[B, H, d]``, ``[B, H]`` → ``[B, L, d]``."""
        index = mask.sum(1, keepdim=True) - self.window + torch.arange(self.window, device=history.device)
        real = (index >= 0).unsqueeze(-1)
        rows = history.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, history.shape[-1]))
        return rows * real

    def user_state(self, users: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """``[B, 2d]``: [z ; user vector]."""
        image = self.newest(history, mask).unsqueeze(1)
        across = [net(image).squeeze(-1).amax(-1) for net in self.horizontal]
        along = self.vertical(image).flatten(1)
        z = torch.relu(self.to_state(self.dropout(torch.cat([along, *across], dim=-1))))
        return torch.cat([z, self.embedder.users(users).to(z.dtype)], dim=-1)

    def vectors(self, candidates: Tensor, history: Tensor) -> Tuple[Tensor, Tensor]:
        targets = torch.cat([self.target_of_state(candidates), self.target_of_user(candidates)], dim=-1)
        return targets, self.embedder.items(history)

    def encode(self, slate: UnscoredSlate) -> HistoryContext:
        """As the base class; ``candidates`` and ``user``, of width d everywhere, hold the sums of the halves."""
        context = super().encode(slate)
        z, user = context.user.chunk(2, dim=-1)
        first, second = context.candidates.chunk(2, dim=-1)
        return dataclasses.replace(
            context, candidates=first + second, user=z + user, targets=context.candidates, state=context.user
        )
