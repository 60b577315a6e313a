"""DNR: a training framework around any reranker that uses the retriever's scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.dnr.generators import make_generator
from dnr_recbole.dnr.noises import make_noise
from dnr_recbole.dnr.objectives import (
    BalancedReversal,
    GradientReversal,
    adversarial,
    reranker_objective,
    score_divergence,
)
from dnr_recbole.dnr.watching import by_score, watched
from dnr_recbole.errors import ConfigError
from dnr_recbole.lists import first_score
from dnr_recbole.model.abstract_reranker import AbstractReranker, Stage, Step
from dnr_recbole.model.context import Context
from dnr_recbole.model.inputs.residual_slope import fit_slope
from dnr_recbole.registry import get_reranker, register_reranker

if TYPE_CHECKING:
    from dnr_recbole.data.dataloader import SlateLoader

_AUC_GAP = 0.1  # between x' and x: a larger one is warned of
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

    def __init__(self, config: Keys, catalogue: Catalogue) -> None:
        # The backbone owns every table: the reranker base would build a second set of embeddings.
        super(AbstractReranker, self).__init__()
        _check_keys(config)
        self.backbone: AbstractReranker = get_reranker(config["backbone"])(config, catalogue)
        _check_backbone(config, self.backbone)
        self.several_steps = _takes_several_steps(self.backbone)
        self.dim, self.slate_size, self.n_items = self.backbone.dim, self.backbone.slate_size, self.backbone.n_items
        self.permutation, self.bf16_from = self.backbone.permutation, self.backbone.bf16_from
        self.fusion, self.objectives = self.backbone.fusion, self.backbone.objectives
        self.export_refusal = self.backbone.export_refusal
        self.noise = make_noise(config, catalogue)
        self.generator: Any = None  # a module with draw(context, slate)
        if config["adversarial"]:
            self.generator = make_generator(config, self.dim, catalogue.n_scores)
        self.lambda_m: float = config["lambda_m"]
        self.lambda_e: int = config["lambda_e"]
        self.lambda_adv: float = config["lambda_adv"]
        self.lambda_x: float = config["lambda_x"]
        self.estimator: str = config["lx_estimator"]
        self.condition: str = {"none": "marginal"}.get(config["lx_condition"], config["lx_condition"])
        self.balanced: bool = config["adv_balance"] == "gradient"
        self.warm_up: bool = config["generator_warmup"] and self.generator is not None
        self.selects_anew: bool = config["select_after_switch"]
        self.reversal: bool = config["alternation"] == "reversal"
        self.fraction: float = config["lz_fraction"]
        self.epoch = 0
        self.switch_step: Optional[int] = config["lambda_e_steps"]
        if self.switch_step is not None:
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        if self.balanced:
            self.register_buffer("evidence", torch.ones(()))  # sign of what the real scores say about z
        self._warned: Optional[str] = None
        if self.generator is not None and self.switch_step is None and self.lambda_e >= config["epochs"]:
            self.logger.warning(
                f"lambda_e={self.lambda_e} is not below epochs={config['epochs']}: the generator is never switched on"
            )

    # ------------------------------------------------------------------ inference: the backbone alone

    def encode(self, slate: UnscoredSlate) -> Context:
        return self.backbone.encode(slate)

    def score(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        return self.backbone.score(context, slate, x)

    def logits(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        return self.backbone.logits(context, slate, x)

    def loss(self, context: Context, slate: Slate, x: Tensor) -> Tensor:
        return self.backbone.loss(context, slate, x)

    def predict(self, slate: Slate) -> Tensor:
        return self.backbone.predict(slate)

    def generate(self, slate: Slate) -> Tensor:
        return self.backbone.generate(slate)

    def oracle(self, slate: Slate) -> Dict[str, Tensor]:
        return self.backbone.oracle(slate)

    def prepare(self, train: SlateLoader) -> None:
        self.backbone.prepare(train)
        self.noise.fit(train.dataset)
        if self.balanced:
            slope = fit_slope(train.dataset, listwise=False)
            self.evidence.fill_(-1.0 if slope < 0 else 1.0)

    def pretraining(self) -> List[Stage]:
        return self.backbone.pretraining()

    # ------------------------------------------------------------------ Algorithm 1

    def set_epoch(self, epoch: int) -> None:
        """``epoch`` counts from 0; the generator is switched on in epoch λ_e, after λ_e heuristic ones."""
        self.epoch = epoch
        self.backbone.set_epoch(epoch)

    @property
    def heuristic_phase(self) -> bool:
        """Whether x' comes from heuristic noise now: for λ_e epochs, or for ``lambda_e_steps`` batches."""
        if self.generator is None:
            return True
        return self.epoch < self.lambda_e if self.switch_step is None else bool(self.steps < self.switch_step)

    @property
    def phase(self) -> str:
        return "heuristic" if self.heuristic_phase else "learned"

    @property
    def waits(self) -> bool:
        return self.generator is not None and self.heuristic_phase

    def after_epoch(self, means: Dict[str, float]) -> None:
        """Say once per phase if x' tells more (or less) of z than the real scores do."""
        real, synthetic = means.get("auc_x"), means.get("auc_synthetic")
        if real is None or synthetic is None or self._warned == self.phase or abs(synthetic - real) <= _AUC_GAP:
            return
        self._warned = self.phase
        self.logger.warning(
            f"x' of the {self.phase} phase tells clicked from unclicked candidates with AUC {synthetic:.3f}, the real "
            f"scores do with {real:.3f}: "
            + (
                "the noise does not fit the data; use noise_type=fitted or empirical, or another lambda_c"
                if self.phase == "heuristic"
                else "the generator does not fit the data; raise lambda_x or generator_learning_rate"
            )
        )

    def parameter_groups(self) -> Dict[str, List[nn.Parameter]]:
        groups = self.backbone.parameter_groups()
        if self.generator is not None:
            groups["generator"] = list(self.generator.parameters())
        return groups

    def synthesise(self, context: Context, slate: Slate) -> Tensor:
        """x' of the current phase for the slate's labels, of the shape of its scores; 0 at padding.

        Each of several scores is drawn for itself, where the candidate has it.
        """
        real = slate.all_logged_scores
        x = self.noise.draw(slate) if self.heuristic_phase else self.generator.draw(context, slate)
        return self._placed(x, real, slate)

    @staticmethod
    def _placed(x: Tensor, real: Tensor, slate: Slate) -> Tensor:
        """0 at padding, and missing where the candidate has no such score."""
        if real.dim() == 2:
            return x * slate.mask
        return torch.where(real < 0, real, x) * slate.mask.unsqueeze(-1)

    def training_steps(self, slate: Slate) -> Iterator[Step]:
        if self.switch_step is not None and self.training:
            self.steps += 1
        rows = self._noisy_rows(slate)
        noisy = slate if rows is None else slate.select(rows)
        if self.several_steps:
            yield from self._paired_steps(slate, noisy)
        else:
            yield self._shared_step(slate, noisy, rows)
        if self.heuristic_phase and self.warm_up:
            yield self._warm_up_step(noisy)
        elif not self.heuristic_phase and not self.reversal:
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
        divergence = self._divergence(x, noisy) if joint else x.new_zeros(())
        if joint and self.balanced:
            pull = self.lambda_adv * self._pull(self.lambda_x * divergence, x).norm()
            seen = BalancedReversal.apply(x, pull, self._upright(x, noisy))
        elif joint:  # the reversed gradient must be that of L_adv alone, so λ_m is divided out
            seen = GradientReversal.apply(x, self.lambda_adv / max(self.lambda_m, 1e-12))
        else:
            seen = x
        # Both kinds of steps agree: `scores` are what the backbone reads, `logged_scores` the retriever's own.
        denoising = self.backbone.loss(noisy_context, noisy.with_scores(seen), seen)
        total = reranker_objective(direct, denoising, self.lambda_m)
        terms = {"L_direct": direct, "L_z": denoising, **watched(x, noisy)}
        if not joint:
            return Step(total, self._reranker_groups, terms)
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
                terms.update(L_direct=direct.loss, L_z=denoising.loss, **watched(x, noisy))
            yield Step(reranker_objective(direct.loss, denoising.loss, self.lambda_m), direct.groups, terms)

    def _generator_step(self, noisy: Slate) -> Step:
        """φ's step on L_adv + L_x with θ fixed, on an encoding by θ as it is after its own step."""
        with torch.no_grad():
            context = self.backbone.encode(noisy)
        x = self.synthesise(context, noisy)
        terms = {"L_adv": x.new_zeros(()), "L_x": self._divergence(x, noisy)}
        if self.balanced:
            return self._balanced_step(context, noisy, x, terms)
        loss = self.lambda_x * terms["L_x"] + 0.0 * x.sum()
        if self.lambda_adv > 0:
            terms["L_adv"] = self._adversarial(context, noisy, x)
            loss = loss + self.lambda_adv * terms["L_adv"]
        return Step(loss, ("generator",), terms)

    def _balanced_step(self, context: Context, noisy: Slate, x: Tensor, terms: Dict[str, Tensor]) -> Step:
        """The same where L_adv pulls x' λ_adv times as strongly as L_x does, and no x' whose sign has turned.

        Both act on φ through x' alone, so their gradients in x' are taken first and sent on once.
        """
        pull = self._pull(self.lambda_x * terms["L_x"], x)
        kept = torch.nonzero(self._upright(x, noisy)).flatten()
        terms.update(adv_upright=x.new_tensor(len(kept) / len(noisy)), adv_share=x.new_zeros(()))
        if self.lambda_adv > 0 and len(kept):
            terms["L_adv"] = self._adversarial(context, noisy, x, kept)
            own = self._pull(terms["L_adv"], x)
            own = own * (self.lambda_adv * pull.norm() / own.norm().clamp(min=1e-12))
            terms["adv_share"] = own.norm() / (own.norm() + pull.norm()).clamp(min=1e-12)
            pull = pull + own
        loss, sent = self.lambda_x * terms["L_x"].detach(), (pull * x).sum()
        terms = {name: value.detach() for name, value in terms.items()}
        return Step(loss + sent - sent.detach(), ("generator",), terms)

    def _warm_up_step(self, noisy: Slate) -> Step:
        """φ's step on L_x alone while the noise is heuristic, so that it is ready at the switch."""
        with torch.no_grad():
            context = self.backbone.encode(noisy)
        x = self._placed(self.generator.draw(context, noisy), noisy.all_logged_scores, noisy)
        divergence = self._divergence(x, noisy)
        return Step(divergence, ("generator",), {"L_x": divergence})

    def _adversarial(self, context: Context, noisy: Slate, x: Tensor, kept: Optional[Tensor] = None) -> Tensor:
        """L_adv of the requests ``kept`` (None = all), with θ fixed."""
        if kept is not None:
            context, noisy, x = context.select(kept), noisy.select(kept), x[kept]
        logits = self.backbone.logits(context, noisy.with_scores(x), x)
        return adversarial(self.backbone.criterion(logits, noisy))

    @staticmethod
    def _pull(term: Tensor, x: Tensor) -> Tensor:
        """The gradient of a term in x', detached."""
        return torch.autograd.grad(term, x, retain_graph=True)[0].detach()

    @torch.no_grad()
    def _upright(self, x: Tensor, noisy: Slate) -> Tensor:
        """bool ``[B]``: requests whose x' does not turn the sign of what the real scores say about z."""
        first = first_score(x).float()
        means = [
            (first * part).sum(1) / part.sum(1).clamp(min=1)
            for part in ((noisy.labels == z) & noisy.mask for z in (0, 1))
        ]
        return (means[1] - means[0]) * self.evidence > 0

    @property
    def _reranker_groups(self) -> Tuple[str, ...]:
        return tuple(name for name in self.parameter_groups() if name != "generator")

    def _divergence(self, x: Tensor, noisy: Slate) -> Tensor:
        parts = [
            score_divergence(self.estimator, x, real, mask, noisy.labels, self.condition)
            for x, real, mask in by_score(x, noisy)
        ]
        return sum(parts[1:], parts[0]) / len(parts)


def _takes_several_steps(backbone: AbstractReranker) -> bool:
    return type(backbone).training_steps is not AbstractReranker.training_steps


def _check_keys(config: Keys) -> None:
    """Refuse values that no backbone could be trained with, before one is built.

    Raises:
        ConfigError: nothing reads the scores, or L_adv is weighed against a term that is off.
    """
    if config["score_fusion"] == "none":
        raise ConfigError(f"DNR needs a backbone that reads the scores: set score_fusion to {_READING}")
    if config["adv_balance"] == "gradient" and config["lambda_x"] == 0:
        raise ConfigError("adv_balance=gradient weighs L_adv against L_x, so lambda_x must be > 0")


def _check_backbone(config: Keys, backbone: AbstractReranker) -> None:
    """Refuse a backbone that the framework cannot train as the keys ask.

    Raises:
        ConfigError: it takes no noise, or no gradient reaches the generator through it.
    """
    name = type(backbone).__name__
    if not backbone.supports_noise:
        raise ConfigError(f"DNR cannot wrap {name}: {backbone.noise_refusal}")
    if not config["adversarial"]:
        return
    if not backbone.fusion.differentiable:
        raise ConfigError(
            f"score_fusion={config['score_fusion']} passes no gradient to the scores, which DNR's generator needs: "
            f"set it to {_READING}, or set adversarial=False"
        )
    if config["alternation"] == "reversal":
        if _takes_several_steps(backbone) or type(backbone).loss is not AbstractReranker.loss:
            raise ConfigError(
                f"alternation=reversal reverses the gradient of −log q(z|x'), but {name} trains "
                "with a loss of its own: use alternation=alternate"
            )
        if config["lambda_m"] == 0:
            raise ConfigError("alternation=reversal reaches the generator through L_z, so lambda_m must be > 0")
