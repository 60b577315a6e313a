"""RecBole's Trainer for rerankers: batches of requests in, metrics over candidate lists out."""

from __future__ import annotations

import math
import uuid
from time import time
from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist
from recbole.trainer.trainer import AbstractTrainer, Trainer
from recbole.utils import set_color
from tqdm import tqdm

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.errors import DnrError
from dnr_recbole.evaluator import CandidateEvaluator
from dnr_recbole.model.abstract_reranker import AbstractReranker, Stage
from dnr_recbole.trackers import Trackers
from dnr_recbole.trainer.memory import reuse_large_blocks
from dnr_recbole.trainer.precision import autocast, use_bf16
from dnr_recbole.trainer.resumable import Resumable
from dnr_recbole.trainer.run_files import RunFiles
from dnr_recbole.trainer.steps import as_step, average_gradients, take_step


class _Replicated(AbstractTrainer):
    """What RecBole's AbstractTrainer does, with processes kept in step by :func:`average_gradients` and not by DDP."""

    def __init__(self, config, model):
        self.config, self.model = config, model
        self.world_size = 1 if config["single_spec"] else dist.get_world_size()
        self._share_state()

    def _share_state(self) -> None:
        """Every process continues with the parameters and buffers of the first one."""
        if self.world_size > 1:
            for tensor in self.model.state_dict().values():
                dist.broadcast(tensor, src=0)


class _NothingToCollect:
    """RecBole's fit hands the training data to a full-ranking collector; candidate lists need none."""

    def data_collect(self, train_data) -> None:
        """Nothing: :class:`CandidateEvaluator` is given what it needs."""


class RerankTrainer(Resumable, Trainer, _Replicated):
    """Trains and evaluates any :class:`~dnr_recbole.model.abstract_reranker.AbstractReranker`.

    RecBole's ``fit`` runs unchanged: early stopping on ``valid_metric``, TensorBoard, logger, callbacks. Two files are
    kept: the best model, and the last epoch's full state, from which ``resume`` continues to the same final numbers.

    Args:
        config: the run's config.
        model: the reranker, on its device.
        catalogue: the one the model was built from; its shapes go into the checkpoint.
        item_counter: interactions per item ``[n_items]`` in training data, for popularity metrics.
        files: where the checkpoints are kept; None writes none.
        warm: whether the model was trained before, so that what precedes the first epoch is done.

    Attributes:
        bf16: whether it computes in bf16; see :func:`~dnr_recbole.trainer.precision.use_bf16`.
    """

    def __init__(
        self, config, model: AbstractReranker, catalogue: Catalogue, item_counter=None,
        files: Optional[RunFiles] = None, warm: bool = False,
    ):  # fmt: skip
        super().__init__(config, model)
        if model.fits_itself:
            self.epochs, self.eval_step = 1, min(self.eval_step, 1)
        self.bf16 = use_bf16(config, model, self.device)
        self.wandblogger = Trackers(config)  # RecBole's name of what it reports to
        self.tensorboard = self.wandblogger.tensorboard
        if self.device.type == "cpu":
            reuse_large_blocks()
        self.catalogue, self.item_counter = catalogue, item_counter
        self.eval_collector = _NothingToCollect()
        self.warm = warm
        self.files, self.saved_model_file = files, files.best if files else None
        # Names this training in its files, so that those of another one of the same run are told apart.
        self.training, self.best_epoch = _agree(uuid.uuid4().hex, self.world_size), None
        self.epoch_seconds: List[float] = []
        self.history: List[Dict[str, float]] = []
        self.evaluation: Optional[CandidateEvaluator] = None
        self._epoch, self._keep_last = self.start_epoch, False
        self._phase = model.phase
        self.best_phase = ""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.world_size == 1 or dist.get_rank() == 0

    def _build_optimizer(self, **kwargs):
        """One optimiser per parameter group; ``<group>_learning_rate`` overrides ``learning_rate``."""
        self.groups = self.model.parameter_groups()
        self.optimizers = {}
        for name, params in self.groups.items():
            key = f"{name}_learning_rate"
            rate = self.config[key] if key in self.config else self.learning_rate
            if params:  # a model-free reranker has nothing to optimise
                decay = f"{name}_weight_decay"
                more = {"weight_decay": self.config[decay]} if decay in self.config else {}
                self.optimizers[name] = super()._build_optimizer(params=params, learning_rate=rate, **more, **kwargs)
        return next(iter(self.optimizers.values()), None)

    # ------------------------------------------------------------------ training

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """The model's ``prepare`` and its pretraining stages, then RecBole's ``fit``.

        Args:
            train_data, valid_data: :class:`~dnr_recbole.data.dataloader.SlateLoader`.
            verbose, saved, show_progress: as in RecBole.
            callback_fn: called with (epoch, valid_score) after each evaluation.

        Returns:
            best validation score and the metrics of that epoch.
        """
        show_progress = show_progress and self.is_main
        self._valid_data = valid_data
        self.logger.info(f"Arithmetic: {'bf16' if self.bf16 else 'fp32'} on {self.device.type}")
        if self.start_epoch == 0 and not self.warm:
            self.model.prepare(train_data)
            self._share_state()
            for stage in self.model.pretraining():
                self._run_stage(stage, train_data, show_progress)
        if self.start_epoch >= self.epochs or self.cur_step > self.stopping_step:
            self.logger.info(f"Nothing left to train: {self.start_epoch} epochs are done")
            return self.best_valid_score, self.best_valid_result

        self._keep_last = saved
        outcome = super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
        self.tensorboard.close()
        self._save_last()
        return outcome

    def _valid_epoch(self, valid_data, show_progress=False):
        if self.model.waits:
            self.cur_step = -1  # 0 after a miss
        if self.model.phase != self._phase:
            self._phase = self.model.phase
            if self.model.selects_anew:
                self.best_valid_score = -math.inf if self.valid_metric_bigger else math.inf
                self.cur_step = 0
        return super()._valid_epoch(valid_data, show_progress)

    def _run_stage(self, stage: Stage, train_data, show_progress: bool) -> None:
        rate = stage.learning_rate or self.learning_rate
        optimizer = super()._build_optimizer(params=stage.parameters, learning_rate=rate)
        for epoch in range(stage.epochs):
            train_data.set_epoch(-1 - epoch)
            self.model.train()
            total, started = 0.0, time()
            for slate in self._progress(train_data, f"{stage.name} {epoch}", show_progress):
                slate = slate.to(self.device)
                with autocast(self.device, self.bf16):
                    loss = stage.loss(slate)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss, inputs=stage.parameters)
                if self.world_size > 1:
                    average_gradients(stage.parameters, self.world_size)
                optimizer.step()
                total += float(loss.detach())
            self.logger.info(
                f"{stage.name} epoch {epoch} [time: {time() - started:.2f}s, loss: {total / len(train_data):.4f}]"
            )
        if stage.finish:
            stage.finish()

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        """One pass over the training requests.

        Returns:
            the mean loss per batch, summed over the steps of a batch. Every term that the model reports is logged and
            written to TensorBoard as ``Loss/<term>``.
        """
        if epoch_idx > self.start_epoch:
            self._save_last()  # the last epoch is complete only now: validated, its patience counted
        self._epoch = epoch_idx
        train_data.set_epoch(epoch_idx)
        self.model.train()
        self.model.set_epoch(epoch_idx)
        sums: Dict[str, torch.Tensor] = {}
        started = time()
        if self.model.fits_itself:
            datasets, size = (train_data.dataset, self._valid_data.dataset), self.config["eval_batch_size"]
            self.model.fit(*(SlateLoader(dataset, size) for dataset in datasets))
            self._share_state()
            train_data = ()
        for slate in self._progress(train_data, f"Train {epoch_idx:>5}", show_progress):
            for name, value in self._train_batch(slate.to(self.device, non_blocking=True), epoch_idx).items():
                sums[name] = sums[name] + value if name in sums else value
        self.epoch_seconds.append(time() - started)
        means = {name: float(value) / len(train_data) for name, value in sums.items()}
        total = means.pop("loss", 0.0)
        self.history.append({"epoch": epoch_idx, "loss": total, **means})
        self.model.after_epoch(means)
        for name, value in means.items():
            self.tensorboard.add_scalar(f"Loss/{name}", value, epoch_idx)
        if means and self.is_main:
            self.logger.info(f"epoch {epoch_idx} terms [" + ", ".join(f"{k}: {v:.4f}" for k, v in means.items()) + "]")
        return total

    def _train_batch(self, slate, epoch_idx: int) -> Dict[str, torch.Tensor]:
        """All optimiser steps of one batch; returns the detached loss and terms."""
        values: Dict[str, torch.Tensor] = {}
        steps = self.model.training_steps(slate)
        while True:
            with autocast(self.device, self.bf16):
                step = next(steps, None)
            if step is None:
                return values
            step = as_step(step)
            if not torch.isfinite(step.loss):
                raise DnrError(
                    f"the training loss became {float(step.loss.detach())} in epoch {epoch_idx}: lower learning_rate, "
                    "set clip_grad_norm, or use precision=fp32"
                )
            if any(name in self.optimizers for name in step.groups):
                take_step(step, self.groups, self.optimizers, self.clip_grad_norm, self.world_size)
            for name, value in {"loss": step.loss, **step.terms}.items():
                value = value.detach()
                values[name] = values[name] + value if name in values else value

    def _progress(self, data, title: str, show: bool):
        return tqdm(data, total=len(data), ncols=100, desc=set_color(title, "pink"), leave=False) if show else data

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Metrics of the model over a loader's candidate lists.

        With several processes each scores its share; the raw rows are gathered, so every process returns exactly the
        numbers of a single one.

        Returns:
            OrderedDict metric → value; per-request values stay available in ``self.evaluation``.
        """
        if eval_data is None:
            return None
        if load_best_model:
            self._load_best(model_file)
        self.model.eval()
        evaluator = CandidateEvaluator(self.config, self.catalogue.n_items, self.item_counter)
        dataset = eval_data.dataset
        batches = self._progress(eval_data, "Evaluate   ", show_progress and self.is_main)
        for rows, slate in zip(eval_data.batches(), batches):
            with autocast(self.device, self.bf16):
                scores = self.model.predict(slate.without_labels().to(self.device))
            evaluator.add_slate(scores.float(), slate, dataset.n_positives[rows], rows)
        if self.world_size > 1:
            states: List[Any] = [None] * self.world_size
            dist.all_gather_object(states, evaluator.state())
            evaluator.merge(states)
        self.evaluation, result = evaluator, evaluator.result()
        self.wandblogger.log_eval_metrics(result)
        return result

    @torch.no_grad()
    def oracle(self, data: SlateLoader) -> Dict[str, float]:
        """Means of the model's own :meth:`oracle` over all requests of a loader."""
        self.model.eval()
        found: Dict[str, List[torch.Tensor]] = {}
        for slate in data:
            with autocast(self.device, self.bf16):
                shares = self.model.oracle(slate.to(self.device))
            if not shares:
                return {}
            for name, share in shares.items():
                found.setdefault(name, []).append(share.float())
        return {name: float(torch.cat(shares).nanmean()) for name, shares in found.items()}


def _agree(value: Any, world_size: int) -> Any:
    """The value of rank 0, in every process."""
    if world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
