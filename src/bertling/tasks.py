"""What a model is trained for: masked language modelling or classification. Batch -> loss, metrics, illustration.

Shapes: B batch, T tokens, M masked slots, V vocabulary, L classes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertling import batches, labelled
from bertling.batches import Batch, MaskedBatches
from bertling.distributed import Ranks
from bertling.files import BertlingError
from bertling.illustrate import Illustration, illustrate
from bertling.labelled import BAG_CLASSES, LabelledBatches, LabelledTexts, PlacedBatch
from bertling.packed import IGNORED
from bertling.runtime import Runtime
from bertling.samples import Samples, unigram_floors
from bertling.tokenizer import Tokenizer

EVAL_BATCH, EVAL_TOKENS = 64, 1 << 15
"""Most rows, and most tokens, in a forward pass of an evaluation; the figures do not depend on it."""


class EvalMasks(NamedTuple):
    """The masks of every evaluation, whatever those of the training: drawn once, and told with each figure."""

    mlm_probability: float = 0.15
    seed: int = 0


EVAL_MASKS = EvalMasks()


class Task(Protocol):
    """What the training loop needs to know. Batches are pure functions of the step; losses are sums, not means."""

    floors: dict[str, float]
    steps_per_epoch: float
    data: list[tuple[str, int, str]]
    """What is trained on, and last what is evaluated on: names, rows, sums, by which a resumed run knows its data."""

    def micro_batches(self, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of the step, and the scored items of the whole global batch."""

    def rows(self, step: int) -> dict[str, list[int]]:
        """Where the rows of the step's global batch come from: data sets, and indices into them."""

    def suspects(self) -> list[str]:
        """What is odd about the training data, as far as a look at a part of it tells."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed loss over the batch's scored items."""

    def evaluate(self, model: nn.Module, runtime: Runtime, ranks: Ranks) -> dict[str, float]:
        """The figures on the whole validation set, eval/loss and eval/accuracy among them."""

    def illustrate(self, model: nn.Module, runtime: Runtime, turn: int) -> Illustration | None:
        """An example of the model's predictions, another one each turn, if the task has something to show."""


class MaskedLMTask:
    """Find the tokens behind the masks (Devlin et al. 2019)."""

    def __init__(
        self,
        train: Sequence[Samples],
        val: Samples,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        mlm_probability: float,
        whole_words: bool = False,
        data_folder: Path | None = None,
    ) -> None:
        """`data_folder`: a run remembers its data sets by their paths below it; without it by their names."""
        self.train = MaskedBatches(
            train,
            batch_size=batch_size,
            seed=seed,
            mlm_probability=mlm_probability,
            tokenizer=tokenizer,
            whole_words=whole_words,
        )
        batches.check_samples([val], tokenizer)
        self.val, self.tokenizer = val, tokenizer
        self.steps_per_epoch = self.train.steps_per_epoch
        self.floors = mlm_floors(train, val, tokenizer)
        self.data = [
            (os.path.relpath(samples.path, data_folder or samples.path.parent), samples.rows, "")
            for samples in (*train, val)
        ]

    def micro_batches(self, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> tuple[list[Batch], int]:
        return self.train.micro_batches(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)

    def rows(self, step: int) -> dict[str, list[int]]:
        return {str(samples.path): indices.tolist() for samples, indices in self.train.rows(step)}

    def suspects(self) -> list[str]:
        return odd_data(self.train, self.tokenizer)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(batch.input_ids, batch.attention_mask, wanted=batch.wanted, labels=batch.labels).loss_sum
        return loss

    def evaluate(self, model: nn.Module, runtime: Runtime, ranks: Ranks) -> dict[str, float]:
        metrics = evaluate_masked_lm(model, self.val, self.tokenizer, runtime, ranks)
        check_scored(self.val, metrics["eval/scored"])
        return metrics

    def illustrate(self, model: nn.Module, runtime: Runtime, turn: int) -> Illustration:
        examples = batches.evaluation_batches(
            self.val,
            self.tokenizer,
            batch_size=1,
            **EVAL_MASKS._asdict(),
            rank=turn % self.val.rows,
            world_size=self.val.rows,
        )
        batch = next(examples)
        assert batch.wanted is not None
        model.eval()
        with torch.inference_mode(), runtime.autocast():
            on_device = batch.to(runtime.device)
            logits: Tensor = model.forward(
                on_device.input_ids, on_device.attention_mask, wanted=on_device.wanted
            )  # [M, V]
        model.train()
        used = batch.labels != IGNORED
        return illustrate(
            self.tokenizer.tokens(batch.input_ids[0].tolist()),
            batch.wanted[used].tolist(),
            self.tokenizer.tokens(logits.argmax(-1).cpu()[used].tolist()),
            self.tokenizer.tokens(batch.labels[used].tolist()),
        )


def odd_data(train: MaskedBatches, tokenizer: Tokenizer, looked_at: int = 2048) -> list[str]:
    """What may keep a masked language model from learning, in the rows of the first steps: repeats, [UNK], masks."""
    batch = train.batch(0)
    steps = max(1, min(looked_at // len(batch.input_ids), int(train.steps_per_epoch)))
    rows = np.concatenate(
        [samples.fetch_originals(indices) for step in range(steps) for samples, indices in train.rows(step)]
    )  # [n, T]
    ordinary = ~np.isin(rows, [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id])
    repeats = 1 - len(np.unique(rows, axis=0)) / len(rows)
    unknown = (rows == tokenizer.unk_id).sum() / max(ordinary.sum(), 1)
    assert batch.wanted is not None
    scored = batch.labels != IGNORED
    shown = batch.input_ids.flatten()[batch.wanted[scored]] == batch.labels[scored]
    masked = int(scored.sum()) / max(int((batch.input_ids != tokenizer.pad_id).sum()), 1)
    odd = []
    if repeats > 0.2:
        odd.append(f"{repeats:.0%} of the rows are repeats; prepare with --drop-duplicates")
    if unknown > 0.05:
        odd.append(f"{unknown:.0%} of the tokens are [UNK]; make a vocabulary from this text")
    if not 0.05 <= masked <= 0.5:
        odd.append(f"{masked:.0%} of the tokens are masked; 15 to 40 % is usual")
    if bool(scored.any()) and float(shown.float().mean()) > 0.5:
        odd.append(f"{float(shown.float().mean()):.0%} of the masked tokens stand unchanged in the input")
    return odd


def mlm_protocol(val: Samples, tokenizer: Tokenizer) -> str:
    """What an accuracy on these rows is of: how many, which masks, how many answers there are to choose from."""
    masks = f"{EVAL_MASKS.mlm_probability:.0%} of the ordinary tokens masked, 80/10/10, seed {EVAL_MASKS.seed}"
    return (
        f"all {val.rows:,} rows of {val.seq_len}; {'masks as stored in the file' if val.labels else masks}; "
        f"vocabulary of {tokenizer.vocab_size:,}"
    )


def mlm_floors(train: Sequence[Samples], scored: Samples, tokenizer: Tokenizer) -> dict[str, float]:
    """What a model without context reaches on `scored`: the accuracy and cross-entropy of the unigram model."""
    size = tokenizer.vocab_size
    floors = unigram_floors(
        np.sum([one.counts(size) for one in train], axis=0), scored.counts(size), tokenizer.special_ids
    )
    return {"floor/unigram": floors.accuracy, "floor_loss/unigram": floors.cross_entropy}


def evaluation_rows(seq_len: int) -> int:
    """Rows of this length in a forward pass of an evaluation."""
    return max(1, min(EVAL_BATCH, EVAL_TOKENS // seq_len))


def evaluate_masked_lm(
    model: nn.Module, samples: Samples, tokenizer: Tokenizer, runtime: Runtime, ranks: Ranks | None = None
) -> dict[str, float]:
    """Loss (nats per masked token) and accuracy over all masked places of the whole set, with frozen masks."""
    ranks = ranks or Ranks()
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in batches.evaluation_batches(
        samples,
        tokenizer,
        batch_size=evaluation_rows(samples.seq_len),
        **EVAL_MASKS._asdict(),
        rank=ranks.rank,
        world_size=ranks.world_size,
    ):
        on_device = batch.to(runtime.device)
        with torch.inference_mode(), runtime.autocast():
            # forward, not the call: an evaluation is over before compiling it would have paid.
            output = model.forward(
                on_device.input_ids, on_device.attention_mask, wanted=on_device.wanted, labels=on_device.labels
            )
        totals += torch.tensor([output.loss_sum.item(), output.correct.item(), batch.count], dtype=torch.float64)
    model.train()
    loss, correct, count = ranks.sum(totals).tolist()
    return {"eval/loss": loss / max(count, 1), "eval/accuracy": correct / max(count, 1), "eval/scored": count}


def check_scored(samples: Samples, count: float) -> None:
    """Refuse data in which no token could be masked and scored."""
    if not count:
        raise BertlingError(
            f"{samples.path}: none of its tokens can be scored: all are [UNK], or its masks are missing; prepare it "
            "again, with a vocabulary made from such text"
        )


class ClassificationTask:
    """Tell the class of a text."""

    def __init__(
        self,
        train: LabelledTexts,
        dev: LabelledTexts,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        floors: dict[str, float],
    ) -> None:
        self.train = LabelledBatches(train, tokenizer, batch_size=batch_size, seq_len=seq_len, seed=seed)
        self.steps_per_epoch = float(self.train.steps_per_epoch)
        self.dev = dev
        self.dev_batches = classifier_batches(dev, tokenizer, seq_len)
        self.floors = floors
        self.latest: dict[str, Any] = {}
        """The scores of the latest evaluation, with the confusion matrix."""
        self.data = [(texts.path.name, len(texts.texts), texts.content) for texts in (train, dev)]

    def micro_batches(self, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> tuple[list[Batch], int]:
        return self.train.micro_batches(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)

    def rows(self, step: int) -> dict[str, list[int]]:
        return {"training texts": self.train.indices(step).tolist()}

    def suspects(self) -> list[str]:
        return []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch.input_ids, batch.attention_mask)  # [B, L]
        return F.cross_entropy(logits.float(), batch.labels, ignore_index=IGNORED, reduction="sum")

    def evaluate(self, model: nn.Module, runtime: Runtime, ranks: Ranks) -> dict[str, float]:
        # The dev sets of classification are small: every process scores all of it, and nothing has to be exchanged.
        scores = self.latest = evaluate_classifier(model, self.dev, self.dev_batches, runtime)
        return {"eval/loss": scores["loss"], "eval/accuracy": scores["accuracy"], "eval/macro_f1": scores["macro_f1"]}

    def illustrate(self, model: nn.Module, runtime: Runtime, turn: int) -> None:
        return None


def classification_floors(train: LabelledTexts, dev: LabelledTexts) -> dict[str, float]:
    """What is reached without a neural network: the commonest class, and a logistic regression on words."""
    return {
        "floor/majority": labelled.majority_floor(train, dev),
        **({"floor/bag_of_words": labelled.bag_of_words_floor(train, dev)} if train.num_labels <= BAG_CLASSES else {}),
    }


def classifier_batches(dev: LabelledTexts, tokenizer: Tokenizer, seq_len: int) -> list[PlacedBatch]:
    """All texts of a set, tokenized once for any number of evaluations."""
    return labelled.evaluation_batches(dev, tokenizer, batch_size=evaluation_rows(seq_len), seq_len=seq_len)


def evaluate_classifier(
    model: nn.Module, dev: LabelledTexts, dev_batches: Sequence[PlacedBatch], runtime: Runtime
) -> dict[str, Any]:
    """Loss, accuracy, macro_f1 and confusion[true][predicted] over the whole set."""
    truth = labelled.labels_of(dev)
    logits = class_logits(model, dev_batches, runtime)
    loss = float(F.cross_entropy(logits, torch.from_numpy(truth)))
    predictions = logits.argmax(-1).numpy()
    num_labels = max(dev.num_labels, int(predictions.max()) + 1)
    return {"loss": loss, **labelled.classification_scores(truth, predictions, num_labels)}


def class_logits(model: nn.Module, dev_batches: Sequence[PlacedBatch], runtime: Runtime) -> Tensor:
    """What the model says of every text, in the order of the texts: fp32 [N, L], on the CPU."""
    model.eval()
    places, parts = [], []
    for indices, batch in dev_batches:
        on_device = batch.to(runtime.device)
        with torch.inference_mode(), runtime.autocast():
            parts.append(model.forward(on_device.input_ids, on_device.attention_mask).float().cpu())
        places.append(torch.from_numpy(indices))
    model.train()
    return torch.cat(parts)[torch.cat(places).argsort()]
