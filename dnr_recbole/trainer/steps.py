"""One optimiser step, in one process or in several."""

from __future__ import annotations

from typing import Dict, List, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from dnr_recbole.model.abstract_reranker import Step


def as_step(step: Union[Tensor, Step]) -> Step:
    """A bare loss is a step of the parameter group "reranker"."""
    return step if isinstance(step, Step) else Step(step)


def take_step(
    step: Step,
    groups: Dict[str, List[nn.Parameter]],
    optimizers: Dict[str, torch.optim.Optimizer],
    clip_grad_norm: Optional[dict] = None,
    world_size: int = 1,
) -> None:
    """Backward and update of exactly the groups that ``step`` names.

    Gradients are accumulated in these groups' parameters only, so the groups not named stay fixed even though
    the loss runs through them (θ while φ learns, and the reverse).
    """
    parameters = [p for name in step.groups for p in groups[name]]
    for parameter in parameters:
        parameter.grad = None
    if step.loss.requires_grad:  # a batch without any signal, e.g. no positive, has nothing to teach
        torch.autograd.backward(step.loss, inputs=parameters)
    if world_size > 1:
        average_gradients(parameters, world_size)
    if clip_grad_norm:
        clip_grad_norm_(parameters, **clip_grad_norm)
    for name in step.groups:
        optimizers[name].step()


def average_gradients(parameters: List[nn.Parameter], world_size: int) -> None:
    """Mean of the gradients over all processes, in two collective calls.

    DistributedDataParallel expects one backward pass per forward and every parameter in each; here a batch has
    several losses on different parameter groups. A parameter without gradient anywhere keeps None, so that the
    optimiser skips it as it would in a single process.
    """
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    used = [p for p, flag in zip(parameters, present.tolist()) if flag]
    if not used:
        return
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in used])
    dist.all_reduce(flat)
    flat /= world_size
    for p, grad in zip(used, flat.split([p.numel() for p in used])):
        p.grad.copy_(grad.view_as(p))
