"""Which arithmetic to train in."""

from __future__ import annotations

import contextlib
import platform
from functools import lru_cache

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


def use_bf16(precision: str, device: torch.device) -> bool:
    """``precision`` "auto" means bf16 where the device is fast at it, fp32 elsewhere."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and cpu_has_fast_bf16()


def autocast(precision: str, device: torch.device):
    """The autocast context of a precision setting on a device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16(precision, device))
