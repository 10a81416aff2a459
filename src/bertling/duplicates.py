"""Exact duplicates among any number of hashes, found under a fixed cap of memory."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt


class DuplicateFinder:
    """Tells which hashes of a stream came earlier in it, in bounded memory: sorted by radix on disk beyond a cap.

    Each hash has an ordinal, its place in the stream; the hash 0 stands for "nothing to compare". Kept at the end: one
    bit for each hash. Up to about 10^9 hashes, sorting one of the 256 parts stays near the cap's default.
    """

    _PARTS = 256

    def __init__(self, folder: Path, *, max_bytes: int = 64 << 20) -> None:
        """`folder` is made when more than `max_bytes` would be held, and removed on exit from the context."""
        self._folder, self._cap = folder, max_bytes
        self._held: list[npt.NDArray[np.uint64]] = []
        self._held_bytes = 0
        self._spilled = False
        self._first = self._count = 0
        self._bits: npt.NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        self.repeats = 0
        """Second and later occurrences, known after `finish`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, hashes: npt.NDArray[np.uint64]) -> None:
        """The next hashes of the stream."""
        self._held.append(hashes)
        self._held_bytes += hashes.nbytes
        self._count += len(hashes)
        if self._held_bytes >= self._cap // 4:  # sorting needs ordinals and copies beside them
            self._spill()

    def finish(self) -> None:
        """Find the repeats among everything added."""
        self._bits = np.zeros(-(-self._count // 8), dtype=np.uint8)
        if not self._spilled:
            self._mark(*self._take())
            return
        self._spill()
        for path in self._paths():
            if path.exists():
                records = np.fromfile(path, dtype=np.uint64).reshape(-1, 2)
                path.unlink()
                self._mark(records[:, 0], records[:, 1])

    def is_repeat(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """For the ordinals from start to stop: was this hash seen earlier in the stream."""
        begin = start // 8
        bits = np.unpackbits(self._bits[begin : -(-stop // 8)], bitorder="little")
        return bits[start - begin * 8 : stop - begin * 8].astype(np.bool_)

    def _take(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        hashes = np.concatenate([*self._held, np.zeros(0, dtype=np.uint64)])
        ordinals = np.arange(self._first, self._count, dtype=np.uint64)
        self._held, self._held_bytes, self._first = [], 0, self._count
        return hashes[hashes != 0], ordinals[hashes != 0]

    def _spill(self) -> None:
        hashes, ordinals = self._take()
        part = (hashes >> np.uint64(56)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=self._PARTS))
        self._folder.mkdir(parents=True, exist_ok=True)
        records = np.stack([hashes[order], ordinals[order]], axis=1)
        for path, rows in zip(self._paths(), np.split(records, ends[:-1]), strict=True):
            with path.open("ab") as file:
                file.write(rows.tobytes())
        self._spilled = True

    def _mark(self, hashes: npt.NDArray[np.uint64], ordinals: npt.NDArray[np.uint64]) -> None:
        order = np.argsort(hashes, kind="stable")  # ordinals rise, so the first of equals is the earliest
        hashes = hashes[order]
        again = ordinals[order[1:][hashes[1:] == hashes[:-1]]]
        self.repeats += len(again)
        bits = np.uint8(1) << (again & np.uint64(7)).astype(np.uint8)
        np.bitwise_or.at(self._bits, (again >> np.uint64(3)).astype(np.int64), bits)

    def _paths(self) -> list[Path]:
        return [self._folder / f"{part:03d}" for part in range(self._PARTS)]
