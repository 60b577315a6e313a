"""The model under test: how it is made, its outcomes, and when two outcomes are the same."""

from __future__ import annotations

from typing import Any, Dict, Iterator, Optional, Tuple, Type, Union

import pytest
import torch

from dnr_recbole.data.slate import Slate
from dnr_recbole.model.abstract_reranker import AbstractReranker, Step
from dnr_recbole.registry import get_reranker
from dnr_recbole.testing.inputs import build, random_slate, training_steps


class ModelUnderTest:
    """What all parts of the contract share; :class:`~dnr_recbole.testing.RerankerContract` explains the attributes."""

    model: Union[str, Type[AbstractReranker]]
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
    def cls(self) -> Type[AbstractReranker]:
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

    @staticmethod
    def _rank_free(a: torch.Tensor, b: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Scores as ranks where a model emits n − rank, since adding padding adds to n."""
        if torch.equal(a[a > -1e8], a[a > -1e8].round()):
            to_rank = lambda t: t.argsort(1, descending=True).argsort(1).float()  # noqa: E731
            return to_rank(a), to_rank(b)
        return a, b
