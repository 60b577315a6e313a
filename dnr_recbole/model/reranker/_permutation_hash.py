"""SimHash of permutations: which orders of a few items are near the runs of a user's history."""

from __future__ import annotations

import itertools
import math
from typing import Optional, Tuple

import torch
from torch import Tensor, nn


def slot_encoding(length: int, dim: int) -> Tensor:
    """Fixed sinusoids ``[K, d]`` of wavelengths 2π … 4πK slots; longer ones would be constants here."""
    rate = (2 * length) ** (-torch.arange((dim + 1) // 2) / max(1, (dim + 1) // 2 - 1))
    angle = torch.arange(1, length + 1).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dim]


def permutation_rows(pool: int, length: int, limit: int) -> Tensor:
    """Ordered selections of ``length`` out of ``pool``: LongTensor ``[N, K]``, lexicographic, N ≤ ``limit``.

    If there are more than ``limit``, the first and a fixed random sample of the others.
    """
    if math.perm(pool, length) <= limit:
        return torch.tensor(list(itertools.permutations(range(pool), length)))
    g = torch.Generator().manual_seed(0)
    sample = torch.rand(2 * limit, pool, generator=g).argsort(1)[:, :length]
    rows = torch.cat([torch.arange(length).unsqueeze(0), sample])
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(rows)).scatter_reduce(0, group, torch.arange(len(rows)), "amin")
    kept = first.sort().values[:limit]
    return torch.unique(rows[kept], dim=0)


class PermutationHash(nn.Module):
    """FPSM: SimHash of pages and of the permutations of a small pool, and the distances between them.

    A list's vector is the sum over slots of item ⊙ slot encoding; bit b of its hash is the side of the random
    hyperplane w_b on which it lies. Hence the projection of a permutation is a sum of table entries

        ⟨w_b, Σ_k e_{i_k} ⊙ s_k⟩ = Σ_k T[k, i_k, b],   T[k, i, b] = ⟨e_i, s_k ⊙ w_b⟩,

    and no permutation vector is ever formed. T is one small product per request; its sums over the first and
    over the last half of the slots are taken once per distinct half (336 + 336 for 6 of 8 items), so each of
    the 20160 projections is one addition per bit. The distance to P pages, Σ_p w_p Hamming(h, h_p), is linear
    in the bits h: Σ_b h_b (W0_b − W1_b) + Σ_b W1_b, where W1_b (W0_b) is the weight of the pages with bit 1
    (0). Weights are scaled to integers, so distances are exact, and ties are broken by row order.

    Args:
        dim: width of item vectors.
        length: slots K.
        pool: items in the pool.
        limit: most permutations ever looked at.
        bits: hyperplanes b.
        n_pages: pages P; the weights are 1/2, 1/2, 1/3, 1/3, 1/4, … newest first.
    """

    hyperplanes: Tensor
    slots: Tensor
    rows: Tensor
    first_placed: Tensor
    first_index: Tensor
    last_placed: Tensor
    last_index: Tensor
    usable: Tensor
    page_weights: Tensor

    def __init__(self, dim: int, length: int, pool: int, limit: int, bits: int, n_pages: int):
        super().__init__()
        self.pool, self.bits = pool, bits
        self.register_buffer("hyperplanes", torch.randn(bits, dim))
        self.register_buffer("slots", slot_encoding(length, dim), persistent=False)
        rows = permutation_rows(pool, length, limit)
        self.register_buffer("rows", rows, persistent=False)
        for name, part in (("first", rows[:, : length // 2]), ("last", rows[:, length // 2 :])):
            placed, index = self._distinct(part, pool)
            self.register_buffer(f"{name}_placed", placed, persistent=False)
            self.register_buffer(f"{name}_index", index, persistent=False)
        # With m < pool real items, a row counts if its first min(K, m) items are real: it has no hole.
        real = torch.arange(pool + 1).view(-1, 1, 1)
        hole = (rows >= real) & (torch.arange(length) < real)
        self.register_buffer("usable", ~hole.any(-1), persistent=False)  # [pool + 1, N]
        divisors = [p // 2 + 2 for p in range(n_pages)]
        common = math.lcm(*divisors)
        self.register_buffer("page_weights", torch.tensor([common / v for v in divisors]), persistent=False)
        self.unit = 1 / common

    @staticmethod
    def _distinct(part: Tensor, pool: int) -> Tuple[Tensor, Tensor]:
        """Distinct rows of ``[N, k]`` as 0/1 placements ``[H, k pool]``; index of each row ``[N]``."""
        k = part.shape[1]
        if k == 0:
            return torch.zeros(1, 0), torch.zeros(len(part), dtype=torch.long)
        distinct, index = torch.unique(part, dim=0, return_inverse=True)
        placed = torch.zeros(len(distinct), k * pool)
        return placed.scatter_(1, distinct + torch.arange(k) * pool, 1.0), index

    def page_bits(self, items: Tensor, mask: Tensor) -> Tensor:
        """Hash bits ``[.., b]`` of lists with item vectors ``[.., K, d]`` and mask ``[.., K]``."""
        lists = (items * self.slots * mask.unsqueeze(-1)).sum(-2)
        return lists @ self.hyperplanes.T >= 0

    def halves(self, items: Tensor) -> Tuple[Tensor, Tensor]:
        """Projections of the distinct first and last halves of the permutations of a pool ``[B, m, d]``.

        Items that are not there have zero vectors. Returns ``[B, H1, b]`` and ``[B, H2, b]``.
        """
        maps = self.slots.unsqueeze(1) * self.hyperplanes  # [K, b, d]
        table = torch.einsum("bid,khd->bkih", items, maps).flatten(1, 2)
        cut = self.first_placed.shape[1]
        return torch.matmul(self.first_placed, table[:, :cut]), torch.matmul(self.last_placed, table[:, cut:])

    @torch.no_grad()
    def distances(self, items: Tensor, bits: Tensor, has_page: Tensor, subset: Optional[Tensor] = None) -> Tensor:
        """Weighted Hamming distances ``[B, N]`` of all permutations (or a subset) to the pages, in ``unit``.

        Args:
            items: ``[B, m, d]`` pool, zero vectors where it has no item.
            bits: ``[B, P, b]`` bool, hashes of the pages; has_page: ``[B, P]`` bool.
        """
        first, last = self.first_index, self.last_index
        if subset is not None:
            first, last = first[subset], last[subset]
        weight = self.page_weights[: bits.shape[1]] * has_page
        ones = (weight.unsqueeze(-1) * bits).sum(1)
        zeros = weight.sum(1, keepdim=True) - ones
        if torch.onnx.is_in_onnx_export():  # a graph has no buffers, and one number of chunks for all sizes
            half1, half2 = self.halves(items)
            hashes = (half1[:, first] + half2[:, last] >= 0).to(items.dtype)
            return torch.matmul(hashes, (zeros - ones).unsqueeze(-1)).squeeze(-1) + ones.sum(-1, keepdim=True)
        n, h1, h2 = len(first), len(self.first_placed), len(self.last_placed)
        # Requests in chunks that fit the cache of a CPU or the memory of a GPU. Fresh pages of memory would
        # cost more than the arithmetic, so the two large buffers are shared by all chunks.
        budget = 2**21 if items.device.type == "cpu" else 2**26
        size = min(len(items), max(1, budget // (max(n, h1 + h2) * self.bits)))
        left, right = items.new_empty(2, size * n, self.bits)
        parts = []
        for e, w0, w1 in zip(items.split(size), zeros.split(size), ones.split(size)):
            request = torch.arange(len(e), device=e.device).unsqueeze(1)
            half1, half2 = self.halves(e)
            sums, other = left[: len(e) * n], right[: len(e) * n]
            torch.index_select(half1.flatten(0, 1), 0, (request * h1 + first).flatten(), out=sums)
            torch.index_select(half2.flatten(0, 1), 0, (request * h2 + last).flatten(), out=other)
            hashes = sums.add_(other).ge_(0).view(len(e), n, -1)
            parts.append(torch.matmul(hashes, (w0 - w1).unsqueeze(-1)).squeeze(-1) + w1.sum(-1, keepdim=True))
        return torch.cat(parts)

    def nearest(
        self,
        distances: Tensor,
        n_real: Tensor,
        k: int,
        subset: Optional[Tensor] = None,
        farthest: bool = False,
    ) -> Tuple[Tensor, Tensor]:
        """The k nearest (farthest) permutations: columns of ``distances`` ``[B, k']``; is each usable?

        Args:
            distances: ``[B, N]``; n_real: ``[B]`` real items in the pool.
        """
        usable = (self.usable if subset is None else self.usable[:, subset])[n_real]
        n = distances.shape[1]
        key = distances.round().long() * n + torch.arange(n, device=distances.device)
        worst = -1 if farthest else torch.iinfo(torch.long).max
        columns = key.masked_fill(~usable, worst).topk(min(k, n), dim=-1, largest=farthest).indices
        return columns, usable.gather(1, columns)
