"""PIER: permutations near the user's taste, found by SimHash, judged by omnidirectional attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.lists import (
    best_first,
    discounts,
    gather_lists,
    list_scores,
    pages,
    score_ranks,
    top_positions,
    unpage,
)
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.attention import Attention
from dnr_recbole.model.blocks.nets import mlp
from dnr_recbole.model.context import Context
from dnr_recbole.model.losses import masked_mean
from dnr_recbole.model.reranker._list_decoding import hit_shares, plus_listed
from dnr_recbole.model.reranker._permutation_hash import PermutationHash, slot_encoding
from dnr_recbole.registry import register_reranker

RANK_BUCKETS = 16  # 2 log2(rank + 1), so the top is resolved finely; bucket 0 is "no score", for history items


class OCPM(nn.Module):
    """Omnidirectional attention, within each field across slots, then across fields; pCTR of listed items.

    Args:
        dim: width of candidate vectors.
        field: width of a field's vector.
        n_fields: fields of an item.
        length: slots K.
        hidden: widths of the head.
    """

    slots: Tensor

    def __init__(self, dim: int, field: int, n_fields: int, length: int, hidden: Tuple[int, int]):
        super().__init__()
        self.n_fields, width = n_fields, n_fields * field
        self.register_buffer("slots", slot_encoding(length, field) * 0.1, persistent=False)
        self.across_slots = Attention(field, 1)  # shared by the fields
        self.flatten = mlp([length * field, field], last_activation=True)
        self.across_fields = Attention(field, 1)
        self.item_across_fields = Attention(field, 1)
        self.item_net = mlp([dim, 60, 32, 20])
        # The head's first layer on [page ; user ; item ; slot] as a sum, so that each part is computed once.
        self.item_part = nn.Linear(width + 20 + 1, hidden[0])
        self.list_part = nn.Linear(2 * width, hidden[0], bias=False)
        self.slot_part = nn.Parameter(torch.zeros(length, hidden[0]))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(*hidden), nn.ReLU(), nn.Linear(hidden[1], 1))

    def list_vectors(self, fields: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """fields ``[B, F, n, f]``, positions ``[B, R, K]`` and their mask → page vectors ``[B, R, F f]``."""
        batch, rounds, length = positions.shape
        repeat = lambda t: t.unsqueeze(1).expand(-1, self.n_fields, -1, -1).flatten(0, 1)  # noqa: E731
        slots = gather_lists(fields.flatten(0, 1), repeat(positions)) + self.slots[:length]
        slots, slot_mask = slots.flatten(0, 1), repeat(mask).flatten(0, 1)
        mixed = (slots + self.across_slots(slots, slots, slot_mask)) * slot_mask.unsqueeze(-1)
        vector = self.flatten(mixed.flatten(1)).view(batch, self.n_fields, rounds, -1).transpose(1, 2).flatten(0, 1)
        vector = vector + self.across_fields(vector, vector)
        return vector.reshape(batch, rounds, -1)

    def item_hidden(self, fields: Tensor, tokens: Tensor, point: Tensor) -> Tensor:
        """Items' share of the head: ``[B, F, n, f]``, ``[B, n, d]``, logits ``[B, n]`` → ``[B, n, h]``."""
        batch, n = point.shape
        own = fields.transpose(1, 2).flatten(0, 1)
        own = (own + self.item_across_fields(own, own)).reshape(batch, n, -1)
        return self.item_part(torch.cat([own, self.item_net(tokens), torch.sigmoid(point).unsqueeze(-1)], dim=-1))

    def forward(
        self,
        item_hidden: Tensor,
        fields: Tensor,
        positions: Tensor,
        mask: Tensor,
        taste: Tensor,
        has_page: Tensor,
    ) -> Tensor:
        """Logits ``[B, R, K]`` of lists ``[B, R, K]``; taste ``[B, P, F f]`` page vectors of the history."""
        page = self.list_vectors(fields, positions, mask)
        affinity = page @ taste.transpose(1, 2) / page.shape[-1] ** 0.5
        weight = torch.softmax(affinity.masked_fill(~has_page.unsqueeze(1), -1e4), dim=-1) * has_page.unsqueeze(1)
        context = self.list_part(torch.cat([page, weight.to(taste.dtype) @ taste], dim=-1))
        hidden = gather_lists(item_hidden, positions) + context.unsqueeze(2) + self.slot_part[: positions.shape[-1]]
        return self.head(hidden).squeeze(-1)


class State(NamedTuple):
    """A request batch under given scores."""

    fields: Tensor  # [B, F, n, f]
    item_hidden: Tensor  # [B, n, h]
    taste: Tensor  # [B, P, F f]
    has_page: Tensor  # [B, P]
    point: Tensor  # [B, n] pointwise logits
    residual: Optional[Tensor] = None  # [B, n] what the scores add to all logits; `point` has it already


@dataclass(frozen=True)
class PIERContext(Context):
    """Attributes:
    bits: ``[B, P, bits]``, hashes of the history's pages. has_page: bool ``[B, P]``. taste: vectors of the pages.
    hashed: ``[B, n, d]``, the candidates as pages are hashed.
    """

    bits: Tensor
    has_page: Tensor
    taste: Tensor
    hashed: Tensor


@register_reranker
class PIER(AbstractReranker[PIERContext]):
    """PIER (Shi et al., KDD 2023), adapted to n retrieved candidates.

    * A pointwise head, trained jointly, picks the ``pool_size`` best candidates: K-permutations of all n = 50
      would be 10^10. The pool bounds what can be reached; :meth:`oracle` is the bound, and every run reports it.
    * FPSM (:class:`PermutationHash`) hashes all permutations of the pool and the user's pages, which are the
      newest ``n_pages`` runs of K history items, and keeps the ``n_nearest`` by weighted Hamming distance. In
      training it looks at ``train_permutations`` of them, drawn anew for each batch. Hashing passes no
      gradient.
    * OCPM scores the kept lists. Fields of an item: its vector, and its rank bucket by x (a bucket of its own
      for history items). The list with the highest mean pCTR is served, behind it the other candidates by the
      pointwise head.
    * Loss: likelihood of the candidates shown page by page as the retriever ordered them (:meth:`score`), of the
      pointwise head, and of the nearest lists, minus ``contrast_weight`` × (mean pCTR of the nearest − mean
      pCTR of the farthest lists).

    ``score_fusion: residual`` enters the pointwise logits, and with them the pool and the order of what is outside
    the list, and OCPM's, slot by slot.

    Deviations: the hash projects on random Gaussian hyperplanes (the public code multiplies with a positive
    vector, which changes no sign), and reads the item field only, since history items have no score. The mean
    pCTR is discounted by slot (``list_value``), for a plain mean cannot tell the orders of a set apart when
    labels know no position. The order of the pointwise head is one more list to choose
    (``include_pointwise``), the fallback for users without taste.

    A limit: labels here do not depend on neighbours, so OCPM learns correlation and no effect of context.
    """

    family = "generator-evaluator"
    paper = "Shi et al., KDD 2023: PIER: Permutation-Level Interest-Based End-to-End Re-ranking Framework in E-commerce"
    permutation = "score_order"
    score_adds_residual = True

    slot_weights: Tensor

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        length, field = self.slate_size, config["field_size"]
        pool = max(config["pool_size"], length)
        self.hash = PermutationHash(
            self.dim, length, pool, config["max_permutations"], config["hash_bits"], config["n_pages"]
        )
        self.item_field = nn.Linear(self.dim, field)
        self.rank_field = nn.Embedding(RANK_BUCKETS, field)
        nn.init.normal_(self.rank_field.weight, std=0.05)
        self.user_to_token = nn.Linear(self.dim, self.dim)
        self.pointwise = mlp([2 * self.dim + field, 64, 1], config["dropout"])
        self.ocpm = OCPM(self.dim, field, 2, length, (config["head_hidden"], 32))
        self.n_pages: int = config["n_pages"]
        self.n_nearest: int = config["n_nearest"]
        self.n_contrast: int = config["n_contrast"]
        self.train_permutations: int = config["train_permutations"]
        self.contrast_weight: float = config["contrast_weight"]
        self.include_pointwise: bool = config["include_pointwise"]
        discounted = config["list_value"] == "discounted"
        weights = discounts(length) if discounted else torch.ones(length)
        self.register_buffer("slot_weights", weights, persistent=False)

    # ------------------------------------------------------------------ representations

    def encode(self, slate: UnscoredSlate) -> PIERContext:
        context = super().encode(slate)
        positions, mask = self._history_pages(slate.history_mask)
        items = gather_lists(context.history, positions)
        with torch.no_grad(), torch.autocast(slate.device.type, enabled=False):
            bits = self.hash.page_bits(items.float(), mask)
        unranked = self.rank_field.weight[0].expand(*context.history.shape[:2], -1)
        fields = torch.stack([self.item_field(context.history), unranked], dim=1)
        taste = self.ocpm.list_vectors(fields, positions, mask)
        with torch.no_grad():  # as pages are hashed: without dropout and without `history_interaction`
            hashed = self.embedder.items(slate.candidates)
        return PIERContext.of(context, bits=bits, has_page=mask.any(-1), taste=taste, hashed=hashed)

    def _history_pages(self, mask: Tensor) -> Tuple[Tensor, Tensor]:
        """The newest runs of K history items: positions ``[B, P, K]``, newest page first, and their mask."""
        length = mask.sum(1).view(-1, 1, 1)
        page = torch.arange(self.n_pages, device=mask.device).view(1, -1, 1)
        slot = torch.arange(self.slate_size, device=mask.device)
        start = length - (page + 1) * self.slate_size
        positions = start.clamp(min=0) + slot  # the oldest page may be short: it then begins with the first item
        real = positions < start + self.slate_size
        return positions.masked_fill(~real, -1), real

    def represent(self, context: PIERContext, slate: UnscoredSlate, x: Tensor) -> State:
        """All that the lists of a request share under scores ``x``."""
        items = self.fusion(context.candidates, x, slate.mask)
        bucket = (2 * torch.log2(score_ranks(x, slate.mask) + 1.0)).long().clamp(max=RANK_BUCKETS - 2) + 1
        rank = self.rank_field(bucket)
        fields = torch.stack([self.item_field(items), rank.expand(*items.shape[:2], -1)], dim=1)
        user = self.user_to_token(context.user).unsqueeze(1)
        point = self.pointwise(torch.cat([items + user, items * user, rank], dim=-1)).squeeze(-1)
        point, residual = self.with_residual(point, x), self.fusion.residual(x)
        hidden = self.ocpm.item_hidden(fields, items + user, point)
        return State(fields, hidden, context.taste, context.has_page, point, residual)

    def list_logits(self, state: State, positions: Tensor, mask: Tensor) -> Tensor:
        """OCPM's logits ``[B, R, K]`` of lists of positions."""
        logits = self.ocpm(state.item_hidden, state.fields, positions, mask, state.taste, state.has_page)
        return plus_listed(logits, state.residual, positions)

    def score(self, context: PIERContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        # Pages stand for what was shown; x enters by rank bucket and score fusion.
        order = best_first(slate.logged_scores, slate.mask)
        positions, mask = pages(order, slate.mask, self.slate_size)
        return unpage(self.list_logits(self.represent(context, slate, x), positions, mask), order)

    # ------------------------------------------------------------------ the permutations worth a look

    def permutations(
        self, context: PIERContext, slate: UnscoredSlate, point: Tensor, k: int, sample: int = 0, farthest: int = 0
    ) -> Tuple[Tensor, Tensor]:
        """Lists of the pool near the user's pages.

        Args:
            point: ``[B, n]`` pointwise logits, which decide the pool.
            k: lists to keep; sample: permutations to look at (0 = all); farthest: lists of the other end to
                add.

        Returns:
            positions ``[B, k + farthest, K]`` (−1 = empty slot) and which lists are usable ``[B, k +
            farthest]``.
        """
        pool = top_positions(point.detach().float(), slate.mask, self.hash.pool)
        n_real = (pool >= 0).sum(1)
        subset = None
        if 0 < sample < len(self.hash.rows):
            subset = torch.randperm(len(self.hash.rows) - 1, device=pool.device)[: sample - 1] + 1
            subset = torch.cat([subset.new_zeros(1), subset])  # the first row is always usable
        with torch.autocast(pool.device.type, enabled=False):
            items = gather_lists(context.hashed.float(), pool) * (pool >= 0).unsqueeze(-1)
            distances = self.hash.distances(items, context.bits, context.has_page, subset)
        chosen = [self.hash.nearest(distances, n_real, k, subset)]
        if farthest:
            chosen.append(self.hash.nearest(distances, n_real, farthest, subset, farthest=True))
        columns, usable = (torch.cat(part, dim=1) for part in zip(*chosen))
        rows = self.hash.rows[columns if subset is None else subset[columns]]
        return gather_lists(pool, rows), usable

    # ------------------------------------------------------------------ training

    def losses(self, context: PIERContext, slate: Slate, x: Tensor) -> Tuple[Tensor, Tensor]:
        """The supervised loss, and the mean pCTR of the nearest lists less that of the farthest."""
        state = self.represent(context, slate, x)
        k = min(self.n_contrast, self.train_permutations, len(self.hash.rows))
        contrast = self.contrast_weight > 0
        near, usable = self.permutations(
            context, slate, state.point, k, self.train_permutations, farthest=k if contrast else 0
        )
        # Not by x: pages in the order of synthetic scores would teach OCPM that positives stand first.
        order = best_first(slate.logged_scores, slate.mask)
        shown, shown_mask = pages(order, slate.mask, self.slate_size)
        near_mask = (near >= 0) & usable.unsqueeze(-1)
        # One pass over the pages, the nearest and the farthest lists.
        lists, mask = torch.cat([shown, near], dim=1), torch.cat([shown_mask, near_mask], dim=1)
        logits = self.list_logits(state, lists, mask)
        n_pages = shown.shape[1]
        supervised = self.criterion(unpage(logits[:, :n_pages], order), slate)
        supervised = supervised + self.criterion(state.point, slate)
        nearest = slice(n_pages, n_pages + k)
        supervised = supervised + self.list_criterion(logits[:, nearest], slate, lists[:, nearest], mask[:, nearest])
        if not contrast:
            return supervised, supervised.new_zeros(())
        pctr = torch.sigmoid(logits.float())
        mask = mask & state.has_page.any(1).view(-1, 1, 1)  # without a page no list is near or far
        gap = masked_mean(pctr[:, nearest], mask[:, nearest])
        return supervised, gap - masked_mean(pctr[:, n_pages + k :], mask[:, n_pages + k :])

    def loss(self, context: PIERContext, slate: Slate, x: Tensor) -> Tensor:
        supervised, gap = self.losses(context, slate, x)
        return supervised - self.contrast_weight * gap

    # ------------------------------------------------------------------ serving

    def candidate_lists(self, context: PIERContext, slate: Slate, point: Tensor) -> Tuple[Tensor, Tensor]:
        """The lists that OCPM chooses from: positions ``[B, R, K]`` and which are usable ``[B, R]``."""
        positions, usable = self.permutations(context, slate, point, self.n_nearest)
        if self.include_pointwise:
            best = top_positions(point.float(), slate.mask, self.slate_size).unsqueeze(1)
            positions = torch.cat([best, positions], dim=1)
            usable = torch.cat([torch.ones_like(usable[:, :1]), usable], dim=1)
        return positions, usable

    def predict(self, slate: Slate) -> Tensor:
        context = self.encode(slate)
        state = self.represent(context, slate, slate.scores)
        positions, usable = self.candidate_lists(context, slate, state.point)
        pctr = torch.sigmoid(self.list_logits(state, positions, positions >= 0).float())
        # Usable lists of a request fill the same slots, so the weighted sum orders them as the weighted mean
        # does.
        value = (pctr * self.slot_weights * (positions >= 0)).sum(-1).masked_fill(~usable, -1.0)
        best = gather_lists(positions, value.argmax(-1, keepdim=True)).squeeze(1)
        return list_scores(best, state.point.float(), slate.mask)

    @torch.no_grad()
    def oracle(self, slate: Slate) -> Dict[str, Tensor]:
        """``pool``: choosing among all permutations of the pool; ``lists``: among those that OCPM gets to see.

        :meth:`predict` cannot do better than ``lists``, nor ``lists`` than ``pool``.
        """
        context = self.encode(slate)
        point = self.represent(context, slate, slate.scores).point
        positions, usable = self.candidate_lists(context, slate, point)
        pool = top_positions(point.float(), slate.mask, self.hash.pool).unsqueeze(1)
        seen = hit_shares(positions.masked_fill(~usable.unsqueeze(-1), -1), slate, self.slate_size)
        return {"pool": hit_shares(pool, slate, self.slate_size).squeeze(1), "lists": seen.amax(1)}
