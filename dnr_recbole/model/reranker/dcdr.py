"""DCDR: discrete conditional diffusion over candidate lists, undone move by move."""

from __future__ import annotations

from typing import Tuple

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.lists import best_first, gather_lists, list_scores
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.attention import TransformerBlock
from dnr_recbole.model.blocks.list_evaluator import ListEvaluator
from dnr_recbole.model.blocks.nets import mlp
from dnr_recbole.model.context import Context
from dnr_recbole.model.reranker._list_decoding import evaluator_loss, gumbel, list_utility
from dnr_recbole.model.reranker._swap_diffusion import SearchResult, SwapMoves
from dnr_recbole.registry import register_reranker

UNKNOWN = 2  # the third value of a slot's condition, beside 0 and 1


class MoveNet(nn.Module):
    """p(R_{t−1} | R_t, c): a distribution over the moves of :class:`SwapMoves`.

    The slots attend to each other; candidates enter with vectors that are encoded once per request. With
    state s_a of slot a and vector h_i of candidate i, the logits are

    * stay: a net of the slots' mean;
    * exchange of a and b: q(s_a)·k(s_b) + q(s_b)·k(s_a) + u(s_a) + u(s_b), symmetric;
    * candidate i into slot a: q'(s_a)·k'(h_i) + u'(s_a) + v(h_i).

    Args:
        dim: width d.
        n_slots: K.
        n_steps: T.
        n_layers, n_heads, d_ff, dropout: of the attention among slots.
    """

    def __init__(self, dim: int, n_slots: int, n_steps: int, n_layers: int, n_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.dim, self.moves = dim, SwapMoves(n_slots)
        self.slot = nn.Parameter(torch.randn(n_slots, dim) * 0.02)
        self.time = nn.Embedding(n_steps + 1, dim)
        self.condition = nn.Embedding(3, dim)
        for table in (self.time, self.condition):
            nn.init.normal_(table.weight, std=0.02)
        self.user = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.out = nn.Linear(dim, 3 * dim + 2)
        self.stay = mlp([dim, dim, 1])
        self.pool = nn.Linear(dim, dim + 1)

    def forward(
        self,
        tokens: Tensor,
        pool: Tensor,
        user: Tensor,
        mask: Tensor,
        state: Tensor,
        t: Tensor,
        condition: Tensor,
    ) -> Tensor:
        """Log-probabilities of all moves, −inf for the illegal ones.

        Args:
            tokens: ``[B, n, d]`` candidate vectors; pool: ``self.pool(tokens)``.
            user: ``[B, d]``; mask: ``[B, n]`` bool.
            state: ``[B, W, K]`` lists; t: ``[B, W]`` their steps 1 … T.
            condition: ``[B, W, K]`` desired feedback per slot: 0, 1 or :data:`UNKNOWN`.

        Returns:
            ``[B, W, 1 + P + K·n]``
        """
        lead, filled = state.shape, state >= 0
        slots = gather_lists(tokens, state) + self.slot + self.condition(condition)
        slots = slots + (self.time(t) + self.user(user).unsqueeze(1)).unsqueeze(2)
        slots, flat_mask = slots.flatten(0, 1), filled.flatten(0, 1)
        for block in self.blocks:
            slots = block(slots, flat_mask)
        weight = flat_mask.to(slots.dtype).unsqueeze(-1)
        mean = (slots * weight).sum(1) / weight.sum(1).clamp(min=1)
        query, key, search, bias = self.out(slots).split([self.dim, self.dim, self.dim, 2], dim=-1)
        low, high = self.moves.pairs
        mutual = query @ key.transpose(1, 2) * self.dim**-0.5
        exchange = mutual[:, low, high] + mutual[:, high, low] + bias[:, low, 0] + bias[:, high, 0]
        replace = search.reshape(lead[0], -1, self.dim) @ pool[..., :-1].transpose(1, 2) * self.dim**-0.5
        replace = replace + bias[..., 1].reshape(lead[0], -1, 1) + pool[..., -1].unsqueeze(1)
        parts = (self.stay(mean), exchange, replace)
        logits = torch.cat([part.reshape(*lead[:2], -1).float() for part in parts], dim=-1)
        return logits.masked_fill(~self.moves.legal(state, mask), -torch.inf).log_softmax(-1)


@register_reranker
class DCDR(AbstractReranker):
    """DCDR (Lin et al., WWW 2024), permutation variant, adapted to retrieve the K shown out of n candidates.

    * State: K slots and the pool of the other candidates; moves as in
      :mod:`dnr_recbole.model.reranker._swap_diffusion`.
    * R_0: positives first, then the others, each in the retriever's order; in a share of the samples
      (``shuffled_targets``) its slots are shuffled, so that the condition varies. Forward: t ~ U{1 … T}
      random moves, each with probability β.
    * Condition: the labels of R_0's slots in training (dropped in a share of the samples), all ones at
      inference.
    * Reverse net: :class:`MoveNet`, on candidate vectors that a Transformer encodes once per request; trained
      by the cross-entropy of the move that leads to the true previous state of the sampled path.
    * Beside it, on the same vectors: a head that scores each candidate on its own (:meth:`score`;
      ``rerank_loss``), and an evaluator of lists, trained on the retriever's list and on lists drawn by that
      head. None of these lists depends on labels, or the evaluator would learn that positives stand first.
    * Served: beam search from the list of that head (or the retriever's: ``start``); the evaluator picks by
      expected DCG among all lists visited; the candidates outside follow by the head.
    * ``score_fusion: residual`` enters the head's logits, and so its list and the order outside the list, and the
      evaluator's, slot by slot. The reverse net has no such term: its lists must please the evaluator.

    The search (``search``): ``path`` follows the most probable path. There staying, which the forward process
    does with probability 1 − β, competes with one of 279 moves at a time and nearly always wins while several
    moves are plausible. ``density`` (default) divides each move's probability by that of the forward step it
    undoes, 1 − β or β/279. By Bayes' rule what remains is proportional to the density of the previous state,
    so the search climbs it, and staying is best exactly at a local maximum, where it stops (``early_stop``).

    A limit: labels here do not depend on neighbours, so the evaluator learns correlation and no effect of
    context.
    """

    family = "diffusion"
    paper = "Lin et al., WWW 2024: Discrete Conditional Diffusion for Reranking in Recommendation"
    permutation = "score_order"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        block = config["n_heads"], config["d_ff"], config["dropout"]
        self.n_steps: int = config["diffusion_steps"]
        self.beta: float = config["swap_probability"]
        self.user_to_token = nn.Linear(self.dim, self.dim)
        self.blocks = nn.ModuleList(TransformerBlock(self.dim, *block) for _ in range(config["n_layers"]))
        self.head = nn.Linear(self.dim, 1)
        self.net = MoveNet(self.dim, self.slate_size, self.n_steps, config["n_slot_layers"], *block)
        self.evaluator = ListEvaluator(
            self.dim, config["evaluator_hidden"], self.slate_size, config["evaluator_kind"],
            n_heads=config["n_heads"],
        )  # fmt: skip
        self.paths: int = config["paths"]
        self.condition_dropout: float = config["condition_dropout"]
        self.shuffled_targets: float = config["shuffled_targets"]
        self.evaluator_lists: int = config["evaluator_lists"]
        self.weights: Tuple[float, ...] = tuple(
            config[name] for name in ("pointwise_weight", "denoising_weight", "evaluator_weight")
        )
        self.beam_width: int = config["beam_width"]
        self.climb: bool = config["decoding"] == "density"
        self.early_stop: bool = config["early_stop"]
        self.from_head: bool = config["start"] == "head"

    @property
    def moves(self) -> SwapMoves:
        """The moves between lists."""
        return self.net.moves

    # ------------------------------------------------------------------ candidates

    def vectors(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        """Candidate vectors ``[B, n, d]`` in sight of each other and of x."""
        tokens = context.candidates + self.user_to_token(context.user).unsqueeze(1)
        tokens = self.fusion(tokens, x, slate.mask)
        for block in self.blocks:
            tokens = block(tokens, slate.mask)
        return tokens

    def score(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        return self.head(self.vectors(context, slate, x)).squeeze(-1)

    # ------------------------------------------------------------------ training

    def loss(self, context: Context, slate: Slate, x: Tensor) -> Tensor:
        tokens = self.vectors(context, slate, x)
        logits = self.with_residual(self.head(tokens).squeeze(-1), x)
        losses = (
            self.criterion(logits, slate),
            self.denoising_loss(tokens, context.user, slate),
            evaluator_loss(
                self.evaluator,
                tokens,
                context.user,
                self.sample_lists(logits, slate),
                slate,
                self.fusion.residual(x),
            ),
        )
        weighted = [weight * loss for weight, loss in zip(self.weights, losses)]
        return sum(weighted[1:], weighted[0])

    def sample_lists(self, logits: Tensor, slate: Slate) -> Tensor:
        """Lists ``[B, 1 + S, K]`` for the evaluator to learn on: the retriever's, and S drawn by the head.

        The retriever's by its own scores even under synthetic ones, which are made of labels.
        """
        keys = logits.detach().float().unsqueeze(1).expand(-1, self.evaluator_lists, -1)
        logged = slate.logged_scores.float().unsqueeze(1)
        keys = torch.cat([logged, keys + gumbel(torch.rand_like(keys))], dim=1).flatten(0, 1)
        mask = slate.mask.repeat_interleave(1 + self.evaluator_lists, dim=0)
        return self.moves.first(best_first(keys, mask), mask.sum(1)).view(len(slate), 1 + self.evaluator_lists, -1)

    def denoising_loss(self, tokens: Tensor, user: Tensor, slate: Slate) -> Tensor:
        """Cross-entropy of the move to the true previous state, mean over requests and their ``paths``."""
        batch, rows = len(slate), len(slate) * self.paths
        order, n_valid = (t.repeat_interleave(self.paths, dim=0) for t in (self.target_order(slate), slate.mask.sum(1)))
        order = self.shuffle_slots(order, n_valid)
        t = torch.randint(1, self.n_steps + 1, (rows,), device=slate.device)
        noised = self.moves.forward_process(order, n_valid, t, self.beta)
        split = lambda v: v.unflatten(0, (batch, self.paths))  # noqa: E731
        condition = self.condition_of(split(self.moves.first(order, n_valid)), slate)
        log_p = self.net(tokens, self.net.pool(tokens), user, slate.mask, split(noised.state), split(t), condition)
        weights = slate.request_weights
        loss = -log_p.gather(-1, split(noised.undo).unsqueeze(-1)).squeeze(-1)
        return loss.mean() if weights is None else (loss * weights.unsqueeze(1)).mean()

    def target_order(self, slate: Slate) -> Tensor:
        """All positions ``[B, n]``: positives, other candidates, padding; each part in the retriever's own order.

        A target, so it is the same whatever scores the model reads.
        """
        order = best_first(slate.logged_scores, slate.mask)
        rank = slate.mask.to(slate.scores.dtype) + (slate.labels > 0) * slate.mask
        return order.gather(1, rank.gather(1, order).argsort(dim=1, descending=True, stable=True))

    def shuffle_slots(self, order: Tensor, n_valid: Tensor) -> Tensor:
        """``order`` ``[R, n]`` with the first K of a random share of the rows in random order."""
        place = torch.arange(order.shape[1], device=order.device)
        chosen = torch.rand(len(order), 1, device=order.device) < self.shuffled_targets
        chosen = chosen & (place < n_valid.clamp(max=self.slate_size).unsqueeze(1))
        keys = torch.where(chosen, torch.rand(order.shape, device=order.device), place + 1.0)
        return order.gather(1, keys.argsort(dim=1))

    def condition_of(self, target: Tensor, slate: Slate) -> Tensor:
        """Labels of the lists R_0 ``[B, S, K]``, slot by slot; UNKNOWN throughout where dropped."""
        labels = gather_lists(slate.labels, target).long()
        dropped = torch.rand(target.shape[:2], device=target.device) < self.condition_dropout
        return labels.masked_fill(dropped.unsqueeze(-1), UNKNOWN)

    # ------------------------------------------------------------------ serving

    def predict(self, slate: Slate) -> Tensor:
        context = self.encode(slate)
        tokens = self.vectors(context, slate, slate.scores)
        logits = self.with_residual(self.head(tokens).squeeze(-1).float(), slate.scores)
        return list_scores(self.denoise(tokens, context.user, slate).best, logits, slate.mask)

    def denoise(self, tokens: Tensor, user: Tensor, slate: Slate) -> SearchResult:
        """Search for a list whose every slot is clicked, from the head's or the retriever's list (``start``).

        ``tokens`` ``[B, n, d]`` are the vectors under ``slate.scores``.
        """
        n_valid = slate.mask.sum(1)
        # The retriever's list is one that it made, so not by the scores that the model may be given instead.
        first = slate.logged_scores
        if self.from_head:
            first = self.with_residual(self.head(tokens).squeeze(-1).float(), slate.scores)
        start = self.moves.first(best_first(first, slate.mask), n_valid)
        pool = self.net.pool(tokens)
        # log of the forward process's odds of staying against one particular move
        odds = (self.moves.count(n_valid).clamp(min=1) * (1 - self.beta) / self.beta).log().view(-1, 1, 1)

        def gains(states: Tensor, t: int) -> Tensor:
            times = torch.full(states.shape[:2], t, dtype=torch.long, device=states.device)
            log_p = self.net(tokens, pool, user, slate.mask, states, times, torch.ones_like(states))
            if not self.climb:
                return log_p
            gain = log_p - log_p[..., :1] + odds
            return torch.cat([torch.zeros_like(gain[..., :1]), gain[..., 1:]], dim=-1)

        residual = self.fusion.residual(slate.scores)
        value = lambda states: list_utility(self.evaluator, tokens, user, states, residual)  # noqa: E731
        return self.moves.search(
            start, slate.mask.shape[1], gains, value,
            self.n_steps, self.beam_width, self.early_stop,
        )  # fmt: skip
