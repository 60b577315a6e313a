"""What any reranker must satisfy, as a test class that a model outside this package can inherit too.

::

    from dnr_recbole.testing import RerankerContract
    from my_package import MyReranker

    class TestMyReranker(RerankerContract):
        model = MyReranker

pytest then runs every test of the contract on ``MyReranker``, on the device that the environment variable
``DNR_TEST_DEVICE`` names (default: cpu).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Dict, Iterator, Optional, Union

import pandas as pd
import pytest
import torch

from dnr_recbole.artefact import Artefact
from dnr_recbole.config import Config
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import MISSING, Slate
from dnr_recbole.errors import ConfigError
from dnr_recbole.model.abstract_reranker import AbstractReranker, Step
from dnr_recbole.model.inputs.score_fusion import METHODS, ScoreFusion
from dnr_recbole.order_trace import OrderTrace
from dnr_recbole.ranking import rank_table
from dnr_recbole.registry import get_reranker
from dnr_recbole.requestlog.decoding import Columns
from dnr_recbole.requestlog.preprocessor import Preprocessor, Vocabulary
from dnr_recbole.requestlog.reading import Source
from dnr_recbole.retriever.calibration import Calibration
from dnr_recbole.trainer.steps import as_step, take_step

N_USERS, N_ITEMS = 12, 60
DEVICE = torch.device(os.environ.get("DNR_TEST_DEVICE", "cpu"))


def random_catalogue(seed: int = 0, n_users: int = N_USERS, n_items: int = N_ITEMS, factors: int = 6) -> Catalogue:
    """A catalogue of random side tables with zero padding rows."""
    g = torch.Generator().manual_seed(seed)
    table = lambda n, f: torch.randn(n, f, generator=g) * (torch.arange(n) > 0).unsqueeze(1)  # noqa: E731
    unit = lambda t: torch.nn.functional.normalize(t, dim=-1)  # noqa: E731
    return Catalogue(
        n_users=n_users,
        n_items=n_items,
        item_popularity=torch.rand(n_items, generator=g) * (torch.arange(n_items) > 0),
        item_features=table(n_items, 3),
        user_features=table(n_users, 2),
        item_factors=table(n_items, factors),
        user_factors=table(n_users, factors),
        spaces={  # one with a table for each role and two folds, as in training within the retriever's part
            "factors": unit(table(n_items, factors)).view(1, 1, n_items, factors).repeat(1, 3, 1, 1),
            "covisit": torch.stack([unit(table(n_items, 4)) for _ in range(6)]).view(2, 3, n_items, 4),
        },
    )


def random_slate(
    seed: int = 0,
    batch: int = 8,
    n: int = 12,
    history: int = 7,
    ragged: bool = True,
    n_items: int = N_ITEMS,
    short: bool = False,
) -> Slate:
    """Random requests with distinct candidates and distinct scores.

    If ``ragged``, requests have between n / 2 and n candidates and the first one no history; if ``short`` as well, the
    last two have 1 and 2 candidates. The same numbers on every device.
    """
    g = torch.Generator().manual_seed(seed)
    candidates = torch.stack([torch.randperm(n_items - 1, generator=g)[:n] + 1 for _ in range(batch)])
    mask = torch.ones(batch, n, dtype=torch.bool)
    lengths = torch.randint(1, history + 1, (batch,), generator=g)
    if ragged:
        keep = torch.randint(max(2, n // 2), n + 1, (batch,), generator=g)
        if short:
            keep[-2:] = torch.tensor([1, 2])
        mask = torch.arange(n) < keep.unsqueeze(1)
        lengths[0] = 0
    history_mask = torch.arange(history) < lengths.unsqueeze(1)
    labels = (torch.rand(batch, n, generator=g) < 0.3).float() * mask
    labels[:, 0] = 1.0
    scores = torch.stack([(torch.randperm(n, generator=g) + 0.5) / n for _ in range(batch)])
    order = torch.stack([torch.randperm(n, generator=g) for _ in range(batch)])
    return (
        Slate(
            users=torch.randint(1, N_USERS, (batch,), generator=g),
            history=torch.randint(1, n_items, (batch, history), generator=g) * history_mask,
            history_mask=history_mask,
            candidates=candidates * mask,
            mask=mask,
            scores=scores * mask,
            labels=labels,
        )
        .shuffled(order)
        .to(DEVICE)
    )


def two_scores(slate: Slate) -> Slate:
    """The slate with a second score; some candidates lack the first, others the second."""
    second = seeded(11, *slate.mask.shape)
    scores = torch.stack([slate.scores, second], dim=-1)
    lacking = seeded(12, *scores.shape) < 0.2
    lacking[..., 1] &= ~lacking[..., 0]
    scores = torch.where(lacking, torch.full_like(scores, MISSING), scores)
    return dataclasses.replace(slate, scores=scores * slate.mask.unsqueeze(-1))


def as_artefact(model: AbstractReranker) -> Artefact:
    """A model of :func:`build` as what ranks tables of ids u1, u2 … and i1, i2 …."""
    config = model_config(type(model))
    preprocessor = Preprocessor(
        columns=Columns(["score"], []),
        users=Vocabulary([f"u{number}" for number in range(1, N_USERS - 1)]),
        items=Vocabulary([f"i{number}" for number in range(1, N_ITEMS - 1)]),
        calibrations=[Calibration()],
        normalization="none",
        n_candidates=12,
        history_length=7,
    )
    return Artefact(model, config, random_catalogue().shapes(), preprocessor)


def as_table(slate: Slate) -> pd.DataFrame:
    """Requests in the list form, as a user would write them."""
    rows = []
    for row in range(len(slate)):
        valid, known = slate.mask[row].cpu(), slate.history_mask[row].cpu()
        rows.append({
            "request_id": f"r{row}",
            "user_id": f"u{int(slate.users[row])}",
            "history": [f"i{item}" for item in slate.history[row].cpu()[known].tolist()],
            "item_id": [f"i{item}" for item in slate.candidates[row].cpu()[valid].tolist()],
            "score": slate.scores[row].cpu()[valid].double().tolist(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def model_config(model, **overrides: Any) -> Config:
    """The config that a model would get by default, shrunk to test size (d = 16, K = 3), with ``overrides`` on top."""
    small: Dict[str, Any] = dict(
        embedding_size=16, slate_size=3, n_candidates=12, history_length=7, use_gpu=False, precision="fp32",
        topk=[1, 3], valid_metric="NDCG@3", train_batch_size=8, show_progress=False,
    )  # fmt: skip
    return Config(model=model, dataset="ml-100k", config_dict={**small, **overrides})


def build(
    model, config: Config = None, catalogue: Catalogue = None, seed: int = 0, **overrides: Any
) -> AbstractReranker:
    """A freshly initialised reranker of test size in eval mode, with the same weights on every device."""
    cls = get_reranker(model) if isinstance(model, str) else model
    torch.manual_seed(seed)
    return cls(config or model_config(model, **overrides), catalogue or random_catalogue()).to(DEVICE).eval()


def seeded(seed: int, *shape: int) -> torch.Tensor:
    """Uniform numbers that are the same on every device."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def training_steps(model: AbstractReranker, slate: Slate) -> Iterator[Step]:
    """The model's training steps as :class:`Step`, whatever it yields."""
    return map(as_step, model.training_steps(slate))


def train_one_batch(model: AbstractReranker, slate: Slate, optimizers: Dict[str, torch.optim.Optimizer]) -> None:
    """All optimiser steps of one batch, as the trainer takes them."""
    groups = model.parameter_groups()
    for step in training_steps(model, slate):
        take_step(step, groups, optimizers)


class RerankerContract:
    """Inherit, set ``model`` (a class or a registered name), and run with pytest.

    Attributes:
        model: the reranker under test.
        overrides: config keys to change for it.
        overfit_epochs, overfit_learning_rate: budget of the overfitting test.
        steep_slope: of ``score_fusion: residual``, so large that the model's other logits do not count, yet small
            enough for a probability to tell the best candidates apart where a model needs that.
        steep_overrides: config keys under which a steep slope leaves the incoming order to the list that is shown, e.g.
            to switch a trade-off off; None = a rule of the model's own makes the list whatever the logits.
    """

    model: Union[str, type]
    overrides: Dict[str, Any] = {}
    overfit_epochs = 150
    overfit_learning_rate = 0.01
    steep_slope = 20.0
    steep_overrides: Optional[Dict[str, Any]] = {}
    atol = 1e-5

    # ------------------------------------------------------------------ fixtures

    @pytest.fixture(autouse=True)
    def exact_arithmetic(self, monkeypatch):
        """Convolutions and recurrent layers run in TF32 on GPUs by default, too coarse for a test of equality."""
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    @pytest.fixture(autouse=True)
    def needed_package(self):
        """A model whose optional package is missing is skipped."""
        if self.cls.needs:
            pytest.importorskip(self.cls.needs[0])

    @pytest.fixture
    def reranker(self) -> AbstractReranker:
        return self.make()

    @pytest.fixture
    def slate(self) -> Slate:
        return random_slate(short=True)

    def make(self, **overrides: Any) -> AbstractReranker:
        """The model under test, freshly initialised."""
        model = build(self.model, **{**self.overrides, **overrides})
        if model.fits_itself:
            model.fit([random_slate(seed) for seed in range(4)], [random_slate(4)])
        return model

    @property
    def cls(self) -> type:
        """The class of the model under test."""
        return get_reranker(self.model) if isinstance(self.model, str) else self.model

    def _refuses(self, interaction: str) -> bool:
        return interaction not in self.cls.interactions

    def scores(self, model: AbstractReranker, slate: Slate) -> torch.Tensor:
        """Final scores, in eval mode and without labels."""
        with torch.no_grad():
            return model.eval().predict(slate.without_labels())

    def logits(self, model: AbstractReranker, slate: Slate) -> torch.Tensor:
        """Logits, in eval mode and without labels; final scores may be mere ranks and hide small differences."""
        with torch.no_grad():
            return model.eval().forward(slate.without_labels())

    def same_scores(self, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> None:
        """Assert equality of two score matrices at valid candidates."""
        assert torch.isfinite(a[mask]).all()
        torch.testing.assert_close(a[mask], b[mask], atol=self.atol, rtol=1e-4)

    def same_results(self, model: AbstractReranker, a: Slate, b: Slate) -> None:
        """Assert that two versions of the same requests get the same final scores and logits."""
        for outcome in (self.scores, self.logits):
            self.same_scores(outcome(model, a), outcome(model, b), a.mask)

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

    @staticmethod
    def with_label_scores(slate: Slate) -> Slate:
        """The slate under synthetic scores as DNR makes them: label and noise in equal parts."""
        noise = torch.rand(slate.scores.shape, generator=torch.Generator().manual_seed(6)).to(slate.scores)
        return slate.with_scores((slate.labels + noise) / 2 * slate.mask)

    @staticmethod
    def _epochs_of_steps(model: AbstractReranker, slate: Slate) -> Iterator[Step]:
        """The steps of one batch in the first and in a late epoch; nothing is updated."""
        for epoch in (0, 10**6):
            model.set_epoch(epoch)
            yield from training_steps(model, slate)

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

    # ------------------------------------------------------------------ training

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

    def test_no_list_is_better_than_the_oracle(self, reranker, slate):
        """``oracle``, of a model that chooses among few lists, bounds what is shown."""
        shown, k = reranker.generate(slate.without_labels()), reranker.slate_size
        reached = (slate.labels.gather(1, shown.clamp(min=0)) * (shown >= 0)).sum(1)
        possible = (slate.labels * slate.mask).sum(1).clamp(max=k)
        for name, share in reranker.oracle(slate).items():
            assert share.shape == possible.shape and torch.equal(share.isnan(), possible == 0), name
            some = possible > 0
            assert (reached[some] / possible[some] <= share[some] + 1e-6).all() and (share[some] <= 1).all(), name

    # ------------------------------------------------------------------ engineering

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

    # ------------------------------------------------------------------ helpers

    @staticmethod
    def _rank_free(a: torch.Tensor, b: torch.Tensor):
        """Scores as ranks where a model emits n − rank, since adding padding adds to n."""
        if torch.equal(a[a > -1e8], a[a > -1e8].round()):
            to_rank = lambda t: t.argsort(1, descending=True).argsort(1).float()  # noqa: E731
            return to_rank(a), to_rank(b)
        return a, b
