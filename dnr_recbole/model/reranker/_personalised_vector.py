"""PRM's personalised vector: the hidden layer of a click model, trained before the reranker, then frozen."""

from __future__ import annotations

import dataclasses
from typing import Any, List

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.model.blocks.dropout import Dropout
from dnr_recbole.model.blocks.nets import UserItemToken, mlp
from dnr_recbole.model.blocks.tables import MeanHistory, item_table, user_table
from dnr_recbole.model.losses import bce


class ClickNet(nn.Module):
    """P(click | user, history, item) = σ(w · h + b), h = MLP([user ; history ; item ; history ⊙ item]).

    It owns its tables, so that it stays as it was trained while the reranker's move.
    """

    def __init__(self, config, catalogue: Catalogue, hidden: List[int]):
        super().__init__()
        dim, dropout = config["embedding_size"], config["dropout"]
        self.items, self.users = item_table(config, catalogue), user_table(config, catalogue)
        self.mean_history = MeanHistory(dim)
        self.first = UserItemToken(2 * dim, hidden[0])
        self.rest = nn.Sequential(nn.ReLU(), Dropout(dropout), mlp([*hidden, dim], dropout), nn.ReLU())
        self.head = nn.Linear(dim, 1)

    def hidden(self, slate: UnscoredSlate) -> Tensor:
        """The last hidden layer ``[B, n, d]``."""
        items, history = self.items(slate.candidates, slate.history)
        state = self.mean_history(history, slate.history_mask)
        request = torch.cat([self.users(slate.users), state], dim=-1)
        return self.rest(self.first(torch.cat([items, items * state.unsqueeze(1)], dim=-1), request))

    def forward(self, slate: UnscoredSlate) -> Tensor:
        """Logits ``[B, n]``."""
        return self.head(self.hidden(slate)).squeeze(-1)


class PersonalisedVector(nn.Module):
    """pv_i for each candidate, from one click model or from several, cross-fitted by user.

    A click model is surer about requests it was trained on than about new ones, and a reranker that learns
    from its hidden layer learns to trust it too much. With ``folds`` > 1, users are split by id, and fold f's
    vectors come from the net that was trained on all *other* users: for training and test requests alike, so
    that both look the same. Those nets know a user by history and features only, since the id of a user never
    trained on says nothing. Splitting requests instead would leak, since labels of neighbouring requests of a
    user may overlap. As hidden layers of different nets have nothing in common, each has its own projection,
    which belongs to the reranker.
    """

    nets: Any  # of ClickNet

    def __init__(self, config, catalogue: Catalogue):
        super().__init__()
        self.dim: int = config["embedding_size"]
        self.folds: int = config["pv_folds"]
        if self.folds > 1:
            catalogue = dataclasses.replace(catalogue, user_ids_known=False)
        hidden = list(config["pv_hidden"])
        self.nets = nn.ModuleList(ClickNet(config, catalogue, hidden) for _ in range(self.folds))

    def freeze(self) -> None:
        """No more training."""
        self.requires_grad_(False)

    def fold(self, slate: UnscoredSlate) -> Tensor:
        """The fold ``[B]`` of each request."""
        return slate.users % self.folds

    def loss(self, slate: Slate) -> Tensor:
        """BCE of each net on the users outside its fold."""
        self.train()
        if self.folds == 1:
            return bce(self.nets[0](slate), slate.feedback, slate.mask, slate.weights)
        fold, total = self.fold(slate), torch.zeros((), device=slate.device)
        for f, net in enumerate(self.nets):
            part = slate.select(fold != f)
            total = total + bce(net(part), part.feedback, part.mask, part.weights)
        return total / self.folds

    @torch.no_grad()
    def forward(self, slate: UnscoredSlate) -> Tensor:
        """Vectors ``[B, n, folds · d]``: the block of a request's own fold, zeros elsewhere; no gradient.

        Each block is normalised to mean 0 and variance 1: how far the net was trained must not set its scale.
        """
        self.eval()
        own = F.one_hot(self.fold(slate), self.folds)
        blocks = [
            F.layer_norm(net.hidden(slate), (self.dim,)) * own[:, f, None, None] for f, net in enumerate(self.nets)
        ]
        return torch.cat(blocks, dim=-1)
