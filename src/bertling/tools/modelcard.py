"""The README.md of an exported model: what it is, what it was made from, how, how good it is, and how to use it."""

import json
from pathlib import Path
from typing import Any

import bertling
from bertling.checkpoint import STATE, Loaded, run_of
from bertling.files import BertlingError, read_json
from bertling.interop import head_of
from bertling.model import count_parameters
from bertling.runlog import read_metrics
from bertling.samples import match_samples, open_samples
from bertling.settings import read_settings
from bertling.stock import CLASSES, HEADS, Head
from bertling.tasks import EVAL_MASKS

PIPELINES: dict[Head, str] = {
    "masked_lm": "fill-mask",
    "classification": "text-classification",
    "none": "feature-extraction",
}
ASK: dict[Head, str] = {
    "masked_lm": "the cat sat on the [MASK] .",
    "classification": "a warm and funny film .",
    "none": "a text",
}
MLM_PROTOCOL = (
    f"{EVAL_MASKS.mlm_probability:.0%} of the ordinary tokens masked (80 % [MASK], 10 % a random token, 10 % kept), "
    f"the same in every evaluation (seed {EVAL_MASKS.seed}), accuracy over all masked places of the validation set"
)


def model_card(loaded: Loaded, form: str, worst: dict[str, float]) -> str:
    """The card in Markdown, with the header that model hubs read."""
    head, config = head_of(loaded.model), loaded.model.config
    state = training_state(loaded.folder)
    count = count_parameters(loaded.model)
    name = run_name(loaded.folder)
    parts = [
        header(head, form),
        f"# {name}\n\n{CLASSES[config.architecture]}{HEADS[head]}: {config.num_hidden_layers} blocks of "
        f"{config.hidden_size}, {config.num_attention_heads} heads, {count.total:,} parameters "
        f"({count.without_embeddings:,} without embeddings), vocabulary of {config.vocab_size:,}, up to "
        f"{config.max_position_embeddings:,} tokens. Made with bertling {bertling.__version__}.",
        "## Use\n\n" + usage(head, form, config.max_position_embeddings),
        "## Scores\n\n" + scores(loaded, state),
        "## Training\n\n" + training(state),
        "## Data\n\n" + data(run_of(loaded.folder)),
        "## Checked\n\n"
        + "\n".join(f"- {what}: within {value:.1e} of the original's largest score" for what, value in worst.items()),
        "## Licence\n\nNone is stated here: it follows from the data, and from weights that the training began with.",
    ]
    return "\n\n".join(parts) + "\n"


def header(head: Head, form: str) -> str:
    """What hubs read: the library that loads it, and what it does."""
    library = "transformers" if form == "hf" else "onnx"
    return f"---\nlibrary_name: {library}\npipeline_tag: {PIPELINES[head]}\ntags:\n- bertling\n---"


def usage(head: Head, form: str, longest: int) -> str:
    """A few lines that run in the model's folder."""
    text = '"' + ASK[head] + '"'
    if form == "hf":
        code = f'''from transformers import pipeline

ask = pipeline("{PIPELINES[head]}", model=".")
print(ask({text + (", truncation=True" if head == "classification" else "")}))'''
    else:
        code = f"""import json

import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({longest})
session = onnxruntime.InferenceSession("model.onnx")
text = tokenizer.encode({text})
(scores,) = session.run(None, {{"input_ids": [text.ids], "attention_mask": [text.attention_mask]}})
"""
        if head == "classification":
            code += 'print(json.load(open("config.json"))["id2label"][str(scores[0].argmax())])'
        else:
            code = code.removeprefix("import json\n\n") + "print(scores)"
    return f"```python\n{code}\n```"


def training_state(folder: Path) -> dict[str, Any] | None:
    """Step, time, metrics and settings of the checkpoint; None where it came from elsewhere."""
    path = folder / f"{STATE}.json"
    return read_json(path, "training state") if path.is_file() else None


def run_name(folder: Path) -> str:
    """The run's name, or the folder's."""
    run = run_of(folder)
    return (run or folder.resolve()).name


def scores(loaded: Loaded, state: dict[str, Any] | None) -> str:
    """Each figure of the checkpoint's own evaluation with the floors beside it."""
    if state is None or not state.get("metrics"):
        return "The folder that this was made from tells none."
    if state["evaluated_step"] != state["step"]:
        return (
            f"None of these weights, which are of step {state['step']:,}: the latest evaluation before was that of "
            f"step {state['evaluated_step']:,}. 'bertling evaluate' scores them."
        )
    figures = {key.removeprefix("eval/"): value for key, value in state["metrics"].items()}
    run = run_of(loaded.folder)
    floors: dict[str, Any] = {}
    for entry in read_metrics(run) if run else []:
        floors |= {key: value for key, value in entry.items() if key.startswith("floor")}
    rows = [(name, value) for name, value in (figures | floors).items() if isinstance(value, int | float)]
    table = "\n".join(["| figure | value |", "|---|---|", *(f"| {name} | {value:,.4f} |" for name, value in rows)])
    if head_of(loaded.model) == "masked_lm":
        return f"{table}\n\nProtocol: {MLM_PROTOCOL}."
    whole = f"{table}\n\nOver the whole dev set that the run was given; one seed."
    if state["best_step"] == state["step"]:
        whole += " The step was picked by this accuracy, which makes it a little too good."
    return whole


def training(state: dict[str, Any] | None) -> str:
    """How long, and every setting."""
    if state is None:
        return "The folder that this was made from tells nothing of it."
    length = f"{state['step']:,} steps in {state['seconds'] / 60:.1f} minutes"
    return f"{length}, with these settings:\n\n```ini\n{str(state['settings']).strip()}\n```"


def data(run: Path | None) -> str:
    """The data card of the prepared text, where it still lies where the run found it."""
    if run is None:
        return "The folder that this was made from tells nothing of it."
    try:
        settings, _ = read_settings([run / "config.ini"], {})
        if settings.task_type != "mlm":
            return f"Labelled texts: {settings.train_input or 'SST-2, the parquet files in the work folder'}."
        paths = match_samples(settings.base_dir, settings.dataset_pattern)
        lines = [f"- {path.name}: {open_samples(path).rows:,} rows" for path in paths]
        for card in sorted(paths[0].parent.glob("card_*.json")):
            if any(path.name == f"train_{card.stem.removeprefix('card_')}" for path in paths):
                lines.append("\n```json\n" + json.dumps(read_json(card, "data card"), indent=1) + "\n```")
        return "\n".join(lines)
    except BertlingError:
        return "The prepared text is not at hand any more; the settings above name it."
