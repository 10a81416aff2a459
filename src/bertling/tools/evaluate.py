"""Scores of a checkpoint on a whole data set, beside the floors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertling.batches import check_length
from bertling.checkpoint import Loaded, load_checkpoint, run_of
from bertling.files import BertlingError
from bertling.inference import load_box
from bertling.interop import head_of
from bertling.labelled import LabelledTexts, check_agree, labels_of, load_labelled
from bertling.model import BertForMaskedLM
from bertling.runtime import Runtime, build_runtime
from bertling.samples import Samples, open_samples
from bertling.settings import Settings, parse_settings, read_ini
from bertling.tables import TABLES, table_ending
from bertling.tasks import (
    check_scored,
    classifier_batches,
    evaluate_classifier,
    evaluate_masked_lm,
    mlm_floors,
    mlm_protocol,
)


@dataclass(frozen=True)
class Evaluation:
    """Figures with the protocol that they were taken by."""

    protocol: str
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"protocol": self.protocol, **self.figures}

    def text(self) -> str:
        """A line a figure."""
        rows = [*self.figures.items(), ("protocol", self.protocol)]
        return "\n".join(
            f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}" for name, value in rows
        )


def evaluate(
    cp: Path | None,
    data: Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    device: str = "auto",
) -> Evaluation:
    """Score a masked language model on a prepared data set, or a classifier on a labelled file; None: the box's."""
    loaded = load_for(cp, data, text_column, label_column)
    # Nothing is compiled: an evaluation is over before that has paid.
    runtime = build_runtime(parse_settings({"device": device, "compile": "false"}))
    loaded.model.to(runtime.device)
    if isinstance(loaded.model, BertForMaskedLM):
        return score_masked_lm(loaded, data, runtime)
    return score_classifier(loaded, texts_for(loaded, data, text_column, label_column), runtime)


def load_for(cp: Path | None, data: Path, text_column: str | None, label_column: str | None) -> Loaded:
    """The checkpoint; refused where it and the data, or what is said of them, are not of one kind."""
    table = table_ending(data) in TABLES
    loaded = load_box("classify" if table else "fill") if cp is None else load_checkpoint(cp)
    cp = cp or loaded.folder
    if head_of(loaded.model) == "none":
        raise BertlingError(f"{cp}: an encoder without a head has nothing to score; fine-tune it first")
    if isinstance(loaded.model, BertForMaskedLM) and table:
        raise BertlingError(
            f"{data}: labelled texts, but {cp} is a masked language model: name a data set of 'bertling prepare', "
            "or a fine-tuned checkpoint"
        )
    if not isinstance(loaded.model, BertForMaskedLM) and data.is_dir():
        raise BertlingError(
            f"{data}: a folder, but {cp} is a classifier: name a file of labelled texts (.tsv .csv .jsonl .parquet)"
        )
    if isinstance(loaded.model, BertForMaskedLM) and (text_column, label_column) != (None, None):
        name = "label-column" if text_column is None else "text-column"
        raise BertlingError(f"{name}: is for classifiers, and {cp} is a masked language model; leave it out")
    return loaded


def samples_for(loaded: Loaded, data: Path) -> Samples:
    """A prepared data set whose rows the model can take."""
    samples = open_samples(data)
    check_length(samples, loaded.model.config.max_position_embeddings)
    return samples


def texts_for(loaded: Loaded, data: Path, text_column: str | None, label_column: str | None) -> LabelledTexts:
    """Labelled texts with the classes numbered as the model's."""
    texts, config = load_labelled(data, text_column=text_column, label_column=label_column), loaded.model.config
    if texts.names is not None:
        texts = check_agree(LabelledTexts(loaded.folder, [], None, config.labels), texts)
    labels = labels_of(texts)
    if int(labels.max()) >= config.num_labels:
        raise BertlingError(
            f"{texts.path}: label {int(labels.max())}: the model knows {config.num_labels} classes; "
            "use data of its task"
        )
    return texts


def score_masked_lm(loaded: Loaded, data: Path, runtime: Runtime) -> Evaluation:
    """Loss and accuracy with frozen masks; the floors come from the counts of the same data."""
    samples = samples_for(loaded, data)
    figures = evaluate_masked_lm(loaded.model, samples, loaded.tokenizer, runtime)
    check_scored(samples, figures["eval/scored"])
    floors = mlm_floors([samples], samples, loaded.tokenizer)
    return Evaluation(
        f"{data.name}, {mlm_protocol(samples, loaded.tokenizer)}; floors of the unigram model from the counts of this "
        f"data; {runtime.describe()}",
        {
            "accuracy": figures["eval/accuracy"],
            "loss": figures["eval/loss"],
            "scored": int(figures["eval/scored"]),
            "unigram accuracy": floors["floor/unigram"],
            "unigram loss": floors["floor_loss/unigram"],
        },
    )


def score_classifier(loaded: Loaded, texts: LabelledTexts, runtime: Runtime) -> Evaluation:
    """Accuracy, macro-F1 and the confusion matrix, beside the share of the commonest class in this file."""
    labels = labels_of(texts)
    seq_len = trained_seq_len(loaded)
    batches = classifier_batches(texts, loaded.tokenizer, seq_len)
    scores = evaluate_classifier(loaded.model, texts, batches, runtime)
    majority = max(sum(row) for row in scores["confusion"]) / len(labels)
    return Evaluation(
        f"{texts.path.name}, all {len(labels):,} texts, cut at {seq_len} tokens; {runtime.describe()}",
        {**scores, "majority class": majority},
    )


def trained_seq_len(loaded: Loaded) -> int:
    """Where the training of a classifier cut its texts; as long as the model takes them if that is not known."""
    limit, run = loaded.model.config.max_position_embeddings, run_of(loaded.folder)
    if run is None or not (run / "config.ini").is_file():
        return limit
    return min(limit, int(read_ini(run / "config.ini").get("seq_len", Settings.seq_len)))
