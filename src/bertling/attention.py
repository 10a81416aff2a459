"""Self-attention, and what it is told: who may look at whom, and where everyone stands.

Read SelfAttention first, then `plain_attention`, its heart; below them masks, positions and dropout.
Shapes: B batch, T tokens, D hidden, H heads, K head dim (D = H * K), M wanted tokens (as in model.py).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORT = 512
"""Tokens up to which the weights [T, T] are no burden for a CPU's memory."""


class Sight(NamedTuple):
    """What attention is told about places."""

    visible: Tensor | None
    """True where a query may look at a key, [B or 1, 1, T or 1, T]; None where all may look at all."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosine and sine from `rotary_angles`, where positions are encoded so."""


class SelfAttention(nn.Module):
    """Every token asks every other (q), is asked (k), and answers (v), in H independent heads."""

    def __init__(self, hidden_size: int, num_attention_heads: int, *, bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.dropout = dropout
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, sight: Sight, wanted: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D], or [M, D] of the tokens `wanted` [M] alone."""
        batch, length, hidden_size = x.shape
        qkv = self.qkv_proj(x).view(batch, length, 3, self.num_attention_heads, self.head_dim)  # [B, T, 3, H, K]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, K] each
        if sight.rotary is not None:
            q, k = rotate(q, *sight.rotary), rotate(k, *sight.rotary)
        mixed = attention(q, k, v, sight.visible, self.dropout if self.training else 0.0)  # [B, H, T, K]
        mixed = mixed.transpose(1, 2).reshape(batch, length, hidden_size)  # [B, T, D]
        if wanted is not None:
            mixed = mixed.flatten(0, 1).index_select(0, wanted)  # [M, D]
        return self.out_proj(mixed)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout_p: float = 0.0) -> Tensor:
    """Mix the values [B, H, T, K] by how well each query fits each key, by the faster of two ways to the same numbers.

    `visible` comes from `padding_mask` or `window_mask`, or is None where every token may see all (which lets faster
    kernels in).
    """
    if q.device.type == "cpu" and q.shape[-2] <= SHORT and torch.is_grad_enabled():
        # torch's fused CPU kernel is slow backwards: on short rows plain products are faster (docs/experiments.md).
        return plain_attention(q, k, v, visible, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout_p: float = 0.0) -> Tensor:
    """In plain sight: softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017, equation 1)."""
    # A sum of K products of numbers near 1 is around sqrt(K) in size; undivided, the softmax of such scores would give
    # nearly all to one key, and have next to no slope. q is divided rather than the scores: mostly the smaller tensor.
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # [B, H, T, K] @ [B, H, K, T] -> [B, H, T, T]
    if visible is not None:
        # Adds log 1 = 0 where visible, log 0 = -infinity elsewhere (compiled, faster than masked_fill: experiments.md).
        scores = scores + visible.to(scores.dtype).log()
    weights = scores.softmax(dim=-1)  # each row adds up to 1
    if dropout_p > 0:
        weights = drop_out(weights, dropout_p)
    return weights @ v  # [B, H, T, T] @ [B, H, T, K] -> [B, H, T, K]


def padding_mask(attention_mask: Tensor) -> Tensor:
    """From 1 or True where a token counts [B, T] to True where a key may be looked at [B, 1, 1, T].

    A row of padding alone looks at all of itself: the softmax over nothing would be NaN, and no one reads that row.
    """
    real = attention_mask.bool()
    return (real | ~real.any(dim=1, keepdim=True))[:, None, None, :]


def window_mask(length: int, reach: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """True for keys up to `reach` tokens away that `padding` (of `padding_mask`) allows, [B or 1, 1, T, T].

    Every token sees itself, padding too: else one with only padding near it would have a softmax over nothing (NaN).
    """
    places = torch.arange(length, device=device)
    distance = (places[:, None] - places).abs()  # [T, T]
    near = (distance <= reach)[None, None]
    return near if padding is None else (near & padding) | (distance == 0)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn column i of `x` [B, H, T, K] together with column i + K/2, in the number format of `x`.

    The product of a query and a key turned so depends on their two places only through the difference of these.
    """
    first, second = x.chunk(2, dim=-1)  # [B, H, T, K/2] each
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def rotary_angles(
    length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which each position turns each pair of columns (Su et al. 2021), [T, K/2] each.

    Made anew in every forward pass: a few thousand numbers, and no table to size, store, move or round to bf16.
    """
    frequencies = inverse_frequencies(head_dim, theta, device, dtype)
    angles = torch.arange(length, device=device)[:, None] * frequencies  # [T, K/2]
    return angles.cos(), angles.sin()


def inverse_frequencies(width: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """base^(-2i / width) for i = 0, 1, ... width/2 - 1: from one radian per token down to almost none. [width/2]"""
    exponents = torch.arange(0, width, 2, device=device, dtype=dtype) / width
    return torch.exp(-math.log(base) * exponents)


def sinusoidal_positions(length: int, hidden_size: int, device: torch.device) -> Tensor:
    """The fixed position vectors of Vaswani et al. 2017, section 3.5: sines in even, cosines in odd columns. [T, D]"""
    frequencies = inverse_frequencies(hidden_size, 10_000.0, device)
    angles = torch.arange(length, device=device)[:, None] * frequencies  # [T, D/2]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # [T, D/2, 2] -> [T, D]


def drop_out(x: Tensor, p: float) -> Tensor:
    """Let each number be 0 with probability `p`, the others larger by 1 / (1 - p) (Srivastava et al. 2014, section 10).

    F.dropout, but four numbers share a draw of 64 bits: on a CPU the drawing takes the time (docs/experiments.md).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # 64 bits each
    # Each quarter is a number from -2^15 to 2^15 - 1, all as likely: below this bound with probability p.
    stays = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * stays.to(x.dtype).div_(1 - p)


class Dropout(nn.Dropout):
    """Dropout by `drop_out`."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same; outside of training as it is."""
        return drop_out(x, self.p) if self.training and self.p > 0 else x
