"""The trainer's own decisions: when it stops, which epoch it keeps, what a step moves and how far, which arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.errors import DnrError
from dnr_recbole.model.abstract_reranker import AbstractReranker, Stage, Step
from dnr_recbole.quick_start import prepare
from dnr_recbole.testing import random_catalogue
from dnr_recbole.trainer import RerankTrainer
from dnr_recbole.trainer.precision import use_bf16
from dnr_recbole.trainer.steps import take_step

WORLD = {
    "dataset": "synthetic", "synthetic_users": 30, "synthetic_items": 40, "synthetic_requests_per_user": 4,
    "n_candidates": 10, "embedding_size": 8, "train_batch_size": 16, "use_gpu": False, "precision": "fp32", "topk": [3],
    "show_progress": False, "log_dir": None, "tensorboard_dir": None, "state": "ERROR", "metrics": ["NDCG"],
    "valid_metric": "NDCG@3", "slate_size": 3, "history_interaction": "none", "weight_decay": 0.0,
}  # fmt: skip


class Scripted(AbstractReranker):
    """Two groups of parameters, and a validation score that follows a script."""

    paper = "none"

    def __init__(self, config, catalogue, script=()):
        super().__init__(config, catalogue)
        self.head, self.other = nn.Linear(self.dim, 1), nn.Linear(self.dim, 1)
        self.script, self.epoch, self.waiting, self.part, self.calls = list(script), 0, False, "", []

    def score(self, context, slate, x):
        return self.head(context.candidates).squeeze(-1) + self.other(context.candidates).squeeze(-1)

    def parameter_groups(self):
        return {"reranker": list(self.head.parameters()), "other": list(self.other.parameters())}

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.calls.append(f"epoch {epoch}")

    @property
    def waits(self):
        return self.waiting

    @property
    def phase(self):
        return self.part


class ScriptedTrainer(RerankTrainer):
    """Reads the metrics of an epoch from the model's script."""

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        return {"ndcg@3": self.model.script[self.model.epoch]}


@pytest.fixture(scope="module")
def data():
    return prepare(Config(config_dict={**WORLD, "model": "PRM"})).data


def make(data, script=(), trainer=ScriptedTrainer, model=Scripted, **keys):
    config = Config(config_dict={**WORLD, "model": "PRM", **keys})
    torch.manual_seed(0)
    return trainer(config, model(config, data.catalogue, script), data.catalogue, data.catalogue.item_counts)


def fit(trainer, data, callback=None):
    train = SlateLoader(data.train, 16, shuffle=True)
    return trainer.fit(train, SlateLoader(data.valid, 64), verbose=False, saved=False, callback_fn=callback)


@pytest.mark.parametrize(
    "script, patience, epochs, best",
    [
        ([0.5, 0.4, 0.3, 0.2, 0.9], 2, 4, 0.5),  # the third miss in a row ends it
        ([0.5, 0.4, 0.6, 0.5, 0.55, 0.5], 2, 6, 0.6),  # a new best starts the count again
        ([0.1, 0.2, 0.3], 0, 3, 0.3),  # no miss
        ([0.5, 0.5, 0.4, 0.9], 0, 3, 0.5),  # a tie is a new best, as in RecBole
    ],
)
def test_patience_counts_epochs_without_a_new_best(data, script, patience, epochs, best):
    trainer = make(data, script, stopping_step=patience, epochs=len(script))
    score, result = fit(trainer, data)
    assert (score, result["ndcg@3"]) == (best, best)
    assert len(trainer.history) == epochs == len(trainer.epoch_seconds)


def test_a_model_that_waits_is_not_stopped_until_its_later_phase_has_begun(data):
    trainer = make(data, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], stopping_step=1, epochs=7)
    trainer.model.waiting = True

    def begin(epoch, score):
        trainer.model.waiting = epoch < 3

    fit(trainer, data, begin)
    assert len(trainer.history) == 6, "waiting in epochs 0 to 3, then two misses"


@pytest.mark.parametrize("anew, best", [(False, 0.9), (True, 0.4)])
def test_a_later_phase_may_choose_its_best_epoch_anew(data, anew, best):
    trainer = make(data, [0.9, 0.3, 0.4, 0.2], stopping_step=9, epochs=4)
    trainer.model.selects_anew = anew

    def switch(epoch, score):
        trainer.model.part = "learned"

    score, _ = fit(trainer, data, switch)
    assert score == best


def test_each_group_has_its_own_optimiser_and_learning_rate(data):
    trainer = make(data, learning_rate=0.01, learner="sgd")
    assert {name: o.param_groups[0]["lr"] for name, o in trainer.optimizers.items()} == {
        "reranker": 0.01,
        "other": 0.01,
    }

    class WithRates(Config):
        def __contains__(self, key):
            return key in ("other_learning_rate", "other_weight_decay") or super().__contains__(key)

        def __getitem__(self, key):
            return {"other_learning_rate": 0.5, "other_weight_decay": 0.25}.get(key) or super().__getitem__(key)

    config = WithRates(config_dict={**WORLD, "model": "PRM", "learning_rate": 0.01, "learner": "sgd"})
    trainer = RerankTrainer(config, Scripted(config, data.catalogue), data.catalogue, data.catalogue.item_counts)
    groups = {name: o.param_groups[0] for name, o in trainer.optimizers.items()}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "reranker": (0.01, 0.0), "other": (0.5, 0.25),
    }  # fmt: skip


def test_a_step_moves_the_groups_that_it_names_alone(data):
    trainer = make(data, learning_rate=0.1, learner="sgd")
    model, slate = trainer.model, data.train.slate(slice(0, 16))
    before = {name: [p.detach().clone() for p in group] for name, group in trainer.groups.items()}
    take_step(Step(model.calculate_loss(slate), ("other",)), trainer.groups, trainer.optimizers)
    moved = {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], group)) for name, group in trainer.groups.items()
    }
    assert moved == {"reranker": False, "other": True}


def test_gradients_are_clipped_over_all_groups_of_a_step_together(data):
    trainer = make(data, learning_rate=1.0, learner="sgd")
    model, slate = trainer.model, data.train.slate(slice(0, 16))
    both = [p for group in trainer.groups.values() for p in group]
    before = torch.cat([p.detach().flatten().clone() for p in both])
    step = Step(1000 * model.calculate_loss(slate), ("reranker", "other"))
    take_step(step, trainer.groups, trainer.optimizers, {"max_norm": 0.5})
    change = torch.cat([p.detach().flatten() for p in both]) - before
    assert float(change.norm()) == pytest.approx(0.5, rel=1e-3)


def test_a_batch_that_teaches_nothing_moves_nothing_by_its_loss(data):
    trainer = make(data, learning_rate=0.1, learner="sgd")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    take_step(Step(torch.zeros(())), trainer.groups, trainer.optimizers)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_a_loss_that_is_no_number_ends_the_training_in_words(data):
    class Explodes(Scripted):
        def loss(self, context, slate, x):
            return super().loss(context, slate, x) * torch.inf

    with pytest.raises(DnrError, match=r"loss became inf in epoch 0: lower learning_rate"):
        fit(make(data, [0.1], model=Explodes, epochs=1), data)


def test_what_precedes_the_first_epoch_comes_once_and_in_order(data):
    class Staged(Scripted):
        def prepare(self, train):
            self.calls.append("prepare")

        def pretraining(self):
            self.calls.append("pretraining")
            return [Stage("first", 2, self._stage, list(self.other.parameters()), finish=self._finish)]

        def _stage(self, slate):
            if self.calls[-1] != "stage":
                self.calls.append("stage")
            return self.calculate_loss(slate)

        def _finish(self):
            self.calls.append("finish")

    trainer = make(data, [0.1, 0.2], model=Staged, epochs=2, stopping_step=9)
    head = trainer.model.head.weight.detach().clone()

    def watch(epoch):
        if epoch == 0:
            assert torch.equal(head, trainer.model.head.weight), "a stage trains its own parameters only"
        Scripted.set_epoch(trainer.model, epoch)

    trainer.model.set_epoch = watch
    fit(trainer, data)
    assert trainer.model.calls == ["prepare", "pretraining", "stage", "finish", "epoch 0", "epoch 1"]
    warm = make(data, [0.1], model=Staged, epochs=1)
    warm.warm = True
    fit(warm, data)
    assert warm.model.calls == ["epoch 0"]


@pytest.mark.parametrize(
    "precision, fast, size, expected",
    [("fp32", True, 2**20, False), ("bf16", False, 1, True), ("auto", False, 2**20, False),
     ("auto", True, 2**14, True), ("auto", True, 2**14 - 8, False)],
)  # fmt: skip
def test_precision_auto_is_bf16_where_it_is_faster(monkeypatch, precision, fast, size, expected):
    monkeypatch.setattr("dnr_recbole.trainer.precision.cpu_has_fast_bf16", lambda: fast)
    config = {"precision": precision, "train_batch_size": size // 8 or 1, "embedding_size": 8}
    model = Scripted(Config(config_dict={**WORLD, "model": "PRM"}), random_catalogue())
    assert use_bf16(config, model, torch.device("cpu")) is expected


def test_evaluation_leaves_the_model_as_it_is_and_gives_the_metrics_of_its_scores(data):
    trainer = make(data, trainer=RerankTrainer)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    result = trainer.evaluate(SlateLoader(data.test, 7), load_best_model=False)
    again = trainer.evaluate(SlateLoader(data.test, 1000), load_best_model=False)
    assert result == again, "however the requests are batched"
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    slate = data.test.slate(slice(None))
    with torch.no_grad():
        order = trainer.model.predict(slate.without_labels()).argsort(1, descending=True)[:, :3]
    gains = slate.labels.gather(1, order) / torch.log2(torch.arange(3) + 2.0)
    ideal = (1 / torch.log2(torch.arange(3) + 2.0)).cumsum(0)
    counts = data.test.n_positives.clamp(max=3)
    expected = [float(g.sum() / ideal[int(c) - 1]) for g, c in zip(gains, counts) if c > 0]
    assert result["ndcg@3"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
