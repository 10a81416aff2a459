"""The one schema of settings: INI keys = command-line flags = field names = help texts, strictly checked.

A value comes from the defaults, then `config.ini`, then `local_config.ini`, then the command line; the later wins.
"""

import configparser
import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bertling.files import BertlingError, readable_errors

Task = Literal["mlm", "sst2", "classification"]
COMMANDS: dict[str, str] = {"mlm": "pretrain", "sst2": "finetune", "classification": "finetune"}
# Other spellings of a key: the original project's, and those of Hugging Face's configurations.
ALIASES = {
    "n-layer": "n-layers",
    "hidden-size": "d-model",
    "num-attention-heads": "heads",
    "num-hidden-layers": "n-layers",
    "hidden-dropout-prob": "dropout",
    "max-position-embeddings": "seq-len",
    "max-steps": "max-iters",
    "warmup-steps": "warmup-iters",
    "max-grad-norm": "grad-clip",
}


def setting(
    default: Any,
    help: str,
    *,
    finetune: Any = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    only: str | None = None,
) -> Any:
    """A field of `Settings`: its default (and the one for fine-tuning, if another), help text and limits.

    `only` names the command that knows the setting on its command line; an INI file may hold it for both.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum}
    return field(default=default, metadata={"help": help, "finetune": finetune, "only": only, **limits})


@dataclass(frozen=True)
class Settings:
    """Everything that a training run is told. None means: follows from the others."""

    task_type: Task = setting(
        "mlm", "what is trained: mlm (pretrain), sst2 or classification (finetune)", finetune="sst2"
    )
    case: str = setting("", "the run's display name, and nothing else")
    base_dir: Path = setting(Path("."), "work folder: vocab/, datasets/ and runs/ lie in it")
    run_id: str | None = setting(None, "name of the run's folder under runs/; unset: run0, run1, ...")

    # what is trained
    preset: Literal["modern", "bert", "distilbert", "seed"] = setting("modern", "anatomy of the model")
    size: Literal["mini", "small", "base"] | None = setting(None, "size of the model; unset: mini")
    d_model: int | None = setting(None, "width of the model (hidden size); wins over size", minimum=1, maximum=16384)
    n_layers: int | None = setting(None, "number of layers; wins over size", minimum=1, maximum=1024)
    heads: int | None = setting(None, "number of attention heads; wins over size", minimum=1, maximum=4096)
    local_attention: int | None = setting(
        None,
        "modern: two blocks in three see so many tokens only, half of them to either side; unset: all see all",
        minimum=1,
        maximum=2**18,
    )
    dropout: float = setting(0.0, "dropout everywhere in the model", finetune=0.1, minimum=0, maximum=0.99)
    freeze_blocks: int = setting(
        0, "with --cp: keep the embeddings and so many of the lowest blocks as they are; 0: train all", minimum=0
    )
    word_vectors: Literal["random", "counts"] = setting(
        "random", "fresh weights; counts: vectors from counts of neighbours, heads that look at them", only="pretrain"
    )

    # data
    seq_len: int = setting(128, "tokens in a row, [CLS] and [SEP] among them", minimum=4, maximum=2**17)
    vocab: Path | None = setting(
        None,
        "vocabulary, a folder or vocab.txt; unset: <base-dir>/vocab, or the one that the data carry",
    )
    dataset_pattern: str = setting(
        "train_*",
        "training data: a glob under <base-dir>/datasets; several matches are taken in turn, one per epoch",
        only="pretrain",
    )
    val_dataset_pattern: str = setting("val_*", "validation data: a glob under <base-dir>/datasets", only="pretrain")
    mlm_probability: float = setting(
        0.15, "share of the tokens that are masked in training", above=0, maximum=0.9, only="pretrain"
    )
    whole_word_masking: bool = setting(False, "mask all pieces of a word together", only="pretrain")
    train_input: Path | None = setting(
        None,
        "labelled training texts (.tsv .csv .jsonl .parquet); unset: the SST-2 parquet files in <base-dir>/datasets",
        only="finetune",
    )
    val_input: Path | None = setting(None, "labelled texts to evaluate on; goes with train-input", only="finetune")
    text_column: str | None = setting(None, "column of the texts; unset: recognised by its name", only="finetune")
    label_column: str | None = setting(None, "column of the labels; unset: recognised by its name", only="finetune")

    # how long
    batch_size: int = setting(64, "rows per step, over all processes together", finetune=32, minimum=1, maximum=2**20)
    micro_batch_size: int | None = setting(
        None, "rows per forward pass of a process; unset: its whole share", minimum=1
    )
    max_iters: int | None = setting(
        None, "optimizer steps; unset: 10,000, or as long as max-minutes or epochs last", minimum=1, maximum=10**9
    )
    max_minutes: float | None = setting(None, "wall-clock budget of the training in minutes", above=0, maximum=10**7)
    epochs: float | None = setting(
        None, "passes over the data, one set each; unset: 3 in fine-tuning without other limits", above=0, maximum=10**6
    )

    # how fast it learns
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw, or muon for the hidden matrices and AdamW for the rest"
    )
    learning_rate: float = setting(1e-3, "highest learning rate of AdamW", finetune=1e-4, above=0)
    muon_learning_rate: float = setting(
        0.02, "highest learning rate of Muon (as in torch's with adjust_lr_fn 'original')", above=0
    )
    min_learning_rate: float | None = setting(None, "learning rate at the end; unset: 0", minimum=0)
    schedule: Literal["cosine", "trapezoid"] = setting(
        "cosine", "after the warm-up: cosine falls at once; trapezoid stays, then falls linearly"
    )
    cooldown: float = setting(0.5, "trapezoid: share of the run in which the rate falls", above=0, maximum=1)
    warmup_iters: int | None = setting(
        None, "steps in which the rate rises; unset: 2 % of the run (6 % when fine-tuning; 50 by the clock)", minimum=0
    )
    lr_decay_iters: int | None = setting(
        None, "step at which the rate has fallen to its lowest; unset: the last", minimum=1
    )
    weight_decay: float = setting(0.01, "weight decay, of matrices only", minimum=0)
    adam_beta2: float = setting(0.98, "second-moment decay of AdamW", finetune=0.999, above=0, maximum=0.99999)
    grad_clip: float = setting(1.0, "largest norm of the gradient", above=0)

    # what it tells and keeps
    val_interval: int | None = setting(
        None, "steps between evaluations; unset: a tenth of the run, by its steps or its time", minimum=1
    )
    save_every: str | None = setting(
        None, "time between checkpoints, in steps (500) or in minutes (10m); unset: val-interval"
    )
    max_checkpoints: int = setting(1, "checkpoints kept besides the best", minimum=1)
    wandb: bool = setting(False, "log to Weights & Biases too")

    # the machine
    seed: int = setting(123, "of weights, order, masks and dropout", minimum=0, maximum=2**31 - 1)
    seeds: int = setting(
        1,
        "train this many times, with seed, seed + 1, ..., and report mean, sd and interval",
        minimum=1,
        maximum=100,
        only="finetune",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to compute")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = setting(
        "auto",
        "number format of the matrix products; auto: bf16 where it is the faster one (GPUs; CPUs with AMX, AMD's "
        "with AVX512-BF16); int8: in training, of the hidden ones, on CPUs with VNNI but no AMX",
    )
    compile: Literal["auto", "true", "false"] = setting("auto", "torch.compile; auto: long pre-training on a GPU")
    fused_adamw: bool = setting(True, "AdamW in one fused kernel")
    async_to_device: bool = setting(True, "pinned, non-blocking copies to the device")
    threads: int | None = setting(None, "CPU threads a process; unset: the cores, shared out", minimum=1, maximum=1024)
    ddp: bool = setting(False, "train on several processes, launched through torchrun")
    nproc: int | None = setting(None, "processes with ddp; unset: one for each GPU, else 2", minimum=1, maximum=1024)
    dist_master_addr: str = setting("127.0.0.1", "address where the processes meet")
    dist_master_port: int | None = setting(
        None, "port where the processes meet; unset: a free one", minimum=1, maximum=65535
    )

    def __post_init__(self) -> None:
        if self.d_model is not None and self.heads is not None and self.d_model % self.heads:
            raise BertlingError(f"heads = {self.heads} does not divide d-model = {self.d_model}: choose heads that do")
        lowest, highest = self.min_learning_rate, self.learning_rate
        if lowest is not None and lowest > highest:
            raise BertlingError(f"min-learning-rate = {lowest} is over learning-rate = {highest}: lower it")
        for low, high in itertools.combinations(("warmup_iters", "lr_decay_iters", "max_iters"), 2):
            a, b = getattr(self, low), getattr(self, high)
            if a is not None and b is not None and a > b:
                raise BertlingError(
                    f"{key_of(low)} = {a} is over {key_of(high)} = {b}: lower {key_of(low)} or raise {key_of(high)}"
                )
        by_time_only = self.max_minutes is not None and self.max_iters is None and self.epochs is None
        if by_time_only and (self.warmup_iters is not None or self.lr_decay_iters is not None):
            raise BertlingError(
                "warmup-iters and lr-decay-iters count steps, but max-minutes ends this run: give max-iters "
                "too, or leave them out"
            )
        every, form = self.save_every, r"[1-9]\d{0,8}|(?=.*[1-9])\d{1,5}(\.\d{1,4})?m"
        if every is not None and not re.fullmatch(form, every):
            raise BertlingError(f"save-every = {every:.40}: must be a number of steps (500) or of minutes (10m)")
        if (self.train_input is None) != (self.val_input is None):
            raise BertlingError("train-input and val-input go together: give both or neither")
        if self.seed + self.seeds > 2**31:
            raise BertlingError(f"seed = {self.seed}: the last of {self.seeds} would be over {2**31 - 1}: lower it")
        if self.run_id is not None and (self.run_id in {"", ".", ".."} or "/" in self.run_id or "\\" in self.run_id):
            raise BertlingError(f"run-id = {self.run_id}: a plain folder name, please")

    @property
    def save_steps(self) -> int | None:
        """Steps between checkpoints, if they are asked for in steps."""
        return int(self.save_every) if self.save_every is not None and self.save_every.isdecimal() else None

    @property
    def save_minutes(self) -> float | None:
        """Minutes between checkpoints, if they are asked for in minutes."""
        return None if self.save_every is None or self.save_steps else float(self.save_every.removesuffix("m"))

    def to_ini(self, names: Collection[str] | None = None) -> str:
        """The settings, or those of them that are named, as an INI file that gives them back; unset ones left out."""
        lines = [
            f"{key_of(name)} = {as_text(value)}"
            for name, value in vars(self).items()
            if value is not None and value != "" and (names is None or name in names)
        ]
        return "\n".join(lines) + "\n"


def settings_line(settings: Settings, command: str) -> str:
    """The settings that mean something to the command, on one line; unset ones are left out."""
    pairs = [
        f"{key_of(item.name)}={as_text(getattr(settings, item.name))}"
        for item in dataclasses.fields(Settings)
        if concerns(item, command) and getattr(settings, item.name) not in (None, "")
    ]
    return "settings: " + " ".join(pairs)


def concerns(item: dataclasses.Field[Any], command: str) -> bool:
    """Whether the setting means something to the command."""
    return item.metadata["only"] in (None, command)


def as_text(value: Any) -> str:
    """A value as an INI file spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def key_of(name: str) -> str:
    """The INI key of a field's name."""
    return name.replace("_", "-")


def field_of(key: str, where: str) -> dataclasses.Field[Any]:
    """The field that an INI key or flag means; an unknown key is an error that names the nearest one."""
    wanted = key.strip().lower().replace("_", "-")
    wanted = ALIASES.get(wanted, wanted)
    known = {key_of(item.name): item for item in dataclasses.fields(Settings)}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "bertling pretrain --help lists them all"
        raise BertlingError(f"{where}: unknown setting '{key}'; {hint}")
    return known[wanted]


TYPES = typing.get_type_hints(Settings)
BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def accepted(item: dataclasses.Field[Any]) -> tuple[type, tuple[str, ...]]:
    """The plain type of a field, and the values that it may take if they can be listed."""
    kind = TYPES[item.name]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return str, typing.get_args(kind)
    return kind, ()


def parse_value(item: dataclasses.Field[Any], text: str, where: str) -> Any:
    """Turn an INI value or a flag's text into the field's type, within its limits."""
    kind, choices = accepted(item)
    name, text = f"{where}: {key_of(item.name)} = {' '.join(text.split())}", text.strip()
    if "\n" in text or re.search(r"(^|\s)#|[\0\ud800-\udfff]", text):  # the run's config.ini could not give it back
        raise BertlingError(
            f"{name}: a value holds no line end, and no '#' at its beginning or after a space; in UTF-8"
        )
    if choices:
        if text.lower() not in choices:
            near = difflib.get_close_matches(text.lower(), choices, n=1)
            raise BertlingError(
                f"{name}: must be one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
            )
        return text.lower()
    if kind is bool:
        value = BOOLEANS.get(text.lower())
        if value is None:
            raise BertlingError(f"{name}: must be true or false")
        return value
    if kind in (int, float):
        return parse_number(item, kind, text, name)
    if not text and kind is Path:
        raise BertlingError(f"{name}: a path is missing")
    return kind(text)


def parse_number(item: dataclasses.Field[Any], kind: type, text: str, name: str) -> int | float:
    """An int or a finite float within the field's limits; underscores between digits are fine."""
    try:
        number: int | float = kind(text)
    except ValueError:
        raise BertlingError(f"{name}: must be a {'whole number' if kind is int else 'number'}") from None
    if not abs(number) < float("inf"):
        raise BertlingError(f"{name}: must be a finite number")
    limits = item.metadata
    if limits["minimum"] is not None and number < limits["minimum"]:
        raise BertlingError(f"{name}: must be at least {limits['minimum']}")
    if limits["above"] is not None and number <= limits["above"]:
        raise BertlingError(f"{name}: must be above {limits['above']}")
    if limits["maximum"] is not None and number > limits["maximum"]:
        raise BertlingError(f"{name}: must be at most {limits['maximum']}")
    return number


def read_ini(path: Path) -> dict[str, Any]:
    """The settings that an INI file gives, by field name. Section headers are allowed and mean nothing."""
    with readable_errors(path):
        return parse_ini(path.read_bytes(), path)


def parse_ini(raw: bytes, path: Path) -> dict[str, Any]:
    """The same of its bytes; `path` is for what there is to complain about."""
    parser = configparser.ConfigParser(
        interpolation=None,
        inline_comment_prefixes=("#",),
        delimiters=("=", ":"),
        comment_prefixes=("#", ";"),
        default_section="\0",
    )
    try:
        parser.read_string("[\1]\n" + raw.decode("utf-8-sig"), source=str(path))
    except UnicodeDecodeError as error:
        raise BertlingError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except (configparser.DuplicateOptionError, configparser.DuplicateSectionError) as error:
        what = getattr(error, "option", f"[{error.section}]")
        raise BertlingError(f"{path}: line {(error.lineno or 1) - 1}: {what} is given twice: keep one") from None
    except configparser.ParsingError as error:
        where = f"line {error.errors[0][0] - 1}"
        raise BertlingError(f"{path}: {where}: not of the form 'key = value': mend or remove it") from None
    values: dict[str, Any] = {}
    for section in parser.sections():
        for key, text in parser[section].items():
            if "\n" in text:
                raise BertlingError(f"{path}: {key}: the line below it is indented: begin each key at the line's start")
            item = field_of(key, str(path))
            if item.name in values:
                raise BertlingError(f"{path}: {key_of(item.name)} is given twice (as '{key}' too): keep one")
            values[item.name] = parse_value(item, text, str(path))
    return values


def default_files(folder: Path) -> list[Path]:
    """`config.ini` and `local_config.ini`, those that exist."""
    return [path for path in (folder / "config.ini", folder / "local_config.ini") if path.exists()]


def read_settings(files: list[Path], flags: Mapping[str, Any]) -> tuple[Settings, frozenset[str]]:
    """What `resolve` gives for the command that the files' task-type names."""
    given = {name: value for path in files for name, value in read_ini(path).items()}
    return resolve(COMMANDS[given.get("task_type", "mlm")], files, flags)


def parse_settings(texts: Mapping[str, str]) -> Settings:
    """The defaults, with some values given as text (a command's own few flags)."""
    parsed = {}
    for key, text in texts.items():
        item = field_of(key, "command line")
        parsed[item.name] = parse_value(item, text, "command line")
    return Settings(**parsed)


def resolve(command: str, files: Iterable[Path], flags: Mapping[str, Any]) -> tuple[Settings, frozenset[str]]:
    """Defaults, then the files in their order, then the flags; and the names that were given explicitly.

    `command` is pretrain or finetune: a `task-type` that disagrees is an error that names the right command.
    """
    given: dict[str, Any] = {}
    for path in files:
        given.update(read_ini(path))
    given.update(flags)
    task = given.get("task_type", "mlm" if command == "pretrain" else "sst2")
    if COMMANDS[task] != command:
        raise BertlingError(f"task-type = {task} goes with 'bertling {COMMANDS[task]}', not with 'bertling {command}'")
    defaults = {
        item.name: item.metadata["finetune"]
        for item in dataclasses.fields(Settings)
        if command == "finetune" and item.metadata["finetune"] is not None
    }
    return Settings(**{**defaults, **given}), frozenset(given)
