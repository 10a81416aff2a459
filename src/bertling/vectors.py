"""Where vectors go: an .npy, .parquet or .jsonl file, or JSON lines on standard output; written as they come.

Shapes: N texts, D hidden.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bertling.console import answer
from bertling.files import BertlingError, atomic_file

Vectors = npt.NDArray[np.float32]


class VectorSink(Protocol):
    """Takes vectors chunk by chunk."""

    def add(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Texts and their vectors [N, D]."""

    def close(self) -> None:
        """Write what is left."""


class ToScreen:
    """JSON lines on standard output."""

    def add(self, texts: Sequence[str], vectors: Vectors) -> None:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            answer({"text": text, "vector": vector}, "", as_json=True)

    def close(self) -> None:
        pass


class ToJsonLines:
    """One object a line: text and vector."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def add(self, texts: Sequence[str], vectors: Vectors) -> None:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            line = json.dumps({"text": text, "vector": vector}, ensure_ascii=False)
            self.file.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def close(self) -> None:
        pass


class ToNpy:
    """One array [N, D] of float32, whose length is filled in at the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.shape = file, (0, 0)

    def add(self, texts: Sequence[str], vectors: Vectors) -> None:
        if self.shape == (0, 0):
            self.shape = (0, vectors.shape[1])
            self._header()
        self.file.write(vectors.astype("<f4").tobytes())
        self.shape = (self.shape[0] + len(vectors), self.shape[1])

    def close(self) -> None:
        self.file.seek(0)
        self._header()

    def _header(self) -> None:
        # numpy leaves room in a header for the first axis to grow, so that the data need not move.
        np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": self.shape})


class ToParquet:
    """Columns `text` and `vector` (a list of D float32)."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.writer: Any = None

    def add(self, texts: Sequence[str], vectors: Vectors) -> None:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        table = pa.table({"text": pa.array(list(texts), pa.string()), "vector": column})
        self.writer = self.writer or pq.ParquetWriter(self.file, table.schema)
        self.writer.write_table(table)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


KINDS: dict[str, Callable[[IO[bytes]], VectorSink]] = {".npy": ToNpy, ".parquet": ToParquet, ".jsonl": ToJsonLines}


@contextmanager
def open_vectors(output: Path | None, *, force: bool) -> Iterator[VectorSink]:
    """Where to put vectors; a file is there only once it is whole, and an existing one only goes by `force`."""
    if output is None:
        yield ToScreen()
        return
    kind = KINDS.get(output.suffix)
    if kind is None:
        raise BertlingError(f"{output}: must end in one of {', '.join(KINDS)}")
    if output.exists() and not force:
        raise BertlingError(f"{output}: exists already; give --force to replace it, or choose another name")
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_file(output))
        file = stack.enter_context(temporary.open("r+b"))
        sink = kind(file)
        yield sink
        sink.close()
