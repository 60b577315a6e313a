"""Feed-forward nets, tokens, and recurrent scans."""

from __future__ import annotations

from typing import List, Sequence

import torch
from torch import Tensor, nn

from dnr_recbole.model.blocks.dropout import Dropout


def mlp(sizes: Sequence[int], dropout: float = 0.0, activation=nn.ReLU, last_activation: bool = False) -> nn.Sequential:
    """Linear layers of the given sizes with activation and dropout between them."""
    layers: List[nn.Module] = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:])):
        layers.append(nn.Linear(a, b))
        if i < len(sizes) - 2 or last_activation:
            layers += [activation(), Dropout(dropout)]
    return nn.Sequential(*layers)


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
