"""The `bertling` command: parsing and wiring only. Heavy modules are imported by the command that needs them."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from bertling.files import BertlingError
from bertling.settings import Settings, accepted, default_files, key_of, parse_value

STOPPED = 3
"""Exit status of a training that was asked to stop, and saved."""
F = TypeVar("F", bound=Callable[..., Any])


def say(text: str) -> None:
    """What is not an answer goes to standard error."""
    click.echo(text, err=True)


def answer(value: Any, text: str, as_json: bool) -> None:
    """The answer of a command, on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False) if as_json else text)


def training_options(command: str) -> Callable[[F], F]:
    """One flag for each setting that the command knows; given flags arrive in `flags`, others are absent."""

    def decorate(function: F) -> F:
        for item in reversed(dataclasses.fields(Settings)):
            only = item.metadata["only"]
            if item.name != "task_type" and only in (None, command):
                function = setting_option(item, command)(function)
        return function

    return decorate


def setting_option(item: dataclasses.Field[Any], command: str) -> Callable[[F], F]:
    """The flag of one setting."""
    kind, choices = accepted(item)
    name = "--" + key_of(item.name)
    default = item.metadata["finetune"] if command == "finetune" else None
    default = item.default if default is None else default
    shown = "" if default in (None, "") else f"  [default: {str(default).lower() if kind is bool else default}]"

    def collect(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            parsed = parse_value(item, str(value), "command line")
            context.ensure_object(dict)[item.name] = parsed

    names = [name, *({"n_layers": ["--n-layer"]}.get(item.name, []))]
    return click.option(
        *([f"{name}/--no-{key_of(item.name)}"] if kind is bool else names),
        item.name,
        default=None,
        expose_value=False,
        callback=collect,
        metavar="|".join(choices) if choices else {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT"),
        help=item.metadata["help"] + shown,
    )


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="answer as JSON on standard output")(function)


def text_options(function: F) -> F:
    function = click.option("--device", default="auto", help="auto, cpu, cuda or mps")(function)
    function = click.option(
        "--cp", type=click.Path(path_type=Path), required=True, help="run, checkpoint or Hugging Face model folder"
    )(function)
    function = click.option(
        "--input", "input_file", type=click.Path(path_type=Path), help="file of texts, one a line; - for standard input"
    )(function)
    return json_option(click.argument("texts", nargs=-1)(function))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="bertling")
@click.option("--debug", is_flag=True, help="show the traceback of an error (works behind any command)")
def cli(debug: bool) -> None:
    """Raise your own small BERT: from raw text to a model that answers."""


@cli.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("quickstart"),
    show_default=True,
    help="where everything is written",
)
@click.option(
    "--minutes", type=click.FloatRange(0.05, 60), default=2.5, show_default=True, help="length of the pre-training"
)
@click.option("--force", is_flag=True, help="replace an earlier quickstart in the folder")
@json_option
def quickstart(folder: Path, minutes: float, force: bool, as_json: bool) -> None:
    """Watch a BERT grow in a few minutes, offline: vocabulary, data, pre-training, fine-tuning, answers."""
    from bertling.tools.quickstart import run_quickstart

    result = run_quickstart(folder, minutes=minutes, force=force, say=say)
    answer(result.to_dict(), result.text(), as_json)


@cli.command()
@click.option(
    "-i",
    "--input",
    "inputs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="text file: .txt .jsonl .parquet, also .gz .xz .zst; may be given several times",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="folder for the vocabulary")
@click.option("--size", type=click.IntRange(64, 1_000_000), default=8192, show_default=True, help="entries")
@click.option("--cased", is_flag=True, help="keep upper case and accents")
@click.option(
    "--wikitext/--no-wikitext",
    default=None,
    help="undo WikiText's @-@ and <unk>  [default: where the file has that form]",
)
@click.option("--force", is_flag=True, help="replace a vocabulary that is there")
@json_option
def vocab(
    inputs: tuple[Path, ...], output: Path, size: int, cased: bool, wikitext: bool | None, force: bool, as_json: bool
) -> None:
    """Make a WordPiece vocabulary from text files."""
    from bertling.tools.vocab import make_vocabulary

    result = make_vocabulary(inputs, output, size, lowercase=not cased, wikitext=wikitext, force=force, say=say)
    answer(result, f"{output}: {result['entries']:,} entries, {result['seconds']:.1f} s", as_json)


@cli.command()
@click.option(
    "-i",
    "--input",
    "inputs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="text file: .txt .jsonl .parquet, also .gz .xz .zst; may be given several times",
)
@click.option("-l", "--label", required=True, help="name of the data set")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="folder for the data sets")
@click.option("-m", "--max-len", type=int, default=128, show_default=True, help="ids in a row, [CLS] and [SEP] too")
@click.option(
    "-v", "--vocab", "vocabulary", type=click.Path(path_type=Path), required=True, help="vocab.txt or its folder"
)
@click.option("-s", "--seed", type=int, default=123, show_default=True, help="of the split and of static masks")
@click.option(
    "--method",
    type=click.Choice(["split", "segment"]),
    default="split",
    show_default=True,
    help="split: token ids in exact lengths; segment: text cut every (max-len - 2) * 4 characters",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["shards", "msgpack"]),
    default="shards",
    show_default=True,
    help="shards: masks drawn in training; msgpack: static masks, the seed's layout",
)
@click.option(
    "--val-input", "val_inputs", type=click.Path(path_type=Path), multiple=True, help="official validation file"
)
@click.option("--test-input", "test_inputs", type=click.Path(path_type=Path), multiple=True, help="official test file")
@click.option("--split", "shares", help="shares of train, val, test, as 0.8,0.1,0.1")
@click.option(
    "--wikitext/--no-wikitext",
    default=None,
    help="undo WikiText's @-@ and <unk>  [default: where the file has that form]",
)
@click.option("--clean", is_flag=True, help="keep only letters, digits, white space and , . ! ? ' \" -")
@click.option("--text-field", default="text", show_default=True, help="field of .jsonl and column of .parquet files")
@click.option("--drop-duplicates", is_flag=True, help="leave out repeated documents and lines")
@click.option("--workers", type=click.IntRange(1, 1024), help="processes  [default: all cores]")
@click.option("--force", is_flag=True, help="replace data sets of the same name")
@json_option
def prepare(
    inputs: tuple[Path, ...],
    label: str,
    output: Path,
    max_len: int,
    vocabulary: Path,
    seed: int,
    method: str,
    form: str,
    val_inputs: tuple[Path, ...],
    test_inputs: tuple[Path, ...],
    shares: str | None,
    wikitext: bool | None,
    clean: bool,
    text_field: str,
    drop_duplicates: bool,
    workers: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Turn text files into rows of token ids, split by document, with a data card."""
    from bertling.prepare import prepare as run_prepare
    from bertling.progress import ByteProgress
    from bertling.text import TextOptions
    from bertling.tokenizer import Tokenizer

    with ByteProgress("preparing") as progress:
        card = run_prepare(
            inputs,
            label,
            output,
            max_len,
            Tokenizer.load(vocabulary),
            seed=seed,
            method=method,
            val_inputs=val_inputs,
            test_inputs=test_inputs,
            split=parse_shares(shares),
            format=form,
            options=TextOptions(wikitext=wikitext, clean=clean, text_field=text_field),
            drop_duplicates=drop_duplicates,
            workers=workers,
            force=force,
            progress=progress,
        )
    answer(card.to_dict(), card.text(), as_json)


def parse_shares(text: str | None) -> tuple[float, float, float] | None:
    """Three shares, as 0.8,0.1,0.1."""
    if text is None:
        return None
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise BertlingError(f"split: {text}: must be three numbers, as 0.8,0.1,0.1") from None
    return train, val, test


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-n", "--rows", type=click.IntRange(0, 1000), default=3, show_default=True, help="rows to show")
@click.option(
    "-v", "--vocab", "vocabulary", type=click.Path(path_type=Path), help="for .msgpack files: vocab.txt or its folder"
)
@click.option("--mlm-probability", type=click.FloatRange(0.0, 0.9, min_open=True), default=0.15, show_default=True)
@json_option
def inspect(path: Path, rows: int, vocabulary: Path | None, mlm_probability: float, as_json: bool) -> None:
    """Show rows of a prepared data set, and audit its masks."""
    from bertling.tools.inspect import inspect as run_inspect

    report = run_inspect(path, rows=rows, vocabulary=vocabulary, mlm_probability=mlm_probability)
    answer(report.to_dict(), report.text(), as_json)


def start_options(function: F) -> F:
    """The options that say where a training begins."""
    function = click.option("--resume", is_flag=True, help="go on with the newest unfinished run")(function)
    function = click.option(
        "--cp",
        type=click.Path(path_type=Path),
        help="run, checkpoint or Hugging Face model folder: go on with a run of this kind, else start from its weights",
    )(function)
    return click.option(
        "-c",
        "--config",
        "configs",
        type=click.Path(path_type=Path),
        multiple=True,
        help="settings file  [default: config.ini, then local_config.ini]",
    )(function)


@cli.command()
@start_options
@training_options("pretrain")
@json_option
@click.pass_context
def pretrain(context: click.Context, configs: tuple[Path, ...], cp: Path | None, resume: bool, as_json: bool) -> None:
    """Pre-train a masked language model on prepared data."""
    start = begin("pretrain", configs, context.obj or {}, cp, resume)
    from bertling.pretrain import load_data
    from bertling.pretrain import pretrain as run_pretrain

    if wants_launch(start.settings):
        load_data(start.settings, start.explicit, None, lambda text: None)
        launch_self(start)
    outcome = run_pretrain(start, say)
    finish([outcome.run], outcome.finished)
    answer(
        {
            **outcome.metrics,
            "run": str(outcome.run),
            "step": outcome.step,
            "seconds": outcome.seconds,
            "finished": outcome.finished,
            "best_accuracy": outcome.best_accuracy,
            "best_step": outcome.best_step,
        },
        f"{outcome.run}: step {outcome.step:,}, {outcome.seconds / 60:.1f} minutes, validation accuracy "
        f"{outcome.metrics.get('eval/accuracy', 0.0):.1%}, loss {outcome.metrics.get('eval/loss', 0.0):.3f}",
        as_json,
    ) if is_first() else None
    if not outcome.finished:
        sys.exit(STOPPED)


@cli.command()
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
    from bertling.finetune import finetune as run_finetune
    from bertling.finetune import load_texts

    if wants_launch(start.settings):
        load_texts(start.settings)
        launch_self(start)
    result = run_finetune(start, say, from_scratch=from_scratch or (start.run is not None and start.checkpoint is None))
    finish([one.outcome.run for one in result.seeds], True)
    answer(result.to_dict(), result.text(), as_json) if is_first() else None
    if not result.seeds[-1].outcome.finished:
        sys.exit(STOPPED)


def begin(command: str, configs: tuple[Path, ...], flags: dict[str, Any], cp: Path | None, resume: bool) -> Any:
    """Resolve the settings and say them."""
    from bertling.runs import resolve_start

    start = resolve_start(command, list(configs) or default_files(Path()), flags, cp=cp, resume=resume)
    if is_first():
        pairs = [line.replace(" = ", "=") for line in start.settings.to_ini().splitlines()]
        say("settings: " + " ".join(pairs))
    return start


def wants_launch(settings: Settings) -> bool:
    """Whether this process should start others and wait, instead of training itself."""
    from bertling.distributed import launched

    return settings.ddp and not launched()


def launch_self(start: Any) -> None:
    """Run this very command on several processes, and end with their status."""
    from bertling.distributed import launch

    sys.exit(launch(start.settings, start.explicit, sys.argv[1:]))


def is_first() -> bool:
    """Whether this is the process that answers."""
    import os

    return os.environ.get("RANK", "0") == "0"


def finish(runs: Iterable[Path], finished: bool) -> None:
    """Draw the plots of finished runs."""
    if not (finished and is_first()):
        return
    from bertling.plots import plot_run

    for run in runs:
        for path in plot_run(run):
            say(f"plot: {path}")


@cli.command()
@click.option("--cp", type=click.Path(path_type=Path), required=True, help="run, checkpoint or Hugging Face folder")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="prepared data set (masked language model) or labelled file (classifier)",
)
@click.option("--text-column", help="column of the texts  [default: recognised by its name]")
@click.option("--label-column", help="column of the labels  [default: recognised by its name]")
@click.option("--device", default="auto", help="auto, cpu, cuda or mps")
@json_option
def evaluate(
    cp: Path, data: Path, text_column: str | None, label_column: str | None, device: str, as_json: bool
) -> None:
    """Score a checkpoint on a whole data set."""
    from bertling.tools.evaluate import evaluate as run_evaluate

    result = run_evaluate(cp, data, text_column=text_column, label_column=label_column, device=device)
    answer(result.to_dict(), result.text(), as_json)


def open_model(cp: Path, device: str) -> Any:
    """The model to ask."""
    from bertling.inference import load
    from bertling.runtime import build_runtime
    from bertling.settings import parse_settings

    return load(cp, build_runtime(parse_settings({"device": device, "dtype": "fp32"})))


@cli.command()
@text_options
@click.option("-k", "--top-k", type=click.IntRange(1, 1000), default=5, show_default=True, help="answers a mask")
def fill(texts: tuple[str, ...], input_file: Path | None, cp: Path, device: str, as_json: bool, top_k: int) -> None:
    """Say what may stand at [MASK] in a text."""
    from bertling.inference import iter_texts

    model = open_model(cp, device)
    for chunk in iter_texts(texts, input_file):
        for one in model.fill(chunk, top_k=top_k):
            ranked = [", ".join(f"{token} {share:.1%}" for token, share in mask) for mask in one["masks"]]
            answer(one, "\n".join([one["text"], *(f"  [MASK]: {row}" for row in ranked)]), as_json)


@cli.command()
@text_options
def classify(texts: tuple[str, ...], input_file: Path | None, cp: Path, device: str, as_json: bool) -> None:
    """Say which class a text belongs to."""
    from bertling.inference import iter_texts

    model = open_model(cp, device)
    for chunk in iter_texts(texts, input_file):
        for one in model.classify(chunk):
            answer(one, f"{one['label']}\t{one['score']:.3f}\t{one['text']}", as_json)


@cli.command()
@click.option("--cp", type=click.Path(path_type=Path), help="run, checkpoint or Hugging Face folder")
@click.option("--preset", default="modern", show_default=True, help="modern, bert, distilbert or seed")
@click.option("--size", default="mini", show_default=True, help="mini, small or base")
@click.option("--vocab-size", type=click.IntRange(8), default=8192, show_default=True)
@json_option
def summary(cp: Path | None, preset: str, size: str, vocab_size: int, as_json: bool) -> None:
    """Draw the anatomy of a model: every module, its shape, its parameters."""
    from bertling.tools.anatomy import anatomy

    result = anatomy(cp, preset, size, vocab_size)
    answer(result.to_dict(), result.text(), as_json)


def main() -> None:
    """Run the command line: errors are one line and status 2."""
    debug = "--debug" in sys.argv
    try:
        cli.main(args=[word for word in sys.argv[1:] if word != "--debug"], prog_name="bertling")
    except BertlingError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except MemoryError:
        if debug:
            raise
        click.echo("error: out of memory; lower micro-batch-size, or the size of the model", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
