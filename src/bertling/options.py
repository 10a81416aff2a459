"""The flags that commands share: one for each setting, grouped in --help, and those of inputs, starts and answers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bertling.settings import Settings, accepted, as_text, key_of, parse_value

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

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


def concerns(item: dataclasses.Field[Any], command: str) -> bool:
    """Whether the setting means something to the command."""
    return item.metadata["only"] in (None, command)


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
    if item.name == "n_layers":
        names.append("--n-layer")  # the seed's spelling
    return click.option(
        *names,
        item.name,
        default=None,
        expose_value=False,
        callback=collect,
        metavar="|".join(choices) if choices else {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT"),
        help=item.metadata["help"] + shown,
    )


def start_options(function: F) -> F:
    """The options that say where a training begins."""
    function = click.option("--resume", is_flag=True, help="go on with the newest unfinished run")(function)
    function = click.option(
        "--cp",
        type=PATH,
        help="run, checkpoint or Hugging Face model folder: go on with a run of this kind, else start from its weights",
    )(function)
    return click.option(
        "-c",
        "--config",
        "configs",
        type=PATH,
        multiple=True,
        help="settings file; several are read in their order  [default: config.ini, then local_config.ini]",
    )(function)


def text_input_options(function: F) -> F:
    """Where the text files are and how they are written, for `vocab` and `prepare`."""
    function = click.option(
        "--text-field", default="text", show_default=True, help="field of .jsonl and column of .parquet files"
    )(function)
    function = click.option(
        "--wikitext/--no-wikitext",
        default=None,
        help="undo WikiText's @-@ and <unk>  [default: where the file has that form]",
    )(function)
    return click.option(
        "-i",
        "--input",
        "inputs",
        type=PATH,
        multiple=True,
        required=True,
        help="text file: .txt .jsonl .parquet, also .gz .xz .zst; may be given several times",
    )(function)


def ask_options(function: F) -> F:
    """The model to ask, and the texts to ask it about."""
    function = device_option(function)
    function = click.option("--cp", type=PATH, required=True, help="run, checkpoint or Hugging Face model folder")(
        function
    )
    function = click.option("--input", "input_file", type=PATH, help="file of texts, one a line; - for standard input")(
        function
    )
    return json_option(click.argument("texts", nargs=-1)(function))


def device_option(function: F) -> F:
    """Where a model computes."""
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps")(function)


def force_option(what: str) -> Callable[[F], F]:
    """Leave to replace an output."""
    return click.option("--force", is_flag=True, help=f"replace {what}")


def json_option(function: F) -> F:
    """Answer for programs."""
    return click.option("--json", "as_json", is_flag=True, help="answer as JSON on standard output")(function)
