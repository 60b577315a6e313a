"""Sequential recommenders as rerankers: the state of the history, matched with each candidate on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.lists import last_state
from dnr_recbole.model.abstract_reranker import AbstractReranker, Stage
from dnr_recbole.model.context import Context
from dnr_recbole.model.losses import masked_mean


def newest_state(states: Tensor, mask: Tensor, empty: Tensor) -> Tensor:
    """The state at each history's newest item, ``empty`` ``[d]`` where there is none.

    states ``[B, H, d]``, mask ``[B, H]`` with the valid part first → ``[B, d]``.
    """
    return torch.where(mask.any(1, keepdim=True), last_state(states, mask), empty.to(states.dtype))


@dataclass(frozen=True)
class HistoryContext(Context):
    """Attributes:
    bias: ``[B, n]``. targets: ``[B, n, w]``, what the state is matched with; None = ``candidates``. state: ``[B, w]``;
    None = ``user``.
    """

    bias: Tensor
    targets: Optional[Tensor] = None
    state: Optional[Tensor] = None


class HistoryReranker(AbstractReranker[HistoryContext]):
    """Base of SASRec, Caser and GRU4Rec: logit of candidate i = o_u · e_i(x) + b_i.

    o_u is the user state a subclass computes from the history, e_i(x) the candidate's vector after score
    fusion, and b_i a bias of the item. Candidates do not see each other. The labels of the request replace
    the papers' sampled negatives in the main training; ``pretrain_epochs`` > 0 first trains the papers' own
    task, the next item of the histories against sampled negatives. ``history_interaction`` is a further term of the
    logit: inside e_i(x) it could only act through what the user states have in common.
    """

    family = "pointwise"
    permutation = "equivariant"
    independent = True
    position_inputs = ("logit",)

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.item_bias = nn.Embedding(catalogue.n_items, 1, padding_idx=0)
        nn.init.zeros_(self.item_bias.weight)
        self.relation = nn.Linear(self.dim, 1) if self.embedder.interacts else None
        self.pretrain_epochs: int = config["pretrain_epochs"]

    # ------------------------------------------------------------------ what a model implements

    def user_state(self, users: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """State o_u ``[B, w]`` from users ``[B]``, history vectors ``[B, H, d]``, their mask ``[B, H]``."""
        raise NotImplementedError

    def vectors(self, candidates: Tensor, history: Tensor) -> Tuple[Tensor, Tensor]:
        """Vectors of candidate ids to match ``[B, m, w]``, and of history ids to read ``[B, H, d]``."""
        return self.embedder.items(candidates, history)

    # ------------------------------------------------------------------ what the models share

    def encode(self, slate: UnscoredSlate) -> HistoryContext:
        candidates, history = self.vectors(slate.candidates, slate.history)
        history = self.dropout(history)
        state = self.user_state(slate.users, history, slate.history_mask)
        bias = self.item_bias(slate.candidates)
        if self.relation is not None:
            plain = self.embedder.items(slate.candidates) if candidates.shape[-1] != self.dim else candidates
            bias = bias + self.relation(self.embedder.interaction(plain, history, slate))
        return HistoryContext(self.dropout(candidates), history, state, bias.squeeze(-1))

    def score(self, context: HistoryContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        targets = self.fusion(context.candidates if context.targets is None else context.targets, x, slate.mask)
        state = context.user if context.state is None else context.state
        return torch.einsum("bnd,bd->bn", targets, state) + context.bias

    # ------------------------------------------------------------------ next-item pretraining

    def pretraining(self) -> List[Stage]:
        if self.pretrain_epochs <= 0:
            return []
        # History items have no retriever score, and no history of their own to be compared with.
        apart = [self.fusion, self.embedder.interaction] + ([] if self.relation is None else [self.relation])
        unused = {id(p) for module in apart for p in module.parameters()}
        parameters = [p for p in self.parameters() if p.requires_grad and id(p) not in unused]
        return [Stage("next item", self.pretrain_epochs, self.next_item_loss, parameters)]

    def next_item_loss(self, slate: Slate) -> Tensor:
        """BCE of one history item against one random item, given the history before it.

        Each request is cut at a random place, so that one implementation serves every encoder. Histories of
        fewer than two items carry no such pair and are skipped.
        """
        length = slate.history_mask.sum(1)
        cut = (torch.rand(len(slate), device=slate.device) * (length - 1)).long() + 1  # 1 … length − 1
        cut = cut.clamp(min=1, max=slate.history.shape[1] - 1)
        target = slate.history.gather(1, cut.unsqueeze(1))
        negative = torch.randint(1, self.n_items, target.shape, device=slate.device)
        pair = torch.cat([target, negative], dim=1)
        place = torch.arange(slate.history.shape[1], device=slate.device)
        before = slate.history_mask & (place < cut.unsqueeze(1))

        vectors, history = self.vectors(pair, slate.history)
        state = self.user_state(slate.users, self.dropout(history), before)
        logits = torch.einsum("bmw,bw->bm", vectors, state) + self.item_bias(pair).squeeze(-1)
        labels = torch.tensor([1.0, 0.0], device=slate.device).expand(len(slate), -1)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
        usable = (length > 1).unsqueeze(1) & ((target != negative) | (labels > 0))
        return masked_mean(loss, usable)
