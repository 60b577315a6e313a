"""Multi-head attention over short lists, and blocks made of it."""

from __future__ import annotations

import contextlib
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.errors import ConfigError
from dnr_recbole.model.blocks.dropout import Dropout


def _kernels_for_many_lists(device: torch.device, n_lists: int):
    """Attention kernels that take ``n_lists`` lists times heads on ``device``.

    On an H100, cuDNN's fails on large batches of short lists in bf16, and the fused ones above the 65,535 blocks that a
    dimension of a CUDA grid has.
    """
    if device.type != "cuda" or not hasattr(torch.nn, "attention"):  # added in torch 2.3, before cuDNN's was used
        return contextlib.nullcontext()
    backend = torch.nn.attention.SDPBackend
    fused = [backend.FLASH_ATTENTION, backend.EFFICIENT_ATTENTION] if n_lists < 65536 else []
    return torch.nn.attention.sdpa_kernel([*fused, backend.MATH])


def _matmul_attention(query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor]) -> Tensor:
    """softmax(QKᵀ / √d) V, heads ``[B, h, L, d]``, from two matrix products."""
    weights = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    if mask is not None:
        weights = weights.masked_fill_(~mask, -torch.inf)
    return torch.matmul(weights.softmax(-1), value)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Scaled dot-product attention by what is fastest here.

    On CPUs the backward pass of PyTorch's fused kernel is several times slower in bf16 than two matrix products are, up
    to about 250 × 250 positions; in fp32, and without gradients, it is the faster one (docs/speed.md).

    Args:
        query: ``[B, h, L, d]``. key, value: ``[B, h, S, d]``.
        mask: bool, broadcastable to ``[B, h, L, S]``, with a True in each row; or None.
    """
    lengths = query.shape[-2] * key.shape[-2]
    halved = query.device.type == "cpu" and query.dtype == torch.bfloat16 and lengths <= 250 * 250
    if halved and torch.is_grad_enabled():
        return _matmul_attention(query, key, value, mask)
    with _kernels_for_many_lists(query.device, query.shape[0] * query.shape[1]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention with a key padding mask.

    Rows whose keys are all masked return zeros and no NaN. Attention weights are not dropped out: that would leave the
    fused kernel and make attention several times slower; the blocks drop its output instead.
    """

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        if dim % n_heads:
            raise ConfigError(f"n_heads={n_heads} must divide the width {dim} (embedding_size) of the attention")
        self.n_heads = n_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, query: Tensor, keys: Tensor, key_mask: Optional[Tensor] = None, attn_mask: Optional[Tensor] = None
    ) -> Tensor:
        """query ``[B, L, d]``, keys ``[B, S, d]``, masks ``[B, S]`` and ``[L, S]`` bool → ``[B, L, d]``."""
        heads = lambda t: t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # noqa: E731
        key, value = self.kv(keys).chunk(2, dim=-1)
        mask, dead = None, None
        if key_mask is not None:
            mask = key_mask[:, None, None, :]
            if attn_mask is not None:
                mask = mask & attn_mask
            # A query that may look nowhere would be NaN: let it look everywhere and zero the result.
            dead = ~mask.any(-1, keepdim=True)
            mask = mask | dead
        elif attn_mask is not None:
            mask = attn_mask
        mixed = attend(heads(self.q(query)), heads(key), heads(value), mask)
        if dead is not None:
            mixed = mixed.masked_fill(dead, 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward net, each with residual, dropout and layer norm (post-norm)."""

    def __init__(self, dim: int, n_heads: int, d_ff: int, dropout: float = 0.0):
        super().__init__()
        self.attention = Attention(dim, n_heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, d_ff), nn.ReLU(), Dropout(dropout), nn.Linear(d_ff, dim))
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None, attn_mask: Optional[Tensor] = None) -> Tensor:
        """x ``[B, L, d]``, mask ``[B, L]`` bool (True = real), attn_mask ``[L, L]`` bool → ``[B, L, d]``."""
        x = self.norm1(x + self.drop(self.attention(x, x, mask, attn_mask)))
        return self.norm2(x + self.drop(self.ff(x)))


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
