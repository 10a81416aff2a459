"""The msgpack layout of masked samples: ONE array [ids_0, labels_0, ids_1, labels_1, ...], gzip or plain.

A label is the original id at a masked place and 0 elsewhere. Shapes: n rows, T ids a row.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
import numpy.typing as npt

from bertling.files import BertlingError, readable_errors

Ids = npt.NDArray[np.int64]
Stored = npt.NDArray[np.unsignedinteger[Any]]

IGNORED = -100
"""The label, in memory, of a place that is not scored."""
MAX_SEQ_LEN = 1 << 20
MAX_VOCAB = 1 << 26
ROWS_PER_READ = 1024
"""Rows that are held as Python lists at a time."""
ROWS_PER_BLOCK = 1 << 16
"""Rows in one array."""


@dataclass(frozen=True)
class Packed:
    """The contents of a file."""

    ids: tuple[Stored, ...]
    """Blocks [n, T], masked."""
    labels: tuple[Stored, ...]
    """Blocks [n, T], 0 where not masked."""
    max_id: int
    max_masked: int
    """The largest number of masked places in one row."""


def read_packed(path: Path) -> Packed:
    """Read a file as a stream, a few rows at a time; anything but the layout is refused in one line."""
    ids: list[Stored] = []
    labels: list[Stored] = []
    max_masked = 0
    for pairs in _read_pairs(path):
        ids.append(_block(path, pairs[0::2]))
        labels.append(_block(path, pairs[1::2]))
        if not ids[0].shape[1] == ids[-1].shape[1] == labels[-1].shape[1]:
            raise BertlingError(f"{path}: its rows differ in length; ids and labels must all have the same length")
        max_masked = max(max_masked, int((labels[-1] > 0).sum(axis=1).max()))
    if not ids:
        raise BertlingError(f"{path}: holds no samples; prepare it again")
    blocks, label_blocks = _joined(ids), _joined(labels)
    max_id = max(int(block.max()) for block in blocks + label_blocks)
    return Packed(blocks, label_blocks, max_id, max_masked)


def _joined(parts: list[Stored]) -> tuple[Stored, ...]:
    """The parts as a few large blocks; `parts` is emptied on the way, so that little is held twice."""
    per_block = ROWS_PER_BLOCK // ROWS_PER_READ
    blocks: list[Stored] = []
    while parts:
        blocks.append(np.concatenate(parts[:per_block]))
        del parts[:per_block]
    return tuple(blocks)


def _read_pairs(path: Path) -> Iterator[list[Any]]:
    """Lists of up to 2 * ROWS_PER_READ elements: ids and labels in turn."""
    with readable_errors(path), path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if zipped else raw
        unpacker = msgpack.Unpacker(
            stream,
            raw=True,
            max_array_len=MAX_SEQ_LEN,
            max_map_len=0,
            max_str_len=0,
            max_bin_len=0,
            max_ext_len=0,
            max_buffer_size=64 << 20,
        )
        try:
            count = unpacker.read_array_header()
            if count % 2:
                raise BertlingError(f"{path}: holds {count} lists; ids and labels must come in pairs")
            for start in range(0, count, 2 * ROWS_PER_READ):
                yield [unpacker.unpack() for _ in range(min(2 * ROWS_PER_READ, count - start))]
            if unpacker.read_bytes(1):
                raise BertlingError(f"{path}: goes on after its array; it must be one msgpack array and nothing else")
        except (msgpack.OutOfData, EOFError) as error:
            raise BertlingError(f"{path}: ends too early; copy it again or prepare it again") from error
        except (ValueError, msgpack.UnpackException, zlib.error, gzip.BadGzipFile) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BertlingError(
                f"{path}: not a msgpack array of lists of integers ({line}); prepare it again"
            ) from error


def _block(path: Path, rows: list[Any]) -> Stored:
    """Lists of integers of one length as the smallest array [n, T] that holds them."""
    for row in rows:
        if not isinstance(row, list):
            raise BertlingError(f"{path}: must hold lists of integers, found a {type(row).__name__}; prepare it again")
        if len(row) != len(rows[0]):
            raise BertlingError(f"{path}: its rows differ in length; ids and labels must all have the same length")
    try:
        block = np.array(rows)
    except (ValueError, OverflowError) as error:
        raise BertlingError(f"{path}: ids and labels must be plain integers; prepare it again") from error
    if block.ndim != 2 or block.shape[1] < 3:
        raise BertlingError(f"{path}: each list must hold at least 3 integers; prepare it again")
    if block.dtype.kind not in "iu":
        raise BertlingError(f"{path}: ids and labels must be integers, found {block.dtype.name}; prepare it again")
    if int(block.min()) < 0 or int(block.max()) >= MAX_VOCAB:
        raise BertlingError(f"{path}: ids and labels must lie between 0 and {MAX_VOCAB - 1}; prepare it again")
    return block.astype(np.uint16 if int(block.max()) < 1 << 16 else np.uint32)


def write_pairs(raw: BinaryIO, blocks: Iterable[tuple[Ids, Ids]], rows: int, *, zipped: bool) -> None:
    """Write `rows` samples from blocks of (ids [n, T], labels [n, T] with -100 where not masked) into an open file."""
    packer = msgpack.Packer(autoreset=False)
    # No name and no time in the gzip header: the same samples give the same bytes.
    with gzip.GzipFile("", "wb", 6, raw, mtime=0) if zipped else nullcontext(raw) as sink:
        packer.pack_array_header(2 * rows)
        for ids, labels in blocks:
            rows -= len(ids)
            if bool((labels == 0).any()):
                raise ValueError("a masked id 0 cannot be told from an unmasked place in this layout")
            stored = np.where(labels == IGNORED, 0, labels)
            for row, label in zip(ids.tolist(), stored.tolist(), strict=True):
                packer.pack(row)
                packer.pack(label)
            sink.write(packer.bytes())
            packer.reset()
        if rows:
            raise ValueError(f"{rows} rows fewer than announced")
