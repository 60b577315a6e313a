"""The part of the contract on `score_fusion`: every way in which a model may read the scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dnr_recbole.model.inputs.score_fusion import METHODS, ScoreFusion
from dnr_recbole.testing.inputs import training_steps
from dnr_recbole.testing.under_test import ModelUnderTest


class FusionContract(ModelUnderTest):
    """The scores reach the logits and the list, and gradients go back where they should."""

    @pytest.mark.parametrize("method", [*METHODS[1:], "rank+concat", "concat+residual"])
    def test_every_score_fusion_works(self, slate, method):
        model = self.make(score_fusion=method)
        assert torch.isfinite(self.scores(model, slate)).all()
        reversed_scores = slate.with_scores((1 - slate.scores) * slate.mask)
        change = (self.logits(model, slate) - self.logits(model, reversed_scores))[slate.mask].abs()
        assert change.max() > 1e-5, "the scores change nothing"
        x = slate.scores.clone().requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):  # its RNNs give no gradient in eval mode
            logits = model.logits(model.encode(slate), slate, x)
        if model.fusion.differentiable and not model.fits_itself:
            assert torch.autograd.grad(logits[slate.mask].square().sum(), x)[0].abs().sum() > 0

    def test_a_steep_residual_leaves_the_incoming_order(self, slate):
        """``score_fusion: residual`` reaches every logit that is read, and the list that is shown.

        A model whose lists are made of other numbers than its ``logits`` adds ``self.fusion.residual(x)`` to those.
        """
        for requests in (slate, dataclasses.replace(slate, scores=(1 - slate.scores) * slate.mask)):
            for keys, outcome in (({}, self.logits), (self.steep_overrides, self.scores)):
                if keys is None:
                    continue
                model = self.make(score_fusion="residual", **keys)
                for module in model.modules():
                    if isinstance(module, ScoreFusion):
                        torch.nn.init.constant_(module.slope, self.steep_slope)
                order = outcome(model, requests).masked_fill(~slate.mask, -torch.inf).argsort(1, descending=True)
                expected = requests.scores.masked_fill(~slate.mask, -torch.inf).argsort(1, descending=True)
                valid = slate.mask.gather(1, expected)
                assert torch.equal(order[valid], expected[valid])

    def test_the_slope_of_the_residual_learns(self, slate):
        model = self.make(score_fusion="residual").train()
        if model.fits_itself:
            return
        slopes = [module.slope for module in model.modules() if isinstance(module, ScoreFusion)]
        reached = [False] * len(slopes)
        for step in training_steps(model, slate):
            gradients = torch.autograd.grad(step.loss, slopes, retain_graph=True, allow_unused=True)
            reached = [old or (g is not None and bool(g != 0)) for old, g in zip(reached, gradients)]
        assert all(reached), "a slope gets no gradient"
