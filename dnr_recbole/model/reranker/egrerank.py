"""EG-Rerank: a list evaluator, a generator trained by PPO to please it, and a discriminator of its lists."""

from __future__ import annotations

from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.lists import best_first, gather_lists, list_scores, pages, score_ranks, unpage
from dnr_recbole.model.abstract_reranker import AbstractReranker, Stage, Step
from dnr_recbole.model.blocks.list_evaluator import ListEvaluator
from dnr_recbole.model.context import Context
from dnr_recbole.model.losses import bce, masked_mean
from dnr_recbole.model.reranker._list_decoding import plus_listed
from dnr_recbole.model.reranker._pointer import Pointer
from dnr_recbole.registry import register_reranker


class Episode(NamedTuple):
    """What the generator did under its old parameters: inputs and consequences, all without gradient."""

    tokens: Tensor  # [B, n, d]
    user: Tensor  # [B, d]
    pctr: Tensor  # [B, n]
    mask: Tensor  # [B, n]
    positions: Tensor  # [B, R, K]
    log_probs: Tensor  # [B, R, K]
    advantages: Tensor  # [B, R, K]
    rewards: Tensor  # [B, R, K]
    residual: Optional[Tensor] = None  # [B, n]


@register_reranker
class EGRerank(AbstractReranker):
    """EG-Rerank (Huzhang et al., TKDE 2021), adapted to retrieved candidates.

    * Evaluator: a GRU over the list, then a two-layer head, gives each slot's pCTR. It is pretrained on the
      candidates shown page by page as the retriever ordered them, and on random sub-lists with their labels,
      then keeps learning beside the generator (the original freezes it: ``freeze_evaluator``), so that a
      framework can train it under other scores. Those enter by ``score_fusion``: the pages stand for what was
      shown, and an evaluator of pages in the order of synthetic scores would learn that positives stand first.
    * Generator: a pointer decoder of K steps (:class:`Pointer`). PPO with a clipped ratio and an entropy
      bonus; several rollouts per request; the advantage is the discounted return, standardised over the
      rollouts at each step. ``explore`` draws a request's lists uniformly with that probability, as the
      public code does with whole batches (0.2), taking the ratio to the old policy all the same. That is
      biased: random lists are each other's baseline, so what beats them is learned even where the policy does
      better already. With a planted evaluator it led away from the best lists again, and sampling the policy
      with an entropy bonus of 0.01 found them; hence 0 is the default.
    * Discriminator: evaluator-shaped, logged against generated lists; −log(1 − D) is added to the reward.
      The logged list is the retriever's top K.
    * ``score_fusion: residual`` enters the evaluator's logits slot by slot, hence pCTR, rewards and the order
      behind the list, and the generator's at each step, there without gradient: an untrained policy writes the
      list in the order by score.
    * Served: the greedy list, or the best of several by the evaluator; behind it the other candidates by the
      evaluator's page-wise pCTR. Ranking scores are n − rank; pCTR itself is :meth:`score`.

    Deviations: the generator reads representations and pCTR of the evaluator as inputs and sends no gradient
    into them, since one objective must not move the other's embeddings; hence all parts can share one
    optimiser step and the single-step :meth:`loss` is that of the first inner PPO epoch. The discount 0.01 of
    the public code is the default: with labels that know no position, an undiscounted return says which items
    to show but not in which order.

    A limit: labels here do not depend on neighbours, so the evaluator learns correlation and no effect of
    context.
    """

    family = "generator-evaluator"
    bf16_from = {**AbstractReranker.bf16_from, "cpu": 2**16}  # much of it stays in fp32, and the casts cost
    paper = (
        "Huzhang et al., TKDE 2021: AliExpress Learning-To-Rank: "
        "Maximizing Online Model Performance without Going Online"
    )
    permutation = "score_order"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        hidden = config["evaluator_hidden"]
        self.evaluator = ListEvaluator(self.dim, hidden, self.slate_size)
        self.generator = Pointer(self.dim)
        self.discriminator = ListEvaluator(self.dim, hidden, self.slate_size)
        self.evaluator_epochs: int = config["evaluator_epochs"]
        self.evaluator_learning_rate: float = config["evaluator_learning_rate"]
        self.freeze_evaluator: bool = config["freeze_evaluator"]
        if self.freeze_evaluator:
            self.supports_noise = False
            self.noise_refusal = "freeze_evaluator leaves nothing that learns from synthetic scores; set it to False"
        self.random_lists: int = config["random_lists"]
        self.rollouts: int = config["rollouts"]
        self.ppo_epochs: int = config["ppo_epochs"]
        self.clip: float = config["ppo_clip"]
        self.entropy_weight: float = config["entropy_weight"]
        self.discount: float = config["discount"]
        self.discriminator_weight: float = config["discriminator_weight"]
        self.explore: float = config["explore"]
        self.inference_lists: int = config["inference_lists"]
        # Fixed noise by rank: a request's samples depend neither on its batch nor on the storage order.
        g = torch.Generator().manual_seed(0)
        shape = (self.inference_lists - 1, self.slate_size, config["n_candidates"])
        self.register_buffer("noise", -torch.empty(shape).exponential_(generator=g).log(), persistent=False)

    # ------------------------------------------------------------------ evaluator

    def tokens(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        """Candidate vectors ``[B, n, d]`` that know x as ``score_fusion`` says."""
        return self.fusion(context.candidates, x, slate.mask)

    def page_logits(self, tokens: Tensor, user: Tensor, slate: UnscoredSlate) -> Tensor:
        """Evaluator's logits ``[B, n]`` of the candidates as the retriever would show them, K at a time."""
        order = best_first(slate.logged_scores, slate.mask)
        positions, page_mask = pages(order, slate.mask, self.slate_size)
        return unpage(self.evaluator(gather_lists(tokens, positions), user, page_mask), order)

    def score(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        return self.page_logits(self.tokens(context, slate, x), context.user, slate)

    def evaluator_loss(self, context: Context, slate: Slate, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Supervised loss on the retriever's pages and on random lists; also tokens and page logits."""
        tokens = self.tokens(context, slate, x)
        logits = self.with_residual(self.page_logits(tokens, context.user, slate), x)
        loss = self.criterion(logits, slate)
        if self.random_lists:
            positions, mask = self._random_lists(slate.mask)
            listed = self.evaluator(gather_lists(tokens, positions), context.user, mask)
            listed = plus_listed(listed, self.fusion.residual(x), positions)
            loss = loss + self.list_criterion(listed, slate, positions, mask)
        return loss, tokens, logits

    def _random_lists(self, mask: Tensor) -> Tuple[Tensor, Tensor]:
        """Random lists of distinct candidates, valid ones first: positions ``[B, S, K]`` and their mask."""
        keys = torch.rand(mask.shape[0], self.random_lists, mask.shape[1], device=mask.device)
        keys = keys.masked_fill(~mask.unsqueeze(1), -1.0)
        best = keys.topk(min(self.slate_size, mask.shape[1]), dim=-1)
        return best.indices, best.values >= 0

    def pretraining(self) -> List[Stage]:
        if self.evaluator_epochs == 0:
            return []
        others = {id(p) for part in (self.generator, self.discriminator) for p in part.parameters()}
        return [
            Stage(
                "evaluator",
                self.evaluator_epochs,
                lambda slate: self.evaluator_loss(self.encode(slate), slate, slate.scores)[0],
                [p for p in self.parameters() if id(p) not in others],
                self.evaluator_learning_rate,
            )
        ]

    # ------------------------------------------------------------------ discriminator

    def discriminator_loss(self, tokens: Tensor, user: Tensor, logged: Tensor, generated: Tensor) -> Tensor:
        """BCE of telling logged from generated lists, positions ``[B, K]`` each (−1 = nothing)."""
        lists = torch.stack([logged, generated], dim=1)
        target = torch.tensor([[1.0], [0.0]], device=tokens.device).expand(lists.shape)
        logits = self.discriminator(gather_lists(tokens, lists), user, lists >= 0)
        return bce(logits, target, lists >= 0)

    def logged_list(self, slate: UnscoredSlate) -> Tensor:
        """The retriever's top K ``[B, K]`` by its own scores, since synthetic ones know labels; −1 = nothing."""
        positions, page_mask = pages(best_first(slate.logged_scores, slate.mask), slate.mask, self.slate_size)
        return positions[:, 0].masked_fill(~page_mask[:, 0], -1)

    # ------------------------------------------------------------------ generator

    @torch.no_grad()
    def play(
        self, tokens: Tensor, user: Tensor, pctr: Tensor, mask: Tensor, residual: Optional[Tensor] = None
    ) -> Episode:
        """Roll the policy out and work out what each choice was worth."""
        shape = (len(mask), self.rollouts, self.slate_size, mask.shape[1])
        noise = -torch.empty(shape, device=mask.device).exponential_().log()
        uniform = torch.rand(len(mask), device=mask.device) < self.explore
        residual = None if residual is None else residual.detach()
        tokens, user, pctr = (t.detach().float() for t in (tokens, user, pctr))
        # Ratios near 1 need full precision.
        with torch.autocast(mask.device.type, enabled=False):
            positions, log_probs = self.generator.rollout(
                *self.generator.encode(tokens, user, pctr), mask, noise, uniform, residual
            )
        rewards = self.rewards(tokens, user, positions, residual)
        returns = rewards.clone()
        for k in range(self.slate_size - 2, -1, -1):
            returns[..., k] += self.discount * returns[..., k + 1]
        centred = returns - returns.mean(1, keepdim=True)
        # The floor keeps differences that are mere rounding from becoming advantages of size one.
        advantages = centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-3)
        return Episode(tokens, user, pctr, mask, positions, log_probs, advantages, rewards, residual)

    def rewards(self, tokens: Tensor, user: Tensor, positions: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """Reward ``[B, R, K]`` of every choice: evaluator's pCTR of the slot − c_d log(1 − D of the slot)."""
        vectors = gather_lists(tokens, positions)
        filled = positions >= 0
        judged = plus_listed(self.evaluator(vectors, user, filled).float(), residual, positions)
        reward = torch.sigmoid(judged)
        if self.discriminator_weight > 0:
            realistic = F.softplus(self.discriminator(vectors, user, filled).float())
            reward = reward + self.discriminator_weight * realistic.clamp(max=5.0)
        return reward * filled

    def ppo_loss(self, episode: Episode) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Clipped surrogate and entropy bonus of the current policy on an episode of the old one."""
        with torch.autocast(episode.mask.device.type, enabled=False):
            encoded, keys = self.generator.encode(episode.tokens, episode.user, episode.pctr)
            log_policy = self.generator.log_policy(encoded, keys, episode.mask, episode.positions, episode.residual)
        filled = episode.positions >= 0
        chosen = log_policy.gather(-1, episode.positions.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ratio = (chosen - episode.log_probs).masked_fill(~filled, 0.0).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = masked_mean(torch.minimum(ratio * episode.advantages, clipped * episode.advantages), filled)
        entropy = masked_mean(-(log_policy.exp() * log_policy).sum(-1), filled)
        terms = {
            "reward": masked_mean(episode.rewards, filled),
            "entropy": entropy.detach(),
            "ratio": ratio.detach(),
        }
        return -gain - self.entropy_weight * entropy, terms

    # ------------------------------------------------------------------ training

    def _joint_loss(self, context: Context, slate: Slate, x: Tensor) -> Tuple[Tensor, Episode, Dict[str, Tensor]]:
        """All three objectives; they touch disjoint parameters, so their sum trains each on its own."""
        if self.freeze_evaluator:
            supervised = None
            tokens = self.tokens(context, slate, x)
            logits = self.with_residual(self.page_logits(tokens, context.user, slate), x)
        else:
            supervised, tokens, logits = self.evaluator_loss(context, slate, x)
        pctr = torch.sigmoid(logits.float())
        episode = self.play(tokens, context.user, pctr, slate.mask, self.fusion.residual(x))
        policy, terms = self.ppo_loss(episode)
        terms = {"L_policy": policy.detach(), "reward": terms["reward"], "entropy": terms["entropy"]}
        loss = policy
        if supervised is not None:
            terms["L_evaluator"] = supervised.detach()
            loss = loss + supervised
        if self.discriminator_weight > 0:
            lists = self.logged_list(slate), episode.positions[:, 0]
            adversary = self.discriminator_loss(episode.tokens, episode.user, *lists)
            terms["L_discriminator"] = adversary.detach()
            loss = loss + adversary
        return loss, episode, terms

    def loss(self, context: Context, slate: Slate, x: Tensor) -> Tensor:
        return self._joint_loss(context, slate, x)[0]

    def training_steps(self, slate: Slate) -> Iterator[Step]:
        loss, episode, terms = self._joint_loss(self.encode(slate), slate, slate.scores)
        yield Step(loss, terms=terms)
        for _ in range(self.ppo_epochs - 1):
            yield Step(self.ppo_loss(episode)[0])

    # ------------------------------------------------------------------ serving

    def predict(self, slate: Slate) -> Tensor:
        context = self.encode(slate)
        tokens = self.tokens(context, slate, slate.scores)
        logits = self.with_residual(self.page_logits(tokens, context.user, slate).float(), slate.scores)
        positions = self.best_list(tokens.float(), context.user.float(), torch.sigmoid(logits), slate)
        return list_scores(positions, logits, slate.mask)

    def best_list(self, tokens: Tensor, user: Tensor, pctr: Tensor, slate: Slate) -> Tensor:
        """The greedy list, or of it and samples the one with the highest mean pCTR: positions ``[B, K]``."""
        batch, n = slate.mask.shape
        noise = tokens.new_zeros(batch, self.inference_lists, self.slate_size, n)
        if self.inference_lists > 1:
            rank = score_ranks(slate.logged_scores, slate.mask).clamp(max=self.noise.shape[-1] - 1)
            noise[:, 1:] = self.noise[:, :, rank].permute(2, 0, 1, 3)
        residual = self.fusion.residual(slate.scores)
        with torch.autocast(tokens.device.type, enabled=False):
            encoded, keys = self.generator.encode(tokens, user, pctr)
            positions, _ = self.generator.rollout(encoded, keys, slate.mask, noise, base=residual)
        if self.inference_lists == 1:
            return positions[:, 0]
        logits = self.evaluator(gather_lists(tokens, positions), user, positions >= 0).float()
        logits = plus_listed(logits, residual, positions)
        value = (torch.sigmoid(logits) * (positions >= 0)).sum(-1)  # as many slots are filled in each
        return gather_lists(positions, value.argmax(-1, keepdim=True)).squeeze(1)
