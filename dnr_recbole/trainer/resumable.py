"""What is kept of a training, and how it goes on."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Dict, List, Optional

import torch.distributed as dist
from recbole.utils import dict2str, set_color

from dnr_recbole.errors import CheckpointError
from dnr_recbole.trainer import checkpoint
from dnr_recbole.trainer.run_files import RunFiles


class Resumable:
    """The part of :class:`~dnr_recbole.trainer.rerank_trainer.RerankTrainer` that writes and reads its two files: the
    best model, and the last epoch's full state."""

    # of the trainer
    config: Any
    model: Any
    catalogue: Any
    device: Any
    logger: Any
    optimizers: Dict[str, Any]
    files: Any
    saved_model_file: Any
    world_size: int
    is_main: Any
    _epoch: int
    _keep_last: bool

    def _meta(self, epoch: int) -> Dict[str, Any]:
        return {
            "model": type(self.model).__name__,
            "config": self.config.as_dict(),
            "catalogue": self.catalogue.shapes(),
            "training": self.training,
            "run": self.files.run,
            "data": self.files.data,
            "epoch": epoch,
            "best_epoch": self.best_epoch,
            "phase": self.model.phase,
            "best_phase": self.best_phase,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": {k: float(v) for k, v in (self.best_valid_result or {}).items()},
            "epoch_seconds": self.epoch_seconds,
            "history": self.history,
        }

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        """The best model so far (RecBole calls this when validation improves)."""
        self.best_epoch, self.best_phase = epoch, self.model.phase
        if not self.is_main:
            return
        path = kwargs.pop("saved_model_file", self.saved_model_file)
        checkpoint.save(path, self._meta(epoch), state_dict=self.model.state_dict())
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {path}")

    def _save_last(self) -> None:
        """Everything that the next epoch depends on: weights, optimisers, patience and random generators."""
        if not self._keep_last:
            return
        rng = checkpoint.rng_state()
        if self.world_size > 1:
            states: List[Any] = [None] * self.world_size
            dist.all_gather_object(states, rng)
        else:
            states = [rng]
        if self.is_main:
            checkpoint.save(
                self.files.last,
                self._meta(self._epoch),
                state_dict=self.model.state_dict(),
                optimizers={name: o.state_dict() for name, o in self.optimizers.items()},
                rng=states,
            )

    def _load_best(self, path: Optional[str]) -> None:
        """Put the best weights of this training, or those of the file ``path``, into the model."""
        content = checkpoint.load(path or self.saved_model_file, self.device)
        if path is None and content["meta"].training != self.training:
            raise CheckpointError(f"{self.saved_model_file} was overwritten by another training: start again")
        checkpoint.load_state(self.model, content, path or self.saved_model_file)
        self.logger.info(f"Loading model structure and parameters from {path or self.saved_model_file}")

    def resume_checkpoint(self) -> bool:
        """Continue after the last finished epoch of an interrupted run, or of the same run with fewer epochs.

        Returns:
            whether there was one; without it training starts from scratch.

        Raises:
            CheckpointError: a file is damaged, or belongs to other data or another number of processes.
        """
        found = self.files.to_resume()
        if found is None:
            self.logger.info(f"No checkpoint to resume at {self.files.last}: training starts from scratch")
            return False
        foreign = found != self.files and self.is_main
        with found.owned() if foreign else contextlib.nullcontext():
            return self._continue(found)

    def _continue(self, found: RunFiles) -> bool:
        # To the CPU: the optimiser moves its moments itself, and its step counters must stay there.
        content = checkpoint.load(found.last, "cpu")
        meta: checkpoint.Meta = content["meta"]
        best = checkpoint.load(found.best, "cpu")["meta"] if os.path.exists(found.best) else None
        for what, own, theirs in (("data", self.files.data, meta.data), ("keys", self.files.run, meta.run)):
            if own != theirs:
                raise CheckpointError(f"{found.last} belongs to a run with other {what}: start without --resume")
        # A process may have died between the new best and the new last file of a later training: the pair is then none.
        if best is None or best.training != meta.training or best.epoch not in (meta.best_epoch, meta.epoch + 1):
            self.logger.warning(f"{found.last} and {found.best} are not of one training: starting from scratch")
            return False
        checkpoint.load_state(self.model, content, found.last)
        try:
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(content["optimizers"][name])
            states = content["rng"]
            if len(states) != self.world_size:
                raise CheckpointError(f"{found.last} was written with nproc={len(states)}: start without --resume")
            checkpoint.set_rng_state(states[0 if self.world_size == 1 else dist.get_rank()])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{found.last} cannot be resumed ({reason}): start again without --resume") from error
        if found != self.files and self.is_main:
            self.files.take_best_of(found)
        self.training, self.best_epoch = meta.training, meta.best_epoch
        self._phase, self.best_phase = meta.phase, meta.best_phase
        self.start_epoch, self.cur_step = meta.epoch + 1, meta.cur_step
        self.best_valid_score, self.best_valid_result = meta.best_valid_score, meta.best_valid_result
        self.epoch_seconds, self.history = list(meta.epoch_seconds), list(meta.history)
        self.logger.info(f"Checkpoint loaded. Resume training from epoch {self.start_epoch}")
        if self.best_valid_result:
            self.logger.info(f"best valid so far: {dict2str(self.best_valid_result)}")
        return True
