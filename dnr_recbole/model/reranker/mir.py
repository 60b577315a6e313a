"""MIR: Multi-level Interaction Reranking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.lists import NEG_INF, take
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.attention import Attention
from dnr_recbole.model.blocks.dropout import Dropout
from dnr_recbole.model.blocks.nets import UserItemToken, mlp, scan
from dnr_recbole.model.context import Context
from dnr_recbole.registry import register_reranker


class RaggedBiLSTM(nn.Module):
    """LSTM in both directions over right-padded sequences; the backward one starts at each one's own end."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.ahead = nn.LSTM(dim, hidden, batch_first=True)
        self.back = nn.LSTM(dim, hidden, batch_first=True)

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        """items ``[B, H, d]``, mask ``[B, H]``, real part first → ``[B, H, 2h]``, noise at padding."""
        flipped = ages(mask)  # the same map turns a sequence round and back again
        backward = take(scan(self.back, take(items, flipped))[0], flipped)
        return torch.cat([scan(self.ahead, items)[0], backward], dim=-1)


def ages(mask: Tensor) -> Tensor:
    """Age ``[B, H]`` of each history item, 0 = the newest; mask ``[B, H]`` with the real part first."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return (mask.sum(-1, keepdim=True) - 1 - steps).clamp(min=0)


def decayed(affinity: Tensor, theta: Tensor, age: Tensor) -> Tensor:
    """A + A · exp(−θ · age): recent history counts up to twice.

    affinity ``[B, H, n]``, theta ``[B, 1]``, age ``[B, H]`` → ``[B, H, n]``.
    """
    return affinity * (1 + torch.exp(-theta * age)).unsqueeze(-1)


def pool(weights: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax-weighted mean of the real rows, 0 if there is none.

    weights ``[B, L, 1]``, values ``[B, L, d]``, mask ``[B, L]`` → ``[B, d]``.
    """
    share = weights.squeeze(-1).float().masked_fill(~mask, NEG_INF).softmax(-1) * mask
    return torch.bmm(share.unsqueeze(1).to(values.dtype), values).squeeze(1)


@dataclass(frozen=True)
class MIRContext(Context):
    """Attributes:
    sequence: ``[B, H, 2h + d]``, the list level's Q. theta: ``[B, 1]``, how fast the affinity decays with age.
    """

    sequence: Tensor
    theta: Tensor


@register_reranker
class MIR(AbstractReranker[MIRContext]):
    """Interaction of the candidate *set* with the history *list* (Xi et al., SIGIR 2022).

    * Set level: V = [self-attention(C) ; C], ``[B, n, 2d]``.
    * List level: Q = [BiLSTM(history) ; history], ``[B, H, 2h + d]``.
    * Affinity A = Q W_b Vᵀ, ``[B, H, n]``, with personal decay: A ← tanh(A + A · exp(−θ_u · age)).
    * H_v = tanh(V w_v + Aᵀ Q w_q), H_q = tanh(Q w_q + A V w_v); their softmax over candidates and over
      history gives the pooled vectors v = Σ a_v V and q = Σ a_q Q.
    * Score: MLP([C_i ; v ; q ; user]).

    Deviations: w_v and w_q have width 1. In the paper they have one column per storage position of a
    candidate, so that permuting candidates changes the scores, against the paper's own claim. θ_u is the
    softplus of an MLP of the user's state, where a final ReLU can die at zero decay. All features of an item
    are in one vector here, so the interaction is on item level only. The user's state is an input of the
    final MLP as well.
    """

    family = "list refinement"
    paper = "Xi et al., SIGIR 2022: Multi-Level Interaction Reranking with User Behavior History"
    objective_outputs = True
    permutation = "equivariant"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        d, h = self.dim, config["lstm_size"]
        set_width, list_width = 2 * d, 2 * h + d
        self.attention = Attention(d, config["n_heads"])
        self.lstm = RaggedBiLSTM(d, h)
        self.w_b = nn.Linear(list_width, set_width, bias=False)
        self.w_v = nn.Linear(set_width, 1, bias=False)
        self.w_q = nn.Linear(list_width, 1, bias=False)
        self.theta = mlp([d, d // 2, 1])
        nn.init.constant_(self.theta[-1].bias, -2.0)  # softplus(−2) = 0.13: the boost halves in about 5 items
        hidden = list(config["mlp_hidden"])
        # In [C_i ; v ; q ; user] only C_i differs within a request: the first layer is a sum of two halves.
        self.first = UserItemToken(d, hidden[0])
        self.first_list = nn.Linear(set_width + list_width, hidden[0], bias=False)
        self.rest = nn.Sequential(
            nn.ReLU(), Dropout(config["dropout"]), mlp([*hidden, self.n_outputs], config["dropout"])
        )

    def encode(self, slate: UnscoredSlate) -> MIRContext:
        context = super().encode(slate)
        mask = slate.history_mask
        sequence = torch.cat([self.lstm(context.history, mask), context.history], dim=-1) * mask.unsqueeze(-1)
        theta = F.softplus(self.theta(context.user))
        return MIRContext.of(context, sequence=sequence, theta=theta)

    def score(self, context: MIRContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        sequence, history_mask = context.sequence, slate.history_mask
        candidates = self.fusion(context.candidates, x, slate.mask)
        both = torch.cat([self.attention(candidates, candidates, slate.mask), candidates], dim=-1)
        both = both * slate.mask.unsqueeze(-1)
        # Padding needs no mask in A: its rows of V and Q are zero.
        affinity = torch.bmm(self.w_b(sequence), both.transpose(1, 2))
        affinity = torch.tanh(decayed(affinity, context.theta, ages(history_mask)))
        from_set, from_list = self.w_v(both), self.w_q(sequence)
        on_set = torch.tanh(from_set + torch.bmm(affinity.transpose(1, 2), from_list.to(affinity.dtype)))
        on_list = torch.tanh(from_list + torch.bmm(affinity, from_set.to(affinity.dtype)))
        summary = torch.cat([pool(on_set, both, slate.mask), pool(on_list, sequence, history_mask)], dim=-1)
        hidden = self.first(candidates, context.user) + self.first_list(summary).unsqueeze(1)
        return self.rest(hidden).squeeze(-1)
