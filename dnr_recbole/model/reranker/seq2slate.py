"""Seq2Slate: a pointer network that writes the list item by item."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.lists import NEG_INF, best_first, discounts, last_state, list_scores, put_back, take, without
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.nets import UserItemToken, scan
from dnr_recbole.model.context import TokenContext
from dnr_recbole.model.losses import masked_mean
from dnr_recbole.registry import register_reranker


class Memory(NamedTuple):
    """The encoded candidates, best retriever score first, and the decoder's first state. All lead with B."""

    order: Tensor  # [B, n] storage position of each rank
    mask: Tensor  # [B, n]
    tokens: Tensor  # [B, n, d] decoder inputs
    keys: Tensor  # [B, n, p] what the pointer compares with
    hidden: Tensor  # [B, d]
    cell: Tensor  # [B, d]
    residual: Optional[Tensor] = None  # [B, n] what the scores add to every logit

    def repeat(self, times: int) -> Memory:
        """Each request ``times`` times in a row."""
        repeated = {name: t.repeat_interleave(times, dim=0) for name, t in self._asdict().items() if t is not None}
        return Memory(**repeated)


class Decoder(NamedTuple):
    """State of a partly written list."""

    inputs: Tensor  # [B, d] what was chosen last
    hidden: Tensor  # [B, d]
    cell: Tensor  # [B, d]
    left: Tensor  # [B, n] bool, candidates not used yet


@register_reranker
class Seq2Slate(AbstractReranker[TokenContext]):
    """Pointer network over the initial list (Bello et al., 2019).

    An LSTM reads the candidates by descending retriever score. A second LSTM, started from the encoder's last
    state and a learned "go" vector, is fed the item that was placed last and points at the next one: the
    logit of candidate i at step j is vᵀ tanh(W_e h_i + W_d s_j), used candidates masked. Its K steps are the
    list: ``decoding: greedy`` or ``beam``. The decoder ranks the K list items first and the others by the
    logits of step 1 (the paper's one-step decoder), which are also what :meth:`score` gives.

    Loss: at each of the K steps the loss over the *remaining* candidates, weighted by 1 / log2(j + 1) and
    averaged; ``step_loss: likelihood`` is the softmax cross-entropy against the remaining positives, steps
    without one skipped (``rerank_loss: listce``), or ``rerank_loss: bce``; ``step_loss: hinge`` wants every
    remaining positive one above every remaining negative. What the decoder is fed (``trajectory``): lists
    *sampled* from the model as in the paper, *greedy* ones, or the *teacher*'s, positives first.
    ``score_fusion: residual`` enters the pointer's logits at every step.
    ``reinforce_weight`` > 0 adds REINFORCE on NDCG@K, with the mean reward of the other samples of the
    request as baseline.

    Deviation: both states of the decoder are a projection of the encoder's last output, so that lists of any
    length run in one unpacked LSTM call.
    """

    family = "generator-evaluator"
    position_inputs = ("vector",)
    paper = "Bello et al., 2019: Seq2Slate: Re-ranking and Slate Optimization with RNNs"
    permutation = "score_order"
    score_adds_residual = True

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        d, width = self.dim, config["pointer_size"]
        self.token = UserItemToken(d, d)
        self.encoder = nn.LSTM(d, d, batch_first=True)
        self.bridge = nn.Linear(d, 2 * d)
        self.decoder = nn.LSTM(d, d, batch_first=True)
        self.go = nn.Parameter(torch.randn(d) * 0.05)
        self.key = nn.Linear(d, width)
        self.query = nn.Linear(d, width, bias=False)
        self.pointer = nn.Linear(width, 1)
        self.beam_size = config["beam_size"] if config["decoding"] == "beam" else 1
        self.trajectory, self.step_loss = config["trajectory"], config["step_loss"]
        self.reinforce_weight = config["reinforce_weight"]
        self.n_samples = max(2, config["reinforce_samples"]) if self.reinforce_weight > 0 else 1
        self.register_buffer("discount", discounts(self.slate_size), persistent=False)

    # ------------------------------------------------------------------ encoder and pointer

    def encode(self, slate: UnscoredSlate) -> TokenContext:
        context = super().encode(slate)
        return TokenContext.of(context, tokens=self.token(context.candidates, context.user))

    def memory(self, context: TokenContext, slate: UnscoredSlate, x: Tensor) -> Memory:
        """Read the list in the order of ``x``."""
        order = best_first(x, slate.mask)
        mask = slate.mask.gather(1, order)
        tokens = take(self.fusion(context.tokens, x, slate.mask), order)
        states, _ = scan(self.encoder, tokens)
        hidden, cell = torch.tanh(self.bridge(last_state(states, mask))).chunk(2, dim=-1)
        residual = self.fusion.residual(x)
        residual = None if residual is None else residual.gather(1, order)
        return Memory(order, mask, tokens, self.key(self.dropout(states)), hidden, cell, residual)

    def point(self, memory: Memory, states: Tensor) -> Tensor:
        """Decoder states ``[B, K, d]`` → logits ``[B, K, n]`` in rank order, nothing masked."""
        # REINFORCE needs the policy that sampled, so no fresh dropout when its list is read back.
        queries = self.query(states if self.reinforce_weight > 0 else self.dropout(states))
        logits = self.pointer(torch.tanh(memory.keys.unsqueeze(1) + queries.unsqueeze(2))).squeeze(-1)
        return logits if memory.residual is None else logits + memory.residual.unsqueeze(1)

    def teacher_forced(self, memory: Memory, chosen: Tensor) -> Tensor:
        """Logits ``[B, K, n]`` of all steps at once, given the list ``chosen`` ``[B, K]`` (ranks ≥ 0)."""
        go = self.go.expand(len(chosen), 1, -1).to(memory.tokens.dtype)
        inputs = torch.cat([go, take(memory.tokens, chosen[:, :-1])], dim=1)
        state = memory.hidden.unsqueeze(0).contiguous(), memory.cell.unsqueeze(0).contiguous()
        return self.point(memory, scan(self.decoder, inputs, state)[0])

    def start(self, memory: Memory) -> Decoder:
        """The empty list."""
        go = self.go.expand(memory.mask.shape[0], -1).to(memory.tokens.dtype)
        return Decoder(go, memory.hidden, memory.cell, memory.mask)

    def step(self, memory: Memory, decoder: Decoder) -> Tuple[Tensor, Decoder]:
        """Logits ``[B, n]`` of the next item, not masked, and the decoder's state behind it."""
        state = decoder.hidden.unsqueeze(0).contiguous(), decoder.cell.unsqueeze(0).contiguous()
        states, (hidden, cell) = scan(self.decoder, decoder.inputs.unsqueeze(1), state)
        logits = self.point(memory, states).squeeze(1)
        return logits, decoder._replace(hidden=hidden.squeeze(0), cell=cell.squeeze(0))

    @staticmethod
    def choose(memory: Memory, decoder: Decoder, chosen: Tensor) -> Decoder:
        """Put the candidates of rank ``chosen`` ``[B]`` on the list."""
        inputs = take(memory.tokens, chosen.unsqueeze(1)).squeeze(1)
        return decoder._replace(inputs=inputs, left=without(decoder.left, chosen.unsqueeze(1)))

    def score(self, context: TokenContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        memory = self.memory(context, slate, x)
        return put_back(self.step(memory, self.start(memory))[0], memory.order)

    # ------------------------------------------------------------------ decoding

    def write(self, memory: Memory, sample: bool = False) -> Tuple[Tensor, Tensor]:
        """One list per row, greedily or sampled: ranks ``[B, K]`` and whether each is real ``[B, K]``."""
        decoder, chosen, real = self.start(memory), [], []
        for _ in range(self.slate_size):
            logits, decoder = self.step(memory, decoder)
            logits = logits.float()
            if sample:  # Gumbel-max: argmax of the perturbed logits is a draw from their softmax
                logits = logits - torch.log(torch.empty_like(logits).exponential_().clamp(min=1e-20))
            chosen.append(logits.masked_fill(~decoder.left, -torch.inf).argmax(-1))
            real.append(decoder.left.any(-1))
            decoder = self.choose(memory, decoder, chosen[-1])
        return torch.stack(chosen, 1), torch.stack(real, 1)

    def beam(self, memory: Memory, width: int) -> Tuple[Tensor, Tensor]:
        """The likeliest list in a beam of ``width``: ranks ``[B, K]`` and whether each is real ``[B, K]``."""
        batch, n = memory.mask.shape
        memory = memory.repeat(width)
        decoder = self.start(memory)
        row = torch.arange(batch, device=memory.mask.device).unsqueeze(1) * width
        # All beams are equal at first: only one of them may branch.
        total = torch.full((batch, width), NEG_INF, device=memory.mask.device)
        total[:, 0] = 0.0
        # A request out of candidates goes on with rank 0 at no cost; `real` drops it below.
        done = torch.full((n,), NEG_INF, device=total.device)
        done[0] = 0.0
        lists = row.new_zeros(batch * width, 0)
        for _ in range(self.slate_size):
            logits, decoder = self.step(memory, decoder)
            log_p = torch.log_softmax(logits.float().masked_fill(~decoder.left, NEG_INF), dim=-1)
            log_p = torch.where(decoder.left.any(-1, keepdim=True), log_p, done)
            total, best = (total.unsqueeze(-1) + log_p.view(batch, width, n)).flatten(1).topk(width, dim=-1)
            parent, chosen = (row + best // n).flatten(), (best % n).flatten()
            decoder = self.choose(memory, Decoder(*(t[parent] for t in decoder)), chosen)
            lists = torch.cat([lists[parent], chosen.unsqueeze(1)], dim=1)
        real = torch.arange(self.slate_size, device=row.device) < memory.mask[::width].sum(-1, keepdim=True)
        return lists[::width], real

    def predict(self, slate: Slate) -> Tensor:
        memory = self.memory(self.encode(slate), slate, slate.scores)
        base = put_back(self.step(memory, self.start(memory))[0], memory.order)
        ranks, real = self.write(memory) if self.beam_size == 1 else self.beam(memory, self.beam_size)
        positions = memory.order.gather(1, ranks).masked_fill(~real, -1)
        return list_scores(positions, base.float(), slate.mask)

    # ------------------------------------------------------------------ training

    def trajectories(self, memory: Memory, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """Lists to feed the decoder: ranks ``[B, K]`` and whether each is real; labels ``[B, n]`` by rank."""
        if self.trajectory == "teacher" and self.reinforce_weight == 0:
            positives_first = labels.masked_fill(~memory.mask, -1).argsort(dim=-1, descending=True, stable=True)
            chosen = F.pad(positives_first, (0, max(0, self.slate_size - labels.shape[1])))[:, : self.slate_size]
            steps = torch.arange(self.slate_size, device=labels.device)
            return chosen, steps < memory.mask.sum(-1, keepdim=True)
        with torch.no_grad():
            return self.write(memory, sample=self.trajectory == "sampled" or self.reinforce_weight > 0)

    def loss(self, context: TokenContext, slate: Slate, x: Tensor) -> Tensor:
        memory = self.memory(context, slate, x)
        if self.n_samples > 1:
            memory = memory.repeat(self.n_samples)
        labels = self.by_rank(slate.labels, memory)
        targets = labels if slate.targets is None else self.by_rank(slate.targets, memory)
        weights = None if slate.weights is None else self.by_rank(slate.weights, memory)
        chosen, real = self.trajectories(memory, labels)
        logits = self.teacher_forced(memory, chosen).float()
        left = self.left_over(memory.mask, chosen, real)
        losses: List[Tensor] = [
            self.one_step(logits[:, j], targets, left[:, j], weights) for j in range(self.slate_size)
        ]
        loss = (torch.stack(losses) * self.discount).sum() / self.discount.sum()
        if self.reinforce_weight > 0:
            gains = targets if weights is None else targets * weights
            loss = loss + self.reinforce_weight * self.reinforce(logits, left, gains, chosen, real)
        return loss

    def by_rank(self, values: Tensor, memory: Memory) -> Tensor:
        """Values ``[B, n]`` of the candidates in the order of ``memory``, once for each sample; 0 at padding."""
        return values.repeat_interleave(self.n_samples, dim=0).gather(1, memory.order) * memory.mask

    @staticmethod
    def left_over(mask: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
        """Candidates unused before each step: mask ``[B, n]``, chosen, real ``[B, K]`` → ``[B, K, n]``."""
        taken = F.one_hot(chosen, mask.shape[1]).bool() & real.unsqueeze(-1)
        before = taken.cumsum(1) - taken.long()
        return mask.unsqueeze(1) & (before == 0)

    def one_step(self, logits: Tensor, labels: Tensor, left: Tensor, weights: Optional[Tensor] = None) -> Tensor:
        """Loss of one pointer step over the remaining candidates; all ``[B, n]``, labels 0/1 or targets ≥ 0.

        A hinge counts as much as the positive that it is about.
        """
        if self.step_loss == "likelihood":
            return self.likelihood(logits, labels, left, weights)
        positive, negative = left & (labels > 0), left & (labels == 0)
        worst = logits.masked_fill(~positive, -NEG_INF).amin(-1)
        rival = logits.masked_fill(~negative, NEG_INF).amax(-1)
        if weights is not None:
            lowest = logits.masked_fill(~positive, -NEG_INF).argmin(-1, keepdim=True)
            weights = (weights * labels).gather(-1, lowest).squeeze(-1)
        return masked_mean(F.relu(1 - worst + rival), positive.any(-1) & negative.any(-1), weights)

    def reinforce(self, logits: Tensor, left: Tensor, labels: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
        """−(reward − baseline) · log p(list), mean; a request's samples are neighbours in the batch."""
        log_p = torch.log_softmax(logits.masked_fill(~left, NEG_INF), dim=-1)
        log_p = (log_p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) * real).sum(-1)
        with torch.no_grad():
            reward = self.ndcg(labels, chosen, real).view(-1, self.n_samples)
            others = (reward.sum(-1, keepdim=True) - reward) / (self.n_samples - 1)
            advantage = (reward - others).flatten()
        return -(advantage * log_p).mean()

    def ndcg(self, labels: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
        """NDCG@K ``[B]`` of the lists; 0 without a positive."""
        gain = (labels.gather(1, chosen) * real * self.discount).sum(-1)
        k = min(self.slate_size, labels.shape[1])
        ideal = (labels.topk(k, dim=-1).values * self.discount[:k]).sum(-1)
        return gain / ideal.clamp(min=self.discount[-1])
