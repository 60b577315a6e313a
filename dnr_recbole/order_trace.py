"""Where a program sorts by given scores: what the reranker contract uses to see lists made of synthetic scores."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Dict, Optional

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SORTS = ("argsort", "sort", "msort", "topk", "argmax", "argmin")
_LOWEST, _MIN_ENTRIES, _MAX_ROWS = -1e8, 3, 4096


class OrderTrace(TorchFunctionMode):
    """Records which methods of modules order candidates by ``x``.

    A context manager. Every sort, top-k and argmax inside it is looked at: does its key order the candidates as ``x``
    does (or in reverse)? What was done to ``x`` before does not matter as long as its order is left, so masks, casts,
    shifts, concatenations with other keys and detours over other variables are all seen. A learned score is not ``x``,
    and is not recorded.

    Args:
        x: ``[B, n]``, distinct within each row.

    Attributes:
        places: code object of the innermost method of an ``nn.Module`` on the call stack → its readable name.
    """

    def __init__(self, x: Tensor):
        super().__init__()
        self.x = x.detach().double()
        self.places: Dict[CodeType, str] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key = args[0] if args else kwargs.get("input")
        if getattr(func, "__name__", "") in SORTS and isinstance(key, Tensor) and follows(key, self.x):
            self._record()
        return func(*args, **kwargs)

    def _record(self) -> None:
        frame, place = sys._getframe(2), None
        while frame is not None and place is None:
            place = _method_of_a_module(frame)
            frame = frame.f_back
        if place is not None:
            self.places.setdefault(*place)


def _method_of_a_module(frame) -> Optional[tuple]:
    owner = frame.f_locals.get("self")
    if not isinstance(owner, nn.Module):
        return None
    return frame.f_code, f"{type(owner).__name__}.{frame.f_code.co_name}"


def follows(key: Tensor, x: Tensor) -> bool:
    """Whether, for every request, some row of ``key`` ``[.., n]`` orders candidates as ``x`` ``[B, n]`` or in reverse.

    Rows are those of one request after another or of all requests in turn. Entries at ±1e8 and beyond are masked out;
    rows that order fewer than three candidates prove nothing.
    """
    batch, n = x.shape
    rows = key.numel() // n
    if key.dim() < 2 or key.shape[-1] != n or rows % batch or rows > _MAX_ROWS:
        return False
    key = key.detach().double().reshape(rows, n)
    real = (key > _LOWEST) & (key < -_LOWEST)
    pairs = (real.unsqueeze(2) & real.unsqueeze(1)).triu(1)
    enough = real.sum(1) >= _MIN_ENTRIES
    sign = lambda v: (v.unsqueeze(2) - v.unsqueeze(1)).sign()  # noqa: E731
    ours, theirs = sign(key), sign(x)
    number = torch.arange(rows, device=key.device)
    for owner in (number * batch // rows, number % batch):
        same = [((ours == way * theirs[owner]) | ~pairs).flatten(1).all(1) & enough for way in (1, -1)]
        found = torch.zeros(batch, dtype=torch.bool, device=key.device)
        found[owner[same[0] | same[1]]] = True
        if found.all():
            return True
    return False
