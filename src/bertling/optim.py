"""Parameter groups, AdamW and Muon, and learning rates as pure functions of the progress of a run."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bertling.settings import Settings

HIDDEN = ("encoder.", "mlm_head.transform.", "pooler.")
"""Where the hidden matrices are, from vector to vector. Muon takes these; embeddings and scores have a row an entry."""
MOMENTUM = 0.95
FIRST_STEPS = 50
"""Warm-up of a run by the clock: a share of its time might be over before its first step."""
NEWTON_SCHULZ_BF16 = ((3.4445, -4.7750, 2.0315),) * 5
NEWTON_SCHULZ_FP32 = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)
"""a, b, c of each step of the iteration, which takes each singular value s to a s + b s^3 + c s^5.

In bf16 the one polynomial of Jordan et al. 2024, five times. In fp32 four of them that together take all between 0.003
and 1 to between 0.79 and 1.21, each as near to 1 as a polynomial of this form can take what the one before left (Amsel
et al. 2025). In bf16 four such steps learned a little less (docs/experiments.md).
"""


def build_optimizers(
    model: nn.Module, settings: Settings, device: torch.device, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the hidden matrices and AdamW for the rest.

    Weight decay acts on matrices only. Each group remembers its highest rate as `peak_lr`. Muon multiplies in
    bf16 where that is the run's `dtype`, else in fp32.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = {name for name, p in named if p.ndim == 2 and name.startswith(HIDDEN)}
    if settings.optimizer == "adamw":
        hidden = set()
    rest = [(name, p) for name, p in named if name not in hidden]
    groups = [
        {"params": [p for _, p in rest if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = settings.fused_adamw and device.type in {"cuda", "cpu"}
    rate = settings.learning_rate
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=rate, betas=(0.9, settings.adam_beta2), eps=1e-8, fused=fused
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        matrices = [p for name, p in named if name in hidden]
        muon_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(matrices, settings.muon_learning_rate, MOMENTUM, settings.weight_decay, muon_dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with Nesterov's momentum, for matrices alone; multiplies in `dtype`, bf16 or fp32.

    A gradient pulls a matrix mostly in the few directions that many tokens share. Muon brings all its singular values
    to one size, so that a step turns the matrix in the rare directions by as much as in the common ones.
    torch.optim.Muon does it in bf16 only; here it takes fewer and larger products (docs/experiments.md).
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; a parameter without a gradient is left alone."""
        for group in self.param_groups:
            rate = group["lr"]
            for weights in self.stacks(group["params"]):
                directions = [self.direction(weight, group["momentum"]) for weight in weights]
                updates = orthogonalize(torch.stack(directions))
                rows, columns = weights[0].shape
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - rate * group["weight_decay"])
                    weight.add_(update, alpha=-rate * math.sqrt(max(1, rows / columns)))

    def stacks(self, weights: list[Tensor]) -> list[list[Tensor]]:
        """Those with a gradient; in bf16 by shape: one product for all of a shape is faster there, not in fp32."""
        weights = [weight for weight in weights if weight.grad is not None]
        if self.dtype != torch.bfloat16:
            return [[weight] for weight in weights]
        stacks: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            stacks.setdefault(weight.shape, []).append(weight)
        return list(stacks.values())

    def direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Gradient and running mean as Nesterov mixes them, in `dtype`; remembers the mean."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean: Tensor = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum).to(self.dtype)


def orthogonalize(matrices: Tensor) -> Tensor:
    """[N, m, n] -> the same singular vectors, with all singular values near 1, save those near 0.

    Each step of the iteration multiplies X by a polynomial of its Gram matrix X X'. In bf16 that is what is done. In
    fp32 the polynomials are found first, on that small square matrix alone, and X is multiplied once, by their product:
    for the matrices of a transformer two thirds of the operations. But the Gram matrix holds the singular values
    squared: fp32 bears that, bf16 does not.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)  # not quite 1, beyond which polynomials run away
    if x.dtype == torch.bfloat16:
        for coefficients in NEWTON_SCHULZ_BF16:
            x = polynomial(x @ x.mT, *coefficients) @ x
    else:
        gram = x @ x.mT
        factor = product = polynomial(gram, *NEWTON_SCHULZ_FP32[0])
        for coefficients in NEWTON_SCHULZ_FP32[1:]:
            gram = factor @ (gram @ factor)  # the Gram matrix of factor @ X
            factor = polynomial(gram, *coefficients)
            product = factor @ product
        x = product @ x
    output: Tensor = x.mT if tall else x
    return output


def polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """What one step multiplies X by, a + b G + c G^2 of its Gram matrix G; [N, m, m] -> [N, m, m]."""
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


@dataclass(frozen=True)
class Schedule:
    """The learning rate's course. `progress` runs from 0 to 1 over the run, in steps or in time."""

    kind: str
    warmup: float
    """Share of the run in which the rate rises linearly."""
    decay_end: float
    """Progress at which the lowest rate is reached; it stays there."""
    floor: float
    """Lowest rate as a share of the highest."""
    cooldown: float
    """Trapezoid: share of the run, before decay_end, in which the rate falls linearly."""
    first_steps: int = 1
    """The step by which the rate has risen where only the clock ends the run: its first share goes to getting ready."""

    def factor(self, progress: float, step: int) -> float:
        """The share of the highest rate at this progress, in this step (the first one is 1)."""
        return self.course(progress) * min(1.0, step / self.first_steps)

    def course(self, progress: float) -> float:
        """The same without those first steps."""
        if progress < self.warmup:
            return progress / self.warmup
        if progress >= self.decay_end:
            return self.floor
        if self.kind == "cosine":
            done = (progress - self.warmup) / (self.decay_end - self.warmup)
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
        start = max(self.warmup, self.decay_end - self.cooldown)
        if progress <= start:
            return 1.0
        return 1 - (1 - self.floor) * (progress - start) / (self.decay_end - start)


def build_schedule(settings: Settings, total_steps: int | None) -> Schedule:
    """The schedule that the settings ask for; what they leave open follows from the length of the run.

    `total_steps` is None in a run that only the clock ends: beyond its first steps its schedule knows shares alone.
    """
    floor = (settings.min_learning_rate or 0.0) / settings.learning_rate
    if total_steps is None:
        return Schedule(settings.schedule, 0.0, 1.0, floor, settings.cooldown, FIRST_STEPS)
    default_warmup = 0.02 if settings.task_type == "mlm" else 0.06
    warmup = default_warmup if settings.warmup_iters is None else min(1.0, settings.warmup_iters / total_steps)
    end = 1.0 if settings.lr_decay_iters is None else min(1.0, settings.lr_decay_iters / total_steps)
    return Schedule(settings.schedule, min(warmup, end), end, floor, settings.cooldown)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> float:
    """Give every group its rate for the next step; returns AdamW's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return float(optimizers[0].param_groups[0]["lr"])


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients so that their common norm is at most `largest`; returns the norm that they had.

    What torch.nn.utils.clip_grad_norm_ does. That goes over all of them twice, on a CPU slowly; here once, by dot
    products, and again only where there is something to scale (docs/experiments.md).
    """
    gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
    if not gradients or gradients[0].device.type != "cpu":
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    norm = torch.stack([gradient.dot(gradient) for gradient in gradients]).sum().sqrt()
    if norm > largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def pack_state(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors of the optimizers under flat names, for a file that holds tensors only."""
    return {
        f"{number}.{index}.{name}": value
        for number, optimizer in enumerate(optimizers)
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def unpack_state(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `pack_state` back; raises ValueError where they are not those of these parameters."""
    for number, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(index), {})[name] = value
        if tensors and state.keys() != set(range(len(parameters))):
            raise ValueError(f"state of {len(state)} parameters for {len(parameters)}")
        for place, entries in state.items():
            for name, value in entries.items():
                if value.ndim and value.shape != parameters[place].shape:
                    raise ValueError(f"{name} of parameter {place} has the shape {list(value.shape)}")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
