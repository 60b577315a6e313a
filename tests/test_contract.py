"""The reranker contract, over the whole registry and over DNR around every backbone that it may wrap."""

from __future__ import annotations

import pytest

from dnr_recbole.errors import ConfigError
from dnr_recbole.registry import list_models
from dnr_recbole.testing import RerankerContract, build

RERANKERS = [m.name for m in list_models("reranker")]
BACKBONES = [m.name for m in list_models("reranker") if m.name != "DNR" and m.cls.supports_noise]
REFUSED = [m.name for m in list_models("reranker") if m.name != "DNR" and not m.cls.supports_noise]


def contract(name: str, model: str, **overrides) -> type:
    return type(name, (RerankerContract,), {"model": model, "overrides": overrides})


for _name in RERANKERS:
    if _name != "DNR":
        globals()[f"Test{_name}"] = contract(f"Test{_name}", _name)


class TestDNR(RerankerContract):
    """DNR around PRM in its heuristic phase."""

    model = "DNR"

    def test_without_score_fusion_only_the_order_of_scores_matters(self, slate):
        with pytest.raises(ConfigError, match="score_fusion"):
            self.make(score_fusion="none")

    @pytest.mark.parametrize("method", ["rank", "concat", "add", "weight"])
    def test_every_score_fusion_works(self, slate, method):
        model = self.make(score_fusion=method, adversarial=method != "rank")
        self.same_scores(self.scores(model, slate), self.scores(model.backbone, slate), slate.mask)


class TestAdversarialDNR(TestDNR):
    """The same from the first epoch on with the learned generator."""

    overrides = {"lambda_e": 0, "lz_fraction": 1.0}


class TestReversalDNR(TestDNR):
    """Single-pass training through a gradient reversal."""

    overrides = {"lambda_e": 0, "alternation": "reversal"}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("lambda_e", [0, 1])
class TestDNRWrapsEveryBackbone:
    """One training batch of both phases around every reranker."""

    def test_trains(self, backbone, lambda_e):
        import torch

        from dnr_recbole.testing import random_slate, train_one_batch

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


@pytest.mark.parametrize("backbone", REFUSED)
def test_dnr_says_why_it_refuses_a_backbone(backbone):
    with pytest.raises(ConfigError, match=f"DNR cannot wrap {backbone}: .+"):
        build("DNR", backbone=backbone)
