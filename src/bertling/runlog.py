"""Everything that a run tells: log.txt, metrics.jsonl, TensorBoard events, W&B on request, and the progress line."""

import json
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from bertling.files import (
    BertlingError,
    atomic_write,
    is_disk_full,
    readable_errors,
    skipped_where_disk_fails,
    write_json,
)
from bertling.sinks import EventFile, start_wandb

# The speed is taken over this many calls, so that compilation and slow first steps leave the forecast soon.
SPEED_WINDOW = 200
MOST_KEPT_BACK = 1 << 22
"""Bytes for each file that wait for a disk that is full, or fails."""
STATUS_LINE = re.compile(r"(?:\d+% \| )?([\d,]+)(?:/[\d,]+)? \| e: ")


class RunLog:
    """The `logs/` of one run folder. With `enabled=False` (every rank but the first) each call does nothing.

    `start_step` is the last step that a resumed run had finished: what a killed run wrote of later steps is cut off.
    `start_seconds` is the training time until then.
    Nothing is written to standard output. What a full or failing disk refuses is kept back until it can be written.
    Raises BertlingError where the logs cannot be begun, where metrics.jsonl is damaged, and where `wandb` is asked for
    but not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int | None,
        total_minutes: float | None,
        start_step: int = 0,
        start_seconds: float = 0.0,
        wandb: bool = False,
        run_name: str,
        settings: Mapping[str, Any],
        opening: Sequence[str] = (),
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._logs = folder / "logs"
        self._total_steps, self._total_minutes = total_steps, total_minutes
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        plain_settings = json.loads(json.dumps(dict(settings), default=str))
        self._wandb = start_wandb(folder, run_name, plain_settings) if wandb else None
        self._kept_back: dict[Path, bytes] = {}
        write_json(self._logs / "run.json", {"name": run_name, "settings": plain_settings})
        _cut_metrics(self._logs / "metrics.jsonl", start_step)
        _cut_log(self._logs / "log.txt", start_step)
        self._events = EventFile(self._logs, self._append)
        self._events.begin(start_step + 1)
        self._step, self._seconds = start_step, start_seconds
        self._recent = deque([(start_step, start_seconds)], maxlen=SPEED_WINDOW)
        self._interval_tokens, self._interval_seconds = 0, 0.0
        self._tokens_per_second: float | None = None
        self._learning_rate: float | None = None
        self._train_loss: float | None = None
        for text in opening:  # the terminal has it already
            self._append(self._logs / "log.txt", text.encode() + b"\n")
        if start_step:
            self.line(f"resumed after step {start_step:,}")
        if self._console.is_terminal:
            self._start_progress(run_name)

    def train_step(self, step: int, *, loss: float | None, learning_rate: float, tokens: int, seconds: float) -> None:
        """Count one or more steps that ended with `step`: `tokens` since the last call, `seconds` of training so far.

        An entry is written only where there is a `loss` (the caller's mean since the last one that it gave), so a loop
        that fetches the loss now and then from the device pays nothing in between.
        """
        if not self._enabled:
            return
        self._interval_tokens += tokens
        self._interval_seconds += seconds - self._seconds
        self._step, self._seconds, self._learning_rate = step, seconds, learning_rate
        self._recent.append((step, self._seconds))
        if loss is not None:
            self._train_loss = loss
            self._tokens_per_second = self._interval_tokens / max(self._interval_seconds, 1e-9)
            self._interval_tokens, self._interval_seconds = 0, 0.0
            speed = self._tokens_per_second
            self._record(step, {"train/loss": loss, "lr": learning_rate, "perf/tokens_per_s": speed})
        self._update_progress()

    def evaluation(self, step: int, metrics: Mapping[str, float], *, seconds: float) -> None:
        """Write the metrics of an evaluation after `step` that ended at `seconds` of training, and the status line.

        Keys: eval/loss, eval/accuracy, other eval/..., and floors of accuracy (floor/...) and loss (floor_loss/...).
        """
        if not self._enabled:
            return
        self._step, self._seconds = step, seconds
        # The status line comes first in log.txt: by it, a resumed run knows which lines belong to later steps.
        self.line(self._status(metrics.get("eval/loss"), metrics.get("eval/accuracy")))
        self._record(step, metrics)
        self._update_progress()

    def line(self, text: str) -> None:
        """Write one message to log.txt and the terminal."""
        self.illustration(text, text)

    def illustration(self, plain: str, colour: Text | str) -> None:
        """Write `plain` to log.txt and, where the terminal can show it, `colour` to the terminal."""
        if not self._enabled:
            return
        self._append(self._logs / "log.txt", plain.rstrip("\n").encode() + b"\n")
        shown = colour if self._console.is_terminal else plain
        # Unwrapped where nobody watches, so that one message stays one line in a file.
        self._console.print(shown, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)

    def go_back(self, step: int, why: str) -> None:
        """Forget what was told of steps after `step`, which the run is about to do once more, and say why."""
        if not self._enabled:
            return
        with skipped_where_disk_fails():
            _cut_metrics(self._logs / "metrics.jsonl", step)
            _cut_log(self._logs / "log.txt", step)
        self._events.begin(step + 1)
        self._step = step
        self._recent = deque([(step, self._seconds)], maxlen=SPEED_WINDOW)
        self.line(why)

    def close(self) -> None:
        """Stop the progress line and W&B; every file is complete already, if the disk took it. May be called twice."""
        if not self._enabled:
            return
        for path in list(self._kept_back):
            self._append(path, b"")
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard and W&B (floors excepted: they never change)."""
        # JSON has no NaN; null keeps the line readable by every tool.
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        entry = {"step": step, "time": round(self._seconds, 3), **finite}
        self._append(self._logs / "metrics.jsonl", json.dumps(entry, allow_nan=False).encode() + b"\n")
        moving = {key: value for key, value in metrics.items() if not key.startswith("floor")}
        self._events.scalars(step, moving)
        if self._wandb is not None:
            self._wandb.log({"step": step, **moving})

    def _append(self, path: Path, data: bytes) -> None:
        """Add to a file without buffering, so that a killed run loses nothing; what the disk refuses waits."""
        first = not self._kept_back
        data = self._kept_back.pop(path, b"") + data
        try:
            with path.open("ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            self._kept_back[path] = data[-MOST_KEPT_BACK:]
            if first:
                why = "the disk is full" if is_disk_full(error) else error.strerror
                said = f"warning: {path}: {why}; what is logged waits until it can be written"
                self._console.print(said, markup=False, highlight=False, soft_wrap=True)

    def _forecast(self) -> tuple[float | None, float | None, float | None]:
        """Seconds a step, fraction done and seconds left, as far as they are known."""
        (first_step, first_seconds), (last_step, last_seconds) = self._recent[0], self._recent[-1]
        steps = last_step - first_step
        speed = (last_seconds - first_seconds) / steps if steps > 0 else None
        return speed, *progress_of(self._step, self._seconds, speed, self._total_steps, self._total_minutes)

    def _status(self, val_loss: float | None, val_accuracy: float | None) -> str:
        seconds_per_step, fraction, remaining = self._forecast()
        return format_status(
            self._step,
            total_steps=self._total_steps,
            fraction=fraction,
            elapsed=self._seconds,
            remaining=remaining,
            seconds_per_step=seconds_per_step,
            learning_rate=self._learning_rate,
            train_loss=self._train_loss,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
        )

    def _start_progress(self, run_name: str) -> None:
        # Standard output is for answers: it must not be caught and shown on standard error.
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
            redirect_stdout=False,
        )
        self._task: TaskID = self._progress.add_task(run_name, total=1.0, status="starting")
        self._progress.start()
        self._update_progress()

    def _update_progress(self) -> None:
        if self._progress is None:
            return
        _, fraction, remaining = self._forecast()
        total = "" if self._total_steps is None else f"/{self._total_steps:,}"
        parts = [f"{self._step:,}{total}"]
        if remaining is not None:
            parts.append(f"{_clock(remaining, short=remaining < 3600)} left")
        if self._train_loss is not None:
            parts.append(f"loss {self._train_loss:.3f}")
        if self._tokens_per_second is not None:
            parts.append(f"{self._tokens_per_second:,.0f} tokens/s")
        self._progress.update(self._task, completed=fraction or 0.0, status=" | ".join(parts))


def progress_of(
    step: int, seconds: float, seconds_per_step: float | None, total_steps: int | None, total_minutes: float | None
) -> tuple[float | None, float | None]:
    """The fraction done and the seconds left; of a limit of steps and one of time, the one that is reached first."""
    done: list[float] = []
    left: list[float] = []
    if total_steps is not None:
        done.append(step / max(total_steps, 1))
        if seconds_per_step is not None or step >= total_steps:
            left.append(max(total_steps - step, 0) * (seconds_per_step or 0.0))
    if total_minutes is not None:
        done.append(seconds / max(60 * total_minutes, 1e-9))
        left.append(max(60 * total_minutes - seconds, 0.0))
    return (min(max(done), 1.0) if done else None), (min(left) if left else None)


def format_status(
    step: int,
    *,
    total_steps: int | None,
    fraction: float | None,
    elapsed: float,
    remaining: float | None,
    seconds_per_step: float | None,
    learning_rate: float | None = None,
    train_loss: float | None = None,
    val_loss: float | None = None,
    val_accuracy: float | None = None,
) -> str:
    """`12% | 3,000/25,000 | e: 00:10 | r: 01:13 | 03:20 /Kit | lr: 0.9876 e-3 | t.loss: 2.34 | ...`; unknowns left out.

    e (elapsed) and r (remaining) are hh:mm, or h:mm:ss in a run of under an hour; Kit is 1000 iterations, in mm:ss.
    """
    short = elapsed + (remaining or 0.0) < 3600
    parts = []
    if fraction is not None:
        parts.append(f"{math.floor(100 * fraction + 1e-9)}%")
    parts.append(f"{step:,}" if total_steps is None else f"{step:,}/{total_steps:,}")
    parts.append(f"e: {_clock(elapsed, short=short)}")
    if remaining is not None:
        parts.append(f"r: {_clock(remaining, short=short)}")
    if seconds_per_step is not None:
        minutes, seconds = divmod(round(1000 * seconds_per_step), 60)
        parts.append(f"{minutes:02d}:{seconds:02d} /Kit")
    if learning_rate is not None:
        parts.append(f"lr: {1000 * learning_rate:.4f} e-3")
    if train_loss is not None:
        parts.append(f"t.loss: {train_loss:.2f}")
    if val_loss is not None:
        parts.append(f"v.loss: {val_loss:.2f}")
    if val_accuracy is not None:
        parts.append(f"v.acc: {100 * val_accuracy:.1f}%")
    return " | ".join(parts)


def _clock(seconds: float, *, short: bool) -> str:
    """h:mm:ss if `short`, else hh:mm."""
    whole = round(seconds)
    if short:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run folder's logs/metrics.jsonl in order; a torn last line (the run was killed) is left out."""
    path = folder / "logs" / "metrics.jsonl"
    with readable_errors(path):
        return _parse_metrics(path, path.read_bytes())


def _parse_metrics(path: Path, raw: bytes) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    lines = raw.split(b"\n")[:-1]  # what follows the last line end is either empty or torn
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise BertlingError(f"{path}: line {number} is not a metrics entry (JSON with a step); delete that line")
        entries.append(entry)
    return entries


def _cut_metrics(path: Path, start_step: int) -> None:
    """Drop the entries of steps after `start_step`, and a torn last line."""
    if not path.exists():
        return
    with readable_errors(path):
        raw = path.read_bytes()
    kept = [entry for entry in _parse_metrics(path, raw) if entry["step"] <= start_step]
    text = "".join(json.dumps(entry) + "\n" for entry in kept).encode()
    if text != raw:
        atomic_write(path, text)


def _cut_log(path: Path, start_step: int) -> None:
    """Drop the first status line of a step after `start_step` and all that follows it, and a torn last line."""
    if not path.exists():
        return
    with readable_errors(path):
        raw = path.read_bytes()
    kept = []
    for line in raw.decode(errors="replace").split("\n")[:-1]:
        match = STATUS_LINE.match(line)
        if match and int(match[1].replace(",", "")) > start_step:
            break
        kept.append(line + "\n")
    text = "".join(kept).encode()
    if text != raw:
        atomic_write(path, text)
