"""Parts that list rerankers share: tokens, deep attention stacks, sorting by score, recurrent scans."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import first_score
from dnr_recbole.model.layers import TransformerBlock


class UserItemToken(nn.Module):
    """A linear map of [candidate ; user], the user's half computed once per request.

    Args:
        dim: width d of candidates and user.
        width: width of the token.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.item = nn.Linear(dim, width)
        self.user = nn.Linear(dim, width, bias=False)

    def forward(self, items: Tensor, user: Tensor) -> Tensor:
        """items ``[B, n, d]``, user ``[B, d]`` → ``[B, n, width]``."""
        return self.item(items) + self.user(user).unsqueeze(1)


class AttentionBlock(TransformerBlock):
    """Post-norm attention block whose queries and keys may differ, for stacks of any depth.

    Y = LN(Q + γ₁ ⊙ MHA(Q, K, K)), out = LN(Y + γ₂ ⊙ FFN(Y)). A deep post-norm stack needs a learning-rate
    warm-up, or it may stop learning in its first steps. With γ learned from a small start (LayerScale,
    Touvron et al. 2021) each block starts near the identity: ten blocks fit eight requests at learning rate 0.001.
    At 0.01 they fit them faster and may then lose the fit again; a deep stack wants the smaller rate.

    Args:
        layer_scale: start of γ; 0 leaves γ out.
    """

    def __init__(self, dim: int, n_heads: int, d_ff: int, dropout: float = 0.0, layer_scale: float = 0.0):
        super().__init__(dim, n_heads, d_ff, dropout)
        self.scaled = layer_scale > 0
        if self.scaled:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, query: Tensor, keys: Tensor, key_mask: Optional[Tensor] = None) -> Tensor:
        """query ``[B, L, d]``, keys ``[B, S, d]``, key_mask ``[B, S]`` bool → ``[B, L, d]``."""
        mixed = self.drop(self.attention(query, keys, key_mask))
        y = self.norm1(query + (self.gamma1 * mixed if self.scaled else mixed))
        mixed = self.drop(self.ff(y))
        return self.norm2(y + (self.gamma2 * mixed if self.scaled else mixed))


def scan(rnn: nn.RNNBase, inputs: Tensor, state=None):
    """``rnn(inputs, state)``; on CPU always in float32, where the half-precision kernels lack some shapes."""
    if inputs.device.type != "cpu":
        if state is not None:  # a state of the encoder may be narrower than the first inputs under autocast
            state = tuple(s.to(inputs.dtype) for s in state) if isinstance(state, tuple) else state.to(inputs.dtype)
        return rnn(inputs, state)
    with torch.autocast("cpu", enabled=False):
        if isinstance(state, tuple):
            state = tuple(s.float() for s in state)
        return rnn(inputs.float(), state)


def best_first(scores: Tensor, mask: Tensor) -> Tensor:
    """Positions ``[B, n]`` by descending score, padding behind; ties by storage position, which is random."""
    return first_score(scores).masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def worst_first(scores: Tensor, mask: Tensor) -> Tensor:
    """Positions ``[B, n]`` by ascending score; padding is still behind, so that a scan meets it last."""
    return first_score(scores).masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True)


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Rows of values ``[B, n, d]`` at positions ``[B, m]`` → ``[B, m, d]``."""
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def put_back(values: Tensor, order: Tensor) -> Tensor:
    """Undo a sort: ``values[:, j]``, ``[B, n]`` or ``[B, n, d]``, goes to position ``order[:, j]``."""
    inverse = order.argsort(-1)
    return values.gather(1, inverse) if values.dim() == 2 else take(values, inverse)


def last_state(states: Tensor, mask: Tensor) -> Tensor:
    """State ``[B, d]`` behind the last real step of ``[B, L, d]``; mask ``[B, L]``, the real part first."""
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    return take(states, last).squeeze(1)
