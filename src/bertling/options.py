"""The flags that commands share: one for each setting, grouped in --help, and those of inputs, starts and answers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from bertling.settings import ALIASES, Settings, accepted, as_text, concerns, key_of, parse_value

F = TypeVar("F", bound=Callable[..., Any])


def was_given(context: click.Context, *names: str) -> bool:
    """Whether the user gave any of these parameters, in place of its default."""
    return any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in names)


class FilledPath(click.Path):
    """A path; an empty one is a variable that a shell did not know, and would be the folder here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("a path is missing", param, ctx)
        return super().convert(value, param, ctx)


PATH = FilledPath(path_type=Path)

# The heading of each group of settings, and the first one in it, in the order of `Settings`.
GROUPS = {
    "case": "Work folder and run",
    "preset": "Model",
    "seq_len": "Data",
    "batch_size": "Length of the run",
    "optimizer": "How fast it learns",
    "val_interval": "What it tells and keeps",
    "seed": "Seeds and machine",
}


class GroupedCommand(click.Command):
    """A command whose --help shows the settings in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One list of flags for each group; flags that are no settings come first."""
        group_of, heading = {}, ""
        for item in dataclasses.fields(Settings):
            heading = GROUPS.get(item.name, heading)
            group_of[item.name] = heading
        records: dict[str, list[tuple[str, str]]] = {"Options": [], **{heading: [] for heading in GROUPS.values()}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                records[group_of.get(parameter.name or "", "Options")].append(record)
        for heading, rows in records.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def training_options(command: str) -> Callable[[F], F]:
    """One flag for each setting that the command knows; the given ones arrive in the context's `obj`, by field name."""

    def decorate(function: F) -> F:
        for item in reversed(dataclasses.fields(Settings)):
            if item.name != "task_type" and concerns(item, command):
                function = setting_option(item, command)(function)
        return function

    return decorate


def setting_option(item: dataclasses.Field[Any], command: str) -> Callable[[F], F]:
    """The flag of one setting."""
    kind, choices = accepted(item)
    name = "--" + key_of(item.name)
    default = item.metadata["finetune"] if command == "finetune" else None
    default = item.default if default is None else default
    shown = "" if default in (None, "") else f"  [default: {as_text(default)}]"

    def collect(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            context.ensure_object(dict)[item.name] = parse_value(item, str(value), "command line")

    names = [f"{name}/--no-{key_of(item.name)}"] if kind is bool else [name]
    names += [f"--{alias}" for alias, key in ALIASES.items() if key == key_of(item.name) and kind is not bool]
    return click.option(
        *names,
        item.name,
        default=None,
        expose_value=False,
        callback=collect,
        metavar="|".join(choices) if choices else {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT"),
        help=item.metadata["help"] + shown,
    )


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order of --help."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def force_option(what: str) -> Callable[[F], F]:
    """Leave to replace an output."""
    return click.option("--force", is_flag=True, help=f"replace {what}")


def choice_option(name: str, choices: list[str], help: str) -> Callable[[F], F]:
    """One of a few words, the first by default."""
    return click.option(name, type=click.Choice(choices), default=choices[0], show_default=True, help=help)


def json_option(function: F) -> F:
    """Answer for programs."""
    return click.option("--json", "as_json", is_flag=True, help="answer as JSON on standard output")(function)


MODEL = "run, checkpoint or Hugging Face model folder"
box_option = click.option("--cp", type=PATH, help=f"{MODEL}  [default: the model in the box]")

device_option = choice_option("--device", ["auto", "cpu", "cuda", "mps"], "where to compute")

start_options = together(
    click.option(
        "-c",
        "--config",
        "configs",
        type=PATH,
        multiple=True,
        help="settings file; several are read in their order  [default: config.ini, then local_config.ini]",
    ),
    click.option(
        "--cp",
        type=PATH,
        help="run, checkpoint or Hugging Face model folder: a run of the same command goes on; with a --run-id that "
        "is not its own (or is, under another --base-dir), or from any other folder, a new run starts from its weights",
    ),
    click.option("--resume", is_flag=True, help="go on with the newest unfinished run"),
)
"""Where a training begins."""

input_options = together(
    click.option(
        "-i",
        "--input",
        "inputs",
        type=PATH,
        multiple=True,
        required=True,
        help="text file: .txt .jsonl .parquet, also .gz .xz .zst; more may follow",
    ),
    click.argument("more", type=PATH, nargs=-1, metavar="[FILE]..."),
    click.option(
        "--wikitext/--no-wikitext",
        default=None,
        help="undo WikiText's @-@ and <unk>, begin documents at titles  [default: in files that begin with a title]",
    ),
    click.option("--text-field", default="text", show_default=True, help="field of .jsonl and column of .parquet"),
)
"""Where raw text is, and how it is written."""

prepare_options = together(
    click.option("-l", "--label", required=True, help="name of the data set"),
    click.option("-o", "--output", type=PATH, required=True, help="folder for the data sets"),
    click.option("-m", "--max-len", type=int, default=128, show_default=True, help="ids in a row, [CLS] and [SEP] too"),
    click.option("-v", "--vocab", "vocabulary", type=PATH, required=True, help="vocab.txt or its folder"),
    click.option(
        "-s",
        "--seed",
        type=int,
        default=123,
        show_default=True,
        help="of the order in train, and of static masks",
    ),
    choice_option(
        "--method",
        ["split", "segment"],
        "split: token ids in exact lengths; segment: text cut every (max-len - 2) * 4 characters",
    ),
    choice_option(
        "--format",
        ["shards", "msgpack", "msgpack-plain"],
        "shards: masks drawn in training; msgpack: static masks, the original project's layout; -plain: not compressed",
    ),
    click.option("--val-input", "val_inputs", type=PATH, multiple=True, help="official validation file"),
    click.option("--test-input", "test_inputs", type=PATH, multiple=True, help="official test file"),
    click.option("--split", "shares", help="shares of train, val, test, as 0.8,0.1,0.1"),
    click.option("--clean", is_flag=True, help="keep only letters, digits, white space and , . ! ? ' \" -"),
    click.option("--drop-duplicates", is_flag=True, help="leave out repeated documents and lines"),
    click.option("--workers", type=click.IntRange(1, 1024), help="processes  [default: all cores]"),
    force_option("data sets of the same name"),
)
"""What `prepare` makes of raw text; the names are those of its parameters."""

ask_options = together(
    click.argument("texts", nargs=-1),
    click.option("--input", "input_file", type=PATH, help="file of texts, one a line; - for standard input"),
    box_option,
    device_option,
    choice_option(
        "--dtype",
        ["fp32", "bf16", "fp16", "int8", "auto"],
        "number format of weights and matrix products; auto: the fastest on this machine but int8, which rounds the "
        "hidden ones (on CPUs with VNNI, without AMX)",
    ),
)
"""The model to ask, and the texts to ask it about."""
