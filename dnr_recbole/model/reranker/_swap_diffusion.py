"""Discrete diffusion over ordered lists with a pool: moves, forward process, and beam search backwards.

A state is a list of K slots; the request's other candidates are the pool. A move exchanges two candidates of
which at least one is in a slot, or does nothing. Moves are numbered

* 0: stay;
* 1 … P, P = K(K−1)/2: exchange slots a < b, number 1 + b(b−1)/2 + a;
* 1 + P + a·n + i: the candidate at position i of the request, now in the pool, replaces that of slot a.

Of the K·n numbers of the last kind, those whose candidate is padding or in a slot already are illegal: for
n = 50 and K = 6 there are 1 + 15 + 264 = 280 legal moves. Each move is undone by one move, and every list has
as many, so the forward kernel is symmetric and tends to the uniform distribution over lists.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.lists import gather_lists, without


class Noised(NamedTuple):
    """The end of a sampled forward path: the list R_t, and the move that leads back to R_{t−1}."""

    state: Tensor  # [R, K]
    undo: Tensor  # [R]


class SearchResult(NamedTuple):
    """What a backward search found.

    Attributes:
        best: ``[B, K]`` the most valuable of all visited lists.
        value: ``[B]`` its value.
        states: ``[B, W, K]`` the last beam, by descending total; totals ``[B, W]`` (−inf = no list).
    """

    best: Tensor
    value: Tensor
    states: Tensor
    totals: Tensor


class SwapMoves(nn.Module):
    """Moves between lists of K slots. A state holds candidate positions; −1 is an empty slot (n < K).

    Args:
        n_slots: K.
    """

    slots: Tensor
    pairs: Tensor

    def __init__(self, n_slots: int):
        super().__init__()
        self.n_slots = n_slots
        self.n_pairs = n_slots * (n_slots - 1) // 2
        high, low = torch.tril_indices(n_slots, n_slots, -1)
        rows = torch.arange(1, 1 + self.n_pairs)
        slots = torch.arange(n_slots).repeat(1 + self.n_pairs, 1)
        slots[rows, high], slots[rows, low] = low, high
        # [1 + P, K]: the slot whose candidate each slot gets, for stay and each exchange
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("pairs", torch.stack([low, high]), persistent=False)  # [2, P]

    def first(self, order: Tensor, n_valid: Tensor) -> Tensor:
        """The first K of an order ``[R, n]`` of positions, valid ones first; n_valid ``[R]`` → ``[R, K]``."""
        state = F.pad(order[:, : self.n_slots], (0, self.n_slots), value=-1)[:, : self.n_slots]
        return state.masked_fill(torch.arange(self.n_slots, device=order.device) >= n_valid.unsqueeze(1), -1)

    def count(self, n_valid: Tensor) -> Tensor:
        """Number of legal moves besides stay, for requests of ``n_valid`` candidates."""
        filled = n_valid.clamp(max=self.n_slots)
        return filled * (filled - 1) // 2 + filled * (n_valid - filled)

    def legal(self, state: Tensor, mask: Tensor) -> Tensor:
        """Which moves are legal: state ``[B, W, K]``, mask ``[B, n]`` bool → ``[B, W, 1 + P + K·n]`` bool."""
        n, filled = mask.shape[1], state >= 0
        free = F.pad(mask, (0, 1)).unsqueeze(1).repeat(1, state.shape[1], 1)  # column n swallows empty slots
        free = without(free, state.masked_fill(~filled, n))[..., :n]
        exchange = filled[..., self.pairs[0]] & filled[..., self.pairs[1]]
        replace = (filled.unsqueeze(-1) & free.unsqueeze(-2)).flatten(-2)
        return torch.cat([torch.ones_like(filled[..., :1]), exchange, replace], dim=-1)

    def make(self, state: Tensor, move: Tensor, n: int) -> Tensor:
        """Lists behind legal moves: state ``[.., K]``, move ``[..]``, n candidates → ``[.., K]``."""
        replacing = move > self.n_pairs
        exchanged = state.gather(-1, self.slots[move.masked_fill(replacing, 0)])
        number = (move - 1 - self.n_pairs).clamp(min=0).unsqueeze(-1)
        here = torch.arange(self.n_slots, device=state.device) == torch.div(number, n, rounding_mode="floor")
        return torch.where(replacing.unsqueeze(-1) & here, number % n, exchanged)

    def forward_process(self, order: Tensor, n_valid: Tensor, t: Tensor, beta: float) -> Noised:
        """Walk t steps from R_0; each makes, with probability β, one legal move but stay, uniformly drawn.

        Args:
            order: ``[R, n]`` positions of all candidates; the first K are R_0, then the pool, then padding.
            n_valid: ``[R]`` number of candidates that are no padding.
            t: ``[R]`` steps; 0 leaves R_0.
            beta: probability of a move per step.
        """
        n = order.shape[1]
        # Exchanges of places a < b of the order, a in a slot. By ascending b, so that the first count(m) of
        # them are the legal ones of a request with m candidates.
        high, low = torch.tril_indices(n, min(self.n_slots, n), -1, device=order.device)
        count = self.count(n_valid)
        undo = torch.zeros_like(t)
        for step in range(1, int(t.max()) + 1 if n > 1 else 1):
            moves = (step <= t) & (count > 0) & (torch.rand(t.shape, device=t.device) < beta)
            pick = (torch.rand(t.shape, device=t.device) * count).long()
            pick = torch.minimum(pick, count - 1).clamp(min=0)
            a = low[pick].unsqueeze(1)
            b = torch.where(moves.unsqueeze(1), high[pick].unsqueeze(1), a)
            left, right = order.gather(1, a), order.gather(1, b)
            order = order.scatter(1, a, right).scatter(1, b, left)
            back = torch.where(b < self.n_slots, 1 + b * (b - 1) // 2 + a, 1 + self.n_pairs + a * n + left)
            undo = torch.where((step == t) & moves, back.squeeze(1), undo)
        return Noised(self.first(order, n_valid), undo)

    def search(
        self,
        start: Tensor,
        n: int,
        gains: Callable[[Tensor, int], Tensor],
        value: Callable[[Tensor], Tensor],
        n_steps: int,
        width: int,
        early_stop: bool = True,
    ) -> SearchResult:
        """Beam search from R_T towards R_0 that keeps the most valuable of all lists it passes.

        A list's total is the largest sum of gains over the ways that led to it. Lists in a beam are distinct.

        Args:
            start: ``[B, K]`` R_T.
            n: candidates per request.
            gains: lists ``[B, W, K]`` and step t → gain of every move ``[B, W, 1 + P + K·n]``, −inf where
                illegal.
            value: lists ``[B, W, K]`` → ``[B, W]``.
            n_steps: T.
            width: lists kept per step; 1 is greedy descent.
            early_stop: a request is finished when the best list came about by staying.
        """
        states = start.unsqueeze(1)
        totals = torch.zeros(states.shape[:2], device=start.device)
        best, best_value = start, value(states)[:, 0]
        done = torch.zeros_like(best_value, dtype=torch.bool)
        for t in range(n_steps, 0, -1):
            gain = gains(states, t)
            n_moves = gain.shape[-1]
            sums = (totals.unsqueeze(-1) + gain).flatten(1)
            # A list can be reached once from each parent, so this many hold the ``width`` best distinct ones.
            top, index = sums.topk(min(width * states.shape[1], sums.shape[1]), dim=1)
            parent, move = torch.div(index, n_moves, rounding_mode="floor"), index % n_moves
            move = move.masked_fill(top == -torch.inf, 0)
            children = self.make(gather_lists(states, parent), move, n)
            if states.shape[1] > 1:
                same = (children.unsqueeze(1) == children.unsqueeze(2)).all(-1).tril(-1).any(-1)
                top = top.masked_fill(same, -torch.inf)
            totals, keep = top.topk(min(width, top.shape[1]), dim=1)
            states = gather_lists(children, keep)
            values = value(states).masked_fill((totals == -torch.inf) | done.unsqueeze(1), -torch.inf)
            here, at = values.max(1)
            better = here > best_value
            best = torch.where(better.unsqueeze(1), gather_lists(states, at.unsqueeze(1)).squeeze(1), best)
            best_value = torch.where(better, here, best_value)
            if early_stop:
                done = done | (move[:, 0] == 0)
                if not torch.onnx.is_in_onnx_export() and bool(done.all()):  # no way out of a graph
                    break
        return SearchResult(best, best_value, states, totals)
