"""Signals that ask for a stop, and the search for what keeps a loss from falling."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from bertling.console import is_rank
from bertling.optim import Schedule

FLOOR_STEPS, FLOOR_PROGRESS = 200, 0.2
"""From this step on, and this share of the run, a loss on the floor is too long there."""
ON_THE_FLOOR = 0.98
"""A loss over this share of the floor has not left it."""
LOW_RATE = 1e-5
"""Below this highest rate, AdamW hardly moves fresh weights."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory was too small; Apple's has no exception of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "backend out of memory" in str(error)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within this context SIGINT, SIGTERM and SIGHUP ask for a clean stop; a second one ends the process at once.

    Not where a launcher watches over several processes: whoever stops all of them at once, as Ctrl-C and clusters do,
    would make it pass a second one on. It ends those that do not come to an end.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and not is_rank():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored, and so it stays
        numbers.append(signal.SIGHUP)
    try:
        before = [signal.signal(number, ask) for number in numbers]
    except ValueError:  # not in the main thread, where signals do not arrive
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def stays_on_the_floor(step: int, progress: float, loss: float, floor: float | None) -> bool:
    """Whether a loss is still that of a model without context, after a time in which every sound run has left it."""
    return floor is not None and step >= FLOOR_STEPS and progress >= FLOOR_PROGRESS and not loss < ON_THE_FLOOR * floor


def floor_warning(
    progress: float, loss: float, floor: float, schedule: Schedule, rate: float, skipped: int, data: list[str]
) -> str:
    """One line on a loss that does not leave its floor, with the likely causes; `data` are those found in the data."""
    causes = list(data)
    if progress < schedule.warmup:
        causes.append(f"the warm-up is not over: it takes {schedule.warmup:.0%} of the run; lower warmup-iters")
    elif rate < LOW_RATE:
        causes.append(f"learning-rate = {rate:g} is very low; raise it")
    elif not loss < floor + 0.3:
        causes.append(f"the loss lies over the floor: learning-rate = {rate:g} may be too high; lower it")
    if skipped:
        causes.append(f"{skipped:,} steps were skipped, because their gradients were not finite")
    found = "; ".join(causes) or (
        f"nothing odd was found in the rate, the warm-up, repeated rows, [UNK] and the masks; try another "
        f"learning-rate than {rate:g}"
    )
    return f"warning: loss {loss:.3f} is no better than the floor of {floor:.3f} (no context at all): {found}"


def not_finite_again(what: str, rate_factor: float, report: Path, saved_step: int) -> str:
    """One line on a run that ends because a lower rate did not help."""
    return (
        f"{what}, at {rate_factor:g} times the learning rate too; {report} holds what was seen, batch by batch; the "
        f"checkpoint of step {saved_step:,} is whole: lower learning-rate (or muon-learning-rate), raise warmup-iters, "
        "or look at these rows"
    )
