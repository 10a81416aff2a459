"""What goes wrong is one line that names the file, field or value and the way out; nothing half-written is left."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
import pyarrow
import pyarrow.parquet
import pytest
from commands import SMALL, TEXT, VOCAB, World, bertling, listing, make_world
from safetensors.torch import load_file, save_file

from bertling.files import UNFINISHED

Words = Sequence[object]
STEPS = ["--batch-size", 4, "--max-iters", 2, "--dtype", "fp32", "--threads", 1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.getbasetemp())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(world: World, here: Path, words: Words, *parts: str) -> str:
    """Run the command; its one line must hold all parts, and no file may have come or gone."""
    before = listing(here), listing(world.base)
    line = bertling(*words).error
    for part in parts:
        assert part in line, line
    assert len(line) < 400
    assert UNFINISHED not in line
    assert (listing(here), listing(world.base)) == before
    return line


def prepare_words(text: str = "text.txt", *more: object) -> list[object]:
    return ["prepare", "-i", text, "-l", "x", "-o", "data", "-m", 16, "-v", VOCAB, "--workers", 1, *more]


# text

BAD_TEXTS: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "missing": (None, ("text.txt", "no such file", "check the path")),
    "empty": (b"", ("text.txt", "empty", "name a file with text")),
    "blank": (b" \n\n \n", ("text.txt", "empty", "name a file with text")),
    "binary": (b"word \0\1\2 word\n" * 9, ("text.txt: line 1", "binary", "name a text file")),
    "latin-1": ("words\nd\xe9j\xe0 vu\n".encode("latin-1"), ("text.txt: line 2", "not UTF-8", "0xe9", "convert")),
    "utf-16": ("some words\n".encode("utf-16"), ("text.txt: line 1", "not UTF-8", "convert")),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
@pytest.mark.parametrize("command", ["vocab", "prepare"])
def test_text(command: str, kind: str, world: World, here: Path) -> None:
    content, parts = BAD_TEXTS[kind]
    if content is not None:
        (here / "text.txt").write_bytes(content)
    words = prepare_words() if command == "prepare" else ["vocab", "-i", "text.txt", "-o", "v"]
    refuse(world, here, words, *parts)


def test_text_of_damaged_containers(world: World, here: Path) -> None:
    (here / "cut.txt.gz").write_bytes(b"\x1f\x8b\x08\x00\x00")
    (here / "not.txt.xz").write_bytes(b"plain text")
    (here / "not.parquet").write_bytes(b"plain text")
    (here / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    (here / "torn.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    refuse(world, here, prepare_words("cut.txt.gz"), "cut.txt.gz", "ends too early", "make it again")
    refuse(world, here, prepare_words("not.txt.xz"), "not.txt.xz", "not xz data", "make it again")
    refuse(world, here, prepare_words("not.parquet"), "not.parquet", "not a parquet file")
    refuse(world, here, prepare_words("bad.jsonl"), "bad.jsonl: line 2", "no field 'text'", "(it has txt)")
    refuse(world, here, prepare_words("torn.jsonl"), "torn.jsonl: line 2", "not JSON")
    refuse(world, here, prepare_words("."), ".: this is a folder: name ")


def test_parquet_without_the_text_column(world: World, here: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["some words"]}), here / "text.parquet")
    refuse(world, here, prepare_words("text.parquet"), "text.parquet: no column 'text' (it has body)", "text's column")


def test_text_shorter_than_one_sample(world: World, here: Path) -> None:
    (here / "text.txt").write_text("only three words\n")
    line = bertling(*prepare_words()).error
    assert re.match(r"text.txt: its \d+ training tokens are fewer than one sample of 14; .* smaller max-len$", line)
    assert [path.name for path in (here / "data").iterdir()] == ["ids"]  # token ids, to be used again


def test_text_too_small_for_the_vocabulary(world: World, here: Path) -> None:
    words = ["vocab", "-i", TEXT, "-o", "v", "--size"]
    refuse(world, here, [*words, 20000], "size: 20000 is more than this text can give", "or less, or more text")
    refuse(world, here, [*words, 200, "--text-field", "body"], "--text-field: is for .jsonl and .parquet files")
    more = ["--val-input", TEXT, TEXT]  # as a pattern becomes in a shell
    refuse(world, here, prepare_words(str(TEXT), *more), f"{TEXT}: of which split?", "takes its own option")


# vocabulary


def vocabulary(change: Callable[[list[str]], list[str]]) -> str:
    return "\n".join(change((VOCAB / "vocab.txt").read_text().splitlines())) + "\n"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda lines: lines[5:], ("vocab.txt", "[PAD]", "[MASK]")),
        (lambda lines: [line for line in lines if line != "[MASK]"], ("vocab.txt", "[MASK]")),
        (lambda lines: [*lines, lines[20]], ("vocab.txt", "401", "21")),
        (lambda lines: [], ("vocab.txt: empty", "one entry per line", "bertling vocab")),
    ],
)
def test_vocabulary(change: Callable[[list[str]], list[str]], parts: tuple[str, ...], world: World, here: Path) -> None:
    (here / "vocab.txt").write_text(vocabulary(change))
    words = ["prepare", "-i", TEXT, "-l", "x", "-o", "data", "-m", 16, "-v", "vocab.txt", "--workers", 1]
    refuse(world, here, words, *parts)


def test_vocabulary_that_is_not_there(world: World, here: Path) -> None:
    words = ["prepare", "-i", TEXT, "-l", "x", "-o", "data", "-m", 16, "-v", "none"]
    refuse(world, here, words, "none", "no ")
    shutil.copytree(world.data, here / "datasets")
    for folder in (here / "datasets").glob("t*"):
        (folder / "vocab.txt").unlink()
    refuse(world, here, ["pretrain", *SMALL, *STEPS], "vocab/vocab.txt: missing", "--vocab")


# settings


def settings(world: World, text: str, *flags: object, command: str = "pretrain") -> list[object]:
    Path("config.ini").write_text(text)
    return [command, "--base-dir", world.base, *flags]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch-sze = 4\n", ("config.ini", "unknown setting 'batch-sze'", "did you mean batch-size?")),
        ("qqqq = 4\n", ("config.ini", "unknown setting 'qqqq'", "--help lists them all")),
        ("batch-size = many\n", ("config.ini: batch-size = many", "whole number")),
        ("batch-size = 0\n", ("config.ini: batch-size = 0", "at least 1")),
        ("learning-rate = nan\n", ("config.ini: learning-rate = nan", "finite")),
        ("preset = modrn\n", ("config.ini: preset = modrn", "did you mean modern?")),
        ("wandb = maybe\n", ("config.ini: wandb = maybe", "true or false")),
        ("n-layer = 1\nn-layers = 2\n", ("config.ini: n-layers is given twice", "keep one")),
        ("just words\n", ("config.ini: line 1: not of the form 'key = value'", "mend")),
        ("seed = 1\nseed = 2\n", ("config.ini: line 2: seed is given twice", "keep one")),
        ("d-model = 30\nheads = 4\n", ("heads = 4 does not divide d-model = 30", "choose heads that do")),
        ("heads = 5\n", ("heads = 5 does not divide d-model = 256", "choose heads that do")),
        ("max-iters = 10\nwarmup-iters = 20\n", ("warmup-iters = 20 is over max-iters = 10", "lower")),
        ("lr-decay-iters = 10\nwarmup-iters = 20\n", ("warmup-iters = 20 is over lr-decay-iters = 10", "lower")),
        ("learning-rate = 1e-4\nmin-learning-rate = 1\n", ("min-learning-rate = 1.0 is over learning-rate", "lower")),
        ("seq-len = 128\n", ("seq-len = 128", "train_tiny_16_123", "rows of 16", "-m")),
        ("task-type = sst2\n", ("task-type = sst2 goes with 'bertling finetune', not with 'bertling pretrain'",)),
        ("device = cuda\n", ("device = cuda", "torch finds none here")),
        ("run-id = a/b\n", ("run-id = a/b", "plain folder name")),
        ("run-id = mlm\n", ("mlm: exists already", "--cp", "another run-id")),
    ],
)
def test_settings(text: str, parts: tuple[str, ...], world: World, here: Path) -> None:
    words = settings(world, text)
    if text.startswith("device"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("a GPU is here")
    refuse(world, here, words, *parts)


def test_settings_file_that_is_missing_or_no_text(world: World, here: Path) -> None:
    refuse(world, here, ["pretrain", "-c", "none.ini"], "none.ini: no such file", "check the path")
    (here / "config.ini").write_bytes(b"seed = 1 # caf\xe9\n")
    refuse(world, here, ["pretrain"], "config.ini: not UTF-8 text (byte 14)")


def test_task_type_of_the_other_command(world: World, here: Path) -> None:
    words = settings(world, "task-type = mlm\n", command="finetune")
    refuse(world, here, words, "task-type = mlm goes with 'bertling pretrain', not with 'bertling finetune'")


def test_flags(world: World, here: Path) -> None:
    refuse(world, here, ["pretrain", "--heads", "x"], "command line: heads = x: must be a whole number")
    refuse(world, here, ["pretrain", "--preset", "brt"], "command line: preset = brt", "did you mean bert?")
    refuse(world, here, ["pretrain", "--d-modl", 3], "No such option", "--d-model", "bertling pretrain --help")
    refuse(world, here, ["pretran"], "No such command 'pretran'", "pretrain", "bertling --help")
    refuse(world, here, ["export"], "Missing option '-o' / '--output'", "bertling export --help")
    refuse(world, here, ["summary", "--size", "huge"], "size = 'huge'", "mini, small, base")
    refuse(world, here, prepare_words("t", "--split", "a,b"), "split: a,b: must be three numbers")
    refuse(
        world, here, prepare_words(str(TEXT), "--split", "0.5,0.1,0.1"), "split: must be three shares", "add up to 1"
    )
    refuse(world, here, prepare_words(str(TEXT), "-l", "a/b"), "label: 'a/b' must be letters")
    refuse(world, here, prepare_words(str(TEXT), "-m", 4), "max-len: must lie between 8 and")


# prepared data


def test_pattern_that_matches_nothing(world: World, here: Path) -> None:
    words = ["pretrain", "--base-dir", world.base, "--dataset-pattern", "train_weke_*"]
    refuse(world, here, words, "pattern 'train_weke_*': matches nothing in", "there is: ", "train_tiny_16_123")
    refuse(world, here, ["pretrain"], "matches nothing in datasets", "no data set is there", "bertling prepare")


def test_splits_of_different_lengths(world: World, here: Path) -> None:
    shutil.copytree(world.data / "train_tiny_16_123", here / "datasets" / "train_tiny_16_123")
    done = bertling("prepare", "-i", TEXT, "-l", "x", "-o", "datasets", "-m", 24, "-v", VOCAB, "--workers", 1)
    assert done.status == 0, done.err
    patterns = ["--dataset-pattern", "train_tiny_*", "--val-dataset-pattern", "val_x_*"]
    words = ["pretrain", *patterns, "--vocab", VOCAB, *SMALL, *STEPS]
    refuse(world, here, words, "val_x_24_123: has rows of 24 ids", "train_tiny_16_123 of 16", "with the same -m")


def test_another_vocabulary_than_that_of_the_data(world: World, here: Path) -> None:
    (here / "vocab.txt").write_text(vocabulary(lambda lines: [*lines[:-1], "zebra"]))
    words = ["pretrain", "--base-dir", world.base, "--vocab", "vocab.txt", *SMALL, *STEPS]
    refuse(world, here, words, "train_tiny_16_123: prepared with another vocabulary", "prepare again")


def test_static_files_of_another_vocabulary(world: World, here: Path) -> None:
    (here / "datasets").mkdir()
    words = ["pretrain", "--vocab", VOCAB, *SMALL, *STEPS]
    for largest, parts in ((999, ("holds id 999", "400 entries")), (9, ("begin with id 7", "[CLS] is 2"))):
        rows = [[7, 8, largest, 3], [0, 9, 0, 0]] * 8
        for split in ("train", "val"):
            (here / "datasets" / f"{split}_x.msgpack").write_bytes(msgpack.packb(rows))
        refuse(world, here, words, "train_x.msgpack", *parts, "another vocabulary", "--vocab")


def test_damaged_data(world: World, here: Path) -> None:
    shutil.copytree(world.data, here / "datasets")
    shard = here / "datasets" / "train_tiny_16_123" / "shard-00000.bin"
    words = ["pretrain", "--vocab", VOCAB, *SMALL, *STEPS]
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-10])
    refuse(world, here, words, "shard-00000.bin: has", "instead of", "prepare the data again")
    shard.write_bytes(raw[:-1] + b"\7")
    refuse(world, here, words, "shard-00000.bin: damaged", "prepare the data again")
    shutil.rmtree(here / "datasets")
    (here / "datasets").mkdir()
    for split in ("train", "val"):
        (here / "datasets" / f"{split}_x.msgpack").write_bytes(msgpack.packb([[2, 4, 9, 3], [0, 8, 0, 0]] * 9)[:-5])
    refuse(world, here, words, "train_x.msgpack: ends too early", "prepare it again")
    refuse(world, here, ["inspect", "datasets/train_x.msgpack"], "train_x.msgpack")
    refuse(world, here, ["inspect", "none"], "none: no such sample file or folder", "bertling prepare")


# labelled texts


def finetune_words(world: World, train: object, dev: object | None = None, *more: object) -> list[object]:
    inputs = ["--train-input", train, "--val-input", world.dev if dev is None else dev]
    return ["finetune", "--base-dir", world.base, "--cp", world.mlm, *STEPS, *inputs, *more]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("t.tsv", "sentence\tlabel\n", ("t.tsv: holds no labelled texts",)),
        ("t.tsv", "", ("t.tsv: is empty",)),
        ("t.tsv", "phrase\tscore\na\t1\n", ("t.tsv: no text column", "'phrase', 'score'", "text-column")),
        ("t.tsv", "sentence\tscore\na\t1\n", ("t.tsv: no label column", "'sentence', 'score'", "label-column")),
        ("t.tsv", "sentence\tlabel\na\t1\nb\t\n", ("t.tsv: line 3: the label ''", "label-column")),
        ("t.tsv", "sentence\tlabel\na\t1\nb\t0.5\n", ("t.tsv: line 3: the label '0.5'", "neither an integer")),
        ("t.tsv", "sentence\tlabel\na\t1\nb\tgood\n", ("t.tsv: line 3: the label 'good'", "use one kind")),
        ("t.tsv", "sentence\tlabel\na\t1\nb\n", ("t.tsv: line 3: 1 fields instead of 2",)),
        ("t.tsv", "sentence\tlabel\na\t1\nb\t1\n", ("t.tsv: all labels are of one class (1)", "add the others")),
        ("t.tsv", "sentence\tlabel\na\t0\nb\t2\n", ("t.tsv: the labels are 0, 2", "without gaps")),
        ("t.tsv", "sentence\tlabel\na\t-1\nb\t-1\n", ("t.tsv: has no labels (all are -1)",)),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', ("t.jsonl: line 2: the field 'label' is missing",)),
        ("t.jsonl", '{"text": 7, "label": 1}\n', ("t.jsonl: line 1: the text is 7, not a string",)),
        ("t.csv", 'text,label\n"a,1\n', ("t.csv: line 2", "quotes")),
        ("t.xlsx", "x", ("t.xlsx: labelled texts come as .parquet, .tsv, .csv or .jsonl",)),
        ("t.parquet", "x", ("t.parquet: is not a readable parquet file", "again")),
    ],
)
def test_labelled_texts(name: str, content: str, parts: tuple[str, ...], world: World, here: Path) -> None:
    (here / name).write_text(content)
    refuse(world, here, finetune_words(world, name), *parts)


def test_labelled_texts_that_are_missing(world: World, here: Path) -> None:
    refuse(world, here, finetune_words(world, "none.tsv"), "none.tsv: no such file", "check the path")
    words = ["finetune", "--cp", world.mlm, *STEPS]
    refuse(world, here, words, "datasets/train-00000-of-00001.parquet: missing", "name your own files")
    words = ["finetune", "--cp", world.mlm, "--train-input", world.train]
    refuse(world, here, words, "train-input and val-input go together")


def test_parquet_without_the_columns(world: World, here: Path) -> None:
    (here / "datasets").mkdir()
    for split in ("train", "validation"):
        table = pyarrow.table({"sentence": ["a", "b"], "score": [0, 1]})
        pyarrow.parquet.write_table(table, here / "datasets" / f"{split}-00000-of-00001.parquet")
    words = ["finetune", "--cp", world.mlm, *STEPS]
    refuse(world, here, words, "train-00000-of-00001.parquet: no label column", "'sentence', 'score'", "label-column")
    refuse(world, here, [*words, "--label-column", "lable"], "there is no column 'lable'", "'sentence', 'score'")


def test_texts_to_evaluate_on_without_labels(world: World, here: Path) -> None:
    (here / "dev.tsv").write_text("sentence\tlabel\na\t-1\nb\t-1\n")
    refuse(world, here, finetune_words(world, world.train, "dev.tsv"), "dev.tsv: has no labels (all are -1)")
    words = ["evaluate", "--cp", world.classifier, "--data", "dev.tsv"]
    refuse(world, here, words, "dev.tsv: has no labels (all are -1)")


def test_labels_that_the_model_does_not_know(world: World, here: Path) -> None:
    (here / "dev.tsv").write_text("sentence\tlabel\na\t0\nb\t2\n")
    words = ["evaluate", "--cp", world.classifier, "--data", "dev.tsv"]
    refuse(world, here, words, "dev.tsv: label 2: the model knows 2 classes", "use data of its task")


# checkpoints


def copy_of(checkpoint: Path, target: Path) -> Path:
    shutil.copytree(checkpoint.resolve(), target)
    return target


def test_where_there_is_no_checkpoint(world: World, here: Path) -> None:
    (here / "empty").mkdir()
    (here / "file").write_text("x")
    refuse(world, here, ["fill", "--cp", "none", "a [MASK]"], "none: no such folder", "--cp takes a run")
    refuse(world, here, ["fill", "--cp", "empty", "a [MASK]"], "empty: holds no checkpoint", "name a run")
    refuse(world, here, ["fill", "--cp", "file", "a [MASK]"], "file: this is a file", "--cp takes the folder")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt", "training_state.safetensors"])
def test_truncated_checkpoint(name: str, world: World, here: Path) -> None:
    path = copy_of(world.mlm / "checkpoints" / "last", here / "cp") / name
    path.write_bytes(path.read_bytes()[:-20])
    refuse(world, here, ["fill", "--cp", "cp", "a [MASK]"], f"cp/{name}: damaged or truncated", "another checkpoint")
    (here / "cp" / "manifest.json").unlink()  # as a folder from elsewhere
    if name in ("model.safetensors", "config.json"):
        refuse(world, here, ["fill", "--cp", "cp", "a [MASK]"], f"cp/{name}: ")
    path.unlink()
    if name == "model.safetensors":
        refuse(world, here, ["fill", "--cp", "cp", "a [MASK]"], "cp/model.safetensors: missing")


def test_truncated_checkpoint_of_a_run(world: World, here: Path) -> None:
    shutil.copytree(world.mlm, here / "run", symlinks=True)
    path = here / "run" / "checkpoints" / "last" / "training_state.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    words = ["pretrain", "--base-dir", world.base, "--max-iters", 9, "--cp"]
    named = "run/checkpoints/step-0000004"
    refuse(world, here, [*words, named], "training_state.safetensors: damaged or truncated", "another checkpoint")
    done = bertling(*words, "run")
    assert done.status == 0
    assert f"note: {named}/training_state.safetensors: damaged or truncated (" in done.err
    assert "note: going on from step-0000002, the newest checkpoint that is intact" in done.err


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (folder / "manifest.json").unlink(missing_ok=True)


def test_checkpoint_of_another_architecture(world: World, here: Path) -> None:
    cp = copy_of(world.mlm / "checkpoints" / "best", here / "cp")
    change_config(cp, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    refuse(world, here, ["fill", "--cp", "cp", "a [MASK]"], "cp: model.safetensors does not fit config.json", "belong")
    change_config(cp, model_type="gpt2")
    refuse(world, here, ["fill", "--cp", "cp", "a [MASK]"], "cp: config.json: model_type = 'gpt2'", "use a checkpoint")
    for flag, value, name in (("--d-model", 64, "d-model"), ("--preset", "bert", "preset")):
        words = ["pretrain", "--cp", world.mlm / "checkpoints" / "best", "--max-iters", 9, flag, value]
        refuse(world, here, words, f"{name} = {value}", "leave it out")


def test_checkpoint_of_another_vocabulary(world: World, here: Path) -> None:
    cp = copy_of(world.mlm / "checkpoints" / "best", here / "cp")
    (cp / "manifest.json").unlink()
    (cp / "vocab.txt").write_text(vocabulary(lambda lines: [*lines, "zebra"]))
    refuse(world, here, ["fill", "--cp", "cp", "a [MASK]"], "cp: its vocabulary has 401 entries", "only 400")
    (cp / "vocab.txt").write_text(vocabulary(lambda lines: [*lines[:-1], "zebra"]))
    words = ["pretrain", "--cp", "cp", "--base-dir", world.base, *STEPS]
    refuse(world, here, words, "train_tiny_16_123: prepared with another vocabulary")
    data = world.data / "val_tiny_16_123"
    refuse(world, here, ["evaluate", "--cp", "cp", "--data", data], "val_tiny_16_123: prepared with another vocabulary")


def test_the_wrong_kind_of_checkpoint_or_data(world: World, here: Path) -> None:
    refuse(
        world,
        here,
        ["fill", "--cp", world.classifier, "a [MASK]"],
        f"fill: {world.classifier}",
        "has no head for masked words",
    )
    refuse(world, here, ["classify", "--cp", world.mlm, "a"], f"classify: {world.mlm}", "has no classification head")
    words = ["evaluate", "--cp", world.mlm, "--data", world.dev]
    refuse(world, here, words, "dev.tsv: labelled texts", "is a masked language model", "bertling prepare")
    words = ["evaluate", "--cp", world.classifier, "--data", world.data / "val_tiny_16_123"]
    refuse(world, here, words, "val_tiny_16_123: a folder", "is a classifier", "file of labelled texts")


def test_finetune_without_a_checkpoint(world: World, here: Path) -> None:
    inputs = ["--train-input", world.train, "--val-input", world.dev]
    refuse(world, here, ["finetune", *inputs], "--cp: name the checkpoint to fine-tune, or give --from-scratch")
    words = ["finetune", *inputs, "--cp", world.mlm, "--from-scratch"]
    refuse(world, here, words, "--from-scratch and --cp exclude each other")
    refuse(world, here, ["finetune", *inputs, "--from-scratch"], "vocab/vocab.txt: missing", "--vocab")


def test_nothing_to_resume(world: World, here: Path) -> None:
    refuse(world, here, ["pretrain", "--resume"], "runs: holds no unfinished run", "without --resume")
    refuse(world, here, ["pretrain", "--resume", "--cp", world.mlm], "--resume finds the run itself")
    words = ["pretrain", "--cp", world.mlm]
    refuse(world, here, words, "mlm: is finished; raise --max-iters")


# texts to ask about


def test_texts(world: World, here: Path) -> None:
    fill, classify = ["fill", "--cp", world.mlm], ["classify", "--cp", world.classifier]
    refuse(world, here, [*fill, "no mask here"], "text 'no mask here': has no [MASK]", "write [MASK]")
    refuse(world, here, [*fill, "a [MASK]", "-k", 401], "top-k 401", "400")
    refuse(world, here, [*classify, "--input", "none.txt"], "none.txt: no such file", "check the path")
    (here / "latin.txt").write_bytes(b"fine\nd\xe9j\xe0\n")
    refuse(world, here, [*classify, "--input", "latin.txt"], "latin.txt: line 2", "UTF-8")
    refuse(world, here, [*classify, "--input", "latin.txt", "a"], "texts were given as arguments too")
    refuse(world, here, classify, "standard input: is empty")


# outputs


def test_an_output_of_the_same_name_is_kept(world: World, here: Path) -> None:
    assert bertling("vocab", "-i", TEXT, "-o", "v", "--size", 200).status == 0
    refuse(world, here, ["vocab", "-i", TEXT, "-o", "v", "--size", 250], "v/vocab.txt: exists already", "--force")
    for form, name in (("shards", "train_x_16_123"), ("msgpack", "train_x_16_123.msgpack.gz")):
        words = prepare_words(str(TEXT), "--format", form)
        shutil.rmtree("data", ignore_errors=True)
        assert bertling(*words).status == 0
        refuse(world, here, words, f"data/{name}: exists already", "--force", "another label or seed")
        assert bertling(*words, "--force").status == 0
    (here / "file").write_text("x")
    refuse(world, here, ["vocab", "-i", TEXT, "-o", "file"], "file: is a file; give a folder")
    words = ["prepare", "-i", TEXT, "-l", "x", "-o", "file", "-m", 16, "-v", VOCAB]
    refuse(world, here, words, "file: is a file; give a folder")


def test_no_space_left(world: World, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(path: Path) -> None:
        raise full

    shutil.copytree(world.base / "datasets", here / "datasets")
    (here / "data").mkdir()
    (here / "data" / "ids").mkdir()
    (here / "runs").mkdir()
    monkeypatch.setattr("bertling.files.fsync_path", fail)
    for words in (
        ["vocab", "-i", TEXT, "-o", "v", "--size", 200],
        prepare_words(str(TEXT)),
        prepare_words(str(TEXT), "--format", "msgpack"),
    ):
        refuse(world, here, words, "the disk is full: free some space, then run the same command again")
    done = bertling("pretrain", *SMALL, *STEPS, "--vocab", VOCAB)
    assert "the disk is full" in done.error
    assert not [path for path in here.rglob("*") if path.name.endswith(UNFINISHED)]


def test_no_space_left_for_a_checkpoint(world: World, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, metadata: object = None) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.copytree(world.base / "datasets", here / "datasets")
    monkeypatch.setattr("bertling.checkpoint.save", fail)
    done = bertling("pretrain", *SMALL, *STEPS, "--vocab", VOCAB)
    assert done.error.startswith("runs/run0/checkpoints/step-0000000: the disk is full: free some space")
    assert list((here / "runs").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(world: World, here: Path) -> None:
    (here / "v").mkdir(mode=0o500)
    refuse(world, here, ["vocab", "-i", TEXT, "-o", "v", "--size", 200], "v: permission denied", "another folder")


def test_in_a_process_of_its_own(here: Path) -> None:
    words = ["prepare", "-i", "none.txt", "-l", "x", "-o", "data", "-v", VOCAB]
    done = subprocess.run(
        [sys.executable, "-m", "bertling", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: none.txt: no such file or folder: check the path\n"
    assert list(here.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree((world.classifier / "checkpoints" / "best").resolve(), broken)
    (broken / "manifest.json").unlink()
    weights = load_file(broken / "model.safetensors")
    name = min(weights)
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "holds values that are not finite; use another" in bertling("classify", "--cp", broken, "good").error


def test_a_text_in_another_script_cannot_be_scored(world: World, tmp_path: Path) -> None:
    text = tmp_path / "greek.txt"
    text.write_text("\n\n".join(["\u03b1\u03b2\u03b3 \u03b4\u03b5\u03b6 " * 40] * 30))
    made = bertling(
        "prepare", "-i", text, "-l", "g", "-o", tmp_path / "datasets", "-m", 16, "-v", VOCAB, "--workers", 1
    )
    assert made.status == 0, made.err
    data = tmp_path / "datasets" / "val_g_16_123"
    for words in (
        ["evaluate", "--cp", world.mlm],
        ["compare", world.mlm, world.mlm],
        ["pretrain", "--base-dir", tmp_path],
    ):
        given = [] if words[0] == "pretrain" else ["--data", data]
        assert "none of its tokens can be scored" in bertling(*words, *given, *(SMALL if not given else [])).error


@pytest.mark.parametrize("flag", [["--max-iters", 10**400], ["--max-minutes", "1e308"], ["--batch-size", 10**11]])
def test_numbers_that_no_machine_could_serve_are_refused(flag: list[object], world: World) -> None:
    assert "must be at most" in bertling("pretrain", "--base-dir", world.base, *flag).error
