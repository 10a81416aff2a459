"""Matrix products of integers while training: on a CPU about four times as many a second, for the same result.

A linear layer multiplies three times in a step: input by weights, and, backwards, for the gradients of both. Before
each product every row of the left factor and every column of the right one is rounded to whole multiples of a 127th of
its largest number; the integers multiply, their sums are exact in 32 bits, and the sizes of the steps are multiplied
back in. The first two products are as in SwitchBack (Wortsman et al. 2023); models of this size bear it in the third
one too (docs/experiments.md). The weights themselves stay in fp32, and evaluations do not round at all.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 127
LONGEST_SUM = 2**31 // STEPS**2
"""So many products of two int8 numbers surely fit into 32 bits."""
BAND = 16
"""Rows, at most, whose numbers a core's caches surely hold."""


def use_int8(model: nn.Module, matrices: tuple[str, ...]) -> None:
    """Let the linear layers whose names begin like one of `matrices` train with products in int8.

    Parameters, names and what is saved stay as they are: like torch's parametrizations it changes the class alone.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.startswith(matrices):
            module.__class__ = Int8Linear


class Int8Linear(nn.Linear):
    """A linear layer that multiplies in int8 while it trains, and as any other elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the format of autocast or of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        longest = max(len(rows), *self.weight.shape)  # of the sums in the three products
        # A single row torch may take wrongly, in silence: its issue 195066.
        if not self.training or len(rows) < 2 or longest >= LONGEST_SUM:
            return F.linear(x, self.weight, self.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        output: Tensor = Int8Product.apply(rows, self.weight).to(dtype)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            output = output + self.bias.to(dtype)
        return output.view(*x.shape[:-1], -1)


class Int8Product(torch.autograd.Function):
    """x [M, K], weights [N, K] -> x @ weights.T, [M, N]; all three products of it in int8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The product in fp32."""
        ctx.save_for_backward(x, weight)
        return multiply(x, weight.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of both factors."""
        x, weight = ctx.saved_tensors
        return multiply(gradient, weight).to(x.dtype), multiply(gradient.T, x).to(weight.dtype)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] -> fp32 [M, N], its factors rounded to int8; one that is not finite leaves no finite row."""
    (left, rows), (right, columns) = to_int8(a, dim=1), to_int8(b, dim=0)
    return torch._int_mm(left, right) * rows * columns


def to_int8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Integers and the size of a step, one for all numbers along `dim`: their product is `x` but for rounding."""
    if x.stride(0) == 1 < x.stride(1):  # a transposed matrix: row by row as it lies in memory
        integers, size = to_int8(x.T, 1 - dim)
        return integers.T, size.T
    x = x.float()
    sizes = x.abs()
    if dim == 0:  # by bands of rows that stay in the cache; in one go every row would be fetched for every few columns
        sizes = sizes.reshape(-1, math.gcd(len(x), BAND), x.shape[1]).amax(1)
    largest = sizes.amax(dim, keepdim=True).clamp(min=1e-30)  # of zeros alone: no division by zero
    return (x * (STEPS / largest)).round().to(torch.int8), largest / STEPS
