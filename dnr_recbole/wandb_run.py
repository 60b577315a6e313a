"""A run in Weights & Biases (`log_wandb`)."""

from __future__ import annotations

from recbole.utils import WandbLogger

from dnr_recbole.errors import ConfigError


class WandbRun(WandbLogger):
    """One W&B run for each training, a retriever's or a reranker's (its job type), with its files below ``log_dir``.

    RecBole's begins one in every process, in ./wandb, and never ends it: the next training would go on in it. A run
    that the caller has begun is used and left open.
    """

    def setup(self) -> None:
        """Begin the W&B run; nothing in processes other than the first.

        Raises:
            ConfigError: W&B does not begin one, e.g. without a login.
        """
        self.log_wandb = bool(self.log_wandb) and not self.config["rank"]
        self._begun = None
        if not self.log_wandb:
            return
        import wandb

        self._wandb = wandb
        if wandb.run is None:
            kind = "retriever" if self.config.is_retriever else "reranker"
            where = {"project": self.config["wandb_project"], "dir": self.config["log_dir"], "job_type": kind}
            try:
                self._begun = wandb.init(config=self.config.as_dict(), **where)
            except wandb.Error as error:
                raise ConfigError(f"log_wandb=True: {' '.join(str(error).split())}") from error
        self._set_steps()

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._begun is not None:
            self._begun.finish(exit_code=0 if kind is None else 1)
            self._begun = None
