"""The reranker contract, over the whole registry and over DNR around every backbone that it may wrap."""

from __future__ import annotations

import pytest
import torch

from dnr_recbole.errors import ConfigError
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.inputs.score_fusion import ScoreFusion
from dnr_recbole.registry import list_models
from dnr_recbole.testing import RerankerContract, build, random_slate, train_one_batch

RERANKERS = [m.name for m in list_models("reranker")]
BACKBONES = [m.name for m in list_models("reranker") if m.name != "DNR" and m.cls.supports_noise]
REFUSED = [m.name for m in list_models("reranker") if m.name != "DNR" and not m.cls.supports_noise]


# Options that take another path through a model; the whole contract but the overfitting holds for them, too.
VARIANTS = [
    ("SetRank", dict(attention="imsab", fuse_every_block=True, score_fusion="rank")),
    ("PRM", dict(use_pv=True, pv_epochs=1, pv_folds=2)),
    ("PRM", dict(n_layers=10)),
    ("GSF", dict(group_size=1)),
    ("GSF", dict(group_size=3)),
    ("Seq2Slate", dict(decoding="beam")),
    ("Seq2Slate", dict(reinforce_weight=1.0)),
    ("DCDR", dict(start="retriever")),
    ("DCDR", dict(decoding="path", evaluator_kind="transformer", start="retriever")),
    ("DiffuRec", dict(targets="catalogue", chains=2)),
    ("NAR4Rec", dict(bad_lists="retriever", evaluator_kind="gru", decode_alphas=[1.0])),
    ("EGRerank", dict(inference_lists=4, evaluator_epochs=1)),
    ("PIER", dict(list_value="mean", include_pointwise=False)),
    ("MGE", dict(generators=["retriever", "Seq2Slate", "DPP", "DCDR"], clig=False)),
    ("SASRec", dict(pretrain_epochs=1)),
    ("MIR", dict(n_heads=1, mlp_hidden=[8])),
]

# Where more than the logits makes the list: how a steep slope acts on it, if it does.
LISTS = {
    "DCDR": dict(steep_slope=4.0),
    "MMR": dict(steep_slope=4.0, steep_overrides={"mmr_lambda": 1.0}),
    "DPP": dict(steep_overrides=None),
    "LambdaMART": dict(steep_slope=1000.0, overrides={"min_data_in_leaf": 1, "lambda_l2": 0.0, "num_leaves": 127}),
}


def contract(name: str, model: str, **members) -> None:
    globals()[name] = type(name, (RerankerContract,), {"model": model, **members})


for _name in RERANKERS:
    if _name != "DNR":
        contract(f"Test{_name}", _name, **LISTS.get(_name, {}))
for _number, (_name, _keys) in enumerate(VARIANTS):
    _members = {**LISTS.get(_name, {}), **({} if _keys.get("include_pointwise", True) else {"steep_overrides": None})}
    contract(f"Test{_name}Variant{_number}", _name, overrides=_keys, test_overfits_eight_requests=None, **_members)


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_enter_through_the_one_score_fusion(name, monkeypatch):
    calls, forward = [], ScoreFusion.forward
    monkeypatch.setattr(ScoreFusion, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    model, slate = build(name, score_fusion="concat"), random_slate()
    model(slate)
    # MiDNN normalises its features, and a linear map of [e ; x] in front of that would undo it: x is a feature itself.
    # Trees have columns, not representations.
    assert bool(calls) != (name == "MiDNN" or model.fits_itself)


class TestDNR(RerankerContract):
    """DNR around PRM in its heuristic phase."""

    model = "DNR"
    test_scores_that_the_model_cannot_see_change_nothing_in_training = None  # it refuses score_fusion: none

    def test_without_score_fusion_only_the_order_of_scores_matters(self, slate):
        with pytest.raises(ConfigError, match="score_fusion"):
            self.make(score_fusion="none")

    def make(self, **overrides):
        if overrides.get("score_fusion") == "rank":
            overrides["adversarial"] = False
        return super().make(**overrides)


class TestAdversarialDNR(TestDNR):
    """The same from the first epoch on with the learned generator."""

    overrides = {"lambda_e": 0, "lz_fraction": 1.0}


class TestReversalDNR(TestDNR):
    """Single-pass training through a gradient reversal."""

    overrides = {"lambda_e": 0, "alternation": "reversal"}


class TestDNROfLists(TestDNR):
    """A generator of lists with a balanced adversary, and empirical noise before it."""

    overrides = {
        "lambda_e": 0, "generator": "list", "adv_balance": "gradient", "lx_estimator": "lists",
        "noise_type": "empirical",
    }  # fmt: skip


class TestResidualDNR(TestDNR):
    """Residual noise with a residual generator that warms up beside it."""

    overrides = {"lambda_e": 3, "noise_type": "residual", "generator": "residual", "generator_warmup": True}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("lambda_e", [0, 1])
class TestDNRWrapsEveryBackbone:
    """One training batch of both phases around every reranker."""

    def test_trains(self, backbone, lambda_e):
        model = build("DNR", backbone=backbone, lambda_e=lambda_e).train()
        model.set_epoch(0)
        groups = model.parameter_groups()
        optimizers = {name: torch.optim.SGD(params, lr=0.1) for name, params in groups.items()}
        before = [p.detach().clone() for p in model.generator.parameters()]
        slate = random_slate()
        train_one_batch(model, slate, optimizers)
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.generator.parameters()))
        assert moved == (lambda_e == 0)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert torch.equal(model.eval().predict(slate), model.backbone.predict(slate))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", ["concat", "add", "weight", "residual", "rank+concat"])
def test_every_backbone_passes_a_gradient_to_the_noise_generator(backbone, method):
    """L_adv alone moves the generator: were x' lost on its way through the backbone, nothing would."""
    model = build("DNR", backbone=backbone, score_fusion=method, lambda_e=0, lambda_x=0.0, lz_fraction=1.0).train()
    model.set_epoch(0)
    *_, step = model.training_steps(random_slate())
    assert step.groups == ("generator",)
    gradients = torch.autograd.grad(step.loss, list(model.generator.parameters()))
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("backbone", [b for b in BACKBONES if b != "EGRerank"])
def test_l_z_is_the_loss_under_synthetic_scores(backbone):
    """Eq. 6 around every backbone, whose loss reads the scores that it is given."""
    model, slate = build("DNR", backbone=backbone, lambda_m=0.7, lz_fraction=1.0).train(), random_slate()
    (step,) = model.training_steps(slate)
    torch.testing.assert_close(step.loss, step.terms["L_direct"] + 0.7 * step.terms["L_z"])
    x = torch.rand_like(slate.scores).requires_grad_()
    assert torch.autograd.grad(model.backbone.loss(model.encode(slate), slate, x), x)[0].abs().sum() > 0


def test_dnr_pairs_the_steps_of_a_backbone_that_takes_several():
    model = build("DNR", backbone="EGRerank", lambda_m=0.7, ppo_epochs=3, dropout=0.0).train()
    assert type(model.backbone).training_steps is not AbstractReranker.training_steps
    steps = list(model.training_steps(random_slate()))
    assert len(steps) == 3
    torch.testing.assert_close(steps[0].loss, steps[0].terms["L_direct"] + 0.7 * steps[0].terms["L_z"])
    assert not steps[1].terms and not steps[2].terms  # the log sums a batch's terms: once is enough


def test_only_fixed_rules_are_refused():
    assert set(REFUSED) == {"MMR", "DPP", "LambdaMART"}
    with pytest.raises(ConfigError, match="DNR cannot wrap EGRerank: freeze_evaluator"):
        build("DNR", backbone="EGRerank", freeze_evaluator=True, evaluator_epochs=1)


@pytest.mark.parametrize("backbone", REFUSED)
def test_dnr_says_why_it_refuses_a_backbone(backbone):
    with pytest.raises(ConfigError, match=f"DNR cannot wrap {backbone}: .+"):
        build("DNR", backbone=backbone)
