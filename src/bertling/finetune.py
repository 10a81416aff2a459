"""Fine-tuning a classifier from the settings on: labelled texts, model, run folders, one or several seeds."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bertling import distributed
from bertling.budget import total_steps
from bertling.checkpoint import load_checkpoint, run_of
from bertling.distributed import Ranks
from bertling.files import BertlingError, atomic_folder, read_json, write_json
from bertling.labelled import (
    SST2_NAMES,
    LabelledTexts,
    SeedSummary,
    check_agree,
    check_training,
    labels_of,
    load_labelled,
    sst2_files,
    summarise_seeds,
)
from bertling.model import BertForSequenceClassification, count_parameters
from bertling.pretrain import (
    as_trained,
    check_architecture,
    check_frozen,
    check_vocabulary,
    find_vocabulary,
    freeze,
    recorded,
    say_loaded,
    sized_config,
)
from bertling.runs import SEEDS_PLAN, Outcome, Start, check_free, check_steps, open_shared_run
from bertling.runtime import Runtime, build_runtime
from bertling.settings import Settings, settings_line
from bertling.tasks import ClassificationTask, classification_floors
from bertling.tokenizer import Tokenizer
from bertling.train import Trainer

Say = Callable[[str], None]
ORIGIN = "origin"
"""In the run of the first of several seeds: the checkpoint that all of them start from."""
COLLAPSED = 0.01
"""A seed that ends within this of the majority floor has learned nothing."""


@dataclass(frozen=True)
class SeedPlan:
    """Which seeds are trained together; each of their runs holds it: a resume of one goes on with the others."""

    first_seed: int
    seeds: int
    run_id: str | None
    checkpoint: str | None
    runs: tuple[str, ...] = ()
    """Names of the folders so far, in the order of the seeds."""


@dataclass(frozen=True)
class SeedResult:
    """One seed's run: the figures of its last step on the whole dev set, and the best on the way."""

    seed: int
    outcome: Outcome
    scores: dict[str, Any]


@dataclass(frozen=True)
class FinetuneResult:
    """All seeds together, beside the floors."""

    seeds: list[SeedResult]
    summary: SeedSummary
    floors: dict[str, float]
    finished: bool = True
    """Whether all that were asked for are trained to their end."""

    def to_dict(self) -> dict[str, Any]:
        """For --json and result.json. `accuracy` is that of the last step: the best one was picked on the dev set."""
        return {
            "floors": {name.removeprefix("floor/"): value for name, value in self.floors.items()},
            "accuracy": vars(self.summary),
            "collapsed": sum(s.scores["accuracy"] < self.floors["floor/majority"] + COLLAPSED for s in self.seeds),
            "seeds": [
                {
                    "seed": one.seed,
                    "run": str(one.outcome.run),
                    "finished": one.outcome.finished,
                    "step": one.outcome.step,
                    "seconds": one.outcome.seconds,
                    "best_accuracy": one.outcome.best_accuracy if one.outcome.best_step else None,
                    "best_step": one.outcome.best_step,
                    **one.scores,
                }
                for one in self.seeds
            ],
        }

    def text(self) -> str:
        """For people."""
        one, all_of = self.seeds[-1].scores, self.summary
        lines = [f"accuracy {all_of.mean:.1%}"]
        if all_of.sd is not None and all_of.low is not None and all_of.high is not None:
            lines = [
                f"accuracy, mean of {all_of.n} seeds: {all_of.mean:.1%}, sd {all_of.sd:.1%}, 95 % interval "
                f"{max(0.0, all_of.low):.1%} to {min(1.0, all_of.high):.1%}; collapsed: {self.to_dict()['collapsed']}"
            ]
        lines.append(floors_line(self.floors))
        last = f"seed {self.seeds[-1].seed}: " if len(self.seeds) > 1 else ""
        lines.append(f"{last}macro-F1 {one['macro_f1']:.3f}; confusion (rows: true class) {one['confusion']}")
        return "\n".join(lines)


def floors_line(floors: dict[str, float]) -> str:
    """What is reached without a network; a bag of words is not tried where there are very many classes."""
    said, words = f"floors: majority class {floors['floor/majority']:.1%}", floors.get("floor/bag_of_words")
    return said if words is None else f"{said}, bag of words {words:.1%}"


def finetune(start: Start, say: Say, *, from_scratch: bool = False) -> FinetuneResult:
    """Train a classifier from a checkpoint (or from fresh weights, if asked), once for each seed."""
    settings = start.settings
    check_origin(start, from_scratch)
    ranks = distributed.join(settings)
    try:
        say, told = recorded(say if ranks.first else lambda text: None)
        runtime = build_runtime(settings, local_rank=ranks.local_rank, local_processes=ranks.local_processes)
        for note in runtime.notes:
            say(f"note: {note}")
        train, dev = load_texts(settings)
        say(
            f"data: {len(train.texts):,} texts to train on, {len(dev.texts):,} to evaluate on, classes: "
            f"{', '.join(train.id2label.values())}"
        )
        if start.checkpoint is not None:
            build_classifier(start, train, lambda text: None)  # refuses what does not fit, before floors take time
        floors = classification_floors(train, dev) if ranks.first else {"floor/majority": 0.0}
        say(floors_line(floors))
        plan, said_of_all = plan_of(start), tuple(told)
        results = [saved_result(start.run.parent / name) for name in plan.runs[:-1]] if start.run else []
        for number in range(len(results), plan.seeds):
            one = replace(settings, seed=plan.first_seed + number, seeds=1, run_id=seed_run_id(plan, number))
            begin = replace(start, settings=one)
            if number >= max(1, len(plan.runs)):  # a seed after the first one, or the one that is resumed
                kept = results[0].outcome.run / ORIGIN
                origin = kept if kept.is_dir() else None if plan.checkpoint is None else Path(plan.checkpoint)
                begin = Start(one, start.explicit, checkpoint=origin)
            earlier = tuple(seed.outcome.run.name for seed in results)
            results.append(
                train_seed(begin, replace(plan, runs=earlier), train, dev, floors, runtime, ranks, say, said_of_all)
            )
            # A seed that was stopped early counts only where there is nothing else.
            counted = [seed for seed in results if seed.outcome.finished] or results
            last = results[-1].outcome
            result = FinetuneResult(
                results,
                summarise_seeds([seed.scores["accuracy"] for seed in counted]),
                floors,
                finished=last.finished and len(results) == plan.seeds,
            )
            for seed in results if ranks.first else ():
                write_json(seed.outcome.run / "result.json", result.to_dict())
            if last.stopped or not last.finished:
                break
        if result.finished and ranks.first:
            shutil.rmtree(results[0].outcome.run / ORIGIN, ignore_errors=True)
        return result
    finally:
        distributed.leave()


def check_start(start: Start, *, from_scratch: bool) -> None:
    """Refuse what cannot be trained, before several processes would all say so."""
    check_origin(start, from_scratch)
    train, _ = load_texts(start.settings)
    build_classifier(start, train, lambda text: None)


def check_origin(start: Start, from_scratch: bool) -> None:
    """A fine-tuning starts from a checkpoint, unless asked not to, and each of its seeds in a folder that is free."""
    if start.checkpoint is None and not from_scratch:
        raise BertlingError("--cp: name the checkpoint to fine-tune, or give --from-scratch to train without one")
    if start.checkpoint is not None and from_scratch:
        raise BertlingError("--from-scratch and --cp exclude each other: give one of them")
    check_frozen(start)
    plan = plan_of(start)
    for number in range(plan.seeds) if start.run is None else ():
        check_free(replace(start.settings, run_id=seed_run_id(plan, number)))


def plan_of(start: Start) -> SeedPlan:
    """The seeds that are asked for, or those that the run to go on in was begun with."""
    settings = start.settings
    if start.run is None or not (start.run / SEEDS_PLAN).exists():
        checkpoint = None if start.checkpoint is None else str(start.checkpoint.absolute())
        done = () if start.run is None else (start.run.name,)
        return SeedPlan(settings.seed, settings.seeds, settings.run_id, checkpoint, done)
    value = read_json(start.run / SEEDS_PLAN, "plan of seeds")
    try:
        return SeedPlan(**value | {"runs": tuple(value["runs"])})
    except (KeyError, TypeError) as error:
        raise BertlingError(
            f"{start.run / SEEDS_PLAN}: is not a plan of seeds; delete it to go on with this one"
        ) from error


def saved_result(run: Path) -> SeedResult:
    """What a seed that is done gave."""
    entries = read_json(run / "result.json", "result of a seed").get("seeds")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and Path(str(entry.get("run"))).name == run.name:
            of_outcome = ("seed", "run", "finished", "step", "seconds", "best_accuracy", "best_step")
            if not entry.keys() >= {*of_outcome, "accuracy"}:
                break
            scores = {name: value for name, value in entry.items() if name not in of_outcome}
            best, best_step = entry["best_accuracy"] or -1.0, entry["best_step"]
            outcome = Outcome(run, entry["step"], entry["seconds"], {}, best, best_step, entry["finished"])
            return SeedResult(entry["seed"], outcome, scores)
    raise BertlingError(f"{run / 'result.json'}: does not hold the result of this run; train its seed again")


def seed_run_id(plan: SeedPlan, number: int) -> str | None:
    """A run folder of its own for every seed."""
    if plan.run_id is None or plan.seeds == 1:
        return plan.run_id
    return f"{plan.run_id}-seed{plan.first_seed + number}"


def train_seed(
    start: Start,
    plan: SeedPlan,
    train: LabelledTexts,
    dev: LabelledTexts,
    floors: dict[str, float],
    runtime: Runtime,
    ranks: Ranks,
    say: Say,
    told: Sequence[str],
) -> SeedResult:
    """One run; `told` was said of all seeds before."""
    settings = start.settings
    say, told = recorded(say, told)
    model, tokenizer = build_classifier(start, train, say)
    seq_len = min(settings.seq_len, model.config.max_position_embeddings)
    task = ClassificationTask(
        train, dev, tokenizer, batch_size=settings.batch_size, seq_len=seq_len, seed=settings.seed, floors=floors
    )
    steps = total_steps(settings, task.steps_per_epoch)
    check_steps(start, steps)
    settings = replace(as_trained(start, model.config, seq_len), dropout=settings.dropout)
    say(settings_line(settings, "finetune"))
    say(
        f"model: {model.config.architecture}, {count_parameters(model).total:,} parameters; seed {settings.seed}; "
        + (
            f"{steps:,} steps ({steps / task.steps_per_epoch:.1f} epochs)"
            if steps
            else f"{settings.max_minutes:g} minutes"
        )
        + f" of {settings.batch_size} texts; {runtime.describe()}"
    )
    if seq_len < start.settings.seq_len and "seq_len" in start.explicit:
        say(f"note: seq-len = {start.settings.seq_len}: the model reads at most {seq_len} tokens")
    if task.train.truncated:
        say(f"note: {task.train.truncated:,} training texts are longer than {seq_len} tokens, and cut there")
    with open_shared_run(replace(start, settings=settings), ranks) as run:
        say(f"run folder: {run}")
        if ranks.first and plan.seeds > 1:
            if start.run is None and not plan.runs and start.checkpoint is not None and run_of(start.checkpoint):
                keep_origin(start.checkpoint, run / ORIGIN)
            write_json(run / SEEDS_PLAN, vars(replace(plan, runs=(*plan.runs, run.name))))
        outcome = Trainer(task, model, tokenizer, settings, runtime, ranks, run, state=start.state, told=told).train()
    if outcome.evaluated_step != outcome.step or not task.latest:  # stopped in between, or nothing was left to do
        task.evaluate(model, runtime, ranks)
    return SeedResult(settings.seed, outcome, task.latest)


def keep_origin(checkpoint: Path, origin: Path) -> None:
    """Keep a checkpoint of a run that may still train, and then delete it; by links, which take no space."""
    with atomic_folder(origin, force=True) as folder:
        for path in checkpoint.iterdir():
            try:
                os.link(path, folder / path.name)
            except OSError:  # another disk, or one without links
                shutil.copyfile(path, folder / path.name)


def load_texts(settings: Settings) -> tuple[LabelledTexts, LabelledTexts]:
    """The labelled texts that the settings name; by default SST-2's files in the work folder."""
    if settings.train_input is not None and settings.val_input is not None:
        paths = [settings.train_input, settings.val_input]
    else:
        files = sst2_files(settings.base_dir)
        paths = [files["train"], files["validation"]]
    columns = {"text_column": settings.text_column, "label_column": settings.label_column}
    train, dev = (load_labelled(path, **columns) for path in paths)
    check_training(train)
    if settings.train_input is None and train.names is None and dev.names is None and train.num_labels == 2:
        train = replace(train, names=SST2_NAMES)
        dev = replace(dev, names=SST2_NAMES)
    dev = check_agree(train, dev)
    labels_of(dev)
    return train, dev


def build_classifier(start: Start, train: LabelledTexts, say: Say) -> tuple[BertForSequenceClassification, Tokenizer]:
    """The checkpoint's encoder under a classifier, or fresh weights with the vocabulary of the settings."""
    settings = start.settings
    generator = torch.Generator().manual_seed(settings.seed)
    if start.checkpoint is not None:
        loaded = load_checkpoint(
            start.checkpoint,
            head="classification",
            id2label=train.id2label,
            dropout=settings.dropout,
            generator=generator,
        )
        assert isinstance(loaded.model, BertForSequenceClassification)
        check_architecture(loaded.model, settings, start.explicit)
        check_vocabulary(settings, start.explicit, loaded.tokenizer)
        say_loaded(loaded, say)
        freeze(loaded.model, settings.freeze_blocks)
        return loaded.model, loaded.tokenizer
    tokenizer = find_vocabulary(settings)
    labels = tuple(train.id2label.values())
    config = sized_config(settings, settings.preset, tokenizer.vocab_size, settings.seq_len, tokenizer.pad_id, labels)
    return BertForSequenceClassification(config, generator), tokenizer
