"""Products in int8: how far they are off, where they are used, and that nothing else changes."""

import pytest
import torch
from torch import Tensor, nn

from bertling import int8
from bertling.int8 import (
    LONGEST_SUM,
    Int8Linear,
    Int8Product,
    RoundedLinear,
    columns_to_int8,
    round_weights,
    rows_that_fit,
    to_int8,
    use_int8,
)
from bertling.model import BertForMaskedLM, BertForSequenceClassification
from bertling.optim import HIDDEN
from bertling.presets import preset_config
from bertling.runtime import can_compile, multiplies_int8

pytestmark = pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no dot products of int8 (VNNI)")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, exact: Tensor) -> float:
    """How far off, as a share of the whole."""
    return float((found - exact).detach().norm() / exact.detach().norm())


def twins(width: int = 96, height: int = 160, *, bias: bool = False) -> tuple[nn.Linear, nn.Linear]:
    exact, rounded = (nn.Linear(width, height, bias=bias) for _ in range(2))
    rounded.load_state_dict(exact.state_dict())
    use_int8(rounded, ("",))
    return exact, rounded


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in int8."""
    output: Tensor = Int8Product.apply(a, b.T, torch.float32)  # type: ignore[no-untyped-call]
    return output


def off_by(a: Tensor, a_off: Tensor, b: Tensor, b_off: Tensor) -> Tensor:
    """How far a product of `a` and `b` is off at most, where their entries are off by that much."""
    a_off, b_off = a_off.expand_as(a), b_off.to(b).expand_as(b)
    return a_off @ b + a @ b_off + a_off @ b_off


@pytest.mark.parametrize("m", [2, 63, 4096])
@pytest.mark.parametrize("k", [16, 100, 704])
@pytest.mark.parametrize("n", [1, 17, 256])
def test_all_three_products_are_off_by_their_rounding_alone(m: int, k: int, n: int) -> None:
    x, weight, gradient = normal(m, k).double(), normal(n, k, seed=1).double(), normal(m, n, seed=2).double()
    x_step, weight_step = (factor.abs().amax(1, keepdim=True) / 127 for factor in (x, weight))  # [m, 1], [n, 1]
    # Backwards the gradient is rounded together with the steps of the factor that stays as it was.
    to_x, to_weight = (gradient * weight_step.T).abs(), (gradient * x_step).abs()
    bounds = [
        off_by(x.abs(), x_step / 2, weight.T.abs(), weight_step.T / 2),
        off_by(to_x, to_x.amax(1, keepdim=True) / 254, (weight / weight_step).abs(), torch.tensor(0.5)),
        off_by(to_weight.T, to_weight.T.amax(1, keepdim=True) / 254, (x / x_step).abs(), torch.tensor(0.5)),
    ]
    exact = x @ weight.T, gradient @ weight, gradient.T @ x
    for lay in (torch.clone, lambda t: t.T.contiguous().T):  # however the factors lie in memory
        layer, leaf = nn.Linear(k, n, bias=False), lay(x.float()).requires_grad_()
        layer.weight = nn.Parameter(lay(weight.float()))
        use_int8(layer, ("",))
        y = layer(leaf)
        y.backward(lay(gradient.float()))
        for found, right, bound in zip((y, leaf.grad, layer.weight.grad), exact, bounds, strict=True):
            assert found is not None
            assert found.dtype == torch.float32
            assert ((found - right).abs() < bound + 1e-4).all()


@pytest.mark.parametrize("rows", [1, 17, 48])
def test_each_row_or_column_has_the_step_of_its_largest_number(rows: int) -> None:
    x = normal(rows, 5)
    for function, dim in ((to_int8, 1), (columns_to_int8, 0)):
        integers, step = function(x)
        torch.testing.assert_close(step, x.abs().amax(dim, keepdim=True) / 127)
        assert integers.abs().amax(dim).eq(127).all()
        assert ((integers * step - x).abs() < step * 0.501).all()


def test_whole_numbers_whose_largest_is_127_multiply_exactly() -> None:
    a, b = (
        torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)) for shape in ((40, 300), (300, 9))
    )
    a[:, 0] = b[0] = 127
    torch.testing.assert_close(product(a.float(), b.float()), (a @ b).float(), rtol=1e-6, atol=0.5)


def test_rows_and_columns_have_steps_of_their_own() -> None:
    a, b = normal(50, 64), normal(64, 30, seed=1)
    scale = torch.logspace(-20, 4, 50)[:, None]
    torch.testing.assert_close(product(a * scale, b), product(a, b) * scale, rtol=1e-3, atol=1e-30)
    torch.testing.assert_close(product(a, b * scale[:30].T), product(a, b) * scale[:30].T, rtol=1e-3, atol=1e-30)
    assert not product(torch.zeros(3, 64), b).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x, weight, gradient = normal(8, 64), normal(4, 64, seed=1), normal(8, 4, seed=2)
    x[3, 5] = bad
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = Int8Product.apply(*leaves, torch.float32)  # type: ignore[no-untyped-call]
    assert y.isfinite().all(dim=1).tolist() == [row != 3 for row in range(8)]
    gradient[1, 2] = bad
    y.backward(gradient)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert leaves[0].grad.isfinite().all(dim=1).tolist() == [row != 1 for row in range(8)]
    assert not leaves[1].grad.isfinite().any()  # all of it sums over row 3 of the input


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_and_its_gradients_are_close_to_the_exact_ones(bias: bool) -> None:
    exact, rounded = twins(bias=bias)
    found = []
    for layer in (exact, rounded):
        x = normal(4, 16, 96).requires_grad_()
        y = layer(x)
        y.backward(normal(4, 16, 160, seed=2))
        found.append((y.detach(), x.grad, *(p.grad for p in layer.parameters())))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert off(other, one) < 0.02
    assert off(found[1][0], found[0][0]) > 0


def test_only_training_rounds() -> None:
    exact, rounded = twins()
    x = normal(8, 96)
    assert not torch.equal(exact(x), rounded(x))
    rounded.eval()
    assert torch.equal(exact(x), rounded(x))


def test_a_single_row_and_sums_that_might_overflow_are_not_rounded() -> None:
    exact, rounded = twins(width=4, height=2)
    for rows in (1, LONGEST_SUM):
        x = torch.ones(rows, 4)
        torch.testing.assert_close(rounded(x), exact(x), rtol=0, atol=0)
    for width, height in ((LONGEST_SUM, 2), (2, LONGEST_SUM)):  # the sums of the other two products
        exact, rounded = twins(width, height)
        x = normal(3, width)
        torch.testing.assert_close(rounded(x), exact(x), rtol=0, atol=0)


def test_rows_that_fit_are_as_many_as_do() -> None:
    assert 128 * rows_that_fit(128) < LONGEST_SUM <= 128 * (rows_that_fit(128) + 1)


def test_the_output_has_the_format_that_autocast_asks_for() -> None:
    rounded = twins(bias=True)[1]
    x = normal(8, 96).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rounded(x)
        z = rounded(x.bfloat16())
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.bfloat16)
    (y.float().sum() + z.float().sum()).backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in rounded.parameters())


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_or_not_every_bit_is_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def passes() -> list[Tensor]:
        found = []
        for rows, (height, width) in ((33, (96, 160)), (48, (96, 96)), (96, (160, 96))):  # any sizes, equal ones too
            x = normal(rows, width).to(dtype).requires_grad_()
            weight = nn.Parameter(normal(height, width, seed=1))
            y = Int8Product.apply(x, weight, dtype)  # type: ignore[no-untyped-call]
            y.backward(normal(rows, height, seed=2).to(dtype))
            layer = nn.Linear(width, height)
            layer.load_state_dict({"weight": weight.detach(), "bias": normal(height, seed=3)})
            round_weights(layer, ("",))
            found += [y, x.grad, weight.grad, layer.to(dtype)(x)]
        return found

    assert int8.fused(int8.product) is not int8.product
    compiled = passes()
    monkeypatch.setattr(int8, "fused", lambda function: function)
    assert all(torch.equal(one, other) for one, other in zip(compiled, passes(), strict=True))


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "can_compile", lambda device: False)
    int8.compiled.cache_clear()
    assert int8.fused(int8.product) is int8.product
    int8.compiled.cache_clear()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_rounded_for_good_answer_nearly_the_same(bias: bool, dtype: torch.dtype) -> None:
    exact, rounded = (nn.Linear(96, 160, bias=bias).eval() for _ in range(2))
    rounded.load_state_dict(exact.state_dict())
    round_weights(rounded, ("",))
    assert isinstance(rounded, RoundedLinear)
    rounded.to(dtype)
    assert (rounded.weight.dtype, rounded.integers.dtype, rounded.steps.dtype) == (dtype, torch.int8, torch.float32)
    x = normal(4, 16, 96)
    y = rounded(x.to(dtype))
    assert (y.dtype, y.shape) == (dtype, (4, 16, 160))
    assert 0 < off(y.float(), exact(x)) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rounded(x).dtype == torch.bfloat16
    torch.testing.assert_close(rounded(x[0, :1].to(dtype)), exact.to(dtype)(x[0, :1].to(dtype)))  # one row: not rounded


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
@pytest.mark.parametrize("preset", ["modern", "bert"])
def test_of_a_model_the_hidden_matrices_alone_are_taken_and_nothing_is_renamed(
    kind: type[BertForMaskedLM], preset: str
) -> None:
    config = preset_config(preset, "mini", 100, max_position_embeddings=16, pad_token_id=0, labels=["no", "yes"])
    model = kind(config, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_int8(model, HIDDEN)
    taken = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(HIDDEN)}
    assert {f"{name}.weight" for name in taken} == matrices
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_matrices_named_nothing_is_taken() -> None:
    layer = nn.Sequential(nn.Linear(4, 4))
    use_int8(layer, ())
    assert type(layer[0]) is nn.Linear
