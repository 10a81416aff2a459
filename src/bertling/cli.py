"""The `bertling` command: parsing and wiring only. Heavy modules are imported by the command that needs them."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO, cast

import click

from bertling.cli_use import USE_COMMANDS
from bertling.console import LARGE_PAGES, Lasting, answer, clean_end, explain, forget, is_first, is_rank, say, unbroken
from bertling.files import BertlingError
from bertling.options import (
    PATH,
    GroupedCommand,
    force_option,
    input_options,
    json_option,
    prepare_options,
    start_options,
    training_options,
    was_given,
)
from bertling.settings import Settings, concerns, default_files, key_of, read_settings

STOPPED = 3
"""Exit status of a training that was asked to stop, and saved."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="bertling")
@click.option("--debug", is_flag=True, help="show the traceback of an error (works after any command)")
def cli(debug: bool) -> None:
    """Raise your own small BERT: from raw text to a model that answers."""


@cli.command()
@click.option("--folder", type=PATH, default=Path("quickstart"), show_default=True, help="where everything is written")
@click.option(
    "--minutes", type=click.FloatRange(0.05, 60), default=2.5, show_default=True, help="length of the pre-training"
)
@click.option("--steps", type=click.IntRange(1), help="end the pre-training after so many steps, if that is sooner")
@click.option(
    "--megabytes", type=click.FloatRange(0.5, 20), default=5, show_default=True, help="text to collect and learn from"
)
@force_option("an earlier quickstart in the folder")
@json_option
def quickstart(folder: Path, minutes: float, steps: int | None, megabytes: float, force: bool, as_json: bool) -> None:
    """Watch a BERT grow in a few minutes, offline: vocabulary, data, pre-training, fine-tuning, answers."""
    os.environ.setdefault(*LARGE_PAGES)
    from bertling.tools.quickstart import run_quickstart

    result = run_quickstart(folder, minutes=minutes, steps=steps, megabytes=megabytes, force=force, say=say)
    answer(result.to_dict(), result.text(), as_json)


def check_text_field(paths: Iterable[Path]) -> None:
    """Refuse to name the field of the texts where no file has fields."""
    from bertling.text import kind_of

    if was_given(click.get_current_context(), "text_field") and all(kind_of(path)[0] == "text" for path in paths):
        raise click.UsageError("--text-field: is for .jsonl and .parquet files, and none is given")


@cli.command()
@input_options
@click.option("-o", "--output", type=PATH, required=True, help="folder for the vocabulary")
@click.option("--size", type=click.IntRange(8, 1_000_000), default=8192, show_default=True, help="entries")
@click.option("--cased", is_flag=True, help="keep upper case and accents")
@force_option("a vocabulary that is there")
@json_option
def vocab(
    inputs: tuple[Path, ...],
    more: tuple[Path, ...],
    wikitext: bool | None,
    text_field: str,
    output: Path,
    size: int,
    cased: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make a WordPiece vocabulary from text files."""
    from bertling.text import TextOptions
    from bertling.tools.vocab import make_vocabulary

    check_text_field([*inputs, *more])
    options = TextOptions(wikitext=wikitext, text_field=text_field)
    result = make_vocabulary([*inputs, *more], output, size, lowercase=not cased, options=options, force=force)
    answer(result, f"{output}: {result['entries']:,} entries, {result['seconds']:.1f} s", as_json)


@cli.command()
@input_options
@prepare_options
@json_option
def prepare(
    inputs: tuple[Path, ...],
    more: tuple[Path, ...],
    wikitext: bool | None,
    text_field: str,
    clean: bool,
    label: str,
    output: Path,
    max_len: int,
    vocabulary: Path,
    shares: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn text files into rows of token ids, split by document, with a data card."""
    from bertling.prepare import prepare as run_prepare
    from bertling.progress import ByteProgress
    from bertling.splits import parse_shares
    from bertling.text import TextOptions
    from bertling.tokenizer import Tokenizer

    official = [*options["val_inputs"], *options["test_inputs"]]
    if more and official:  # a shell may have made several files of a pattern behind --val-input: not to train on
        raise click.UsageError(f"{more[0]}: of which split? Where there are official files, each takes its own option")
    check_text_field([*inputs, *more, *official])
    with clean_end(), ByteProgress("preparing") as progress:
        card = run_prepare(
            [*inputs, *more],
            label,
            output,
            max_len,
            Tokenizer.load(vocabulary),
            split=parse_shares(shares),
            options=TextOptions(wikitext=wikitext, clean=clean, text_field=text_field),
            progress=progress,
            **options,
        )
    answer(card.to_dict(), card.text(), as_json)


@cli.command()
@click.argument("path", type=PATH)
@click.option("-n", "--rows", type=click.IntRange(0, 1000), default=3, show_default=True, help="rows to show")
@click.option("-v", "--vocab", "vocabulary", type=PATH, help="for .msgpack files: vocab.txt or its folder")
@click.option(
    "--mlm-probability",
    type=click.FloatRange(0.0, 0.9, min_open=True),
    default=0.15,
    show_default=True,
    help="share of the tokens to mask, where masks are not stored with the data",
)
@json_option
@click.pass_context
def inspect(
    context: click.Context, path: Path, rows: int, vocabulary: Path | None, mlm_probability: float, as_json: bool
) -> None:
    """Show rows of a prepared data set, and audit its masks."""
    from bertling.batches import STORED_MASKS
    from bertling.tools.inspect import inspect as run_inspect

    report = run_inspect(path, rows=rows, vocabulary=vocabulary, mlm_probability=mlm_probability)
    if report.static and was_given(context, "mlm_probability"):
        say(f"note: {STORED_MASKS}")
    answer(report.to_dict(), report.text(), as_json)


@cli.command(cls=GroupedCommand)
@start_options
@training_options("pretrain")
@json_option
@click.pass_context
def pretrain(context: click.Context, configs: tuple[Path, ...], cp: Path | None, resume: bool, as_json: bool) -> None:
    """Pre-train a masked language model on prepared data."""
    start = begin("pretrain", configs, context.obj or {}, cp, resume)
    from bertling.pretrain import load_start
    from bertling.pretrain import pretrain as run_pretrain
    from bertling.runs import check_free

    if wants_launch(start.settings):
        load_start(start, lambda text: None)
        if start.run is None:
            check_free(start.settings)
        launch_self(start)
    outcome = run_pretrain(start, say)
    if is_first():
        answer(
            {
                **outcome.metrics,
                "run": str(outcome.run),
                "step": outcome.step,
                "evaluated_step": outcome.evaluated_step,
                "seconds": outcome.seconds,
                "finished": outcome.finished,
                "best_accuracy": outcome.best_accuracy if outcome.best_step else None,
                "best_step": outcome.best_step,
                "skipped_steps": outcome.skipped_steps,
                **outcome.floors,
                "protocol": outcome.protocol,
            },
            f"{outcome.run}: step {outcome.step:,}, {outcome.seconds / 60:.1f} minutes, validation accuracy "
            f"{outcome.metrics.get('eval/accuracy', 0.0):.1%}, loss {outcome.metrics.get('eval/loss', 0.0):.3f}"
            + ("" if outcome.evaluated_step == outcome.step else f" at step {outcome.evaluated_step:,}")
            + f"\nscored on {outcome.protocol}; floors: accuracy {outcome.floors['floor/unigram']:.1%}, loss "
            f"{outcome.floors['floor_loss/unigram']:.3f}",
            as_json,
        )
    draw([outcome.run] if outcome.finished else [])
    if not outcome.finished:
        sys.exit(STOPPED)


@cli.command(cls=GroupedCommand)
@start_options
@click.option("--probe-steps", type=click.IntRange(1, 10_000), default=20, show_default=True, help="steps to time")
@training_options("pretrain")
@json_option
@click.pass_context
def plan(
    context: click.Context, configs: tuple[Path, ...], cp: Path | None, resume: bool, probe_steps: int, as_json: bool
) -> None:
    """Foretell time, memory, disk and text of a pre-training from a few of its steps; nothing is kept."""
    start = begin("pretrain", configs, context.obj or {}, cp, resume)
    from bertling.tools.plan import plan as run_plan

    result = run_plan(start, say, probe_steps=probe_steps)
    answer(result.to_dict(), result.text(), as_json)


@cli.command(cls=GroupedCommand)
@start_options
@click.option("--from-scratch", is_flag=True, help="train without a checkpoint, as a floor")
@training_options("finetune")
@json_option
@click.pass_context
def finetune(
    context: click.Context, configs: tuple[Path, ...], cp: Path | None, resume: bool, from_scratch: bool, as_json: bool
) -> None:
    """Fine-tune a classifier on labelled texts (SST-2 by default)."""
    start = begin("finetune", configs, context.obj or {}, cp, resume)
    from_scratch = from_scratch and not resume  # that was said of its beginning
    from bertling.finetune import check_start
    from bertling.finetune import finetune as run_finetune

    if wants_launch(start.settings):
        check_start(start, from_scratch=from_scratch)
        launch_self(start)
    result = run_finetune(start, say, from_scratch=from_scratch)
    if is_first():
        answer(result.to_dict(), result.text(), as_json)
    draw(one.outcome.run for one in result.seeds if one.outcome.finished)
    if not result.finished:
        sys.exit(STOPPED)


def begin(command: str, configs: tuple[Path, ...], flags: dict[str, Any], cp: Path | None, resume: bool) -> Any:
    """Resolve the settings."""
    os.environ.setdefault(*LARGE_PAGES)
    with unbroken():
        from bertling.runs import resolve_start

    start = resolve_start(command, list(configs) or default_files(Path()), flags, cp=cp, resume=resume)
    if is_first() and not wants_launch(start.settings):
        for note in start.notes:
            say(f"note: {note}")
        if configs and start.run is not None:
            say(f"note: {configs[0]} was not read: a resumed run keeps the settings in its own config.ini")
        for name, other, used in (
            ("nproc", "ddp; this is a single process", start.settings.ddp),
            ("dist_master_addr", "ddp", start.settings.ddp),
            ("dist_master_port", "ddp", start.settings.ddp),
            ("muon_learning_rate", "optimizer = muon", start.settings.optimizer == "muon"),
            ("cooldown", "schedule = trapezoid", start.settings.schedule == "trapezoid"),
        ):
            if name in start.explicit and not used:
                say(f"note: {key_of(name)} counts only together with {other}")
        settings = [item for item in fields(Settings) if item.name in start.explicit and not concerns(item, command)]
        if settings:
            say(f"note: {command} has no use for {', '.join(key_of(item.name) for item in settings)}")
    return start


def wants_launch(settings: Settings) -> bool:
    """Whether this process should start others and wait, instead of training itself."""
    from bertling.distributed import launched

    return settings.ddp and not launched()


def launch_self(start: Any) -> None:
    """Run this very command on several processes, and end with their status."""
    from bertling.distributed import launch

    words = sys.argv[1:]
    if "--resume" in words:  # all of them resume the run that was found here
        at = words.index("--resume")
        words[at : at + 1] = ["--cp", str(start.run)]
        words = [word for word in words if word != "--from-scratch"]
    began = time.time()
    status = launch(start.settings, words)
    if status < 0:  # signals: a run that has a checkpoint by now can go on
        steps = (start.settings.base_dir / "runs").glob("*/checkpoints/step-*")
        saved = start.run is not None or any(path.stat().st_mtime >= began - 1 for path in steps)
        status = STOPPED if saved else 128 - status
    sys.exit(status)


def draw(runs: Iterable[Path]) -> None:
    """Draw the plots of finished runs; the answer was given, whatever becomes of them."""
    if not is_first():
        return
    from bertling.plots import plot_run

    for run in runs:
        try:
            for path in plot_run(run):
                say(f"plot: {path}")
        except BertlingError as error:
            say(f"warning: no plot: {error}")


@cli.command("verify-resume")
@click.option("-c", "--config", "configs", type=PATH, multiple=True, help="settings file of the training to verify")
@click.option("--cp", type=PATH, help="the checkpoint that a fine-tuning starts from")
@click.option("--from-scratch", is_flag=True, help="a fine-tuning without a checkpoint")
@click.option("--base-dir", type=PATH, help="work folder, instead of the settings'")
@click.option("--steps", type=click.IntRange(2), default=40, show_default=True, help="length of the training")
@click.option("--kills", type=click.IntRange(1), default=3, show_default=True, help="SIGKILLs at random moments")
@click.option("--seed", type=int, default=0, show_default=True, help="of these moments")
@json_option
def verify_resume(
    configs: tuple[Path, ...],
    cp: Path | None,
    from_scratch: bool,
    base_dir: Path | None,
    steps: int,
    kills: int,
    seed: int,
    as_json: bool,
) -> None:
    """See on your own settings and machine that a killed and resumed training ends as if it had never stopped."""
    from bertling.tools.verify_resume import verify_resume as run_verify

    settings, explicit = read_settings(
        list(configs) or default_files(Path()), {} if base_dir is None else {"base_dir": base_dir}
    )
    with clean_end():
        report = run_verify(
            settings, explicit, cp=cp, from_scratch=from_scratch, steps=steps, kills=kills, seed=seed, say=say
        )
    answer(report.to_dict(), report.text(), as_json)
    if not report.passed:
        sys.exit(1)


for command in USE_COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line, and end the process of a rank at once: gloo's threads now and then abort a normal end."""
    status: Any = 0
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by whoever started it
    told = cast(TextIO, Lasting(sys.stderr or open(os.devnull, "w")))
    try:
        with contextlib.redirect_stderr(told):
            run()
    except SystemExit as end:
        status = end.code
        if not is_rank():
            raise
    if is_rank():
        sys.stdout.flush()
        told.flush()
        os._exit(int(status or 0))


def run() -> None:
    """Run the command line: what goes wrong is one line and status 2; a traceback means a fault in here."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        cli.main(args=words or ["--help"], prog_name="bertling", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        forget(sys.stdout)
        sys.exit(1)  # as click does where a write fails before the last flush
    except Exception as error:
        message = explain(error)
        if message is None or "--debug" in sys.argv:
            raise
        if isinstance(error, OSError):
            forget(sys.stdout)
        say(f"error: {message}")
        sys.exit(128 + signal.SIGINT if isinstance(error, click.Abort) else 2)


if __name__ == "__main__":
    main()
