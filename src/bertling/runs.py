"""Run folders: a new one, the one to resume, and what a checkpoint given with --cp means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertling.checkpoint import TrainingState, find_checkpoint, load_state, run_of, verify
from bertling.files import BertlingError, atomic_write, read_json, readable_errors, write_json
from bertling.settings import COMMANDS, Settings, key_of, resolve

# What a run is: a resumed one keeps it.
FIXED = (
    "preset size d_model n_layers heads dropout seq_len batch_size mlm_probability optimizer seed dataset_pattern "
    "val_dataset_pattern train_input val_input text_column label_column schedule dtype seeds"
).split()


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


def resolve_start(
    command: str, files: Sequence[Path], flags: Mapping[str, Any], *, cp: Path | None, resume: bool
) -> Start:
    """Fresh, from the weights of `cp`, or in the middle of a run: `cp` of the same task, or the newest unfinished one.

    A resumed run keeps its own settings; only flags on the command line change them, where that makes sense. With
    another `run_id` a new run starts from the best weights of `cp` in any case.
    """
    if resume and cp is not None:
        raise BertlingError("--resume finds the run itself, --cp names one: give one of them")
    if resume:
        base_dir = resolve(command, files, flags)[0].base_dir
        cp = unfinished_run(base_dir, {task for task, name in COMMANDS.items() if name == command})
    if cp is None:
        return Start(*resolve(command, files, flags))
    checkpoint = find_checkpoint(cp, "last")
    run = run_of(checkpoint)
    if run is None or COMMANDS.get(str(read_json(run / "run.json", "run description").get("task"))) != command:
        return Start(*resolve(command, files, flags), checkpoint=find_checkpoint(cp, "best"))
    verify(checkpoint)
    state = load_state(checkpoint)
    anew = flags.get("run_id") not in (None, run.name)
    if state is None or anew:
        return Start(*resolve(command, files, flags), checkpoint=find_checkpoint(cp, "best") if anew else checkpoint)
    settings, _ = resolve(command, [run / "config.ini"], flags)
    before, _ = resolve(command, [run / "config.ini"], {})
    for name in FIXED:
        if getattr(settings, name) != getattr(before, name):
            raise BertlingError(
                f"{key_of(name)} = {getattr(settings, name)}: the run {run} was started with "
                f"{getattr(before, name)} and keeps it; leave it out, or start a new run from its "
                "weights with a new --run-id"
            )
    if read_json(run / "run.json", "run description").get("finished"):
        check_longer(run, settings, flags, state)
    # The run's file holds defaults too: explicit is what was given now.
    return Start(settings, frozenset(flags), run, checkpoint, state)


def check_longer(run: Path, settings: Settings, flags: Mapping[str, Any], state: TrainingState) -> None:
    """A finished run goes on only beyond the limits that it has reached."""
    if not {"max_iters", "max_minutes", "epochs"} & flags.keys():
        raise BertlingError(f"{run}: is finished; raise --max-iters (or --max-minutes, --epochs) to train it further")
    reached = {"max_iters": state.numbers.get("step", 0), "max_minutes": state.numbers.get("seconds", 0) / 60}
    for name, value in reached.items():
        limit = getattr(settings, name)
        if limit is not None and limit <= value:
            raise BertlingError(
                f"{run}: is finished: it has done {value:,.6g} of {key_of(name)} = {limit:,.6g}; raise --{key_of(name)}"
            )


def open_run(start: Start) -> Path:
    """The folder of the run to go on in, or a new one; its settings are in it, and it is unfinished from now on."""
    folder = start.run or new_folder(start.settings)
    atomic_write(folder / "config.ini", start.settings.to_ini())
    write_json(folder / "run.json", {"task": start.settings.task_type, "finished": False})
    return folder


def new_folder(settings: Settings) -> Path:
    """Make the next free `runs/runN`, or `runs/<run-id>`."""
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
                    raise BertlingError(
                        f"{folder}: exists already; go on with it by --cp, or choose another run-id"
                    ) from None
                number += 1
        (folder / "checkpoints").mkdir()
    return folder


def unfinished_run(base_dir: Path, tasks: set[str]) -> Path:
    """The newest run of these tasks that has a checkpoint and was not finished."""
    lasts = [path for path in (base_dir / "runs").glob("*/checkpoints/last") if path.exists()]
    for last in sorted(lasts, key=lambda path: path.stat().st_mtime, reverse=True):
        run = last.parent.parent
        if not (run / "run.json").is_file():
            continue
        about = read_json(run / "run.json", "run description")
        if about.get("task") in tasks and not about.get("finished"):
            return run
    raise BertlingError(f"{base_dir / 'runs'}: holds no unfinished run to resume; start one without --resume")
