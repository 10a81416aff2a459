"""How long a run lasts, and when it evaluates and saves: pure functions of its steps and its seconds."""

import math
from typing import NamedTuple

from bertling.settings import Settings

DEFAULT_EPOCHS = 3
"""Of a fine-tuning that says nothing of how long it lasts."""
EVALUATIONS = 10
"""How often a run is evaluated that says nothing about it."""


class Moment(NamedTuple):
    """Where a run stands."""

    step: int
    seconds: float
    progress: float
    """From 0 to 1 over the run, in steps or in time, whichever is further."""


def total_steps(settings: Settings, steps_per_epoch: float) -> int | None:
    """The step at which the run ends; None when only the clock ends it."""
    limits = [] if settings.max_iters is None else [settings.max_iters]
    epochs = epochs_of(settings)
    if epochs is not None:
        limits.append(max(1, math.ceil(epochs * steps_per_epoch)))
    if limits:
        return min(limits)
    return None if settings.max_minutes is not None else 10_000


def epochs_of(settings: Settings) -> float | None:
    """The epochs after which the run ends: those asked for, or the usual ones of a fine-tuning without any limit."""
    unlimited = settings.max_iters is None and settings.max_minutes is None and settings.task_type != "mlm"
    return DEFAULT_EPOCHS if settings.epochs is None and unlimited else settings.epochs


def moment(settings: Settings, total: int | None, step: int, seconds: float) -> Moment:
    """Where a run of `total` steps (None: by the clock alone) stands after `step` and `seconds`."""
    by_steps = 0.0 if total is None else step / total
    by_time = 0.0 if settings.max_minutes is None else seconds / (60 * settings.max_minutes)
    return Moment(step, seconds, max(by_steps, by_time))


def needs_clock(settings: Settings) -> bool:
    """Whether anything in the run depends on the time."""
    return settings.max_minutes is not None or settings.save_minutes is not None


def due(settings: Settings, before: Moment, now: Moment) -> tuple[bool, bool]:
    """Whether an evaluation and a save fell due between two moments: at the intervals asked for, else at each tenth.

    At the end neither is: the end of the run does both.
    """
    if now.progress >= 1.0:
        return False, False
    tenth = math.floor(EVALUATIONS * now.progress) > math.floor(EVALUATIONS * before.progress)

    def passed(interval: int) -> bool:
        return now.step // interval > before.step // interval

    evaluate = tenth if settings.val_interval is None else passed(settings.val_interval)
    if settings.save_steps is not None:
        return evaluate, passed(settings.save_steps)
    if settings.save_minutes is not None:
        every = 60 * settings.save_minutes
        return evaluate, math.floor(now.seconds / every) > math.floor(before.seconds / every)
    return evaluate, evaluate
