"""Products of integers: on a CPU without AMX two to four times as many a second, for the same result.

A linear layer multiplies three times in a step: input by weights, and, backwards, the gradient by either of them.
Before that every row of a factor (of the gradient once every column) is rounded to whole multiples of a 127th of its
largest number; the integers multiply, their sums are exact in 32 bits, and the sizes of the steps are multiplied back
in. Inputs and weights are rounded once and serve twice: backwards, where the sums run over their rows, the gradient
takes up the sizes of the rows' steps before it is rounded itself. The first two products are as in SwitchBack
(Wortsman et al. 2023); models of this size bear it in the third one too (docs/experiments.md). The weights themselves
stay in fp32, and evaluations do not round.

A model that only answers has its weights rounded once and for all, and each input as it comes (as in LLM.int8(),
Dettmers et al. 2022, without its outliers).

Shapes: M rows, K numbers in each, N outputs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertling.runtime import can_compile

STEPS = 127
LONGEST_SUM = 2**31 // STEPS**2
"""So many products of two int8 numbers surely fit into 32 bits."""
BAND = 16
"""Rows, at most, whose numbers a core's caches surely hold."""


def rows_that_fit(seq_len: int) -> int:
    """Rows of a micro-batch, at most, over whose tokens a sum surely fits: more would be multiplied as elsewhere."""
    return (LONGEST_SUM - 1) // seq_len


def use_int8(model: nn.Module, matrices: tuple[str, ...]) -> None:
    """Let the linear layers whose names begin like one of `matrices` train with products in int8.

    Parameters, names and what is saved stay as they are: like torch's parametrizations it changes the class alone.
    """
    for layer in linear_layers(model, matrices):
        layer.__class__ = Int8Linear


def round_weights(model: nn.Module, matrices: tuple[str, ...]) -> None:
    """Let such layers answer with products in int8, their weights as they are now. Their parameters stay beside."""
    for layer in linear_layers(model, matrices):
        layer.__class__ = RoundedLinear
        layer.integers, layer.steps = to_int8(layer.weight.detach())


def linear_layers(model: nn.Module, matrices: tuple[str, ...]) -> list[nn.Linear]:
    """Those whose names begin like one of `matrices`."""
    named = model.named_modules()
    return [module for name, module in named if type(module) is nn.Linear and name.startswith(matrices)]


class Int8Linear(nn.Linear):
    """A linear layer that multiplies in int8 while it trains, and as any other elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the format of autocast or of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        longest = max(len(rows), *self.weight.shape)  # of the sums in the three products
        # A single row (backwards, a single output) torch may take wrongly, in silence: its issue 195066.
        if not self.training or min(len(rows), self.out_features) < 2 or longest >= LONGEST_SUM:
            return F.linear(x, self.weight, self.bias)
        dtype = output_format(x)
        output: Tensor = Int8Product.apply(rows, self.weight, dtype)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            output = output + self.bias.to(dtype)
        return output.view(*x.shape[:-1], -1)


class RoundedLinear(nn.Linear):
    """A linear layer that always multiplies in int8, by weights that were rounded before."""

    integers: Tensor
    """[N, K]."""
    steps: Tensor
    """[N, 1], in fp32 whatever the model's format is."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the format of autocast or of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < 2 or x.shape[-1] >= LONGEST_SUM:
            return F.linear(x, self.weight, self.bias)
        output: Tensor = fused(rounded_product)(rows, self.integers, self.steps, self.bias, output_format(x))
        return output.view(*x.shape[:-1], -1)


def output_format(x: Tensor) -> torch.dtype:
    """The format that autocast asks of a product with `x`, or that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Int8Product(torch.autograd.Function):
    """x [M, K], weights [N, K] -> x @ weights.T, [M, N], in the format given; all three products of it in int8.

    What is not finite leaves nothing finite in its row of a product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The product."""
        output, *rounded = fused(product)(x, weight.detach(), dtype)
        ctx.save_for_backward(*rounded)
        ctx.dtypes = x.dtype, weight.dtype
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of both factors: gradient @ weights, [M, K], and gradient.T @ x, [N, K]."""
        # Columns by bands of rows that stay in the cache; in one go every row would be fetched for every few columns.
        band = math.gcd(len(gradient), BAND)
        of_x, of_weight = fused(gradients)(gradient, band, *ctx.saved_tensors, *ctx.dtypes)
        return of_x, of_weight, None


def product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x @ weight.T in `dtype`, and for the way back: rows of x, their steps, rows of the weights, theirs."""
    (rows, row_steps), (columns, column_steps) = to_int8(x), to_int8(weight)
    output = torch._int_mm(rows, columns.T) * row_steps * column_steps.T
    return output.to(dtype), rows, row_steps, columns, column_steps


def gradients(
    gradient: Tensor,
    band: int,
    rows: Tensor,
    row_steps: Tensor,
    columns: Tensor,
    column_steps: Tensor,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """From the gradient of `product` [M, N] those of x [M, K] and weights [N, K]."""
    to_x, x_steps = to_int8(gradient * column_steps.T)
    to_weight, weight_steps = columns_to_int8(gradient * row_steps, band)
    x_gradient = torch._int_mm(to_x, columns) * x_steps
    weight_gradient = torch._int_mm(to_weight.T, rows) * weight_steps.T
    return x_gradient.to(x_dtype), weight_gradient.to(weight_dtype)


def rounded_product(
    x: Tensor, columns: Tensor, column_steps: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x [M, K] times weights that are integers [N, K] already, in `dtype`, [M, N]."""
    rows, row_steps = to_int8(x)
    output = torch._int_mm(rows, columns.T) * row_steps * column_steps.T
    return (output if bias is None else output + bias).to(dtype)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with all its passes over memory in one, where nothing else compiles it and a compiler is there.

    Otherwise rounding takes as long as it saves (docs/experiments.md). The results are the same, bit by bit.
    """
    return function if torch.compiler.is_compiling() else compiled(function)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For any sizes, so that texts of each length share the code."""
    return torch.compile(function, dynamic=True) if can_compile(torch.device("cpu")) else function


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [M, N] and the step of each row [M, 1]: their product is `x` [M, N] but for rounding."""
    return whole_steps(x.float(), x.abs().amax(1, keepdim=True))


def columns_to_int8(x: Tensor, band: int = 1) -> tuple[Tensor, Tensor]:
    """The same with a step for each column, [1, N], found by so many rows at a time; `band` divides M."""
    bands = x.abs().reshape(-1, band, x.shape[1]).amax(1)
    return whole_steps(x.float(), bands.amax(0, keepdim=True))


def whole_steps(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in steps of a 127th of the `largest` number, and the size of the steps."""
    largest = largest.float().clamp(min=1e-30)  # of zeros alone: no division by zero
    return (x * (STEPS / largest)).round().to(torch.int8), largest * (1 / STEPS)
