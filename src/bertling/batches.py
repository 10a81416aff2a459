"""Batches as a pure function of (seed, step): order, masks and the share of a rank all follow from these.

Shapes: B batch, T tokens, S slots a row, M = B * S masked slots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from bertling.files import BertlingError
from bertling.masking import Masked, mask_tokens, slots_per_row, static_masks
from bertling.packed import IGNORED, Ids
from bertling.samples import Samples
from bertling.tokenizer import Tokenizer

_ORDER, _TRAIN_MASKS, _EVAL_MASKS = 1, 2, 3
"""Keep the random streams of one seed apart."""
EVAL_BLOCK = 64
"""Rows whose evaluation masks are drawn together, whatever the batch size."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs."""

    input_ids: Tensor
    """Long [B, T]."""
    attention_mask: Tensor | None
    """Bool [B, T], false at padding; None where there is none."""
    wanted: Tensor | None
    """Long [M]: flat indices of the scored places, which the model takes as `wanted`; None for classification."""
    labels: Tensor
    """Long [M], -100 in unused slots; or [B] classes."""
    count: int
    """Scored items."""

    @property
    def tokens(self) -> int:
        """Tokens without padding, and without the rows that only fill it up."""
        real = (self.labels.view(len(self.input_ids), -1) != IGNORED).any(dim=1)  # [B]
        if self.attention_mask is None:
            return int(real.sum()) * self.input_ids.shape[1]
        return int(self.attention_mask[real].sum())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on a device; `non_blocking` copies to a CUDA GPU from pinned memory without waiting."""
        pin = non_blocking and torch.device(device).type == "cuda"

        def move(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)

        return replace(
            self,
            input_ids=move(self.input_ids),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
            wanted=None if self.wanted is None else move(self.wanted),
            labels=move(self.labels),
        )


STORED_MASKS = "mlm-probability says nothing here: the masks are those that are stored with the data"
"""What whoever gives one is told."""


class MaskedBatches:
    """Training batches for masked language modelling, taken from several data sets in turn, one per epoch.

    Nothing is dropped: a batch may reach over the end of an epoch into the next. `batch_size` is the global one.
    """

    def __init__(
        self,
        samples: Sequence[Samples],
        *,
        batch_size: int,
        seed: int,
        mlm_probability: float,
        tokenizer: Tokenizer,
        whole_words: bool = False,
    ) -> None:
        if batch_size < 1:
            raise BertlingError(f"batch-size: must be at least 1, not {batch_size}")
        check_samples(samples, tokenizer)
        self._samples = list(samples)
        self._batch_size, self._seed, self._mlm_probability = batch_size, seed, mlm_probability
        self._tokenizer = tokenizer
        if whole_words and self._samples[0].labels:
            raise BertlingError(
                f"whole-word-masking: the masks of {self._samples[0].path} are fixed; leave it out, or prepare "
                "the text with --format shards"
            )
        self._continues = torch.tensor(tokenizer.continues) if whole_words else None
        self._slots = _slots(self._samples, mlm_probability)
        self._starts = list(accumulate((s.rows for s in self._samples), initial=0))
        self._orders: dict[int, Ids] = {}

    @property
    def seq_len(self) -> int:
        """Ids a row."""
        return self._samples[0].seq_len

    @property
    def steps_per_epoch(self) -> float:
        """Batches that one epoch takes (the mean over the data sets)."""
        return self._starts[-1] / len(self._samples) / self._batch_size

    def epoch(self, step: int) -> float:
        """Epochs that are over when `step` begins."""
        epoch, row = self._locate(step * self._batch_size)
        return epoch + row / self._samples[epoch % len(self._samples)].rows

    def order(self, epoch: int) -> Ids:
        """The order of the rows in an epoch: a permutation drawn from (seed, epoch)."""
        if epoch not in self._orders:
            rows = self._samples[epoch % len(self._samples)].rows
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng(_entropy(self._seed, _ORDER, epoch)).permutation(rows)
        return self._orders[epoch]

    def batch(self, step: int) -> Batch:
        """The global batch of a step, always the same for the same seed."""
        return _as_batch(self._masked(step), self._tokenizer.pad_id)

    def micro_batches(self, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> tuple[list[Batch], int]:
        """A rank's share of the step's batch, cut into equal micro-batches, and the scored places of the whole batch.

        Every rank gets the same number of equally shaped micro-batches, of at most `micro_batch_size` rows. Where the
        rows do not divide evenly, copies of the first row with nothing scored fill up.
        """
        if micro_batch_size < 1:
            raise BertlingError(f"micro-batch-size: must be at least 1, not {micro_batch_size}")
        masked = self._masked(step)
        share = -(-self._batch_size // world_size)
        number = -(-share // micro_batch_size)
        size = -(-share // number)
        first = rank * share
        last = min(first + share, self._batch_size)
        return [
            _as_batch(_slice(masked, start, min(start + size, last), size), self._tokenizer.pad_id)
            for start in range(first, first + number * size, size)
        ], masked.count

    def rows(self, step: int) -> list[tuple[Samples, Ids]]:
        """Where the rows of a step come from, in the order of the batch: data sets and indices into them."""
        parts, left, at = [], self._batch_size, step * self._batch_size
        while left:
            epoch, row = self._locate(at)
            indices = self.order(epoch)[row : row + left]
            parts.append((self._samples[epoch % len(self._samples)], indices))
            left, at = left - len(indices), at + len(indices)
        return parts

    def _masked(self, step: int) -> Masked:
        parts = self.rows(step)
        ids = torch.from_numpy(np.concatenate([samples.fetch(indices) for samples, indices in parts]))
        if parts[0][0].labels:
            labels = np.concatenate([samples.fetch_labels(indices) for samples, indices in parts])
            return static_masks(ids, torch.from_numpy(labels), slots=self._slots)
        generator = _generator(self._seed, _TRAIN_MASKS, step)
        return _draw(ids, self._tokenizer, self._mlm_probability, generator, self._continues)

    def _locate(self, at: int) -> tuple[int, int]:
        """The epoch of the `at`-th row ever taken, and the row's place in it."""
        cycle, rest = divmod(at, self._starts[-1])
        turn = next(i for i in range(len(self._samples)) if rest < self._starts[i + 1])
        return cycle * len(self._samples) + turn, rest - self._starts[turn]


def evaluation_batches(
    samples: Samples,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    mlm_probability: float,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The whole set in order with frozen masks, in batches of one shape; rank r gets every world_size-th batch.

    The masks of a row follow from the seed and the row's index alone. The last batch is filled up with copies of
    its first row with nothing scored.
    """
    check_samples([samples], tokenizer)
    slots = _slots([samples], mlm_probability)
    blocks: dict[int, Masked] = {}
    for start in range(rank * batch_size, samples.rows, world_size * batch_size):
        stop = min(start + batch_size, samples.rows)
        needed = range(start // EVAL_BLOCK, -(-stop // EVAL_BLOCK))
        blocks = {b: blocks.get(b) or _eval_block(samples, tokenizer, b, slots, mlm_probability, seed) for b in needed}
        joined = _join(list(blocks.values()))
        offset = needed.start * EVAL_BLOCK
        yield _as_batch(_slice(joined, start - offset, stop - offset, batch_size), tokenizer.pad_id)


def check_samples(samples: Sequence[Samples], tokenizer: Tokenizer) -> None:
    """Refuse data sets that do not fit each other or the vocabulary."""
    if not samples:
        raise BertlingError("no data set is given; prepare one with 'bertling prepare'")
    first = samples[0]
    for one in samples:
        if one.seq_len != first.seq_len:
            raise BertlingError(
                f"{one.path}: has rows of {one.seq_len} ids, {first.path} of {first.seq_len}; choose data of one length"
            )
        if one.labels != first.labels:
            fixed, drawn = (one, first) if one.labels else (first, one)
            raise BertlingError(
                f"{fixed.path}: its masks are fixed, those of {drawn.path} are not; choose data of one kind"
            )
        if one.vocab_fingerprint not in (None, tokenizer.fingerprint):
            raise BertlingError(
                f"{one.path}: prepared with another vocabulary (its vocab.txt lies in it); use that or prepare again"
            )
        if one.vocab_fingerprint is None:
            _check_ids(one, tokenizer)


def check_length(samples: Samples, limit: int) -> None:
    """Refuse rows that are longer than the `limit` of a model."""
    if samples.seq_len > limit:
        raise BertlingError(
            f"{samples.path}: has rows of {samples.seq_len} ids, the model takes at most {limit}; prepare it again "
            f"with -m {limit}"
        )


def _check_ids(samples: Samples, tokenizer: Tokenizer) -> None:
    """A msgpack file does not name its vocabulary, so see whether its ids can come from this one."""
    if samples.max_id >= tokenizer.vocab_size:
        raise BertlingError(
            f"{samples.path}: holds id {samples.max_id}, the vocabulary has {tokenizer.vocab_size} entries; "
            "it was prepared with another vocabulary: name that one with --vocab"
        )
    start = int(samples.fetch_originals(np.zeros(1, dtype=np.int64))[0, 0])
    if start != tokenizer.cls_id:
        raise BertlingError(
            f"{samples.path}: rows begin with id {start}, the vocabulary's [CLS] is {tokenizer.cls_id}; "
            "it was prepared with another vocabulary: name that one with --vocab"
        )


def _slots(samples: Sequence[Samples], mlm_probability: float) -> int:
    if samples[0].labels:
        return max(1, *(one.max_masked for one in samples))
    return slots_per_row(samples[0].seq_len, mlm_probability)


def _entropy(seed: int, *keys: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed % (1 << 64), *keys])


def _generator(seed: int, *keys: int) -> torch.Generator:
    state = _entropy(seed, *keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def _draw(
    ids: Tensor,
    tokenizer: Tokenizer,
    mlm_probability: float,
    generator: torch.Generator,
    continues: Tensor | None = None,
) -> Masked:
    return mask_tokens(
        ids,
        special_ids=tokenizer.special_ids,
        mask_id=tokenizer.mask_id,
        vocab_size=tokenizer.vocab_size,
        generator=generator,
        mlm_probability=mlm_probability,
        continues=continues,
    )


def _eval_block(
    samples: Samples, tokenizer: Tokenizer, block: int, slots: int, mlm_probability: float, seed: int
) -> Masked:
    """Rows block * EVAL_BLOCK ... with their frozen masks; always a full block (the last row repeated at the end)."""
    indices = np.arange(block * EVAL_BLOCK, (block + 1) * EVAL_BLOCK).clip(max=samples.rows - 1)
    ids = torch.from_numpy(samples.fetch(indices))
    if samples.labels:
        return static_masks(ids, torch.from_numpy(samples.fetch_labels(indices)), slots=slots)
    return _draw(ids, tokenizer, mlm_probability, _generator(seed, _EVAL_MASKS, block))


def _join(parts: list[Masked]) -> Masked:
    """Masked rows of several parts, as if they had been masked together."""
    if len(parts) == 1:
        return parts[0]
    starts = accumulate((part.input_ids.numel() for part in parts), initial=0)
    shifted = [
        (part.wanted + start).masked_fill(part.labels == IGNORED, 0) for part, start in zip(parts, starts, strict=False)
    ]
    return Masked(
        input_ids=torch.cat([part.input_ids for part in parts]),
        wanted=torch.cat(shifted),
        labels=torch.cat([part.labels for part in parts]),
        count=sum(part.count for part in parts),
    )


def _slice(masked: Masked, start: int, stop: int, size: int) -> Masked:
    """Rows start..stop as `size` rows; what is missing is filled with copies of a row, with nothing scored."""
    rows, seq_len = masked.input_ids.shape
    slots = len(masked.wanted) // rows
    stop = max(start, stop)
    fill = size - (stop - start)
    source = torch.arange(start, start + size)
    if fill:
        source[stop - start :] = start if stop > start else 0
    labels = masked.labels.view(rows, slots)[source]
    labels[stop - start :] = IGNORED
    shift = (source - torch.arange(size)) * seq_len
    positions = (masked.wanted.view(rows, slots)[source] - shift[:, None]).masked_fill(labels == IGNORED, 0)
    return Masked(
        input_ids=masked.input_ids[source],
        wanted=positions.reshape(-1),
        labels=labels.reshape(-1),
        count=int((labels != IGNORED).sum()),
    )


def _as_batch(masked: Masked, pad_id: int) -> Batch:
    real = masked.input_ids != pad_id
    # A foreign file with static masks may have drawn [PAD] at random: a scored place is no padding.
    real.view(-1)[masked.wanted] = True
    return Batch(
        input_ids=masked.input_ids,
        attention_mask=None if bool(real.all()) else real,
        wanted=masked.wanted,
        labels=masked.labels,
        count=masked.count,
    )
