"""DNR: noise (Eq. 4), objectives (Eq. 2, 5–7) and the schedule (Algorithm 1)."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_distribution
from scipy.stats import wasserstein_distance

from dnr_recbole.dnr.noise import HeuristicNoise, NoiseGenerator
from dnr_recbole.dnr.objectives import (
    ESTIMATORS,
    GradientReversal,
    histogram_kl,
    moments_kl,
    score_divergence,
    wasserstein,
)
from dnr_recbole.errors import ConfigError
from dnr_recbole.model.losses import bce, list_ce
from dnr_recbole.testing import build, random_slate, train_one_batch, training_steps
from dnr_recbole.trainer.steps import take_step


def sgd(model, lr=0.1):
    return {name: torch.optim.SGD(params, lr=lr) for name, params in model.parameter_groups().items()}


# ---------------------------------------------------------------------- Eq. 4


@pytest.mark.parametrize("kind", ["gaussian", "beta"])
@pytest.mark.parametrize("lambda_c", [0.0, 0.4, 1.0])
def test_heuristic_scores_stay_in_the_unit_interval(kind, lambda_c):
    labels = (torch.rand(200, 50) < 0.3).float()
    x = HeuristicNoise(kind, lambda_c)(labels)
    assert x.shape == labels.shape and x.min() >= 0 and x.max() <= 1
    if lambda_c == 0:
        assert torch.equal(x, labels)


def test_heuristic_scores_are_equation_4():
    labels = torch.tensor([[0.0, 1.0, 1.0]])
    noise = HeuristicNoise("beta", 0.4)
    torch.manual_seed(0)
    epsilon = noise.sample(labels)
    torch.manual_seed(0)
    torch.testing.assert_close(noise(labels), 0.6 * labels + 0.4 * epsilon)


@pytest.mark.parametrize("a, b", [(0.5, 0.5), (2.0, 5.0)])
def test_beta_noise_has_the_moments_of_its_distribution(a, b):
    torch.manual_seed(1)
    sample = HeuristicNoise("beta", 1.0, a, b).sample(torch.zeros(200_000)).numpy()
    truth = beta_distribution(a, b)
    assert sample.mean() == pytest.approx(truth.mean(), abs=0.005)
    assert sample.var() == pytest.approx(truth.var(), abs=0.005)
    assert np.quantile(sample, 0.9) == pytest.approx(truth.ppf(0.9), abs=0.01)


def test_noise_that_fits_badly_is_warned_of_by_what_it_tells(caplog):
    assert HeuristicNoise("beta", 0.4).separable and HeuristicNoise("gaussian", 0.0).separable
    assert not HeuristicNoise("beta", 0.51).separable and not HeuristicNoise("gaussian", 0.4).separable
    for noise, auc, warned in (("beta", 0.999, True), ("fitted", 0.58, False)):
        model = build("DNR", noise_type=noise)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                model.after_epoch({"auc_x": 0.57, "auc_synthetic": auc})
        assert caplog.text.count("use noise_type=fitted or empirical") == warned, "once per phase"
    model.set_epoch(10)
    with caplog.at_level(logging.WARNING):
        model.after_epoch({"auc_x": 0.57, "auc_synthetic": 0.3})
    assert "x' of the learned phase" in caplog.text


def test_generator_is_a_distribution_and_not_a_function():
    torch.manual_seed(0)
    generator = NoiseGenerator(dim=8)
    user, items, labels = torch.randn(4, 8), torch.randn(4, 6, 8), torch.ones(4, 6)
    a, b = generator(user, items, labels), generator(user, items, labels)
    assert a.shape == (4, 6) and a.min() > 0 and a.max() < 1
    assert not torch.equal(a, b)


@pytest.mark.parametrize("key, value", [("lambda_c", 1.5), ("lambda_c", -0.1), ("lambda_m", -1), ("lambda_e", -1)])
def test_out_of_range_lambdas_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        build("DNR", **{key: value})


# ---------------------------------------------------------------------- L_x


def test_estimators_vanish_for_equal_scores_and_grow_with_distance():
    torch.manual_seed(0)
    real = torch.rand(64, 20) * 0.3
    mask = torch.ones_like(real, dtype=torch.bool)
    for estimator in ESTIMATORS:
        values = [
            float(score_divergence(estimator, real + shift * torch.rand_like(real), real, mask, torch.zeros_like(real)))
            for shift in (0, 0.2, 0.6)
        ]
        assert values[0] == pytest.approx(0, abs=1e-5), estimator
        assert values[0] < values[1] < values[2], estimator


def test_moments_kl_is_the_closed_form_between_gaussians():
    x, y = torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.4])
    v1, v2 = 0.25 + 1e-4, 0.01 + 1e-4
    expected = 0.5 * (np.log(v2 / v1) + (v1 + 0.2**2) / v2 - 1)
    assert float(moments_kl(x, y)) == pytest.approx(expected, rel=1e-5)


def test_wasserstein_equals_scipy():
    x, y = torch.rand(500), torch.rand(500) ** 2
    assert float(wasserstein(x, y)) == pytest.approx(wasserstein_distance(x.numpy(), y.numpy()), rel=1e-5)


def test_histogram_kl_approximates_the_true_divergence():
    rng = np.random.default_rng(0)
    p, q = beta_distribution(3, 3), beta_distribution(2, 4)
    grid = (np.arange(2000) + 0.5) / 2000
    truth = np.mean(p.pdf(grid) * np.log(p.pdf(grid) / q.pdf(grid)))
    sample = lambda d: torch.tensor(d.rvs(100_000, random_state=rng), dtype=torch.float32)  # noqa: E731
    assert float(histogram_kl(sample(p), sample(q))) == pytest.approx(truth, rel=0.15)


def test_conditional_divergence_sees_a_generator_that_gives_the_label_away():
    torch.manual_seed(0)
    labels = (torch.rand(200, 20) < 0.5).float()
    real, mask = torch.rand(200, 20), torch.ones(200, 20, dtype=torch.bool)
    betrays = 0.5 * labels + 0.5 * torch.rand(200, 20)  # uniform on [0, 1] as a whole
    divergence = lambda x, condition: float(score_divergence("histogram", x, real, mask, labels, condition))  # noqa: E731
    assert divergence(betrays, "marginal") < 0.01 < 0.3 < divergence(betrays, "label")
    assert divergence(betrays, "literal") > 0.3, "here x does not depend on z, so Eq. 5's p(x) is p(x|z)"
    telling = 0.5 * labels + 0.5 * real  # real scores that do depend on z
    assert float(score_divergence("histogram", telling, telling, mask, labels, "label")) < 1e-5
    assert float(score_divergence("histogram", telling, telling, mask, labels, "literal")) > 0.3


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("condition", ["label", "marginal", "literal"])
def test_minimising_the_divergence_moves_the_scores_to_the_real_ones(estimator, condition):
    torch.manual_seed(0)
    slate = random_slate(batch=32, n=20, n_items=60)
    raw = torch.randn(32, 20, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    start = None
    for _ in range(60):
        loss = score_divergence(estimator, torch.sigmoid(raw), slate.scores, slate.mask, slate.labels, condition)
        start = float(loss.detach()) if start is None else start
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(raw.grad).all()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * start


# ---------------------------------------------------------------------- Eq. 2, 5–7


def test_losses_by_hand():
    logits, labels = torch.tensor([[0.0, 1.0, 7.0], [2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    softplus = lambda v: np.log1p(np.exp(v))  # noqa: E731
    assert float(bce(logits, labels, mask)) == pytest.approx((softplus(0) + softplus(1) + softplus(2)) / 3, rel=1e-5)
    assert float(list_ce(logits, labels, mask)) == pytest.approx(
        np.log(1 + np.e), rel=1e-5
    )  # the second has no positive


def test_reranker_step_is_equation_6():
    model = build("DNR", dropout=0.0, lambda_m=0.7, lz_fraction=1.0, lambda_e=9).train()
    slate = random_slate()
    torch.manual_seed(4)
    (step,) = training_steps(model, slate)
    torch.manual_seed(4)
    x = model.noise.draw(slate) * slate.mask
    direct = bce(model.backbone(slate), slate.labels, slate.mask)
    denoising = bce(model.backbone(slate.with_scores(x)), slate.labels, slate.mask)
    torch.testing.assert_close(step.loss, direct + 0.7 * denoising)
    torch.testing.assert_close(step.terms["L_direct"], direct)
    torch.testing.assert_close(step.terms["L_z"], denoising)


@pytest.mark.parametrize("backbone", ["PRM", "EGRerank"])
@pytest.mark.parametrize("options", [{}, {"lambda_e": 0}, {"lambda_e": 0, "lz_fraction": 1.0}])
def test_the_backbone_meets_synthetic_scores_beside_the_retrievers_own(backbone, options, monkeypatch):
    """In shared, paired and generator's steps alike: ``scores`` are x, ``logged_scores`` never change."""
    model, slate, met = build("DNR", backbone=backbone, **options).train(), random_slate(), []

    def spied(method):
        def spy(self, context, request, x):
            met.append((request, x))
            return method(self, context, request, x)

        return spy

    cls = type(model.backbone)
    for name in ("logits", "evaluator_loss"):  # whichever its loss and L_adv are made of
        if hasattr(cls, name):
            monkeypatch.setattr(cls, name, spied(getattr(cls, name)))
    list(training_steps(model, slate))
    own = {tuple(row.tolist()): scores for row, scores in zip(slate.candidates, slate.scores)}
    synthetic = 0
    for request, x in met:
        assert torch.equal(request.scores, x)
        assert torch.equal(request.logged_scores, torch.stack([own[tuple(r.tolist())] for r in request.candidates]))
        synthetic += not torch.equal(x, request.logged_scores)
    assert synthetic == len(met) - 1  # all but L_direct's


def test_each_step_moves_its_own_parameters_only():
    model = build("DNR", lambda_e=0).train()
    theta = lambda: [p.detach().clone() for p in model.backbone.parameters()]  # noqa: E731
    phi = lambda: [p.detach().clone() for p in model.generator.parameters()]  # noqa: E731
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b))  # noqa: E731
    optimizers, groups = sgd(model), model.parameter_groups()
    steps = training_steps(model, random_slate())
    for moves_theta in (True, False):
        before = theta(), phi()
        take_step(next(steps), groups, optimizers)
        assert same(before[0], theta()) != moves_theta
        assert same(before[1], phi()) == moves_theta
    assert next(steps, None) is None


def test_scores_of_the_adversarial_term_reach_the_generator_through_the_reranker():
    model = build("DNR", lambda_e=0, lambda_x=0.0).train()
    *_, step = training_steps(model, random_slate())
    grads = torch.autograd.grad(step.loss, list(model.generator.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in grads)


def test_adversarial_loss_falls_and_denoising_gets_harder_when_only_the_generator_learns():
    torch.manual_seed(0)
    model = build("DNR", lambda_e=0, lambda_x=0.0, lz_fraction=1.0, dropout=0.0).train()
    slate = random_slate(batch=64)
    optimizers = {name: torch.optim.Adam(p, lr=0.01) for name, p in model.parameter_groups().items()}
    for _ in range(80):  # a reranker that trusts its scores
        train_one_batch(model.backbone, slate.with_scores(slate.labels), optimizers)
    adversarial, denoising = [], []
    for _ in range(60):
        first, second = training_steps(model, slate)
        denoising.append(float(first.terms["L_z"]))
        adversarial.append(float(second.terms["L_adv"]))
        take_step(second, model.parameter_groups(), optimizers)
    assert np.mean(adversarial[-5:]) < np.mean(adversarial[:5]) - 0.05
    assert np.mean(denoising[-5:]) > np.mean(denoising[:5]) + 0.05


def test_gradient_reversal_gives_the_generator_the_gradient_of_the_alternating_step():
    x = torch.rand(5, requires_grad=True)
    (GradientReversal.apply(x, 0.5) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, -0.5 * 2 * x.detach())

    slate = random_slate()
    common = dict(lambda_e=0, dropout=0.0, lz_fraction=1.0, lambda_m=0.3, lambda_adv=0.8, lambda_x=0.5)
    alternate, reversal = build("DNR", **common), build("DNR", alternation="reversal", **common)
    reversal.load_state_dict(alternate.state_dict())
    gradients = []
    for model in (alternate.train(), reversal.train()):
        if model.reversal:
            torch.manual_seed(7)
            *_, step = training_steps(model, slate)
        else:
            torch.manual_seed(7)
            step = model._generator_step(slate)
        gradients.append(torch.autograd.grad(step.loss, list(model.generator.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_denoising_loss_on_a_part_of_the_batch_is_unbiased():
    slate = random_slate(batch=40, ragged=False)
    part = build("DNR", dropout=0.0, lambda_c=0.0, lz_fraction=0.25).train()
    whole = build("DNR", dropout=0.0, lambda_c=0.0, lz_fraction=1.0).train()
    (full,) = training_steps(whole, slate)
    estimates = [float(next(training_steps(part, slate)).terms["L_z"].detach()) for _ in range(300)]
    assert np.mean(estimates) == pytest.approx(float(full.terms["L_z"]), abs=4 * np.std(estimates) / 300**0.5 + 1e-6)


# ---------------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("lambda_e", [0, 1, 3])
def test_the_generator_is_switched_on_after_exactly_lambda_e_epochs(lambda_e):
    model = build("DNR", lambda_e=lambda_e).train()
    for epoch in range(5):
        model.set_epoch(epoch)
        groups = [step.groups for step in training_steps(model, random_slate())]
        assert groups == ([("reranker",)] if epoch < lambda_e else [("reranker",), ("generator",)])


def test_ablations():
    slate = random_slate()
    heuristic = build("DNR", adversarial=False, lambda_e=0).train()
    assert heuristic.generator is None and len(list(training_steps(heuristic, slate))) == 1
    *_, step = training_steps(build("DNR", lambda_e=0, lambda_adv=0.0).train(), slate)
    torch.testing.assert_close(step.loss, step.terms["L_x"])
    *_, step = training_steps(build("DNR", lambda_e=0, lambda_x=0.0).train(), slate)
    torch.testing.assert_close(step.loss, step.terms["L_adv"])


def test_backbones_that_cannot_see_the_score_are_refused():
    with pytest.raises(ConfigError, match="score_fusion"):
        build("DNR", score_fusion="none")
    with pytest.raises(ConfigError, match="gradient"):
        build("DNR", score_fusion="rank")
    assert build("DNR", score_fusion="rank", adversarial=False).generator is None
