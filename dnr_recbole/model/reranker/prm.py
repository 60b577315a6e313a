"""PRM: Personalized Re-ranking Model."""

from __future__ import annotations

from typing import Dict, List, Optional

from torch import Tensor, nn

from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.model.abstract_reranker import AbstractReranker, Stage
from dnr_recbole.model.blocks.attention import AttentionBlock
from dnr_recbole.model.context import TokenContext
from dnr_recbole.model.reranker._personalised_vector import PersonalisedVector
from dnr_recbole.registry import register_reranker

DEEP = 4  # stacks of more layers than this are scaled by default


@register_reranker
class PRM(AbstractReranker[TokenContext]):
    """Transformer over the candidate list (Pei et al., RecSys 2019).

    A token is the candidate's vector plus a projection of the user's state. The initial order enters as a
    position embedding of the rank by retriever score (``score_fusion: rank``, the original model), its value
    by the other kinds of fusion; storage order never enters.

    ``use_pv`` adds the paper's personalised vector: a projection of the last hidden layer of a click model,
    trained for ``pv_epochs`` before the reranker and then frozen, optionally cross-fitted (``pv_folds``). The
    projection of the sum is the paper's linear map of [candidate ; pv], with the candidate's half fixed at
    the identity.

    The blocks are the original's up to four layers. Deeper stacks (``n_layers: 10``, the larger PRM) scale
    their residual branches by learned vectors that start small, which replaces the original's learning-rate
    warm-up (``layer_scale``).
    """

    family = "list refinement"
    paper = "Pei et al., RecSys 2019: Personalized Re-ranking for Recommendation"
    objective_outputs = True
    permutation = "equivariant"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        scale = config["layer_scale"]
        if scale is None:
            scale = 0.01 if config["n_layers"] > DEEP else 0.0
        self.user_to_token = nn.Linear(self.dim, self.dim)
        self.blocks = nn.ModuleList(
            AttentionBlock(self.dim, config["n_heads"], config["d_ff"], config["dropout"], scale)
            for _ in range(config["n_layers"])
        )
        self.head = nn.Linear(self.dim, self.n_outputs)
        # Last, so that the rest of the model starts from the same random numbers with and without it.
        self.pv: Optional[PersonalisedVector] = None
        self.pv_epochs: int = config["pv_epochs"]
        if config["use_pv"]:
            self.pv = PersonalisedVector(config, catalogue)
            self.pv_to_token = nn.Linear(self.pv.folds * self.dim, self.dim)
            nn.init.normal_(self.pv_to_token.weight, std=0.05 / self.dim**0.5)  # as large as the item vectors

    def encode(self, slate: UnscoredSlate) -> TokenContext:
        context = super().encode(slate)
        tokens = context.candidates + self.user_to_token(context.user).unsqueeze(1)
        if self.pv is not None:
            tokens = tokens + self.pv_to_token(self.dropout(self.pv(slate)))
        return TokenContext.of(context, tokens=tokens)

    def score(self, context: TokenContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        hidden = self.fusion(context.tokens, x, slate.mask)
        for block in self.blocks:
            hidden = block(hidden, hidden, slate.mask)
        return self.head(hidden).squeeze(-1)

    def pretraining(self) -> List[Stage]:
        """The personalised vector's click model."""
        if self.pv is None or self.pv_epochs == 0:
            return []
        self.pv.requires_grad_(True)
        return [
            Stage(
                "personalised vector",
                self.pv_epochs,
                self.pv.loss,
                list(self.pv.parameters()),
                finish=self.pv.freeze,
            )
        ]

    def parameter_groups(self) -> Dict[str, List[nn.Parameter]]:
        """All but the personalised vector, which only its own stage trains."""
        frozen = set() if self.pv is None else {id(p) for p in self.pv.parameters()}
        return {name: [p for p in group if id(p) not in frozen] for name, group in super().parameter_groups().items()}
