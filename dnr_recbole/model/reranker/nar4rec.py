"""NAR4Rec: one-shot generation of lists by matching candidates with slots."""

from __future__ import annotations

import math
from typing import Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.lists import NEG_INF, gather_lists, list_scores, pick_best, top_positions
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.attention import Attention, TransformerBlock
from dnr_recbole.model.blocks.dropout import Dropout
from dnr_recbole.model.blocks.list_evaluator import ListEvaluator
from dnr_recbole.model.blocks.nets import UserItemToken
from dnr_recbole.model.context import TokenContext
from dnr_recbole.model.losses import masked_mean
from dnr_recbole.model.reranker._list_decoding import (
    contrastive_decode,
    cosine_matrix,
    evaluator_loss,
    greedy_decode,
    gumbel,
    hit_shares,
    list_utility,
    seeded_gumbel,
)
from dnr_recbole.registry import register_reranker


class Matched(NamedTuple):
    """A request batch under given retriever scores.

    Attributes:
        tokens: ``[B, n, d]`` candidates with user and score.
        hidden: ``[B, n, d]`` encoded candidates.
        logits: ``[B, n, K]`` of candidate and slot.
        residual: ``[B, n]`` what the scores add to all logits, in ``logits`` already; None = nothing.
    """

    tokens: Tensor
    hidden: Tensor
    logits: Tensor
    residual: Optional[Tensor] = None


class SlotBlock(nn.Module):
    """Slots look at the candidates, then at each other, then pass a feed-forward net (post-norm)."""

    def __init__(self, dim: int, n_heads: int, d_ff: int, dropout: float = 0.0):
        super().__init__()
        self.block = TransformerBlock(dim, n_heads, d_ff, dropout)
        self.cross = Attention(dim, n_heads)
        self.norm = nn.LayerNorm(dim)
        self.drop = Dropout(dropout)

    def forward(self, slots: Tensor, candidates: Tensor, mask: Tensor) -> Tensor:
        """slots ``[B, K, d]``, candidates ``[B, n, d]``, mask ``[B, n]`` → ``[B, K, d]``."""
        slots = self.norm(slots + self.drop(self.cross(slots, candidates, mask)))
        return self.block(slots)


class Matching(nn.Module):
    """NAR4Rec's matching model: candidates × slots → logits.

    Candidates pass a Transformer without positions; K learned slot vectors attend to the encoded candidates
    and to each other; a logit is the scaled inner product of candidate and slot. Column j's softmax over the
    candidates is P(candidate | slot j), all columns at once.
    """

    def __init__(self, config):
        super().__init__()
        dim, dropout = config["embedding_size"], config["dropout"]
        shape = (dim, config["n_heads"], config["d_ff"], dropout)
        self.slots = nn.Parameter(torch.randn(config["slate_size"], dim) * 0.05)
        self.candidate_blocks = nn.ModuleList(TransformerBlock(*shape) for _ in range(config["n_layers"]))
        self.slot_blocks = nn.ModuleList(SlotBlock(*shape) for _ in range(config["n_slot_layers"]))
        self.key = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens ``[B, n, d]``, mask ``[B, n]`` → encoded candidates ``[B, n, d]``, logits ``[B, n, K]``."""
        hidden = tokens
        for block in self.candidate_blocks:
            hidden = block(hidden, mask)
        slots = self.slots.expand(tokens.shape[0], -1, -1)
        for block in self.slot_blocks:
            slots = block(slots, hidden, mask)
        logits = hidden @ self.key(slots).transpose(1, 2) * hidden.shape[-1] ** -0.5
        return hidden, logits.float()


def cells(log_p: Tensor, positions: Tensor) -> Tensor:
    """log P ``[B, K]`` of the list ``positions`` ``[B, K]``, one cell per slot; 0 where −1."""
    values = log_p.gather(1, positions.clamp(min=0).unsqueeze(1)).squeeze(1)
    return values.masked_fill(positions < 0, 0.0)


def likelihood_loss(log_p: Tensor, positions: Tensor, weights: Optional[Tensor] = None) -> Tensor:
    """−log P(y_j | slot j), mean over the filled slots of the lists to imitate."""
    return masked_mean(-cells(log_p, positions), positions >= 0, weights)


def listed_weights(slate: Slate, positions: Tensor) -> Optional[Tensor]:
    """What the labels of the list ``positions`` ``[B, K]`` count; None = 1 each."""
    return None if slate.label_weights is None else gather_lists(slate.label_weights, positions)


def unlikelihood_loss(log_p: Tensor, positions: Tensor, weights: Optional[Tensor] = None) -> Tensor:
    """−log(1 − P(y_j | slot j)), mean over the filled slots of the lists to avoid; 1 − P ≥ 1e-6."""
    p = cells(log_p, positions).exp()
    return masked_mean(-(1 - p).clamp(min=1e-6).log(), positions >= 0, weights)


def contrast_loss(hidden: Tensor, mask: Tensor, margin: float) -> Tensor:
    """max(0, cos − (1 − margin)), mean over pairs of different valid candidates; hidden is ``[B, n, d]``."""
    pairs = mask.unsqueeze(1) & mask.unsqueeze(2)
    pairs = pairs & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return masked_mean(F.relu(cosine_matrix(hidden) - (1 - margin)), pairs)


@register_reranker
class NAR4Rec(AbstractReranker[TokenContext]):
    """Non-autoregressive list generation with an evaluator (Ren et al., KDD 2024).

    Training, per request:

    * likelihood of a good list y — −log P(y_j | slot j) over its slots;
    * unlikelihood of a bad list y — −log(1 − P(y_j | slot j));
    * an item contrastive loss — cosines of encoded candidates above 1 − margin are pushed down — so that the
      similarities of contrastive decoding tell candidates apart;
    * the evaluator's cross-entropy on a mixture of lists (greedy, sampled, retriever's, random).

    The good list holds the positives by retriever score; slots beyond their number carry no loss. The bad
    list holds the zero-label candidates by retriever score (``bad_lists: unclicked``), or it is the
    retriever's own top K in requests where that has fewer hits than the batch's median (``bad_lists:
    retriever``). Real systems log several exposed lists per request with their utility; here a request is one
    set of labelled candidates, hence this adaptation.

    A candidate's own logit is the log-mean-exp of its row of the matching logits: a column softmax leaves
    each column's level free, and the likelihood by ``rerank_loss`` fixes it, so that q(z = 1) is high where
    some slot wants the candidate. It ranks what is outside the list and is what a training framework
    differentiates in x.

    ``score_fusion: residual`` is added to a candidate's logit of every slot, and so to its own logit, and to the
    evaluator's logits.

    Serving: ``n_lists`` lists (one per α, the rest sampled with fixed noise), and the one with the highest
    expected DCG under the evaluator is shown. Labels of an item do not depend on its neighbours here, so the
    ideal evaluator is pointwise and gains come from search only.
    """

    family = "generator-evaluator"
    paper = "Ren et al., KDD 2024: Non-autoregressive Generative Models for Reranking Recommendation"
    permutation = "equivariant"
    score_adds_residual = True

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.token = UserItemToken(self.dim, self.dim)
        self.matching = Matching(config)
        self.evaluator = ListEvaluator(
            self.dim, config["evaluator_hidden"], self.slate_size, config["evaluator_kind"],
            n_heads=config["n_heads"],
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(()))
        self.alphas = list(config["decode_alphas"])[: config["n_lists"]]
        self.n_samples: int = config["n_lists"] - len(self.alphas)
        self.decode_top_k: int = config["decode_top_k"]
        self.temperature: float = config["sample_temperature"]
        self.bad_lists: str = config["bad_lists"]
        self.margin: float = config["contrast_margin"]
        self.weights: Dict[str, float] = {
            name: config[f"{name}_weight"]
            for name in ("matching", "unlikelihood", "contrast", "pointwise", "evaluator")
        }

    def leave_choice_to_another(self) -> None:
        """Let go of the evaluator: another model, of which this is a generator, judges the lists."""
        self.evaluator = None

    # ------------------------------------------------------------------ the matching matrix

    def encode(self, slate: UnscoredSlate) -> TokenContext:
        context = super().encode(slate)
        return TokenContext.of(context, tokens=self.token(context.candidates, context.user))

    def match(self, context: TokenContext, slate: UnscoredSlate, x: Tensor) -> Matched:
        """Everything about the request that lists, losses and scores are made of."""
        tokens = self.fusion(context.tokens, x, slate.mask)
        hidden, logits = self.matching(tokens, slate.mask)
        residual = self.fusion.residual(x)
        if residual is not None:
            logits = logits + residual.unsqueeze(-1)
        return Matched(tokens, hidden, logits, residual)

    @staticmethod
    def log_matching(matched: Matched, mask: Tensor) -> Tensor:
        """log P(candidate | slot) ``[B, n, K]``: each column a distribution over the valid candidates."""
        return torch.log_softmax(matched.logits.masked_fill(~mask.unsqueeze(-1), NEG_INF), dim=1)

    def own_logits(self, matched: Matched) -> Tensor:
        """A candidate's logit ``[B, n]``: log-mean-exp over the slots."""
        return matched.logits.logsumexp(-1) - math.log(self.slate_size) + self.bias

    def score(self, context: TokenContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        return self.own_logits(self.match(context, slate, x))

    # ------------------------------------------------------------------ lists

    @torch.no_grad()
    def decode(self, matched: Matched, slate: UnscoredSlate) -> Tensor:
        """The R lists ``[B, R, K]`` to choose from: contrastive decoding for each α, then sampled lists."""
        log_p = self.log_matching(matched, slate.mask)
        # α weighs P itself against cosines; the trace of log P keeps the order where P underflows to 0.
        relevance = (log_p.exp() + 1e-6 * log_p).unsqueeze(1).expand(-1, len(self.alphas), -1, -1)
        alpha = torch.tensor(self.alphas, device=log_p.device)
        lists = contrastive_decode(relevance, cosine_matrix(matched.hidden), slate.mask, alpha, self.decode_top_k)
        if not self.n_samples:
            return lists
        noise = seeded_gumbel(slate.candidates, slate.users, self.n_samples, log_p.shape[-1])
        # Gumbel-max: greedy decoding under noise draws each slot from its column over unused candidates.
        return torch.cat([lists, greedy_decode(log_p.unsqueeze(1) + self.temperature * noise, slate.mask)], dim=1)

    def predict(self, slate: Slate) -> Tensor:
        context = self.encode(slate)
        matched = self.match(context, slate, slate.scores)
        lists = self.decode(matched, slate)
        value = list_utility(self.evaluator, matched.tokens, context.user, lists, matched.residual)
        best = pick_best(lists, value)
        return list_scores(best, self.own_logits(matched), slate.mask)

    @torch.no_grad()
    def oracle(self, slate: Slate) -> Dict[str, Tensor]:
        """``lists``: choosing among the lists that the evaluator gets to see."""
        lists = self.decode(self.match(self.encode(slate), slate, slate.scores), slate)
        return {"lists": hit_shares(lists, slate, self.slate_size).amax(1)}

    # ------------------------------------------------------------------ training

    def loss(self, context: TokenContext, slate: Slate, x: Tensor) -> Tensor:
        matched = self.match(context, slate, x)
        lists = self.training_lists(matched, slate)
        judged = evaluator_loss(self.evaluator, matched.tokens, context.user, lists, slate, matched.residual)
        return self.generator_loss(matched, slate) + self.weights["evaluator"] * judged

    def generator_loss(self, matched: Matched, slate: Slate) -> Tensor:
        """The loss of all but the evaluator."""
        log_p = self.log_matching(matched, slate.mask)
        good, bad = self.target_lists(slate)
        terms = {
            "matching": likelihood_loss(log_p, good, listed_weights(slate, good)),
            "unlikelihood": unlikelihood_loss(log_p, bad, listed_weights(slate, bad)),
            "contrast": contrast_loss(matched.hidden, slate.mask, self.margin),
            "pointwise": self.criterion(self.own_logits(matched), slate),
        }
        weighted = [self.weights[name] * term for name, term in terms.items()]
        return sum(weighted[1:], weighted[0])

    def target_lists(self, slate: Slate) -> Tuple[Tensor, Tensor]:
        """A list to imitate and one to avoid, both ``[B, K]`` with −1 at slots without loss.

        By the retriever's own scores: targets do not depend on what the model reads, and under synthetic scores "the
        retriever's top K" would be mostly positives.
        """
        positive, logged = (slate.labels > 0) & slate.mask, slate.logged_scores
        good = top_positions(logged, positive, self.slate_size)
        if self.bad_lists == "unclicked":
            return good, top_positions(logged, slate.mask & ~positive, self.slate_size)
        bad = top_positions(logged, slate.mask, self.slate_size)
        hits = (gather_lists(slate.labels, bad) * (bad >= 0)).sum(1)
        return good, bad.masked_fill((hits >= hits.median()).unsqueeze(1), -1)

    @torch.no_grad()
    def training_lists(self, matched: Matched, slate: Slate) -> Tensor:
        """The mixture ``[B, 4, K]`` that the evaluator learns from: retriever's, random, greedy, sampled.

        The retriever's by its own scores even under synthetic ones, which are made of labels.
        """
        log_p = self.log_matching(matched, slate.mask)
        drawn = log_p + self.temperature * gumbel(torch.rand_like(log_p))
        keys = slate.logged_scores, torch.rand_like(slate.logged_scores)
        simple = [top_positions(key, slate.mask, self.slate_size) for key in keys]
        return torch.cat([torch.stack(simple, 1), greedy_decode(torch.stack([log_p, drawn], 1), slate.mask)], dim=1)
