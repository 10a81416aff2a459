"""Text files to prepared splits: whole documents dealt out to train, val and test, cut into rows, and summed up.

Shapes: n rows, T ids a row, W = T - 2 ids of text in it.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bertling.corpus import Corpus, build_corpus
from bertling.datacard import DataCard, SplitCard
from bertling.files import BertlingError, atomic_file, atomic_folder, locked, readable_errors, refuse_file, write_json
from bertling.packed import IGNORED, MAX_SEQ_LEN, Ids, write_pairs
from bertling.samples import MANIFEST, SamplesWriter, Tally, unigram_floors
from bertling.splits import SPLITS, Part, deal, shares_of, whole
from bertling.text import TextOptions, size_of
from bertling.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

FORMATS = {"shards": "", "msgpack": ".msgpack.gz", "msgpack-plain": ".msgpack"}  # how a split's name ends
ROWS_AT_ONCE = 4096
_MASKS, _ROW_HASH = 12, 13
"""Keep the random streams of one seed apart."""


@dataclass(frozen=True)
class Layout:
    """How rows are made and where they go."""

    label: str
    output: Path
    seq_len: int
    seed: int
    method: str
    format: str
    tokenizer: Tokenizer

    @property
    def width(self) -> int:
        """Ids of text in a row, between [CLS] and [SEP]."""
        return self.seq_len - 2

    def name(self, split: str) -> str:
        """The stem that tells what a file holds."""
        return f"{split}_{self.label}_{self.seq_len}_{self.seed}"

    def target(self, split: str) -> Path:
        """Where a split goes."""
        return self.output / (self.name(split) + FORMATS[self.format])

    def places(self, split: str) -> list[Path]:
        """Where a split of this name may lie, in whatever format."""
        return [self.output / (self.name(split) + ending) for ending in FORMATS.values()]

    def card(self) -> Path:
        """Where the data card goes."""
        return self.output / (self.name("card") + ".json")


def prepare(
    inputs: Sequence[Path],
    label: str,
    output: Path,
    seq_len: int,
    tokenizer: Tokenizer,
    *,
    seed: int = 123,
    method: str = "split",
    val_inputs: Sequence[Path] = (),
    test_inputs: Sequence[Path] = (),
    split: tuple[float, float, float] | None = None,
    format: str = "shards",
    options: TextOptions | None = None,
    drop_duplicates: bool = False,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DataCard:
    """Write `<split>_<label>_<seq_len>_<seed>` for train, val and test to `output`, and a data card beside them.

    `val_inputs` and `test_inputs` are that split in full, as they are (nothing dropped). `split` gives the shares of
    train, val and test in `inputs`; shares of splits that come as files are left out and the others scaled up. Unset it
    is 80/10/10, and with `val_inputs` or `test_inputs` all of `inputs` is training text: no other split is cut from it.
    Every seed deals the documents out alike; it gives the order of the training documents and draws the static masks.
    Token ids are kept under `output`/ids and made once for the same text and vocabulary.
    """
    began = time.monotonic()
    layout = Layout(label, output, seq_len, seed, method, format, tokenizer)
    shares = shares_of(split, bool(val_inputs), bool(test_inputs))
    wanted = [s for s in SPLITS if s in shares or (s == "val" and val_inputs) or (s == "test" and test_inputs)]
    _check(layout, inputs)
    for path in (*inputs, *val_inputs, *test_inputs):  # before hours have gone into the first of them
        size_of(path)
    if not force:
        _refuse_existing(layout)

    def corpus(paths: Sequence[Path], drop: bool) -> Corpus:
        cut = seq_len if method == "segment" else None
        return build_corpus(
            paths,
            tokenizer,
            output / "ids",
            method="segment" if method == "segment" else "split",
            seq_len=cut,
            options=options or TextOptions(),
            drop_duplicates=drop,
            workers=workers,
            progress=progress,
        )

    corpora = {"train": corpus(inputs, drop_duplicates)}
    parts, notes = deal(corpora["train"], shares, seed)
    for name, paths in (("val", val_inputs), ("test", test_inputs)):
        if paths:
            corpora[name] = corpus(paths, False)
            parts[name] = whole(corpora[name])
    parts = {name: parts[name] for name in wanted}
    _check_lengths(parts, layout, inputs)
    with ExitStack() as held:
        written = _write(parts, layout, force, held)
        if force:
            notes += _remove_stale(layout, wanted)
        card = _card(layout, list(corpora.values()), parts, written, notes)
        card = replace(card, seconds=round(time.monotonic() - began, 2))
        write_json(layout.card(), card.to_dict())
    return card


def _check(layout: Layout, inputs: Sequence[Path]) -> None:
    if not inputs:
        raise BertlingError("input: no text file is given; name at least one with -i")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", layout.label):
        raise BertlingError(f"label: '{layout.label:.80}' must be letters, digits, '.', '_' or '-', at most 64 of them")
    if not 8 <= layout.seq_len <= MAX_SEQ_LEN:
        raise BertlingError(f"max-len: must lie between 8 and {MAX_SEQ_LEN}, not {layout.seq_len}")
    if not 0 <= layout.seed < 1 << 63:
        raise BertlingError(f"seed: must be 0 or more and fit 63 bits, not {layout.seed}")
    if layout.method not in ("split", "segment"):
        raise BertlingError(f"method: must be split or segment, not '{layout.method}'")
    if layout.format not in FORMATS:
        raise BertlingError(f"format: must be one of {', '.join(FORMATS)}, not '{layout.format}'")
    refuse_file(layout.output, "the prepared data")


def _refuse_existing(layout: Layout) -> None:
    for path in [*(path for name in SPLITS for path in layout.places(name)), layout.card()]:
        if path.exists():
            raise BertlingError(f"{path}: exists already; give --force to replace it, or choose another label or seed")


def _check_lengths(parts: dict[str, Part], layout: Layout, inputs: Sequence[Path]) -> None:
    tokens = parts["train"].tokens
    if tokens < layout.width:
        raise BertlingError(
            f"{inputs[0]}: its {tokens} training tokens are fewer than one sample of {layout.width}; "
            "give more text or a smaller max-len"
        )
    for name, part in parts.items():
        if not part.tokens:
            raise BertlingError(f"{inputs[0]}: too short for a {name} split; give more text or other shares")


def _packed_rows(part: Part, layout: Layout, *, keep_last: bool) -> Iterator[Ids]:
    """Documents one after another, cut every W ids: rows [n, T]; the rest is padded or left out."""
    width = layout.width
    size = ROWS_AT_ONCE * width
    ids = np.asarray(part.corpus.ids)
    buffer: list[npt.NDArray[np.integer]] = []
    held = 0
    for first, last in part.spans:
        for start in range(first, last, size):
            buffer.append(ids[start : min(start + size, last)])
            held += len(buffer[-1])
            if held >= size:
                flat = np.concatenate(buffer)
                full = held // width * width
                yield _wrapped(flat[:full].reshape(-1, width), None, layout)
                buffer, held = [flat[full:]], held - full
    flat = np.concatenate(buffer)
    full = held // width * width
    if full:
        yield _wrapped(flat[:full].reshape(-1, width), None, layout)
    if held > full and keep_last:
        last_row = np.zeros((1, width), dtype=np.int64)
        last_row[0, : held - full] = flat[full:]
        yield _wrapped(last_row, np.array([held - full]), layout)


def _piece_rows(part: Part, layout: Layout) -> Iterator[Ids]:
    """Each piece cut or padded to W ids: rows [n, T]."""
    columns = np.arange(layout.width)
    for start in range(0, len(part.spans), ROWS_AT_ONCE):
        firsts, lasts = part.spans[start : start + ROWS_AT_ONCE].T
        lengths = np.minimum(lasts - firsts, layout.width)
        places = np.minimum(firsts[:, None] + columns, (lasts - 1)[:, None])
        yield _wrapped(part.corpus.ids[places], lengths, layout)


def _wrapped(body: npt.NDArray[np.integer], lengths: Ids | None, layout: Layout) -> Ids:
    """[CLS] body [SEP], int64 [n, T]; of each body [n, W] the first `lengths` ids count, padding follows."""
    tokenizer = layout.tokenizer
    rows = np.full((len(body), layout.seq_len), tokenizer.pad_id, dtype=np.int64)
    rows[:, 0] = tokenizer.cls_id
    if lengths is None:
        rows[:, 1:-1] = body
        rows[:, -1] = tokenizer.sep_id
        return rows
    rows[:, 1:-1] = np.where(np.arange(layout.width) < lengths[:, None], body, tokenizer.pad_id)
    rows[np.arange(len(rows)), lengths + 1] = tokenizer.sep_id
    return rows


@dataclass(frozen=True)
class _Written:
    """What the card needs to know of the rows of a split."""

    tally: Tally
    hashes: list[npt.NDArray[np.uint64]]
    """Blocks of one for each row."""


def _hashed(blocks: Iterator[Ids], layout: Layout, hashes: list[npt.NDArray[np.uint64]]) -> Iterator[Ids]:
    """The same blocks of rows [n, T]; the hash of each row (multiply-and-add modulo 2^64) is put into `hashes`."""
    odd = np.random.default_rng(_ROW_HASH).integers(1 << 63, size=layout.seq_len, dtype=np.uint64) * 2 + 1
    for rows in blocks:
        hashes.append(rows.astype(np.uint64) @ odd)
        yield rows


def _write(parts: dict[str, Part], layout: Layout, force: bool, held: ExitStack) -> dict[str, _Written]:
    """Write all splits; they appear together once all are complete.

    From then on the output folder is `held`, so that the splits of two preparations with one name do not mix.
    """
    written = {}
    with ExitStack() as stack:
        for name, part in parts.items():
            target = layout.target(name)
            hashes: list[npt.NDArray[np.uint64]] = []
            if layout.method == "segment":
                rows = _hashed(_piece_rows(part, layout), layout, hashes)
            else:
                rows = _hashed(_packed_rows(part, layout, keep_last=name != "train"), layout, hashes)
            if layout.format != "shards":
                tally = Tally(layout.tokenizer.vocab_size, layout.tokenizer.pad_id)
                pairs, count = _masked(rows, layout, name, tally), _row_count(part, layout, name)
                with readable_errors(target), stack.enter_context(atomic_file(target)).open("wb") as raw:
                    write_pairs(raw, pairs, count, zipped=target.suffix == ".gz")
            else:
                folder = stack.enter_context(atomic_folder(target, force=force))
                with readable_errors(target):
                    tally = _write_folder(folder, rows, layout, name, len(part.hashes))
            written[name] = _Written(tally, hashes)
        held.enter_context(locked(layout.output, wait=True))
        if not force:
            _refuse_existing(layout)
    return written


def _write_folder(folder: Path, blocks: Iterator[Ids], layout: Layout, split: str, documents: int) -> Tally:
    tokenizer = layout.tokenizer
    writer = SamplesWriter(folder, seq_len=layout.seq_len, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
    try:
        for rows in blocks:
            writer.append(rows)
        floors = unigram_floors(writer.tally.counts, writer.tally.counts, tokenizer.special_ids)
        writer.finish(
            split=split,
            label=layout.label,
            seed=layout.seed,
            method=layout.method,
            documents=documents,
            vocab_fingerprint=tokenizer.fingerprint,
            unigram_accuracy=floors.accuracy,
            unigram_entropy=floors.entropy,
        )
    finally:
        writer.close()
    tokenizer.save(folder)
    return writer.tally


def _row_count(part: Part, layout: Layout, split: str) -> int:
    if layout.method == "segment":
        return len(part.spans)
    return part.tokens // layout.width if split == "train" else -(-part.tokens // layout.width)


def _masked(blocks: Iterator[Ids], layout: Layout, split: str, tally: Tally) -> Iterator[tuple[Ids, Ids]]:
    """Rows with static masks, ids and labels (-100 where not masked), drawn from the seed, the split and the block.

    The rows are counted as they were before.
    """
    import torch  # here alone, and shards need no masks: it takes two seconds to load

    from bertling.masking import mask_tokens

    tokenizer = layout.tokenizer
    for number, rows in enumerate(blocks):
        tally.add(rows)
        entropy = np.random.SeedSequence([layout.seed, _MASKS, SPLITS.index(split), number])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        masked = mask_tokens(
            torch.from_numpy(rows),
            # The layout writes 0 for "not masked", so id 0 is left alone whatever it stands for.
            special_ids=sorted({0, *tokenizer.special_ids}),
            mask_id=tokenizer.mask_id,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
        )
        labels = np.full(rows.shape, IGNORED, dtype=np.int64)
        used = (masked.labels != IGNORED).numpy()
        labels.reshape(-1)[masked.wanted.numpy()[used]] = masked.labels.numpy()[used]
        yield masked.input_ids.numpy(), labels


def _remove_stale(layout: Layout, wanted: Sequence[str]) -> list[str]:
    """Take away older splits of the same name that this call does not make: their text may be in train now."""
    notes, made = [], list(map(layout.target, wanted))
    for path in (path for name in SPLITS for path in layout.places(name) if path not in made):
        if path.is_file() or (path / MANIFEST).is_file():
            with readable_errors(path):
                path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
            notes.append(f"{path.name} of an earlier preparation was removed")
    return notes


def _card(
    layout: Layout, corpora: list[Corpus], parts: dict[str, Part], written: dict[str, _Written], notes: list[str]
) -> DataCard:
    def total(name: str) -> int:
        return sum(int(corpus.stats.get(name, 0)) for corpus in corpora)

    tokenizer, train = layout.tokenizer, written["train"].tally.counts
    splits = {
        name: _split_card(part, written[name].tally, train, layout, layout.target(name).name)
        for name, part in parts.items()
    }
    row_hashes = {name: np.concatenate(one.hashes) for name, one in written.items()}
    overlap = {
        f"{a}/{b}": {
            "documents": len(np.intersect1d(parts[a].hashes, parts[b].hashes)),
            "samples": len(np.intersect1d(row_hashes[a], row_hashes[b])),
        }
        for a, b in combinations(parts, 2)
    }
    for a, b in combinations(parts, 2):
        both = overlap[f"{a}/{b}"]["documents"]
        if both and parts[a].corpus is not parts[b].corpus:
            notes.append(f"{both:,} document(s) are in {a} and in {b}: leave them out of one of the inputs")
    for what in ("documents", "lines"):
        if total(f"dropped_{what}"):
            notes.append(f"{total(f'dropped_{what}'):,} {what} were left out (duplicates, or without any text)")
    return DataCard(
        label=layout.label,
        seq_len=layout.seq_len,
        seed=layout.seed,
        method=layout.method,
        format=layout.format,
        vocab_size=tokenizer.vocab_size,
        vocab_fingerprint=tokenizer.fingerprint,
        documents=total("documents"),
        dropped_documents=total("dropped_documents"),
        lines=total("lines"),
        dropped_lines=total("dropped_lines"),
        characters=total("characters"),
        tokens=total("tokens"),
        unk_tokens=total("unk_tokens"),
        duplicate_documents=total("duplicate_documents"),
        duplicate_lines=total("duplicate_lines"),
        unigram_accuracy=splits["train"].unigram_accuracy,
        unigram_entropy=unigram_floors(train, train, tokenizer.special_ids).entropy,
        splits=splits,
        overlap=overlap,
        notes=notes,
        seconds=0.0,
    )


def _split_card(part: Part, tally: Tally, train: Ids, layout: Layout, path: str) -> SplitCard:
    floors = unigram_floors(train, tally.counts, layout.tokenizer.special_ids)
    return SplitCard(
        path=path,
        documents=len(part.hashes),
        samples=tally.rows,
        tokens=tally.tokens,
        padded_samples=tally.padded_rows,
        dropped_tokens=part.tokens - (tally.tokens - 2 * tally.rows),
        unigram_accuracy=floors.accuracy,
        unigram_cross_entropy=floors.cross_entropy,
    )
