"""Sample files on disk: memory-mapped integer shards with a manifest, or the msgpack layout of masked samples.

Shapes: N rows, T ids a row, V vocabulary.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from bertling.files import BertlingError, read_json, readable_errors, sha256_of, write_json
from bertling.packed import IGNORED, MAX_SEQ_LEN, MAX_VOCAB, Ids, Stored, read_packed

MANIFEST = "manifest.json"
COUNTS = "counts.bin"
SHARD_BYTES = 64 << 20
SHARD_NAME = re.compile(r"shard-\d{5,8}\.bin")


@dataclass(frozen=True)
class Samples:
    """Rows of token ids, each [CLS] ... [SEP] and padding; `labels` says that the masks are fixed in the file."""

    path: Path
    rows: int
    seq_len: int
    blocks: tuple[Stored, ...]
    """Each [n, T]; memory-mapped where the file allows."""
    label_blocks: tuple[Stored, ...] = ()
    """Beside `blocks` in a file with static masks: the original id at a masked place, 0 elsewhere."""
    vocab_size: int | None = None
    vocab_fingerprint: str | None = None
    max_id: int = 0
    """The largest id in it, original ids included."""
    max_masked: int = 0
    """The largest number of masked places in one row (static masks only)."""

    @property
    def labels(self) -> bool:
        """Whether the masks are stored in the file."""
        return bool(self.label_blocks)

    @cached_property
    def _starts(self) -> Ids:
        return np.cumsum([0] + [len(block) for block in self.blocks], dtype=np.int64)

    def fetch(self, indices: Ids) -> Ids:
        """The rows with these indices (any order), int64 [n, T]; as stored, so with the masks of a static file."""
        return self._gather(self.blocks, indices)

    def fetch_labels(self, indices: Ids) -> Ids:
        """The labels of a static file, int64 [n, T]: the original id at masked places, -100 elsewhere."""
        labels = self._gather(self.label_blocks, indices)
        labels[labels == 0] = IGNORED
        return labels

    def fetch_originals(self, indices: Ids) -> Ids:
        """The rows as they were before any masking, int64 [n, T]."""
        ids = self.fetch(indices)
        if self.labels:
            stored = self._gather(self.label_blocks, indices)
            ids = np.where(stored > 0, stored, ids)
        return ids

    def counts(self, vocab_size: int) -> Ids:
        """How often each id occurs before masking, int64 [V]: what the unigram floors are computed from."""
        if self.vocab_size is not None:
            with readable_errors(self.path / COUNTS):
                counts = np.fromfile(self.path / COUNTS, dtype="<i8").astype(np.int64)
            if len(counts) != self.vocab_size or self.vocab_size != vocab_size or counts.min(initial=0) < 0:
                raise BertlingError(
                    f"{self.path / COUNTS}: does not hold the {vocab_size} counts of the vocabulary; prepare it again"
                )
            return counts
        total = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, self.rows, 8192):
            rows = self.fetch_originals(np.arange(start, min(start + 8192, self.rows)))
            total += np.bincount(rows.reshape(-1), minlength=vocab_size)[:vocab_size]
        return total

    def _gather(self, blocks: tuple[Stored, ...], indices: Ids) -> Ids:
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= self.rows):
            raise IndexError(f"{self.path}: row out of range 0..{self.rows - 1}")
        if len(blocks) == 1:
            return blocks[0][indices].astype(np.int64)
        out = np.empty((len(indices), self.seq_len), dtype=np.int64)
        block_of = np.searchsorted(self._starts, indices, side="right") - 1
        for block in np.unique(block_of):
            here = block_of == block
            out[here] = blocks[block][indices[here] - self._starts[block]]
        return out


@dataclass(frozen=True)
class Floors:
    """What a model without context reaches, from counts of ordinary (non-special) tokens."""

    accuracy: float
    """Share of the scored text that is the most frequent training token."""
    cross_entropy: float
    """Nats a token of the scored text under the training unigram distribution (add-one smoothed)."""
    entropy: float
    """Nats: the entropy of the training unigram distribution itself."""


def unigram_floors(train: Ids, scored: Ids, special_ids: Iterable[int]) -> Floors:
    """Floors on a text with counts `scored` [V] of the unigram model with counts `train` [V]."""
    ordinary = np.ones(len(train), dtype=bool)
    ordinary[list(special_ids)] = False
    known, seen = train[ordinary].astype(np.float64), scored[ordinary].astype(np.float64)
    if known.sum() == 0 or seen.sum() == 0:
        return Floors(accuracy=0.0, cross_entropy=0.0, entropy=0.0)
    share = known / known.sum()
    smoothed = np.log((known + 1) / (known.sum() + len(known)))
    return Floors(
        accuracy=float(seen[int(known.argmax())] / seen.sum()),
        cross_entropy=float(-(seen * smoothed).sum() / seen.sum()),
        entropy=float(-(share[share > 0] * np.log(share[share > 0])).sum()),
    )


class Tally:
    """What there is to say of the rows of a split, summed up as they are added."""

    def __init__(self, vocab_size: int, pad_id: int) -> None:
        self._pad_id = pad_id
        self.counts: Ids = np.zeros(vocab_size, dtype=np.int64)
        """How often each id occurs."""
        self.rows = self.padded_rows = 0

    def add(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Count rows [n, T]."""
        self.counts += np.bincount(rows.reshape(-1), minlength=len(self.counts))
        self.rows += len(rows)
        self.padded_rows += int((rows == self._pad_id).any(axis=1).sum())

    @property
    def tokens(self) -> int:
        """Ids that are not padding, [CLS] and [SEP] included."""
        return int(self.counts.sum() - self.counts[self._pad_id])


class SamplesWriter:
    """Streams rows into the shards of a folder (usually a temporary one from `atomic_folder`); `finish` seals it."""

    def __init__(
        self, folder: Path, *, seq_len: int, vocab_size: int, pad_id: int, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder, self._seq_len, self._vocab_size = folder, seq_len, vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._rows_per_shard = max(1, shard_bytes // (seq_len * self._dtype.itemsize))
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._room = 0
        self._shards: list[dict[str, Any]] = []
        self.tally = Tally(vocab_size, pad_id)

    def append(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Add rows [n, T]; ids must lie in the vocabulary."""
        if rows.ndim != 2 or rows.shape[1] != self._seq_len:
            raise ValueError(f"rows of shape {rows.shape} for samples of length {self._seq_len}")
        if not len(rows):
            return
        if int(rows.min()) < 0 or int(rows.max()) >= self._vocab_size:
            raise ValueError(f"ids outside of the vocabulary of {self._vocab_size}")
        self.tally.add(rows)
        while len(rows):
            if self._file is None:
                self._open_shard()
            raw = np.ascontiguousarray(rows[: self._room], dtype=self._dtype)
            cast(BinaryIO, self._file).write(raw.data)
            self._hash.update(raw.data)
            self._shards[-1]["rows"] += len(raw)
            self._room -= len(raw)
            rows = rows[len(raw) :]
            if not self._room:
                self._close_shard()

    def finish(self, **about: str | int | float | None) -> None:
        """Write counts and manifest; `about` adds what a reader wants to know (label, seed, method, floors ...)."""
        if self._file is not None:
            self._close_shard()
        raw = self.tally.counts.astype("<i8").tobytes()
        (self._folder / COUNTS).write_bytes(raw)
        manifest: dict[str, Any] = {
            "format": 1,
            **about,
            "seq_len": self._seq_len,
            "rows": self.tally.rows,
            "tokens": self.tally.tokens,
            "padded_rows": self.tally.padded_rows,
            "dtype": "uint16" if self._dtype.itemsize == 2 else "uint32",
            "vocab_size": self._vocab_size,
            "counts_sha256": hashlib.sha256(raw).hexdigest(),
            "shards": self._shards,
        }
        write_json(self._folder / MANIFEST, manifest)

    def close(self) -> None:
        """Let go of an unfinished shard after a failure; harmless after `finish`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_shard(self) -> None:
        name = f"shard-{len(self._shards):05d}.bin"
        self._file = (self._folder / name).open("wb")
        self._hash = hashlib.sha256()
        self._room = self._rows_per_shard
        self._shards.append({"file": name, "rows": 0, "sha256": ""})

    def _close_shard(self) -> None:
        self.close()
        self._shards[-1]["sha256"] = self._hash.hexdigest()


def open_samples(path: Path) -> Samples:
    """Open a prepared folder, a .msgpack or a .msgpack.gz file, checked from end to end (lengths, checksums, ids)."""
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise BertlingError(f"{path}: no such sample file or folder; make it with 'bertling prepare'")
    packed = read_packed(path)
    rows, seq_len = sum(map(len, packed.ids)), packed.ids[0].shape[1]
    return Samples(path, rows, seq_len, packed.ids, packed.labels, max_id=packed.max_id, max_masked=packed.max_masked)


def _open_folder(path: Path) -> Samples:
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise BertlingError(f"{path}: not a prepared data set (no {MANIFEST} in it); make it with 'bertling prepare'")
    manifest = read_json(manifest_path, "manifest")
    if manifest.get("format") != 1:
        raise BertlingError(f"{manifest_path}: 'format' must be 1, not {manifest.get('format')!r}; prepare it again")
    seq_len = _integer(manifest_path, manifest, "seq_len", 3, MAX_SEQ_LEN)
    rows = _integer(manifest_path, manifest, "rows", 1, 1 << 48)
    vocab_size = _integer(manifest_path, manifest, "vocab_size", 6, MAX_VOCAB)
    fingerprint = manifest.get("vocab_fingerprint")
    if not isinstance(fingerprint, str):
        raise BertlingError(f"{manifest_path}: 'vocab_fingerprint' must be a text; prepare it again")
    if manifest.get("dtype") not in ("uint16", "uint32"):
        raise BertlingError(f"{manifest_path}: 'dtype' must be uint16 or uint32; prepare it again")
    dtype = np.dtype("<u2" if manifest["dtype"] == "uint16" else "<u4")
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise BertlingError(f"{manifest_path}: 'shards' must be a list of objects; prepare it again")
    if sha256_of(path / COUNTS) != manifest.get("counts_sha256"):
        raise BertlingError(f"{path / COUNTS}: damaged (checksum differs from {MANIFEST}); prepare it again")
    blocks = tuple(_open_shard(path, manifest_path, shard, seq_len, dtype, vocab_size) for shard in shards)
    found = sum(len(block) for block in blocks)
    if found != rows:
        raise BertlingError(f"{manifest_path}: says {rows} rows, its shards hold {found}; prepare it again")
    return Samples(path, rows, seq_len, blocks, (), vocab_size, fingerprint, vocab_size - 1)


def _integer(path: Path, values: dict[str, Any], name: str, low: int, high: int) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        shown = repr(value)[:40]
        raise BertlingError(f"{path}: '{name}' must be an integer from {low} to {high}, not {shown}; prepare it again")
    return value


def _open_shard(
    folder: Path, manifest: Path, shard: dict[str, Any], seq_len: int, dtype: np.dtype[Any], vocab_size: int
) -> Stored:
    """Map one shard [n, T], after checking its name, length, checksum and ids."""
    name = shard.get("file")
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        raise BertlingError(f"{manifest}: a shard's 'file' must look like shard-00000.bin, not {name!r:.60}")
    rows = _integer(manifest, shard, "rows", 1, 1 << 48)
    file = folder / name
    if not file.is_file():
        raise BertlingError(f"{file}: this shard is missing; restore it or prepare the data again")
    expected, size = rows * seq_len * dtype.itemsize, file.stat().st_size
    if size != expected:
        raise BertlingError(f"{file}: has {size} bytes instead of {expected}; restore it or prepare the data again")
    digest, largest = hashlib.sha256(), 0
    with readable_errors(file), file.open("rb") as raw:  # not through the map, whose pages would count as our memory
        while piece := raw.read(1 << 22):
            digest.update(piece)
            largest = max(largest, int(np.frombuffer(piece, dtype).max()))
    if digest.hexdigest() != shard.get("sha256"):
        raise BertlingError(f"{file}: damaged (checksum differs from {MANIFEST}); restore it or prepare the data again")
    if largest >= vocab_size:
        raise BertlingError(f"{file}: holds id {largest}, outside of its vocabulary of {vocab_size}; prepare again")
    with readable_errors(file):
        return np.memmap(file, dtype=dtype, mode="r", shape=(rows, seq_len))


def match_samples(base_dir: Path, pattern: str) -> list[Path]:
    """The data sets under `base_dir`/datasets that match a glob, in natural order, each in one of its forms.

    `x.msgpack` also finds `x.msgpack.gz`, and where neither exists the folder `x`; a pattern without such an ending
    finds the folder `x` first, then the files.
    """
    folder = base_dir / "datasets"
    if not pattern or Path(pattern).is_absolute():
        raise BertlingError(f"pattern '{pattern}': must be a relative pattern of names under {folder}")
    pattern = pattern.rstrip("/")
    endings = {
        ".msgpack": (".msgpack", ".msgpack.gz", ""),
        ".msgpack.gz": (".msgpack.gz", ".msgpack", ""),
    }
    ending = next((e for e in (".msgpack.gz", ".msgpack") if pattern.endswith(e)), "")
    stem = pattern[: len(pattern) - len(ending)]
    found: dict[str, Path] = {}
    for form in endings.get(ending, ("", ".msgpack", ".msgpack.gz")):
        for path in _glob(folder, stem + form):
            found.setdefault(_stem(path), path)
    if not found:
        there = [path.name for path in _glob(folder, "*")]
        shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        hint = f"there is: {shown}" if there else "no data set is there; make one with 'bertling prepare -o'"
        raise BertlingError(f"pattern '{pattern}': matches nothing in {folder}; {hint}")
    return sorted(found.values(), key=_natural)


def _glob(folder: Path, pattern: str) -> list[Path]:
    """Prepared folders and msgpack files that match, in natural order; hidden (unfinished) ones left out."""
    try:
        paths = [path for path in folder.glob(pattern) if not path.name.startswith(".")]
    except (ValueError, NotImplementedError) as error:
        raise BertlingError(f"pattern '{pattern}': not a valid pattern ({error})") from error
    whole = [
        p for p in paths if (p / MANIFEST).is_file() or (p.is_file() and p.name.endswith((".msgpack", ".msgpack.gz")))
    ]
    return sorted(whole, key=_natural)


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz").removesuffix(".msgpack") if path.is_file() else path.name
    return str(path.with_name(name))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts name_9 before name_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part]
