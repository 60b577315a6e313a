"""The part of the contract on prediction: what must change nothing, and the list that is shown."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dnr_recbole.data.slate import Slate
from dnr_recbole.testing.inputs import seeded
from dnr_recbole.testing.under_test import ModelUnderTest


class PredictionContract(ModelUnderTest):
    """Invariances of scores, logits and shown lists."""

    # ------------------------------------------------------------------ what a model declares

    def test_declares_itself(self, reranker):
        assert reranker.paper, "set the class attribute `paper`: authors, venue, year: title"
        assert reranker.permutation in ("equivariant", "score_order")
        assert reranker.supports_noise or reranker.noise_refusal

    # ------------------------------------------------------------------ invariances of prediction

    def test_scores_have_shape_and_are_finite(self, reranker, slate):
        scores = self.scores(reranker, slate)
        assert scores.shape == slate.candidates.shape
        assert torch.isfinite(scores).all()
        assert (scores[~slate.mask] < scores[slate.mask].min()).all()

    def test_padding_candidates_changes_nothing(self, reranker, slate):
        pad = lambda t: torch.nn.functional.pad(t, (0, 3))  # noqa: E731
        padded = Slate(
            slate.users, slate.history, slate.history_mask, pad(slate.candidates), pad(slate.mask), pad(slate.scores)
        )
        n = slate.mask.shape[1]
        self.same_scores(self.logits(reranker, slate), self.logits(reranker, padded)[:, :n], slate.mask)
        self.same_scores(
            *self._rank_free(self.scores(reranker, slate), self.scores(reranker, padded)[:, :n]), slate.mask
        )

    def test_padding_history_changes_nothing(self, reranker, slate):
        pad = lambda t: torch.nn.functional.pad(t, (0, 4))  # noqa: E731
        padded = Slate(
            slate.users, pad(slate.history), pad(slate.history_mask), slate.candidates, slate.mask, slate.scores
        )
        self.same_results(reranker, slate, padded)

    def test_garbage_behind_the_masks_changes_nothing(self, reranker, slate):
        dirty = Slate(
            slate.users,
            slate.history.masked_fill(~slate.history_mask, 5),
            slate.history_mask,
            slate.candidates.masked_fill(~slate.mask, 7),
            slate.mask,
            slate.scores.masked_fill(~slate.mask.view(*slate.mask.shape, *[1] * (slate.scores.dim() - 2)), 0.99),
        )
        self.same_results(reranker, slate, dirty)

    def test_candidate_order_changes_nothing(self, reranker, slate):
        order = seeded(3, *slate.candidates.shape).argsort(1)
        moved = slate.shuffled(order)
        for outcome in (self.scores, self.logits):
            self.same_scores(outcome(reranker, slate).gather(1, order), outcome(reranker, moved), moved.mask)

    def test_labels_change_nothing(self, reranker, slate):
        flipped = dataclasses.replace(slate, labels=1 - slate.labels)
        with torch.no_grad():
            self.same_scores(reranker.predict(slate), reranker.predict(flipped), slate.mask)
            self.same_scores(reranker.predict(slate), self.scores(reranker, slate), slate.mask)

    def test_encode_and_score_do_without_scores_and_labels(self, reranker, slate):
        unscored = slate.unscored()
        with torch.no_grad():
            for model in (reranker.eval(), reranker.train()):
                assert len(model.score(model.encode(unscored), unscored, slate.scores)) == len(slate)

    def test_batch_composition_changes_nothing(self, reranker, slate):
        for outcome in (self.scores, self.logits):
            whole = outcome(reranker, slate)
            for row in (0, 3, len(slate) - 1):
                alone = outcome(reranker, slate.select(torch.tensor([row], device=slate.device)))
                self.same_scores(whole[row : row + 1], alone, slate.mask[row : row + 1])

    def test_is_deterministic(self, reranker, slate):
        outcomes = []
        for seed in (0, 1):  # whatever the global generator's state
            torch.manual_seed(seed)
            outcomes.append((self.scores(reranker, slate), self.logits(reranker, slate)))
        for a, b in zip(*outcomes):
            torch.testing.assert_close(a, b, atol=0, rtol=0)

    @pytest.mark.parametrize("training", [False, True])
    def test_score_reads_the_scores_that_it_is_given(self, reranker, slate, training):
        """And neither ``slate.scores`` nor labels: else training under synthetic scores would not be that."""
        x = seeded(4, *slate.scores.shape) * slate.mask
        logits = []
        for request in (slate, slate.with_scores(x.flip(1) * slate.mask).without_labels()):
            torch.manual_seed(0)
            context = reranker.train(training).encode(request)
            logits.append(reranker.score(context, request, x))
        self.same_scores(*logits, slate.mask)

    def test_without_score_fusion_only_the_order_of_scores_matters(self, slate):
        model = self.make(score_fusion="none")
        rescaled = slate.with_scores((0.5 * slate.scores**2 + 0.3) * slate.mask)
        self.same_scores(self.scores(model, slate), self.scores(model, rescaled), slate.mask)

    # ------------------------------------------------------------------ the list that is shown

    def test_generates_distinct_valid_candidates(self, reranker, slate):
        with torch.no_grad():
            shown = reranker.generate(slate.without_labels())
        assert shown.shape == (len(slate), reranker.slate_size)
        for row, mask in zip(shown, slate.mask):
            real = row[row >= 0]
            assert len(real) == min(reranker.slate_size, int(mask.sum()))
            assert len(set(real.tolist())) == len(real)
            assert mask[real].all()

    def test_prediction_ranks_the_generated_list_first(self, reranker, slate):
        with torch.no_grad():
            shown = reranker.generate(slate.without_labels())
        top = self.scores(reranker, slate).topk(reranker.slate_size, dim=1).indices
        valid = shown >= 0
        assert torch.equal(top[valid], shown[valid])

    def test_no_list_is_better_than_the_oracle(self, reranker, slate):
        """``oracle``, of a model that chooses among few lists, bounds what is shown."""
        shown, k = reranker.generate(slate.without_labels()), reranker.slate_size
        reached = (slate.labels.gather(1, shown.clamp(min=0)) * (shown >= 0)).sum(1)
        possible = (slate.labels * slate.mask).sum(1).clamp(max=k)
        for name, share in reranker.oracle(slate).items():
            assert share.shape == possible.shape and torch.equal(share.isnan(), possible == 0), name
            some = possible > 0
            assert (reached[some] / possible[some] <= share[some] + 1e-6).all() and (share[some] <= 1).all(), name
