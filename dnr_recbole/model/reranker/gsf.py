"""GSF: groupwise scoring functions."""

from __future__ import annotations

from typing import List

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import UnscoredSlate
from dnr_recbole.lists import inverse
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.nets import mlp
from dnr_recbole.model.context import Context
from dnr_recbole.registry import register_reranker

_CHUNK = 2**22  # numbers in the first hidden layer that prediction holds at a time


@register_reranker
class GSF(AbstractReranker):
    """One net scores m candidates together; a candidate's logit is the mean over the groups it belongs to.

    The groups of a *shuffle* are the runs of m neighbours in a random circular order of the valid candidates:
    each candidate is once in every slot, members are distinct, and the mean over shuffles estimates the mean
    over all groups without bias. Training draws ``n_shuffles`` of them. Prediction is exact for m ≤ 2 (all
    ordered pairs); for m > 2 it takes ``eval_shuffles`` orders given by fixed random keys of the item ids, so
    that neither storage order nor the batch matters. A list of v < m candidates forms groups of v.

    The net's first layer is a sum over slots, computed once per candidate and slot instead of once per group.
    Logits are averaged raw (the softmax is in the loss). Deviation: the paper sums over groups; the mean does
    not depend on the number of candidates or shuffles.
    """

    family = "list refinement"
    paper = "Ai et al., ICTIR 2019: Learning Groupwise Multivariate Scoring Functions Using Deep Neural Networks"
    permutation = "equivariant"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.m: int = config["group_size"]
        self.n_shuffles: int = config["n_shuffles"]
        self.width, *rest = config["hidden_sizes"]
        self.slots = nn.Linear(self.dim, self.m * self.width, bias=False)
        self.from_user = nn.Linear(self.dim, self.width)
        self.net = nn.Sequential(nn.ReLU(), self.dropout, mlp([self.width, *rest, self.m], config["dropout"]))
        keys = None
        if self.m > 2:
            generator = torch.Generator().manual_seed(2019)
            keys = torch.rand(catalogue.n_items, config["eval_shuffles"], generator=generator)
        self.register_buffer("keys", keys)

    def score(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        tokens = self.fusion(context.candidates, x, slate.mask)
        first = self.slots(tokens).unflatten(-1, (self.m, self.width))
        user = self.from_user(context.user).unsqueeze(1)
        if self.m == 1:
            return self.net(first[:, :, 0] + user).squeeze(-1)
        if self.training:
            keys = torch.rand(*slate.mask.shape, self.n_shuffles, device=slate.device)
            return self.shuffled(first, user, slate.mask, keys)
        if self.m == 2:
            return self.all_pairs(first, user, slate.mask)
        return self.shuffled(first, user, slate.mask, self.keys[slate.candidates])

    def shuffled(self, first: Tensor, user: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
        """Mean over the groups of R shuffles.

        Args:
            first: ``[B, n, m, width]``, each candidate's share of the first layer in each slot.
            user: ``[B, 1, width]``, the user's share.
            mask: ``[B, n]`` bool.
            keys: ``[B, n, R]``; sorting by ``keys[..., r]`` gives the order of shuffle r.

        Returns:
            logits ``[B, n]``
        """
        valid = mask.sum(1, keepdim=True).clamp(min=1)
        place = torch.arange(mask.shape[1], device=mask.device)
        terms: List[Tensor] = []
        for r in range(keys.shape[-1]):
            order = keys[..., r].masked_fill(~mask, torch.inf).argsort(1)  # place → candidate, valid ones first
            rank = inverse(order)
            hidden = user
            for k in range(self.m):
                member = order.gather(1, (place + k) % valid).unsqueeze(-1).expand(-1, -1, self.width)
                hidden = hidden + first[:, :, k].gather(1, member) * (k < valid).unsqueeze(-1)
            out = self.net(hidden)
            for k in range(self.m):
                terms.append(out[..., k].gather(1, (rank - k) % valid) * (k < valid))
        return sum(terms[1:], terms[0]) / (keys.shape[-1] * valid.clamp(max=self.m))

    def all_pairs(self, first: Tensor, user: Tensor, mask: Tensor) -> Tensor:
        """Exact mean over all ordered pairs of valid candidates (m = 2); shapes as :meth:`shuffled`."""
        batch, n = mask.shape
        head, tail = first[:, :, 0] + user, first[:, :, 1]
        place = torch.arange(n, device=mask.device)
        different = place.unsqueeze(1) != place
        total = torch.zeros(batch, n, device=mask.device)
        # An exported graph has one number of parts for all sizes.
        whole = torch.onnx.is_in_onnx_export()
        for part in (place,) if whole else place.split(max(1, _CHUNK // (batch * n * self.width))):
            out = self.net(head.unsqueeze(2) + tail[:, part].unsqueeze(1))  # [B, n, chunk, 2]
            counts = (mask.unsqueeze(2) & mask[:, part].unsqueeze(1) & different[:, part]).unsqueeze(-1)
            out = out * counts
            as_head, as_tail = out[..., 0].sum(2), out[..., 1].sum(1)
            total = (total + as_head).index_add(1, part, as_tail.to(total.dtype))
        partners = mask.sum(1, keepdim=True) - 1
        alone = self.net(head)[..., 0]
        return torch.where(partners > 0, total / (2 * partners.clamp(min=1)), alone)
