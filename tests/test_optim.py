"""Learning rates over a run, which weights decay, which ones Muon takes, and states that come back bit-equal."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bertling.model import BertForMaskedLM
from bertling.optim import (
    NEWTON_SCHULZ_BF16,
    NEWTON_SCHULZ_FP32,
    Muon,
    build_optimizers,
    build_schedule,
    clip_gradients,
    orthogonalize,
    pack_state,
    set_learning_rate,
    unpack_state,
)
from bertling.presets import preset_config
from bertling.settings import Settings

CPU = torch.device("cpu")
DTYPES = torch.float32, torch.bfloat16


def rates(settings: Settings, steps: int) -> list[float]:
    """The learning rate of each step, as the training loop asks for it."""
    schedule = build_schedule(settings, steps)
    return [settings.learning_rate * schedule.factor((step + 1) / steps, step + 1) for step in range(steps)]


def test_cosine_rises_falls_to_the_floor_and_stays_there() -> None:
    settings = Settings(
        learning_rate=1e-3, min_learning_rate=5e-5, warmup_iters=100, lr_decay_iters=900, max_iters=1200
    )
    course = rates(settings, 1200)
    assert course[0] == pytest.approx(1e-5)
    assert course[49] == pytest.approx(5e-4)
    assert course[99] == pytest.approx(1e-3)
    assert course[499] == pytest.approx((1e-3 + 5e-5) / 2)  # half way down
    assert course[899:] == pytest.approx([5e-5] * 301)
    assert all(a > b for a, b in pairwise(course[99:900]))


def test_trapezoid_rises_stays_and_falls_linearly() -> None:
    settings = Settings(learning_rate=1.0, schedule="trapezoid", cooldown=0.4, warmup_iters=10)
    course = rates(settings, 100)
    assert course[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert course[9:60] == pytest.approx([1.0] * 51)
    assert course[60:] == pytest.approx([1 - i / 40 for i in range(1, 41)], abs=1e-9)


def test_a_cooldown_longer_than_the_run_begins_behind_the_warm_up() -> None:
    schedule = build_schedule(Settings(schedule="trapezoid", cooldown=1.0, warmup_iters=20), 100)
    assert [schedule.factor(x, 1) for x in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("kind", ["cosine", "trapezoid"])
def test_what_is_unset_follows_from_the_length_of_the_run(kind: str) -> None:
    pretraining = build_schedule(Settings(schedule=kind), 1000)
    assert (pretraining.warmup, pretraining.decay_end, pretraining.floor) == (0.02, 1.0, 0.0)
    assert build_schedule(Settings(task_type="sst2"), 1000).warmup == 0.06


@pytest.mark.parametrize("kind", ["cosine", "trapezoid"])
def test_a_run_by_the_clock_warms_up_by_steps(kind: str) -> None:
    schedule = build_schedule(Settings(schedule=kind, cooldown=0.5), None)
    # Counting, evaluating and compiling may take more than a share of the time.
    rates = [schedule.factor(0.1, step) / schedule.factor(0.1, 1000) for step in (1, 25, 50, 51)]
    assert rates == pytest.approx([0.02, 0.5, 1.0, 1.0])
    assert schedule.factor(1.0, 10) == 0.0  # a time that is over after ten steps


@pytest.mark.parametrize("kind", ["cosine", "trapezoid"])
def test_a_warm_up_as_long_as_the_run_divides_by_nothing(kind: str) -> None:
    assert rates(Settings(schedule=kind, learning_rate=1.0, warmup_iters=5), 5) == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0]
    )
    assert rates(Settings(schedule=kind, learning_rate=1.0, warmup_iters=0), 1) == [0.0]


@pytest.fixture
def make_model() -> Callable[[], BertForMaskedLM]:
    def make() -> BertForMaskedLM:
        config = preset_config(
            "seed",
            "mini",
            70,
            max_position_embeddings=8,
            pad_token_id=0,
            hidden_size=16,
            num_hidden_layers=2,
            dropout=0,
        )
        return BertForMaskedLM(config, torch.Generator().manual_seed(0))

    return make


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_matrices_decay(make_model: Callable[[], BertForMaskedLM], optimizer: str, dtype: torch.dtype) -> None:
    model = make_model()
    built = build_optimizers(model, Settings(optimizer=optimizer, weight_decay=0.3), CPU, dtype)
    decays = {p: group["weight_decay"] for one in built for group in one.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[parameter] == (0.3 if parameter.ndim == 2 else 0.0), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_muon_takes_the_matrices_of_the_encoder_and_nothing_else(
    make_model: Callable[[], BertForMaskedLM], dtype: torch.dtype
) -> None:
    model = make_model()
    adamw, muon = build_optimizers(model, Settings(optimizer="muon", muon_learning_rate=0.05), CPU, dtype)
    assert isinstance(muon, Muon)
    assert muon.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    taken = {p for group in muon.param_groups for p in group["params"]}
    names = {name.split(".", 3)[3] for name, p in model.named_parameters() if p in taken}
    assert names == {
        "attention.qkv_proj.weight",
        "attention.out_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }
    assert len(taken) == 8
    assert set_learning_rate([adamw, muon], 0.5) == pytest.approx(5e-4)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.025)
    assert [type(one) for one in build_optimizers(model, Settings(), CPU, dtype)] == [torch.optim.AdamW]


def iterated(s: Tensor, polynomials: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ_FP32) -> Tensor:
    """What the iteration makes of singular values."""
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return s


def test_the_iteration_takes_singular_values_near_one() -> None:
    s = iterated(torch.logspace(math.log10(0.003), 0, 1000, dtype=torch.float64))
    assert 0.79 < s.min() < s.max() < 1.21


@pytest.mark.parametrize("shape", [(24, 8), (8, 8), (8, 22)])
def test_orthogonalizing_on_gram_matrices_is_the_iteration_of_newton_and_schulz(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = iterated(s / (1.01 * s.norm()))
    assert s.max() < 1.21
    (found,) = orthogonalize(matrix[None])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), u * s @ v, atol=5e-5, rtol=0)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_orthogonalizing_leaves_what_a_gradient_does_not_say_near_zero(rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(64, rank, generator=generator) @ torch.randn(rank, 16, generator=generator)
    values = torch.linalg.svdvals(orthogonalize(matrix[None]))[0]
    assert (values[:rank] > 0.5).all()
    assert (values[rank:] < 1e-3).all()


@pytest.mark.parametrize("shape", [(64, 16), (16, 16), (16, 44)])
@pytest.mark.parametrize(("falls_to", "off"), [(1.0, 0.03), (1e-2, 0.08), (1e-6, 0.4)])
def test_orthogonalizing_in_bf16_never_runs_away(shape: tuple[int, int], falls_to: float, off: float) -> None:
    generator = torch.Generator().manual_seed(1)
    u, s, v = torch.linalg.svd(torch.randn((5, *shape), generator=generator), full_matrices=False)
    s = torch.logspace(0, math.log10(falls_to), s.shape[1]).expand_as(s)
    found = orthogonalize((u * s[:, None] @ v).bfloat16())
    values = torch.linalg.svdvals(found.float())
    assert values.max() < 1.3
    assert values[:, 0].min() > 0.6
    expected = u * iterated(s / (1.01 * s.norm(dim=1, keepdim=True)), NEWTON_SCHULZ_BF16)[:, None] @ v
    assert (found - expected).norm() < off * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_goes_where_torchs_goes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("bertling.optim.NEWTON_SCHULZ_FP32", NEWTON_SCHULZ_BF16)  # torch has these only
    generator = torch.Generator().manual_seed(1)
    shapes = (24, 8), (8, 8), (8, 22), (24, 8)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    begin = [weight.detach().clone() for weight in ours]
    optimizers = [
        Muon(ours, lr=0.1, momentum=0.95, weight_decay=0.5, dtype=dtype),
        torch.optim.Muon(theirs, lr=0.1, momentum=0.95, weight_decay=0.5),
    ]
    for _ in range(10):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, was in zip(ours, theirs, begin, strict=True):
        assert (one - other).norm() < 0.02 * (other - was).norm()  # torch's rounds to bf16's 8 bits


def train(model: BertForMaskedLM, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(5, 70, (4, 8), generator=generator)
        model(ids, labels=ids).loss_sum.backward()
        set_learning_rate(optimizers, 1 / (step + 1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_was_packed_goes_on_bit_equal(
    make_model: Callable[[], BertForMaskedLM], optimizer: str, fused: bool, dtype: torch.dtype
) -> None:
    settings = Settings(optimizer=optimizer, fused_adamw=fused)
    whole = make_model()
    optimizers = build_optimizers(whole, settings, CPU, dtype)
    train(whole, optimizers, range(3))
    weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    packed = {name: tensor.clone() for name, tensor in pack_state(optimizers).items()}
    train(whole, optimizers, range(3, 6))

    resumed = make_model()
    resumed.load_state_dict(weights)
    again = build_optimizers(resumed, settings, CPU, dtype)
    unpack_state(again, packed)
    assert {name: tensor.tolist() for name, tensor in pack_state(again).items()} == {
        name: tensor.tolist() for name, tensor in packed.items()
    }
    train(resumed, again, range(3, 6))
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_a_state_of_other_parameters_is_refused(make_model: Callable[[], BertForMaskedLM]) -> None:
    model = make_model()
    optimizers = build_optimizers(model, Settings(), CPU, torch.float32)
    train(model, optimizers, range(1))
    packed = pack_state(optimizers)
    last = max(int(key.split(".")[1]) for key in packed)
    fewer = {key: value for key, value in packed.items() if key.split(".")[1] != str(last)}
    with pytest.raises(ValueError, match=f"state of {last} parameters for {last + 1}"):
        unpack_state(optimizers, fewer)
    name = next(key for key, value in packed.items() if value.ndim)
    _, place, entry = name.split(".")
    with pytest.raises(ValueError, match=rf"{entry} of parameter {place} has the shape \[1, 2\]"):
        unpack_state(optimizers, packed | {name: torch.zeros(1, 2)})


@pytest.mark.parametrize("largest", [0.5, 1e3])
def test_gradients_are_clipped_as_torch_does_it(largest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((40, 30), (7,), (1, 1))]
    ours, theirs = ([torch.nn.Parameter(torch.zeros_like(one)) for one in gradients] for _ in range(2))
    for parameters in ours, theirs:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
    frozen = torch.nn.Parameter(torch.ones(3))
    norm = clip_gradients([*ours, frozen], largest)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, largest))
    for mine, other, before in zip(ours, theirs, gradients, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad)
        assert torch.equal(mine.grad, before) == (largest > norm)
    assert clip_gradients([frozen], largest) == 0


def test_a_gradient_that_is_not_finite_is_told_by_its_norm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    for wrong in float("nan"), float("inf"):
        parameter.grad = torch.tensor([1.0, wrong, 0.0, 0.0])
        assert not clip_gradients([parameter], 1.0).isfinite()
