"""Which arithmetic to train in."""

from __future__ import annotations

import contextlib
import platform
from functools import lru_cache

import torch

from dnr_recbole.model.abstract_reranker import AbstractReranker


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


def use_bf16(config, model: AbstractReranker, device: torch.device) -> bool:
    """Whether to compute in bf16: ``precision: auto`` does where the device has it and the model's batches, requests ×
    width d, are of a size from which on it was measured to be faster (``AbstractReranker.bf16_from``)."""
    if config["precision"] != "auto":
        return config["precision"] == "bf16"
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and cpu_has_fast_bf16()
    return fast and config["train_batch_size"] * config["embedding_size"] >= model.bf16_from.get(device.type, 0)


def autocast(device: torch.device, bf16: bool):
    """The autocast context of that arithmetic on a device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
