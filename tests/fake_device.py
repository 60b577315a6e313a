"""Tensors that claim to be on an accelerator: a tensor made on the CPU in a model's code is found without one.

Only shapes, types and devices are computed. An operation on tensors of two devices fails as it would on a GPU.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

# Any device type that no build of torch computes on, but every build knows how to switch to.
DEVICE = torch.device("lazy", 0)
aten = torch.ops.aten


class FakeDevice(contextlib.ExitStack):
    """Within it, tensors made by :meth:`move` are on :data:`DEVICE`.

    Args:
        guess: what every bool read from a tensor is, as there are no values.
    """

    def __init__(self, guess: bool = False):
        super().__init__()
        self.mode, self.guess = FakeTensorMode(), guess

    def __enter__(self) -> FakeDevice:
        super().__enter__()
        self.enter_context(mock.patch.object(torch, "_standard_gamma", torch.rand_like))  # no rule for shapes alone
        self.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
        for rnn in (nn.GRU, nn.LSTM):
            self.enter_context(mock.patch.object(rnn, "forward", _rnn))
        self.enter_context(self.mode)
        self.enter_context(_Values(self.guess))
        return self

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape and type on the device."""
        with no_dispatch():  # otherwise torch 2.8 and earlier make a tensor of the mode itself
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self.mode, empty, DEVICE)

    def move_model(self, model: nn.Module) -> nn.Module:
        """Parameters and buffers, as ``model.to(device)`` moves them; what else a model keeps stays where it is."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(self.move(parameter), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.move(buffer)
        return model


class _Values(TorchDispatchMode):
    """Stands in where an operation reads values: numbers, and how many entries of a mask are True."""

    def __init__(self, guess: bool):
        super().__init__()
        self.guess = guess

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            return self.guess if args[0].dtype == torch.bool else 1
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [index for given in args[1] for index in _positions(given)], *args[2:])
        return func(*args, **(kwargs or {}))


def _positions(index):
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel() // 2, dtype=torch.long, device=index.device) for _ in range(index.dim())]


def _rnn(self, inputs, state=None):
    output = nn.functional.linear(inputs, self.weight_ih_l0)[..., : self.hidden_size]
    for part in state if isinstance(state, tuple) else () if state is None else (state,):
        output = output + part.transpose(0, 1)
    last = output[:, -1].unsqueeze(0)
    return output, (last, last) if isinstance(self, nn.LSTM) else last
