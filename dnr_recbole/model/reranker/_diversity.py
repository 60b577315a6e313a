"""Rerankers that trade relevance against similarity: what MMR and DPP share."""

from __future__ import annotations

from typing import Any, Callable, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.errors import ConfigError
from dnr_recbole.lists import first_score, list_scores, min_max, without
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.nets import mlp
from dnr_recbole.model.context import Context
from dnr_recbole.model.inputs.embedder import Embedder


def greedy(mask: Tensor, k: int, gain: Callable[[], Tensor], update: Callable[[Tensor], None]) -> Tensor:
    """Pick k candidates one after another by the best current gain.

    Args:
        mask: ``[B, n]`` bool, candidates to choose from.
        k: length of the list.
        gain: → ``[B, n]``, value of adding each candidate now.
        update: told the chosen positions ``[B]`` after each step.

    Returns:
        positions ``[B, k]``, −1 behind the last valid candidate.
    """
    picked, available = [], mask
    for _ in range(min(k, mask.shape[1])):
        chosen = gain().masked_fill(~available, -torch.inf).argmax(1)
        picked.append(torch.where(available.any(1), chosen, torch.full_like(chosen, -1)))
        available = without(available, chosen.unsqueeze(1))
        update(chosen)
    return F.pad(torch.stack(picked, 1), (0, k - len(picked)), value=-1)


class DiversityReranker(AbstractReranker):
    """Base of MMR and DPP: a relevance r in [0, 1] per candidate, unit vectors for similarity, a greedy rule.

    ``relevance: learned`` (default): r is the probability of a jointly trained pointwise head on [e(x) ; h ;
    e(x) ⊙ h], with e(x) the candidate's vector after score fusion and h the user state; ``score_fusion: residual``
    acts on the head's logit, so it moves the relevance and not the rule. ``relevance:
    retriever``: r is the retriever's score itself, whatever the fusion; training then only fits the slope and
    offset that turn it into a logit, and the list does not depend on them. Both are scaled to [0, 1] within
    the request, so that the trade-off means the same for every request.

    ``kernel`` names the vectors: the retriever's ``factors``, item ``features``, the model's own ``items``,
    or ``auto`` (the first of these that exists).
    """

    family = "diversity"
    permutation = "equivariant"
    supports_noise = False
    noise_refusal = (
        "its list comes from a fixed greedy rule; noise would train the pointwise relevance head behind it, "
        "not the reranking: wrap a pointwise model instead, or choose a learned list model"
    )

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.learned: bool = config["relevance"] == "learned"
        vectors = self._static_vectors(config["kernel"], catalogue)
        if vectors is None and not self.learned and config["item_init"] != "retriever":
            raise ConfigError(
                "relevance: retriever trains no item vectors, and there are no others to compare items by: use a "
                "retriever with item vectors, a dataset with item features, or relevance: learned"
            )
        self.register_buffer("vectors", None if vectors is None else F.normalize(vectors.float(), dim=-1))
        if self.learned:
            self.head = mlp([3 * self.dim, self.dim, 1], config["dropout"])
        else:
            self.slope, self.offset = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
            self.fusion.requires_grad_(False)
            self.embedder.requires_grad_(False)

    def make_embedder(self, config: Any, catalogue: Catalogue) -> Embedder:
        if config["relevance"] == "learned":
            return super().make_embedder(config, catalogue)
        return Embedder(config, catalogue, ("items",))

    @staticmethod
    def _static_vectors(kernel: str, catalogue):
        has_features = catalogue.item_features.numel() > 0
        if kernel == "auto":
            fallback = "features" if has_features else "items"
            kernel = "factors" if catalogue.item_factors is not None else fallback
        if kernel == "factors" and catalogue.item_factors is None:
            raise ConfigError("kernel: factors needs a retriever with item vectors; choose kernel: auto or items")
        if kernel == "features" and not has_features:
            raise ConfigError("kernel: features needs item features in the dataset; choose kernel: auto or items")
        return {"factors": catalogue.item_factors, "features": catalogue.item_features, "items": None}[kernel]

    # ------------------------------------------------------------------ what a model implements

    def select(self, relevance: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
        """Positions ``[B, K]`` from relevance ``[B, n]``, unit vectors ``[B, n, f]``, mask ``[B, n]``."""
        raise NotImplementedError

    # ------------------------------------------------------------------ relevance

    def encode(self, slate: UnscoredSlate) -> Context:
        if self.learned:
            return super().encode(slate)
        candidates, history = self.embedder.items(slate.candidates, slate.history)
        return Context(candidates, history, candidates.new_zeros(candidates.shape[0], self.dim))

    def score(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        if not self.learned:
            return F.softplus(self.slope) * first_score(x) + self.offset
        item = self.fusion(context.candidates, x, slate.mask)
        user = context.user.unsqueeze(1).expand_as(item)
        return self.head(torch.cat([item, user, item * user], dim=-1)).squeeze(-1)

    def prepare(self, train) -> None:
        if self.learned:
            super().prepare(train)

    def with_residual(self, logits: Tensor, x: Tensor) -> Tensor:
        return super().with_residual(logits, x) if self.learned else logits

    # ------------------------------------------------------------------ the list

    def generate(self, slate: Slate) -> Tensor:
        return self._rank(slate)[0]

    def predict(self, slate: Slate) -> Tensor:
        positions, base = self._rank(slate)
        return list_scores(positions, base, slate.mask)

    @torch.no_grad()
    def _rank(self, slate: Slate) -> Tuple[Tensor, Tensor]:
        """The list ``[B, K]`` as positions, and the score ``[B, n]`` that ranks the candidates outside it."""
        # Without a head the list is the retriever's, diversified: the retriever's own scores make it.
        base = self.forward(slate).float() if self.learned else slate.logged_scores
        relevance = min_max(torch.sigmoid(base) if self.learned else base, slate.mask)
        vectors = self.item_vectors(slate.candidates)
        # Full precision: gains are differences of nearly equal numbers.
        with torch.autocast(slate.device.type, enabled=False):
            return self.select(relevance, vectors, slate.mask), base

    def item_vectors(self, candidates: Tensor) -> Tensor:
        """Unit vectors ``[B, n, f]`` of the candidate ids ``[B, n]``; an all-zero vector stays zero."""
        if self.vectors is not None:
            return self.vectors[candidates]
        return F.normalize(self.embedder.items(candidates).float(), dim=-1)
