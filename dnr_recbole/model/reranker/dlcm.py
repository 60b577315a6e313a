"""DLCM: Deep Listwise Context Model."""

from __future__ import annotations

from typing import Tuple

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.lists import last_state, put_back, take, worst_first
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.nets import UserItemToken, scan
from dnr_recbole.model.context import TokenContext
from dnr_recbole.registry import register_reranker


@register_reranker
class DLCM(AbstractReranker[TokenContext]):
    """GRU over the initial list and a local scoring function (Ai et al., SIGIR 2018).

    1. A token per candidate: a linear map of [candidate ; user].
    2. A GRU reads the tokens from the *last* rank to the first, so that its final state s, the list's
       context, remembers the best candidates most freshly; o_i is its output at candidate i.
    3. Score, ``scoring: additive`` (default): the sum over heads a of w_a · v_aᵀ tanh(W_a o_i + U_a s);
       ``multiplicative``: o_iᵀ tanh(W s + b). The scalar w_a is absorbed by v_a.

    The paper's attention-rank loss with binary labels is the list cross-entropy (``rerank_loss: listce``).
    Adam replaces the paper's SGD. The retriever's order is always used, its values by ``score_fusion``.
    """

    family = "list refinement"
    paper = "Ai et al., SIGIR 2018: Learning a Deep Listwise Context Model for Ranking Refinement"
    objective_outputs = True
    permutation = "score_order"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.token = UserItemToken(self.dim, self.dim)
        self.gru = nn.GRU(self.dim, self.dim, batch_first=True)
        self.scoring = config["scoring"]
        if self.scoring == "additive":
            width = config["n_heads"] * self.dim
            self.item_part = nn.Linear(self.dim, width)
            self.list_part = nn.Linear(self.dim, width, bias=False)
            self.head = nn.Linear(width, self.n_outputs, bias=False)
        else:
            self.list_part = nn.Linear(self.dim, self.n_outputs * self.dim)
        # The loss ignores a common shift, but a probability needs one.
        self.bias = nn.Parameter(torch.zeros(()))

    def encode(self, slate: UnscoredSlate) -> TokenContext:
        context = super().encode(slate)
        return TokenContext.of(context, tokens=self.token(context.candidates, context.user))

    def read(self, tokens: Tensor, slate: UnscoredSlate, x: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens ``[B, n, d]`` → outputs o ``[B, n, d]`` in storage order, context s ``[B, d]``."""
        order = worst_first(x, slate.mask)
        outputs, _ = scan(self.gru, take(tokens, order))
        return put_back(outputs, order), last_state(outputs, slate.mask.gather(1, order))

    def score(self, context: TokenContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        tokens = self.fusion(context.tokens, x, slate.mask)
        outputs, state = self.read(tokens, slate, x)
        outputs, state = self.dropout(outputs), self.dropout(state)
        if self.scoring == "additive":
            hidden = torch.tanh(self.item_part(outputs) + self.list_part(state).unsqueeze(1))
            return self.head(hidden).squeeze(-1) + self.bias
        wanted = torch.tanh(self.list_part(state)).unflatten(-1, (self.n_outputs, self.dim))
        return torch.bmm(outputs, wanted.transpose(1, 2)).squeeze(-1) + self.bias
