"""Positions against their definitions; the fast attention against the plain one, values and gradients."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from bertling.attention import (
    Dropout,
    SelfAttention,
    Sight,
    attention,
    drop_out,
    padding_mask,
    plain_attention,
    rotary_angles,
    rotate,
    sinusoidal_positions,
    window_mask,
)

CPU = torch.device("cpu")


def test_sinusoidal_positions_follow_the_paper() -> None:
    table = sinusoidal_positions(7, 10, CPU)
    for position in range(7):
        for i in range(5):
            angle = position / 10_000 ** (2 * i / 10)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotation_keeps_lengths_and_makes_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 12, 8)  # the same vector at each of 12 places
    angles = rotary_angles(12, 8, 10_000.0, CPU)
    turned_q, turned_k = rotate(q, *angles), rotate(k, *angles)
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    scores = (turned_q @ turned_k.transpose(-2, -1))[0, 0]
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[0, 5], atol=1e-2)


def test_rotation_keeps_the_dtype() -> None:
    q = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16)
    assert rotate(q, *rotary_angles(4, 8, 10_000.0, CPU)).dtype is torch.bfloat16


@pytest.mark.parametrize("padded", [False, True])
def test_fast_and_plain_attention_agree(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertling.attention.SHORT", 0)  # short rows on a CPU would take the plain one
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, 2, 9, 8)  # q, k, v of 4 rows, 2 heads, 9 tokens
    mask = None
    if padded:
        lengths = torch.tensor([9, 5, 1, 0])  # the last row is padding alone
        mask = padding_mask(torch.arange(9) < lengths[:, None])
    results = []
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as fused:
        for function in (attention, plain_attention):
            q, k, v = leaves = [x.clone().requires_grad_() for x in inputs]
            output = function(q, k, v, mask)
            output.square().sum().backward()
            results.append([output, *(leaf.grad for leaf in leaves)])
    assert fused.call_count == 1
    for fast, plain in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        assert torch.isfinite(plain).all()
        assert torch.allclose(fast, plain, atol=2e-5)


@pytest.mark.parametrize("short", [0, 512])
def test_keys_behind_the_mask_change_nothing(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertling.attention.SHORT", short)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    mask = padding_mask(torch.tensor([[1, 1, 1, 1, 0, 0]]))
    before = attention(q, k, v, mask)
    k[:, :, 4:], v[:, :, 4:] = 99.0, -99.0
    assert torch.equal(before, attention(q, k, v, mask))


def test_padding_mask_takes_integers_and_booleans() -> None:
    integers = torch.tensor([[1, 0], [0, 0]])
    expected = torch.tensor([[[[True, False]]], [[[True, True]]]])
    assert torch.equal(padding_mask(integers), expected)
    assert torch.equal(padding_mask(integers.bool()), expected)


def test_window_mask_is_a_band_that_padding_narrows_but_never_empties() -> None:
    near = window_mask(5, 1, None, torch.device("cpu"))
    band = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()
    assert torch.equal(near, band[None, None])
    padded = window_mask(5, 1, padding_mask(torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])), torch.device("cpu"))
    assert torch.equal(padded[1], near[0])
    assert torch.equal(padded[0, 0, :, :2], band[:, :2])
    assert torch.equal(padded[0, 0, :, 2:], torch.eye(5).bool()[:, 2:])  # a token of padding sees itself


def test_dropout_follows_its_setting_and_the_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    for dropout, differs in ((0.0, False), (0.5, True)):
        module = SelfAttention(16, 2, bias=True, dropout=dropout)
        assert torch.equal(module(x, Sight(None, None)), module(x, Sight(None, None))) is not differs
        module.eval()
        assert torch.equal(module(x, Sight(None, None)), module(x, Sight(None, None)))


def test_dropout_of_the_plain_attention_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 4, 8)
    runs = torch.stack([plain_attention(q, k, v, None, 0.3) for _ in range(2000)])
    assert torch.allclose(runs.mean(dim=0), plain_attention(q, k, v, None), atol=0.1)
    assert not torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.35, 0.99])
def test_dropout_drops_the_share_it_is_told_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    x = torch.ones(1001, 301, dtype=dtype, requires_grad=True)  # no multiple of the four numbers of a draw
    torch.manual_seed(0)
    y = drop_out(x, p)
    dropped = y == 0
    assert dropped.float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / x.numel()) + 2**-16)
    assert (y[~dropped] == 1 / torch.tensor(1 - p, dtype=dtype)).all()
    for shift in range(1, 5):  # neighbours in a draw fall independently
        both = (dropped.flatten()[shift:] & dropped.flatten()[:-shift]).float().mean().item()
        assert both == pytest.approx(p * p, abs=4 * math.sqrt(p * p * (1 - p * p) / x.numel()) + 1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    torch.manual_seed(0)
    assert torch.equal(drop_out(x, p), y)


def test_dropout_acts_in_training_alone() -> None:
    x, module = torch.ones(100), Dropout(0.5)
    assert (module(x) == 0).any()
    assert module.eval()(x) is x
    assert Dropout(0.0)(x) is x
