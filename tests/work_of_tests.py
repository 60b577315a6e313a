"""What the processes of test_ends.py do; a module of its own, so that they import little."""

import os

import torch.distributed as dist

from dnr_recbole.errors import DataError


def work(rank: int, what: str):
    if what == "answer":
        return {"rank": rank}
    if rank == 1 and what == "bug":
        raise ValueError("the first line\nand more")
    if rank == 1 and what == "data":
        raise DataError("the file is damaged")
    if rank == 1 and what == "exit":
        os._exit(7)
    dist.barrier()  # the others wait for what does not come
