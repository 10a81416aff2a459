"""Labelled texts: files of text and label -> batches of similar length, and the scores and floors of a classifier.

Shapes: B texts, T tokens (the longest of the batch, rounded up).
"""

import hashlib
import json
import re
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bertling.batches import Batch
from bertling.files import BertlingError
from bertling.packed import IGNORED
from bertling.tables import Columns, check_text, read_columns, shorten
from bertling.tokenizer import Tokenizer

SST2_NAMES = ("negative", "positive")
PARQUET = "{}-00000-of-00001.parquet"  # how its files are called, by split
MAX_CLASSES = 10_000
BAG_CLASSES = 500
"""Classes up to which a bag of words is tried: its time and memory grow with them."""
TEXTS_AT_ONCE = 4096
"""Texts that are tokenized together: the library's results are many times as large as the ids."""
CHUNK_BATCHES = 50
"""Batches whose texts are sorted by length together: enough for little padding, few enough for random batches."""

Int64s = npt.NDArray[np.int64]
PlacedBatch = tuple[Int64s, Batch]
"""A batch with the places of its texts in the data."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with class numbers (None where the file has no labels) and, where labels are words, the classes' names."""

    path: Path
    texts: list[str]
    labels: Int64s | None
    names: tuple[str, ...] | None = None

    @property
    def num_labels(self) -> int:
        """How many classes there are: the number of names, else the largest class number plus one."""
        return len(self.names) if self.names is not None else int(labels_of(self).max()) + 1

    @property
    def id2label(self) -> dict[int, str]:
        """The classes' names by number, as a model's configuration keeps them."""
        return dict(enumerate(self.names or (str(i) for i in range(self.num_labels))))

    @property
    def content(self) -> str:
        """A sum over texts and labels, the same for the same ones."""
        labels = [] if self.labels is None else self.labels.tolist()
        return hashlib.sha256(json.dumps([self.texts, labels]).encode()).hexdigest()[:16]


def load_labelled(
    path: Path, *, text_column: str | int | None = None, label_column: str | int | None = None
) -> LabelledTexts:
    """Read .parquet, or .tsv (no quoting, as in GLUE), .csv, .jsonl and their .gz.

    Columns not named are found by their usual names; 0-based numbers mean a .tsv or .csv file without a header.
    Labels that are all -1 mean a file without labels. Raises BertlingError, one line, for whatever does not fit.
    """
    columns = read_columns(path, text_column, label_column)
    if not columns.texts:
        raise BertlingError(f"{path}: holds no labelled texts; give a file with at least one row")
    for value, number in zip(columns.texts, columns.numbers, strict=True):
        if not isinstance(value, str):
            raise BertlingError(f"{path}: {columns.unit} {number}: the text is {shorten(value)}, not a string; mend it")
        check_text(f"{path}: {columns.unit} {number}", value)
    if not any(value.strip() for value in columns.texts):
        raise BertlingError(f"{path}: all of its texts are empty; name the right column with text-column")
    labels, names = _class_numbers(path, columns)
    return LabelledTexts(path, columns.texts, labels, names)


def _class_numbers(path: Path, columns: Columns) -> tuple[Int64s | None, tuple[str, ...] | None]:
    """Integer labels as they are (all -1: None); words become the places of their names in sorted order."""
    values = [_label(value) for value in columns.labels]
    kind = type(values[0])
    for value, shown, number in zip(values, map(shorten, columns.labels), columns.numbers, strict=True):
        where = f"{path}: {columns.unit} {number}: "
        if value is None:
            raise BertlingError(
                f"{where}the label {shown} is neither an integer nor a word; mend it or name another label-column"
            )
        if type(value) is not kind:
            raise BertlingError(f"{where}the label {shown}: some labels are words, some numbers; use one kind")
        if isinstance(value, int) and not -1 <= value < MAX_CLASSES:
            raise BertlingError(f"{where}the label {shown} is no class number (0, 1, ...); name another label-column")
    if kind is str:
        names = tuple(sorted({str(value) for value in values}))
        if len(names) > MAX_CLASSES:
            raise BertlingError(f"{path}: {len(names):,} different labels are no classes; name another label-column")
        ids = {name: i for i, name in enumerate(names)}
        return np.array([ids[str(value)] for value in values], dtype=np.int64), names
    labels = np.array(values, dtype=np.int64)
    missing = np.flatnonzero(labels == -1)
    if len(missing) == len(labels):
        return None, None
    if len(missing):
        where = f"{path}: {columns.unit} {columns.numbers[missing[0]]}: "
        raise BertlingError(f"{where}the label is -1 (none) but other texts have one; drop it or label it")
    return labels, None


def _label(value: Any) -> int | str | None:
    """A label as an integer or a word; None if it is neither (missing, a fraction, a list)."""
    if isinstance(value, int):
        return int(value)
    if not isinstance(value, str) or not value.strip():
        return None
    if re.fullmatch(r"[-+]?[0-9]{1,9}", value.strip()):
        return int(value)
    try:
        float(value)
    except ValueError:
        return value.strip()
    return None


def labels_of(data: LabelledTexts) -> Int64s:
    """The labels, which must be there."""
    if data.labels is None:
        raise BertlingError(f"{data.path}: has no labels (all are -1), so nothing can be trained or scored on it")
    return data.labels


def check_training(data: LabelledTexts) -> Int64s:
    """The labels of training data: at least two classes, numbered 0, 1, ... without a gap."""
    labels = labels_of(data)
    classes = np.unique(labels).tolist()
    if len(classes) < 2:
        raise BertlingError(f"{data.path}: all labels are of one class ({data.id2label[classes[0]]}); add the others")
    if classes != list(range(data.num_labels)):
        shown = ", ".join(str(label) for label in classes[:10])
        raise BertlingError(f"{data.path}: the labels are {shown}: number the classes 0, 1, ... without gaps")
    return labels


def check_agree(train: LabelledTexts, other: LabelledTexts) -> LabelledTexts:
    """`other` with the class numbers of `train`; a class that the training data does not have is an error."""
    if other.labels is None:
        return replace(other, names=train.names)
    if (train.names is None) != (other.names is None):
        raise BertlingError(f"{other.path}: its labels and those of {train.path} must be both words or both numbers")
    known = {name: i for i, name in train.id2label.items()}
    names = other.id2label
    unknown = sorted({names.get(i, str(i)) for i in np.unique(other.labels).tolist()} - known.keys())
    if unknown:
        raise BertlingError(
            f"{other.path}: label {shorten(unknown[0])} does not occur in {train.path}; make them agree"
        )
    if other.names is None or train.names is None:
        return other
    return replace(other, labels=np.array([known[name] for name in other.names])[other.labels], names=train.names)


def sst2_files(base_dir: Path) -> dict[str, Path]:
    """SST-2's files in `<base_dir>/datasets`, or as downloaded to sst2 in there; test is named if it is there."""
    needed = ("train", "validation")
    folder, downloaded = base_dir / "datasets", base_dir / "datasets" / "sst2" / "data"
    if downloaded.is_dir() and not all((folder / PARQUET.format(split)).is_file() for split in needed):
        folder = downloaded
    files = {split: folder / PARQUET.format(split) for split in (*needed, "test")}
    for split in needed:
        if not files[split].is_file():
            raise BertlingError(
                f"{files[split]}: missing; fetch it by 'bertling download sst2 -o {base_dir / 'datasets' / 'sst2'}', "
                "or name your own files by --train-input and --val-input"
            )
    return {split: path for split, path in files.items() if path.is_file()}


def pad_rows(
    rows: Sequence[Sequence[int] | npt.NDArray[np.integer[Any]]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of ids as input_ids [B, T] and attention_mask [B, T] (True: keep; None where nothing is padded).

    T is the longest row: rounded up to a multiple of 8, it would cost a fifth more (docs/experiments.md).
    """
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max())
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = row
    keep = np.arange(width) < lengths[:, None]
    return torch.from_numpy(ids), None if keep.all() else torch.from_numpy(keep)


class _Rows:
    """Texts tokenized once: [CLS] ids [SEP], cut to seq_len, in one flat array."""

    def __init__(self, data: LabelledTexts, tokenizer: Tokenizer, seq_len: int) -> None:
        if seq_len < 3:
            raise BertlingError(f"seq-len {seq_len}: must be at least 3, for [CLS], one token and [SEP]")
        flat, lengths = array("i"), array("q")
        self.truncated = 0
        for start in range(0, len(data.texts), TEXTS_AT_ONCE):
            for ids in tokenizer.encode_batch(data.texts[start : start + TEXTS_AT_ONCE]):
                flat.extend((tokenizer.cls_id, *ids[: seq_len - 2], tokenizer.sep_id))
                lengths.append(min(len(ids), seq_len - 2) + 2)
                self.truncated += len(ids) > seq_len - 2
        self.lengths = np.frombuffer(lengths, dtype=np.int64)
        self._ids = np.frombuffer(flat, dtype=np.int32)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._labels, self._pad_id = data.labels, tokenizer.pad_id

    def batch(self, indices: Int64s) -> Batch:
        rows = [self._ids[self._starts[i] : self._starts[i] + self.lengths[i]] for i in indices]
        input_ids, attention_mask = pad_rows(rows, self._pad_id)
        if self._labels is None:
            return Batch(input_ids, attention_mask, None, torch.full((len(indices),), IGNORED), 0)
        return Batch(input_ids, attention_mask, None, torch.from_numpy(self._labels[indices]), len(indices))


class LabelledBatches:
    """Training batches of texts of similar length; batch k is a pure function of (seed, k), so resuming is free.

    Every text comes once per epoch: the epoch's random order is cut into chunks of 50 batches, each sorted by
    length and cut into batches, and these come in random order.
    """

    def __init__(self, data: LabelledTexts, tokenizer: Tokenizer, *, batch_size: int, seq_len: int, seed: int) -> None:
        check_training(data)
        self._rows = _Rows(data, tokenizer, seq_len)
        self.size, self.batch_size, self.seed = len(data.texts), batch_size, seed
        self.truncated = self._rows.truncated
        """How many texts were longer than seq_len."""
        self.steps_per_epoch = -(-self.size // batch_size)
        self._epoch_plan = lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> list[Int64s]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.size)
        batches: list[Int64s] = []
        chunk = CHUNK_BATCHES * self.batch_size
        for start in range(0, self.size, chunk):
            part = order[start : start + chunk]
            part = part[np.argsort(self._rows.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def indices(self, step: int) -> Int64s:
        """Which texts are in the global batch of this step."""
        return self._epoch_plan(step // self.steps_per_epoch)[step % self.steps_per_epoch]

    def batch(self, step: int) -> Batch:
        """The global batch of this step: labels [B]."""
        return self._rows.batch(self.indices(step))

    def micro_batches(self, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> tuple[list[Batch], int]:
        """This rank's share of the global batch, and how many texts the whole of it has.

        Every rank gets the same number of micro-batches. Where a small batch leaves one without a text, it holds one
        row with the label -100 and counts 0, so that all ranks stay in step.
        """
        indices = self.indices(step)
        slices = -(-len(indices[::world_size]) // micro_batch_size)
        parts = np.array_split(indices[rank::world_size], slices)
        filler = replace(self._rows.batch(indices[:1]), labels=torch.tensor([IGNORED]), count=0)
        return [self._rows.batch(part) if len(part) else filler for part in parts], len(indices)


def evaluation_batches(
    data: LabelledTexts, tokenizer: Tokenizer, *, batch_size: int, seq_len: int
) -> list[PlacedBatch]:
    """All texts once, sorted by length (no labels: all -100)."""
    rows = _Rows(data, tokenizer, seq_len)
    order = np.argsort(rows.lengths, kind="stable")
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [(part, rows.batch(part)) for part in parts]


def classification_scores(labels: Int64s, predictions: Int64s, num_labels: int) -> dict[str, Any]:
    """accuracy, macro_f1 (over the classes that occur, as scikit-learn's) and confusion[true][predicted] counts."""
    confusion = np.bincount(labels * num_labels + predictions, minlength=num_labels**2).reshape(num_labels, num_labels)
    right, occurrences = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    f1 = 2 * right[occurrences > 0] / occurrences[occurrences > 0]
    return {
        "accuracy": float(right.sum() / len(labels)),
        "macro_f1": float(f1.mean()),
        "confusion": confusion.tolist(),
    }


def majority_floor(train: LabelledTexts, dev: LabelledTexts) -> float:
    """Accuracy on `dev` of always answering the most frequent class of `train`."""
    majority = np.bincount(labels_of(train)).argmax()
    return float((labels_of(dev) == majority).mean())


def bag_of_words_floor(train: LabelledTexts, dev: LabelledTexts) -> float:
    """Accuracy on `dev` of a logistic regression over words and pairs of words (TF-IDF), trained on `train`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", sublinear_tf=True)
    model = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes")  # whether they are numbers: they are not
        model.fit(vectorizer.fit_transform(train.texts), check_training(train))
    return float((model.predict(vectorizer.transform(dev.texts)) == labels_of(dev)).mean())


@dataclass(frozen=True)
class SeedSummary:
    """Mean, standard deviation and 95 % t-interval over n seeds (None with fewer than two)."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


def summarise_seeds(values: Sequence[float]) -> SeedSummary:
    """What k seeds say together: the interval is for their mean (Student's t, n - 1 degrees of freedom)."""
    from scipy.special import stdtrit

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return SeedSummary(n, mean, None, None, None)
    sd = float(np.std(values, ddof=1))
    half = float(stdtrit(n - 1, 0.975)) * sd / n**0.5
    return SeedSummary(n, mean, sd, mean - half, mean + half)
