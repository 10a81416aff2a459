"""Proof that a resumed run ends as one that was never killed: the same training twice, one of them with SIGKILL."""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bertling.checkpoint import load_state
from bertling.files import BertlingError, atomic_write, readable_errors, sha256_of
from bertling.runlog import read_metrics
from bertling.runs import in_progress, is_finished
from bertling.settings import COMMANDS, Settings

Say = Callable[[str], None]
SECONDS_TO_DIE = 30
"""How long the processes of a killed launcher may take to notice."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    step: int
    """The last step that the run had told of."""
    resumed_after: int
    """The step of the checkpoint that it went on from."""


@dataclass(frozen=True)
class VerifyReport:
    """What came out."""

    steps: int
    kills: list[Kill]
    points: int
    """Entries of metrics.jsonl that were compared."""
    weights_sha256: str
    difference: str | None
    """What differs first, if anything does."""
    folder: str | None
    """Where both runs lie, if they differ."""

    @property
    def passed(self) -> bool:
        return self.difference is None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**vars(self), "passed": self.passed, "kills": [vars(kill) for kill in self.kills]}

    def text(self) -> str:
        """For people."""
        done = ", ".join(f"after step {kill.step} (went on from {kill.resumed_after})" for kill in self.kills)
        if self.difference is not None:
            return f"FAIL: {self.difference}; killed {done}; both runs are in {self.folder}"
        return (
            f"PASS: {self.steps} steps, killed {done}: {self.points} log entries, weights and optimizer are equal to "
            f"the bit (weights sha256 {self.weights_sha256[:16]})"
        )


def verify_resume(
    settings: Settings,
    explicit: frozenset[str],
    *,
    cp: Path | None,
    from_scratch: bool,
    steps: int,
    kills: int,
    seed: int,
    say: Say,
) -> VerifyReport:
    """Train `steps` steps twice with these settings, once killed `kills` times at random moments, and compare.

    Only the length and the intervals of the settings are changed. Everything is written to a folder of its own in the
    work folder, which is removed unless the runs differ.
    """
    if from_scratch and settings.task_type == "mlm":
        raise BertlingError("--from-scratch: is for a fine-tuning; these settings have task-type = mlm: leave it out")
    with readable_errors(settings.base_dir):
        folder = settings.base_dir / Path(tempfile.mkdtemp(prefix="verify-resume-", dir=settings.base_dir)).name
    keep = False
    try:
        for name in ("vocab", "datasets"):
            if (settings.base_dir / name).exists():
                (folder / name).symlink_to((settings.base_dir / name).absolute())
        twin = Twin(folder, command_line(settings, explicit, folder, steps, cp, from_scratch))
        try:
            say(f"training {steps} steps in one go")
            twin.finish("whole")
            say(f"training them again, with {kills} kills")
            done = twin.kill_and_resume("killed", steps, kills, random.Random(seed))
        finally:
            twin.end()
        whole, killed = folder / "runs" / "whole", folder / "runs" / "killed"
        found = difference(whole, killed)
        keep = found is not None
        weights = sha256_of(killed / "checkpoints" / "last" / "model.safetensors")
        return VerifyReport(steps, done, len(timeless(killed)), weights, found, str(folder) if keep else None)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def command_line(
    settings: Settings, explicit: frozenset[str], folder: Path, steps: int, cp: Path | None, from_scratch: bool
) -> list[str]:
    """The command that trains so many steps with these settings in `folder`."""
    changes: dict[str, Any] = {
        "task_type": settings.task_type,
        "base_dir": folder,
        "run_id": None,
        "max_iters": steps,
        "max_minutes": None,
        "epochs": None,
        "warmup_iters": None if settings.warmup_iters is None else min(settings.warmup_iters, steps // 4),
        "lr_decay_iters": None,
        "val_interval": max(1, steps // 4),
        "save_every": str(max(1, steps // 10)),
        "seeds": 1,
        "wandb": False,
    }
    atomic_write(folder / "config.ini", replace(settings, **changes).to_ini(explicit | changes.keys()))
    words = ["-m", "bertling", COMMANDS[settings.task_type], "-c", str(folder / "config.ini")]
    if cp is not None:
        words += ["--cp", str(cp)]
    return [sys.executable, *words, *(["--from-scratch"] if from_scratch else [])]


class Twin:
    """Two runs of one command."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.command = folder, command
        self.process: subprocess.Popen[str] | None = None

    def start(self, name: str) -> "subprocess.Popen[str]":
        """Begin the run, or go on with it."""
        run = self.folder / "runs" / name
        deadline = time.monotonic() + SECONDS_TO_DIE
        while run.exists() and in_progress(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        command = [*self.command, "--run-id", name]
        if list(run.glob("checkpoints/step-*")):
            command = [*self.command[:4], "--cp", str(run)]  # a resumed run keeps its settings
        elif run.exists():
            shutil.rmtree(run)  # killed before its first checkpoint: nothing to resume
        error = (self.folder / f"{name}.err").open("a")
        with error:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=error, text=True)
        return self.process

    def end(self) -> None:
        """Leave no training behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def finish(self, name: str) -> None:
        """Train to the end."""
        process = self.start(name)
        if process.wait() != 0:
            raise BertlingError(self.last_words(name))

    def kill_and_resume(self, name: str, steps: int, kills: int, chance: random.Random) -> list[Kill]:
        """Train to the end, killed at random moments on the way."""
        run = self.folder / "runs" / name
        goals = sorted(chance.sample(range(1, steps), min(kills, steps - 1)))
        done: list[Kill] = []
        for goal in goals:
            goal = max(goal, last_step(run) + 1)  # the kill before may have come late: this one has to hit a newer step
            if goal >= steps:
                break
            process = self.start(name)
            seen, since = last_step(run), time.monotonic()
            while process.poll() is None and (now := last_step(run)) < goal:
                if now != seen:
                    seen, since = now, time.monotonic()
                time.sleep(0.002)
            # Somewhere in the next step, or in an evaluation or a checkpoint.
            time.sleep(chance.random() * min(1.0, time.monotonic() - since))
            process.kill()
            if process.wait() not in (0, -9):
                raise BertlingError(self.last_words(name))
            if is_finished(run):
                break  # it was quicker
            done.append(Kill(last_step(run), saved_step(run)))
        if not done:
            raise BertlingError(f"the {steps} steps were over before a kill could hit them; give more --steps")
        if not is_finished(run):
            self.finish(name)
        return done

    def last_words(self, name: str) -> str:
        """The last line that a failed training said."""
        text = (self.folder / f"{name}.err").read_text(errors="replace").strip()
        lines = text.replace(str(self.folder), str(self.folder.parent)).splitlines()  # the user's folder, not our copy
        return f"the training to verify failed: {lines[-1].removeprefix('error: ') if lines else 'without a word'}"


def last_step(run: Path) -> int:
    """The last step that a run has told of."""
    if not (run / "logs" / "metrics.jsonl").exists():
        return 0
    return max((int(entry["step"]) for entry in read_metrics(run)), default=0)


def saved_step(run: Path) -> int:
    """The step of a run's last checkpoint."""
    last = run / "checkpoints" / "last"
    return int(last.resolve().name.removeprefix("step-")) if last.exists() else 0


def timeless(run: Path) -> list[dict[str, Any]]:
    """A run's log entries without what depends on the clock."""
    return [{k: v for k, v in entry.items() if not k.startswith(("perf/", "time"))} for entry in read_metrics(run)]


def difference(one: Path, other: Path) -> str | None:
    """What differs first between two finished runs: the log, weights and optimizer, the best step, other numbers."""
    entries, others = timeless(one), timeless(other)
    for first, second in zip(entries, others, strict=False):
        if first != second:
            keys = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
            values = f"{first.get(keys[0])} in one go, {second.get(keys[0])} killed and resumed"
            return f"step {first['step']}: {keys[0]} is {values}"
    if len(entries) != len(others):
        return f"the log has {len(entries)} entries in one go, {len(others)} killed and resumed"
    last = [run / "checkpoints" / "last" for run in (one, other)]
    for name in ("model.safetensors", "training_state.safetensors"):
        sums = [sha256_of(folder / name) for folder in last]
        if sums[0] != sums[1]:
            return f"{name} of the last step: sha256 {sums[0][:16]} in one go, {sums[1][:16]} killed and resumed"
    best = [(run / "checkpoints" / "best").resolve().name for run in (one, other)]
    if best[0] != best[1]:
        return f"best: {best[0]} in one go, {best[1]} killed and resumed"
    states = [load_state(folder) for folder in last]
    numbers = [{} if state is None else state.numbers for state in states]
    for key in sorted(numbers[0].keys() | numbers[1].keys()):
        if key not in ("seconds", "settings") and numbers[0].get(key) != numbers[1].get(key):
            return f"{key}: {numbers[0].get(key)} in one go, {numbers[1].get(key)} killed and resumed"
    return None
