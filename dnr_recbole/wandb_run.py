"""A run's place in Weights & Biases (`log_wandb`): one W&B run for each run, its files below ``log_dir``."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Optional

from recbole.utils import WandbLogger

_begun: Optional[Any] = None  # the W&B run that this module began; one that the host has begun is left open


class WandbRun(WandbLogger):
    """RecBole's, which begins a run in every process, in ./wandb, never ends it and mixes stage 1 into stage 2."""

    def setup(self) -> None:
        """Begin the W&B run, or go on with the one of stage 1; silent in all processes but the first."""
        global _begun
        if self.config["rank"]:
            self.log_wandb = False
        if not self.log_wandb:
            return
        import wandb

        self._wandb = wandb
        if wandb.run is None:
            where = {"project": self.config["wandb_project"], "dir": self.config["log_dir"]}
            _begun = wandb.init(config=self.config.as_dict(), **where)
        for part in ("train", "valid"):
            wandb.define_metric(f"{self._prefix}{part}/*", step_metric=f"{part}_step")

    @property
    def _prefix(self) -> str:
        return "retriever/" if self.config.is_retriever else ""

    def _add_head_to_metrics(self, metrics, head):
        return super()._add_head_to_metrics(metrics, f"{self._prefix}{head}")


@contextlib.contextmanager
def wandb_ends() -> Iterator[None]:
    """After the block, or a function decorated with ``@wandb_ends()``, the W&B run that it or stage 1 began is ended.

    So all is written when a worker leaves without ceremony, and the next run of this process gets its own.
    """
    global _begun
    try:
        yield
    finally:
        if _begun is not None:
            _begun.finish()
            _begun = None
