"""PRM: Personalized Re-ranking Model."""

from __future__ import annotations

from torch import Tensor, nn

from dnr_recbole.data.slate import Slate
from dnr_recbole.model.abstract_reranker import AbstractReranker, Context
from dnr_recbole.model.layers import TransformerBlock
from dnr_recbole.registry import register_reranker


@register_reranker
class PRM(AbstractReranker):
    """Transformer over the candidate list (Pei et al., RecSys 2019).

    A token is the candidate's vector plus a projection of the user's state. The initial order enters as a position
    embedding of the rank by retriever score (``score_fusion: rank``, the original model), its value by the other
    kinds of fusion; storage order never enters.
    """

    family = "list refinement"
    paper = "Pei et al., RecSys 2019: Personalized Re-ranking for Recommendation"
    permutation = "equivariant"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.user_to_token = nn.Linear(self.dim, self.dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(self.dim, config["n_heads"], config["d_ff"], config["dropout"])
            for _ in range(config["n_layers"])
        )
        self.head = nn.Linear(self.dim, 1)

    def encode(self, slate: Slate) -> Context:
        context = super().encode(slate)
        tokens = context.candidates + self.user_to_token(context.user).unsqueeze(1)
        return context._replace(extra={"tokens": tokens})

    def score(self, context: Context, slate: Slate, x: Tensor) -> Tensor:
        hidden = self.fusion(context.extra["tokens"], x, slate.mask)
        for block in self.blocks:
            hidden = block(hidden, slate.mask)
        return self.head(hidden).squeeze(-1)
