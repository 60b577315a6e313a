"""The contract itself: a sound model of five lines passes, and each broken one fails the test that is for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dnr_recbole.lists import best_first, top_positions
from dnr_recbole.model.abstract_reranker import AbstractReranker, Step
from dnr_recbole.model.blocks.list_evaluator import ListEvaluator
from dnr_recbole.model.reranker._list_decoding import evaluator_loss
from dnr_recbole.order_trace import OrderTrace, follows
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
        return dataclasses.replace(context, user=self.embedder.items(slate.history).sum(1))


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


class ShowsItsOwnScoresOnly(Sound):
    """What ``residual`` adds is in its logits and not in its ranking."""

    def predict(self, slate):
        own = self.score(self.encode(slate), slate, slate.scores)
        return own.masked_fill(~slate.mask, -1e9)


class LearnsItsOwnScoresOnly(Sound):
    def loss(self, context, slate, x):
        return self.criterion(self.score(context, slate, x), slate)


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
        return dataclasses.replace(context, candidates=context.candidates + self.shift)


class Judged(Sound):
    """Beside its own head, an evaluator of lists, in a step of its own: here on the list that was shown."""

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        self.evaluator = ListEvaluator(self.dim, 8, self.slate_size)

    def shown(self, slate):
        return top_positions(slate.logged_scores, slate.mask, self.slate_size)

    def training_steps(self, slate):
        context = self.encode(slate)
        yield self.loss(context, slate, slate.scores)
        tokens = self.fusion(self.encode(slate).candidates, slate.scores, slate.mask)
        lists = self.shown(slate).unsqueeze(1)
        judged = evaluator_loss(self.evaluator, tokens, self.encode(slate).user, lists, slate)
        yield Step(judged, ("evaluator",), {"L_evaluator": judged.detach()})

    def parameter_groups(self):
        judge = list(self.evaluator.parameters())
        rest = {id(p) for p in judge}
        return {"reranker": [p for p in self.parameters() if id(p) not in rest], "evaluator": judge}


class TestJudged(RerankerContract):
    model = Judged
    overrides = {"score_fusion": "concat"}


class JudgesSyntheticLists(Judged):
    def shown(self, slate):
        return top_positions(slate.scores, slate.mask, self.slate_size)


class JudgesWorstFirst(Judged):
    def shown(self, slate):
        return best_first(3 - slate.scores**2, slate.mask)[:, : self.slate_size]


class JudgesWithoutSorting(Judged):
    """Counts instead: no call of sort, top-k or argmax has anything to do with the scores."""

    def shown(self, slate):
        rank = (slate.scores.unsqueeze(1) > slate.scores.unsqueeze(2)).sum(2)
        places = torch.arange(self.slate_size).view(1, -1, 1)
        return (rank.unsqueeze(1) == places).float().cumsum(-1).eq(0).sum(-1)


class ReadsInOrder(Judged):
    """Its head reads the rank by score, which it may; its evaluator sees lists of that order, which it may not."""

    def score(self, context, slate, x):
        rank = best_first(x, slate.mask).argsort(1)
        return super().score(context, slate, x) - 0.1 * rank

    def shown(self, slate):
        return top_positions(slate.scores, slate.mask, self.slate_size)


CATCHES = [
    (StorageOrder, "test_candidate_order_changes_nothing", {}),
    (BatchMean, "test_batch_composition_changes_nothing", {}),
    (UnmaskedMean, "test_garbage_behind_the_masks_changes_nothing", {}),
    (UnmaskedHistory, "test_garbage_behind_the_masks_changes_nothing", {}),
    (ReadsLabels, "test_labels_change_nothing", {}),
    (ReadsLabelsInTraining, "test_score_reads_the_scores_that_it_is_given", {"training": True}),
    (ReadsTheWrongScores, "test_score_reads_the_scores_that_it_is_given", {"training": False}),
    (ReadsLabelsInTraining, "test_encode_and_score_do_without_scores_and_labels", {}),
    (ReadsTheWrongScores, "test_encode_and_score_do_without_scores_and_labels", {}),
    (Random, "test_is_deterministic", {}),
    (ShowsTwice, "test_generates_distinct_valid_candidates", {}),
    (ShowsAnother, "test_prediction_ranks_the_generated_list_first", {}),
]
MAKES_ITS_OWN = [
    (IgnoresScores, "test_every_score_fusion_works", {"method": "concat"}),
    (ShowsItsOwnScoresOnly, "test_a_steep_residual_leaves_the_incoming_order", {}),
    (LearnsItsOwnScoresOnly, "test_the_slope_of_the_residual_learns", {}),
    (Overflows, "test_losses_and_gradients_are_finite", {"case": "no positive"}),
]


SORTED, UNSEEN = (
    "test_synthetic_scores_order_no_list",
    "test_scores_that_the_model_cannot_see_change_nothing_in_training",
)
JUDGES = [
    (JudgesSyntheticLists, (SORTED, UNSEEN)),
    (JudgesWorstFirst, (SORTED, UNSEEN)),
    (JudgesWithoutSorting, (UNSEEN,)),
    (ReadsInOrder, (SORTED,)),
]


def broken(model) -> RerankerContract:
    return type("Broken", (RerankerContract,), {"model": model, "overrides": {"score_fusion": "concat"}})()


@pytest.mark.parametrize("model, tests", JUDGES, ids=lambda v: getattr(v, "__name__", None))
def test_an_evaluator_that_learns_on_synthetic_lists_fails(model, tests):
    check = broken(model)
    for test in (SORTED, UNSEEN):
        if test in tests:
            with pytest.raises(AssertionError):
                getattr(check, test)()
        else:
            getattr(check, test)()


def test_a_trace_knows_an_order_whatever_was_done_to_the_scores():
    x = random_slate(seed=6, ragged=False).scores.double()
    drawn = torch.rand(len(x), 3, x.shape[1])
    assert follows(x, x) and follows(-x, x) and follows(7 * x.float() ** 3 - 2, x)
    assert follows(x.masked_fill(x < 0.4, -torch.inf), x)
    assert follows(torch.cat([drawn, x.unsqueeze(1)], dim=1), x)  # among lists of another origin
    assert follows(x.repeat(3, 1), x) and follows(x.repeat_interleave(3, dim=0), x)
    assert not follows(drawn, x) and not follows(x.roll(1, 0), x) and not follows(x[:, :5], x)
    swapped = x.clone()
    swapped[0] = x[0].roll(1)
    assert not follows(swapped, x)
    assert not follows(x.masked_fill(x < x.topk(2, dim=1).values[:, -1:], -torch.inf), x)  # two prove nothing


def test_a_trace_names_the_method_that_sorts():
    class Sorts(nn.Module):
        def named(self, x):
            return best_first(x, torch.ones_like(x, dtype=torch.bool))

    x = random_slate(ragged=False).scores
    with OrderTrace(x) as trace:
        Sorts().named(x)
        Sorts().named(torch.rand_like(x))
    assert list(trace.places.values()) == ["Sorts.named"]
    assert torch.equal(Sorts().named(x), x.argsort(1, descending=True))


@pytest.mark.parametrize("model, test, arguments", CATCHES, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_model_fails(model, test, arguments):
    check = broken(model)
    with pytest.raises((AssertionError, AttributeError, TypeError)):  # what is not there can be neither read nor added
        getattr(check, test)(check.make(), random_slate(), **arguments)


@pytest.mark.parametrize("model, test, arguments", MAKES_ITS_OWN, ids=lambda v: getattr(v, "__name__", None))
def test_a_model_that_is_broken_in_training_fails(model, test, arguments):
    with pytest.raises(AssertionError):
        getattr(broken(model), test)(random_slate(), **arguments)


def test_a_dead_layer_fails():
    with pytest.raises(AssertionError, match="dead"):
        broken(NeverLearns).test_every_parameter_learns("affinity")


def test_a_state_that_is_not_saved_fails(tmp_path):
    check = broken(Forgets)
    with pytest.raises(AssertionError):
        check.test_save_and_load(check.make(), random_slate(), tmp_path)
