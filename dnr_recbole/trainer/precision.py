"""Which arithmetic to train in."""

from __future__ import annotations

import contextlib
import math
import platform
from functools import lru_cache
from typing import Mapping

import torch


@lru_cache(maxsize=None)
def cpu_has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; without it bf16 is many times slower than fp32."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # not in every torch
        check = getattr(torch.cpu, name, None)
        if check is not None and check():
            return True
    if platform.system() == "Linux":
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
            line = next((row for row in f if row.startswith(("flags", "Features"))), "")
            return any(flag in line.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def use_bf16(precision: str, device: torch.device, size: float = math.inf, bf16_from: Mapping[str, float] = {}) -> bool:
    """Whether to compute in bf16: ``precision`` "auto" means where the device has it and it was measured to be faster.

    Args:
        precision: "auto", "fp32" or "bf16".
        size: requests of a batch × width d of the model.
        bf16_from: device type → smallest size at which bf16 is faster (``AbstractReranker.bf16_from``).
    """
    if precision != "auto":
        return precision == "bf16"
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and cpu_has_fast_bf16()
    return fast and size >= bf16_from.get(device.type, 0)


def autocast(device: torch.device, bf16: bool):
    """The autocast context of that arithmetic on a device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
