"""Look into a prepared data set: some rows with their masks, and an audit of the masks that training will see.

Shapes: n rows, T ids a row.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bertling.batches import Batch, MaskedBatches
from bertling.files import BertlingError
from bertling.packed import IGNORED, Ids
from bertling.samples import Samples, open_samples
from bertling.tokenizer import Tokenizer

BATCH_SIZE = 64
OVERLAP_ROWS = 256
"""Rows whose masks are compared between two epochs; each may cost one batch."""

Places = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """One row to look at."""

    index: int
    text: str
    """As the model sees it; each masked place as {what it sees|what was there}."""
    original: str


@dataclass(frozen=True)
class Audit:
    """What the masks of a number of batches look like."""

    batches: int
    rows: int
    ordinary: int
    """Places that may be masked: no special token."""
    scored: int
    """Places that are masked."""
    masked: int
    """Of these, shown as [MASK]."""
    random: int
    """Of these, shown as another token."""
    kept: int
    """Of these, shown as they were."""
    special_masked: int
    """Special tokens among the masked; must be 0."""
    special_drawn: int
    """Special tokens among the random ones; must be 0."""
    changed_elsewhere: int
    """Places that differ from the data without being scored; must be 0."""
    overlap: float
    """Share of an epoch's masked places that were masked in the epoch before."""
    overlap_expected: float
    """The same for independent draws."""


@dataclass(frozen=True)
class Inspection:
    """A look into a data set."""

    path: str
    rows: int
    seq_len: int
    static: bool
    """Whether the masks are fixed in the file."""
    shown: list[Row]
    audit: Audit

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def text(self) -> str:
        """A page for people."""
        audit = self.audit
        kind = "masks fixed in the file" if self.static else "masks drawn at training time"
        lines = [f"{self.path}: {self.rows:,} rows of {self.seq_len} ids, {kind}"]
        for row in self.shown:
            lines += ["", f"row {row.index}", f"  model    {row.text}", f"  original {row.original}"]
        scored = max(1, audit.scored)
        lines += [
            "",
            f"audit of {audit.batches} batches, {audit.rows:,} rows",
            f"  masked places  {audit.scored:,} of {audit.ordinary:,} ordinary ones "
            f"({100 * audit.scored / max(1, audit.ordinary):.2f} %)",
            f"  [MASK]         {audit.masked:,} ({100 * audit.masked / scored:.2f} %)",
            f"  random         {audit.random:,} ({100 * audit.random / scored:.2f} %)",
            f"  kept           {audit.kept:,} ({100 * audit.kept / scored:.2f} %)",
            f"  special tokens {audit.special_masked:,} masked, {audit.special_drawn:,} drawn (both must be 0)",
            f"  elsewhere      {audit.changed_elsewhere:,} places changed (must be 0)",
            f"  overlap of two epochs  {100 * audit.overlap:.2f} % "
            + ("(fixed masks)" if self.static else f"(independent draws: {100 * audit.overlap_expected:.2f} %)"),
        ]
        return "\n".join(lines)


def inspect(
    path: Path,
    *,
    rows: int = 3,
    vocabulary: Path | None = None,
    mlm_probability: float = 0.15,
    batches: int = 20,
    seed: int = 0,
) -> Inspection:
    """Show the first rows of the first epoch and audit the masks of its first `batches` batches of 64.

    `vocabulary` names vocab.txt or its folder; a prepared folder has its own, a msgpack file needs one.
    """
    samples = open_samples(path)
    if vocabulary is None and samples.labels:
        raise BertlingError(f"{path}: a msgpack file does not hold its vocabulary; name it with --vocab")
    tokenizer = Tokenizer.load(vocabulary or path)
    size = min(BATCH_SIZE, samples.rows)
    train = MaskedBatches([samples], batch_size=size, seed=seed, mlm_probability=mlm_probability, tokenizer=tokenizer)
    return Inspection(
        path=str(path),
        rows=samples.rows,
        seq_len=samples.seq_len,
        static=samples.labels,
        shown=_shown(train, tokenizer, min(rows, samples.rows), size),
        audit=_audit(train, samples, tokenizer, min(batches, samples.rows // size), size),
    )


def _scored(batch: Batch) -> Places:
    """Which places of the batch are scored, bool [n, T]."""
    assert batch.wanted is not None
    places = np.zeros(batch.input_ids.shape, dtype=bool)
    places.reshape(-1)[batch.wanted[batch.labels != IGNORED].numpy()] = True
    return places


def _originals(train: MaskedBatches, step: int) -> Ids:
    return np.concatenate([samples.fetch_originals(indices) for samples, indices in train.rows(step)])


def _shown(train: MaskedBatches, tokenizer: Tokenizer, rows: int, size: int) -> list[Row]:
    shown: list[Row] = []
    for step in range(-(-rows // size)):
        batch, originals = train.batch(step), _originals(train, step)
        scored = _scored(batch)
        indices = np.concatenate([part for _, part in train.rows(step)])
        for index, ids, truth, places in zip(
            indices.tolist(), batch.input_ids.tolist(), originals, scored, strict=True
        ):
            real = int(np.flatnonzero(truth != tokenizer.pad_id)[-1]) + 1
            seen, there = tokenizer.tokens(ids[:real]), tokenizer.tokens(truth[:real].tolist())
            marked = [f"{{{a}|{b}}}" if place else a for a, b, place in zip(seen, there, places, strict=False)]
            shown.append(Row(index, " ".join(marked).replace(" ##", ""), tokenizer.decode(truth[:real].tolist())))
    return shown[:rows]


def _audit(train: MaskedBatches, samples: Samples, tokenizer: Tokenizer, number: int, size: int) -> Audit:
    special = np.array(tokenizer.special_ids)
    names = ("ordinary", "scored", "masked", "random", "kept", "special_masked", "special_drawn", "changed_elsewhere")
    totals = dict.fromkeys(names, 0)
    for step in range(number):
        batch, truth = train.batch(step), _originals(train, step)
        seen, scored = batch.input_ids.numpy(), _scored(batch)
        masked, kept = scored & (seen == tokenizer.mask_id), scored & (seen == truth)
        other = scored & ~masked & ~kept
        found = (
            ~np.isin(truth, special),
            scored,
            masked,
            other,
            kept,
            scored & np.isin(truth, special),
            other & np.isin(seen, special),
            ~scored & (seen != truth),
        )
        for name, places in zip(names, found, strict=True):
            totals[name] += int(places.sum())
    overlap, expected = _overlap(train, samples, special, min(OVERLAP_ROWS, number * size), size)
    return Audit(batches=number, rows=number * size, **totals, overlap=overlap, overlap_expected=expected)


def _overlap(train: MaskedBatches, samples: Samples, special: Ids, rows: int, size: int) -> tuple[float, float]:
    """Compare the masks of the first rows of epoch 0 with those of the same rows in epoch 1."""
    place_in_next = np.empty(samples.rows, dtype=np.int64)
    place_in_next[train.order(1)] = np.arange(samples.rows)
    indices = train.order(0)[:rows]
    before = _masks_at(train, np.arange(rows), size)
    after = _masks_at(train, samples.rows + place_in_next[indices], size)
    ordinary = (~np.isin(samples.fetch_originals(indices), special)).sum(axis=1).clip(min=1)
    total = max(1, int(after.sum()))
    expected = (before.sum(axis=1) * after.sum(axis=1) / ordinary).sum() / total
    return float((before & after).sum() / total), float(expected)


def _masks_at(train: MaskedBatches, places: Ids, size: int) -> Places:
    """Scored places [n, T] of the rows that training takes at these places of its stream of rows."""
    steps, slots = np.divmod(places, size)
    masks = {step: _scored(train.batch(step)) for step in np.unique(steps).tolist()}
    return np.stack([masks[step][slot] for step, slot in zip(steps.tolist(), slots.tolist(), strict=True)])
