"""Dropout that is cheap on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _ByteDropout(torch.autograd.Function):
    """Inverted dropout whose mask takes one random byte per element."""

    @staticmethod
    def forward(ctx, x: Tensor, level: int) -> Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_()
        # random_() leaves the sign bit 0: the top byte of each word has 7 random bits, so it gets them shifted.
        words ^= words << 1
        draws = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # The factor 0 or scale is made as an integer with its bits: casts of bytes to floats take five times longer.
        integer = _SAME_SIZE[x.element_size()]
        scale = torch.tensor(256 / (256 - level), dtype=x.dtype).view(integer)
        factor = draws.to(integer).ge_(level).mul_(scale).view(x.dtype)
        ctx.save_for_backward(factor)
        return factor * x

    @staticmethod
    def backward(ctx, grad: Tensor):
        (factor,) = ctx.saved_tensors
        return factor * grad, None


class Dropout(nn.Dropout):
    """Dropout that does not wait for random numbers on CPUs.

    PyTorch draws one Bernoulli variate per element, which costs a CPU more than the layer in front of it. Here eight
    elements share one 64-bit draw; the rate is rounded to 1/256 and the scale with it, so the mean stays exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        level = round(self.p * 256)
        if not self.training or level == 0 or x.device.type != "cpu" or level > 255:
            return super().forward(x)
        return _ByteDropout.apply(x, level)
