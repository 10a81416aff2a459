"""Text to token ids, made once on all cores and kept in a cache folder, memory-mapped from there."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import compress
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bertling.duplicates import DuplicateFinder
from bertling.files import BertlingError, atomic_folder, read_json, sha256_of, write_json
from bertling.text import Piece, Progress, TextOptions, kind_of, read_pieces, tidy
from bertling.tokenizer import FastEncoder, Tokenizer

_FORMAT = 3
_MANIFEST = "corpus.json"
_BATCH_CHARACTERS = 1 << 19
_SMALL = 4 << 20  # bytes of input that are done sooner than workers start
_CHARACTERS_PER_TOKEN = 4

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Token ids of text files, in reading order, without [CLS] and [SEP]."""

    folder: Path
    ids: npt.NDArray[np.integer[Any]]
    """Memory-mapped, 1-D, uint16 (uint32 for vocabularies of 65,536 entries or more)."""
    documents: Ids
    """[D + 1]: document d holds ids[documents[d]:documents[d + 1]]; none is empty."""
    pieces: Ids | None
    """[P + 1], method "segment" only: offsets of the pieces of text, one for each row; none crosses a document's end.
    A piece may hold more ids than a row."""
    stats: dict[str, int | float]
    """Counts: documents, lines, characters, tokens, unk_tokens, duplicate_* (second and later occurrences), dropped_*,
    inputs, input_bytes, and the seconds it took."""
    vocab_fingerprint: str


@dataclass(frozen=True)
class _Job:
    """Pieces for a worker, with all that it needs to know."""

    vocabulary: str
    pieces: list[Piece]
    keep: list[npt.NDArray[np.bool_]] | None
    """For each piece, which of its lines stay; None: all."""
    clean: bool
    segment: int
    """Characters of text for a row; 0: documents stay whole."""
    encode: bool
    """Make ids."""
    hashes: bool
    """Hash lines."""


@dataclass
class _Done:
    """What became of a job."""

    ends: list[bool]
    """For each piece: a document ends with it."""
    lengths: list[list[int]] = field(default_factory=list)
    """For each piece the number of ids of each of its rows (method segment), or of all of it."""
    line_hashes: list[bytes] = field(default_factory=list)
    """For each piece 8 bytes for each of its lines, zeros for a blank one; empty if not asked for."""
    ids: bytes = b""
    unk_tokens: int = 0
    characters: int = 0
    lines: int = 0


def build_corpus(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    cache: Path,
    *,
    method: Literal["split", "segment"] = "split",
    seq_len: int | None = None,
    options: TextOptions | None = None,
    drop_duplicates: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenise text files into `cache`/<key>, or open what is there for the same text, vocabulary and options.

    Method "segment" also cuts each document every (seq_len - 2) * 4 characters, and at every 2^20 of them. The bytes do
    not depend on `workers` (default: all cores). `drop_duplicates` leaves out each line seen before, and so each
    document. `progress` gets bytes of input read and in all. From a script, call it under `if __name__ == "__main__"`.
    """
    if not inputs:
        raise BertlingError("input: no text file is given; name at least one")
    if (method == "segment") != (seq_len is not None):
        raise ValueError("seq_len belongs to method 'segment' and is needed there")
    if seq_len is not None and seq_len < 3:
        raise BertlingError(f"seq_len: must be at least 3, not {seq_len}")
    segment = (seq_len - 2) * _CHARACTERS_PER_TOKEN if seq_len is not None else 0
    options = options or TextOptions()
    identity = {
        "format": _FORMAT,
        "inputs": [[sha256_of(path), kind_of(path)] for path in inputs],
        "vocabulary": tokenizer.fingerprint,
        "options": asdict(options),
        "segment": segment,
        "drop_duplicates": drop_duplicates,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    found = _open(cache / key)
    if found:
        return found
    try:
        # What is there but cannot be opened is replaced.
        with atomic_folder(cache / key, force=True) as folder:
            _Builder(folder, inputs, tokenizer, options, segment, workers, progress).build(drop_duplicates)
    except BertlingError:
        # Another process may have finished the same corpus meanwhile.
        found = _open(cache / key)
        if found:
            return found
        raise
    built = _open(cache / key)
    if built is None:
        raise BertlingError(f"{cache / key}: changed while it was written; run the same command again")
    return built


def _open(folder: Path) -> Corpus | None:
    """The corpus of a complete and undamaged folder, else None."""
    if not (folder / _MANIFEST).exists():
        return None
    try:
        manifest = read_json(folder / _MANIFEST, "corpus")
        if any(sha256_of(folder / name) != digest for name, digest in manifest["sha256"].items()):
            return None
        ids = np.memmap(folder / "ids.bin", dtype=manifest["dtype"], mode="r")
        segmented = "pieces.bin" in manifest["sha256"]
        return Corpus(
            folder=folder,
            ids=ids,
            documents=np.fromfile(folder / "documents.bin", dtype="<i8"),
            pieces=np.memmap(folder / "pieces.bin", dtype="<i8", mode="r") if segmented else None,
            stats=manifest["stats"],
            vocab_fingerprint=manifest["vocab_fingerprint"],
        )
    except (BertlingError, OSError, KeyError, ValueError):
        return None


class _Builder:
    """The making of one corpus in a folder."""

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[Path],
        tokenizer: Tokenizer,
        options: TextOptions,
        segment: int,
        workers: int | None,
        progress: Progress | None,
    ) -> None:
        self._folder, self._inputs, self._tokenizer, self._options = folder, inputs, tokenizer, options
        self._segment, self._progress = segment, progress
        self._bytes = sum(path.stat().st_size for path in inputs)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._workers = workers or (1 if self._bytes < _SMALL else cores)
        self._stats: dict[str, int] = {}

    def build(self, drop_duplicates: bool) -> None:
        """Read everything once, or twice where lines are to be dropped; write ids, offsets and the manifest."""
        began = time.monotonic()
        self._tokenizer.save(self._folder / "vocab")
        with ExitStack() as stack:
            pool = stack.enter_context(_pool(self._workers)) if self._workers > 1 else None
            lines = stack.enter_context(DuplicateFinder(self._folder / "lines"))
            documents = stack.enter_context(DuplicateFinder(self._folder / "documents"))
            if drop_duplicates:
                jobs = self._jobs(self._reporter(0, 2), encode=False)
                seen = sum(done.lines for done in _hashed(self._results(pool, jobs), lines, documents))
                lines.finish()
                self._write(self._results(pool, self._jobs(self._reporter(1, 2), drop=lines)))
            else:
                jobs = self._jobs(self._reporter(0, 1))
                self._write(_hashed(self._results(pool, jobs), lines, documents))
                lines.finish()
                seen = self._stats["lines"]
            documents.finish()
        stats: dict[str, int | float] = {
            **self._stats,
            "duplicate_documents": documents.repeats,
            "duplicate_lines": lines.repeats,
            "dropped_lines": seen - self._stats["lines"],
            "inputs": len(self._inputs),
            "input_bytes": self._bytes,
            "seconds": round(time.monotonic() - began, 3),
        }
        manifest = {
            "format": _FORMAT,
            "dtype": self._tokenizer.id_type.str,
            "vocab_fingerprint": self._tokenizer.fingerprint,
            "sha256": {path.name: sha256_of(path) for path in sorted(self._folder.glob("*.bin"))},
            "stats": stats,
        }
        write_json(self._folder / _MANIFEST, manifest)

    def _reporter(self, reading: int, readings: int) -> Progress | None:
        report = self._progress
        if report is None:
            return None
        return lambda done, total: report(reading * total + done, readings * total)

    def _jobs(
        self, progress: Progress | None, *, encode: bool = True, drop: DuplicateFinder | None = None
    ) -> Iterator[_Job]:
        """Batches of about as much text each, in reading order; lines that `drop` has seen before are left out."""
        held: list[Piece] = []
        keep: list[npt.NDArray[np.bool_]] = []
        size = line = 0

        def job() -> _Job:
            return _Job(
                vocabulary=str(self._folder / "vocab"),
                pieces=held,
                keep=keep if drop else None,
                clean=self._options.clean,
                segment=self._segment,
                encode=encode,
                hashes=drop is None,
            )

        for piece in read_pieces(self._inputs, self._options, progress):
            held.append(piece)
            size += len(piece.text)
            if drop:
                count = piece.text.count("\n") + 1
                keep.append(~drop.is_repeat(line, line + count))
                line += count
            if size >= _BATCH_CHARACTERS:
                yield job()
                held, keep, size = [], [], 0
        if held:
            yield job()

    def _results(self, pool: Executor | None, jobs: Iterator[_Job]) -> Iterator[_Done]:
        """Results in the order of the jobs, of which a few are under way at a time."""
        if pool is None:
            encoder = FastEncoder(self._tokenizer)
            for job in jobs:
                yield _work(job, encoder)
            return
        pending: deque[Future[_Done]] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(_work_in_pool, job))
                if len(pending) > 2 * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except (BrokenProcessPool, MemoryError) as error:
            raise BertlingError(
                "tokenising: a worker process died or ran out of memory; give fewer workers"
                " (and in a script of your own, call this under `if __name__ == '__main__'`)"
            ) from error

    def _write(self, results: Iterator[_Done]) -> None:
        tokens = start = documents = dropped = 0
        counts = {"lines": 0, "characters": 0, "unk_tokens": 0}
        names = ["ids.bin", "documents.bin", *(["pieces.bin"] if self._segment else [])]
        with ExitStack() as stack:
            ids, ends, *pieces = (stack.enter_context((self._folder / name).open("wb")) for name in names)
            for file in (ends, *pieces):
                file.write(_int64([0]))
            for done in results:
                ids.write(done.ids)
                for name in counts:
                    counts[name] += getattr(done, name)
                for last, lengths in zip(done.ends, done.lengths, strict=True):
                    for file in pieces:
                        file.write(_int64(tokens + np.cumsum([length for length in lengths if length])))
                    tokens += sum(lengths)
                    if last and tokens > start:
                        ends.write(_int64([tokens]))
                        documents += 1
                    elif last:
                        dropped += 1
                    start = tokens if last else start
        if not tokens:
            raise BertlingError(f"{self._inputs[0]}: no token comes out of this text; check the text and the options")
        self._stats = {"documents": documents, **counts, "tokens": tokens, "dropped_documents": dropped}


def _int64(values: npt.ArrayLike) -> bytes:
    return np.asarray(values, dtype="<i8").tobytes()


def _hashed(results: Iterator[_Done], lines: DuplicateFinder, documents: DuplicateFinder) -> Iterator[_Done]:
    """The same results; the hashes of lines, and of documents as the row of theirs, are taken note of."""
    document = hashlib.blake2b(digest_size=8)
    for done in results:
        finished = []
        lines.add(np.frombuffer(b"".join(done.line_hashes), dtype=np.uint64))
        for last, line_hashes in zip(done.ends, done.line_hashes, strict=True):
            hashes = np.frombuffer(line_hashes, dtype=np.uint64)
            document.update(hashes[hashes != 0].tobytes())
            if last:
                finished.append(document.digest())
                document = hashlib.blake2b(digest_size=8)
        documents.add(np.frombuffer(b"".join(finished), dtype=np.uint64))
        yield done


def _work(job: _Job, encoder: FastEncoder) -> _Done:
    done = _Done(ends=[piece.last for piece in job.pieces])
    ids: list[bytes] = []
    for number, piece in enumerate(job.pieces):
        text = tidy(piece.text, wikitext=piece.wikitext, clean=job.clean)
        lines = text.split("\n")
        if job.keep is not None:
            lines = list(compress(lines, job.keep[number]))
            text = "\n".join(lines)
        lines = [line.strip() for line in lines]
        done.lines += sum(map(bool, lines))
        done.characters += len(text)
        if job.hashes:
            done.line_hashes.append(b"".join(map(_hash, lines)))
        if job.encode:
            step = job.segment or len(text) or 1
            parts = [encoder.encode(text[start : start + step]) for start in range(0, len(text), step)]
            done.lengths.append([len(part) // encoder.tokenizer.id_type.itemsize for part in parts])
            ids += parts
    done.ids = b"".join(ids)
    done.unk_tokens = int((np.frombuffer(done.ids, encoder.tokenizer.id_type) == encoder.tokenizer.unk_id).sum())
    return done


def _hash(line: str) -> bytes:
    return hashlib.blake2b(line.encode(), digest_size=8).digest() if line else bytes(8)


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: there is a process for every core
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    """Without this, a worker whose parent was killed would wait for work for ever."""
    connection.wait([sentinel])
    os._exit(1)


@lru_cache(maxsize=1)
def _encoder(vocabulary: str) -> FastEncoder:
    return FastEncoder(Tokenizer.load(Path(vocabulary)))


def _work_in_pool(job: _Job) -> _Done:
    return _work(job, _encoder(job.vocabulary))
