"""Layers that several rerankers share."""

from __future__ import annotations

import contextlib
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.errors import ConfigError

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _ByteDropout(torch.autograd.Function):
    """Inverted dropout whose mask takes one random byte per element."""

    @staticmethod
    def forward(ctx, x: Tensor, level: int) -> Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_()
        # random_() leaves the sign bit 0: the top byte of each word has 7 random bits, so it gets them shifted.
        words ^= words << 1
        draws = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # The factor 0 or scale is made as an integer with its bits: casts of bytes to floats take five times longer.
        integer = _SAME_SIZE[x.element_size()]
        scale = torch.tensor(256 / (256 - level), dtype=x.dtype).view(integer)
        factor = draws.to(integer).ge_(level).mul_(scale).view(x.dtype)
        ctx.save_for_backward(factor)
        return factor * x

    @staticmethod
    def backward(ctx, grad: Tensor):
        (factor,) = ctx.saved_tensors
        return factor * grad, None


class Dropout(nn.Dropout):
    """Dropout that does not wait for random numbers on CPUs.

    PyTorch draws one Bernoulli variate per element, which costs a CPU more than the layer in front of it. Here eight
    elements share one 64-bit draw; the rate is rounded to 1/256 and the scale with it, so the mean stays exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        level = round(self.p * 256)
        if not self.training or level == 0 or x.device.type != "cpu" or level > 255:
            return super().forward(x)
        return _ByteDropout.apply(x, level)


def mlp(sizes: Sequence[int], dropout: float = 0.0, activation=nn.ReLU, last_activation: bool = False) -> nn.Sequential:
    """Linear layers of the given sizes with activation and dropout between them."""
    layers = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:])):
        layers.append(nn.Linear(a, b))
        if i < len(sizes) - 2 or last_activation:
            layers += [activation(), Dropout(dropout)]
    return nn.Sequential(*layers)


class SideTable(nn.Module):
    """Representations of ids: a learned embedding plus projections of static columns.

    Args:
        n: number of ids, padding row 0 included.
        dim: width d.
        columns: static features ``[n, f]`` or None, kept as a buffer and not trained.
        init: ``[n, f]`` from which the embedding starts (through a fixed random projection where f ≠ d), or None.
        learn_ids: False leaves the embedding out (ids of test users unseen in training).
        id_dropout: share of occurrences whose embedding is replaced in training by one learned vector, "unknown".
        trained: BoolTensor ``[n]``, the ids that training holds, or None = all. With ``id_dropout``, the others are
            unknown, too: their own embedding would be as it was drawn.
    """

    def __init__(
        self,
        n: int,
        dim: int,
        columns: Optional[Tensor] = None,
        init: Optional[Tensor] = None,
        learn_ids: bool = True,
        id_dropout: float = 0.0,
        trained: Optional[Tensor] = None,
    ):
        super().__init__()
        self.n, self.dim = n, dim
        self.embedding = nn.Embedding(n, dim, padding_idx=0) if learn_ids else None
        if learn_ids:
            with torch.no_grad():
                weight = torch.randn(n, dim) * 0.05
                if init is not None:
                    # An orthogonal map keeps the inner products of the retriever's space where it can.
                    start = init.float()
                    start = start / start[1:].std().clamp(min=1e-6) * 0.05
                    if start.shape[1] != dim:
                        basis = torch.empty(start.shape[1], dim)
                        start = start @ nn.init.orthogonal_(basis)
                    weight = start.clone()
                weight[0] = 0
                self.embedding.weight.copy_(weight)
        self.id_dropout = id_dropout if learn_ids else 0.0
        self.unknown = nn.Parameter(torch.zeros(dim)) if self.id_dropout else None
        known = torch.ones(n) if trained is None else trained.float()
        self.register_buffer("trained", known if self.id_dropout else None)
        has_columns = columns is not None and columns.shape[1] > 0
        self.register_buffer("columns", columns.float().clone() if has_columns else None)
        self.project = nn.Linear(columns.shape[1], dim) if has_columns else None
        if self.project is not None:
            nn.init.normal_(self.project.weight, std=0.05 / max(1, columns.shape[1]) ** 0.5)
            nn.init.zeros_(self.project.bias)

    def _rows(self, ids: Tensor, known: Optional[Tensor] = None) -> Tensor:
        """``known`` bool, the shape of ``ids``: False takes the unknown vector for the embedding; None = all True."""
        parts = []
        if self.embedding is not None:
            own = self.embedding(ids)
            if known is not None:
                own = torch.where(known.unsqueeze(-1), own, self.unknown * (ids > 0).unsqueeze(-1))
            parts.append(own)
        if self.project is not None:
            # The padding row must stay zero although the projection has a bias.
            parts.append(self.project(self.columns[ids]) * (ids > 0).unsqueeze(-1))
        if not parts:  # neither ids nor columns: the table knows nothing
            return torch.zeros(*ids.shape, self.dim, device=ids.device)
        return sum(parts[1:], parts[0])

    def forward(self, *ids: Tensor):
        """Representations ``[..., d]`` of one or several id tensors.

        With projected columns and more ids than rows, the whole table is projected once and then indexed.
        """
        known = [None if self.unknown is None else self._known(i) for i in ids]
        if self.project is not None and sum(i.numel() for i in ids) > self.n:
            everything = torch.arange(self.n, device=ids[0].device)
            table = self._rows(everything)
            if self.unknown is not None:  # its second half holds each id as an unknown one
                table = torch.cat([table, self._rows(everything, torch.zeros_like(everything, dtype=torch.bool))])
            out = [F.embedding(i if k is None else i + self.n * ~k, table) for i, k in zip(ids, known)]
        else:
            out = [self._rows(i, k) for i, k in zip(ids, known)]
        return out[0] if len(out) == 1 else out

    def _known(self, ids: Tensor) -> Tensor:
        """Which of the ids keep their own embedding: in training a random part, else those that training held."""
        if self.training:
            return torch.rand(ids.shape, device=ids.device) >= self.id_dropout
        return self.trained[ids] > 0


def _join(*columns: Optional[Tensor]) -> Optional[Tensor]:
    present = [c if c.dim() == 2 else c.unsqueeze(1) for c in columns if c is not None and c.numel() > 0]
    return torch.cat(present, dim=1) if present else None


def item_table(config, catalogue: Catalogue) -> SideTable:
    """Item representations as the config asks: ids, retriever's factors, popularity, features."""
    factors = catalogue.item_factors
    return SideTable(
        catalogue.n_items,
        config["embedding_size"],
        columns=_join(
            factors if config["use_retriever_factors"] else None,
            catalogue.item_popularity if config["use_popularity"] else None,
            catalogue.item_features if config["use_features"] else None,
        ),
        init=factors if config["item_init"] == "retriever" else None,
        id_dropout=config["id_dropout"],
        trained=catalogue.items_trained,
    )


def user_table(config, catalogue: Catalogue) -> SideTable:
    """User representations; the id is left out where test users do not occur in training."""
    return SideTable(
        catalogue.n_users,
        config["embedding_size"],
        columns=_join(
            catalogue.user_factors if config["use_retriever_factors"] else None,
            catalogue.user_features if config["use_features"] else None,
        ),
        learn_ids=bool(catalogue.user_ids_known),
        id_dropout=config["id_dropout"],
        trained=catalogue.users_trained,
    )


class MeanHistory(nn.Module):
    """Mean of the history's item vectors; a learned vector where the history is empty."""

    def __init__(self, dim: int):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(dim))

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        """items ``[B, H, d]``, mask ``[B, H]`` → ``[B, d]``."""
        weight = mask.to(items.dtype).unsqueeze(1)
        count = weight.sum(-1)
        mean = torch.bmm(weight, items).squeeze(1) / count.clamp(min=1)
        return torch.where(count > 0, mean, self.empty.to(mean.dtype))


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
