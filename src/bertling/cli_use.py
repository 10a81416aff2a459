"""The commands that use a trained model, or fetch one; the others are in `cli.py`. Parsing and wiring only."""

from pathlib import Path
from typing import Any, Literal

import click

from bertling.console import answer, say
from bertling.options import (
    PATH,
    ask_options,
    choice_option,
    device_option,
    force_option,
    json_option,
    model_option,
)


@click.command()
@model_option(required=True)
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
    cp: Path, data: Path, text_column: str | None, label_column: str | None, device: str, as_json: bool
) -> None:
    """Score a checkpoint on a whole data set."""
    from bertling.tools.evaluate import evaluate as run_evaluate

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


def open_model(cp: Path | None, device: str, dtype: str, task: Literal["fill", "classify"] = "fill") -> Any:
    """The model to ask; without --cp, the one in the box."""
    from bertling.inference import BOX, load
    from bertling.runtime import build_runtime
    from bertling.settings import parse_settings

    if cp is None:
        say(f"model: the one that comes with bertling ({BOX / 'README.md'}); --cp takes your own")
    return load(cp, build_runtime(parse_settings({"device": device, "dtype": dtype})), task=task)


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
@model_option(required=False)
@click.option("--preset", default="modern", show_default=True, help="modern, bert, distilbert or seed")
@click.option("--size", default="mini", show_default=True, help="mini, small or base")
@click.option("--vocab-size", type=click.IntRange(8), default=8192, show_default=True)
@json_option
def summary(cp: Path | None, preset: str, size: str, vocab_size: int, as_json: bool) -> None:
    """Draw the anatomy of a model: every module, its shape, its parameters."""
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
@model_option(required=True)
@choice_option("--format", ["hf", "onnx"], "hf: a Hugging Face folder with a model card; onnx: for onnxruntime")
@click.option("-o", "--output", type=PATH, required=True, help="folder to write")
@click.option("--int8", is_flag=True, help="onnx: a second file with matrices in 8 bits (dynamic quantization)")
@force_option("a folder that is there")
@json_option
def export(cp: Path, format: str, output: Path, int8: bool, force: bool, as_json: bool) -> None:
    """Write a model for others to use, compared with the original before it is done."""
    from bertling.tools.export import export as run_export

    result = run_export(cp, output, format, int8=int8, force=force)
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


USE_COMMANDS: tuple[click.Command, ...] = (evaluate, compare, fill, classify, embed, summary, export, download)
