"""Products of integers while training: on a CPU without AMX about four times as many a second, for the same result.

A linear layer multiplies three times in a step: input by weights, and, backwards, the gradient by either of them.
Before that every row of a factor (of the gradient once every column) is rounded to whole multiples of a 127th of its
largest number; the integers multiply, their sums are exact in 32 bits, and the sizes of the steps are multiplied back
in. Inputs and weights are rounded once and serve twice: backwards, where the sums run over their rows, the gradient
takes up the sizes of the rows' steps before it is rounded itself. The first two products are as in SwitchBack
(Wortsman et al. 2023); models of this size bear it in the third one too (docs/experiments.md). The weights themselves
stay in fp32, and evaluations do not round.
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
        # A single row (backwards, a single output) torch may take wrongly, in silence: its issue 195066.
        if not self.training or min(len(rows), self.out_features) < 2 or longest >= LONGEST_SUM:
            return F.linear(x, self.weight, self.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        output: Tensor = Int8Product.apply(rows, self.weight).to(dtype)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            output = output + self.bias.to(dtype)
        return output.view(*x.shape[:-1], -1)


class Int8Product(torch.autograd.Function):
    """x [M, K], weights [N, K] -> x @ weights.T, [M, N]; all three products of it in int8.

    What is not finite leaves nothing finite in its row of a product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The product in fp32."""
        (rows, row_steps), (columns, column_steps) = to_int8(x), to_int8(weight)
        ctx.save_for_backward(rows, row_steps, columns, column_steps)
        ctx.dtypes = x.dtype, weight.dtype
        return torch._int_mm(rows, columns.T) * row_steps * column_steps.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of both factors: gradient @ weights, [M, K], and gradient.T @ x, [N, K]."""
        rows, row_steps, columns, column_steps = ctx.saved_tensors
        to_x, x_steps = to_int8(gradient * column_steps.T)
        to_weight, weight_steps = columns_to_int8(gradient * row_steps)
        x_gradient = torch._int_mm(to_x, columns) * x_steps
        weight_gradient = torch._int_mm(to_weight.T, rows) * weight_steps.T
        return x_gradient.to(ctx.dtypes[0]), weight_gradient.to(ctx.dtypes[1])


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [M, N] and the step of each row [M, 1]: their product is `x` [M, N] but for rounding."""
    return whole_steps(x.float(), x.abs().amax(1, keepdim=True))


def columns_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with a step for each column, [1, N]."""
    # By bands of rows that stay in the cache; in one go every row would be fetched for every few columns.
    bands = x.abs().reshape(-1, math.gcd(len(x), BAND), x.shape[1]).amax(1)
    return whole_steps(x.float(), bands.amax(0, keepdim=True))


def whole_steps(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in steps of a 127th of the `largest` number, and the size of the steps."""
    largest = largest.float().clamp(min=1e-30)  # of zeros alone: no division by zero
    return (x * (STEPS / largest)).round().to(torch.int8), largest * (1 / STEPS)
