"""Parameter groups, AdamW and Muon, and learning rates as pure functions of the progress of a run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bertling.settings import Settings

HIDDEN = ("encoder.", "mlm_head.transform.", "pooler.")
"""Where the matrices are that Muon takes: neither embeddings nor scores, whose rows stand each for itself."""


def build_optimizers(model: nn.Module, settings: Settings, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the hidden matrices and AdamW for the rest.

    Weight decay acts on matrices only. Each group remembers its highest rate as `peak_lr`.
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
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=settings.muon_learning_rate,
                momentum=0.95,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="original",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


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

    def factor(self, progress: float) -> float:
        """The share of the highest rate at this progress."""
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

    `total_steps` is None in a run that only the clock ends: steps have no place in its schedule, nor its settings.
    """
    default_warmup = 0.02 if settings.task_type == "mlm" else 0.06
    warmup = default_warmup if settings.warmup_iters is None else min(1.0, settings.warmup_iters / (total_steps or 1))
    end = 1.0 if settings.lr_decay_iters is None else min(1.0, settings.lr_decay_iters / (total_steps or 1))
    floor = (settings.min_learning_rate or 0.0) / settings.learning_rate
    return Schedule(settings.schedule, min(warmup, end), end, floor, settings.cooldown)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> float:
    """Give every group its rate for the next step; returns AdamW's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return float(optimizers[0].param_groups[0]["lr"])


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
