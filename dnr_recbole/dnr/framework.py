"""DNR: a training framework around any reranker that uses the retriever's scores."""

from __future__ import annotations

from typing import Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate
from dnr_recbole.dnr.noise import HeuristicNoise, NoiseGenerator
from dnr_recbole.dnr.objectives import (
    GradientReversal,
    adversarial,
    reranker_objective,
    score_divergence,
    wasserstein,
)
from dnr_recbole.errors import ConfigError
from dnr_recbole.model.abstract_reranker import AbstractReranker, Context, Stage, Step
from dnr_recbole.registry import get_reranker, register_reranker

_READING = "one that has concat, add, weight or residual in it"


@register_reranker
class DNR(AbstractReranker):
    """Denoising Neural Reranker (Algorithm 1 of the paper) around ``backbone``.

    Epochs 1 … λ_e: x' is heuristic noise and θ learns Eq. 6. Afterwards x' comes from f_φ, and per batch θ first takes
    a step on Eq. 6 with φ fixed, then φ takes one on L_adv + L_x with θ fixed (``alternation: alternate``); or one
    backward pass serves both through a gradient reversal on x' (``alternation: reversal``).

    The backbone never learns that noise exists, and at inference it runs alone: DNR costs nothing there.
    """

    family = "framework"
    paper = "Denoising Neural Reranker for Recommender Systems"
    wraps_backbone = True

    def __init__(self, config, catalogue):
        # The backbone owns every table: the reranker base would build a second set of embeddings.
        super(AbstractReranker, self).__init__()
        backbone = get_reranker(config["backbone"])
        fusion, heuristic_only = config["score_fusion"], not config["adversarial"]
        if fusion == "none":
            raise ConfigError(f"DNR needs a backbone that reads the scores: set score_fusion to {_READING}")
        self.backbone: AbstractReranker = backbone(config, catalogue)
        if not self.backbone.supports_noise:
            raise ConfigError(f"DNR cannot wrap {backbone.__name__}: {self.backbone.noise_refusal}")
        if not self.backbone.fusion.differentiable and not heuristic_only:
            raise ConfigError(
                f"score_fusion={fusion} passes no gradient to the scores, which DNR's generator needs: "
                f"set it to {_READING}, or set adversarial=False"
            )
        self.several_steps = backbone.training_steps is not AbstractReranker.training_steps
        if config["alternation"] == "reversal" and not heuristic_only:
            if self.several_steps or backbone.loss is not AbstractReranker.loss:
                raise ConfigError(
                    f"alternation=reversal reverses the gradient of −log q(z|x'), but {backbone.__name__} trains "
                    "with a loss of its own: use alternation=alternate"
                )
            if config["lambda_m"] == 0:
                raise ConfigError("alternation=reversal reaches the generator through L_z, so lambda_m must be > 0")
        self.dim, self.slate_size, self.n_items = self.backbone.dim, self.backbone.slate_size, self.backbone.n_items
        self.permutation = self.backbone.permutation
        self.fusion = self.backbone.fusion
        self.noise = HeuristicNoise(
            config["noise_type"], config["lambda_c"], config["beta_a"], config["beta_b"],
            config["gaussian_mean"], config["gaussian_std"],
        )  # fmt: skip
        self.generator: Optional[NoiseGenerator] = None
        if not heuristic_only:
            self.generator = NoiseGenerator(
                self.dim, config["generator_hidden"], config["generator_noise_dim"],
                use_item=config["generator_use_item"], n_scores=catalogue.n_scores,
            )  # fmt: skip
        self.lambda_m: float = config["lambda_m"]
        self.lambda_e: int = config["lambda_e"]
        self.lambda_adv: float = config["lambda_adv"]
        self.lambda_x: float = config["lambda_x"]
        self.estimator: str = config["lx_estimator"]
        self.per_label: bool = config["lx_condition"] == "label"
        self.reversal: bool = config["alternation"] == "reversal"
        self.fraction: float = config["lz_fraction"]
        self.epoch = 0
        if self.noise.separable and self.lambda_e > 0:
            self.logger.warning(
                f"lambda_c={self.noise.lambda_c} with {self.noise.kind} noise: x' of clicked and unclicked candidates "
                "never overlap, so L_z falls to ~0 and augments nothing; use lambda_c > 0.5"
            )
        if self.generator is not None and self.lambda_e >= config["epochs"]:
            self.logger.warning(
                f"lambda_e={self.lambda_e} is not below epochs={config['epochs']}: the generator is never switched on"
            )

    # ------------------------------------------------------------------ inference: the backbone alone

    def encode(self, slate: Slate) -> Context:
        return self.backbone.encode(slate)

    def score(self, context: Context, slate: Slate, x: Tensor) -> Tensor:
        return self.backbone.score(context, slate, x)

    def logits(self, context: Context, slate: Slate, x: Tensor) -> Tensor:
        return self.backbone.logits(context, slate, x)

    def loss(self, context: Context, slate: Slate, x: Tensor) -> Tensor:
        return self.backbone.loss(context, slate, x)

    def predict(self, slate: Slate) -> Tensor:
        return self.backbone.predict(slate)

    def generate(self, slate: Slate) -> Tensor:
        return self.backbone.generate(slate)

    def oracle(self, slate: Slate) -> Dict[str, Tensor]:
        return self.backbone.oracle(slate)

    def prepare(self, train) -> None:
        self.backbone.prepare(train)

    def pretraining(self) -> List[Stage]:
        return self.backbone.pretraining()

    # ------------------------------------------------------------------ Algorithm 1

    def set_epoch(self, epoch: int) -> None:
        """``epoch`` counts from 0; the generator is switched on in epoch λ_e, after λ_e heuristic ones."""
        self.epoch = epoch
        self.backbone.set_epoch(epoch)

    @property
    def heuristic_phase(self) -> bool:
        """Whether x' comes from heuristic noise in this epoch."""
        return self.generator is None or self.epoch < self.lambda_e

    def parameter_groups(self) -> Dict[str, List[nn.Parameter]]:
        groups = self.backbone.parameter_groups()
        if self.generator is not None:
            groups["generator"] = list(self.generator.parameters())
        return groups

    def synthesise(self, context: Context, slate: Slate) -> Tensor:
        """x' of the current phase for the slate's labels, of the shape of its scores; 0 at padding.

        Each of several scores is drawn for itself, where the candidate has it.
        """
        real, labels = slate.all_logged_scores, slate.labels
        if self.heuristic_phase:
            x = self.noise(labels if real.dim() == 2 else labels.unsqueeze(-1).expand_as(real))
        else:
            x = self.generator(context.user, context.candidates, labels)
        if real.dim() == 2:
            return x * slate.mask
        return torch.where(real < 0, real, x) * slate.mask.unsqueeze(-1)

    def training_steps(self, slate: Slate) -> Iterator[Step]:
        rows = self._noisy_rows(slate)
        noisy = slate if rows is None else slate.select(rows)
        if self.several_steps:
            yield from self._paired_steps(slate, noisy)
        else:
            yield self._shared_step(slate, noisy, rows)
        if not self.heuristic_phase and not self.reversal:
            yield self._generator_step(noisy)

    def _noisy_rows(self, slate: Slate) -> Optional[Tensor]:
        """A random part of the batch on which L_z, L_adv and L_x are estimated without bias; None = all of it."""
        if self.fraction >= 1:
            return None
        count = max(1, round(self.fraction * len(slate)))
        return torch.randperm(len(slate), device=slate.device)[:count]

    def _shared_step(self, slate: Slate, noisy: Slate, rows: Optional[Tensor]) -> Step:
        """θ's step on Eq. 6; the real and the synthetic pass share one encoding of users, histories and items."""
        context = self.backbone.encode(slate)
        noisy_context = context if rows is None else context.select(rows)
        direct = self.backbone.loss(context, slate, slate.scores)
        joint = self.reversal and not self.heuristic_phase
        with torch.set_grad_enabled(joint):
            x = self.synthesise(noisy_context, noisy)
        # The reversed gradient must be that of L_adv alone, so λ_m is divided out.
        seen = GradientReversal.apply(x, self.lambda_adv / max(self.lambda_m, 1e-12)) if joint else x
        # Both kinds of steps agree: `scores` are what the backbone reads, `logged_scores` the retriever's own.
        denoising = self.backbone.loss(noisy_context, noisy.with_scores(seen), seen)
        total = reranker_objective(direct, denoising, self.lambda_m)
        terms = {"L_direct": direct, "L_z": denoising, "score_distance": self._distance(x, noisy)}
        if not joint:
            return Step(total, self._reranker_groups, terms)
        divergence = self._divergence(x, noisy)
        terms.update(L_adv=adversarial(denoising), L_x=divergence)
        return Step(total + self.lambda_x * divergence, (*self._reranker_groups, "generator"), terms)

    def _paired_steps(self, slate: Slate, noisy: Slate) -> Iterator[Step]:
        """θ's steps for backbones that take several per batch: each is paired with its twin under x'."""
        with torch.no_grad():
            x = self.synthesise(self.backbone.encode(noisy), noisy)
        twins = zip(self.backbone.training_steps(slate), self.backbone.training_steps(noisy.with_scores(x)))
        for number, (direct, denoising) in enumerate(twins):
            direct = direct if isinstance(direct, Step) else Step(direct)
            denoising = denoising if isinstance(denoising, Step) else Step(denoising)
            terms = dict(direct.terms)
            if number == 0:  # the log sums the terms of a batch; further steps learn from the same data again
                terms.update(L_direct=direct.loss, L_z=denoising.loss, score_distance=self._distance(x, noisy))
            yield Step(reranker_objective(direct.loss, denoising.loss, self.lambda_m), direct.groups, terms)

    def _generator_step(self, noisy: Slate) -> Step:
        """φ's step on L_adv + L_x with θ fixed, on an encoding by θ as it is after its own step."""
        with torch.no_grad():
            context = self.backbone.encode(noisy)
        x = self.synthesise(context, noisy)
        terms = {"L_adv": x.new_zeros(())}
        loss = 0.0 * x.sum()
        if self.lambda_adv > 0:
            logits = self.backbone.logits(context, noisy.with_scores(x), x)
            terms["L_adv"] = adversarial(self.backbone.criterion(logits, noisy))
            loss = loss + self.lambda_adv * terms["L_adv"]
        terms["L_x"] = self._divergence(x, noisy)
        return Step(loss + self.lambda_x * terms["L_x"], ("generator",), terms)

    @property
    def _reranker_groups(self) -> Tuple[str, ...]:
        return tuple(name for name in self.parameter_groups() if name != "generator")

    def _divergence(self, x: Tensor, noisy: Slate) -> Tensor:
        labels = noisy.labels if self.per_label else None
        parts = [score_divergence(self.estimator, x, real, mask, labels) for x, real, mask in _by_score(x, noisy)]
        return sum(parts[1:], parts[0]) / len(parts)

    @torch.no_grad()
    def _distance(self, x: Tensor, noisy: Slate) -> Tensor:
        """Wasserstein-1 distance between the synthetic and the real scores of the batch, the mean over the scores."""
        scores = [(x[mask].float(), real[mask].float()) for x, real, mask in _by_score(x, noisy) if mask.any()]
        parts = [wasserstein(synthetic, real) for synthetic, real in scores]
        return sum(parts[1:], parts[0]) / len(parts)


def _by_score(x: Tensor, noisy: Slate) -> List[Tuple[Tensor, Tensor, Tensor]]:
    """(synthetic, real, mask), ``[B, n]`` each, of every score; the mask holds the candidates that have it."""
    real = noisy.all_logged_scores
    if real.dim() == 2:
        return [(x, real, noisy.mask)]
    return [(x[..., s], real[..., s], noisy.mask & (real[..., s] >= 0)) for s in range(real.shape[-1])]
