"""The commands that use a trained model, fetch one, or measure; the others are in `cli.py`. Parsing and wiring only."""

import tempfile
from pathlib import Path
from typing import Any, Literal

import click

from bertling.console import answer, clean_end, say, unbroken
from bertling.options import (
    MODEL,
    PATH,
    ask_options,
    box_option,
    choice_option,
    device_option,
    force_option,
    json_option,
    was_given,
)
from bertling.settings import parse_settings


@click.command()
@box_option
@click.option(
    "--data",
    type=PATH,
    required=True,
    help="prepared data set (masked language model) or labelled file (classifier)",
)
@click.option("--text-column", help="column of the texts  [default: recognised by its name]")
@click.option("--label-column", help="column of the labels  [default: recognised by its name]")
@device_option
@json_option
def evaluate(
    cp: Path | None, data: Path, text_column: str | None, label_column: str | None, device: str, as_json: bool
) -> None:
    """Score a checkpoint on a whole data set."""
    from bertling.tools.evaluate import evaluate as run_evaluate

    say_boxed(cp)
    result = run_evaluate(cp, data, text_column=text_column, label_column=label_column, device=device)
    answer(result.to_dict(), result.text(), as_json)


@click.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--data", type=PATH, required=True, help="prepared data set, or labelled file for two classifiers")
@click.option("--text-column", help="column of the texts  [default: recognised by its name]")
@click.option("--label-column", help="column of the labels  [default: recognised by its name]")
@device_option
@json_option
def compare(
    a: Path, b: Path, data: Path, text_column: str | None, label_column: str | None, device: str, as_json: bool
) -> None:
    """Say whether model B is better than model A on the same data, or only luckier (paired bootstrap)."""
    from bertling.tools.compare import compare as run_compare

    result = run_compare(a, b, data, text_column=text_column, label_column=label_column, device=device)
    answer(result.to_dict(), result.text(), as_json)


def say_boxed(cp: Path | None) -> None:
    """Say whose model it is where none was named."""
    if cp is None:
        from bertling.inference import BOX

        say(f"model: the one that comes with bertling ({BOX / 'README.md'}); --cp takes your own")


def open_model(cp: Path | None, device: str, dtype: str, task: Literal["fill", "classify"] = "fill") -> Any:
    """The model to ask; without --cp, the one in the box."""
    with unbroken():
        from bertling.inference import load
        from bertling.runtime import build_runtime

    say_boxed(cp)
    runtime = build_runtime(parse_settings({"device": device, "dtype": dtype, "compile": "false"}))
    for note in runtime.notes:
        say(f"note: {note}")
    return load(cp, runtime, task=task)


@click.command()
@ask_options
@json_option
@click.option("-k", "--top-k", type=click.IntRange(1, 1000), default=5, show_default=True, help="answers a mask")
def fill(
    texts: tuple[str, ...], input_file: Path | None, cp: Path | None, device: str, dtype: str, as_json: bool, top_k: int
) -> None:
    """Say what may stand at [MASK] in a text."""
    from bertling.inference import iter_texts

    model = open_model(cp, device, dtype)
    for chunk in iter_texts(texts, input_file):
        # A line without [MASK] among others is answered by none, so that answers and lines stay in step.
        asked = [text for text in chunk if "[MASK]" in text or texts]
        answers = iter(model.fill(asked, top_k=top_k))
        for text in chunk:
            none: dict[str, Any] = {"text": text, "masks": [], "truncated": False}
            one = next(answers) if "[MASK]" in text or texts else none
            ranked = [", ".join(f"{token} {share:.1%}" for token, share in mask) for mask in one["masks"]]
            answer(one, "\n".join([one["text"], *(f"  [MASK]: {row}" for row in ranked)]), as_json)
            note_truncated(one, "only a part around its masks was read", as_json)


@click.command()
@ask_options
@json_option
def classify(
    texts: tuple[str, ...], input_file: Path | None, cp: Path | None, device: str, dtype: str, as_json: bool
) -> None:
    """Say which class a text belongs to."""
    from bertling.inference import iter_texts

    model = open_model(cp, device, dtype, "classify")
    for chunk in iter_texts(texts, input_file):
        for one in model.classify(chunk):
            answer(one, f"{one['label']}\t{one['score']:.3f}\t{one['text']}", as_json)
            note_truncated(one, "only its beginning was read", as_json)


def note_truncated(one: Any, what: str, as_json: bool) -> None:
    """Say that a text was too long for the model; JSON has a field for it."""
    from bertling.tables import shorten

    if one["truncated"] and not as_json:
        say(f"note: text {shorten(one['text'])}: longer than the model reads; {what}")


@click.command()
@click.option("--cp", type=PATH, help=MODEL)
@click.option("--preset", default="modern", show_default=True, help="modern, bert, distilbert or seed")
@click.option("--size", default="mini", show_default=True, help="mini, small or base")
@click.option("--vocab-size", type=click.IntRange(8), default=8192, show_default=True)
@json_option
@click.pass_context
def summary(context: click.Context, cp: Path | None, preset: str, size: str, vocab_size: int, as_json: bool) -> None:
    """Draw the anatomy of a model: every module, its shape, its parameters."""
    if cp is not None and was_given(context, "preset", "size", "vocab_size"):
        raise click.UsageError("--cp: that model has its own preset, size and vocab-size: leave them out")
    from bertling.tools.anatomy import anatomy

    result = anatomy(cp, preset, size, vocab_size)
    answer(result.to_dict(), result.text(), as_json)


@click.command()
@ask_options
@json_option
@choice_option("--pooling", ["mean", "cls"], "mean over all tokens, or the vector of [CLS]")
@click.option("--normalize/--no-normalize", default=True, show_default=True, help="give every vector the length 1")
@click.option("-o", "--output", type=PATH, help="file for the vectors: .npy, .parquet or .jsonl  [default: JSON lines]")
@force_option("a file that is there")
def embed(
    texts: tuple[str, ...],
    input_file: Path | None,
    cp: Path | None,
    device: str,
    dtype: str,
    as_json: bool,
    pooling: Any,
    normalize: bool,
    output: Path | None,
    force: bool,
) -> None:
    """Turn each text into a vector."""
    from bertling.inference import iter_texts
    from bertling.vectors import open_vectors

    with open_vectors(output, force=force) as sink:
        model = open_model(cp, device, dtype)
        count = 0
        for chunk in iter_texts(texts, input_file):
            vectors = model.embed(chunk, pooling, normalize=normalize)
            count += len(vectors)
            sink.add(chunk, vectors)
    cut, limit = model.embedder.truncated, model.embedder.limit
    if cut:
        say(f"note: {cut:,} of {count:,} texts are longer than the {limit} tokens that the model reads, and cut there")
    if output is not None:
        width = model.config.hidden_size
        answer(
            {
                "output": str(output),
                "texts": count,
                "width": width,
                "pooling": pooling,
                "normalized": normalize,
                "truncated": cut,
            },
            f"{output}: {count:,} vectors of {width}",
            as_json,
        )


@click.command()
@box_option
@choice_option("--format", ["hf", "onnx"], "hf: a Hugging Face folder with a model card; onnx: for onnxruntime")
@click.option("-o", "--output", type=PATH, required=True, help="folder to write")
@click.option("--int8", is_flag=True, help="onnx: a second file with matrices in 8 bits (dynamic quantization)")
@force_option("a folder that is there")
@json_option
def export(cp: Path | None, format: str, output: Path, int8: bool, force: bool, as_json: bool) -> None:
    """Write a model for others to use, compared with the original before it is done."""
    from bertling.inference import BOX
    from bertling.tools.export import export as run_export

    say_boxed(cp)
    result = run_export(cp or BOX, output, format, int8=int8, force=force)
    answer(result.to_dict(), result.text(), as_json)


@click.command()
@click.argument("name")
@click.option("-o", "--output", type=PATH, help="folder  [default: the last part of the name]")
@json_option
def download(name: str, output: Path | None, as_json: bool) -> None:
    """Fetch wikitext-103, sst2, or a model by its OWNER/NAME from the Hugging Face hub."""
    from bertling.tools.download import download as run_download

    result = run_download(name, output, say)
    answer(result.to_dict(), result.text(), as_json)


@click.command()
@click.argument("rows", nargs=-1, type=click.Choice(["step", "prepare", "batches", "finetune", "classify", "startup"]))
@click.option("--preset", help="step: modern, bert, distilbert or seed  [default: three workloads of ours]")
@click.option("--size", help="with --preset: mini, small or base  [default: mini]")
@click.option("--vocab-size", type=click.IntRange(64, 200_000), help="with --preset: entries  [default: 8192]")
@click.option("--batch-size", type=click.IntRange(1), help="with --preset: rows  [default: 64]")
@click.option("--micro-batch-size", type=click.IntRange(1), help="with --preset: rows at once  [default: all]")
@click.option("--seq-len", type=click.IntRange(8, 8192), help="with --preset: tokens in a row  [default: 128]")
@click.option("--dtype", default="auto", show_default=True, help="ours: auto, bf16, fp16, fp32 or int8")
@click.option("--compile", "compiled", default="auto", show_default=True, help="step, ours: auto, true or false")
@click.option("--text", type=PATH, help="prepare: a .txt file  [default: this machine's documentation prose]")
@click.option("--data", type=PATH, help="finetune, classify: labelled texts  [default: those of the demo]")
@click.option(
    "--vocab", type=PATH, help="prepare, finetune, classify: vocabulary  [default: the box's, filled up to 30,522]"
)
@click.option("--against", type=click.Choice(["hf"]), help="the usual tools too, at their defaults and at their best")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="turns of each")
@device_option
@json_option
def bench(
    rows: tuple[str, ...],
    preset: str | None,
    size: str | None,
    vocab_size: int | None,
    batch_size: int | None,
    micro_batch_size: int | None,
    seq_len: int | None,
    dtype: str,
    compiled: str,
    text: Path | None,
    data: Path | None,
    vocab: Path | None,
    against: str | None,
    rounds: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure how fast each kind of work is, by itself or against the usual tools of Hugging Face.

    ROWS are step (a pre-training step: time by phase, FLOPs, share of the machine's peak), prepare, batches, finetune,
    classify and startup; without any of them all are measured, or step alone where a preset is named.
    """
    from bertling.runtime import available_cores, choose_device
    from bertling.tools.bench import WORKLOADS, sized_workload
    from bertling.tools.bench import bench as run_bench
    from bertling.tools.comparisons import COMPARISONS, Bench, compare

    sizes: dict[str, Any] = {
        "size": size,
        "vocab_size": vocab_size,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
    }
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if preset is None and sizes:
        first = next(iter(sizes)).replace("_", "-")
        raise click.UsageError(f"--{first}: the step's own workloads have their sizes; name a --preset with it")
    settings = vars(parse_settings({"device": device, "dtype": dtype, "compile": compiled}))
    rows = rows or (("step",) if preset is not None else ("step", *COMPARISONS))
    for name, value, users in (
        ("preset", preset, {"step"}),
        ("text", text, {"prepare"}),
        ("data", data, {"finetune", "classify"}),
        ("vocab", vocab, {"prepare", "finetune", "classify"}),
    ):
        if value is not None and not users & set(rows):
            raise click.UsageError(f"--{name}: none of the rows asked for uses it, only {', '.join(sorted(users))}")
    with clean_end(), tempfile.TemporaryDirectory(prefix="bertling-bench-") as folder:
        where = Path(folder), against is not None, rounds, choose_device(device).type, available_cores(), say
        comparisons = compare([row for row in rows if row != "step"], Bench(*where, text, vocab, data, dtype))
        if "step" in rows:
            workloads = WORKLOADS if preset is None else (sized_workload(preset, **sizes),)
            given = {name: settings[name] for name in ("device", "dtype", "compile")}
            for workload in workloads:
                report = run_bench(workload, against=against is not None, rounds=rounds, settings=given, say=say)
                answer(report.to_dict(), report.text(), as_json)
        for comparison in comparisons:
            answer(comparison.to_dict(), comparison.text(), as_json)


USE_COMMANDS: tuple[click.Command, ...] = (evaluate, compare, fill, classify, embed, summary, export, download, bench)
