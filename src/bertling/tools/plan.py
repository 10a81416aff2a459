"""What a pre-training will take, before it is paid for: a few of its real steps, and what follows from them."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bertling.budget import EVALUATIONS, total_steps
from bertling.distributed import Ranks
from bertling.model import count_parameters
from bertling.optim import pack_state
from bertling.pretrain import fresh_model, load_start, masked_lm_task
from bertling.progress import clock
from bertling.runs import Start
from bertling.runtime import build_runtime
from bertling.settings import Settings
from bertling.tasks import evaluate_masked_lm
from bertling.tools.contestants import peak_memory, wait
from bertling.train import Trainer

Say = Callable[[str], None]
WARM_UP = 2
"""Steps before the first that counts; compiling falls into them."""
EVALUATED_ROWS, GPU_EVALUATED_ROWS = 256, 4096
"""A CUDA GPU has a few hundred done before they can be timed."""
SAVES_MORE = 1.05
"""Bytes of a checkpoint over those of its weights and the optimizer's state: the tokenizer, headers."""
MOST_EPOCHS = 4.0
"""Repeating a text up to about four times is nearly as good as new text (Muennighoff et al. 2023)."""
FEWEST_STEPS = 200
"""With fewer steps than this no run of ours was far above the unigram floor (docs/experiments.md)."""
FEWEST_TOKENS = 1.0
"""Tokens read for each parameter outside the embeddings: a twentieth of what made the best use of a budget in
Hoffmann et al. 2022 (for models that read from left to right)."""


@dataclass(frozen=True)
class Plan:
    """What to expect."""

    runtime: str
    parameters: int
    parameters_without_embeddings: int
    seconds_per_step: float
    slowest_step: float
    tokens_per_second: float
    getting_ready_seconds: float
    """Counting word vectors, and what the first steps take more than later ones (compiling)."""
    evaluation_seconds: float
    """One of them."""
    steps: int
    done: int
    """Steps that a run which goes on has made already; `steps` and `minutes` are what is left, all else is of both."""
    minutes: float
    """Evaluations counted."""
    tokens: int
    epochs: float
    memory_bytes: int
    """The largest so far, of one process."""
    disk_bytes: int
    """Checkpoints at their most: those kept, the best, and the one being written."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        lines = [
            f"model    {self.parameters:,} parameters, {self.parameters_without_embeddings:,} without embeddings",
            f"machine  {self.runtime}; {1000 * self.seconds_per_step:,.0f} ms a step (slowest "
            f"{1000 * self.slowest_step:,.0f}), {self.tokens_per_second:,.0f} tokens a second",
            f"time     {clock(60 * self.minutes)} for {self.steps:,} {'more ' if self.done else ''}steps, of it "
            f"{clock(self.getting_ready_seconds)} to get ready; an evaluation takes {self.evaluation_seconds:.1f} s",
            f"text     {self.tokens:,} tokens, {self.epochs:.2f} epochs, "
            f"{self.tokens / self.parameters_without_embeddings:.1f} tokens a parameter",
            f"memory   {self.memory_bytes / 1e9:.2f} GB a process",
            f"disk     {self.disk_bytes / 1e6:,.0f} MB at most for checkpoints",
        ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def plan(start: Start, say: Say, *, probe_steps: int = 20) -> Plan:
    """Train for `probe_steps` that are thrown away, and foretell the rest; one process, whatever nproc."""
    settings = start.settings
    runtime = build_runtime(settings)
    model, data = load_start(start, say)
    began = time.perf_counter()
    if model is None:
        model = fresh_model(settings, data, Ranks())
    getting_ready = time.perf_counter() - began
    task = masked_lm_task(settings, data)
    say(f"probing {probe_steps} steps of {settings.batch_size} rows")
    trainer = Trainer(task, model, data.tokenizer, settings, runtime, Ranks(), Path())  # steps alone write nothing
    model.train()
    if runtime.compile:
        model.compile()
    seconds = []
    for _ in range(WARM_UP + probe_steps):
        wait(runtime.device)
        began = time.perf_counter()
        trainer.train_step(0.5)
        trainer.step += 1
        wait(runtime.device)
        seconds.append(time.perf_counter() - began)
    state = sum(value.numel() * value.element_size() for value in pack_state(trainer.optimizers).values())
    counted = seconds[WARM_UP:]
    # By the mean: a slow step now and then is part of the run too.
    step = statistics.mean(counted)
    getting_ready += max(0.0, sum(seconds[:WARM_UP]) - WARM_UP * step)
    rows = min(GPU_EVALUATED_ROWS if runtime.device.type == "cuda" else EVALUATED_ROWS, data.val.rows)
    some = replace(data.val, rows=rows)
    if runtime.device.type != "cpu":
        evaluate_masked_lm(model, some, data.tokenizer, runtime)  # the first one loads what computes it
    began = time.perf_counter()
    evaluate_masked_lm(model, some, data.tokenizer, runtime)
    evaluation = (time.perf_counter() - began) * data.val.rows / rows
    numbers = start.state.numbers if start.state else {"step": 0, "seconds": 0.0}
    done = int(numbers["step"])
    steps, spent = foretell(
        settings, task.steps_per_epoch, step, evaluation, getting_ready, done, float(numbers["seconds"])
    )
    tokens = settings.batch_size * task.train.seq_len
    count = count_parameters(model)
    epochs = (done + steps) / task.steps_per_epoch
    return Plan(
        runtime=runtime.describe(),
        parameters=count.total,
        parameters_without_embeddings=count.without_embeddings,
        seconds_per_step=step,
        slowest_step=max(counted),
        tokens_per_second=tokens / step,
        getting_ready_seconds=getting_ready,
        evaluation_seconds=evaluation,
        steps=steps,
        done=done,
        minutes=spent / 60,
        tokens=(done + steps) * tokens,
        epochs=epochs,
        memory_bytes=peak_memory(runtime.device),
        disk_bytes=int((settings.max_checkpoints + 2) * SAVES_MORE * (4 * count.total + state)),
        warnings=tuple(warnings(done + steps, epochs, (done + steps) * tokens / count.without_embeddings)),
    )


def foretell(
    settings: Settings,
    steps_per_epoch: float,
    step: float,
    evaluation: float,
    getting_ready: float,
    done: int = 0,
    seconds: float = 0.0,
) -> tuple[int, float]:
    """Steps of the run and its seconds: by steps, or as many as its minutes hold; without what was done before."""
    total = total_steps(settings, steps_per_epoch)
    total = None if total is None else max(0, total - done)
    limit = math.inf if settings.max_minutes is None else max(0.0, 60 * settings.max_minutes - seconds)
    every = settings.val_interval
    # An evaluation at the start, at each interval, and at the end.
    fixed = getting_ready + evaluation * (1 if every else EVALUATIONS + 1)
    each = step + (evaluation / every if every else 0.0)
    if total is None or fixed + total * each > limit:
        return max(1, int((limit - fixed) / each)), limit
    return total, fixed + total * each


def warnings(steps: int, epochs: float, tokens_per_parameter: float) -> list[str]:
    """Where the budget, the model and the text do not fit each other, and what to do."""
    found = []
    if steps < FEWEST_STEPS:
        found.append(
            f"only {steps:,} steps: in fewer than {FEWEST_STEPS} a model hardly leaves the unigram floor; lower "
            "batch-size, take a smaller model, or more time"
        )
    if tokens_per_parameter < FEWEST_TOKENS:
        found.append(
            f"the model reads {tokens_per_parameter:.2f} tokens for each of its parameters, far from the 20 that make "
            "good use of a budget: a smaller one may reach more in this time; lower d-model or n-layers"
        )
    if epochs > MOST_EPOCHS:
        found.append(
            f"the text is read {epochs:.1f} times; beyond {MOST_EPOCHS:g} it teaches little that is new: prepare more "
            "text, or take a shorter run"
        )
    return found
