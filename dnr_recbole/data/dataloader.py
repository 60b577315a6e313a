"""Batches of requests. A batch is an index into the table: no loop, no copy per request."""

from __future__ import annotations

from typing import Iterator, List

import torch
from torch import Tensor

from dnr_recbole.data.dataset import RerankDataset
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import DataError


class SlateLoader:
    """Iterates over a :class:`RerankDataset` in :class:`Slate` batches on the CPU.

    The order depends on (seed, epoch) alone, so a run resumed at an epoch sees what it would have seen.

    Shuffled (training), each of ``world_size`` processes gets its own part of the permutation. All have the
    same number of batches, no request is dropped or repeated, and batch sizes differ by at most one, so that
    no gradient comes from a tiny last batch. In order (evaluation), each process gets one contiguous part, in
    batches of ``batch_size``.
    """

    def __init__(
        self,
        dataset: RerankDataset,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} and world_size {world_size} do not fit")
        if len(dataset) < world_size:
            raise DataError(f"{len(dataset)} requests cannot be shared by {world_size} processes; lower nproc")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        largest_part = -(-len(self.dataset) // self.world_size)
        part = largest_part if self.shuffle else len(self.rows())
        return -(-part // self.batch_size)

    def rows(self) -> Tensor:
        """This process's rows of the dataset in the order of this epoch: LongTensor."""
        if not self.shuffle:
            return torch.arange(len(self.dataset)).tensor_split(self.world_size)[self.rank]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator)[self.rank :: self.world_size]

    def batches(self) -> List[Tensor]:
        """The rows of each batch."""
        rows = self.rows()
        if not len(rows):
            return []
        return list(rows.tensor_split(len(self)) if self.shuffle else rows.split(self.batch_size))

    def __iter__(self) -> Iterator[Slate]:
        for rows in self.batches():
            yield self.dataset.slate(rows)
