"""The training loop: it is given a task and never asks which one it is."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from bertling.batches import Batch
from bertling.checkpoint import TrainingState, save_checkpoint
from bertling.distributed import Ranks
from bertling.files import BertlingError, write_json
from bertling.illustrate import to_svg
from bertling.model import BertEncoder
from bertling.optim import build_optimizers, build_schedule, pack_state, set_learning_rate, unpack_state
from bertling.runlog import RunLog
from bertling.runtime import Runtime, step_seed
from bertling.settings import Settings
from bertling.tasks import Task
from bertling.tokenizer import Tokenizer

EVALUATIONS = 10
"""How often a run is evaluated that says nothing about it."""
LOG_POINTS = 200
"""How many points of the training loss a run of known length logs."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Path
    step: int
    seconds: float
    metrics: dict[str, float]
    best_accuracy: float
    best_step: int
    finished: bool
    """False when it was asked to stop early."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within this context SIGINT and SIGTERM ask for a clean stop; a second one ends the process at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked = True

    numbers = (signal.SIGINT, signal.SIGTERM)
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


def total_steps(settings: Settings, task: Task) -> int | None:
    """The step at which the run ends; None when only the clock ends it."""
    limits = [] if settings.max_iters is None else [settings.max_iters]
    if settings.epochs is not None:
        limits.append(max(1, math.ceil(settings.epochs * task.steps_per_epoch)))
    if limits:
        return min(limits)
    if settings.max_minutes is not None:
        return None
    return 10_000 if settings.task_type == "mlm" else max(1, math.ceil(3 * task.steps_per_epoch))


class Trainer:
    """One run of one task: the loop and what it carries from step to step."""

    def __init__(
        self,
        task: Task,
        model: BertEncoder,
        tokenizer: Tokenizer,
        settings: Settings,
        runtime: Runtime,
        ranks: Ranks,
        run: Path,
        *,
        state: TrainingState | None = None,
    ) -> None:
        self.task, self.model, self.tokenizer, self.settings = task, model, tokenizer, settings
        self.runtime, self.ranks, self.run = runtime, ranks, run
        self.total_steps = total_steps(settings, task)
        model.to(runtime.device)  # before the optimizers, whose state lies where the weights lie
        self.optimizers = build_optimizers(model, settings, runtime.device)
        self.schedule = build_schedule(settings, self.total_steps)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        share = -(-settings.batch_size // ranks.world_size)
        self.micro_batch_size = min(share, settings.micro_batch_size or share)
        self.step, self.seconds, self.turn = 0, 0.0, 0
        self.best_accuracy, self.best_step = -1.0, 0
        self.evaluated_step, self.saved_step = -1, -1
        self.metrics: dict[str, float] = {}
        self.recent_losses: list[Tensor] = []
        if state is not None:
            self.restore(state)

    def train(self) -> Outcome:
        """Train to the end of the budget, or until a signal asks to stop; both leave a checkpoint behind."""
        self.model.train()
        if self.runtime.compile:
            self.model.compile()
        with stop_requests() as stop, self.open_log() as log:
            self.started = time.perf_counter() - self.seconds
            if self.step == 0:
                self.evaluate(log)
            progress = self.progress()
            while progress < 1.0 and not self.ranks.any(stop()):  # all stop at the same step, or all hang
                loss = self.train_step(progress)
                self.step += 1
                self.log_step(log, loss)
                previous, progress = progress, self.progress()
                evaluate, save = self.due(previous, progress)
                if evaluate:
                    self.evaluate(log)
                if save or self.best_step == self.step:
                    self.save()
            return self.finish(log, done=progress >= 1.0)

    def clock(self) -> float:
        """Seconds of training so far, those before a resume among them; evaluations and checkpoints count."""
        self.seconds = time.perf_counter() - self.started
        return self.seconds

    def progress(self) -> float:
        """From 0 to 1 over the run: steps or time, whichever is further."""
        by_steps = 0.0 if self.total_steps is None else self.step / self.total_steps
        budget = self.settings.max_minutes
        # The first process's clock counts for all of them.
        by_time = 0.0 if budget is None else self.ranks.from_first([self.clock() / (60 * budget)])[0]
        return max(by_steps, by_time)

    def train_step(self, progress: float) -> Tensor:
        """One optimizer step over the global batch; returns this process's share of its mean loss."""
        # The rate of a step is that of its end, so that the first one is not spent at rate zero.
        ahead = 0.0 if self.total_steps is None else 1 / self.total_steps
        self.learning_rate = set_learning_rate(self.optimizers, self.schedule.factor(min(progress + ahead, 1.0)))
        torch.manual_seed(step_seed(self.settings.seed, self.step, self.ranks.rank))
        batches, count = self.task.micro_batches(
            self.step, rank=self.ranks.rank, world_size=self.ranks.world_size, micro_batch_size=self.micro_batch_size
        )
        self.tokens = sum(tokens_in(batch) for batch in batches) * self.ranks.world_size
        losses = []
        for batch in batches:
            on_device = batch.to(self.runtime.device, non_blocking=self.settings.async_to_device)
            with self.runtime.autocast():
                # A sum over a count of the *global* batch: micro-batches and processes then add up to one big batch.
                loss = self.task.loss(self.model, on_device) / max(count, 1)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        self.ranks.sum_gradients(self.model)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        # The scaler judges each optimizer by its own gradients; one overflow has to skip the step of all of them.
        skip = self.scaler.is_enabled() and not torch.isfinite(norm)
        for optimizer in self.optimizers:
            if not skip:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return torch.stack(losses).sum()

    def due(self, previous: float, progress: float) -> tuple[bool, bool]:
        """Whether to evaluate and to save now: at the intervals asked for, else whenever a tenth of the run is over."""
        if progress >= 1.0:
            return False, False  # the end of the run does both
        interval, every = self.settings.val_interval, self.settings.save_every
        tenth = math.floor(EVALUATIONS * progress) > math.floor(EVALUATIONS * previous)
        evaluate = tenth if interval is None else self.step % interval == 0
        return evaluate, evaluate if every is None else self.step % every == 0

    def log_step(self, log: RunLog, loss: Tensor) -> None:
        """Note a step; its loss is fetched from the device only now and then, since that waits for the device."""
        self.recent_losses.append(loss)
        every = 10 if self.total_steps is None else max(1, self.total_steps // LOG_POINTS)
        mean = None
        if self.step % every == 0 or self.step == self.total_steps:
            mean = float(self.ranks.sum(torch.stack(self.recent_losses).mean()))
            self.recent_losses.clear()
            if not math.isfinite(mean):
                raise BertlingError(
                    f"{self.run}: the loss is not finite any more at step {self.step:,}; the last checkpoint is whole: "
                    "lower learning-rate (or muon-learning-rate), or raise warmup-iters"
                )
        log.train_step(self.step, loss=mean, learning_rate=self.learning_rate, tokens=self.tokens, seconds=self.clock())

    def evaluate(self, log: RunLog) -> None:
        """Score the whole validation set, and show an example; the latest one is kept as a picture too."""
        metrics = self.task.evaluate(self.model, self.runtime, self.ranks)
        # What the first process saw holds for all: a rounding elsewhere must not make another step the best.
        self.metrics = dict(zip(metrics, self.ranks.from_first(list(metrics.values())), strict=True))
        if self.step and self.metrics["eval/accuracy"] > self.best_accuracy:
            self.best_accuracy, self.best_step = self.metrics["eval/accuracy"], self.step
        log.evaluation(self.step, {**self.metrics, **self.task.floors}, seconds=self.clock())
        self.evaluated_step = self.step
        if self.ranks.first and (example := self.task.illustrate(self.model, self.runtime, self.turn)):
            log.illustration(example.plain, example.colour)
            to_svg(example, self.run / "example.svg")
        self.turn += 1

    def save(self) -> None:
        """Write a checkpoint; it is the best one if the evaluation of this very step was the best so far."""
        self.saved_step = self.step
        if self.ranks.first:
            save_checkpoint(
                self.run / "checkpoints",
                self.step,
                self.model,
                self.tokenizer,
                self.state(),
                best=self.best_step == self.step,
                keep=self.settings.max_checkpoints,
            )
        self.ranks.wait()

    def state(self) -> TrainingState:
        """What a resume needs. Order, masks and dropout follow from the step; nothing else is random."""
        numbers = {
            "step": self.step,
            "seconds": self.clock(),
            "best_accuracy": self.best_accuracy,
            "best_step": self.best_step,
            "turn": self.turn,
            "metrics": self.metrics,
            "scaler": self.scaler.state_dict(),
            "settings": self.settings.to_ini(),
        }
        return TrainingState(numbers, pack_state(self.optimizers))

    def restore(self, state: TrainingState) -> None:
        """Go on from a saved state."""
        try:
            numbers = state.numbers
            self.step, self.seconds = int(numbers["step"]), float(numbers["seconds"])
            self.best_accuracy, self.best_step = float(numbers["best_accuracy"]), int(numbers["best_step"])
            self.turn, self.metrics = int(numbers["turn"]), dict(numbers["metrics"])
            if self.scaler.is_enabled() and numbers["scaler"]:
                self.scaler.load_state_dict(numbers["scaler"])
            unpack_state(self.optimizers, state.tensors)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BertlingError(
                f"{self.run}: its training state does not fit these settings ({error!r}); start a new run from its "
                "weights with --cp and a new --run-id"
            ) from error

    def open_log(self) -> RunLog:
        """The run's log; on all processes but the first it does nothing."""
        return RunLog(
            self.run,
            total_steps=self.total_steps,
            total_minutes=self.settings.max_minutes,
            start_step=self.step,
            start_seconds=self.seconds,
            wandb=self.settings.wandb,
            run_name=self.settings.case or self.run.name,
            settings=vars(self.settings),
            enabled=self.ranks.first,
        )

    def finish(self, log: RunLog, *, done: bool) -> Outcome:
        """Evaluate (unless stopped), save, and say how it went."""
        if done and self.evaluated_step != self.step:
            self.evaluate(log)
        if self.saved_step != self.step:
            self.save()
        if self.ranks.first:
            write_json(self.run / "run.json", {"task": self.settings.task_type, "finished": done})
            if not done:
                log.line(f"stopped at step {self.step:,}, and saved; go on with --cp {self.run}")
        return Outcome(self.run, self.step, self.clock(), self.metrics, self.best_accuracy, self.best_step, done)


def tokens_in(batch: Batch) -> int:
    """Tokens of a batch without padding."""
    return batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())
