"""DiffuRec: diffuses the vector of the item to come and restores it from the history."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.lists import NEG_INF
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.attention import TransformerBlock
from dnr_recbole.model.context import Context
from dnr_recbole.model.losses import masked_mean
from dnr_recbole.registry import register_reranker


class GaussianDiffusion(nn.Module):
    """Variances of the Gaussian diffusion, and the reverse chain on a subset of its steps.

    Steps count 0 … T−1, and index 0 is one step of noise already: the signal left behind step t is ᾱ_t, with
    ᾱ_{−1} = 1 for "no noise". β grows linearly ("truncated linear": 0.0131 … 0.635 for T = 32, ᾱ_{T−1} ≈
    1e−6; cut at 0.999, so that a short chain ends in noise as well).

    The reverse chain visits ``reverse_steps`` of the T steps, evenly spaced, the first and the last among
    them. Its posteriors are those of the chain whose ᾱ are ᾱ at the visited steps; visiting all T is the
    original.

    Args:
        n_steps: T.
        reverse_steps: number of steps visited backwards, R ≤ T.
    """

    root_signal: Tensor
    root_noise: Tensor
    from_x0: Tensor
    from_xt: Tensor
    sigma: Tensor
    times: Tensor

    def __init__(self, n_steps: int, reverse_steps: int):
        super().__init__()
        scale = 1000 / n_steps
        first, last = (min(scale * edge + 0.01, 0.999) for edge in (0.0001, 0.02))
        beta = torch.linspace(first, last, n_steps, dtype=torch.float64)
        signal = F.pad((1 - beta).cumprod(0), (1, 0), value=1.0)  # entry t + 1 is ᾱ_t
        times = torch.linspace(0, n_steps - 1, reverse_steps, dtype=torch.float64).round().long()
        if reverse_steps == 1:  # a single step must start where the noise is
            times = times + n_steps - 1
        now = signal[times + 1]
        before = F.pad(now[:-1], (1, 0), value=1.0)
        tables = {
            "root_signal": signal.sqrt(),
            "root_noise": (1 - signal).sqrt(),
            "from_x0": before.sqrt() * (1 - now / before) / (1 - now),
            "from_xt": (now / before).sqrt() * (1 - before) / (1 - now),
            "sigma": ((1 - now / before) * (1 - before) / (1 - now)).sqrt(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.register_buffer("times", times, persistent=False)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """√ᾱ_t x_0 + √(1 − ᾱ_t) ε: x0 and noise ``[B, d]``, t ``[B]`` in −1 … T−1 → ``[B, d]``."""
        return self.root_signal[t + 1].unsqueeze(-1) * x0 + self.root_noise[t + 1].unsqueeze(-1) * noise

    def reverse(self, restore: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor) -> Tensor:
        """Walk from noise to an item vector.

        Each step takes the mean of q(x_{t−1} | x_t, x̂_0) plus noise of its variance; the last takes no
        noise, and its mean is x̂_0 itself.

        Args:
            restore: x_t ``[N, d]``, t ``[N]`` → x̂_0 ``[N, d]``.
            x: ``[N, d]`` pure noise.
            noise: ``[R − 1, N, d]`` noise of the steps but the last.
        """
        for i in range(len(self.times) - 1, -1, -1):
            x0 = restore(x, self.times[i].expand(x.shape[0]))
            x = self.from_x0[i] * x0 + self.from_xt[i] * x
            if i > 0:
                x = x + self.sigma[i] * noise[i - 1]
        return x


def sinusoid(length: int, dim: int) -> Tensor:
    """The usual sine and cosine table ``[length, d]`` of positions 0 … length − 1."""
    half = (dim + 1) // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half) / half)
    angle = torch.arange(length).unsqueeze(1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)[:, :dim]


@dataclass(frozen=True)
class DiffuRecContext(Context):
    """Attributes:
    tokens: ``[B, H, d]`` history tokens. valid: bool ``[B, H]``, which of them count. relation: ``[B, n]``, the term of
    ``history_interaction``. interest: ``[B, d]``, the result of the reverse chains, outside training.
    """

    tokens: Tensor
    valid: Tensor
    relation: Optional[Tensor] = None
    interest: Optional[Tensor] = None


@register_reranker
class DiffuRec(AbstractReranker[DiffuRecContext]):
    """DiffuRec (Li et al., TOIS 2023), adapted to candidate lists.

    * Forward: the vector of one positive per request, drawn anew at each step, is noised to a random step t.
    * Approximator: history vectors + λ ⊙ (x_t + time embedding) with λ ~ N(δ, δ) per element, through a
      Transformer; the newest position's output is x̂_0.
    * Match: logit of candidate i = x̂_0 · e_i(x) + b + r_i, where e_i(x) is the candidate's vector behind score
      fusion and r_i what ``history_interaction`` adds. ``score_fusion: residual`` is a further term, for candidates:
      under ``targets: catalogue`` all other items count as x = 1/2, whose log-odds are 0.
    * Loss: cross-entropy of the positive among the n candidates (``targets: candidates``) or among all items
      (``catalogue``), plus ``pointwise_weight`` × rerank_loss of all labels on the same logits, which
      calibrates them and lets requests without a positive, whose x_t is pure noise, take part.
    * Served: the mean score of ``chains`` reverse chains. Their noise is fixed and the same for every
      request, so a request's scores never change. Since a score is linear in x̂_0, the chains' x̂_0 are
      averaged.

    Deviations from the public code: there the mask covers queries, so padding is attended; here it covers
    keys. λ's noise is off at inference (λ = δ). Time steps are drawn uniformly (the public "loss-aware"
    sampler is never updated and so does the same). History tokens know their age by an embedding, as nothing
    else orders them. Only the newest position is computed in the last block, the one output that is read. The
    reverse chain visits few of the T steps by default: with λ near δ = 0.001, x_t moves x̂_0 very little.
    """

    family = "diffusion"
    position_inputs = ("logit",)
    embeds = ("items", "mean_history", "interaction")  # the paper's state comes from the history alone
    paper = "Li et al., TOIS 2023: DiffuRec: A Diffusion Model for Sequential Recommendation"
    permutation = "equivariant"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        d = self.dim
        self.n_steps: int = config["diffusion_steps"]
        self.diffusion = GaussianDiffusion(self.n_steps, min(config["reverse_steps"], self.n_steps))
        self.delta: float = config["delta"]
        self.position = nn.Embedding(config["history_length"], d)
        nn.init.normal_(self.position.weight, std=0.02)
        self.norm = nn.LayerNorm(d)
        self.register_buffer("time_table", sinusoid(self.n_steps, d), persistent=False)
        self.time_net = nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d))
        self.blocks = nn.ModuleList(
            TransformerBlock(d, config["n_heads"], config["d_ff"], config["block_dropout"])
            for _ in range(config["n_layers"])
        )
        self.bias = nn.Parameter(torch.zeros(()))
        self.relation = nn.Linear(d, 1) if self.embedder.interacts else None
        self.whole_catalogue: bool = config["targets"] == "catalogue"
        self.pointwise_weight: float = config["pointwise_weight"]
        g = torch.Generator().manual_seed(config["chain_seed"])
        noise = torch.randn(len(self.diffusion.times), config["chains"], d, generator=g)
        self.register_buffer("noise", noise, persistent=False)

    # ------------------------------------------------------------------ history and approximator

    def encode(self, slate: UnscoredSlate) -> DiffuRecContext:
        candidates, history = self.embedder.items(slate.candidates, slate.history)
        user = self.embedder.mean_history(history, slate.history_mask)
        # A request without history keeps one token, so that its x_t has something to be added to.
        first = torch.arange(history.shape[1], device=slate.device) == 0
        empty = ~slate.history_mask.any(1, keepdim=True) & first
        valid = slate.history_mask | empty
        tokens = torch.where(empty.unsqueeze(-1), self.embedder.mean_history.empty.to(history.dtype), history)
        newest = valid.sum(1, keepdim=True) - 1
        age = (newest - torch.arange(history.shape[1], device=slate.device)).clamp(min=0)
        age = age.clamp(max=self.position.num_embeddings - 1)
        tokens = self.norm(self.dropout(tokens + self.position(age)))
        relation = None
        if self.relation is not None:
            relation = self.relation(self.embedder.interaction(candidates, history, slate)).squeeze(-1)
        interest = None if self.training else self.sample(tokens, valid)
        return DiffuRecContext(candidates, history, user, tokens, valid, relation, interest)

    def approximate(self, tokens: Tensor, valid: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x̂_0 ``[B, d]`` from history tokens ``[B, H, d]``, their mask, x_t ``[B, d]`` and t ``[B]``."""
        shift = (x + self.time_net(self.time_table[t])).unsqueeze(1)
        if self.training:
            share = torch.randn_like(tokens).mul_(self.delta).add_(self.delta)
            hidden = tokens + share * shift
        else:
            hidden = tokens + self.delta * shift
        for block in self.blocks[:-1]:
            hidden = block(hidden, valid)
        newest = (valid.sum(1) - 1).view(-1, 1, 1).expand(-1, 1, self.dim)
        last, query = self.blocks[-1], hidden.gather(1, newest)
        query = last.norm1(query + last.drop(last.attention(query, hidden, valid)))
        return last.norm2(query + last.drop(last.ff(query))).squeeze(1)

    def sample(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Mean result ``[B, d]`` of the reverse chains for history tokens ``[B, H, d]`` and their mask."""
        batch, chains = tokens.shape[0], self.noise.shape[1]
        tokens, valid = (t.repeat_interleave(chains, dim=0) for t in (tokens, valid))
        noise = self.noise.repeat(1, batch, 1)  # chain s of every request gets the same noise
        restore = lambda x, t: self.approximate(tokens, valid, x, t).float()  # noqa: E731
        return self.diffusion.reverse(restore, noise[-1], noise[:-1]).view(batch, chains, -1).mean(1)

    # ------------------------------------------------------------------ scores and loss

    def match(self, interest: Tensor, context: DiffuRecContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        """Logits ``[B, n]`` of the candidates for x̂_0 ``[B, d]``."""
        items = self.fusion(context.candidates, x, slate.mask)
        logits = (items @ interest.to(items.dtype).unsqueeze(-1)).squeeze(-1) + self.bias
        return logits if context.relation is None else logits + context.relation

    def score(self, context: DiffuRecContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        """In evaluation, by the reverse chains; in training, by x̂_0 of a single step from pure noise."""
        interest = context.interest
        if interest is None:
            noise = torch.randn_like(context.user)
            t = torch.full_like(slate.users, self.n_steps - 1)
            interest = self.approximate(context.tokens, context.valid, noise, t)
        return self.match(interest, context, slate, x)

    def loss(self, context: DiffuRecContext, slate: Slate, x: Tensor) -> Tensor:
        target, usable = random_positive(slate)
        t = torch.randint(0, self.n_steps, (len(slate),), device=slate.device)
        t = t.masked_fill(~usable, self.n_steps - 1)
        rows = torch.arange(len(slate), device=slate.device)
        noise = torch.randn_like(context.user)
        noised = self.diffusion.q_sample(context.candidates[rows, target], t, noise)
        noised = torch.where(usable.unsqueeze(-1), noised, noise)
        interest = self.approximate(context.tokens, context.valid, noised, t)
        logits = self.with_residual(self.match(interest, context, slate, x), x)
        weights = None if slate.label_weights is None else slate.label_weights[rows, target]
        loss = masked_mean(self.surprise(logits, interest, slate)[rows, target], usable, weights)
        if self.pointwise_weight > 0:
            loss = loss + self.pointwise_weight * self.criterion(logits, slate)
        return loss

    def surprise(self, logits: Tensor, interest: Tensor, slate: UnscoredSlate) -> Tensor:
        """−log softmax ``[B, n]`` of the candidates' logits among themselves or among all items.

        Items outside the request have no retriever score; they enter with their plain vectors.
        """
        logits = logits.float().masked_fill(~slate.mask, NEG_INF)
        total = logits.logsumexp(-1, keepdim=True)
        if self.whole_catalogue:
            table = self.embedder.items(torch.arange(self.n_items, device=slate.device))
            others = (interest.to(table.dtype) @ table.T).float() + self.bias
            inside = torch.cat([slate.candidates * slate.mask, torch.zeros_like(slate.candidates[:, :1])], dim=1)
            others = others.scatter(1, inside, NEG_INF)  # no candidate twice, and no padding item
            total = torch.logaddexp(total, others.logsumexp(-1, keepdim=True))
        return total - logits


def random_positive(slate: Slate) -> Tuple[Tensor, Tensor]:
    """A uniformly drawn positive per request: positions ``[B]``, and ``[B]`` bool whether there is one."""
    positive = (slate.labels > 0) & slate.mask
    keys = torch.rand(positive.shape, device=slate.device).masked_fill(~positive, -1.0)
    return keys.argmax(1), positive.any(1)
