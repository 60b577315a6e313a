"""The part of the contract on training: losses are finite, parameters learn, and lists are not ordered by x'."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dnr_recbole.data.slate import Slate
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.order_trace import OrderTrace
from dnr_recbole.testing.inputs import random_slate, train_one_batch, training_steps
from dnr_recbole.testing.under_test import ModelUnderTest


class TrainingContract(ModelUnderTest):
    """Losses, gradients and what they may read."""

    # ------------------------------------------------------------------ what is learned from synthetic scores

    def test_synthetic_scores_order_no_list(self):
        """A framework may put scores made of labels into ``slate.scores``. The model may read them, and no more.

        An evaluator or a discriminator that learns on lists in their order learns that positives stand first. So in
        training, candidates may be ordered by the slate's scores only where :meth:`AbstractReranker.score` does so, too
        (a model that reads the candidates in that order); any other sort by them makes a list or a target, for which
        ``slate.logged_scores`` are there. Sorts are recognised by their keys and told apart by the method that asks for
        them (:class:`~dnr_recbole.order_trace.OrderTrace`), so neither declarations nor a common evaluator class are
        needed. A list cut from the very order that ``score`` reads escapes this test.
        """
        model, slate = self.make().train(), random_slate(seed=6, ragged=False)
        if not model.supports_noise:
            return
        slate = self.with_label_scores(slate)
        with OrderTrace(slate.scores) as reading:
            model.score(model.encode(slate), slate, slate.scores)
        with OrderTrace(slate.scores) as training:
            for _ in self._epochs_of_steps(model, slate):
                pass
        lists = [name for place, name in training.places.items() if place not in reading.places]
        assert not lists, f"{lists} order candidates by scores that may be synthetic: use slate.logged_scores"

    def test_scores_that_the_model_cannot_see_change_nothing_in_training(self):
        """Without score fusion: losses, terms and gradients are the same whether positives score high or low.

        Whatever way the scores take into a list or a target, sorted or not. Models that read the order of the scores,
        seen by their logits, are left to the test above.
        """
        model, slate = self.make(score_fusion="none"), random_slate(seed=6, ragged=False)
        high = self.with_label_scores(slate)
        versions = high, slate.with_scores(1 - high.scores)
        if not model.supports_noise or not torch.equal(*(self.logits(model, version) for version in versions)):
            return
        outcomes = []
        for version in versions:
            torch.manual_seed(0)
            groups, outcome = model.train().parameter_groups(), []
            for step in self._epochs_of_steps(model, version):
                model.zero_grad(set_to_none=True)
                if step.loss.requires_grad:
                    torch.autograd.backward(step.loss, inputs=[p for g in step.groups for p in groups[g]])
                outcome += [step.loss.detach(), *(term.detach() for term in step.terms.values())]
                outcome += [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
            outcomes.append(outcome)
        assert len(outcomes[0]) == len(outcomes[1])
        for a, b in zip(*outcomes):
            torch.testing.assert_close(a, b, atol=self.atol, rtol=1e-4)

    # ------------------------------------------------------------------ losses and gradients

    @pytest.mark.parametrize("case", ["usual", "no positive", "all positive", "one candidate", "empty history"])
    def test_losses_and_gradients_are_finite(self, slate, case):
        model = self.make().train()
        if case == "no positive":
            slate = dataclasses.replace(slate, labels=torch.zeros_like(slate.labels))
        elif case == "all positive":
            slate = dataclasses.replace(slate, labels=slate.mask.float())
        elif case == "one candidate":
            first = torch.zeros_like(slate.mask)
            first[:, 0] = True
            slate = Slate(
                slate.users, slate.history, slate.history_mask, slate.candidates.clamp(min=1) * first, first,
                slate.scores * first, slate.labels * first,
            )  # fmt: skip
        elif case == "empty history":
            slate = Slate(
                slate.users, slate.history * 0, slate.history_mask & False, slate.candidates, slate.mask,
                slate.scores, slate.labels,
            )  # fmt: skip
        groups = model.parameter_groups()
        for stage in model.pretraining():
            assert torch.isfinite(stage.loss(slate))
        for step in training_steps(model, slate):
            assert step.loss.dim() == 0 and torch.isfinite(step.loss)
            model.zero_grad(set_to_none=True)
            if step.loss.requires_grad:
                torch.autograd.backward(step.loss, inputs=[p for g in step.groups for p in groups[g]])
            assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    @pytest.mark.parametrize("interaction", ["affinity", "both"])
    def test_every_parameter_learns(self, interaction):
        """In some batch of the first or a late epoch, or in a pretraining stage."""
        if self._refuses(interaction):
            return
        model = self.make(dropout=0.0, history_interaction=interaction).train()
        if model.fits_itself:
            assert not any(model.parameter_groups().values()), "nothing would train these"
            return
        reached = set()
        for stage in model.pretraining():
            torch.autograd.backward(stage.loss(random_slate()), inputs=stage.parameters)
            reached.update(id(p) for p in stage.parameters if p.grad is not None)
        groups = model.parameter_groups()
        for seed, epoch in enumerate((0, 0, 10**6, 10**6)):
            model.set_epoch(epoch)
            for step in training_steps(model, random_slate(seed)):
                model.zero_grad(set_to_none=True)
                torch.autograd.backward(step.loss, inputs=[p for g in step.groups for p in groups[g]])
                reached.update(id(p) for p in model.parameters() if p.grad is not None and p.grad.any())
        names = {id(p): name for name, p in model.named_parameters()}
        trained = [p for group in groups.values() for p in group]
        idle = [names[id(p)] for p in trained if id(p) not in reached]
        assert trained and not idle, f"no gradient ever reaches {idle}"

    def test_overfits_eight_requests(self):
        slate = random_slate(seed=5, ragged=False)
        if self.cls.fits_itself:
            model = self.make()
            model.fit([slate], [slate])
            assert self.ndcg(model, slate) > 0.999
            return
        model = self.make(dropout=0.0)
        for stage in model.pretraining():
            optimizer = torch.optim.Adam(stage.parameters, lr=self.overfit_learning_rate)
            for _ in range(20):
                model.train().zero_grad(set_to_none=True)
                torch.autograd.backward(stage.loss(slate), inputs=stage.parameters)
                optimizer.step()
            if stage.finish:
                stage.finish()
        optimizers = {
            name: torch.optim.Adam(params, lr=self.overfit_learning_rate)
            for name, params in model.parameter_groups().items()
        }
        best = 0.0
        for epoch in range(self.overfit_epochs):
            model.train()
            model.set_epoch(epoch)
            train_one_batch(model, slate, optimizers)
            if epoch % 10 == 9:
                best = max(best, self.ndcg(model, slate))
                if best > 0.999:
                    return
        assert best > 0.999, f"NDCG@{model.slate_size} on eight memorised requests is only {best:.3f}"

    def ndcg(self, model: AbstractReranker, slate: Slate) -> float:
        """Mean NDCG@K of the model's ranking."""
        k = model.slate_size
        scores = self.scores(model, slate)
        gains = slate.labels.gather(1, scores.argsort(1, descending=True))[:, :k]
        ideal = slate.labels.sort(1, descending=True).values[:, :k]
        discount = 1 / torch.log2(torch.arange(k, device=scores.device) + 2.0)
        return float(((gains * discount).sum(1) / (ideal * discount).sum(1)).mean())
