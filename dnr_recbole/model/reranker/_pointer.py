"""EG-Rerank's policy over lists."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.lists import NEG_INF, gather_lists, without
from dnr_recbole.model.blocks.nets import mlp


class Pointer(nn.Module):
    """Policy over lists: an LSTM reads what was chosen so far, a small net scores every free candidate.

    The original concatenates [candidate ; LSTM state] before the scoring net; its first layer is computed
    here as the sum of a candidate part (once per request) and a state part (once per step), which is the same
    function.

    Args:
        dim: width of its inputs.
        hidden: widths of the per-candidate net.
        state: width of the LSTM.
        pointer: hidden width of the scoring net.
    """

    def __init__(self, dim: int, hidden: Tuple[int, ...] = (200, 80), state: int = 32, pointer: int = 32):
        super().__init__()
        self.user_to_item = nn.Linear(dim, dim)
        self.net = mlp([dim + 1, *hidden], last_activation=True)
        self.lstm = nn.LSTM(hidden[-1], state, batch_first=True)
        self.item_part = nn.Linear(hidden[-1], pointer)
        self.state_part = nn.Linear(state, pointer, bias=False)
        self.out = nn.Linear(pointer, 1)

    def encode(self, tokens: Tensor, user: Tensor, pctr: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens ``[B, n, d]``, user ``[B, d]``, pctr ``[B, n]`` → encodings ``[B, n, e]``, keys."""
        tokens = tokens + self.user_to_item(user).unsqueeze(1)
        encoded = self.net(torch.cat([tokens, pctr.unsqueeze(-1)], dim=-1))
        return encoded, self.item_part(encoded)

    def logits(self, keys: Tensor, state: Tensor, free: Tensor, base: Optional[Tensor] = None) -> Tensor:
        """keys ``[B, n, p]``, state ``[B, .., s]``, free ``[B, .., n]`` bool → ``[B, .., n]``, masked.

        base ``[B, n]`` is added at each step.
        """
        keys = keys.view(keys.shape[0], *[1] * (state.dim() - 2), *keys.shape[1:])
        hidden = F.relu(keys + self.state_part(state).unsqueeze(-2), inplace=True)
        logits = self.out(hidden).squeeze(-1)
        if base is not None:
            logits = logits + base.view(len(base), *[1] * (logits.dim() - 2), -1)
        return logits.masked_fill(~free, NEG_INF)

    def rollout(
        self,
        encoded: Tensor,
        keys: Tensor,
        mask: Tensor,
        noise: Tensor,
        uniform: Optional[Tensor] = None,
        base: Optional[Tensor] = None,
    ):
        """Decode R lists of K candidates per request without replacement.

        Args:
            encoded, keys: of :meth:`encode`.
            mask: ``[B, n]`` bool.
            noise: ``[B, R, K, n]`` Gumbel noise added to the logits before the argmax, which samples the
                softmax; zeros decode greedily.
            uniform: ``[B]`` bool; these requests ignore the policy and draw uniformly.
            base: ``[B, n]``, added to the logits of each step.

        Returns:
            positions ``[B, R, K]`` (−1 behind the last candidate) and the policy's log-probabilities of the
            same shape.
        """
        batch, rollouts, length, n = noise.shape
        free = mask.unsqueeze(1).expand(batch, rollouts, n)
        step_input = encoded.new_zeros(batch * rollouts, 1, encoded.shape[-1])
        memory, positions, log_probs = None, [], []
        for k in range(length):
            state, memory = self.lstm(step_input, memory)
            logits = self.logits(keys, state.view(batch, rollouts, -1), free, base)
            drive = logits
            if uniform is not None:
                drive = logits.masked_fill(uniform[:, None, None] & free, 0.0)
            chosen = (drive + noise[:, :, k]).argmax(-1)
            log_probs.append(torch.log_softmax(logits, -1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1))
            positions.append(chosen.masked_fill(~free.any(-1), -1))
            free = without(free, chosen.unsqueeze(-1))
            step_input = gather_lists(encoded, chosen).view(batch * rollouts, 1, -1)
        positions = torch.stack(positions, -1)
        return positions, torch.stack(log_probs, -1).masked_fill(positions < 0, 0.0)

    def log_policy(
        self, encoded: Tensor, keys: Tensor, mask: Tensor, positions: Tensor, base: Optional[Tensor] = None
    ) -> Tensor:
        """Log-probabilities ``[B, R, K, n]`` of all choices at each step of the lists ``[B, R, K]``."""
        batch, rollouts, length = positions.shape
        n = mask.shape[1]
        # The slot in which a candidate was taken; it is free in all steps up to that one. Column n swallows
        # the −1s.
        steps = torch.arange(length, device=positions.device)
        taken = positions.new_full((batch, rollouts, n + 1), length)
        taken = taken.scatter(-1, positions.masked_fill(positions < 0, n), steps.expand_as(positions))[..., :n]
        free = mask[:, None, None, :] & (taken.unsqueeze(2) >= steps[:, None])
        inputs = F.pad(gather_lists(encoded, positions[..., :-1]), (0, 0, 1, 0))
        state, _ = self.lstm(inputs.flatten(0, 1))
        return torch.log_softmax(self.logits(keys, state.view(batch, rollouts, length, -1), free, base), -1)
