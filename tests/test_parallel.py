"""Every reranker trains in two processes: same weights on both, equal to one process on the joined batch."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dnr_recbole.registry import list_models
from dnr_recbole.testing import build, random_slate
from dnr_recbole.trainer.steps import as_step, take_step

MODELS = [m.name for m in list_models("reranker")]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def sgd(model):
    return {name: torch.optim.SGD(p, lr=0.1) for name, p in model.parameter_groups().items() if p}


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def worker(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    for name in MODELS:
        model = build(name).train()
        optimizers, groups = sgd(model), model.parameter_groups()
        torch.manual_seed(rank)  # dropout and samples differ, as they do in training
        for step in map(as_step, model.training_steps(random_slate(seed=rank))):
            take_step(step, groups, optimizers, world_size=2)
        both = [torch.zeros_like(weights(model)) for _ in range(2)]
        dist.all_gather(both, weights(model))
        if rank == 0:
            queue.put((name, torch.equal(*both), bool(torch.isfinite(both[0]).all())))
    # The mean over two halves of equal size is the gradient of the whole batch.
    model = build("PRM", dropout=0.0).train()
    half = random_slate(seed=9, ragged=False).select(slice(4 * rank, 4 * rank + 4))
    for step in map(as_step, model.training_steps(half)):
        take_step(step, model.parameter_groups(), sgd(model), world_size=2)
    if rank == 0:
        queue.put(weights(model).tolist())
    dist.barrier()  # the first to leave takes the store with it
    os._exit(0)  # gloo's threads may abort an orderly exit of the interpreter; everything was sent and received


@pytest.fixture(scope="module")
def results():
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(worker, args=(free_port(), queue), nprocs=2, join=False)
    found = [queue.get() for _ in range(len(MODELS) + 1)]
    while not context.join():
        pass
    return found


def test_every_model_keeps_its_replicas_equal(results):
    assert [name for name, *_ in results[:-1]] == MODELS
    assert [name for name, equal, _ in results[:-1] if not equal] == []
    assert [name for name, _, finite in results[:-1] if not finite] == []


def test_two_halves_are_one_batch(results):
    model = build("PRM", dropout=0.0).train()
    for step in map(as_step, model.training_steps(random_slate(seed=9, ragged=False))):
        take_step(step, model.parameter_groups(), sgd(model))
    torch.testing.assert_close(torch.tensor(results[-1]), weights(model), atol=1e-5, rtol=1e-4)
