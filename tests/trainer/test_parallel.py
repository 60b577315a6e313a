"""Every reranker trains in two processes: same weights on both, equal to one process on the joined batch."""

from __future__ import annotations

import dataclasses
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dnr_recbole.data.slate import Slate
from dnr_recbole.registry import list_models
from dnr_recbole.testing import build, random_slate
from dnr_recbole.trainer.steps import as_step, take_step

MODELS = [(m.name, {}) for m in list_models("reranker") if not m.cls.fits_itself] + [
    ("DNR", {"lambda_e": 0}),
    ("DNR", {"lambda_e": 0, "alternation": "reversal"}),
    ("DNR", {"lambda_e": 0, "backbone": "PIER"}),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def sgd(model):
    return {name: torch.optim.SGD(p, lr=0.1) for name, p in model.parameter_groups().items() if p}


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(model, slate: Slate, world_size: int = 1) -> None:
    optimizers, groups = sgd(model), model.parameter_groups()
    for step in map(as_step, model.training_steps(slate)):
        take_step(step, groups, optimizers, world_size=world_size)


def on_both(model) -> list:
    """The weights of both processes."""
    both = [torch.zeros_like(weights(model)) for _ in range(2)]
    dist.all_gather(both, weights(model))
    return both


def worker(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    for name, keys in MODELS:
        model = build(name, **{"history_interaction": "both", **keys}).train()
        model.set_epoch(0)
        start = weights(model)
        torch.manual_seed(rank)  # dropout and samples differ, as they do in training
        train(model, random_slate(seed=rank), world_size=2)
        both = on_both(model)
        if rank == 0:
            moved = bool((both[0] != start).any())
            queue.put((name, torch.equal(*both), moved and bool(torch.isfinite(both[0]).all())))
    # The mean over two halves of equal size is the gradient of the whole batch.
    for name in ("PRM", "DLCM"):
        model = build(name, dropout=0.0).train()
        train(model, random_slate(seed=9, ragged=False).select(slice(4 * rank, 4 * rank + 4)), world_size=2)
        if rank == 0:
            queue.put(weights(model).tolist())
    # A rank whose requests have no positive adds nothing to a list loss, and does not wait for ever.
    model = build("DLCM", dropout=0.0).train()
    slate = random_slate(seed=9)
    if rank == 1:
        slate = dataclasses.replace(slate, labels=torch.zeros_like(slate.labels))
    train(model, slate, world_size=2)
    both = on_both(model)
    if rank == 0:
        queue.put(torch.equal(*both) and bool(torch.isfinite(both[0]).all()))
    dist.barrier()  # the first to leave takes the store with it
    os._exit(0)  # gloo's threads may abort an orderly exit of the interpreter; everything was sent and received


@pytest.fixture(scope="module")
def results():
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(worker, args=(free_port(), queue), nprocs=2, join=False)
    found = [queue.get() for _ in range(len(MODELS) + 3)]
    while not context.join():
        pass
    return found


def test_every_model_keeps_its_replicas_equal(results):
    found = results[:-3]
    assert [name for name, *_ in found] == [name for name, _ in MODELS]
    assert [name for name, equal, _ in found if not equal] == []
    assert [name for name, _, learned in found if not learned] == []


@pytest.mark.parametrize("name, place", [("PRM", -3), ("DLCM", -2)])
def test_two_halves_are_one_batch(results, name, place):
    model = build(name, dropout=0.0).train()
    train(model, random_slate(seed=9, ragged=False))
    torch.testing.assert_close(torch.tensor(results[place]), weights(model), atol=1e-5, rtol=1e-4)


def test_a_process_without_positives_takes_part(results):
    assert results[-1] is True
