"""Text in, answers out: words behind masks, classes, and vectors, computed in batches of similar length.

Shapes: B texts, T tokens, D hidden, M masked places, V vocabulary, L classes.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bertling.files import BertlingError
from bertling.int8 import round_weights
from bertling.labelled import pad_rows
from bertling.model import (
    BertEncoder,
    BertForMaskedLM,
    BertForSequenceClassification,
    ModelConfig,
    Pooling,
    mean_over_tokens,
)
from bertling.optim import HIDDEN
from bertling.runtime import Runtime, choose_device
from bertling.tables import check_text, decode_utf8, open_bytes, shorten
from bertling.tokenizer import Tokenizer
from bertling.vectors import Vectors

if TYPE_CHECKING:
    from bertling.checkpoint import Loaded

BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 1 << 15
"""Tokens in a forward pass, padding counted: many short texts at once, or few long ones."""
BOX = Path(__file__).with_name("box")
"""The model that comes with the package; box/README.md is its card."""
BATCHES_A_THREAD = 4
"""From so many on each thread takes batches of its own; with fewer, some would have none left at the end."""
CHUNK_LINES = 1024
MAX_LINE_BYTES = 1 << 20


class Filled(TypedDict):
    """The answer for one text with masks."""

    text: str
    masks: list[list[tuple[str, float]]]
    """For each [MASK] in order: the likeliest entries of the vocabulary with their probabilities, best first."""
    truncated: bool
    """Whether the text was longer than the model reads, so that only a part around its masks was looked at."""


class Classified(TypedDict):
    """The answer for one text."""

    text: str
    label: str
    score: float
    """The probability of `label`."""
    probabilities: dict[str, float]
    truncated: bool
    """Whether the text was longer than the model reads, so that only its beginning was looked at."""


class _Batch(NamedTuple):
    """Rows of similar length, on the device."""

    places: list[int]
    """Where each row stands among all of them."""
    input_ids: Tensor
    """[B, T]."""
    attention_mask: Tensor | None
    """[B, T]; None where nothing is padded."""


Answer = TypeVar("Answer")


class _Reader:
    """A model with what it takes to hand it texts."""

    def __init__(self, model: nn.Module, config: ModelConfig, tokenizer: Tokenizer, runtime: Runtime | None) -> None:
        self.runtime = runtime or Runtime(next(model.parameters()).device, torch.float32, compile=False)
        self.model = model.to(self.runtime.device).eval()
        self.tokenizer = tokenizer
        self.limit = config.max_position_embeddings - 2
        """Tokens of a text that fit between [CLS] and [SEP]."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            if not isinstance(text, str):
                raise BertlingError(f"text {shorten(text)}: is of type {type(text).__name__}; give strings")
            check_text(f"text {shorten(text)}", text)
        return self.tokenizer.encode_batch(texts)

    def batches(self, rows: list[list[int]]) -> Iterator[_Batch]:
        """All rows in batches, the longest first."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            longest = len(rows[order[-1]]) + 2
            size = max(1, (BATCH_TOKENS if self.runtime.device.type == "cpu" else GPU_BATCH_TOKENS) // longest)
            places, order = order[-size:], order[:-size]
            wrapped = [[self.tokenizer.cls_id, *rows[i], self.tokenizer.sep_id] for i in places]
            input_ids, mask = pad_rows(wrapped, self.tokenizer.pad_id)
            device = self.runtime.device
            yield _Batch(places, input_ids.to(device), None if mask is None else mask.to(device))

    def each(self, rows: list[list[int]], compute: Callable[[_Batch], Answer]) -> Iterator[tuple[list[int], Answer]]:
        """What `compute` makes of each batch, with the places of its rows.

        Where a CPU has many batches before it, its threads do not share each of them, but take one each: none has to
        wait for the others after every product (docs/experiments.md).
        """

        def run(batch: _Batch) -> tuple[list[int], Answer]:
            with torch.inference_mode(), self.runtime.autocast():
                return batch.places, compute(batch)

        batches, threads = list(self.batches(rows)), torch.get_num_threads()
        if self.runtime.device.type != "cpu" or threads == 1 or len(batches) < BATCHES_A_THREAD * threads:
            yield from map(run, batches)
            return
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield from pool.map(run, batches)
        finally:
            torch.set_num_threads(threads)


class FillMask(_Reader):
    """Answers what may stand at each [MASK] of a text."""

    def __init__(self, model: BertForMaskedLM, tokenizer: Tokenizer, runtime: Runtime | None = None) -> None:
        """Move the model to the runtime's device; without a runtime it stays where it is and computes in fp32."""
        super().__init__(model, model.config, tokenizer, runtime)

    def fill(self, texts: str | Iterable[str], top_k: int = 5) -> list[Filled]:
        """One answer per text, in order. Raises BertlingError for a text without [MASK]."""
        if not 1 <= top_k <= self.tokenizer.vocab_size:
            raise BertlingError(f"top-k {top_k}: must lie between 1 and the vocabulary's {self.tokenizer.vocab_size}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self.encode(texts)
        windows = [self._windows(text, ids) for text, ids in zip(texts, encoded, strict=True)]
        rows = [row for of_text in windows for row, _ in of_text]

        def likeliest(batch: _Batch) -> tuple[list[int], list[list[int]], list[list[float]]]:
            """For each mask the row that it stands in, the best entries, and their probabilities."""
            positions = (batch.input_ids.view(-1) == self.tokenizer.mask_id).nonzero().squeeze(1)  # [M]
            logits = self.model(batch.input_ids, batch.attention_mask, wanted=positions)  # [M, V]
            # Foreign models may have more rows than their vocabulary has entries: those mean nothing.
            logits = logits[:, : self.tokenizer.vocab_size].float()
            probabilities, entries = logits.softmax(-1).topk(top_k)  # [M, top_k] each
            return (positions // batch.input_ids.shape[1]).tolist(), entries.tolist(), probabilities.tolist()

        ranked: list[list[list[tuple[str, float]]]] = [[] for _ in rows]
        for places, found in self.each(rows, likeliest):
            for row, ids, values in zip(*found, strict=True):
                ranked[places[row]].append(list(zip(self.tokenizer.tokens(ids), values, strict=True)))
        found_in = iter(ranked)
        return [
            Filled(
                text=text,
                masks=[answer for _, last in of_text for answer in next(found_in)[-last:]],
                truncated=len(of_text[0][0]) < len(ids),
            )
            for text, of_text, ids in zip(texts, windows, encoded, strict=True)
        ]

    def _windows(self, text: str, ids: list[int]) -> list[tuple[list[int], int]]:
        """The ids, or as many around the masks as the model reads; masks further apart have windows of their own.

        With each window how many of its masks, the last ones, are to be answered there: others were seen from before.
        """
        masks = [place for place, token in enumerate(ids) if token == self.tokenizer.mask_id]
        if not masks:
            raise BertlingError(f"text {shorten(text)}: has no [MASK]; write [MASK] where a word is to be found")
        if len(ids) <= self.limit:
            return [(ids, len(masks))]
        windows = []
        while masks:
            together = [place for place in masks if place - masks[0] < self.limit]
            masks = masks[len(together) :]
            middle = (together[0] + together[-1]) // 2
            start = min(max(0, middle - (self.limit - 1) // 2), len(ids) - self.limit)
            windows.append((ids[start : start + self.limit], len(together)))
        return windows


class Classifier(_Reader):
    """Answers which class a text belongs to."""

    def __init__(
        self, model: BertForSequenceClassification, tokenizer: Tokenizer, runtime: Runtime | None = None
    ) -> None:
        """Move the model to the runtime's device; without a runtime it stays where it is and computes in fp32."""
        super().__init__(model, model.config, tokenizer, runtime)
        self.id2label = model.config.id2label

    def classify(self, texts: str | Iterable[str]) -> list[Classified]:
        """One answer per text, in order; an empty text is classified too."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self.encode(texts)
        answers: dict[int, Classified] = {}

        def likelihoods(batch: _Batch) -> list[list[float]]:
            logits: Tensor = self.model(batch.input_ids, batch.attention_mask)  # [B, L]
            return logits.float().softmax(-1).tolist()

        for places, found in self.each([ids[: self.limit] for ids in encoded], likelihoods):
            for place, values in zip(places, found, strict=True):
                best = max(range(len(values)), key=values.__getitem__)
                answers[place] = Classified(
                    text=texts[place],
                    label=self.id2label[best],
                    score=values[best],
                    probabilities={self.id2label[i]: value for i, value in enumerate(values)},
                    truncated=len(encoded[place]) > self.limit,
                )
        return [answers[place] for place in range(len(texts))]


class Embedder(_Reader):
    """Turns a text into one vector."""

    def __init__(self, model: BertEncoder, tokenizer: Tokenizer, runtime: Runtime | None = None) -> None:
        """Move the model to the runtime's device; without a runtime it stays where it is and computes in fp32."""
        super().__init__(model, model.config, tokenizer, runtime)
        self.encoder = model
        self.truncated = 0
        """How many texts so far were longer than the model reads."""

    def embed(self, texts: str | Iterable[str], pooling: Pooling = "mean", *, normalize: bool = True) -> Vectors:
        """Vectors [B, D]: the last hidden state of [CLS], or the mean over all tokens ([CLS] and [SEP] too).

        The mean is that of Sentence-BERT (Reimers & Gurevych 2019, section 3). Normalized, vectors have length 1, so
        that dot products are cosines. A text longer than the model reads is cut.
        """
        if pooling not in ("cls", "mean"):
            raise BertlingError(f"pooling = {pooling!r}: must be cls or mean")
        texts = [texts] if isinstance(texts, str) else list(texts)
        vectors = np.zeros((len(texts), self.encoder.config.hidden_size), dtype=np.float32)
        encoded = self.encode(texts)
        self.truncated += sum(len(ids) > self.limit for ids in encoded)

        def pooled(batch: _Batch) -> Vectors:
            hidden = self.encoder.encode(batch.input_ids, batch.attention_mask).float()  # [B, T, D]
            return pool(hidden, batch.attention_mask, pooling, normalize=normalize).cpu().numpy()

        for places, found in self.each([ids[: self.limit] for ids in encoded], pooled):
            vectors[places] = found
        return vectors


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: Pooling, *, normalize: bool) -> Tensor:
    """[B, T, D] -> [B, D], padding left out."""
    vectors = hidden[:, 0] if pooling == "cls" else mean_over_tokens(hidden, attention_mask)
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


class Bertling:
    """A trained model with its tokenizer; `load` makes one from a folder."""

    def __init__(
        self, model: BertEncoder, tokenizer: Tokenizer, runtime: Runtime | None = None, *, name: str = "this model"
    ) -> None:
        """`name` stands in errors."""
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.embedder = Embedder(model, tokenizer, runtime)
        self._fill_mask = self._classifier = None
        if isinstance(model, BertForMaskedLM):
            self._fill_mask = FillMask(model, tokenizer, runtime)
        elif isinstance(model, BertForSequenceClassification):
            self._classifier = Classifier(model, tokenizer, runtime)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.model.config

    def fill(self, texts: str | Iterable[str], top_k: int = 5) -> list[Filled]:
        """What may stand at each [MASK]: one answer per text, see `FillMask.fill`."""
        if self._fill_mask is None:
            raise BertlingError(f"fill: {self.name} has no head for masked words; load one from pre-training")
        return self._fill_mask.fill(texts, top_k)

    def classify(self, texts: str | Iterable[str]) -> list[Classified]:
        """The class of each text: one answer per text, see `Classifier.classify`."""
        if self._classifier is None:
            raise BertlingError(f"classify: {self.name} has no classification head; fine-tune it, or load one that was")
        return self._classifier.classify(texts)

    def embed(self, texts: str | Iterable[str], pooling: Pooling = "mean", *, normalize: bool = True) -> Vectors:
        """One vector per text, [B, D], see `Embedder.embed`."""
        return self.embedder.embed(texts, pooling, normalize=normalize)


def load(
    folder: str | Path | None = None, runtime: Runtime | None = None, *, task: Literal["fill", "classify"] = "fill"
) -> Bertling:
    """The model in a run, checkpoint or Hugging Face folder, ready to use; by default in fp32 on the best device.

    Its weights are in the runtime's number format, and so is all that it computes but norms' and softmaxes' insides;
    the hidden matrices and their products in int8, where the runtime says so.

    Without a folder: the model in the box, with its head for masked words or for sentiment, as `task` says.
    """
    from bertling.checkpoint import load_checkpoint

    loaded = load_box(task) if folder is None else load_checkpoint(Path(folder))
    assert isinstance(loaded.model, BertEncoder)
    runtime = runtime or Runtime(choose_device("auto"), torch.float32, compile=False)
    round_weights(loaded.model, HIDDEN if runtime.int8 else ())
    loaded.model.to(runtime.dtype)  # so that nothing has to be converted for every batch
    return Bertling(loaded.model, loaded.tokenizer, runtime, name=str(loaded.folder))


def load_box(task: Literal["fill", "classify"]) -> "Loaded":
    """The model that comes with the package, with its head for this task."""
    from bertling.checkpoint import load_checkpoint

    return load_checkpoint(BOX) if task == "fill" else load_checkpoint(BOX, head="classification", variant="sst2")


def iter_texts(
    arguments: Sequence[str], input_file: Path | None = None, stdin: IO[bytes] | None = None
) -> Iterator[list[str]]:
    """Texts in chunks of up to 1,024: the arguments, else the lines of a file (.gz too; - is no file), else of stdin.

    An empty line is an empty text, so that answers and lines stay in step.
    """
    if arguments and input_file is not None:
        raise BertlingError(f"--input {input_file}: texts were given as arguments too; give one or the other")
    if arguments:
        yield list(arguments)
    elif input_file is not None and str(input_file) != "-":
        with open_bytes(input_file) as file:
            yield from _chunks(str(input_file), file)
    else:
        stream = stdin or (None if sys.stdin is None else sys.stdin.buffer)
        if stream is None or stream.isatty():
            raise BertlingError("no text: give texts as arguments, with --input FILE, or through standard input")
        yield from _chunks("standard input", stream)


def _chunks(name: str, file: IO[bytes]) -> Iterator[list[str]]:
    """Lines, up to a number and a size of them at a time, so that memory stays small however long the file is."""
    chunk: list[str] = []
    size = 0
    for line in _lines(name, file):
        chunk.append(line)
        size += len(line)
        if len(chunk) == CHUNK_LINES or size > MAX_LINE_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _lines(name: str, file: IO[bytes]) -> Iterator[str]:
    number = 1
    while raw := file.readline(MAX_LINE_BYTES + 1):
        if len(raw) > MAX_LINE_BYTES:
            raise BertlingError(f"{name}: line {number}: longer than {MAX_LINE_BYTES:,} bytes; give one text a line")
        yield decode_utf8(name, raw, number).rstrip("\r\n")
        number += 1
    if number == 1:
        raise BertlingError(f"{name}: is empty; give one text a line")
