"""The training loop: it is given a task and never asks which one it is."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertling import optim
from bertling.batches import Batch
from bertling.budget import Moment, due, moment, needs_clock, total_steps
from bertling.checkpoint import TrainingState, go_back_to, load_checkpoint, load_state, newest_intact, save_checkpoint
from bertling.distributed import Ranks
from bertling.faults import floor_warning, is_out_of_memory, not_finite_again, stays_on_the_floor, stop_requests
from bertling.files import BertlingError, is_of_disk, skipped_where_disk_fails, write_json
from bertling.illustrate import to_svg
from bertling.int8 import rows_that_fit, use_int8
from bertling.model import BertEncoder
from bertling.runlog import RunLog
from bertling.runs import Outcome, record
from bertling.runtime import Runtime, keep_freed_memory, step_seed
from bertling.settings import Settings
from bertling.tasks import Task
from bertling.tokenizer import Tokenizer

LOG_POINTS = 200
"""How many points of the training loss a run of known length logs."""
BAD_STEPS, LOWER_RATE = 5, 0.5
"""So many steps in a row without a finite loss and gradient send the run back, to go on at this share of the rate."""
FAILED_SAVES, RETRY_SECONDS = 3, 10
"""So many checkpoints in a row that the disk refused end the run; at its end, a new try every so many seconds."""


class Trainer:
    """One run of one task: the loop and what it carries from step to step; its log begins with what was `told`."""

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
        told: Sequence[str] = (),
    ) -> None:
        self.task, self.model, self.tokenizer, self.settings = task, model, tokenizer, settings
        self.runtime, self.ranks, self.run, self.told = runtime, ranks, run, told
        self.total_steps = total_steps(settings, task.steps_per_epoch)
        if runtime.device.type == "cpu":
            keep_freed_memory()
        model.to(runtime.device)  # before the optimizers, whose state lies where the weights lie
        use_int8(model, optim.HIDDEN if runtime.int8 else ())
        self.optimizers = optim.build_optimizers(model, settings, runtime.device, runtime.dtype)
        self.schedule = optim.build_schedule(settings, self.total_steps)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        share = -(-settings.batch_size // ranks.world_size)
        limit = rows_that_fit(settings.seq_len) if runtime.int8 else share
        self.micro_batch_size = min(share, settings.micro_batch_size or share, limit)
        self.step, self.seconds, self.examples_shown = 0, 0.0, 0
        self.started = time.perf_counter()  # as if it had been one go: `train` moves it back by earlier seconds
        self.drawn: dict[tuple[int, int], tuple[list[Batch], int]] = {}
        self.saved_best = self.best_accuracy, self.best_step = -1.0, 0  # of the last checkpoint, and so far
        self.evaluated_step, self.saved_step, self.failed_saves, self.warned = -1, -1, 0, False
        self.metrics: dict[str, float] = {}
        self.recent_losses: list[Tensor] = []
        self.tokens, self.learning_rate, self.rate_factor, self.skipped_steps = 0, 0.0, 1.0, 0
        self.bad_steps: list[dict[str, Any]] = []  # the latest ones in a row
        self.notices: list[str] = []
        if state is not None:
            self.restore(state)

    def train(self) -> Outcome:
        """Train to the end of the budget, or until a signal asks to stop; both leave a checkpoint behind."""
        self.model.train()
        if self.runtime.compile:
            self.model.compile()
        with stop_requests() as stop, self.open_log() as log:
            if self.ranks.first:  # not before: a training that could not be set up leaves the run as it was
                record(self.run, self.settings, finished=False)
                go_back_to(self.run / "checkpoints", self.step, self.best_step)
            self.started = time.perf_counter() - self.seconds
            if self.evaluated_step < 0:
                self.evaluate(log, 0.0)
                self.save(log)  # from here on a killed run can be resumed
            now = done_to = self.moment()  # evaluations and checkpoints that were due up to `done_to` are done
            while now.progress < 1.0 and not self.ranks.any(stop()):  # all stop at the same step, or all hang
                loss = self.train_step(now.progress)
                self.step += 1
                self.log_step(log, loss)
                if len(self.bad_steps) >= BAD_STEPS:
                    self.go_back(log)
                    now = done_to = self.moment()
                    continue
                now = self.moment()
                if self.bad_steps:
                    continue  # what is due waits for a good step
                evaluate, save = due(self.settings, done_to, now)
                done_to = now
                if evaluate:
                    self.evaluate(log, now.progress)
                if (save or self.best_step == self.step) and self.saved_step != self.step:
                    self.save(log)
            return self.finish(log, stop, done=now.progress >= 1.0)

    def clock(self) -> float:
        """Seconds of training so far, those before a resume among them; evaluations and checkpoints count."""
        self.seconds = time.perf_counter() - self.started
        return self.seconds

    def moment(self) -> Moment:
        """Where the run stands; one clock counts for all processes."""
        seconds = self.ranks.from_first([self.clock()])[0] if needs_clock(self.settings) else self.clock()
        return moment(self.settings, self.total_steps, self.step, seconds)

    def train_step(self, progress: float) -> Tensor:
        """One optimizer step over the global batch; returns this process's share of the batch's mean loss."""
        # Each step has the schedule's rate at its end, so that the first one is not spent at rate zero.
        ahead = 0.0 if self.total_steps is None else 1 / self.total_steps
        factor = self.rate_factor * self.schedule.factor(min(progress + ahead, 1.0), self.step + 1)
        self.learning_rate = optim.set_learning_rate(self.optimizers, factor)
        loss = self.backward()
        self.ranks.sum_gradients(self.model)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = optim.clip_gradients(self.parameters, self.settings.grad_clip)
        # The scaler judges each optimizer by its own gradients; one overflow has to skip the step of all of them.
        finite = not self.ranks.any(not torch.isfinite(loss + norm))
        for optimizer in self.optimizers:
            if finite:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        if finite:
            self.bad_steps.clear()
        else:
            self.note_skipped(loss, norm)
        self.scaler.update()
        return loss

    def backward(self) -> Tensor:
        """Gradients of this process's share of the batch, micro-batch by micro-batch; returns the loss's share.

        Where a GPU's memory does not hold a micro-batch, it is halved from then on; the gradient stays the same.
        """
        while True:
            try:
                return self.backward_at(self.micro_batch_size)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.micro_batch_size == 1:
                    raise
            # Out of the except block, whose traceback would hold on to the memory.
            self.model.zero_grad(set_to_none=True)
            if self.runtime.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batch_size = -(-self.micro_batch_size // 2)
            self.notices.append(
                f"note: out of GPU memory: micro-batches of {self.micro_batch_size} rows from here on, for the same "
                "gradient; give --micro-batch-size next time"
            )

    def backward_at(self, micro_batch_size: int) -> Tensor:
        """The same with micro-batches of this size."""
        torch.manual_seed(step_seed(self.settings.seed, self.step, self.ranks.rank))
        batches, count = self.draw(self.step, micro_batch_size)
        tokens, scored = sum(batch.tokens for batch in batches), sum(batch.count for batch in batches)
        self.tokens = round(tokens * count / max(scored, 1))  # of all processes, in proportion
        losses = []
        for batch in batches:
            on_device = batch.to(self.runtime.device, non_blocking=self.settings.async_to_device)
            with self.runtime.autocast():
                # A sum over a count of the *global* batch: micro-batches and processes then add up to one big batch.
                loss = self.task.loss(self.model, on_device) / max(count, 1)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        if self.runtime.device.type == "cuda":  # it is still computing: what it needs next is drawn meanwhile
            self.draw(self.step + 1, micro_batch_size)
        return torch.stack(losses).sum()

    def draw(self, step: int, size: int) -> tuple[list[Batch], int]:
        """This process's micro-batches of a step, and what is scored in all; kept until another step is asked for."""
        if (step, size) not in self.drawn:
            rank, world_size = self.ranks.rank, self.ranks.world_size
            batches = self.task.micro_batches(step, rank=rank, world_size=world_size, micro_batch_size=size)
            self.drawn = {(step, size): batches}
        return self.drawn[step, size]

    def note_skipped(self, loss: Tensor, norm: Tensor) -> None:
        """Count a step that was not made, unless the scaler is only looking for its scale."""
        if not self.ranks.any(not torch.isfinite(loss)) and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return
        self.skipped_steps += 1
        seen = {
            "step": self.step + 1,
            "batch": self.step,
            "loss": str(float(loss)),
            "gradient_norm": str(float(norm)),
            "learning_rate": self.learning_rate,
            "rows": self.task.rows(self.step),
        }
        self.bad_steps.append(seen)
        self.notices.append(
            f"warning: step {self.step + 1:,} was skipped: loss {seen['loss']}, gradient norm {seen['gradient_norm']}"
        )

    def go_back(self, log: RunLog) -> None:
        """Back to the last good checkpoint, once, to go on at a lower rate; the second time the run ends."""
        report = self.run / "nonfinite.json"
        if self.ranks.first:
            with skipped_where_disk_fails():
                write_json(report, {"seed": self.settings.seed, "steps": self.bad_steps})
        what = f"no finite loss and gradient in steps {self.bad_steps[0]['step']:,} to {self.bad_steps[-1]['step']:,}"
        if self.rate_factor < 1.0:
            raise BertlingError(f"{self.run}: {not_finite_again(what, self.rate_factor, report, self.saved_step)}")
        checkpoint, _ = newest_intact(self.run / "checkpoints")
        state = load_state(checkpoint)
        assert state is not None  # its manifest names it
        self.model.load_state_dict(load_checkpoint(checkpoint).model.state_dict())
        skipped = self.skipped_steps
        self.restore(state)
        self.skipped_steps, self.rate_factor = skipped, LOWER_RATE
        self.bad_steps = []
        log.go_back(
            self.step,
            f"warning: {what} ({report}): back to step {self.step:,}, "
            f"and on at {self.rate_factor:g} times the learning rate",
        )

    def log_step(self, log: RunLog, loss: Tensor) -> None:
        """Note a step; its loss is fetched from the device only now and then, since that waits for the device."""
        while self.notices:
            log.line(self.notices.pop(0))
        if not self.bad_steps:
            self.recent_losses.append(loss)
        every = 10 if self.total_steps is None else max(1, self.total_steps // LOG_POINTS)
        mean = None
        if self.step % every == 0 or self.step == self.total_steps:
            losses = self.recent()
            mean = float(losses.mean()) if len(losses) else None
            self.recent_losses.clear()
        log.train_step(self.step, loss=mean, learning_rate=self.learning_rate, tokens=self.tokens, seconds=self.clock())

    def recent(self) -> Tensor:
        """The loss of each step since the last that was logged, over all processes."""
        return self.ranks.sum(torch.stack(self.recent_losses)) if self.recent_losses else torch.zeros(0)

    def evaluate(self, log: RunLog, progress: float) -> None:
        """Score the whole validation set, and show an example; the latest one is kept as a picture too."""
        metrics = self.task.evaluate(self.model, self.runtime, self.ranks)
        # What the first process saw holds for all: a rounding elsewhere must not make another step the best.
        self.metrics = dict(zip(metrics, self.ranks.from_first(list(metrics.values())), strict=True))
        self.evaluated_step = self.step
        if self.step and self.sound() and self.metrics["eval/accuracy"] > self.best_accuracy:
            self.best_accuracy, self.best_step = self.metrics["eval/accuracy"], self.step
        log.evaluation(self.step, {**self.metrics, **self.task.floors}, seconds=self.clock())
        if self.ranks.first and (example := self.task.illustrate(self.model, self.runtime, self.examples_shown)):
            log.illustration(example.plain, example.colour)
            with skipped_where_disk_fails():
                to_svg(example, self.run / "example.svg")
        self.examples_shown += 1
        loss, floor = self.metrics["eval/loss"], self.task.floors.get("floor_loss/unigram")
        if floor and not self.warned and stays_on_the_floor(self.step, progress, loss, floor):
            self.warned = True
            rate, skipped = self.rate_factor * self.settings.learning_rate, self.skipped_steps
            log.line(floor_warning(progress, loss, floor, self.schedule, rate, skipped, self.task.suspects()))

    def sound(self) -> bool:
        """Whether all weights are finite, and the loss on the validation set too, where this step was evaluated."""
        loss = self.metrics["eval/loss"] if self.evaluated_step == self.step else 0.0
        return math.isfinite(loss) and all(bool(weight.isfinite().all()) for weight in self.parameters)

    def save(self, log: RunLog) -> None:
        """Write a checkpoint; it is the best one if the evaluation of this very step was the best so far.

        A disk that is full, or fails, does not end the run: the checkpoint before is whole, and the next may succeed.
        Weights that ran away are not written: the steps that follow send the run back to those before.
        """
        if not self.sound():
            if self.saved_step < 0:
                raise BertlingError(f"{self.run}: the weights that it starts from give no finite loss; take others")
            return
        recent, trouble = self.recent().tolist(), None
        if self.ranks.first:
            try:
                save_checkpoint(
                    self.run / "checkpoints",
                    self.step,
                    self.model,
                    self.tokenizer,
                    self.state(recent),
                    best=self.best_step in (0, self.step),  # until one was evaluated, the last is the best there is
                    keep=self.settings.max_checkpoints,
                )
            except BertlingError as error:
                if not is_of_disk(error):
                    raise
                trouble = error
        if not self.ranks.any(trouble is not None):
            self.saved_step, self.failed_saves = self.step, 0
            self.saved_best = self.best_accuracy, self.best_step
            return
        if self.saved_step < 0:
            raise BertlingError(str(trouble or f"{self.run}: its first checkpoint could not be written")) from trouble
        self.failed_saves += 1
        self.best_accuracy, self.best_step = self.saved_best  # what could not be kept is no best
        if self.failed_saves == FAILED_SAVES:
            raise BertlingError(
                f"{self.run}: stopped at step {self.step:,}: {self.failed_saves} checkpoints in a row could not be "
                f"written ({trouble or 'by the first process'}); the one of step {self.saved_step:,} is whole: see to "
                f"the disk, then go on with --cp {self.run}"
            )
        log.line(f"warning: step {self.step:,} could not be saved ({trouble}); the checkpoint before it is whole")

    def state(self, recent_losses: list[float]) -> TrainingState:
        """What a resume needs. Order, masks and dropout follow from the step; nothing else is random."""
        numbers = {
            "step": self.step,
            "seconds": self.clock(),
            "best_accuracy": self.best_accuracy,
            "best_step": self.best_step,
            "turn": self.examples_shown,
            "evaluated_step": self.evaluated_step,
            "metrics": self.metrics,
            "recent_losses": recent_losses,
            "rate": self.rate_factor,
            "skipped_steps": self.skipped_steps,
            "scaler": self.scaler.state_dict(),
            "settings": self.settings.to_ini(),
            "data": self.task.data,
        }
        return TrainingState(numbers, optim.pack_state(self.optimizers))

    def restore(self, state: TrainingState) -> None:
        """Go on from a saved state."""
        try:
            numbers = state.numbers
            state.check_data(self.run, self.task.data)
            self.step, self.seconds = int(numbers["step"]), float(numbers["seconds"])
            self.best_accuracy, self.best_step = float(numbers["best_accuracy"]), int(numbers["best_step"])
            self.saved_best, self.saved_step = (self.best_accuracy, self.best_step), self.step
            self.examples_shown, self.metrics = int(numbers["turn"]), dict(numbers["metrics"])
            self.evaluated_step = int(numbers["evaluated_step"])
            self.rate_factor, self.skipped_steps = float(numbers["rate"]), int(numbers["skipped_steps"])
            # Sums over all processes: the first one has them, for the others nothing is left to add.
            losses = torch.tensor(numbers["recent_losses"], dtype=torch.float32, device=self.runtime.device)
            self.recent_losses = list((losses if self.ranks.first else torch.zeros_like(losses)).unbind())
            if self.scaler.is_enabled() and numbers["scaler"]:
                self.scaler.load_state_dict(numbers["scaler"])
            optim.unpack_state(self.optimizers, state.tensors)
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
            opening=self.told,
            enabled=self.ranks.first,
        )

    def finish(self, log: RunLog, stop: Callable[[], bool], *, done: bool) -> Outcome:
        """Evaluate (unless stopped), save, and say how it went."""
        unsaved = self.saved_step != self.step
        if done and self.evaluated_step != self.step:
            self.evaluate(log, 1.0)
            unsaved = True
        if unsaved and not self.sound():
            raise BertlingError(
                f"{self.run}: no finite loss at step {self.step:,}; the checkpoint of step {self.saved_step:,} is "
                "whole: lower learning-rate (or muon-learning-rate), or raise warmup-iters"
            )
        best = self.best_accuracy, self.best_step
        while unsaved:
            self.best_accuracy, self.best_step = best  # a save that fails forgets it
            self.save(log)
            unsaved = self.failed_saves > 0
            if unsaved:
                time.sleep(RETRY_SECONDS)
        if self.ranks.first:
            record(self.run, self.settings, finished=done)
            if not done:
                log.line(f"stopped at step {self.step:,}, and saved; go on with --cp {self.run}")
        told = self.metrics, *best, done, self.skipped_steps, self.evaluated_step
        return Outcome(self.run, self.step, self.clock(), *told, stopped=self.ranks.any(stop()))
