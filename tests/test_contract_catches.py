"""The contract itself: a sound model of five lines passes, and each broken one fails the test that is for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.testing import RerankerContract, random_slate


class Sound(AbstractReranker):
    """Candidate and user, through one layer."""

    paper = "none"

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.head = nn.Linear(self.dim, 1)

    def score(self, context, slate, x):
        tokens = self.fusion(context.candidates, x, slate.mask) * (1 + context.user.unsqueeze(1))
        return self.head(torch.tanh(tokens)).squeeze(-1)


class TestSound(RerankerContract):
    model = Sound
    overrides = {"score_fusion": "concat"}


class StorageOrder(Sound):
    def score(self, context, slate, x):
        logits = super().score(context, slate, x)
        return logits + 0.01 * torch.arange(logits.shape[1])


class BatchMean(Sound):
    def score(self, context, slate, x):
        logits = super().score(context, slate, x)
        return logits - x * logits.mean()


class UnmaskedMean(Sound):
    def score(self, context, slate, x):
        return super().score(context, slate, x) + context.candidates.sum(1).mean(-1, keepdim=True)


class UnmaskedHistory(Sound):
    def encode(self, slate):
        context = super().encode(slate)
        return context._replace(user=self.items(slate.history).sum(1))


class ReadsLabels(Sound):
    def predict(self, slate):
        return super().predict(slate) + slate.labels


class ReadsLabelsInTraining(Sound):
    def score(self, context, slate, x):
        logits = super().score(context, slate, x)
        return logits + slate.labels if self.training else logits


class IgnoresScores(Sound):
    def score(self, context, slate, x):
        return super().score(context, slate, torch.zeros_like(x))


class ReadsTheWrongScores(Sound):
    def score(self, context, slate, x):
        return super().score(context, slate, slate.scores)


class Random(Sound):
    def score(self, context, slate, x):
        logits = super().score(context, slate, x)
        return logits + 1e-3 * torch.rand_like(logits)


class ShowsTwice(Sound):
    def generate(self, slate):
        return super().generate(slate)[:, :1].expand(-1, self.slate_size)


class ShowsAnother(Sound):
    def generate(self, slate):
        return super().generate(slate).flip(1)


class NeverLearns(Sound):
    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.dead = nn.Linear(self.dim, 1)


class Overflows(Sound):
    def loss(self, context, slate, x):
        return super().loss(context, slate, x) / slate.labels.sum()


class Forgets(Sound):
    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.register_buffer("shift", torch.randn(self.dim), persistent=False)

    def encode(self, slate):
        context = super().encode(slate)
        return context._replace(candidates=context.candidates + self.shift)


CATCHES = [
    (StorageOrder, "test_candidate_order_changes_nothing", {}),
    (BatchMean, "test_batch_composition_changes_nothing", {}),
    (UnmaskedMean, "test_garbage_behind_the_masks_changes_nothing", {}),
    (UnmaskedHistory, "test_garbage_behind_the_masks_changes_nothing", {}),
    (ReadsLabels, "test_labels_change_nothing", {}),
    (ReadsLabelsInTraining, "test_score_reads_the_scores_that_it_is_given", {"training": True}),
    (ReadsTheWrongScores, "test_score_reads_the_scores_that_it_is_given", {"training": False}),
    (Random, "test_is_deterministic", {}),
    (ShowsTwice, "test_generates_distinct_valid_candidates", {}),
    (ShowsAnother, "test_prediction_ranks_the_generated_list_first", {}),
]
MAKES_ITS_OWN = [
    (IgnoresScores, "test_every_score_fusion_works", {"method": "concat"}),
    (Overflows, "test_losses_and_gradients_are_finite", {"case": "no positive"}),
]


def broken(model) -> RerankerContract:
    return type("Broken", (RerankerContract,), {"model": model, "overrides": {"score_fusion": "concat"}})()


@pytest.mark.parametrize("model, test, arguments", CATCHES, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_model_fails(model, test, arguments):
    check = broken(model)
    with pytest.raises((AssertionError, TypeError)):  # labels that are not there cannot be added
        getattr(check, test)(check.make(), random_slate(), **arguments)


@pytest.mark.parametrize("model, test, arguments", MAKES_ITS_OWN, ids=lambda v: getattr(v, "__name__", None))
def test_a_model_that_is_broken_in_training_fails(model, test, arguments):
    with pytest.raises(AssertionError):
        getattr(broken(model), test)(random_slate(), **arguments)


def test_a_dead_layer_fails():
    with pytest.raises(AssertionError, match="dead"):
        broken(NeverLearns).test_every_parameter_learns()


def test_a_state_that_is_not_saved_fails(tmp_path):
    check = broken(Forgets)
    with pytest.raises(AssertionError):
        check.test_save_and_load(check.make(), random_slate(), tmp_path)
