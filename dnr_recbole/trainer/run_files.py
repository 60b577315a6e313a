"""Which files a run keeps its checkpoints in, and which process may write them.

A name says what is in it: model, dataset, the keys that determine the numbers, the data, and the number of epochs::

    <model>-<dataset>-<keys>-<data>-e<epochs>.pth        the best model
    <model>-<dataset>-<keys>-<data>-e<epochs>-last.pth   the full state of the last epoch, for `resume`

A process owns the files of its run while it trains; the same command started beside it is refused.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from dataclasses import dataclass, replace
from typing import Iterator, Optional

from dnr_recbole.config import Config
from dnr_recbole.data.dataset import RerankData
from dnr_recbole.errors import CheckpointError
from dnr_recbole.files import atomic_write, sweep
from dnr_recbole.identity import digest, identity
from dnr_recbole.locks import hold


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Attributes:
        folder: ``checkpoint_dir``.
        run: model, dataset and the digest of every key that determines the numbers, but ``epochs``.
        data: digest of the data trained on.
        epochs: how many epochs the run has at most.
    """

    folder: str
    run: str
    data: str
    epochs: int

    @classmethod
    def of(cls, config: Config, data: RerankData) -> RunFiles:
        """The files of a run on ``data``."""
        parts = identity(config, "training")
        parts["training"]["keys"].pop("epochs")
        run = f"{config['model']}-{config['dataset']}-{digest(parts, 10)}"
        return cls(config["checkpoint_dir"], run, data.digest(), config["epochs"])

    @property
    def stem(self) -> str:
        """Path of the files without their ending."""
        return os.path.join(self.folder, f"{self.run}-{self.data[:8]}-e{self.epochs}")

    @property
    def best(self) -> str:
        """The best model so far."""
        return f"{self.stem}.pth"

    @property
    def last(self) -> str:
        """The full state of the last finished epoch."""
        return f"{self.stem}-last.pth"

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Nobody else trains this run during the block.

        Raises:
            CheckpointError: somebody does, or the folder cannot be written.
        """
        try:
            with hold(os.path.join(self.folder, f".{os.path.basename(self.stem)}.lock"), wait=False) as held:
                if not held:
                    raise CheckpointError(
                        f"another process is training this very run ({self.best}): wait for it, or give one of the "
                        "two another checkpoint_dir"
                    )
                sweep(self.folder)
                yield
        except OSError as error:
            if not (error.filename or "").endswith(".lock"):
                raise
            raise CheckpointError(f"checkpoint_dir {self.folder} cannot be written: {error.strerror}") from error

    def to_resume(self) -> Optional[RunFiles]:
        """The run to go on from: this one, or the same with fewer epochs; None if there is none.

        Raises:
            CheckpointError: there is only one that was trained on other data.
        """
        if os.path.exists(self.last):
            return self
        shorter = [epochs for epochs in self._lengths(self.data[:8]) if epochs < self.epochs]
        if shorter:
            return replace(self, epochs=max(shorter))
        if self._lengths("????????"):
            raise CheckpointError(
                f"the checkpoints of {self.run} in {self.folder} belong to other data: the dataset, its files or the "
                "candidates have changed since; start without --resume"
            )
        return None

    def take_best_of(self, other: RunFiles) -> None:
        """Copy the best model of a shorter run.

        Raises:
            CheckpointError: it cannot be copied.
        """
        try:
            with open(other.best, "rb") as source, atomic_write(self.best) as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise CheckpointError(f"cannot copy {other.best} to {self.best}: {error.strerror}") from error

    def _lengths(self, data: str) -> list:
        """Numbers of epochs of the runs like this one on data of that digest (a glob pattern)."""
        pattern = os.path.join(glob.escape(self.folder), f"{glob.escape(self.run)}-{data}-e*-last.pth")
        found = [re.search(r"-e(\d+)-last\.pth$", name) for name in glob.glob(pattern)]
        return [int(match.group(1)) for match in found if match]
