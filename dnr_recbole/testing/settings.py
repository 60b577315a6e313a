"""The part of the contract on settings: each interaction, several scores, features, a table, bf16, a loaded model."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.errors import ConfigError
from dnr_recbole.ranking import rank_table
from dnr_recbole.requestlog.reading import Source
from dnr_recbole.testing.inputs import (
    DEVICE,
    N_ITEMS,
    N_USERS,
    as_artefact,
    as_table,
    build,
    random_catalogue,
    random_slate,
    seeded,
    training_steps,
    two_scores,
)
from dnr_recbole.testing.prediction import PredictionContract


class SettingsContract(PredictionContract):
    """Other inputs, another arithmetic and another process: prediction keeps its invariances."""

    @pytest.mark.parametrize("interaction", ["none", "attention", "both"])
    def test_every_interaction_works(self, slate, interaction):
        """The invariances of prediction hold whatever `history_interaction` is; the default has tests of its own."""
        if self._refuses(interaction):
            with pytest.raises(ConfigError, match=f"history_interaction={interaction}: .* can use"):
                self.make(history_interaction=interaction)
            return
        model = self.make(history_interaction=interaction)
        self.test_scores_have_shape_and_are_finite(model, slate)
        self.test_padding_candidates_changes_nothing(model, slate)
        self.test_padding_history_changes_nothing(model, slate)
        self.test_garbage_behind_the_masks_changes_nothing(model, slate)
        self.test_candidate_order_changes_nothing(model, slate)
        self.test_batch_composition_changes_nothing(model, slate)
        other = self.make(history_interaction=interaction, seed=99)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(self.scores(model, slate), self.scores(other, slate), atol=0, rtol=0)

    def test_several_scores(self, slate):
        """Two retrievers, each of which lacks some candidates; the contract of one score holds for both."""
        slate = two_scores(slate)
        model = build(self.model, catalogue=dataclasses.replace(random_catalogue(), n_scores=2), **self.overrides)
        if model.fits_itself:
            model.fit([two_scores(random_slate(seed)) for seed in range(4)], [two_scores(random_slate(4))])
        self.test_scores_have_shape_and_are_finite(model, slate)
        self.test_candidate_order_changes_nothing(model, slate)
        self.test_batch_composition_changes_nothing(model, slate)
        self.test_garbage_behind_the_masks_changes_nothing(model, slate)
        self.test_generates_distinct_valid_candidates(model, slate)
        groups, training = model.train().parameter_groups(), two_scores(random_slate(seed=3))
        for stage in model.pretraining():
            assert torch.isfinite(stage.loss(training))
        for step in self._epochs_of_steps(model, training):
            assert torch.isfinite(step.loss)
            if step.loss.requires_grad:
                torch.autograd.backward(step.loss, inputs=[p for g in step.groups for p in groups[g]])

    def test_features_of_request_and_candidate(self, slate):
        """What a log says of a request and a candidate reaches the logits."""
        catalogue = dataclasses.replace(random_catalogue(), n_features=3)
        with_features = lambda s, seed=0: dataclasses.replace(  # noqa: E731
            s, features=seeded(seed, *s.mask.shape, 3) * s.mask.unsqueeze(-1)
        )
        model = build(self.model, catalogue=catalogue, **self.overrides)
        if model.fits_itself:  # labels that nothing else tells
            train = [with_features(random_slate(seed, ragged=False), seed) for seed in range(30)]
            train = [dataclasses.replace(s, labels=(s.features[..., 0] > 0.6).float()) for s in train]
            model.fit(train, train[:2])
        slate = with_features(slate)
        self.test_candidate_order_changes_nothing(model, slate)
        other = dataclasses.replace(slate, features=1 - slate.features)
        if self.cls.family != "diversity" or model.learned:
            assert not torch.equal(self.logits(model, slate)[slate.mask], self.logits(model, other)[slate.mask])

    def test_ranking_a_table_is_predicting_its_slate(self, reranker):
        """`Reranker.rank` on a table with external ids gives the order of `predict` on the same request."""
        slate = random_slate(seed=8, n_items=N_ITEMS - 1)  # the last rows are those of unknown ids
        slate = dataclasses.replace(slate, users=slate.users.clamp(max=N_USERS - 2))
        artefact = as_artefact(reranker)
        ranked = pd.concat(rank_table(artefact, Source(as_table(slate))))
        scores = self.scores(reranker, slate)
        assert len(ranked) == int(slate.mask.sum())
        for row, (name, found) in enumerate(ranked.groupby("request_id", sort=False)):
            assert name == f"r{row}" and (found["rank"] == range(len(found))).all()
            valid = slate.mask[row]
            by_item = dict(zip(slate.candidates[row, valid].tolist(), scores[row, valid].tolist()))
            got = dict(zip(found["item_id"].str[1:].astype(int), found["rerank_score"]))
            assert got.keys() == by_item.keys()
            assert got == pytest.approx(by_item, abs=1e-4, rel=1e-4)
            assert found["rerank_score"].is_monotonic_decreasing

    def test_save_and_load(self, reranker, slate, tmp_path):
        torch.save(reranker.state_dict(), tmp_path / "model.pt")
        other = build(self.model, catalogue=Catalogue.blank(random_catalogue().shapes()), seed=99, **self.overrides)
        other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        torch.testing.assert_close(self.scores(reranker, slate), self.scores(other, slate), atol=0, rtol=0)

    @pytest.mark.parametrize("interaction", ["affinity", "both"])
    def test_works_under_bf16(self, slate, interaction):
        if self._refuses(interaction):
            return
        model = self.make(history_interaction=interaction)
        exact = self.logits(model, slate)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            rough = self.logits(model, slate)
            self.test_generates_distinct_valid_candidates(model, slate)
        # bf16 has 8 bits of precision.
        torch.testing.assert_close(rough.float()[slate.mask], exact[slate.mask], atol=0.05, rtol=0.05)
        groups, steps = model.train().parameter_groups(), training_steps(model, slate)
        while True:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                step = next(steps, None)
            if step is None:
                break
            assert torch.isfinite(step.loss)
            torch.autograd.backward(step.loss, inputs=[p for g in step.groups for p in groups[g]])
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
