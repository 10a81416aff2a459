"""Run folders: a new one, the one to resume, and what a checkpoint given with --cp means."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertling.budget import epochs_of
from bertling.checkpoint import (
    TrainingState,
    find_checkpoint,
    load_state,
    newest_intact,
    run_of,
    step_folders,
    verify,
)
from bertling.console import is_first
from bertling.distributed import Ranks
from bertling.files import BertlingError, atomic_write, locked, read_json, readable_errors, sweep, write_json
from bertling.samples import match_samples
from bertling.settings import COMMANDS, Settings, key_of, parse_ini, read_ini, resolve

SEEDS_PLAN = "seeds.json"
"""In a run that is one seed of several: which seeds there are to be, and the runs that are done."""
# What a run is: a resumed one keeps it.
FIXED = (
    "preset size d_model n_layers heads local_attention word_vectors dropout seq_len batch_size mlm_probability "
    "optimizer seed whole_word_masking dataset_pattern val_dataset_pattern text_column label_column schedule dtype "
    "seeds freeze_blocks"
).split()

LENGTHS = ("max_iters", "max_minutes", "epochs")
"""What ends a run. One of several seeds keeps that too: their mean is over equal trainings."""

BUSY = (
    "{}: another process is training this run; let it finish or stop it (Ctrl-C saves), or start a new run from its "
    "weights with a new --run-id"
)


@dataclass(frozen=True)
class Start:
    """Where a training begins."""

    settings: Settings
    explicit: frozenset[str]
    run: Path | None = None
    """The run to go on in; None for a new one."""
    checkpoint: Path | None = None
    """The weights to start from; None for fresh ones."""
    state: TrainingState | None = None
    notes: tuple[str, ...] = ()
    """What the user should know: damaged checkpoints that were passed over."""


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
    skipped_steps: int = 0
    """Steps that were left out because their loss or gradient was not finite."""
    evaluated_step: int = 0
    """The one that the metrics belong to: the last, unless it was stopped in between."""
    stopped: bool = False
    """Whether it was asked to stop, if only at its very end: nothing is to follow."""
    protocol: str = ""
    floors: dict[str, float] = field(default_factory=dict)
    """Of a pre-training: what its accuracy is of, and what is reached without a network."""


def resolve_start(
    command: str, files: Sequence[Path], flags: Mapping[str, Any], *, cp: Path | None, resume: bool
) -> Start:
    """Fresh, from the weights of `cp`, or in the middle of a run: `cp` of the same task, or the newest unfinished one.

    A resumed run keeps its own settings; only flags on the command line change them, where that makes sense. With
    another `run_id`, or the same one under another `base_dir`, a new run starts from the best weights of `cp` in any
    case. Of a run the newest intact checkpoint counts; a checkpoint that is named itself must be intact.
    """
    if resume and cp is not None:
        raise BertlingError("--resume finds the run itself, --cp names one: give one of them")
    if resume:
        settings = resolve(command, files, flags)[0]
        cp = unfinished_run(settings.base_dir, settings.run_id, {t for t, name in COMMANDS.items() if name == command})
    if cp is None:
        return Start(*resolve(command, files, flags))
    run = run_meant(cp)
    if run is None or COMMANDS[description(run)["task"]] != command:
        return Start(*resolve(command, files, flags), checkpoint=best_of(cp))
    if not is_named(run, flags.get("run_id"), flags.get("base_dir")):
        note = (
            f"a new run, which takes over the weights of {run} and none of its settings; to go on with that run "
            "itself, leave out --run-id"
        )
        return Start(*resolve(command, files, flags), checkpoint=best_of(cp), notes=(note,))
    flags = flags_left(run, flags)
    check_idle(run)
    checkpoint, faults = checkpoint_meant(cp, run)
    state = load_state(checkpoint)
    assert state is not None  # the manifest names it
    notes = [f"{fault.partition(';')[0]}: passed over" for fault in faults]
    if faults:
        notes.append(f"going on from {checkpoint.name}, the newest checkpoint that is intact")
    furthest = state
    if checkpoint == cp:  # named itself, and perhaps not the newest
        furthest = load_state(newest_intact(run / "checkpoints")[0]) or state
    step, done = state.numbers.get("step", 0), furthest.numbers.get("step", 0)
    if step < done:
        notes.append(f"back from step {done:,} to step {step:,}: all after it is given up; a new --run-id keeps both")
    notes += mend_record(run, state)
    settings, _ = resolve(command, [run / "config.ini"], flags)
    before, _ = resolve(command, [run / "config.ini"], {})
    for name in (*FIXED, *LENGTHS) if seeds_plan(run) else FIXED:
        if getattr(settings, name) != getattr(before, name):
            was = seeds_plan(run).get(name, getattr(before, name))
            raise BertlingError(
                f"{key_of(name)} = {getattr(settings, name)}: the run {run} was started with "
                f"{'none' if was is None else was} and keeps it; leave it out, or start a new run from its weights "
                "with a new --run-id"
            )
    if is_finished(run) and not seeds_left(run):
        check_longer(run, settings, before, flags, furthest)
    # The run's file holds defaults too: explicit is what was given now.
    return Start(settings, frozenset(flags), run, checkpoint, state, tuple(notes))


def best_of(cp: Path) -> Path:
    """The checkpoint to begin a new run from; itself, not `best`, which a training that goes on would move."""
    found = find_checkpoint(cp, "best")
    return found.resolve() if found.is_symlink() else found


def is_named(run: Path, run_id: str | None, base_dir: Path | None = None) -> bool:
    """Whether a run, or the seeds of which it is one, has this name, and lies in `base_dir`; no name fits all."""
    if run_id is None:
        return True
    here = base_dir is None or (base_dir / "runs").resolve() == run.resolve().parent
    return here and run_id in (run.name, seeds_plan(run).get("run_id"))


def flags_left(run: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags without those that named the run, or its seeds, when it was begun: it has them."""
    plan = seeds_plan(run)
    has = {"run_id": flags.get("run_id"), "seeds": plan.get("seeds"), "seed": plan.get("first_seed")}
    return {name: value for name, value in flags.items() if name not in has or str(value) != str(has[name])}


def seeds_plan(run: Path) -> dict[str, Any]:
    """What a run that is one seed of several says of the others; empty for any other run."""
    return read_json(run / SEEDS_PLAN, "plan of seeds") if (run / SEEDS_PLAN).exists() else {}


def seeds_left(run: Path) -> bool:
    """Whether a finished run is one seed of several, was the last to be done, and others or the sums were to follow."""
    if not (run / SEEDS_PLAN).exists():
        return False
    if not (run / "result.json").exists():
        return True
    try:
        plans = {path.parent: read_json(path, "plan of seeds") for path in run.parent.glob(f"*/{SEEDS_PLAN}")}
        runs, seeds = plans[run]["runs"], plans[run]["seeds"]
        later = [plan["runs"] for path, plan in plans.items() if not never_began(path)]
        return bool(seeds > len(runs)) and not any(names[: len(runs)] == runs != names for names in later)
    except (KeyError, TypeError):
        return False


def run_meant(cp: Path) -> Path | None:
    """The run that `cp` is, or lies in; None for a folder from elsewhere."""
    path = Path(os.path.abspath(cp))  # links unresolved: `last` may point at nothing
    inside = next((parent for parent in (path, path.parent) if parent.name == "checkpoints"), None)
    run = inside.parent if inside else path
    if (run / "run.json").is_file() and (run / "checkpoints").is_dir():
        return cp if run == path and cp.name not in ("", "..") else run  # '.' has no name and no parent of its own
    return run_of(find_checkpoint(cp, "last"))


def checkpoint_meant(cp: Path, run: Path) -> tuple[Path, list[str]]:
    """The intact checkpoint to go on from, and what is wrong with newer ones; a step folder, or best, means itself."""
    path = Path(os.path.abspath(cp))  # it may have been named from inside the folder
    if path.parent.name == "checkpoints" and (path.name == "best" or path.name.startswith("step-")):
        verify(cp, ours=True)
        return cp, []
    return newest_intact(run / "checkpoints")


def description(run: Path) -> dict[str, Any]:
    """The task of a run, and whether it is finished; of a damaged run.json the settings tell, and it counts as not."""
    with suppress(BertlingError):
        about = read_json(run / "run.json", "run description")
        if about.get("task") in COMMANDS:
            return about
    return {"task": read_ini(run / "config.ini").get("task_type", "mlm"), "finished": False}


def is_finished(run: Path) -> bool:
    """Whether a run has come to its end; its process may have been killed after that."""
    return (run / "run.json").exists() and bool(description(run).get("finished"))


def mend_record(run: Path, state: TrainingState) -> list[str]:
    """Take the settings out of the checkpoint where the run's own file cannot be read, lacks some, or tells of another
    run; says so."""
    path, text = run / "config.ini", str(state.numbers.get("settings"))
    saved = parse_ini(text.encode(), path)
    try:
        found = read_ini(path)
        wrong = [name for name in saved if name not in found or (name in FIXED and found[name] != saved[name])]
        fault = f"{path}: {key_of(wrong[0])} is not as the run has it" if wrong else None
    except BertlingError as error:
        fault = str(error)
    if fault is None:
        return []
    atomic_write(path, text)
    return [f"{fault}: restored from the checkpoint"]


def data_paths(start: Start) -> tuple[list[Path], list[Path]]:
    """What the patterns name to train and to evaluate on; a run that goes on has its own data, whatever came since."""
    settings = start.settings
    known = start.state.numbers.get("data") if start.state else None
    if known:
        *trained, scored = (settings.base_dir / "datasets" / str(name) for name, *_ in known)
        for path in (*trained, scored):
            if not path.exists():
                raise BertlingError(
                    f"{path}: is gone, and the run {start.run} was trained on it; put it back, name the work folder "
                    "that it lies in by --base-dir, or start a new run from its weights with a new --run-id"
                )
        return trained, [scored]
    patterns = (settings.dataset_pattern, settings.val_dataset_pattern)
    train, val = (match_samples(settings.base_dir, pattern) for pattern in patterns)
    return train, val


def check_idle(run: Path) -> None:
    """Refuse a run that another process is training. Of several processes of one training the first one asks."""
    if is_first() and in_progress(run):
        raise BertlingError(BUSY.format(run))


def in_progress(run: Path) -> bool:
    """Whether a process is training this run."""
    try:
        with locked(run, wait=False):
            return False
    except BlockingIOError:
        return True


def check_longer(
    run: Path, settings: Settings, before: Settings, flags: Mapping[str, Any], state: TrainingState
) -> None:
    """A finished run goes on only beyond the limits that it has reached."""
    if seeds_plan(run):
        raise BertlingError(f"{run}: is finished, and so are the other seeds; start a new run with a new --run-id")
    if not set(LENGTHS) & flags.keys():
        raise BertlingError(f"{run}: is finished; raise --max-iters (or --max-minutes, --epochs) to train it further")
    reached = {"max_iters": state.numbers.get("step", 0), "max_minutes": state.numbers.get("seconds", 0) / 60}
    for name, value in reached.items():
        limit = getattr(settings, name)
        if limit is not None and limit <= value:
            raise BertlingError(
                f"{run}: is finished: it has done {value:,.6g} of {key_of(name)} = {limit:,.6g}; raise --{key_of(name)}"
            )
    limits = [(getattr(before, name), value) for name, value in reached.items()]
    ended_by_them = any(limit is not None and limit <= value for limit, value in limits)
    epochs = epochs_of(before) or 0
    if settings.epochs is not None and settings.epochs <= epochs and not ended_by_them:
        raise BertlingError(f"{run}: is finished: it has done its epochs = {epochs:g}; raise --epochs")


def check_steps(start: Start, total_steps: int | None) -> None:
    """Refuse settings that end the run to go on in before its next step."""
    if start.run is None or start.state is None or total_steps is None:
        return
    step = int(start.state.numbers.get("step", 0))
    at_its_end = step == total_steps and is_finished(start.run) and not seeds_left(start.run)
    if step > total_steps or at_its_end:
        raise BertlingError(
            f"{start.run}: has done {step:,} steps, and these settings end it after {total_steps:,}; raise what ends "
            "it, --max-iters or --epochs"
        )


@contextmanager
def open_run(start: Start) -> Iterator[Path]:
    """The folder of the run to go on in, or a new one, for this process alone.

    What a killed process left half-written is gone. Settings and state of the run stay: it may still be refused. A new
    one that ends before its first checkpoint leaves no folder.
    """
    folder = start.run or new_folder(start.settings)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise BertlingError(BUSY.format(folder)) from None
        for place in (folder, folder / "checkpoints", folder / "logs"):
            sweep(place)
        if start.run is None:
            shutil.rmtree(folder / "logs", ignore_errors=True)  # of one that never began
        try:
            yield folder
        except (BertlingError, KeyboardInterrupt):
            if start.run is None and never_began(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def record(run: Path, settings: Settings, *, finished: bool) -> None:
    """Write down what a run is, and whether it has come to its end."""
    atomic_write(run / "config.ini", settings.to_ini())
    write_json(run / "run.json", {"task": settings.task_type, "finished": finished})


@contextmanager
def open_shared_run(start: Start, ranks: Ranks) -> Iterator[Path]:
    """The same for several processes: the first one opens the run, all are told its folder, or end as quietly."""
    with ExitStack() as stack:
        folder, trouble = Path(), None
        try:
            folder = stack.enter_context(open_run(start)) if ranks.first else folder
        except BertlingError as error:
            trouble = error
        if ranks.any(trouble is not None):
            raise trouble or SystemExit(2)
        yield Path(ranks.text_from_first(str(folder)))


def new_folder(settings: Settings) -> Path:
    """Make the next free `runs/runN`, or `runs/<run-id>`."""
    check_free(settings)
    runs, run_id = settings.base_dir / "runs", settings.run_id
    with readable_errors(runs):
        runs.mkdir(parents=True, exist_ok=True)
        # Started together, two trainings race for a number: mkdir gives it to one of them only.
        taken = [int(path.name[3:]) for path in runs.glob("run*") if path.name[3:].isdecimal()]
        number = max(taken, default=-1) + 1
        while True:
            folder = runs / (run_id or f"run{number}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                if run_id is not None:
                    break
                number += 1
        (folder / "checkpoints").mkdir(exist_ok=True)
    return folder


def check_free(settings: Settings) -> None:
    """Refuse a run-id whose folder holds something."""
    if settings.run_id is None:
        return
    folder = settings.base_dir / "runs" / settings.run_id
    if folder.exists() and not never_began(folder):
        raise BertlingError(f"{folder}: exists already; go on with it by --cp, or choose another run-id")


def never_began(run: Path) -> bool:
    """Whether a run was killed before its first checkpoint, so that nothing is in it to go on with."""
    return (run / "checkpoints").is_dir() and not step_folders(run / "checkpoints")


def unfinished_run(base_dir: Path, run_id: str | None, tasks: set[str]) -> Path:
    """The newest run of these tasks that has a checkpoint, was not finished, and is not being trained just now.

    With a `run_id` it was begun under that name.
    """
    newest: dict[Path, float] = {}
    for checkpoints in (base_dir / "runs").glob("*/checkpoints"):
        times = [path.stat().st_mtime for path in step_folders(checkpoints)]
        if times:
            newest[checkpoints.parent] = max(times)
    busy = None
    for run in sorted(newest, key=newest.__getitem__, reverse=True):
        with suppress(BertlingError):  # a folder that is no run of ours, or was damaged: the next one may be
            about = description(run)
            if about["task"] in tasks and is_named(run, run_id) and (not about.get("finished") or seeds_left(run)):
                if not is_first() or not in_progress(run):
                    return run
                busy = busy or run
    if busy:
        raise BertlingError(f"{busy}: another process is training this run, and there is no other unfinished one")
    what = "no unfinished run" if run_id is None else f"no unfinished run of the name {run_id}"
    raise BertlingError(f"{base_dir / 'runs'}: holds {what} to resume; start one without --resume")
